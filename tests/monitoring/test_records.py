"""Journals of earlier and later versions load; what is damaged is left out and counted."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mmtransfer.monitoring import Alert, ClassifiedSound, Journal, Sound, SourceEnd, Transcript
from mmtransfer.monitoring.events import Delivery, FileDone, LineKind, NoText, Recording
from mmtransfer.monitoring.journal.records import record_of

TEXT = Transcript("gate.mp4", "gate", "gate@1.000", 1.0, 2.5, "open", -0.1, 0.0, 1.0, 20.0, "en")
WORDS = [{"text": " open", "start": 1.0, "end": 2.5, "probability": 0.9}]
RECORDS = [
    (TEXT, asdict(TEXT)),
    (t := Transcript(*list(asdict(TEXT).values())[:11], words=WORDS, revision=1), asdict(t)),  # type: ignore[misc]
    (n := NoText("gate", "gate@1.000", 1.0, 2.5, "looping", text="open open"), asdict(n)),
    (n := NoText("gate", "gate@1.000", 1.0, 2.5, "no room", LineKind.DROPPED), asdict(n)),
    (a := Alert("gate", "fire", "fair", 0.9, "gate@1.000", 1.0, 2.5, "fair"), asdict(a)),
    (s := Sound("gate", "gate@1.000#sound", 1.0, 1.25, -20.0, -50.0), asdict(s)),
    (c := ClassifiedSound("gate", "gate@1.000#dog", "dog", 1.0, 3.0, 0.9), asdict(c)),
    (f := FileDone("a.wav", 10, 20, 30, 1.5, "ab", 16, "b.wav", 0.5), f.line("gate")),
    (r := Recording("a.wav", 30, "gate/a.wav", 1.5, 10, "ab", Path()), r.line("gate")),
    (d := Delivery("gate", "webhook", "gate@1.000", "fire"), d.line()),
    (d := Delivery("gate", "mqtt", "gate@1.000#sound", failure="HTTP 404"), d.line()),
    (e := SourceEnd("", "gate", None, 10, 1.5), e.line()),
]


@pytest.mark.parametrize(("record", "line"), RECORDS)
def test_a_line_is_what_was_written_whatever_a_later_version_adds(record, line):
    line = json.loads(json.dumps(line))
    assert record_of(line) == record
    assert record_of({**line, "mood": "calm", "version": 3}) == record


def test_a_source_that_broke_off_is_one_that_did():
    line = json.loads(json.dumps(SourceEnd("", "gate", OSError("cut off"), 10, 1.5).line()))
    record = record_of(line)
    assert isinstance(record, SourceEnd)
    assert str(record.error) == "cut off"
    assert (record.size, record.seconds) == (10, 1.5)


def test_what_an_earlier_version_did_not_write_takes_a_default():
    record = record_of({"camera": "a", "id": "a@1.000", "start": 1, "end": 2, "text": "open"})
    assert isinstance(record, Transcript)
    assert (record.text, record.words, record.revision, record.avg_logprob) == ("open", None, 0, 0)
    record = record_of(
        {"camera": "a", "event": "alert", "keyword": "fire", "segment": "a@1", "start": 1, "end": 2}
    )
    assert isinstance(record, Alert)
    assert record.rejected == ""
    assert record_of({"camera": "a", "event": "end"}) == SourceEnd("", "a", None)
    assert record_of({"camera": "a", "event": "connected", "at": 1.0}) is None
    assert record_of({"camera": "a", "event": "of a later version"}) is None


def test_fields_and_events_of_version_0_1_load_under_their_new_names():
    times = {"segment": "a@1", "start": 1.0, "end": 2.0}
    alert = {"camera": "a", "event": "alert", "phrase": "fire", "said": "fair", **times}
    record = record_of(alert)
    assert isinstance(record, Alert)
    assert (record.keyword, record.matched) == ("fire", "fair")
    sound = {"camera": "a", "id": "a#s", "start": 1, "end": 2, "event": "sound", "usual_db": -50.0}
    record = record_of(sound)
    assert isinstance(record, Sound)
    assert record.background_db == -50
    rejected = {"camera": "a", "id": "a@1", "start": 1.0, "end": 2.0, "event": "no text"}
    record = record_of({**rejected, "reason": "looping"})
    assert isinstance(record, NoText)
    assert (record.event, record.reason) == (LineKind.REJECTED, "looping")
    delivered = {"camera": "a", "event": "alert delivered", "to": "webhook", "phrase": "fire"}
    assert record_of({**delivered, "segment": "a@1"}) == Delivery("a", "webhook", "a@1", "fire")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"camera": "a"}, "id, or an event"),
        ({"camera": "a", "id": "a@1.000", "start": 1.0, "end": 2.0}, "expected 'text'"),
        ({"camera": "a", "id": "a@1.000", "start": "1", "end": 2.0, "text": ""}, "'start'"),
        ({"camera": "a", "id": "a@1.000", "start": True, "end": 2.0, "text": ""}, "'start'"),
        ({"camera": "a", "event": ["end"]}, "name of an event"),
        ({"camera": "a", "event": "file", "name": "a.wav", "size": 1}, "expected 'mtime_ns'"),
        ({"camera": "a", "event": "end", "seconds": None}, "'seconds'"),
    ],
)
def test_a_line_that_is_none_says_why(line, why):
    with pytest.raises(ValueError, match=why):
        record_of(line)


def test_damaged_lines_are_counted_once_and_the_rest_is_known(tmp_path, caplog):
    def journal():
        return Journal(tmp_path, model="m", model_digest="d", sources={"a": "a.mp4"})

    book = journal()
    good = [
        {"camera": "a", "id": f"a@{n}.000", "start": n, "end": n + 1, "text": "x"} for n in (1, 2)
    ]
    book.write(good[0], {"camera": "a", "id": 7, "end": 2}, {"camera": "a", "id": "a@9.000"})
    book.write(good[1], {"camera": "a", "event": "file", "name": None})
    book.write({"camera": "a", "event": "end", "size": 5})  # as an earlier version might have
    book.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(b"\xff{\n" + b"[" * 100_000 + b"\n" + path.read_bytes())
    book = journal()
    known = book.known({"a"}, set())
    assert known.ids == {"a": {"a@1.000", "a@2.000"}}
    assert known.ends["a"].size == 5
    assert book.damaged == 5
    assert [record.id for record, _ in book.records() if isinstance(record, Transcript)] == [
        "a@1.000",
        "a@2.000",
    ]
    assert book.damaged == 5
    book.close()
    (report,) = caplog.messages
    assert f"corrupt lines skipped: 5; the first is line 1 of {path.name}" in report
