"""Channels, bad samples, quiet speech, odd layouts."""

import struct
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import EXAMPLE, child_environment, tone, write_media

from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    MediaError,
    channel_count,
    decode_clip,
    stream_audio,
)
from mmtransfer.speech.mixing import brought_up
from mmtransfer.speech.segments import Segmenter


def write_channels(path, channels, *, layout, codec="pcm_f32le", rate=SAMPLE_RATE):
    """Samples [channel, sample] in blocks."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        for at in range(0, channels.shape[1], 4096):
            block = np.ascontiguousarray(channels[:, at : at + 4096].T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block.astype(np.float32), "flt", layout)
            frame.sample_rate, frame.pts = rate, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def heard(path, **options):
    return np.concatenate(list(stream_audio(path, **options)))


def level(samples):
    return float(np.sqrt(np.mean(samples[2000:-2000] ** 2)))


VOICE, OTHER = tone(3.0, hertz=300), tone(3.0, hertz=700, level=0.2)
HISS = np.random.default_rng(0).normal(0, 0.02, len(VOICE)).astype(np.float32)


@pytest.mark.parametrize(
    ("layout", "channels", "expected"),
    [
        ("stereo", [VOICE, VOICE], VOICE),
        ("stereo", [VOICE, OTHER], (VOICE + OTHER) / 2),
        ("stereo", [VOICE, -VOICE], VOICE),
        ("stereo", [VOICE, -0.5 * VOICE], 0.75 * VOICE),
        ("stereo", [VOICE + HISS, -VOICE + HISS], VOICE),
        ("stereo", [0 * VOICE, VOICE], VOICE),
        ("quad", [VOICE, VOICE, -VOICE, VOICE], VOICE),
        ("5.1", [0 * VOICE, 0 * VOICE, VOICE, 0 * VOICE, 0 * VOICE, 0 * VOICE], VOICE),
    ],
)
def test_no_channel_cancels_or_drowns_another(tmp_path, layout, channels, expected):
    path = write_channels(tmp_path / "a.wav", np.stack(channels), layout=layout)
    found = heard(path)
    assert level(found) == pytest.approx(level(expected), rel=0.1)
    likeness = np.dot(found, expected) / np.linalg.norm(found) / np.linalg.norm(expected)
    assert abs(likeness) > 0.99


def test_a_talker_on_the_other_channel_is_heard_at_once(tmp_path):
    half = len(VOICE) // 2
    left, right = VOICE.copy(), np.zeros_like(VOICE)
    left[half:], right[half:] = 0, 0.1 * OTHER[half:]
    found = heard(write_channels(tmp_path / "a.wav", np.stack([left, right]), layout="stereo"))
    assert level(found[half : half + 8000]) == pytest.approx(level(0.05 * OTHER), rel=0.2)


def test_one_channel_of_all_tracks(tmp_path):
    path = tmp_path / "a.mka"
    with av.open(str(path), "w") as out:
        tracks = [
            (out.add_stream("pcm_f32le", rate=SAMPLE_RATE, layout=layout), voices)
            for layout, voices in (("stereo", [VOICE, OTHER]), ("mono", [2 * VOICE]))
        ]
        for stream, voices in tracks:
            block = np.ascontiguousarray(np.stack(voices).T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, "flt", stream.layout.name)
            frame.sample_rate = SAMPLE_RATE
            out.mux([*stream.encode(frame), *stream.encode(None)])
    assert channel_count(path) == 3
    for channel, voice in enumerate((VOICE, OTHER, 2 * VOICE)):
        np.testing.assert_allclose(heard(path, channel=channel), voice, atol=1e-6)
    with pytest.raises(MediaError, match="no channel 4: it has 3"):
        heard(path, channel=3)


# --- samples --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech():
    return decode_clip(EXAMPLE / "monitor.mp4", 5.5, 14.2)


def segments(samples):
    segmenter = Segmenter()
    found = [*segmenter.feed(samples), *segmenter.finish()]
    return [(round(s.start, 2), round(s.end, 2)) for s in found]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20, -3e38])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 8000])
def test_one_bad_sample_costs_no_more_than_itself(tmp_path, speech, bad, rate, caplog):
    clean = speech[:: SAMPLE_RATE // rate][None].copy()
    spoilt = clean.copy()
    spoilt[0, [100, 20_000]] = bad
    paths = [
        write_channels(tmp_path / f"{name}.wav", samples, layout="mono", rate=rate)
        for name, samples in (("clean", clean), ("spoilt", spoilt))
    ]
    expected, found = map(heard, paths)
    assert np.isfinite(found).all()
    assert segments(found) == segments(expected) != []
    assert caplog.text.count("2 samples are invalid") == 1
    assert np.isfinite(decode_clip(paths[1])).all()


def test_integers_written_as_floats_are_brought_down(tmp_path, speech, caplog):
    scaled = write_channels(tmp_path / "a.wav", np.round(speech * 32768)[None], layout="mono")
    np.testing.assert_allclose(heard(scaled), speech, atol=1e-4)
    assert "integers written as floats" in caplog.text


def test_loud_floats_are_left_alone(tmp_path):
    np.testing.assert_allclose(
        heard(write_channels(tmp_path / "a.wav", 5 * VOICE[None], layout="mono")), 5 * VOICE
    )


@pytest.mark.parametrize("gain", [1.0, 0.1, 0.01, 0.002])
def test_quiet_speech_is_found_and_brought_up(tmp_path, speech, gain):
    quiet = write_media(tmp_path / "a.wav", (speech * gain).astype(np.float32))
    found = segments(heard(quiet))
    assert len(found) == len(segments(speech))
    np.testing.assert_allclose(found, segments(speech), atol=0.35)
    segmenter = Segmenter()
    for segment in [*segmenter.feed(heard(quiet)), *segmenter.finish()]:
        assert np.abs(segment.samples).max() > 0.025
    assert np.abs(decode_clip(quiet)).max() > 0.025


def test_loud_enough_and_silent_audio_stay_as_they_are():
    for samples in (VOICE, 0 * VOICE):
        assert brought_up(samples) is samples or not samples.any()
    assert np.abs(brought_up(1e-6 * VOICE)).max() < 1e-4


def test_noise_is_no_speech_at_any_level():
    noise = np.random.default_rng(0).normal(0, 1, 30 * SAMPLE_RATE).astype(np.float32)
    for decibels in (-90, -60, -40, -20):
        assert segments(noise * np.float32(10 ** (decibels / 20))) == []


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [(16_000, 24_000), (44_100, 22_050), (16_000, 16_000)])
def test_a_rate_that_changes_within_a_file(tmp_path, rates):
    path, data = tmp_path / "a.mp3", b""
    for number, rate in enumerate(rates):
        part = tmp_path / f"{number}.mp3"
        samples = tone(2.0, hertz=400 + 300 * number, rate=rate)
        with av.open(str(part), "w", options={"write_xing": "0", "id3v2_version": "0"}) as out:
            stream = out.add_stream("libmp3lame", rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
            frame.sample_rate = rate
            out.mux([*stream.encode(frame), *stream.encode(None)])
        data += part.read_bytes()
    path.write_bytes(data)
    whole = heard(path)
    assert len(whole) / SAMPLE_RATE == pytest.approx(4.0, abs=0.3)
    second = decode_clip(path, 2.5, 3.5)
    assert len(second) == SAMPLE_RATE
    hertz = np.abs(np.fft.rfft(second * np.hanning(len(second)))).argmax()
    assert hertz == pytest.approx(700, abs=3)


@pytest.mark.parametrize("channels", [1, 2, 3, 9, 64, 255])
def test_any_number_of_channels_is_averaged(tmp_path, channels):
    data = (np.repeat(VOICE[:, None], channels, axis=1) * 32767).astype("<i2").tobytes()
    head = struct.pack("<HHIIHH", 1, channels, 16_000, 32_000 * channels, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data))
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data)
    np.testing.assert_allclose(heard(path), VOICE, atol=1e-3)
    np.testing.assert_allclose(decode_clip(path), VOICE, atol=1e-3)


def with_channel_map(path: Path, channels: int, label: int) -> Path:
    """A QuickTime file whose `chan` box names each channel, instead of a layout that has a name."""
    data = bytearray(path.read_bytes())
    at = data.index(b"chan") - 4
    old = struct.unpack_from(">I", data, at)[0]
    own = b"".join(struct.pack(">II12x", label, 0) for _ in range(channels))
    box = struct.pack(">I4sIIII", 24 + len(own), b"chan", 0, 0, 0, channels) + own
    grown = len(box) - old
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        place = data.rindex(kind, 0, at) - 4
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + grown)
    entry = data.rindex(b"sowt", 0, at) - 4
    struct.pack_into(">I", data, entry, struct.unpack_from(">I", data, entry)[0] + grown)
    data[at : at + old] = box
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("channels", "layout"), [(4, "quad"), (2, "stereo"), (6, "5.1")])
def test_a_channel_map_of_the_files_own_does_not_end_the_process(tmp_path, channels, layout):
    path = tmp_path / "a.mov"
    voices = np.repeat(VOICE[None], channels, axis=0)
    write_channels(path, voices, layout=layout, codec="pcm_s16le")
    plain = heard(path)
    with_channel_map(path, channels, 0)  # all of them unused
    program = (
        "import sys, numpy as np\nfrom mmtransfer.speech.audio import stream_audio, decode_clip\n"
        "for _ in range(2):\n"
        "    found = np.concatenate(list(stream_audio(sys.argv[1])))\n"
        "    part = decode_clip(sys.argv[1], 1.5, 2.5)\n"
        "print(len(found), len(part), float(np.abs(found).max()))"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, part, peak = done.stdout.split()
    assert (int(count), int(part)) == (len(plain), SAMPLE_RATE)
    assert float(peak) == pytest.approx(float(np.abs(plain).max()), rel=0.01)


def test_whatever_a_decoder_raises_is_its_files_alone(tmp_path, monkeypatch):
    path = write_media(tmp_path / "a.wav", VOICE)

    def fail(*arguments):
        raise IndexError("out of range")

    monkeypatch.setattr("mmtransfer.speech.mixing.Mixer.samples", fail)
    for read in (heard, decode_clip):
        with pytest.raises(MediaError, match="cannot be converted \\(out of range\\)"):
            read(path)


@pytest.mark.parametrize(("rate", "is_known"), [(1, 0), (1_000, 1), (384_000, 1), (822_099_584, 0)])
def test_rates_that_no_recording_has_are_refused(tmp_path, rate, is_known):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2000))
    if is_known:
        samples = np.concatenate(list(stream_audio(path)))
        assert len(samples) == pytest.approx(1000 * 16_000 / rate, abs=300)
    else:
        with pytest.raises(MediaError, match=rf"sample rate of {rate} Hz; expected 1000 to"):
            list(stream_audio(path))
