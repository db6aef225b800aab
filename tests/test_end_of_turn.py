"""Whether a pause ends a turn: the head, the pauses of recordings, and what cameras make of it."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_revisions import ContextEngine, utterances
from test_windows import LoudIsSpeech

from mmtransfer import end_of_turn, segments
from mmtransfer.audio import SAMPLE_RATE, stream_audio
from mmtransfer.end_of_turn import (
    EndOfTurn,
    Pause,
    TurnSettings,
    adapter_digest,
    decided_at,
    find_pauses,
    open_end_of_turn,
    read_turn_head,
    write_turn_head,
)
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Camera, LiveSettings, Monitor, Transcript, readers
from mmtransfer.monitoring.live import Block
from mmtransfer.recognition import Recognizer
from mmtransfer.recognizers import open_recognizer
from mmtransfer.segments import Segmenter, SegmenterSettings

FRAME = 512
RULE = TurnSettings(1.0, 0.2, ((0.2, 0.9), (0.45, 0.5)), 0.8)


class Judge:
    """Declares an end where the audio before the pause has a loudness of its own."""

    steps_s, longest_s, context_s = (0.2, 0.45), 0.8, 1.0

    def __init__(self, over=()):
        self.over, self.asked = over, []

    def is_over(self, samples, silence_s):
        self.asked.append((samples.copy(), silence_s))
        return any(np.isclose(np.abs(samples).max(), level, atol=0.01) for level in self.over)


@pytest.fixture
def loud_is_speech(monkeypatch):
    monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)
    monkeypatch.setattr(end_of_turn, "SpeechProbability", LoudIsSpeech)


def cut(samples, judge, block=3):
    """Segments, and when each was handed on."""
    segmenter = Segmenter(SegmenterSettings(pause_s=0.45), block, judge)
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
    judge = Judge()
    cut(samples, judge, block=8)
    end = (SAMPLE_RATE + SAMPLE_RATE // 2) // FRAME
    for (heard, silence_s), frames in zip(judge.asked[:2], (6, 14), strict=True):
        assert silence_s == (0.2 if frames == 6 else 0.45)
        stop = [(end + offset + frames) * FRAME for offset in (-1, 0, 1)]
        assert any(np.array_equal(heard, samples[at - len(heard) : at]) for at in stop)
        assert not heard[-frames * FRAME + FRAME :].any()
        assert len(heard) == round(1.0 / 0.032) * FRAME


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
    st.sampled_from([2, 3, 8, 32]),
)
def test_what_the_judge_cuts_does_not_depend_on_the_size_of_blocks(pattern, block):
    class Odd(Judge):
        def is_over(self, samples, silence_s):
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
        segmenter._probability = lambda x: np.where(x.reshape(-1, FRAME).max(1) > 0.5, 0.9, 0.1)
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
    assert head.steps_s == (0.2, 0.45)
    assert not head.is_over(samples, 0.2)
    assert head.is_over(samples, 0.45)


def test_a_rule_declares_the_end_at_the_first_step_that_reaches_its_threshold():
    assert decided_at(Pause(0, 40), {0.2: 0.95, 0.45: 0.1}, RULE) == 0.2
    assert decided_at(Pause(0, 40), {0.2: 0.5, 0.45: 0.6}, RULE) == 0.45
    assert decided_at(Pause(0, 40), {0.2: 0.5, 0.45: 0.4}, RULE) == 0.8
    assert decided_at(Pause(0, 20), {0.2: 0.5, 0.45: 0.4}, RULE) is None
    assert decided_at(Pause(0, 8), {0.2: 0.5}, RULE) is None


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
    folder = end_of_turn.__file__.removesuffix("end_of_turn.py")
    for path in end_of_turn._SHIPPED.glob("*.safetensors"):
        weights, _, rule = read_turn_head(path)
        assert np.isfinite(weights).all()
        needed = [probability for _, probability in rule.steps]
        assert rule.steps[0][0] == 0.2
        assert all(at < rule.longest_s <= 1.0 for at, _ in rule.steps)
        assert min(needed) > 0
        adapter = end_of_turn.Path(folder) / "short_context" / path.stem
        assert rule.adapter == adapter_digest(adapter)  # else: examples/make_end_of_turn.py


def test_the_shipped_head_ends_lines_of_the_example_video_sooner():
    """Most utterances of it end at once, and none later than after the longest wait."""
    judge = open_recognizer("bundled:whisper-tiny.en").end_of_turn
    samples = np.concatenate(list(stream_audio(EXAMPLE / "monitor.mp4", lambda: False)))
    found = cut(samples[: 60 * SAMPLE_RATE], judge)
    waits = [at - segment.end for segment, at in found]
    assert len(waits) >= 6
    assert np.median(waits) < 0.35
    assert max(waits) <= judge.longest_s + 0.1


def test_a_model_without_a_head_keeps_the_fixed_pause():
    assert open_end_of_turn("bundled:whisper-base", mean_encoder) is None


def test_a_head_of_another_adapter_is_not_used(monkeypatch, tmp_path):
    write_turn_head(tmp_path / "whisper-tiny.en.safetensors", np.ones(4), 0.0, RULE)
    monkeypatch.setattr(end_of_turn, "_SHIPPED", tmp_path)
    assert open_end_of_turn("bundled:whisper-tiny.en", mean_encoder) is None


# --- cameras -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loud_is_speech")
@pytest.mark.parametrize("is_learned", [True, False])
def test_at_a_camera_the_judge_ends_segments_unless_it_is_turned_off(monkeypatch, is_learned):
    samples, judge = utterances([0.6, 0.6, 2.5]), Judge(over=[0.5])

    def play(name, source, stopping, **options):
        for start in range(0, len(samples), 1600):
            yield Block(samples[start : start + 1600], 1e9 + start / SAMPLE_RATE, start > 0)
        stopping.wait(20)

    monkeypatch.setattr(readers, "read_live", play)
    engine = ContextEngine(["one", "two", "three"], ["one", "two", "three"])
    monitor = Monitor(
        Recognizer(engine, end_of_turn=judge),
        live=LiveSettings(partial_s=float("inf"), learned_end=is_learned),
    )
    timer = threading.Timer(20, monitor.stop)
    timer.start()
    for item in monitor.watch([Camera(name="gate", url="rtsp://camera.example/1")]):
        if isinstance(item, Transcript) and "three" in item.text:
            monitor.stop()
    timer.cancel()
    assert monitor.stats.segments == (2 if is_learned else 3)
    assert bool(judge.asked) == is_learned
