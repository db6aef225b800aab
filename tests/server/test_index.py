"""The index: everything of a journal is found, once, whatever happens to the process."""

import json
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.children import Command
from support.journals import NOON, alert, sound, text, write

from mmtransfer.cli import main
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.server import index as module
from mmtransfer.server.index import FILE_NAME, Index

DAY = "2025-11-25"
FIRE = text("gate", NOON, "There is a fire at the gate.", sentiment="negative", sentiment_prob=0.9)
GATE = text("yard", NOON + 60, "Please open the gate, Zoë.", sentiment="neutral")
CHINESE = text("yard", NOON + 120, "仓库着火了, 打 119")
LATER = text("gate", NOON + 40 * 86400, "Nothing to report.")


@pytest.fixture
def journal(tmp_path):
    folder = tmp_path / "journal"
    lines = (FIRE, alert(FIRE, "fire"), GATE, sound("yard", NOON + 118, "alarm"), CHINESE)
    write(folder, DAY, *lines, sound("gate", NOON + 500), {"camera": "gate", "event": "connected"})
    write(folder, "2026-01-04", LATER)
    return folder


def texts(page):
    return [hit.text for hit in page.hits]


def found(journal, query="", **filters):
    with Index(journal / FILE_NAME) as index:
        index.catch_up(journal)
        return texts(index.search(query, **filters))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("fire", [FIRE]),
        ("FIRE gate", [FIRE]),  # all words, in any order
        ("gate", [GATE, FIRE]),  # newest first
        ('"open the gate"', [GATE]),
        ('"the gate open"', []),  # side by side
        ("rep", [LATER]),  # the beginning of a word
        ("re", []),
        ("zoe", [GATE]),
        ("火", [CHINESE]),
        ("着火", [CHINESE]),
        ("火着", []),
        ("仓库 119", [CHINESE]),
        ("...", []),
    ],
)
def test_words_find_lines_of_any_script(journal, query, expected):
    assert found(journal, query) == [line["text"] for line in expected]


def test_filters_and_words_go_together(journal):
    assert found(journal, camera="gate") == [LATER["text"], "loud", FIRE["text"]]
    assert found(journal, camera=["gate", "yard"], alert=True) == [FIRE["text"]]
    assert found(journal, "gate", alert="fire", sentiment="negative") == [FIRE["text"]]
    assert found(journal, "gate", camera="yard", sentiment="negative") == []
    assert found(journal, camera="cellar") == []
    assert found(journal, after=NOON + 60, before=NOON + 120) == ["alarm", GATE["text"]]
    assert found(journal, sound="") == ["loud", "alarm"]
    assert found(journal, sound="loud") == ["loud"]
    assert found(journal, "119", sound="alarm") == [CHINESE["text"]]  # spoken while it sounded
    assert found(journal, "gate", sound="alarm") == []


def test_a_hit_says_what_the_journal_says(journal):
    with Index(journal / FILE_NAME) as index:
        assert index.catch_up(journal).lines == 8
        (hit,) = index.search("fire").hits
        assert (hit.camera, hit.id, hit.start, hit.end) == ("gate", FIRE["id"], NOON, NOON + 2)
        assert (hit.kind, hit.alerts, hit.sentiment) == ("line", ("fire",), "negative")
        assert hit.sentiment_prob == 0.9
        assert hit.source == FIRE["source"]
        assert hit.at == NOON
        assert index.get(hit.key) == hit
        assert index.get(hit.key + 1) is None
        assert index.names("camera") == ["gate", "yard"]
        assert index.names("sound") == ["alarm", "loud"]
        parts = index.timeline(NOON, NOON + 600, 10)
        assert parts["gate"][0] == (1, 1, 0)
        assert parts["gate"][8] == (0, 0, 1)
        assert parts["yard"][1:3] == [(1, 0, 1), (1, 0, 0)]


def test_pages_follow_each_other_without_gap_or_repeat(tmp_path):
    lines = [text("gate", NOON + 86400 * n, f"line {n} gate") for n in range(120)]
    same = [text("gate", NOON, f"one {n}", number=n) for n in range(1, 40)]  # at the same time
    journal = tmp_path / "journal"
    write(journal, DAY, *lines, *same)
    with Index(journal / FILE_NAME) as index:
        index.catch_up(journal)
        for query in ("", "gate"):
            seen, cursor = [], None
            while True:
                page = index.search(query, limit=7, cursor=cursor)
                seen += texts(page)
                cursor = page.cursor
                if cursor is None:
                    break
            assert len(seen) == len(set(seen)) == (120 if query else 159)
            assert [t for t in seen if "line" in t] == [line["text"] for line in lines[::-1]]
        with pytest.raises(UserError, match="cursor: expected"):
            index.search(cursor="1 OR 1")


def test_a_page_is_handed_out_in_time_and_the_next_goes_on_there(journal, monkeypatch):
    monkeypatch.setattr(module, "_BUDGET_S", -1.0)
    with Index(journal / FILE_NAME) as index:
        index.catch_up(journal)
        page = index.search("fire")
        assert (page.hits, page.cursor is None) == ([], False)
        monkeypatch.undo()
        assert texts(index.search("fire", cursor=page.cursor)) == [FIRE["text"]]


def test_a_revision_replaces_its_line_and_an_empty_one_removes_it(journal):
    index = Index(journal / FILE_NAME)
    index.catch_up(journal)
    again = text("yard", NOON + 60, "Please open the crate, Zoë.", revision=1)
    gone = {**text("yard", NOON + 120, ""), "revision": 1}
    for line in (again, gone):  # in a batch each, and below together with what they replace
        write(journal, DAY, line)
        index.catch_up(journal)
    for _ in range(2):
        assert texts(index.search("gate")) == [FIRE["text"]]
        assert texts(index.search("crate")) == [again["text"]]
        assert texts(index.search("火")) == []
        index.rebuild(journal)
    # That there was an alert is found also when its line has been revised away.
    write(journal, DAY, {**text("gate", NOON, ""), "revision": 1})
    index.catch_up(journal)
    (hit,) = index.search(alert="fire").hits
    assert (hit.kind, hit.text) == ("alert", FIRE["text"])
    index.close()


def test_an_alert_without_a_line_is_found(tmp_path):
    journal = tmp_path / "journal"
    write(journal, DAY, {**alert(FIRE, "fire"), "rejected": "looping"})
    assert found(journal, "fire", alert=True) == [FIRE["text"]]


@pytest.mark.parametrize(
    "query",
    [
        '"',
        '""" OR "',
        "fire) OR (text : gate",
        "NEAR(fire gate)",
        "tags : x1",
        "x1",
        "-fire",
        "*",
        "^fire",
        "fire\0gate",
        "'; DROP TABLE lines; --",
        "\ud800",
        "a" * 5000,
        "a " * 2000,
        "{text tags} : fire",
    ],
)
def test_nothing_in_a_query_is_an_operator(journal, query):
    assert set(found(journal, query)) <= {FIRE["text"], GATE["text"]}
    assert found(journal, "fire") == [FIRE["text"]]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=10))
def test_any_text_can_be_searched(tmp_path_factory, query, camera):
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        write(folder, DAY, FIRE, CHINESE)
    assert isinstance(found(folder, query, camera=camera), list)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["C"]), max_size=30))
def test_a_line_is_found_by_its_own_text(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("own")
    write(folder, DAY, text("gate", NOON, f"{words} end"), text("gate", NOON + 9, "other"))
    assert found(folder, f"{words} end") == [whole_text(f"{words} end")]


def test_damaged_lines_are_counted_and_the_others_are_found(journal):
    lines = [
        b"{",
        b"[]",
        b'{"camera": 1}',
        b'{"camera": "gate"}',
        b'{"camera": "gate", "id": 1, "start": 1, "end": 2, "text": "x"}',
        b'{"camera": "gate", "id": "a", "start": NaN, "end": 2, "text": "x"}',
        b'{"camera": "gate", "id": "a", "start": 1, "end": 2, "text": "x", "clip": 7}',
        b'{"camera": "gate", "id": "a", "start": 1, "end": 2, "text": ["x"]}',
        b"\xff\xfe",
        b'{"camera": "gate", "event": "forgotten", "lines": 5}',
        b'{"camera": "gate", "event": "forgotten", "lines": [["a"]]}',
        b'{"camera": "gate", "event": "forgotten", "lines": [["a", NaN]]}',
        b'{"camera": "gate", "event": "forgotten", "lines": [[1, 2]]}',
        b'{"camera": "gate", "event": "forgotten", "before": NaN}',
        b'{"camera": "gate", "event": "forgotten", "before": "a"}',
        b'{"camera": "gate", "event": "reading", "of": "a", "at": 1%s}' % (b"0" * 400),
    ]
    (path, _) = sorted(journal.glob("*.jsonl"))
    with path.open("ab") as file:
        file.write(b"\n".join(lines) + b"\n" + json.dumps(text("gate", NOON + 9, "last")).encode())
    with Index(journal / FILE_NAME) as index:
        caught = index.catch_up(journal)
        assert caught.damaged == len(lines)
        assert texts(index.search("last")) == []  # it is still being written
        with path.open("ab") as file:
            file.write(b"\n")
        assert index.catch_up(journal).lines == 1
        assert texts(index.search("last")) == ["last"]


def test_another_journal_in_its_place_is_indexed_anew(journal):
    assert found(journal, "fire")
    (path, _) = sorted(journal.glob("*.jsonl"))
    path.write_text(json.dumps(CHINESE) + "\n")
    assert found(journal, "fire") == []
    assert found(journal, "火") == [CHINESE["text"]]


def test_what_is_no_index_is_refused(tmp_path, journal, capsys):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as made:
        made.execute("CREATE TABLE own(x)")
    for path, content in ((other, None), (tmp_path / "text", b"text" * 2000)):
        if content:
            path.write_bytes(content)
        assert main(["index", "--journal", str(journal), "--index", str(path)]) == 2
        assert "cannot be used as an index" in capsys.readouterr().err
    assert main(["index", "--journal", str(tmp_path / "none")]) == 2
    assert "expected the folder of a journal" in capsys.readouterr().err


def test_a_killed_indexer_goes_on_and_doubles_nothing(tmp_path):
    journal, count = tmp_path / "journal", 60_000
    lines = [text(f"camera-{n % 5}", NOON + n, f"word{n} fire") for n in range(count)]
    write(journal, DAY, *lines)
    path, kills = journal / FILE_NAME, 0
    for _ in range(40):
        command = Command("index", "--journal", str(journal))
        deadline = time.monotonic() + 60
        before = _count(path)
        while command.poll() is None and _count(path) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        if command.poll() is None:
            kills += 1
            command.kill()
            command.wait()
        if _count(path) == count:
            break
    assert kills
    with Index(path) as index:
        assert index.catch_up(journal).lines == 0
        assert texts(index.search(f"word{count // 2}")) == [f"word{count // 2} fire"]
    with sqlite3.connect(path) as made:
        words = [
            n for (n,) in made.execute("SELECT count(*) FROM words_202511 WHERE tags MATCH 'x1'")
        ]
        assert words == [count // 5]
        assert made.execute("SELECT count(*) FROM lines").fetchone() == (count,)


def _count(path: Path) -> int:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as made:
            return int(made.execute("SELECT count(*) FROM lines").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_two_indexers_at_once_take_in_each_line_once(journal):
    with Index(journal / FILE_NAME) as one, Index(journal / FILE_NAME) as other:
        one.catch_up(journal)
        assert other.catch_up(journal).lines == 0
        write(journal, "2026-01-04", text("gate", NOON + 41 * 86400, "One more."))
        assert other.catch_up(journal).lines + one.catch_up(journal).lines == 1
        assert texts(one.search("more")) == texts(other.search("more")) == ["One more."]


def test_the_index_is_for_its_user_alone(journal):
    with Index(journal / FILE_NAME) as index:
        index.catch_up(journal)
        for path in journal.glob(f"{FILE_NAME}*"):
            assert path.stat().st_mode & 0o077 == 0


def test_the_command_prints_what_it_finds(journal, capsys):
    assert main(["index", "--journal", str(journal)]) == 0
    assert "8 new lines" in capsys.readouterr().out
    command = ["index", "--journal", str(journal), "--rebuild", "--search", "gate"]
    assert main(command) == 0
    later, first = capsys.readouterr().out.splitlines()
    assert later.endswith("yard Please open the gate, Zoë. (neutral)")
    assert first.endswith("gate There is a fire at the gate. (negative) ALERT fire")
    assert main([*command, "--before", "2025-11-24"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["index", "--journal", str(journal), "--sound", "alarm"]) == 0
    assert "SOUND alarm" in capsys.readouterr().out
    assert main([*command, "--after", "tomorrow"]) == 2
    assert "expected a date like" in capsys.readouterr().err
