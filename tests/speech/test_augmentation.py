import numpy as np
import pytest
import torch
from conftest import tone, write_media

from mmtransfer.config import AugmentConfig
from mmtransfer.errors import UserError
from mmtransfer.speech.augmentation import Augmenter


def test_a_clip_is_not_slowed_beyond_the_longest():
    slow = AugmentConfig(speed=(0.9, 0.9))
    augmenter = Augmenter(slow, 30.0)
    for seconds, expected in ((26.0, 0.9), (27.5, 1.0)):
        rng = np.random.default_rng(0)
        assert augmenter.draw_speed(rng, seconds) == expected
        out, speed = augmenter.waveform(tone(seconds), np.random.default_rng(0))
        assert speed == expected
        assert len(out) / 16_000 == pytest.approx(seconds / expected, abs=0.01)
    assert Augmenter(slow).waveform(tone(27.5), np.random.default_rng(0))[1] == 0.9


def test_nothing_is_changed_unless_named():
    samples = tone(1.0)
    out, speed = Augmenter(AugmentConfig()).waveform(samples, np.random.default_rng(0))
    assert speed == 1.0
    np.testing.assert_array_equal(out, samples)


def test_speed_changes_length_and_pitch():
    augmenter = Augmenter(AugmentConfig(speed=(1.1, 1.1)))
    out, speed = augmenter.waveform(tone(2.0, hertz=400), np.random.default_rng(0))
    assert speed == pytest.approx(1.1)
    assert len(out) == pytest.approx(32_000 / 1.1, abs=2)
    peak = np.abs(np.fft.rfft(out * np.hanning(len(out)))).argmax() * 16_000 / len(out)
    assert peak == pytest.approx(440, abs=2)


def test_noise_is_mixed_at_the_asked_ratio(tmp_path):
    noise = np.random.default_rng(1).normal(0, 0.2, 48_000).astype(np.float32)
    write_media(tmp_path / "n.flac", noise)
    config = AugmentConfig(
        noise_dir=str(tmp_path), noise_probability=1.0, noise_snr_db=(10.0, 10.0)
    )
    samples = tone(2.0)
    out, _ = Augmenter(config).waveform(samples, np.random.default_rng(0))
    ratio = (samples**2).mean() / ((out - samples) ** 2).mean()
    assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=0.05)
    silence, _ = Augmenter(config).waveform(np.zeros(16_000, np.float32), np.random.default_rng(0))
    assert np.isfinite(silence).all()
    assert silence.any()


def test_reverberation_keeps_length_and_loudness(tmp_path):
    room = np.zeros(8_000, np.float32)
    room[100] = 0.9
    room[100:] += np.random.default_rng(0).normal(0, 0.05, 7_900) * np.exp(-np.arange(7_900) / 1e3)
    write_media(tmp_path / "room.flac", room)
    config = AugmentConfig(reverb_dir=str(tmp_path), reverb_probability=1.0)
    samples = tone(1.0)
    out, _ = Augmenter(config).waveform(samples, np.random.default_rng(0))
    assert len(out) == len(samples)
    assert (out**2).mean() == pytest.approx((samples**2).mean(), rel=1e-3)
    assert np.abs(out - samples).max() > 0.01


def test_narrow_band_keeps_the_telephone_band_alone():
    """What lies below 3.4 kHz stays at 30 dB and more, what lies above 4 kHz goes."""
    low, high = tone(1.01, hertz=1_000), tone(1.01, hertz=6_000)
    samples = low + high
    config = AugmentConfig(narrow_band_probability=1.0)
    assert Augmenter(config).is_active
    out, _ = Augmenter(config).waveform(samples, np.random.default_rng(0))
    assert out.shape == samples.shape
    assert out.dtype == np.float32
    inner = slice(200, -200)  # the ends lack neighbours to resample from
    error = ((out - low)[inner] ** 2).mean() / (low**2).mean()
    assert 10 * np.log10(error) < -30
    loud, _ = Augmenter(config).waveform(4 * low, np.random.default_rng(0))
    assert np.abs(loud).max() < 1.3  # a line clips
    silence, _ = Augmenter(config).waveform(np.zeros(160, np.float32), np.random.default_rng(0))
    assert np.abs(silence).max() < 1e-3


def test_spec_augment_masks_within_the_clip():
    config = AugmentConfig(spec_time_masks=2, spec_time_width_s=0.2, spec_frequency_masks=1)
    features = torch.rand(80, 500) + 1
    before = features.clone()
    Augmenter(config).features(features, 2.0, np.random.default_rng(3))
    changed = features != before
    assert changed.any()
    assert (features[changed] == before.min()).all()
    columns = changed.all(0)
    assert not columns[200:].any()  # no time mask beyond the clip's own two seconds
    assert columns.sum() <= 2 * 20


def test_the_identity_of_an_augmentation_is_that_of_its_recordings(tmp_path):
    """So that cached features of augmented clips are not those of other noise."""
    config = AugmentConfig(noise_dir=str(tmp_path))
    found = []
    for seed in (1, 1, 2):
        noise = np.random.default_rng(seed).normal(0, 0.2, 16_000).astype("f4")
        write_media(tmp_path / "n.flac", noise)
        found.append(Augmenter(config).identity)
    assert found[0] == found[1] != found[2]


def test_the_same_generator_gives_the_same_clip(tmp_path):
    write_media(tmp_path / "n.flac", np.random.default_rng(1).normal(0, 0.2, 16_000).astype("f4"))
    augmenter = Augmenter(AugmentConfig(speed=(0.9, 1.1), noise_dir=str(tmp_path)))
    samples = tone(1.0)
    one, other = (augmenter.waveform(samples, np.random.default_rng(7))[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_folder_without_audio(tmp_path):
    with pytest.raises(UserError, match=r"augment\.noise_dir.*found none"):
        Augmenter(AugmentConfig(noise_dir=str(tmp_path)))
