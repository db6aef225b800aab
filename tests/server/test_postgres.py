"""The index of several machines in a real PostgreSQL: as the one in a file, and for all of them."""

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from support.journals import NOON, alert, sound, text, time_zone, write
from support.programs import postgres
from support.servers import running

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.server import postgres as module
from mmtransfer.server.hits import Hit
from mmtransfer.server.index import FILE_NAME, Index
from mmtransfer.server.postgres import PostgresIndex

DAY = "2025-11-25"
FIRE = text("gate", NOON, "There is a fire at the gate.", sentiment="negative", sentiment_prob=0.9)
GATE = text("yard", NOON + 60, "Please open the gate, Zoë.", sentiment="neutral")
CHINESE = text("yard", NOON + 120, "仓库着火了, 打 119")
LATER = text("gate", NOON + 40 * 86400, "Nothing to report, it's 'quiet' \\ here.")
QUERIES = (
    *("fire", "FIRE gate", "gate", '"open the gate"', '"the gate open"', "rep", "re", "zoe", "ZOË"),
    *(
        "火",
        "着火",
        "火着",
        "仓库 119",
        "...",
        "",
        "it's",
        '"quiet here"',
        "cam",
        "camera",
        "=camera",
    ),
    *('"', '""" OR "', "fire) | (gate", "fire & !gate", "fire:*", "<->", "'; DROP TABLE lines; --"),
    *("fire\0gate", "\ud800", "a" * 5000, "a " * 2000, "\\", "ﬁre", "e\u0301", "\u0301"),
)
FILTERS: tuple[dict[str, Any], ...] = (
    *({"camera": "gate"}, {"camera": ["gate", "yard"], "alert": True}, {"camera": "cellar"}),
    *({"alert": "fire", "sentiment": "negative"}, {"after": NOON + 60, "before": NOON + 120}),
    *({"sound": ""}, {"sound": "loud"}, {"sound": "alarm"}, {"camera": []}, {"alert": "o'clock"}),
)


@pytest.fixture(scope="module")
def server():
    with postgres() as (address, files):
        yield address, files


@pytest.fixture
def address(server, request):
    name = f"d{abs(hash(request.node.name))}"
    with psycopg.connect(f"{server[0]}postgres", autocommit=True) as made:
        made.execute(f"CREATE DATABASE {name}")
    return server[0] + name


@pytest.fixture
def journal(tmp_path):
    folder = tmp_path / "journal"
    lines = (FIRE, alert(FIRE, "fire"), GATE, sound("yard", NOON + 118, "alarm"), CHINESE)
    write(folder, DAY, *lines, sound("gate", NOON + 500), {"camera": "gate", "event": "connected"})
    write(folder, "2026-01-04", LATER, alert(LATER, "o'clock"))
    return folder


def everything(index):
    """All that an index answers to all that it is asked here."""
    hits = index.search().hits
    found = [[(hit.id, hit.kind, hit.text) for hit in hits]]
    found += [[hit.id for hit in index.search(query).hits] for query in QUERIES]
    found += [
        [hit.id for hit in index.search(query, **filters).hits]
        for filters in FILTERS
        for query in ("", "gate", "119")
    ]
    found += [[index.find(hit.camera, hit.id, hit.at) for hit in hits]]
    found += [[index.get(hit.key) for hit in hits], [index.get(hits[0].key + 1)]]
    found += [index.names(kind) for kind in ("camera", "alert", "sentiment", "sound")]
    return [*found, index.timeline(NOON, NOON + 600, 10)]


def test_it_answers_as_the_index_in_a_file_does(journal, address, tmp_path):
    with Index(tmp_path / "index.sqlite") as file, PostgresIndex(address, journal) as index:
        for lines in (
            [],
            [text("yard", NOON + 60, "Please open the crate.", revision=1)],
            [{**text("yard", NOON + 120, ""), "revision": 1}, {**text("gate", NOON, "")}],
            [text("gate", NOON, f"one {n}", number=n) for n in range(1, 40)],
            [{"camera": "yard", "event": "forgotten", "before": NOON + 119}],
        ):
            if lines:
                write(journal, "2026-01-05", *lines)
            assert index.catch_up(journal) == file.catch_up(journal)
            assert everything(index) == everything(file)
            assert index.catch_up(journal).lines == 0
        before = everything(index)
        index.rebuild(journal)
        assert everything(index) == before
        (journal / "2026-01-05.0000.jsonl").write_text("")  # another journal in its place
        for one in (index, file):
            one.catch_up(journal)
        assert everything(index) == everything(file)


def test_pages_follow_each_other_and_are_handed_out_in_time(tmp_path, address, monkeypatch):
    journal = tmp_path / "journal"
    write(journal, DAY, *(text("gate", NOON + 86400 * n, f"line {n} gate") for n in range(120)))
    with PostgresIndex(address, journal) as index:
        index.catch_up(journal)
        for query, budget in (("", 9.0), ("gate", 9.0), ("gate", -1.0)):
            monkeypatch.setattr(module, "_BUDGET_S", budget)
            seen, cursor, pages = list[Hit](), None, 0
            while pages == 0 or cursor is not None:
                page = index.search(query, limit=7, cursor=cursor)
                seen, cursor, pages = seen + page.hits, page.cursor, pages + 1
            assert [hit.text for hit in seen] == [f"line {n} gate" for n in reversed(range(120))]
            assert pages >= 18
        with pytest.raises(UserError, match="cursor: expected"):
            index.search(cursor="1 OR 1")


def test_several_machines_write_to_one_at_once(tmp_path, address):
    folders = [tmp_path / f"site{n}" for n in range(4)]
    for number, folder in enumerate(folders):
        lines = [text(f"c{number}", NOON + n / 100, f"word{n} site{number}") for n in range(2000)]
        write(folder, DAY, *lines)
    with ExitStack() as opened:
        indexes = [opened.enter_context(PostgresIndex(address, folder)) for folder in folders]
        threads = [
            threading.Thread(target=index.catch_up, args=(folder,))
            for index, folder in zip(indexes, folders, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = indexes[0].timeline(NOON, NOON + 100, 1)
        assert counts == {f"c{n}": [(2000, 0, 0)] for n in range(4)}
        found = {hit.camera: hit.source for hit in indexes[1].search("word7").hits}
        # Files and addresses of the others are not this machine's.
        assert found == {f"c{n}": "rtsp://10.0.0.7/c1" if n == 1 else "" for n in range(4)}
        indexes[2].rebuild(folders[2])
        assert indexes[0].timeline(NOON, NOON + 100, 1) == counts


def test_what_is_forgotten_is_in_no_file_of_the_database(journal, address, server):
    more = [text("yard", NOON + 200 + n / 9, f"filler{n} Hexburn{n} morning") for n in range(500)]
    write(journal, DAY, *more, text("gate", NOON + 900, "A quiet Hexburn1 end"))
    assert main(["index", "--journal", str(journal), "--index", address]) == 0
    with psycopg.connect(address, autocommit=True) as made:
        made.execute("CHECKPOINT")
        assert b"hexburn77" in _files(server[1])
        arguments = ["--journal", str(journal), "--index", address]
        assert main(["forget", *arguments, "--text", "hexburn"]) == 0
        assert main(["forget", *arguments, "--camera", "gate", "--before", "2026-02-01"]) == 0
        made.execute("CHECKPOINT")
        assert b"hexburn" not in _files(server[1]).lower()
    with PostgresIndex(address, journal) as index:
        assert [hit.text for hit in index.search().hits] == [CHINESE["text"], "alarm", GATE["text"]]
        assert index.names("camera") == ["yard"]
        assert index.names("alert") == []


def test_a_recording_is_forgotten_in_another_time_zone_than_it_was_indexed_in(tmp_path, address):
    journal = tmp_path / "journal"
    write(journal, DAY, text("talk", 3.0, "Hexburn opens."), text("talk", 9.0, "It closes."))
    with time_zone("HST10"):
        assert main(["index", "--journal", str(journal), "--index", address]) == 0
    with time_zone("UTC0"):
        given = ["--journal", str(journal), "--index", address, "--text", "hexburn"]
        assert main(["forget", *given]) == 0
    with PostgresIndex(address, journal) as index:
        assert [hit.text for hit in index.search().hits] == ["It closes."]


def test_no_line_keeps_those_behind_it_from_being_taken_in(tmp_path, address):
    """What PostgreSQL or SQLite do not take as it is."""
    journal, long = tmp_path / "journal", "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    strange = [
        {"camera": "gate", "event": "reading", "of": "gate/\ud800\0", "at": NOON},
        text("gate", NOON + 1, "sure", sentiment="neutral", sentiment_prob=1e-50),
        text("gate", NOON + 2, "large", sentiment="neutral", sentiment_prob=1e300),
    ]
    damaged = [
        text("gate", 1e10, "late"),
        text("gate", 1e300, "later"),
        {"camera": "gate", "event": "reading", "of": long, "at": NOON},
        text("gate", NOON + 3, "class", sentiment=long),
        text(long, NOON + 4, "camera"),
        alert(FIRE, long),
        {"camera": "gate", "event": "forgotten", "lines": [["gate@1", float("nan")]]},
    ]
    write(journal, DAY, *strange, *damaged, FIRE)
    for index in (PostgresIndex(address, journal), Index(journal / FILE_NAME)):
        with index:
            assert index.catch_up(journal).damaged == len(damaged)
            found = [hit.text for hit in index.search().hits]
            assert found == ["large", "sure", FIRE["text"]]
            probs = [hit.sentiment_prob for hit in index.search(sentiment="neutral").hits]
            assert probs == [1.0, 0.0]


def _files(data: Path) -> bytes:
    """Tables and indexes; the log of what was written is another one's to keep."""
    return b"".join(path.read_bytes() for path in (data / "base").rglob("*") if path.is_file())


def test_the_page_searches_it_also_without_a_journal(journal, address):
    with PostgresIndex(address, journal) as index:
        index.catch_up(journal)
    with running({}, index=address) as served:
        hits = httpx2.get(f"{served.url}/api/search", params={"q": "fire"}).json()["hits"]
        assert [hit["text"] for hit in hits] == [FIRE["text"]]
        with psycopg.connect(address, autocommit=True) as made:
            made.execute("ALTER TABLE mmtransfer.months RENAME TO gone")
            answer = httpx2.get(f"{served.url}/api/search", params={"q": "fire"})
            assert (answer.status_code, "months" in answer.text) == (503, False)
            made.execute("ALTER TABLE mmtransfer.gone RENAME TO months")
            made.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'mmtransfer'"
            )
        answers = [httpx2.get(f"{served.url}/api/search", params={"q": "fire"}) for _ in range(2)]
        assert len(answers[-1].json()["hits"]) == 1  # it has connected again


def test_an_address_that_cannot_be_used_is_one_line_without_secrets(journal, address, capsys):
    for wrong, why in (
        (address.replace("wisteria", "hexburn"), "authentication failed"),
        (address + "hexburn", "does not exist"),
        ("postgresql://site:hexburn@127.0.0.1:9/x", "refused"),
        ("postgresql://site:hexburn@127.0.0.1:nine/x", "not an address"),
        ("postgresql://site:hexburn%@127.0.0.1:9/x", "expected postgresql://"),
    ):
        assert main(["index", "--journal", str(journal), "--index", wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line
        assert "site" not in line
        assert ":hexburn" not in line
    with psycopg.connect(address, autocommit=True) as made:
        with PostgresIndex(address):
            made.execute("UPDATE mmtransfer.format SET number = 99")
        with pytest.raises(UserError, match="expected an index of format 1, found 99"):
            PostgresIndex(address)
    assert not (journal / FILE_NAME).exists()
