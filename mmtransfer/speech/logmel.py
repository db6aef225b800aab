"""Whisper's log-mel features in NumPy: the library's values without its start-up time.

Only frames that hear the clip are computed; the silence behind it, which is most of a padded
window, has one known value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mmtransfer.speech.audio import SAMPLE_RATE

MEL_FRAMES_PER_SECOND = 100
_WINDOW, _HOP = 400, 160
_FLOOR = 1e-10  # power of digital silence
_RANGE = 8.0  # powers of ten kept below the loudest


@lru_cache(maxsize=4)
def mel_filters(bands: int) -> np.ndarray:
    """Triangular filters [frequency, band] on Slaney's mel scale, each of unit area (as Whisper's).

    The scale is linear up to 1 kHz and logarithmic above it (Slaney 1998, Auditory Toolbox).
    """
    linear, knee_hz, knee = 200 / 3, 1000.0, 15.0
    step = np.log(6.4) / 27.0

    def mel(hz: float) -> float:
        return hz / linear if hz < knee_hz else knee + float(np.log(hz / knee_hz)) / step

    mels = np.linspace(mel(0.0), mel(SAMPLE_RATE / 2), bands + 2)
    edges = np.where(mels < knee, mels * linear, knee_hz * np.exp(step * (mels - knee)))
    hz = np.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1)
    distance = edges[None] - hz[:, None]
    widths = np.diff(edges)
    rising, falling = -distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]
    areas = 2.0 / (edges[2:] - edges[:-2])
    return (np.clip(np.minimum(rising, falling), 0, None) * areas).astype(np.float32)


@lru_cache(maxsize=4)
def _sparse_filters(bands: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies that some filter lets through, one filter after the other; their weights
    [frequency, 1]; and where each filter begins.
    """
    filters = mel_filters(bands)
    heard = [np.flatnonzero(filter_) if filter_.any() else [0] for filter_ in filters.T]
    weights = [filter_[places] for filter_, places in zip(filters.T, heard, strict=True)]
    begins = np.cumsum([0, *(len(places) for places in heard[:-1])])
    return np.concatenate(heard), np.concatenate(weights)[:, None], begins


@lru_cache(maxsize=1)
def _window() -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)).astype(np.float32)


def log_mel(clips: Sequence[np.ndarray], context_s: float, *, bands: int = 80) -> np.ndarray:
    """Log-mel [clip, band, frame] of 16-kHz float32 clips, 100 frames a second.

    Each clip is padded with silence to `context_s`, or cut to it.
    """
    samples = round(context_s * SAMPLE_RATE)
    frames = samples // _HOP
    result = np.empty((len(clips), bands, frames), np.float32)
    for row, clip in zip(result, clips, strict=True):
        heard = np.asarray(clip[:samples], np.float32)
        # Frames are centred on their time, so the first and the last reach over the edges, where
        # the signal is mirrored.
        end = min(samples, len(heard) + _WINDOW)
        padded = np.pad(np.pad(heard, (0, end - len(heard))), _WINDOW // 2, mode="reflect")
        count = min(frames, end // _HOP)
        pieces = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][:count]
        spectrum = np.fft.rfft(pieces * _window(), axis=-1)
        power = np.ascontiguousarray((spectrum.real**2 + spectrum.imag**2).T)
        # Summed here: the last bits of a matrix product depend on the number of BLAS's threads, and
        # now and then a word does on them.
        places, weights, begins = _sparse_filters(bands)
        energy = np.add.reduceat(power[places] * weights, begins, axis=0)
        row[:, count:] = np.log10(_FLOOR)
        row[:, :count] = np.log10(np.maximum(energy, _FLOOR))
        np.maximum(row, row.max() - _RANGE, out=row)
        row += 4.0
        row /= 4.0
    return result
