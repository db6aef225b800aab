"""What a monitor did: numbers for each source, and in sum."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf, isinf

_DELAYS = 1000  # segments whose delays are kept, for their quantiles
_DELAY_BOUNDS_S = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, inf)


@dataclass
class CameraStats:
    """What happened to one source; each number has one thread that writes it."""

    audio_s: float = 0.0
    """Seconds of audio decoded."""
    decode_s: float = 0.0
    """Seconds that the recogniser's workers took."""
    segments: int = 0
    """Segments with text."""
    lines: int = 0
    """Lines of text, revised ones not counted again."""
    revised: int = 0
    """Lines of a live source that were replaced when their turn was over."""
    not_revised: int = 0
    """Turns that there was no time to decode as a whole; their lines stay as they are."""
    decoded_again: int = 0
    """Segments decoded again in longer contexts or in halves, because a guard flagged them."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Segments, and halves of windows, without text, by reason."""
    dropped: int = 0
    """Segments dropped because the queue was full."""
    waiting: int = 0
    """Segments cut, and not decoded yet."""
    alerts: int = 0
    """Keywords that were transcribed, loud sounds, and sounds of classes."""
    sounds: Counter[str] = field(default_factory=Counter)
    """Sounds of classes, by class."""
    unclassified_s: float = 0.0
    """Audio of a live source in which there was no time to classify sounds."""
    is_connected: bool = False
    """Of a live source, whether audio comes."""
    failure: str = ""
    """Why it ended early; empty if it did not."""
    last_text: str = ""
    events: Counter[str] = field(default_factory=Counter)
    """What happened to a live source: connected, gap, lost."""
    delays_s: deque[float] = field(default_factory=lambda: deque(maxlen=_DELAYS))
    """Of a live source's last segments: from the end of speech to its text."""
    _delay_counts: Counter[float] = field(default_factory=Counter)
    _delay_sum_s: float = 0.0

    @property
    def real_time_factor(self) -> float:
        """Recognition time over audio time."""
        return self.decode_s / self.audio_s if self.audio_s else 0.0

    @property
    def reconnects(self) -> int:
        """Connections after the first."""
        return max(0, self.events["connected"] - 1)

    def add_delay(self, seconds: float) -> None:
        """Count a segment of a live source by its delay."""
        self.delays_s.append(seconds)
        self._delay_counts[next(bound for bound in _DELAY_BOUNDS_S if seconds <= bound)] += 1
        self._delay_sum_s += seconds

    def delay_histogram(self) -> tuple[list[tuple[str, float]], float]:
        """Segments of the whole run with a delay of at most so many seconds, for each bound; and
        the sum of all delays.
        """
        counts = self._delay_counts.copy()
        totals = accumulate(counts[bound] for bound in _DELAY_BOUNDS_S)
        bounds = ("+Inf" if isinf(bound) else f"{bound:g}" for bound in _DELAY_BOUNDS_S)
        return [*zip(bounds, map(float, totals), strict=True)], self._delay_sum_s

    def delay_s(self, quantile: float) -> float:
        """A quantile of the last segments' delays, 0 where there is none."""
        delays = sorted(self.delays_s)
        return delays[min(len(delays) - 1, int(quantile * len(delays)))] if delays else 0.0


class MonitorStats:
    """What a monitor did: for each source, and in sum."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cameras: dict[str, CameraStats] = {}

    def add_cameras(self, names: Iterable[str]) -> None:
        """Count for these sources as well."""
        self.cameras = {name: CameraStats() for name in names} | self.cameras

    @property
    def segments(self) -> int:
        """Segments with text."""
        return sum(camera.segments for camera in self.cameras.values())

    @property
    def audio_s(self) -> float:
        """Seconds of audio decoded."""
        return sum(camera.audio_s for camera in self.cameras.values())

    @property
    def lines(self) -> int:
        """Lines of text."""
        return sum(camera.lines for camera in self.cameras.values())

    @property
    def revised(self) -> int:
        """Lines that were replaced when their turn was over."""
        return sum(camera.revised for camera in self.cameras.values())

    @property
    def not_revised(self) -> int:
        """Turns that there was no time to decode as a whole."""
        return sum(camera.not_revised for camera in self.cameras.values())

    @property
    def decoded_again(self) -> int:
        """Segments decoded again in longer contexts."""
        return sum(camera.decoded_again for camera in self.cameras.values())

    @property
    def rejected(self) -> Counter[str]:
        """Segments without text, by reason."""
        return sum((camera.rejected for camera in self.cameras.values()), Counter())

    @property
    def dropped(self) -> int:
        """Segments dropped because the queue was full."""
        return sum(camera.dropped for camera in self.cameras.values())

    @property
    def sounds(self) -> Counter[str]:
        """Sounds of classes, by class."""
        return sum((camera.sounds for camera in self.cameras.values()), Counter())

    @property
    def unclassified_s(self) -> float:
        """Audio in which there was no time to classify sounds."""
        return sum(camera.unclassified_s for camera in self.cameras.values())

    @property
    def events(self) -> Counter[str]:
        """What happened to live sources."""
        return sum((camera.events for camera in self.cameras.values()), Counter())

    @property
    def failed(self) -> dict[str, str]:
        """Sources that ended early, and why."""
        return {name: camera.failure for name, camera in self.cameras.items() if camera.failure}

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.wall_s / self.audio_s if self.audio_s else 0.0
