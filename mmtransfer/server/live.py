"""What the cameras' monitor hands out, to everybody who follows it at the moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mmtransfer.monitoring.events import Item

_WAITING = 256  # items of one follower; who is slower than that misses the oldest


class Follower:
    """Takes items as they come; what it has no room for is counted in `missed`."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: asyncio.Queue[Item | None] = asyncio.Queue(_WAITING)
        self.missed = 0

    async def next(self) -> Item | None:
        """The next item; None at the end."""
        return await self._items.get()

    def put(self, item: Item | None) -> None:
        """Hand an item or the end on, from any thread."""
        self._loop.call_soon_threadsafe(self._put, item)

    def _put(self, item: Item | None) -> None:
        if self._items.full():
            self._items.get_nowait()
            self.missed += 1
        self._items.put_nowait(item)


class Takes(Protocol):
    """Somebody who gets every item, and None at the end."""

    def put(self, item: Item | None) -> None:
        """Take an item, in the cameras' thread; returns at once."""
        ...


class Live:
    """Hands every item to all followers.

    Example:
        with live.follow() as follower:
            item = await follower.next()
    """

    def __init__(self) -> None:
        self._followers: list[Takes] = []
        self._lock = threading.Lock()

    def add(self, follower: Takes) -> None:
        """Hand everything to somebody from now on."""
        with self._lock:
            self._followers.append(follower)

    @contextmanager
    def follow(self) -> Iterator[Follower]:
        """Follow from now on; inside a running event loop."""
        follower = Follower(asyncio.get_running_loop())
        self.add(follower)
        try:
            yield follower
        finally:
            with self._lock:
                self._followers.remove(follower)

    def end(self) -> None:
        """Let all who follow go, since a server that stops waits for them."""
        self._hand_out(None)

    def put(self, item: Item) -> None:
        """Hand an item to all who follow, from any thread."""
        self._hand_out(item)

    def _hand_out(self, item: Item | None) -> None:
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower.put(item)
