"""Journals of many sites arrive in one place, each line once, whatever goes down meanwhile."""

import time
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from support.children import Command
from support.journals import NOON, alert, text, write
from support.programs import Nats, postgres

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.scale.ship import Line, _line, collect, ship
from mmtransfer.scale.sinks import ParquetSink, open_sink
from mmtransfer.server.hits import Hit
from mmtransfer.server.index import Index
from mmtransfer.server.postgres import PostgresIndex

DAY, NEXT = "2025-11-25", "2025-11-26"
FIRE = text("gate", NOON, "There is a fire at the gate.", sentiment="negative")


@pytest.fixture
def broker(tmp_path):
    made = Nats(tmp_path / "nats")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def journal(tmp_path):
    folder = tmp_path / "journal"
    write(folder, DAY, FIRE, alert(FIRE, "fire"), text("gate", NOON + 60, "All is well."))
    return folder


def found(place):
    with Index(place) as index:
        return [(hit.camera, hit.text, hit.alerts) for hit in index.search().hits]


def test_lines_revisions_and_what_is_forgotten_arrive_once(journal, broker, tmp_path, capsys):
    place, files = tmp_path / "index.sqlite", tmp_path / "lines"
    send = ["ship", str(journal), "--to", broker.address, "--site", "north", "--once"]
    collected = ["ship", broker.address, "--once", "--to"]
    assert main(send) == 0
    (sent,) = capsys.readouterr().out.splitlines()
    assert sent == f"{broker.address.replace('site:wisteria@', '')}: 3 lines sent"
    assert main([*collected, str(place)]) == 0
    expected = [("north/gate", "All is well.", ()), ("north/gate", FIRE["text"], ("fire",))]
    assert found(place) == expected
    (journal / "shipped.json").unlink()  # everything is sent again
    write(journal, NEXT, text("gate", NOON + 60, "All is swell.", revision=1))
    assert main(send) == 0
    assert main([*collected, str(place)]) == 0
    assert found(place) == [("north/gate", "All is swell.", ()), *expected[1:]]
    assert main(["forget", "--journal", str(journal), "--text", "fire"]) == 0
    assert main(send) == 0
    assert main([*collected, str(place)]) == 0
    assert found(place) == [("north/gate", "All is swell.", ())]
    for _ in range(2):  # rows are written once, too
        assert main([*collected, str(files)]) == 0
    table = pq.read_table(files).to_pylist()
    assert [row["text"] for row in table if row["event"] is None] == [
        *(FIRE["text"], "All is well.", "All is swell.")
    ]
    assert {row["camera"] for row in table} == {"north/gate"}
    assert [row["keyword"] for row in table if row["event"] == "alert"] == ["fire"]
    with Index(place) as index:
        (hit,) = index.search().hits
        assert (hit.clip, hit.source) == (None, "")  # they are on another machine


def test_what_was_delivered_but_not_confirmed_is_taken_in_once(
    journal, broker, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    for place in (str(tmp_path / "index.sqlite"), str(tmp_path / "lines")):
        ship(journal, broker.address, once=True)
        sink = open_sink(place)
        with monkeypatch.context() as patch:
            take = sink.take
            patch.setattr(sink, "take", lambda *given, take=take: (take(*given), kill()))
            with pytest.raises(Killed):
                collect(broker.address, sink, once=True)
        sink.close()
        again = open_sink(place)
        collect(broker.address, again, once=True)
        again.close()
    assert len(found(tmp_path / "index.sqlite")) == 2
    assert pq.read_table(tmp_path / "lines").num_rows == 3
    (tmp_path / "lines" / "lines-00000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="expected a file of shipped lines"):
        ParquetSink(tmp_path / "lines")


def test_another_journal_in_its_place_is_sent_anew(journal, broker, tmp_path):
    ship(journal, broker.address, once=True)
    (journal / f"{DAY}.0000.jsonl").write_text("")
    write(journal, DAY, text("gate", NOON + 90, "New."))
    assert ship(journal, broker.address, once=True).lines == 1
    sink = open_sink(str(tmp_path / "index.sqlite"))
    assert collect(broker.address, sink, once=True).lines == 4
    sink.close()
    assert len(found(tmp_path / "index.sqlite")) == 3


def test_what_no_column_takes_is_empty_and_the_line_is_there(tmp_path):
    strange = {
        "revision": ["4294967296", "1.5", "-1e999", '"a"'],
        "text": [r'"\ud800"', "7"],
        "segment": [r'"\ud800"'],
        "start": ["1" + "0" * 400, "1e300", "NaN", "1e999", '"a"'],
        "end": ["1" + "0" * 400, "[]"],
    }
    texts = [
        f'{{"camera": "gate", "{name}": {value}}}\n'
        for name, values in strange.items()
        for value in values
    ]
    lines, begin = list[Line](), 0
    for one in [*texts, '{"camera": "gate", "revision": 1, "start": true, "end": 2}\n']:
        lines.append(Line("j", "", f"{DAY}.0000.jsonl", begin, one.encode()))
        begin = lines[-1].end
    ParquetSink(tmp_path / "lines").take(lines, {})
    rows = pq.read_table(tmp_path / "lines").to_pylist()
    assert [row["line"] + "\n" for row in rows] == [line.data.decode() for line in lines]
    assert {row["revision"] for row in rows[:-1]} == {None}
    assert [row["text"] for row in rows[4:6]] == ["\ufffd", None]
    assert rows[6]["id"] == "\ufffd"
    assert [rows[7]["start"], rows[7]["at"], rows[8]["at"]] == [None, None, None]
    assert (rows[-1]["revision"], rows[-1]["start"], rows[-1]["end"]) == (1, 1.0, 2.0)


@pytest.mark.parametrize(
    "changed",
    [
        *({"Mmtransfer-Place": place} for place in (str(10**30), "9" * 5000, "-1", "")),
        *({"Mmtransfer-Site": site} for site in ("a/b", "a\0", "\ud800")),
        *({"Mmtransfer-File": f"{DAY}.{number}.jsonl"} for number in ("9" * 5000, "a")),
        *({"subject": f"mmtransfer.{journal}"} for journal in ("a\0", "a" * 5000, "")),
    ],
)
def test_a_message_that_is_no_line_is_left_out(changed):
    headers = {"Mmtransfer-Site": "north", "Mmtransfer-File": f"{DAY}.0000.jsonl"}
    headers["Mmtransfer-Place"] = "9" * 18
    message = SimpleNamespace(subject="mmtransfer.a1b2", headers=headers, data=b"{}\n")
    assert _line(message) == Line("a1b2", "north", f"{DAY}.0000.jsonl", 10**18 - 1, b"{}\n")
    message.subject = changed.get("subject", message.subject)
    message.headers = headers | changed
    assert _line(message) is None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["{journal}", "--to", "folder"], "expected nats://… or postgresql://…, found folder"),
        (["{journal}", "--to", "nats://u:hexburn@127.0.0.1:9"], "cannot be used as a broker"),
        (["{journal}", "--to", "nats://u:hexburn@127.0.0.1:x"], "not an address"),
        (["{journal}", "--to", "{broker}", "--site", "a/b"], "expected letters, digits"),
        (["none", "--to", "{broker}"], "expected the folder of a journal"),
        (["nats://u:hexburn@127.0.0.1:9", "--to", "x.sqlite"], "cannot be used as a broker"),
        (["{broker}", "--to", "s3://u:hexburn@x"], "expected postgresql://…, a file that ends"),
        (["{wrong}", "--to", "x.sqlite"], "uthoriz"),
    ],
)
def test_what_cannot_be_used_is_one_line_without_secrets(
    journal, broker, tmp_path, monkeypatch, capsys, arguments, why
):
    monkeypatch.chdir(tmp_path)
    names = {"journal": journal, "broker": broker.address}
    names["wrong"] = broker.address.replace("wisteria", "hexburn")
    assert main(["ship", *(text.format(**names) for text in arguments), "--once"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert "hexburn" not in line
    assert "wisteria" not in line


@pytest.mark.slow
def test_a_fleet_arrives_whole_although_broker_and_shippers_go_down(tmp_path):
    """Eight sites write while each of their shippers, the collector and the broker are killed."""
    broker = Nats(tmp_path / "nats")
    folders = [tmp_path / f"site{n}" for n in range(8)]
    expected = set()

    def more(step):
        for number, folder in enumerate(folders):
            lines = []
            for n in range(step * 400, step * 400 + 400):
                lines.append(text("gate", NOON + n, f"line {n} of {number}"))
                if n % 50 == 0:  # revised a little later
                    lines.append(text("gate", NOON + n, f"line {n} of {number}!", revision=1))
                expected.add((f"site{number}/gate", lines[-1]["text"]))
            write(folder, DAY, *lines)

    with postgres() as (address, _):
        place = f"{address}postgres"
        sending = [
            ["ship", str(folder), "--to", broker.address, "--site", folder.name]
            for folder in folders
        ]
        more(0)
        running = [Command(*command) for command in sending]  # the broker is down
        running.append(Command("ship", broker.address, "--to", place))
        for step in range(1, 4):
            time.sleep(2)
            more(step)
            broker.start()
            time.sleep(3)
            for number in (step, step + 3, 8):
                running[number].kill()
                running[number].wait()
            more(step + 3)
            broker.stop()
            for number in (step, step + 3):
                running[number] = Command(*sending[number])
            running[8] = Command("ship", broker.address, "--to", place)
        broker.start()
        with PostgresIndex(place) as index:
            deadline, hits = time.monotonic() + 120, list[Hit]()
            while len(hits) < len(expected) and time.monotonic() < deadline:
                time.sleep(1)
                hits, cursor = [], None
                while not hits or cursor is not None:
                    page = index.search(limit=500, cursor=cursor)
                    hits, cursor = hits + page.hits, page.cursor
                    if not page.hits:
                        break
        for process in running:
            process.kill()
            process.wait()
        broker.stop()
    assert len(hits) == len(expected)
    assert {(hit.camera, hit.text) for hit in hits} == expected
