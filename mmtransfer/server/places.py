"""Back-pressure: so many requests at once, and not one more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from mmtransfer.server.problems import Problem

_FRESH = 0.2  # weight of the last request in the time that one takes
_LONGEST_RETRY_S = 60


class Places:
    """Places of requests: `most` in all, `at_work` of which are worked on at the same time, in the
    order in which they came. Who finds none is refused at once.
    """

    def __init__(self, most: int, at_work: int):
        self.most = most
        self.taken = 0
        """Requests that have a place."""
        self.refused = 0
        """Requests that found none."""
        self._at_work = asyncio.Semaphore(at_work)
        self._share = min(most, at_work)
        self._mean_s = 1.0

    @contextmanager
    def take(self) -> Iterator[None]:
        """A place, until its end.

        Raises:
            Problem: there is none (503), and when to come again.
        """
        if self.taken >= self.most:
            self.refused += 1
            raise Problem(
                503,
                f"all {self.most} places are taken; come again later.",
                code="overloaded",
                headers={"Retry-After": str(self.retry_s)},
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    @asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """The right to be worked on, as soon as it is this request's turn."""
        async with self._at_work:
            started = time.monotonic()
            try:
                yield
            finally:
                self._mean_s += _FRESH * (time.monotonic() - started - self._mean_s)

    @property
    def retry_s(self) -> int:
        """Seconds after which a place is likely to be free."""
        return min(_LONGEST_RETRY_S, max(1, math.ceil(self._mean_s * self.most / self._share / 2)))
