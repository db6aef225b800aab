"""Sounds that stand out from what is usual at a place, and microphones that give nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmtransfer.speech.audio import SAMPLE_RATE

_WINDOW = SAMPLE_RATE // 4
_MEMORY = 240  # windows whose median is what is usual: a minute
_KNOWN = 8  # windows before anything can be called unusual
_FLOOR_DB = -70.0  # a whisper after digital silence is not loud
_DEAD_DB = -90.0  # below this, a microphone gives nothing
_DEAD_WINDOWS = 240


@dataclass(frozen=True)
class Level:
    """A moment that stands out."""

    at: float
    """Seconds on the caller's time line."""
    level_db: float
    """Root mean square of a quarter of a second, in dB of full scale."""
    background_db: float
    """Median of the last minute."""
    is_dead: bool = False
    """Whether the microphone has given nothing for a minute, rather than something loud."""


class SoundLevel:
    """Measures the level of one source.

    A sound stands out when it is `rise_db` above the median of the last minute; it is reported
    once, and again only after half of that rise was left for a second.
    """

    def __init__(self, rise_db: float):
        self._rise_db = rise_db
        self._left = np.zeros(0, np.float32)
        self._levels: deque[float] = deque(maxlen=_MEMORY)
        self._quiet = 4  # windows since the last sound; a second of them ends it
        self._dead = 0

    def feed(self, samples: np.ndarray, at: float) -> Iterator[Level]:
        """Float32 samples at 16 kHz, the first of them at `at` seconds."""
        at -= len(self._left) / SAMPLE_RATE
        joined = np.concatenate([self._left, samples])
        whole = len(joined) // _WINDOW
        self._left = joined[whole * _WINDOW :].copy()
        power = np.mean(joined[: whole * _WINDOW].reshape(whole, _WINDOW) ** 2, axis=1)
        for index, level in enumerate(10 * np.log10(power + 1e-12)):
            yield from self._window(float(level), at + index * _WINDOW / SAMPLE_RATE)

    def _window(self, level: float, at: float) -> Iterator[Level]:
        usual = max(float(np.median(self._levels)), _FLOOR_DB) if self._levels else level
        known = len(self._levels) >= _KNOWN
        self._levels.append(level)
        self._dead = self._dead + 1 if level < _DEAD_DB else 0
        if self._dead == _DEAD_WINDOWS:
            yield Level(at, level, usual, is_dead=True)
        if known and level >= usual + self._rise_db:
            if self._quiet >= 4:
                yield Level(at, round(level, 1), round(usual, 1))
            self._quiet = 0
        elif level < usual + self._rise_db / 2:
            self._quiet += 1
