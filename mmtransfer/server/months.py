"""The tables of an index: one for each month of UTC, named after it."""

from __future__ import annotations

import calendar
import functools
import time

from mmtransfer.server.rows import SLOTS

_DAY = 86400 * 100 << SLOTS


def month_of(key: int) -> str:
    """The table that has the words of a key."""
    return _month_of_day(key // _DAY)


@functools.cache
def _month_of_day(day: int) -> str:
    return time.strftime("words_%Y%m", time.gmtime(day * 86400))


def month_begin(month: str) -> float:
    """When a table's month begins: seconds since 1970."""
    return calendar.timegm((int(month[6:10]), int(month[10:]), 1, 0, 0, 0))


def month_end(month: str) -> float:
    """When the next one begins."""
    year, number = divmod(int(month[6:10]) * 12 + int(month[10:]), 12)
    return calendar.timegm((year, number + 1, 1, 0, 0, 0))
