"""Changes to training clips: speed, reverberation, noise, telephone band, SpecAugment.

Every random choice comes from the generator that is passed in, so a clip's augmentation depends
on the seed, the epoch and the clip alone, and a resumed run repeats it exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio.functional as audio_functional

from mmtransfer.config import AugmentConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.files import files_digest
from mmtransfer.speech.audio import SAMPLE_RATE, MediaError, decode_clip
from mmtransfer.speech.recordings import AUDIO_SUFFIXES, visible_files

_NARROW_RATE = 8_000  # Hz
_NARROW_LEVELS = 256


@lru_cache(maxsize=512)
def _recording(path: Path) -> np.ndarray:
    return decode_clip(path)


def _recordings(folder: str, setting: str) -> list[Path]:
    paths = [p for p in visible_files(Path(folder)) if p.suffix.lower() in AUDIO_SUFFIXES]
    if not paths:
        raise UserError(f"{setting}: {folder}: expected a folder with audio files, found none.")
    try:
        _recording(paths[0])
    except MediaError as error:
        raise UserError(f"{setting}: {error}") from None
    return paths


class Augmenter:
    """Applies what the configuration names.

    A clip that its speed would stretch beyond `longest_s` keeps its own, since its last words would
    be cut off.

    Raises:
        UserError: a noise or reverberation folder without audio files.
    """

    def __init__(self, config: AugmentConfig, longest_s: float = math.inf):
        self._config = config
        self._longest_s = longest_s
        self._noises = (
            _recordings(config.noise_dir, "augment.noise_dir") if config.noise_dir else []
        )
        self._rooms = (
            _recordings(config.reverb_dir, "augment.reverb_dir") if config.reverb_dir else []
        )

    def waveform(self, samples: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """Augmented float32 samples at 16 kHz, and the speed factor that was applied."""
        config = self._config
        speed = self.draw_speed(rng, len(samples) / SAMPLE_RATE)
        if speed != 1.0:
            wave = torch.from_numpy(samples)
            samples = audio_functional.resample(wave, round(speed * 100), 100).numpy()
        if self._rooms and rng.random() < config.reverb_probability:
            room = _recording(self._rooms[rng.integers(len(self._rooms))])
            samples = _reverberate(samples, room)
        if self._noises and rng.random() < config.noise_probability:
            noise = _recording(self._noises[rng.integers(len(self._noises))])
            samples = _add_noise(samples, noise, rng.uniform(*config.noise_snr_db), rng)
        # Last, since the line carries what the microphone heard. No draw where it is off, so that
        # runs without it stay as they were.
        narrow = config.narrow_band_probability
        if narrow and rng.random() < narrow:
            samples = _narrow_band(samples)
        return samples, speed

    def draw_speed(self, rng: np.random.Generator, clip_s: float) -> float:
        """The speed factor that `waveform` would apply with this generator to a clip so long."""
        if self._config.speed is None:
            return 1.0
        # Steps of 0.05, since each distinct ratio needs a resampling kernel of its own.
        speed = round(rng.uniform(*self._config.speed) * 20) / 20
        return speed if clip_s / speed <= self._longest_s else 1.0

    @property
    def slowest(self) -> float:
        """Lowest speed factor; a clip becomes at most one over this longer."""
        return min(1.0, *(self._config.speed or (1.0,)))

    @property
    def identity(self) -> dict[str, Any]:
        """What augmented clips depend on beside the seed: settings, and recordings by content."""
        return {
            **self._config.model_dump(mode="json"),
            "noises": files_digest(self._noises),
            "rooms": files_digest(self._rooms),
        }

    @property
    def is_active(self) -> bool:
        """Whether clips are changed at all."""
        config = self._config
        masks = config.spec_time_masks + config.spec_frequency_masks
        return bool(
            config.speed or self._noises or self._rooms or config.narrow_band_probability or masks
        )

    def features(self, features: torch.Tensor, seconds: float, rng: np.random.Generator) -> None:
        """Mask bands and stretches of one clip's log-mel [mel, frame] in place (SpecAugment).

        Masked cells get the clip's lowest value, which is what silence looks like.
        """
        config = self._config
        bands, frames = features.shape[0], min(features.shape[1], round(seconds * 100))
        lowest = features.min()
        for _ in range(config.spec_time_masks):
            width = int(rng.integers(0, round(config.spec_time_width_s * 100) + 1))
            start = int(rng.integers(0, max(1, frames - width)))
            features[:, start : start + width] = lowest
        for _ in range(config.spec_frequency_masks):
            width = int(rng.integers(0, config.spec_frequency_width + 1))
            start = int(rng.integers(0, max(1, bands - width)))
            features[start : start + width] = lowest


def _reverberate(samples: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Convolve with a room response, keeping loudness, length and the direct sound's place."""
    start = int(np.abs(room).argmax())
    response = torch.from_numpy(room[start:].copy())
    wave = torch.from_numpy(samples)
    wet = audio_functional.fftconvolve(wave, response)[: len(wave)]
    loudness, wet_loudness = wave.pow(2).mean().sqrt(), wet.pow(2).mean().sqrt()
    return (wet * (loudness / wet_loudness.clamp(min=1e-8))).numpy()


def _add_noise(
    samples: np.ndarray, noise: np.ndarray, snr_db: float, rng: np.random.Generator
) -> np.ndarray:
    start = int(rng.integers(len(noise)))
    looped = np.resize(np.roll(noise, -start), len(samples))
    if not samples.any():  # silence has no level to relate the noise to
        return (samples + 0.05 * looped).astype(np.float32)
    return audio_functional.add_noise(
        torch.from_numpy(samples), torch.from_numpy(looped), torch.tensor(snr_db).float()
    ).numpy()


def _narrow_band(samples: np.ndarray) -> np.ndarray:
    """What a telephone or a camera with G.711 sound passes on: 8 kHz in 8 bits, mu-law."""
    wave = torch.from_numpy(samples)
    line = audio_functional.resample(wave, SAMPLE_RATE, _NARROW_RATE).clamp(-1, 1)
    coded = audio_functional.mu_law_encoding(line, _NARROW_LEVELS)
    heard = audio_functional.mu_law_decoding(coded, _NARROW_LEVELS)
    return audio_functional.resample(heard, _NARROW_RATE, SAMPLE_RATE)[: len(wave)].numpy()
