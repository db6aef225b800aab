import av
import numpy as np
import pytest
from conftest import tone, write_media

from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    MediaError,
    TruncatedMediaError,
    decode_clip,
    open_media,
    stream_audio,
)


def dominant_hertz(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * SAMPLE_RATE / len(samples)


@pytest.mark.parametrize(
    ("name", "rate", "channels", "video"),
    [
        ("a.mp4", 44_100, 2, True),
        ("a.mkv", 48_000, 1, True),
        ("a.wav", 8_000, 2, False),
        ("a.flac", 22_050, 1, False),
        ("a.ogg", 16_000, 2, False),
    ],
)
def test_any_container_rate_and_channel_count(tmp_path, name, rate, channels, video):
    path = write_media(
        tmp_path / name, tone(2.0, hertz=500, rate=rate), rate=rate, channels=channels, video=video
    )
    for samples in (decode_clip(path), np.concatenate(list(stream_audio(path)))):
        assert samples.dtype == np.float32
        assert len(samples) / SAMPLE_RATE == pytest.approx(2.0, abs=0.15)
        assert dominant_hertz(samples) == pytest.approx(500, abs=3)
        assert np.sqrt((samples[4000:-4000] ** 2).mean()) == pytest.approx(0.3 / 2**0.5, rel=0.1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(("name", "channels"), [("a.wav", 2), ("a.flac", 1), ("a.mkv", 2)])
def test_clips_and_monitored_audio_are_the_same_samples(tmp_path, name, channels, rate):
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * rate).astype(np.float32)
    path = write_media(tmp_path / name, noise, rate=rate, channels=channels)
    monitored = np.concatenate(list(stream_audio(path)))
    np.testing.assert_array_equal(decode_clip(path), monitored)
    start, end = 12_000, 40_000
    part = decode_clip(path, start / SAMPLE_RATE, end / SAMPLE_RATE)
    np.testing.assert_array_equal(part, monitored[start:end])


def test_a_part_is_the_part_of_the_whole(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * SAMPLE_RATE).astype(np.float32)
    path = write_media(tmp_path / "a.flac", noise)
    whole = decode_clip(path)
    part = decode_clip(path, 2.5, 4.0)
    assert len(part) == 1.5 * SAMPLE_RATE
    np.testing.assert_allclose(part, whole[40_000:64_000], atol=1e-6)


def test_audio_that_starts_late_keeps_its_place_in_the_video(tmp_path):
    path = write_media(tmp_path / "a.mkv", tone(1.0), video=True, offset_s=2.0)
    samples = np.concatenate(list(stream_audio(path)))
    first = np.flatnonzero(np.abs(samples) > 0.05)[0] / SAMPLE_RATE
    assert first == pytest.approx(2.0, abs=0.1)


def test_unusable_recordings_get_one_clear_line(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 100)
    write_media(tmp_path / "silent.mp4", None, video=True)
    for name, message in [
        ("missing.mp4", "no such file"),
        ("empty.mp4", "empty"),
        ("text.mp4", "not a readable video or audio file"),
        ("silent.mp4", "no audio track"),
        (".", "found a folder"),
    ]:
        with pytest.raises(MediaError, match=message) as caught:
            list(stream_audio(tmp_path / name))
        assert "\n" not in str(caught.value)
        with pytest.raises(MediaError, match=message):
            open_media(tmp_path / name)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_a_cut_recording_gives_all_there_is_and_then_says_so(tmp_path):
    path = write_media(tmp_path / "a.mp4", tone(10.0), video=True)
    blocks = []

    def read():
        for block in stream_audio(cut(path, 0.5)):
            blocks.append(block)

    with pytest.raises(TruncatedMediaError, match="ends early"):
        read()
    assert sum(map(len, blocks)) / SAMPLE_RATE == pytest.approx(5.0, abs=1.0)


def test_an_mp4_that_lost_its_index_says_so(tmp_path):
    path = write_media(tmp_path / "a.mp4", tone(3.0), video=True)
    (tmp_path / "b.mp4").write_bytes(path.read_bytes()[:40])
    with pytest.raises(MediaError, match="without its index"):
        open_media(tmp_path / "b.mp4")


def test_a_clip_needs_its_own_part_only(tmp_path):
    path = cut(write_media(tmp_path / "a.wav", tone(10.0)), 0.5)
    assert len(decode_clip(path, 1.0, 2.0)) == SAMPLE_RATE
    with pytest.raises(MediaError):
        decode_clip(path, 7.0, 8.0)


def test_damaged_packets_are_skipped(tmp_path):
    path = write_media(tmp_path / "a.ogg", tone(6.0))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    samples = []
    try:
        for block in stream_audio(path):
            samples.append(block)
    except MediaError:
        pass
    assert sum(map(len, samples)) / SAMPLE_RATE > 2.0


@pytest.mark.parametrize("layout", ["mono", "stereo", "7.1", "hexadecagonal"])
def test_channels_are_averaged_however_many_there_are(tmp_path, layout):
    path = tmp_path / "many.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16_000, layout=layout)
        channels = len(stream.layout.channels)
        levels = np.arange(1, channels + 1, dtype=np.float32) / channels / 2
        samples = np.tile(levels, 16_000)[None]
        frame = av.AudioFrame.from_ndarray(samples, "flt", layout)
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode()])
    heard = np.concatenate(list(stream_audio(path)))
    assert len(heard) == 16_000
    np.testing.assert_allclose(heard, levels.mean(), atol=1e-3)


@pytest.mark.parametrize(("codec", "rate"), [("aac", 16_000), ("libopus", 48_000)])
@pytest.mark.parametrize("layout", ["5.1", "7.1"])
def test_surround_sound_in_planes(tmp_path, codec, rate, layout):
    # Of exactly eight planes PyAV finds a ninth, beyond the frame.
    path = tmp_path / "surround.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        samples = np.repeat(tone(1.0, rate=rate), stream.layout.nb_channels)[None]
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32), "flt", layout)
        frame.sample_rate = rate
        planar = av.AudioResampler(stream.format, layout, rate, stream.frame_size or 960)
        for piece in (*planar.resample(frame), *planar.resample(None)):
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    samples = np.concatenate(list(stream_audio(path)))
    assert len(samples) == pytest.approx(SAMPLE_RATE, abs=1500)
    assert np.abs(samples[4000:12000]).max() > 0.1
