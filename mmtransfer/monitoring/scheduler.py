"""What is decoded next: segments that are over, what is still being spoken, turns as a whole."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS, FairQueue, Job

_DRAFTS = 4  # in a batch; a full one would keep what is final waiting
_TURNS_AT_ONCE = 1  # in a batch the first would wait for the others
_WAITING_TURNS = 32  # beyond that the machine is too slow to decode everything twice
T = TypeVar("T")


@dataclass(eq=False)  # batches differ by identity
class Batch:
    """Jobs of one kind that are decoded together."""

    jobs: list[Job]

    @property
    def is_turn(self) -> bool:
        """Whether it is a turn, which has a thread of its own."""
        return self.jobs[0].is_turn

    @property
    def is_draft(self) -> bool:
        """Whether nobody knows yet if its jobs are over."""
        return self.jobs[0].is_draft


class Scheduler:
    """Decides which batch is decoded next; it knows of no threads, only of how many batches may run
    at the same time.

    Segments come first, in fair order of their sources. What is not over yet is decoded only while
    nothing else waits, by one worker at most, so that what is over finds another one. Turns, which
    take seconds, run beside them, and pause while so much waits that texts would come late.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._waiting = FairQueue()
        self._drafts: dict[int, Job] = {}  # by source; only the last is of interest
        self._turns: deque[Job] = deque()
        self._running: list[Batch] = []

    def add(self, job: Job) -> None:
        """A segment that is over, or that is decoded again."""
        self._waiting.add(job)

    def add_draft(self, job: Job) -> None:
        """A segment that may go on."""
        self._drafts[job.camera] = job

    def drop_draft(self, camera: int) -> None:
        """The segment is over: its draft is out of date."""
        self._drafts.pop(camera, None)

    def add_turn(self, job: Job) -> Job | None:
        """A turn that is over; returns the oldest one if there is no time for so many."""
        self._turns.append(job)
        return self._turns.popleft() if len(self._turns) > _WAITING_TURNS else None

    def add_turn_again(self, job: Job) -> None:
        """A turn that is decoded once more, before the others."""
        self._turns.appendleft(job)

    def drop(self, priorities: Mapping[int, int]) -> Job | None:
        """Take out the oldest segment of the least important of these sources, if one waits."""
        return self._waiting.drop(priorities)

    def drop_before(self, camera: int, limit: float) -> Job | None:
        """Take out a segment of a source that ended before that time, if one waits."""
        return self._waiting.drop_before(camera, limit)

    @property
    def has_time(self) -> bool:
        """Whether a segment would be decoded soon, though it took longer."""
        return len(self._waiting) < self._workers

    def running_draft(self, job: Job) -> Job | None:
        """The draft that is being decoded and has the same audio as this segment."""
        drafts = (draft for batch in self._running if batch.is_draft for draft in batch.jobs)
        return next((draft for draft in drafts if draft.is_same(job)), None)

    def next(
        self, is_ready: Callable[[Job], bool], has_time: Callable[[Job], bool]
    ) -> Batch | None:
        """The next batch, which runs from now on; None if all that may run does. A turn runs once
        it `is_ready`, a draft that is not whole while its recogniser `has_time`.
        """
        batch = self._next_segments() or self._next_turn(is_ready) or self._next_drafts(has_time)
        if batch is not None:
            self._running.append(batch)
        return batch

    def done(self, batch: Batch) -> None:
        """A batch has been decoded."""
        self._running.remove(batch)

    @property
    def _has_worker(self) -> bool:
        return sum(not batch.is_turn for batch in self._running) < self._workers

    def _next_segments(self) -> Batch | None:
        if not self._waiting or not self._has_worker:
            return None
        return Batch(self._waiting.take(self._workers))

    def _next_turn(self, is_ready: Callable[[Job], bool]) -> Batch | None:
        if sum(batch.is_turn for batch in self._running) >= _TURNS_AT_ONCE:
            return None
        if len(self._waiting) > BATCH_SEGMENTS:
            return None
        job = next(filter(is_ready, self._turns), None)
        if job is None:
            return None
        self._turns.remove(job)
        return Batch([job])

    def _next_drafts(self, has_time: Callable[[Job], bool]) -> Batch | None:
        if not self._drafts or self._waiting or not self._has_worker:
            return None
        if any(batch.is_draft for batch in self._running):
            return None
        jobs = sorted(self._drafts.values(), key=lambda job: (not job.is_whole, job.segment.end))
        if not jobs[0].is_whole and not has_time(jobs[0]):
            return None
        jobs = [job for job in jobs if job.kind == jobs[0].kind][: min(_DRAFTS, jobs[0].most)]
        for job in jobs:
            del self._drafts[job.camera]
        return Batch(jobs)


@dataclass
class Decoded(Generic[T]):
    """A batch that has been decoded."""

    batch: Batch
    _future: Future[list[T]] = field(repr=False)

    @property
    def results(self) -> list[T]:
        """Of each job.

        Raises:
            Exception: whatever decoding raised.
        """
        return self._future.result()


class Workers(Generic[T]):
    """Threads that decode; what they made of a batch comes as `Decoded` into `events`."""

    def __init__(
        self, count: int, decode: Callable[[list[Job]], list[T]], events: queue.Queue[Any]
    ):
        self._decode, self._events = decode, events
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="recognizer")
        self._turn_pool = ThreadPoolExecutor(_TURNS_AT_ONCE, thread_name_prefix="turns")

    def start(self, batch: Batch) -> None:
        """Decode a batch."""
        pool = self._turn_pool if batch.is_turn else self._pool
        future = pool.submit(self._decode, batch.jobs)
        future.add_done_callback(lambda done: self._events.put(Decoded(batch, done)))

    def close(self) -> None:
        """Wait for what is being decoded."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._turn_pool.shutdown(wait=True, cancel_futures=True)
