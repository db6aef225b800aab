"""What is found comes out in order, written before it is handed out; no thread is needed."""

import math
from dataclasses import replace

import pytest
from support.engines import FakeEngine

from mmtransfer.monitoring import Alert, Camera, Partial, SourceEnd, SourceEvent, Transcript
from mmtransfer.monitoring.decoding import Result
from mmtransfer.monitoring.events import FileDone, NoText, Occurrence, Stopped
from mmtransfer.monitoring.fair_queue import Job
from mmtransfer.monitoring.lines import Line
from mmtransfer.monitoring.moments import Moments
from mmtransfer.monitoring.ordering import Ordering
from mmtransfer.monitoring.sources.source import Source
from mmtransfer.monitoring.stats import CameraStats
from mmtransfer.speech.audio import MediaError
from mmtransfer.speech.engine import Hypothesis, Word
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Piece, Segment


class Disk:
    """A ledger whose disk can be full."""

    def __init__(self):
        self.lines, self.is_full, self.is_blocked, self.forgotten = [], False, False, []

    def write(self, *lines):
        if self.is_full and lines:
            return False
        self.lines += lines
        return True

    def forget(self, identity):
        self.forgotten.append(identity)


def text(start, words="some words", camera="gate"):
    where = (camera, f"{camera}@{start:.3f}", start, start + 1)
    return Transcript("s", *where, words, -0.1, 0.0, 1.0, 4.0)


def made(*cameras, now=100.0, windows=0.0):
    engine = FakeEngine()
    engine.window_s = windows
    sources = [
        Source(number, camera, Recognizer(engine), CameraStats(), len(cameras))
        for number, camera in enumerate(cameras)
    ]
    disk, moments = Disk(), Moments(None, lambda source, event: None)
    ordering = Ordering(sources, disk, moments, lambda: now, with_words=False)  # type: ignore[arg-type]
    return ordering, disk, sources


GATE = Camera("gate", "gate.mp4", keywords=["fire"])
LIVE = Camera("gate", "rtsp://gate/1", keywords=["fire"])


def test_segments_come_in_order_whatever_is_decoded_first():
    ordering, disk, (source,) = made(GATE)
    (output,) = ordering.outputs
    places = [output.place() for _ in range(3)]
    output.put(places[2], [text(3.0)])
    output.put(places[1], NoText("gate", "gate@2.000", 2.0, 3.0, "looping"))
    assert list(ordering.items()) == []
    output.put(places[0], [text(1.0)])
    assert [item.start for item in ordering.items()] == [1.0, 3.0]
    assert [line.start for line in disk.lines] == [1.0, 2.0, 3.0]
    assert disk.forgotten == ["gate@1.000", "gate@2.000", "gate@3.000"]
    assert (source.stats.segments, source.stats.last_text) == (2, "some words")


def test_alerts_follow_their_segment_and_are_written_with_it():
    ordering, disk, (source,) = made(GATE)
    (output,) = ordering.outputs
    output.put(output.place(), [text(1.0, "fire at the gate")])
    first, second = ordering.items()
    assert isinstance(first, Transcript)
    assert (second.keyword, second.segment, second.clip) == ("fire", "gate@1.000", None)
    assert disk.lines == [first, second]
    assert source.stats.alerts == 1


def test_while_the_disk_is_full_everything_waits_and_then_comes_in_order():
    ordering, disk, sources = made(GATE, Camera("yard", "yard.mp4"))
    gate, yard = ordering.outputs
    disk.is_full = True
    ordering.add(SourceEvent("gate", Occurrence.UNREADABLE, 1.0))
    gate.put(gate.place(), [text(1.0)])
    yard.put(yard.place(), [text(2.0, camera="yard")])
    assert list(ordering.items()) == []
    assert [source.stats.segments for source in sources] == [0, 0]
    disk.is_full, disk.is_blocked = False, True
    assert list(ordering.items()) == []
    disk.is_blocked = False
    event, one, other = ordering.items()
    assert isinstance(event, SourceEvent)
    assert (one.camera, other.camera) == ("gate", "yard")


def test_what_is_provisional_is_never_written():
    ordering, disk, _ = made(LIVE)
    ordering.add(Partial("gate", "gate@1.000", 1.0, 2.0, "some"))
    ordering.add(NoText("gate", "gate@0.000", 0.0, 1.0, "looping"))
    assert [type(item) for item in ordering.items()] == [Partial]
    assert [type(line) for line in disk.lines] == [NoText]


def test_the_end_of_a_source_comes_last_and_says_whether_it_failed():
    ordering, disk, (source,) = made(GATE)
    (output,) = ordering.outputs
    place = output.place()
    output.end = SourceEnd("gate.mp4", "gate", MediaError("ends early"), 10, 1.5)
    assert list(ordering.items()) == []
    assert not ordering.is_over
    output.put(place, [text(1.0)])
    _, end = ordering.items()
    assert end.error is not None
    assert disk.lines[-1]["event"] == "cut"
    assert source.stats.failure == "ends early"
    assert ordering.is_over


@pytest.mark.parametrize("has_ended", [True, False])
def test_an_end_that_is_known_or_was_asked_for_is_not_written(has_ended):
    ordering, disk, (source,) = made(GATE)
    source.has_ended = has_ended
    error = None if has_ended else Stopped("stopped")
    ordering.outputs[0].end = SourceEnd("gate.mp4", "gate", error)
    assert [type(item) for item in ordering.items()] == [SourceEnd]
    assert disk.lines == []
    assert source.stats.failure == ""


def test_what_the_journal_has_is_not_handed_out_again_and_makes_room():
    ordering, disk, (source,) = made(GATE)
    (output,) = ordering.outputs
    while source.room.acquire(blocking=False):
        pass
    output.put(output.place(), None)
    output.put(output.place(), FileDone("a.wav", 1, 2, 3))
    assert list(ordering.items()) == []
    assert [line["event"] for line in disk.lines] == ["file"]
    assert source.room.acquire(blocking=False)
    assert not source.room.acquire(blocking=False)  # a file takes no room


def turn_of(output, starts, lines):
    """A turn of segments of a second each, and what it was decoded as."""
    pieces = tuple(Piece(start - starts[0], start, start, start + 1) for start in starts)
    segment = Segment(starts[0], starts[-1] + 1, None, pieces=pieces)  # type: ignore[arg-type]
    job = Job(0, -1, f"gate@{starts[0]:.3f}", segment, (0, 30.0), is_turn=True, after=output.count)
    hypothesis = Hypothesis(" ".join(lines), (1,), -0.1, 0.0, 30.0)
    found = [Line(start, start + 1, words) for start, words in zip(starts, lines, strict=True)]
    return job, Result(hypothesis, found, pieces=[1] * len(starts))


def test_a_turn_changes_lines_once_all_its_segments_are_out():
    ordering, _, (source,) = made(LIVE, windows=28.0)
    (output,) = ordering.outputs
    places = [output.place() for _ in range(2)]
    output.open_turn()
    output.put(places[0], [text(10.0, "fire at")])
    output.put_turn(*turn_of(output, [10.0, 12.0], ["fair at", "the fire gate"]))
    first, alert = ordering.items()
    assert isinstance(alert, Alert)
    assert first.delay_s == 89.0
    output.end = SourceEnd("rtsp://gate/1", "gate", None)
    assert list(ordering.items()) == []  # the turn is open
    output.put(places[1], [text(12.0, "the gate")])
    second, *changed, end = ordering.items()
    assert second.text == "the gate"
    assert [(item.id, item.text, item.revision) for item in changed] == [
        ("gate@10.000", "fair at", 1),
        ("gate@12.000", "the fire gate", 1),
    ]
    assert isinstance(end, SourceEnd)
    assert source.stats.revised == 2
    assert output.recent == {}


def test_a_turn_is_decoded_by_the_lines_that_its_segments_have():
    ordering, _, _ = made(LIVE, windows=28.0)
    (output,) = ordering.outputs
    output.open_turn()
    output.put(output.place(), [text(10.0, "fire at")])
    job, _ = turn_of(output, [10.0, 12.0], ["fire at", "the gate"])
    list(ordering.items())
    assert output.known_lines(job.segment) == [[Line(10.0, 11.0, "fire at")], []]


def test_a_turn_whose_text_is_doubted_changes_nothing():
    ordering, _, (source,) = made(LIVE, windows=28.0)
    (output,) = ordering.outputs
    output.open_turn()
    output.put(output.place(), [text(10.0, "fire at the gate")])
    job, result = turn_of(output, [10.0], ["gate " * 40])
    output.put_turn(job, result)
    items = list(ordering.items())
    assert [type(item) for item in items] == [Transcript, Alert]
    assert source.stats.revised == 0


@pytest.mark.parametrize(
    ("turn", "logprob", "context_s", "comes"),
    [
        ("fair at", -0.15, 30.0, "fair at"),
        ("fair at", -0.9, 30.0, None),  # less likely, and comparable
        ("fair at", -0.3, 30.0, None),
        ("fair at", -0.3, 4.0, "fair at"),  # an adapter is sure of more
        ("fair at", -0.9, 4.0, None),
        ("", -0.1, 4.0, None),
    ],
)
def test_a_turn_replaces_what_it_is_likelier_for(turn, logprob, context_s, comes):
    ordering, _, _ = made(LIVE, windows=28.0)
    (output,) = ordering.outputs
    output.open_turn()
    output.put(output.place(), [replace(text(10.0, "bring it"), context_s=context_s)])
    output.logprobs["gate@10.000"] = -0.1
    job, result = turn_of(output, [10.0], [turn])
    words = tuple(Word(word, 0.0, 0.1, math.exp(logprob)) for word in turn.split())
    result.lines = [replace(line, words=words) for line in result.lines]
    if not turn:
        result.hypothesis = replace(result.hypothesis, text="elsewhere")
    output.put_turn(job, result)
    items = list(ordering.items())
    assert [item.text for item in items[1:]] == ([] if comes is None else [comes])


def test_the_lines_of_the_last_turns_are_known_to_what_follows():
    ordering, _, _ = made(LIVE, windows=28.0)
    (output,) = ordering.outputs
    for start in range(10, 210, 2):
        output.open_turn()
        output.put(output.place(), [text(float(start), f"line {start}")])
        list(ordering.items())
        job, _ = turn_of(output, [float(start)], ["x"])
        output.settle_turn(job)
    window = turn_of(output, [10.0, 206.0, 208.0], ["x"] * 3)[0].segment
    assert [len(lines) for lines in output.known_lines(window)] == [0, 1, 1]
