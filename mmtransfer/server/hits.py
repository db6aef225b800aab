"""What a search finds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mmtransfer.errors import UserError
from mmtransfer.server.rows import KINDS, LATEST_S, SLOTS, Row, first_key

Name = Literal["camera", "alert", "sentiment", "sound"]
NAMES: tuple[Name, ...] = get_args(Name)
"""What lines are filtered by."""
MOST_HITS = 500
"""Of a page."""
NEAR = int(10.0 * 100) << SLOTS
"""Keys between a sound and what was spoken around it."""


@dataclass(frozen=True)
class Hit:
    """A line of text or a sound that a search has found."""

    key: int
    """Its name in the index; those of later lines are larger."""
    kind: str
    """line, sound, or alert: one whose line was rejected or revised away."""
    camera: str
    id: str
    """As in the journal."""
    at: float
    """Seconds since 1970; of a recording, counted from the day on which it was transcribed."""
    start: float
    """As in the journal: of a recording, seconds into it."""
    end: float
    text: str
    """Of a sound, its class."""
    sentiment: str | None
    sentiment_prob: float | None
    alerts: tuple[str, ...]
    """Keywords that raised an alert."""
    clip: str | None
    """File that holds the moment, if clips are kept; not to be shown."""
    source: str
    """The source's address or file; not to be shown."""


@dataclass(frozen=True)
class Page:
    """Hits, newest first."""

    hits: list[Hit]
    cursor: str | None
    """Where the next page begins; None at the end. With one, there may be fewer hits than were
    asked for, even none: the page was handed out in time."""


def hit_of(row: Row) -> Hit:
    """A row as it is handed out."""
    return Hit(
        key=row.key,
        kind=KINDS[row.kind],
        camera=row.camera,
        id=row.id,
        at=(row.key >> SLOTS) / 100,
        start=row.start,
        end=row.end,
        text=row.text,
        sentiment=row.name if KINDS[row.kind] != "sound" else None,
        sentiment_prob=row.prob,
        alerts=tuple(name for name in row.alerts if name),
        clip=row.clip,
        source=row.source or "",
    )


@dataclass(frozen=True)
class Filters:
    """What lines must be besides having words; see `JournalIndex.search`."""

    camera: str | Sequence[str] | None
    alert: str | bool
    sentiment: str | None
    sound: str | None

    def names(self, *, with_sound: bool) -> list[list[tuple[Name, str]]]:
        """Lists of names, of each of which a line has one; `with_sound` if it is a sound itself."""
        cameras = [self.camera] if isinstance(self.camera, str) else self.camera
        found: list[list[tuple[Name, str]]] = []
        if cameras is not None:
            found.append([("camera", name) for name in cameras])
        if self.alert is not False:
            found.append([("alert", "" if self.alert is True else self.alert)])
        if self.sentiment is not None:
            found.append([("sentiment", self.sentiment)])
        if self.sound is not None and with_sound:
            found.append([("sound", self.sound)])
        return found


def keys_between(after: float | None, before: float | None, cursor: str | None) -> tuple[int, int]:
    """The first key of a page's time, and the one behind it.

    Raises:
        UserError: a cursor that no page gave.
    """
    low = 0 if after is None else first_key(after)
    high = first_key(LATEST_S if before is None else before)
    if cursor is not None:
        if not re.fullmatch(r"[0-9]{1,19}", cursor):
            raise UserError(f"cursor: expected that of a page, found {cursor!r:.40}.")
        high = min(high, int(cursor))
    return low, high
