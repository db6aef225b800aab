"""What follows from a result: the text, a rejection, or what is decoded in its place."""

from dataclasses import replace

import numpy as np
import pytest
from support.engines import FakeEngine

from mmtransfer.monitoring.decoding import (
    Decoder,
    Rejected,
    Result,
    is_trusted,
    joined,
    lines_of,
    of_halves,
)
from mmtransfer.monitoring.events import NoText, Transcript
from mmtransfer.monitoring.fair_queue import Job
from mmtransfer.monitoring.lines import Line, LineSettings
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.source import Source
from mmtransfer.monitoring.stats import CameraStats
from mmtransfer.speech.engine import Hypothesis, Word
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Piece, Segment

LOOP = "the gate " * 20


def hypothesis(text, context_s, logprob=-0.1, **options):
    return Hypothesis(text, (1,), logprob, 0.0, context_s, **options)


def segment(*lengths):
    """A window of pieces of so many seconds with half a second between; one piece: no window."""
    pieces, at = [], 0.0
    for length in lengths:
        pieces.append(Piece(at, at, at, at + length))
        at += length + 0.5
    samples = np.zeros(round(16_000 * at), np.float32)
    return Segment(0.0, at - 0.5, samples, 0.0, tuple(pieces) if len(pieces) > 1 else ())


@pytest.fixture
def decoder():
    return Decoder([Recognizer(FakeEngine())], LineSettings())


def job_of(decoder, whole, context_s=4.0):
    return Job(0, 0, "gate@0.000", whole, *decoder.kind(0, context_s))


def result(text, context_s=4.0, **options):
    return Result(hypothesis(text, context_s, **options), [])


def test_a_text_that_no_guard_objects_to_is_kept(decoder):
    found = result("open the gate")
    assert decoder.settle(job_of(decoder, segment(2.0)), found) is found


def test_a_doubted_text_is_decoded_in_ever_longer_contexts_then_moved_then_rejected(decoder):
    job, contexts = job_of(decoder, segment(2.0)), list[tuple[float, bool]]()
    while True:
        verdict = decoder.settle(job, result(LOOP + f"{len(contexts)} " * 30, job.kind[1]))
        if isinstance(verdict, Rejected):
            break
        (job,) = verdict
        contexts.append((job.kind[1], job.is_delayed))
    assert contexts[-1] == (30.0, True)
    assert [is_delayed for _, is_delayed in contexts[:-1]] == [False] * (len(contexts) - 1)
    assert sorted(contexts) == contexts
    assert verdict.reason == "looping"
    assert verdict.likeliest.text


def test_the_likeliest_of_the_rejected_texts_is_kept(decoder):
    job, logprob = job_of(decoder, segment(2.0)), -0.5
    while True:
        verdict = decoder.settle(
            job, result(LOOP + f"{logprob} " * 30, job.kind[1], logprob=logprob)
        )
        if isinstance(verdict, Rejected):
            break
        (job,), logprob = verdict, logprob - 0.01
    assert verdict.likeliest.avg_logprob == -0.5


def test_a_window_that_is_doubted_in_the_full_context_is_decoded_in_halves(decoder):
    job = job_of(decoder, segment(4.0, 4.0), 30.0)
    one, other = decoder.settle(job, result(LOOP, 30.0))
    assert (one.half_of, other.half_of) == (job, job)
    assert (one.segment.start, one.segment.end) == (0.0, 4.0)
    assert (other.segment.start, other.segment.end) == (4.5, 8.5)


def test_what_a_decoder_left_out_at_the_end_of_a_window_is_decoded_on_its_own(decoder):
    words = (Word(" open", 0.2, 0.5, 0.9), Word(" gate", 0.6, 1.0, 0.9))
    window = segment(2.0, 3.0)
    found = result(" open gate", 30.0, words=words)
    one, other = decoder.settle(job_of(decoder, window, 30.0), found)
    assert (one.segment.end, other.segment.start) == (2.0, 2.5)
    assert not is_trusted(window, found.hypothesis)
    assert is_trusted(segment(2.0), found.hypothesis)


def skipping():
    """A window and a result whose first word has the time of what came before it."""
    words = (Word(" gate", 0.0, 2.4, 0.3), Word(" now", 2.6, 3.0, 0.9))
    return segment(2.0, 3.0), replace(
        result(" gate now", 30.0, words=words), lines=[Line(0.0, 5.5, "gate now")]
    )


def test_what_a_decoder_left_out_before_a_pause_is_decoded_in_halves(decoder):
    window, found = skipping()
    job = job_of(decoder, window, 30.0)
    one, other = decoder.settle(job, found)
    assert (one.segment.end, other.segment.start) == (2.0, 2.5)
    assert not is_trusted(window, found.hypothesis)
    assert (one.kept, other.kept) == (None, None)
    # One piece has no pause at which a part may be missing.
    alone = job_of(decoder, segment(5.0), 30.0)
    assert decoder.settle(alone, found) is found
    quick = (Word(" gate", 0.0, 1.5, 0.9), Word(" now", 2.6, 3.0, 0.9))
    spoken = replace(found, hypothesis=hypothesis(" gate now", 30.0, words=quick))
    assert decoder.settle(job_of(decoder, window, 30.0), spoken) is spoken


@pytest.mark.parametrize("texts", [("open the", "gate now"), ("gate", "now"), ("gate", None)])
def test_halves_take_the_place_of_a_text_only_with_more_words(decoder, texts):
    window, found = skipping()
    job = job_of(decoder, window, 30.0)
    decoder.settle(job, found)
    for start, text in zip((0.0, 2.5), texts, strict=True):
        line = Transcript("s", "gate", "gate@0.000", start, start + 1, text, -0.1, 0.0, 1.0, 4.0)
        job.halves[start] = [line] if text else NoText("gate", "gate@0.000", 2.5, 5.5, "empty")
    both = of_halves(job)
    if texts == ("open the", "gate now"):
        assert isinstance(both, list)
        assert [line.text for line in both] == ["open the", "gate now"]
    else:
        assert both is found


def test_where_a_turn_follows_a_doubted_segment_does_not_wait_for_the_full_context():
    decoder = Decoder([Recognizer(FakeEngine())], LineSettings(), with_turns={0})
    job, contexts = job_of(decoder, segment(2.0)), []
    while isinstance(verdict := decoder.settle(job, result(LOOP, job.kind[1])), list):
        (job,) = verdict
        contexts.append(job.kind[1])
    assert max(contexts) < 30.0
    assert isinstance(verdict, Rejected | Result)


def test_a_doubted_turn_is_decoded_in_a_longer_context_until_there_is_none(decoder):
    turn = job_of(decoder, segment(2.0, 2.0))
    assert decoder.longer_turn(turn, result("open the gate")) is None
    longer = decoder.longer_turn(turn, result(LOOP))
    assert longer.kind[1] > turn.kind[1]
    assert longer.segment is turn.segment
    assert decoder.longer_turn(turn, result(LOOP, 30.0)) is None


@pytest.mark.parametrize(
    ("kind", "can_wait"),
    [
        ({}, False),
        ({"is_draft": True}, True),
        ({"is_draft": True, "is_whole": True}, False),  # the text, unless somebody goes on
        ({"is_turn": True}, True),
    ],
)
def test_what_can_wait_is_provisional_or_decoded_before(kind, can_wait):
    asked = []

    class Noting(Recognizer):
        def decode(self, clips, context_s, *, can_wait=False):
            asked.append(can_wait)
            return super().decode(clips, context_s)

    decoder = Decoder([Noting(FakeEngine())], LineSettings())
    decoder.recognize([replace(job_of(decoder, segment(2.0)), **kind)])
    assert asked == [can_wait]


def test_halves_are_joined_with_the_one_that_gave_none():
    line = Transcript("s", "gate", "gate@0.000", 0.0, 1.0, "open", -0.1, 0.0, 1.0, 4.0)
    none = NoText("gate", "gate@0.000", 4.0, 5.0, "looping", text="a")
    assert joined("gate@0.000", [[line], none]) == [line, none]
    found = joined("gate@0.000", [[line], [line]])
    assert isinstance(found, list)
    assert [one.id for one in found] == ["gate@0.000", "gate@0.000#1"]
    both = joined("gate@0.000", [none, NoText("gate", "x", 6.0, 7.0, "looping", text="b")])
    assert isinstance(both, NoText)
    assert (both.text, both.start, both.end) == ("a b", 4.0, 7.0)
    assert joined("gate@0.000", [None, None]) is None  # dropped, both of them
    assert joined("gate@0.000", [[line], None]) == [line]


def test_lines_carry_the_class_of_their_text_and_where_they_are_from():
    decoder = Decoder(
        [Recognizer(FakeEngine(lambda context_s: "open the gate"))],
        LineSettings(),
        lambda texts: [(text.upper(), 0.51234) for text in texts],
    )
    (found,) = decoder.recognize([job_of(decoder, segment(2.0))])
    source = Source(
        0, Camera("gate", "rtsp://me:secret@cam/1"), Recognizer(FakeEngine()), CameraStats(), 1
    )
    address = source.address_of("gate@0.000")
    (line,) = lines_of(address, source.name, "gate@0.000", found, with_words=False)
    assert (line.sentiment, line.sentiment_prob) == ("OPEN THE GATE", 0.5123)
    assert "secret" not in line.source
    assert line.camera == "gate"
