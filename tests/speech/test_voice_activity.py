import itertools

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio
from mmtransfer.speech.segments import Segment, Segmenter, SegmenterSettings
from mmtransfer.speech.voice_activity import FRAME, SpeechProbability, speech_bounds


@pytest.fixture(scope="module")
def recording():
    samples = np.concatenate(list(stream_audio(EXAMPLE / "monitor.mp4")))
    return samples[: len(samples) // FRAME * FRAME]


def test_batched_probabilities_equal_the_library_frame_by_frame(recording):
    import torch
    from silero_vad import load_silero_vad

    threads = torch.get_num_threads()
    model = load_silero_vad()
    torch.set_num_threads(threads)  # the library changes it
    part = recording[: 600 * FRAME].copy()
    part[0] = 0.9  # loud enough from the start: quiet audio is brought up here, not there
    expected = [
        model(torch.from_numpy(part[i : i + FRAME]), SAMPLE_RATE).item()
        for i in range(0, len(part), FRAME)
    ]
    np.testing.assert_allclose(SpeechProbability()(part), expected, atol=1e-4)


def test_blocks_of_any_size_give_the_same_probabilities(recording):
    whole = SpeechProbability()(recording[: 300 * FRAME])
    stream, parts, position = SpeechProbability(), [], 0
    for frames in (1, 7, 32, 100, 160):
        parts.append(stream(recording[position * FRAME : (position + frames) * FRAME]))
        position += frames
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 512"):
        stream(recording[:100])


def test_speech_bounds(recording):
    assert speech_bounds(np.zeros(SAMPLE_RATE, np.float32)) is None
    bounds = speech_bounds(recording)
    assert bounds is not None
    start, end = bounds
    assert 0 <= start < end <= len(recording) / SAMPLE_RATE


def cut(samples, settings, sizes):
    segmenter = Segmenter(settings)
    segments, position = list[Segment](), 0
    while position < len(samples):
        size = sizes[len(segments) % len(sizes)]
        segments += segmenter.feed(samples[position : position + size])
        position += size
    return [*segments, *segmenter.finish()]


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(100, 50_000), min_size=1, max_size=4))
def test_segments_do_not_depend_on_how_the_stream_is_cut_into_blocks(recording, sizes):
    samples = recording[5 * SAMPLE_RATE : 23 * SAMPLE_RATE]
    one = cut(samples, None, [len(samples)])
    other = cut(samples, None, sizes)
    assert [(s.start, s.end, len(s.samples)) for s in one] == [
        (s.start, s.end, len(s.samples)) for s in other
    ]
    assert one


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.0, 15.0), st.floats(0.1, 1.0))
def test_segments_are_ordered_disjoint_and_bounded(seed, longest, pause):
    """Whatever the probabilities are: no overlap, no segment above the limit, and no voiced
    stretch of the minimum length lost."""
    rng = np.random.default_rng(seed)
    scores = np.repeat(rng.random(60), rng.integers(1, 60, 60)).astype(np.float32)
    config = SegmenterSettings(max_segment_s=longest, pause_s=pause)
    segmenter = Segmenter(config)
    stream = iter(scores)
    segmenter._probability = lambda x: np.array(  # type: ignore[assignment]
        [next(stream) for _ in range(len(x) // FRAME)], np.float32
    )
    segments = [
        *segmenter.feed(np.zeros(len(scores) * FRAME, np.float32)),
        *segmenter.finish(),
    ]
    frame_s = FRAME / SAMPLE_RATE
    for one, other in itertools.pairwise(segments):
        assert one.end <= other.start + 1e-9
        heard_to = one.samples_start + len(one.samples) / SAMPLE_RATE
        assert heard_to <= other.samples_start + 1e-9  # no word is in two segments
    for segment in segments:
        assert len(segment.samples) / SAMPLE_RATE <= longest + 1e-9
        assert segment.end > segment.start
    covered = np.zeros(len(scores), bool)
    for segment in segments:
        covered[round(segment.start / frame_s) : round(segment.end / frame_s)] = True
    missed = (scores >= config.threshold) & ~covered
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, missed.astype(int), 0])))[::2]
    assert not len(runs) or runs.max() * frame_s < config.min_speech_s + frame_s


def test_memory_stays_bounded_however_long_the_stream():
    segmenter = Segmenter()
    held = []
    rng = np.random.default_rng(0)
    for _ in range(200):
        list(segmenter.feed(rng.normal(0, 0.01, SAMPLE_RATE).astype(np.float32)))
        held.append(segmenter._frames.size)
    assert max(held) < 20 * SAMPLE_RATE


def test_noise_and_silence_give_no_segments():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 20 * SAMPLE_RATE).astype(np.float32)
    hum = 0.1 * np.sin(2 * np.pi * 50 * np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE)
    for samples in (noise, hum.astype(np.float32), np.zeros(20 * SAMPLE_RATE, np.float32)):
        assert cut(samples, None, [16_000]) == []
