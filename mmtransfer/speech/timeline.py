"""Where a recording's audio lies in time: training clips and monitoring share this one clock.

Time goes by the samples. What packets are stamped with is often when they arrived, or what a clock
said that was set meanwhile; a stamp moves audio only where all that follows agrees with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

JITTER_S = 0.1
"""Smaller differences between stamps and samples are rounding."""
_SURE_S = 5.0  # audio that has to agree that something is missing before it
_LONGEST_LOOK_S = 30.0  # however much seems to be missing
_BURST_S = 1.0  # at the end of a recording: a shorter delay may have been about to be made up


class Timeline:
    """Puts audio in its place: gives each piece back with the silence that belongs before it.

    Audio that comes late makes no silence unless everything behind it stays late, for as long as
    it would take to make up for the delay. So pieces are held while that is open. Stamps that go
    back take nothing away; silence that was put in is set off against what is missing later.

    `can_be_missing(at, gap_s)` says whether so much may be missing at that time (seconds); what may
    not is a clock that jumped, and is set aside.
    """

    def __init__(
        self, can_be_missing: Callable[[float, float], bool], position: float | None = 0.0
    ):
        self.position = position
        """Seconds, for the next piece; None until the first says where it is."""
        self._can_be_missing = can_be_missing
        self._shift = 0.0  # what stamps are ahead by that were found wrong
        self._filled = 0.0  # silence so far
        self._has_begun = False
        self._held: deque[tuple[Any, float | None, float]] = deque()
        self._held_s = self._low = self._look_s = 0.0
        self._early_s, self._high = 0.0, -float("inf")  # audio stamped too early, and its nearest

    def place(self, piece: Any, stamp: float | None, seconds: float) -> Iterator[tuple[float, Any]]:
        """Take a piece with its stamp and length; yields (seconds of silence before it, piece) for
        all whose place is known.
        """
        if self.position is None:
            self.position = stamp or 0.0
        waiting = deque([(piece, stamp, seconds)])
        while waiting:
            piece, stamp, seconds = waiting.popleft()
            late = 0.0 if stamp is None else stamp - self._shift - self.position - self._held_s
            if not self._held and late <= JITTER_S:
                self._note_early(late, seconds)
                self.position += seconds
                self._has_begun = True
                yield 0.0, piece
                continue
            if not self._held:
                self._low = late
                self._look_s = min(max(_SURE_S, 1.5 * late), _LONGEST_LOOK_S)
            self._low = min(self._low, late)
            self._held.append((piece, stamp, seconds))
            self._held_s += seconds
            if self._low <= JITTER_S:
                yield from self._release(0.0)
            elif self._held_s >= self._look_s:
                first, *others = self._held
                waiting = deque([*others, *waiting])
                self._held = deque([first])
                yield from self._release(self._low)

    def finish(self) -> Iterator[tuple[float, Any]]:
        """Nothing more will come; yields what was held."""
        while self._held:
            is_burst = self._has_begun and self._held_s < self._low < _BURST_S
            first, *others = self._held
            self._held = deque([first])
            yield from self._release(0.0 if is_burst else self._low)
            for piece, stamp, seconds in others:
                yield from self.place(piece, stamp, seconds)

    def _release(self, gap_s: float) -> Iterator[tuple[float, Any]]:
        assert self.position is not None
        if gap_s and not self._can_be_missing(self.position, gap_s):
            self._shift += gap_s
            gap_s = 0.0
        self.position += gap_s
        self._filled += gap_s
        held, self._held, self._held_s = self._held, deque(), 0.0
        self._has_begun = True
        for piece, _, seconds in held:
            self.position += seconds
            yield gap_s, piece
            gap_s = 0.0
        self._early_s, self._high = 0.0, -float("inf")

    def _note_early(self, late: float, seconds: float) -> None:
        """A clock that was set back stays so; what is early by silence that was put in is not."""
        if late >= -JITTER_S:
            self._early_s, self._high = 0.0, -float("inf")
            return
        self._early_s += seconds
        self._high = max(self._high, late)
        if self._early_s >= _SURE_S:
            self._shift += self._high + min(self._filled, -self._high)
            self._early_s, self._high = 0.0, -float("inf")
