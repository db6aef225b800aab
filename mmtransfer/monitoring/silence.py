"""What is silent in the clips of a source: words that were redacted, and speech whose text
is not known when a clip is written.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

Span = tuple[float, float]
_AROUND_S = 0.2  # of a word: its times are those of an alignment
_SPANS = 1000  # more than there are in what a clip can be of
_CLIPS = 16  # the last, in which a turn that is decoded again may find something more


class Silences:
    """Spans of one source in its own time (seconds); from any thread.

    `known_s` is up to when a recording has been cut; of a live source everything before now has
    been but what is being spoken.
    """

    def __init__(self, known_s: float = math.inf):
        self._hidden: deque[Span] = deque(maxlen=_SPANS)
        self._open: dict[str, Span] = {}
        self._known_s = known_s
        self._clips: deque[tuple[Span, Callable[[list[Span]], None]]] = deque(maxlen=_CLIPS)
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._is_closed = False

    def begin(self, name: str, start: float, end: float = math.inf) -> None:
        """Speech that has no text yet; without an end it is being spoken."""
        with self._changed:
            self._open[name] = start, end
            if self._known_s < math.inf:
                self._known_s = max(self._known_s, end)

    def end(self, name: str) -> None:
        """It has its text, and what was redacted there is hidden."""
        with self._changed:
            self._open.pop(name, None)
            self._changed.notify_all()

    def finish(self) -> None:
        """The recording is over."""
        with self._changed:
            self._known_s = math.inf
            self._changed.notify_all()

    def close(self) -> None:
        """No more text will come: nobody waits for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def hide(self, start: float, end: float) -> None:
        """Something was redacted; clips that hold it lose it as well."""
        span = (start - _AROUND_S, end + _AROUND_S)
        with self._changed:
            if any(first <= span[0] and span[1] <= last for first, last in self._hidden):
                return
            self._hidden.append(span)
            again = [put for (first, last), put in self._clips if _meet(span, (first, last))]
        for put in again:
            with self._writing:
                put([span])

    def wait(self, start: float, end: float, patience_s: float) -> None:
        """Until all that was spoken from `start` to `end` has its text, or for so long."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or not self._unknown(start, end), patience_s
            )

    def spans(self, start: float, end: float) -> list[Span]:
        """What is silent from `start` to `end`."""
        with self._changed:
            hidden = [span for span in self._hidden if _meet(span, (start, end))]
            return [*hidden, *self._unknown(start, end)]

    def note_clip(
        self, start: float, end: float, done: list[Span], put: Callable[[list[Span]], None]
    ) -> None:
        """A clip was written, in which these spans are silent; `put` silences more, now if there is
        more already.
        """
        with self._changed:
            self._clips.append(((start, end), put))
            late = [span for span in self._hidden if _meet(span, (start, end)) and span not in done]
        if late:
            with self._writing:
                put(late)

    def _unknown(self, start: float, end: float) -> list[Span]:
        behind = [(self._known_s, math.inf)] if self._known_s < end else []
        return [span for span in (*self._open.values(), *behind) if _meet(span, (start, end))]


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
