"""Memory that does not grow for months: what batches of changing shapes leave in glibc's heaps.

Elsewhere than on glibc these functions do nothing.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_LARGE_BLOCK_BYTES = 32 << 20
_KEPT_BYTES = 128 << 20  # given back and taken again, pages cost half of the system time
_PAUSE_S = 10.0

_given_back_at = 0.0


def _libc() -> Any:
    return ctypes.CDLL(None)


def share_heap() -> None:
    """One heap for all threads: a heap of each would keep what every shape of batch left in it."""
    with suppress(AttributeError, OSError, TypeError):
        _libc().mallopt(_M_ARENA_MAX, 1)


def keep_steady() -> None:
    """Blocks of their own for what is large, besides one heap: it costs a fifth of the time that a
    recording takes.
    """
    share_heap()
    with suppress(AttributeError, OSError, TypeError):
        libc = _libc()
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Return what is free between the blocks in use, which glibc does not do by itself; now and
    then, since every page that is returned has to be cleared when it is taken again.
    """
    global _given_back_at
    if time.monotonic() - _given_back_at < _PAUSE_S:
        return
    _given_back_at = time.monotonic()
    with suppress(AttributeError, OSError, TypeError):
        _libc().malloc_trim(0)
