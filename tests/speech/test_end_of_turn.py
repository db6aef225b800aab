"""Whether a pause ends a turn: the head, the pauses of recordings, and what cameras make of it."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import ContextEngine, LoudIsSpeech, utterances

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.monitoring import Camera, LiveSettings, Monitor, Transcript
from mmtransfer.monitoring.sources import readers
from mmtransfer.monitoring.sources.live import Block
from mmtransfer.speech import end_of_turn, segments
from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio
from mmtransfer.speech.end_of_turn import (
    EndOfTurn,
    TurnSettings,
    adapter_digest,
    find_pauses,
    open_end_of_turn,
    read_turn_head,
    write_turn_head,
)
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.segments import Segmenter, SegmenterSettings

FRAME = 512
RULE = TurnSettings(1.0, 0.2, 0.8, ((0.1, 0.3), (0.3, 0.3), (0.5, 0.5), (0.7, 0.7)))


class Judge:
    """Declares an end where the audio before the pause has a loudness of its own."""

    ask_s, longest_s, context_s = 0.2, 0.8, 1.0

    def __init__(self, over=()):
        self.over, self.asked, self.pauses = over, [], []

    def endpointer(self):
        return self

    def is_over(self, samples):
        self.asked.append(samples.copy())
        return any(np.isclose(np.abs(samples).max(), level, atol=0.01) for level in self.over)

    def went_on(self, pause_s):
        self.pauses.append(pause_s)


@pytest.fixture
def loud_is_speech(monkeypatch):
    monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)
    monkeypatch.setattr(end_of_turn, "SpeechProbability", LoudIsSpeech)


def cut(samples, endpointer, block=3):
    """Segments, and when each was handed on."""
    segmenter = Segmenter(SegmenterSettings(pause_s=0.45), block, endpointer)
    found = []
    for start in range(0, len(samples), FRAME):
        for segment in segmenter.feed(samples[start : start + FRAME]):
            found.append((segment, (start + FRAME) / SAMPLE_RATE))
    return found


# --- the segmenter -------------------------------------------------------------------------------


@pytest.mark.usefixtures("loud_is_speech")
def test_a_segment_ends_when_the_judge_says_so_and_goes_on_when_it_does_not():
    samples = utterances([0.7, 0.7, 1.5])  # loudness 0.5, 0.6, 0.7
    alone = cut(samples, None, 1)
    assert len(alone) == 3
    assert all(at - segment.end == pytest.approx(0.45, abs=0.02) for segment, at in alone)
    first, second = cut(samples, Judge(over=[0.5]), 1)
    assert first[0].end == alone[0][0].end
    assert first[1] - first[0].end == pytest.approx(0.2, abs=0.02)
    # The pause behind the second utterance is not over before somebody speaks again.
    assert (second[0].start, second[0].end) == (alone[1][0].start, alone[2][0].end)
    assert second[1] - second[0].end == pytest.approx(0.8, abs=0.02)


@pytest.mark.usefixtures("loud_is_speech")
def test_the_judge_is_given_the_audio_up_to_its_step_and_nothing_that_comes_later():
    samples = utterances([0.5, 1.5], seconds=0.5)
    endpointer = Judge()
    cut(samples, endpointer, block=8)
    end = (SAMPLE_RATE + SAMPLE_RATE // 2) // FRAME
    (heard, *_), ends = endpointer.asked, [end - 1, end, end + 1]
    assert any(np.array_equal(heard, samples[: (at + 6) * FRAME][-len(heard) :]) for at in ends)
    assert not heard[-5 * FRAME :].any()
    assert len(heard) == round(1.0 / 0.032) * FRAME


@pytest.mark.usefixtures("loud_is_speech")
def test_the_judge_is_told_how_long_the_pauses_were():
    """Those that it was asked about: also where it had ended the segment, and not the shortest."""
    endpointer = Judge(over=[0.5])
    cut(utterances([0.6, 0.1, 0.4, 0.9, 2.0]), endpointer, 1)
    assert len(endpointer.asked) == 4
    assert endpointer.pauses == pytest.approx([0.6, 0.4, 0.9], abs=0.04)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
    st.sampled_from([2, 3, 8, 32]),
)
def test_what_the_judge_cuts_does_not_depend_on_the_size_of_blocks(pattern, block):
    class Odd(Judge):
        def is_over(self, samples):
            return int(np.abs(samples).sum() * 100) % 2 == 1

    rng = np.random.default_rng(0)
    parts = [
        rng.uniform(0.6, 1, frames * FRAME) if voiced else rng.uniform(0, 0.4, frames * FRAME)
        for voiced, frames in [*pattern, (False, 64)]
    ]
    samples = np.concatenate(parts).astype(np.float32)
    samples = samples[: len(samples) // (32 * FRAME) * 32 * FRAME]

    def found(size):
        segmenter = Segmenter(SegmenterSettings(pause_s=0.45), size, Odd())
        segmenter._probability = lambda x: np.where(x.reshape(-1, FRAME).max(1) > 0.5, 0.9, 0.1)  # type: ignore[assignment]
        whole = samples[: len(samples) // (size * FRAME) * size * FRAME]
        return [*segmenter.feed(whole), *segmenter.finish()]

    one, other = found(1), found(block)
    both = min(len(one), len(other))
    assert abs(len(one) - len(other)) <= 1  # what runs when the last block ends
    for a, b in zip(one[: both - 1], other[: both - 1], strict=True):
        assert (a.start, a.end, a.samples_start) == (b.start, b.end, b.samples_start)
        np.testing.assert_array_equal(a.samples, b.samples)


# --- the head ------------------------------------------------------------------------------------


def mean_encoder(clips, context_s):
    """States of width 2: the mean of each 320 samples, and one."""
    assert all(len(clip) == round(context_s * SAMPLE_RATE) for clip in clips)
    means = np.stack([clip.reshape(-1, 320).mean(1) for clip in clips])
    return np.stack([means, np.ones_like(means)], 2)


def test_a_head_is_a_linear_output_on_the_mean_of_the_last_states():
    head = EndOfTurn(mean_encoder, np.array([2.0, 1.0]), -0.5, RULE)
    samples = np.full(SAMPLE_RATE * 2, 0.9, np.float32)
    samples[-3200:] = 0.25
    assert head.probability(samples) == pytest.approx(1 / (1 + np.exp(-1.0)))
    # A stream that has just begun had silence before it.
    assert head.probability(samples[-1600:]) == pytest.approx(1 / (1 + np.exp(-0.75)))


def test_the_threshold_follows_the_pauses_in_which_the_speaker_went_on():
    head = EndOfTurn(mean_encoder, np.zeros(2), 0.0, RULE)
    endpointer = head.endpointer()
    # Half of what it begins with would have been cut short: what is above the middle is over.
    assert not endpointer.decide(0.3)
    assert endpointer.decide(0.5)
    for number in range(200):  # a speaker who sounds done all the time, and goes on at once
        endpointer.decide(0.9 + number * 1e-4)
        endpointer.went_on(0.3)
    assert not endpointer.decide(0.91)
    endpointer.went_on(1.2)  # is an end, of which nothing follows
    assert not endpointer.decide(0.915)
    for number in range(200):  # and now one who pauses for long
        endpointer.decide(0.2 + number * 1e-3)
        endpointer.went_on(0.3 if number % 2 else 0.6)
    assert endpointer.decide(0.32)
    assert not endpointer.decide(0.28)
    for _ in range(200):
        endpointer.decide(0.5)
        endpointer.went_on(0.9)  # cut short in any case
    assert not endpointer.decide(0.99)
    assert head.endpointer().decide(0.5)  # each stream has a endpointer of its own


def test_a_head_is_the_same_when_it_is_loaded(tmp_path):
    weights = np.arange(4, dtype=np.float32)
    path = tmp_path / "head.safetensors"
    write_turn_head(path, weights, -1.5, replace(RULE, adapter="abc"))
    found, bias, rule = read_turn_head(path)
    np.testing.assert_array_equal(found, weights)
    assert (bias, rule) == (-1.5, replace(RULE, adapter="abc"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cannot be loaded as an end-of-turn head"):
        read_turn_head(path)


# --- pauses --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loud_is_speech")
def test_pauses_are_those_that_segments_have():
    quiet = np.full(SAMPLE_RATE // 100 * 100, 0.01, np.float32)

    def pause(seconds):
        return np.resize(quiet, round(seconds / 0.032) * FRAME)

    def speech(seconds):
        return np.full(round(seconds / 0.032) * FRAME, 0.8, np.float32)

    joined = np.zeros(20 * FRAME, np.float32)
    parts = [pause(0.3), speech(1), pause(0.1), speech(1), pause(0.5), speech(1), joined]
    parts += [speech(0.1), pause(1.2), speech(0.5), pause(3), speech(0.1), pause(3)]
    found = list(find_pauses(np.concatenate(parts)))
    assert [pause.frames for pause in found] == [16, 38, 47]
    assert [pause.is_end() for pause in found] == [False, True, True]
    assert found[0].start == round(0.3 / 0.032) + 2 * 31 + 3
    assert not found[1].is_end(1.5)


# --- what ships ----------------------------------------------------------------------------------


def test_the_head_that_ships_belongs_to_the_adapter_that_ships():
    """Where it does not: examples/make_end_of_turn.py."""
    package = Path(end_of_turn.__file__).parent
    weights, _, rule = read_turn_head(package / "turn_ends" / "whisper-tiny.en.safetensors")
    assert rule.adapter == adapter_digest(package / "short_context" / "whisper-tiny.en")
    assert np.isfinite(weights).all()
    probabilities, pauses_s = np.array(rule.usual).T
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    assert 0.18 < pauses_s.min() < pauses_s.max() < 1.0


def test_the_shipped_head_ends_lines_of_the_example_video_sooner():
    """Most utterances of it end at once, and none later than after the longest wait."""
    head = open_recognizer("bundled:whisper-tiny.en").end_of_turn
    assert head is not None
    endpointer = head.endpointer()
    samples = np.concatenate(list(stream_audio(EXAMPLE / "monitor.mp4", lambda: False)))
    found = cut(samples[: 60 * SAMPLE_RATE], endpointer)
    waits = [at - segment.end for segment, at in found]
    assert len(waits) >= 6
    assert np.median(waits) < 0.35
    assert max(waits) <= endpointer.longest_s + 0.1


def test_a_model_without_a_head_keeps_the_fixed_pause():
    assert open_end_of_turn(resolve("bundled:whisper-base"), mean_encoder) is None


def test_a_head_of_another_adapter_is_not_used(monkeypatch, tmp_path):
    write_turn_head(tmp_path / "whisper-tiny.en.safetensors", np.ones(4), 0.0, RULE)
    monkeypatch.setattr(end_of_turn, "_SHIPPED", tmp_path)
    assert open_end_of_turn(resolve("bundled:whisper-tiny.en"), mean_encoder) is None


# --- cameras -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loud_is_speech")
@pytest.mark.parametrize("is_learned", [True, False])
def test_at_a_camera_the_judge_ends_segments_unless_it_is_turned_off(monkeypatch, is_learned):
    samples, endpointer = utterances([0.6, 0.6, 2.5]), Judge(over=[0.5])

    def play(name, source, stopping, **options):
        for start in range(0, len(samples), 1600):
            yield Block(samples[start : start + 1600], 1e9 + start / SAMPLE_RATE, start > 0)
        stopping.wait(20)

    monkeypatch.setattr(readers, "read_live", play)
    engine = ContextEngine(["one", "two", "three"], ["one", "two", "three"])
    monitor = Monitor(
        Recognizer(engine, end_of_turn=endpointer),  # type: ignore[arg-type]
        live=LiveSettings(partial_s=float("inf"), learned_end=is_learned),
    )
    timer = threading.Timer(20, monitor.stop)
    timer.start()
    for item in monitor.watch([Camera(name="gate", url="rtsp://camera.example/1")]):
        if isinstance(item, Transcript) and "three" in item.text:
            monitor.stop()
    timer.cancel()
    assert monitor.stats.segments == (2 if is_learned else 3)
    assert bool(endpointer.asked) == is_learned
