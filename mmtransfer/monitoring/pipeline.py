"""The speech of recordings and cameras as text, segment by segment, while it is being read."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtransfer.decoding import DecodingOptions, Hypothesis
from mmtransfer.guards import rejection
from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS, FairQueue, Job
from mmtransfer.monitoring.journal import Journal, camera_names
from mmtransfer.monitoring.live import LiveSettings, SourceEvent, SteadyClock, is_live
from mmtransfer.monitoring.readers import Reader, read_camera, read_recording
from mmtransfer.monitoring.spool import Spool
from mmtransfer.monitoring.transcripts import (
    Alert,
    MonitorStats,
    NoText,
    SourceEnd,
    Stopped,
    Transcript,
    alerts,
    segment_id,
    transcript,
)
from mmtransfer.monitoring.watch import WatchList
from mmtransfer.recognition import Recognizer
from mmtransfer.recognizers import open_recognizer
from mmtransfer.segments import Segment, SegmenterSettings

logger = logging.getLogger(__name__)
Item = Transcript | Alert | SourceEvent | SourceEnd
_WAITING_SEGMENTS = 48  # bounds memory when recognition is slower than reading
_SPOOL_BYTES = 2 << 30  # audio that may wait on disk
_READER_EXIT_S = 10.0  # a read of a failing disk may hang; do not wait for it for ever
_DRAIN_S = 4.0  # after a request to stop; what is not decoded by then stays in the spool


class Monitor:
    """Transcribes recordings and live sources with one recogniser.

    A thread for each source reads, finds speech and cuts segments, while the recogniser's workers
    decode what has been cut, in batches of one context. A recording waits while too many segments
    are in work. A camera cannot wait: its segments do, on disk if there is a journal, and when that
    room is full the oldest of the least important camera is dropped, and the journal says so.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        settings: SegmenterSettings | None = None,
        *,
        live: LiveSettings | None = None,
        spool_bytes: int = _SPOOL_BYTES,
    ):
        self._recognizer = recognizer
        self._settings = settings or SegmenterSettings()
        self._live = live or LiveSettings()
        self._spool_bytes = spool_bytes
        self._stopping = threading.Event()
        self.stats = MonitorStats()

    def stop(self) -> None:
        """End `watch` soon, from any thread: what has been cut is decoded within a few seconds, or
        stays in the journal's spool for the next start.
        """
        self._stopping.set()

    def transcribe(self, source: str | Path) -> Iterator[Transcript]:
        """Transcripts of a recording, in order, each as soon as it is recognised.

        Raises:
            MediaError: unusable from the start, or cut (after the transcripts of all there is).
        """
        for item in self.watch([source]):
            if isinstance(item, Transcript):
                yield item
            elif isinstance(item, SourceEnd) and item.error is not None:
                raise item.error

    def watch(
        self,
        sources: Sequence[str | Path] | Mapping[str, str],
        *,
        journal: Journal | None = None,
        priorities: Mapping[str, int] | None = None,
        watched: Mapping[str, Sequence[str]] | None = None,
    ) -> Iterator[Item]:
        """Transcripts of several sources side by side, each source's in order, and what happens to
        the sources.

        `sources` may be a mapping of names to sources. With a journal, everything is written there
        before it is handed out, and what the journal holds already is neither decoded nor handed
        out again. `priorities` are by name, 0 where none is given; of lower ones segments are
        dropped first. `watched` are words and phrases by name: a segment that holds one is followed
        by an alert.
        """
        named = (
            dict(sources) if isinstance(sources, Mapping) else camera_names([*map(str, sources)])
        )
        self._stopping = threading.Event()
        phrases = {name: WatchList((watched or {}).get(name, ())) for name in named}
        run = _Run(self._recognizer, self.stats, named, journal, priorities or {}, phrases)
        run.spool_bytes = self._spool_bytes
        clock, readers = SteadyClock(), []
        started = time.monotonic()
        try:
            run.restore()
            for number, (name, source) in enumerate(named.items()):
                if name in run.ended:
                    run.events.put((number, SourceEnd(source, name, None)))
                    continue
                reader = Reader(
                    number,
                    name,
                    source,
                    run.events,
                    run.outputs[number].room,
                    self._stopping,
                    self.stats,
                    self._settings,
                    self._live,
                    clock,
                )
                readers.append(reader.start(read_camera if is_live(source) else read_recording))
            yield from run.items(self._stopping)
        finally:
            self._stopping.set()
            run.close()
            # A thread inside native code when the interpreter exits would abort the process.
            deadline = time.monotonic() + _READER_EXIT_S
            for thread in readers:
                thread.join(max(0.0, deadline - time.monotonic()))
            self.stats.wall_s += time.monotonic() - started


@dataclass
class _Output:
    """What a source's segments became, put back into order."""

    name: str
    source: str
    is_live: bool
    room: threading.Semaphore
    heard: set[str] = field(default_factory=set)
    """Segments that an earlier session of the monitor has dealt with."""
    count: int = 0
    emitted: int = 0
    in_memory: int = 0
    """Segments of a live source whose samples are held."""
    done: dict[int, Transcript | NoText | None] = field(default_factory=dict)
    """By place; None for one that the journal has already."""
    end: SourceEnd | None = None


class _Run:
    """The state of one `watch`; everything here happens in the caller's thread."""

    def __init__(
        self,
        recognizer: Recognizer,
        stats: MonitorStats,
        named: Mapping[str, str],
        journal: Journal | None,
        priorities: Mapping[str, int],
        watched: Mapping[str, WatchList],
    ):
        self._recognizer, self._stats, self._journal = recognizer, stats, journal
        self._watched = watched
        # Everything that happens, in one queue: segments, events, ends, and decoded batches.
        self.events: queue.Queue[Any] = queue.Queue()
        room = max(BATCH_SEGMENTS, _WAITING_SEGMENTS // max(1, len(named)))
        self.outputs = [
            _Output(name, source, is_live(source), threading.Semaphore(room))
            for name, source in named.items()
        ]
        self._room = room
        self._droppable = {
            number: priorities.get(output.name, 0)
            for number, output in enumerate(self.outputs)
            if output.is_live
        }
        self.spool_bytes = _SPOOL_BYTES
        self._spool: Spool | None = None
        self.ended: set[str] = set()
        self._workers = recognizer.engine.workers
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="recognizer")
        self._waiting = FairQueue()
        self._running: dict[Future[list[Hypothesis]], list[Job]] = {}
        self._open = len(self.outputs)
        self._told: deque[Item] = deque()

    def restore(self) -> None:
        """Take up what an earlier session left in journal and spool."""
        if self._journal is None:
            return
        left = []
        if any(output.is_live for output in self.outputs):
            self._spool = self._journal.spool()
            left = list(self._spool.waiting())
        recordings = {output.name for output in self.outputs if not output.is_live}
        heard = self._journal.heard(recordings, {identity for _, identity, _ in left})
        self.ended = heard.ended & recordings
        for output in self.outputs:
            output.heard = heard.ids.get(output.name, set())
        numbers = {output.name: number for number, output in enumerate(self.outputs)}
        for name, identity, segment in left:
            if identity not in self.outputs[numbers[name]].heard:
                self._add(numbers[name], identity, segment, spooled=True)
            elif self._spool is not None:
                self._spool.remove(identity)

    def items(self, stopping: threading.Event) -> Iterator[Item]:
        """What happens, until every source has ended."""
        deadline: float | None = None
        while self._open:
            self._dispatch()
            yield from self._in_order()
            if not self._open:
                return
            if stopping.is_set() and deadline is None:
                deadline = time.monotonic() + _DRAIN_S
            if deadline is not None and time.monotonic() > deadline:
                return
            try:
                event = self.events.get(timeout=0.25)
            except queue.Empty:
                continue
            while True:  # all that has happened, so that batches are as full as they can be
                self._take_in(event)
                try:
                    event = self.events.get_nowait()
                except queue.Empty:
                    break

    def close(self) -> None:
        """Wait for the batches that are being decoded."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take_in(self, event: Any) -> None:
        if isinstance(event, Future):
            for job, hypothesis in zip(self._running.pop(event), event.result(), strict=True):
                self._settle(job, hypothesis)
            return
        number, item = event
        output = self.outputs[number]
        if isinstance(item, SourceEnd):
            output.end = item
        elif isinstance(item, SourceEvent):
            self._stats.events[item.event] += 1
            if self._journal is not None:
                self._journal.write(asdict(item))
            self._told.append(item)
        else:
            identity = segment_id(output.name, item.start)
            if identity in output.heard:
                output.done[output.count] = None
                output.count += 1
                return
            if self._spool is not None and output.is_live:
                self._spool.add(output.name, identity, item)
            self._add(number, identity, item)

    def _add(self, number: int, identity: str, segment: Segment, *, spooled: bool = False) -> None:
        output, context = self.outputs[number], self._recognizer.context_s(segment.samples)
        job = Job(number, output.count, identity, segment, context)
        output.count += 1
        if output.is_live:
            job.is_spooled = spooled or (self._spool is not None and output.in_memory >= self._room)
            if job.is_spooled:
                job.segment = replace(segment, samples=segment.samples[:0])
            else:
                output.in_memory += 1
        self._waiting.add(job)
        self._make_room()

    def _make_room(self) -> None:
        """Drop the oldest segments of the least important cameras when there is no room to wait."""

        def is_full() -> bool:
            if self._spool is not None:
                return self._spool.bytes > self.spool_bytes
            held = sum(output.in_memory for output in self.outputs)
            return held > max(_WAITING_SEGMENTS, self._room * len(self.outputs))

        while is_full():
            job = self._waiting.drop(self._droppable)
            if job is None:
                return
            segment, output = job.segment, self.outputs[job.camera]
            self._stats.dropped += 1
            logger.warning("%s: no room to wait; dropped a segment", output.name)
            if self._journal is not None:  # now, since only then its audio may go
                times = (segment.start, segment.end)
                dropped = NoText(output.name, job.id, *times, "no room", "dropped")
                self._journal.write(asdict(dropped))
            if self._spool is not None:
                self._spool.remove(job.id)
            self._finish(job, None)

    def _dispatch(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            batch = self._waiting.take()
            for job in batch:
                if job.is_spooled and self._spool is not None:
                    job.segment = self._spool.load(job.id)
            clips = [job.segment.samples for job in batch]
            future = self._pool.submit(self._recognizer.decode, clips, batch[0].context_s)
            self._running[future] = batch
            future.add_done_callback(self.events.put)

    def _settle(self, job: Job, hypothesis: Hypothesis) -> None:
        """Keep the text, drop it, or decode the segment again in a longer context."""
        segment, output = job.segment, self.outputs[job.camera]
        reason = rejection(hypothesis, segment.end - segment.start)
        longer = self._recognizer.longer_context_s(hypothesis.context_s)
        if reason is not None and longer is not None:
            self._stats.repeated += not job.is_repeat
            self._waiting.add(replace(job, context_s=longer, is_repeat=True))
            return
        found: Transcript | NoText = transcript(output.source, output.name, segment, hypothesis)
        if reason is not None:
            self._stats.rejected[reason] += 1
            logger.debug("%.1f s: rejected (%s): %s", segment.start, reason, hypothesis.text)
            found = NoText(found.camera, found.id, found.start, found.end, reason)
        self._finish(job, found)

    def _finish(self, job: Job, found: Transcript | NoText | None) -> None:
        output = self.outputs[job.camera]
        output.done[job.number] = found
        if output.is_live and not job.is_spooled:
            output.in_memory -= 1

    def _in_order(self) -> Iterator[Item]:
        """Write and hand out what is ready."""
        while self._told:
            yield self._told.popleft()
        for output in self.outputs:
            while output.emitted in output.done:
                found = output.done.pop(output.emitted)
                output.emitted += 1
                if not output.is_live:
                    output.room.release()
                if found is None:
                    continue
                raised: list[Alert] = []
                if isinstance(found, Transcript):
                    raised = alerts(found, self._watched[output.name])
                if self._journal is not None:
                    self._journal.write(*map(asdict, [found, *raised]))
                if self._spool is not None:
                    self._spool.remove(found.id)
                if isinstance(found, Transcript):
                    self._stats.segments += 1
                    yield found
                    yield from raised
            if output.end is not None and output.emitted == output.count:
                end, output.end = output.end, None
                self._open -= 1
                is_news = end.camera not in self.ended and not isinstance(end.error, Stopped)
                if self._journal is not None and is_news:
                    self._journal.write(end.line())
                yield end


def load_monitor(
    model: str,
    *,
    language: str | None = None,
    context_s: float | None = None,
    engine: str = "auto",
    compute_type: str = "int8",
    device: str = "auto",
    threads: int = 0,
    options: DecodingOptions | None = None,
    settings: SegmenterSettings | None = None,
) -> Monitor:
    """A monitor with a run folder's, checkpoint's, Hub or bundled model; see `open_recognizer`.

    Raises:
        UserError: a model that cannot be used.
    """
    recognizer = open_recognizer(
        model,
        language=language,
        engine=engine,
        compute_type=compute_type,
        device=device,
        threads=threads,
        context_s=context_s,
        options=options,
    )
    return Monitor(recognizer, settings)


def monitor(model: str, source: str | Path, **settings: Any) -> Iterator[Transcript]:
    """Transcripts of a recording, each as soon as it is recognised; settings as `load_monitor`."""
    yield from load_monitor(model, **settings).transcribe(source)
