"""Time goes by the samples: late stamps, real gaps, clocks that jump, lengths that are guessed."""

import logging

import av
import numpy as np
import pytest
from conftest import tone, write_media
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    TruncatedMediaError,
    decode_clip,
    recording_length_s,
    stream_audio,
)
from mmtransfer.speech.timeline import Timeline

BLOCK_S = 0.04


def placed(stamps, *, longest_s=1800.0, seconds=BLOCK_S):
    """Where each block of audio ends up, by the stamps of all."""
    timeline = Timeline(lambda at, gap_s: gap_s <= longest_s)
    found, at = [], 0.0
    for number, stamp in enumerate(stamps):
        for gap_s, piece in timeline.place(number, stamp, seconds):
            found.append((piece, at + gap_s))
            at += gap_s + seconds
    for gap_s, piece in timeline.finish():
        found.append((piece, at + gap_s))
        at += gap_s + seconds
    assert [piece for piece, _ in found] == list(range(len(stamps)))
    assert timeline.position == pytest.approx(at)
    return np.array([start for _, start in found])


def stamped(seconds):
    return np.arange(round(seconds / BLOCK_S)) * BLOCK_S


def stalled(stamps, every_s, stall_s):
    """Stamps of arrival: nothing for a while every so often, and then what waited at once."""
    arrival = stamps.copy()
    for start in np.arange(every_s, stamps[-1], every_s):
        waiting = (stamps >= start) & (stamps < start + stall_s)
        arrival[waiting] = start + stall_s
    return arrival


@pytest.mark.parametrize(
    ("every_s", "stall_s"), [(5.0, 0.3), (5.0, 1.5), (1.0, 0.5), (20.0, 6.0), (2.0, 1.9)]
)
def test_packets_stamped_late_make_no_silence(every_s, stall_s):
    stamps = stamped(60.0)
    np.testing.assert_allclose(placed(stalled(stamps, every_s, stall_s)), stamps, atol=1e-6)


def test_packets_of_any_delay_make_no_silence():
    stamps = stamped(60.0)
    late = stamps + np.random.default_rng(0).exponential(0.2, len(stamps))
    assert np.abs(placed(late) - stamps).max() < 0.15


@pytest.mark.parametrize("gap_s", [0.3, 2.0, 5.0, 60.0, 600.0])
@pytest.mark.parametrize("before_s", [0.0, 12.0])
def test_a_real_gap_stays_a_gap(gap_s, before_s):
    stamps = stamped(40.0)
    gapped = stamps + gap_s * (stamps >= before_s)
    np.testing.assert_allclose(placed(gapped), gapped, atol=1e-6)


def test_two_gaps_close_together_are_both_kept():
    stamps = stamped(40.0)
    gapped = stamps + 5.0 * (stamps >= 10) + 3.0 * (stamps >= 12)
    np.testing.assert_allclose(placed(gapped), gapped, atol=1e-6)


def test_a_gap_shortly_before_the_end_is_kept():
    stamps = stamped(12.0)
    gapped = stamps + 5.0 * (stamps >= 10)
    np.testing.assert_allclose(placed(gapped), gapped, atol=1e-6)


@pytest.mark.parametrize("jump_s", [1.75e9, -1.75e9, 86_400.0, 7_200.0, -3.0])
@pytest.mark.parametrize("before_s", [0.0, 12.0])
def test_a_clock_that_is_set_moves_no_audio(jump_s, before_s):
    stamps = stamped(40.0)
    assert np.abs(placed(stamps + jump_s * (stamps >= before_s)) - stamps).max() < 1e-3


def test_a_gap_behind_a_clock_that_was_set_is_kept():
    stamps = stamped(60.0)
    gapped = stamps + 5.0 * (stamps >= 40)
    np.testing.assert_allclose(placed(gapped - 3600 * (stamps >= 20)), gapped, atol=1e-3)


@given(st.lists(st.one_of(st.none(), st.floats(-1e10, 1e10)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_audio_is_never_lost_whatever_its_stamps(stamps):
    starts = placed(stamps, seconds=0.5)
    assert (np.diff(starts) >= 0.5 - 1e-6).all()


# --- files ----------------------------------------------------------------------------------------


def write_stamped(path, samples, delay, *, codec="aac", picture_s=0.0):
    """A recording whose packets are late by `delay(seconds)`."""
    with av.open(str(path), "w") as out:
        sound = out.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        picture = None
        if picture_s:
            picture = out.add_stream("libx264", rate=5)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for at in range(0, len(samples), 1024):
            block = np.ascontiguousarray(samples[None, at : at + 1024])
            frame = av.AudioFrame.from_ndarray(block, "fltp", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, at
            packets += sound.encode(frame)
        packets += sound.encode(None)
        if picture is not None:
            for _ in range(round(5 * picture_s)):
                dark = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")
                packets += picture.encode(dark)
            packets += picture.encode(None)
        for packet in packets:
            if packet.stream is sound:
                by = round(delay(float(packet.pts * packet.time_base)) / packet.time_base)
                packet.pts, packet.dts = packet.pts + by, packet.dts + by
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            out.mux(packet)
    return path


def noise(seconds):
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


def stall(at):
    """0.6 s every five seconds, made up for by packets one millisecond apart."""
    since = (at + 1e-9) % 5.0
    return max(0.0, 0.6 - since) + min(since, 0.6) / 40 if at >= 5 and since < 0.6 else 0.0


DELAYS = {
    "plain": lambda at: 0.0,
    "stalled": stall,
    "gap": lambda at: 5.0 * (at >= 10),
    "set": lambda at: 90_000.0 * (at >= 10),
    "since 1970": lambda at: 1.75e9,
}


@pytest.fixture(scope="module", params=DELAYS)
def recording(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("clock") / "a.mkv"
    samples = noise(20.0)
    write_stamped(path, samples, DELAYS[request.param], codec="pcm_s16le", picture_s=20.0)
    gap = np.zeros(5 * SAMPLE_RATE, np.float32)
    if request.param == "gap":
        at = 10 * SAMPLE_RATE
        samples = np.concatenate([samples[:at], gap, samples[at:]])
    return path, samples, "1970" in request.param or request.param == "set"


def test_a_stream_is_as_long_as_its_samples_and_its_gaps(recording, caplog):
    path, expected, has_jumped = recording
    found = np.concatenate(list(stream_audio(path)))
    assert len(found) == pytest.approx(len(expected), abs=0.1 * SAMPLE_RATE)
    assert caplog.text.count("timestamps jump") == has_jumped


@pytest.mark.parametrize(("start", "end"), [(0.0, 3.0), (4.9, 6.2), (12.3, 15.0), (16.0, 18.0)])
def test_clips_and_streams_share_one_clock(recording, start, end):
    path, _, _ = recording
    whole = np.concatenate(list(stream_audio(path)))
    expected = whole[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    if not np.abs(expected).mean() > 0.04:  # mostly the gap
        return
    found = decode_clip(path, start, end)
    assert len(found) == len(expected)
    best = max(np.dot(np.roll(found, by), expected) for by in range(-160, 161, 1))
    assert best > 0.95 * np.dot(expected, expected)


def test_a_picture_shows_that_time_went_by(tmp_path, monkeypatch):
    """However long it took: with a picture all along, sound that stopped for an hour is missing."""
    monkeypatch.setattr("mmtransfer.speech.audio._LONGEST_GAP_S", 20.0)
    shown = write_stamped(tmp_path / "a.mkv", tone(12), lambda at: 90.0 * (at >= 6), picture_s=100)
    hidden = write_stamped(tmp_path / "b.mkv", tone(12), lambda at: 90.0 * (at >= 6), picture_s=12)
    lengths = [sum(map(len, stream_audio(path))) / SAMPLE_RATE for path in (shown, hidden)]
    assert lengths == pytest.approx([102, 12], abs=0.3)


# --- lengths that are guessed ---------------------------------------------------------------------


def quiet_then_loud(rate=SAMPLE_RATE):
    quiet = np.zeros(4 * rate, np.float32)
    return np.concatenate([quiet, np.random.default_rng(0).normal(0, 0.2, 4 * rate)]).astype("f4")


def write_compressed(path, codec, samples, **options):
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
        frame.sample_rate = SAMPLE_RATE
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.aac", "aac", {}),
        ("a.mp3", "libmp3lame", {"write_xing": "0"}),
        ("b.mp3", "libmp3lame", {}),
        ("a.m4a", "aac", {}),
    ],
)
def test_a_whole_recording_is_not_called_cut(tmp_path, name, codec, options):
    path = write_compressed(tmp_path / name, codec, quiet_then_loud(), **options)
    assert sum(map(len, stream_audio(path))) / SAMPLE_RATE == pytest.approx(8.0, abs=0.2)
    assert recording_length_s(path) == pytest.approx(8.0, abs=0.2)
    assert len(decode_clip(path)) / SAMPLE_RATE == pytest.approx(8.0, abs=0.2)


@pytest.mark.parametrize("name", ["a.mp3", "a.flac"])
def test_a_cut_recording_is_called_cut_by_what_its_container_says(tmp_path, name):
    codecs = {".mp3": "libmp3lame", ".wav": "pcm_s16le", ".flac": "flac"}
    loud = np.concatenate([quiet_then_loud()[4 * SAMPLE_RATE :]] * 2)
    path = tmp_path / name
    if path.suffix == ".mp3":
        write_compressed(path, codecs[path.suffix], loud)
    else:
        write_media(path, loud)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TruncatedMediaError, match="ends early"):
        list(stream_audio(path))


def test_a_guessed_length_says_nothing_of_a_cut(tmp_path, caplog):
    path = write_compressed(tmp_path / "a.aac", "aac", quiet_then_loud())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with caplog.at_level(logging.ERROR):
        assert 3.0 < sum(map(len, stream_audio(path))) / SAMPLE_RATE < 7.0
