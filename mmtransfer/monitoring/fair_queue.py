"""Segments of all sources on their way through one recogniser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtransfer.monitoring.lines import Line
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.segments import Segment

BATCH_SEGMENTS = 8


@dataclass(eq=False)  # jobs are distinguished by identity
class Job:
    """A segment on its way through the recogniser."""

    camera: int
    """Number of its source."""
    number: int
    """Place in the source's output."""
    id: str
    segment: Segment
    kind: tuple[int, float]
    """Recogniser and context in seconds; jobs of one kind are decoded together."""
    most: int = BATCH_SEGMENTS
    """Jobs of its kind that make a batch."""
    is_repeat: bool = False
    is_delayed: bool = False
    """Whether it is decoded again a moment later, since its text repeats itself."""
    readings: tuple[Hypothesis, ...] = ()
    """What earlier decodings of it, or of the window that it is a half of, gave."""
    is_spooled: bool = False
    """Whether its samples lie on disk alone."""
    is_draft: bool = False
    """Whether more may be spoken in it."""
    is_whole: bool = False
    """Of a draft: whether it is the segment, unless more is spoken."""
    is_turn: bool = False
    """Whether it is a turn, all of whose segments have been jobs of their own."""
    after: int = 0
    """Of a turn: the place in the source's output behind the last of its segments."""
    window: Segment | None = None
    """The segment and its turn before it, if it is decoded with that."""
    known: Sequence[Sequence[Line]] = ()
    """Of a turn, or of a window: the lines that its segments have."""
    decoded: Hypothesis | None = None
    """Of a turn: what its last segment was decoded as, if that was with all of it."""
    final: Job | None = None
    """What a draft that is being decoded turned out to be."""
    half_of: Job | None = None
    """The job whose window was cut in two because a guard objected to the text of the whole."""
    halves: dict[float, Any] = field(default_factory=dict)
    """Of such a job: what became of its halves, by where they start."""
    kept: Any = None
    """Of such a job: the result of the whole, if it stays unless its halves have more words."""

    @property
    def samples(self) -> np.ndarray:
        """What is decoded."""
        return (self.window or self.segment).samples

    @property
    def starts(self) -> tuple[float, ...]:
        """Where the segments start that are decoded together."""
        window = self.segment if self.is_turn else self.window
        pieces = window.pieces if window is not None else (self.segment,)
        return tuple(piece.start for piece in pieces)

    def is_same(self, other: Job) -> bool:
        """Whether another is of the same audio."""
        own, others = self.segment, other.segment
        is_named_so = (self.camera, self.id, own.end) == (other.camera, other.id, others.end)
        return is_named_so and len(own.samples) == len(others.samples)


class FairQueue:
    """Segments that wait, of all sources; a busy source does not delay the others beyond its share.

    Each source has a clock that advances by the audio decoded for it, and the source that is
    furthest behind comes first (start-time fair queueing, Goyal et al. 1996). A batch is filled up
    with segments of the same kind, of whatever source.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Job]] = {}
        self._clock: dict[int, float] = {}
        self._now = 0.0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._waiting.values())

    def add(self, job: Job) -> None:
        """Put a segment behind those of its source; one to be decoded again before them."""
        if job.camera not in self._waiting:
            # Time in which a source had nothing to say is no credit.
            self._clock[job.camera] = max(self._clock.get(job.camera, 0.0), self._now)
        jobs = self._waiting.setdefault(job.camera, [])
        jobs.insert(0 if job.is_repeat else len(jobs), job)

    def take(self, workers: int = 1) -> list[Job]:
        """The next batch: the first segment of the source furthest behind, and others of its
        kind; no more than its share, so that none of so many workers is left without at the end.
        """
        order = sorted(self._waiting, key=lambda camera: (self._clock[camera], camera))
        self._now = self._clock[order[0]]
        first = self._waiting[order[0]][0]
        most = min(first.most, -(-len(self) // workers))
        batch: list[Job] = []
        for camera in order:
            for job in [job for job in self._waiting[camera] if job.kind == first.kind]:
                if len(batch) == most:
                    break
                self._remove(job)
                self._clock[camera] += first.kind[1]
                batch.append(job)
        return batch

    def drop(self, priorities: Mapping[int, int]) -> Job | None:
        """Take out the oldest segment of the least important of these sources; None if nothing of
        them waits.
        """
        candidates = [jobs[0] for camera, jobs in self._waiting.items() if camera in priorities]
        if not candidates:
            return None
        oldest = min(candidates, key=lambda job: (priorities[job.camera], job.segment.start))
        self._remove(oldest)
        return oldest

    def drop_before(self, camera: int, limit: float) -> Job | None:
        """Take out a segment of a source that ended before that time; None if none waits."""
        old = (job for job in self._waiting.get(camera, ()) if job.segment.end < limit)
        job = next(old, None)
        if job is not None:
            self._remove(job)
        return job

    def _remove(self, job: Job) -> None:
        jobs = self._waiting[job.camera]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.camera]
