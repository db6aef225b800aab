"""Log-mel energies as Kaldi computes them, which Audio Spectrogram Transformers take."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

FRAME, HOP = 400, 160
"""Samples of a frame (25 ms at 16 kHz), and from one frame to the next."""
_RATE = 16_000
_FFT = 512
_LOWEST_HZ = 20.0
_PREEMPHASIS = 0.97
_FLOOR = torch.finfo(torch.float32).eps


def frame_count(samples: int) -> int:
    """Whole frames of so many samples."""
    return max(0, 1 + (samples - FRAME) // HOP)


def filterbank(samples: np.ndarray, bands: int) -> torch.Tensor:
    """Log-mel energies [frame, band] of float32 samples at 16 kHz, in whole frames alone.

    As `torchaudio.compliance.kaldi.fbank` with a Hann window: each frame without its mean, with the
    first differences emphasised.
    """
    if len(samples) < FRAME:
        return torch.zeros(0, bands)
    frames = torch.from_numpy(np.ascontiguousarray(samples, np.float32)).unfold(0, FRAME, HOP)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames = (frames - _PREEMPHASIS * before) * torch.hann_window(FRAME, periodic=False)
    power = torch.fft.rfft(frames, _FFT).abs() ** 2
    return (power @ _triangles(bands)).clamp_min(_FLOOR).log()


@lru_cache
def _triangles(bands: int) -> torch.Tensor:
    """Weights [frequency, band] of triangles that overlap by half on Kaldi's mel scale."""

    def mel(hertz: torch.Tensor) -> torch.Tensor:
        return 1127.0 * (1.0 + hertz / 700.0).log()

    lowest, highest = mel(torch.tensor([_LOWEST_HZ, _RATE / 2], dtype=torch.float64))
    width = (highest - lowest) / (bands + 1)
    left = lowest + width * torch.arange(bands, dtype=torch.float64)
    place = mel(torch.arange(_FFT // 2 + 1, dtype=torch.float64) * _RATE / _FFT)[:, None] - left
    weights = torch.minimum(place / width, 2 - place / width).clamp_min(0)
    weights[-1] = 0  # Kaldi leaves the highest frequency out
    return weights.float()
