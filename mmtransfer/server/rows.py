"""What an index holds of a line, and how what comes later in a journal changes it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import NamedTuple
from zlib import crc32

LINE, ALERT, SOUND, RECORDING = range(4)
KINDS = ("line", "alert", "sound")
SLOTS = 12
"""Bits of a key that tell lines of the same hundredth of a second apart."""
LATEST_S = 1e10


class Row(NamedTuple):
    """A line of text, a sound, or an alert whose line is not there; also, on its way, an alert."""

    key: int
    kind: int
    camera: str
    id: str
    start: float
    end: float
    text: str
    name: str | None
    """Class of a line or a sound."""
    alerts: tuple[str, ...]
    """Empty, or an empty text and the keywords."""
    prob: float | None
    clip: str | None
    source: str | None


class Batch:
    """Changes to an index that are not in it yet.

    Args:
        there: What is in the index under some keys.
        taken: Keys of other rows that are on their way.
    """

    def __init__(
        self, there: Callable[[list[int]], dict[int, Row]], taken: Container[int] = frozenset()
    ):
        self._there, self._taken = there, taken
        self._known: set[int] = set()
        self._rows: dict[int, Row | None] = {}
        self._before: dict[int, Row] = {}

    def take(self, rows: Iterable[Row]) -> None:
        """Take in what stands in a journal in this order."""
        rows = list(rows)
        self._fetch([row.key for row in rows])
        for row in rows:
            self._take(row)

    def changes(self) -> tuple[list[Row], list[Row]]:
        """Rows that leave the index, and then those that come, by their keys."""
        changed = sorted(key for key, row in self._rows.items() if row != self._before.get(key))
        gone = [self._before[key] for key in changed if key in self._before]
        return gone, [row for key in changed if (row := self._rows[key]) is not None]

    def _fetch(self, keys: list[int]) -> None:
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        self._known.update(new)
        found = self._there(new)
        self._rows.update(found)
        self._before.update(found)

    def _take(self, row: Row) -> None:
        row, old = self._placed(row)
        if row.kind == ALERT:
            old = old or row._replace(alerts=())
            new = tuple(name for name in row.alerts if name not in old.alerts)
            row = old._replace(alerts=old.alerts + new, clip=row.clip or old.clip)
        elif row.kind == LINE and old is not None:  # it is revised; that there was an alert stays
            row = row._replace(alerts=old.alerts, clip=old.clip)
            if not row.text and old.alerts:
                row = old._replace(kind=ALERT)
        self._rows[row.key] = row if row.text or row.kind == ALERT else None

    def _placed(self, row: Row) -> tuple[Row, Row | None]:
        """The row with the key that it has in the index, or gets: that of its time, or the next
        that is free; and what is there of it.
        """
        key = row.key
        while True:
            if key not in self._known:
                self._fetch([key])
            old = self._rows.get(key)
            if old is None and key not in self._taken:
                return row._replace(key=key), None
            if old is not None and (old.camera, old.id) == (row.camera, row.id):
                return row._replace(key=key), old
            key += 1


def first_key(at: float) -> int:
    """The first key of a time (seconds since 1970): keys are its hundredths of a second, with room
    for several lines. So they are in the order of time, also where the journal is not.
    """
    # 0.29 * 100 is a little less than 29.
    return int(min(max(at, 0.0), LATEST_S) * 100 + 1e-4) << SLOTS


def key_of(camera: str, identity: str, at: float) -> int:
    """The key of a line, unless another one has it."""
    digest = crc32(f"{camera} {identity}".encode("utf-8", "replace"))
    return first_key(at) | digest & ((1 << SLOTS) - 1)
