"""One run of a monitor: what readers find goes through the recogniser and comes out in order."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmtransfer.monitoring.decoding import Decoder, Found, Rejected, Result, lines_of, of_halves
from mmtransfer.monitoring.events import (
    ClassifiedSound,
    FileDone,
    Item,
    LineKind,
    NoText,
    Occurrence,
    Partial,
    Recording,
    Sound,
    SourceEnd,
    SourceEvent,
    segment_id,
)
from mmtransfer.monitoring.fair_queue import Job
from mmtransfer.monitoring.ledger import Ledger
from mmtransfer.monitoring.memory import give_back
from mmtransfer.monitoring.moments import Moments
from mmtransfer.monitoring.ordering import Ordering, Output
from mmtransfer.monitoring.scheduler import Decoded, Scheduler, Workers
from mmtransfer.monitoring.sources.readers import Cut, Draft, Turn
from mmtransfer.monitoring.sources.source import WAITING_SEGMENTS, Source
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.guards import rejection
from mmtransfer.speech.segments import Segment

logger = logging.getLogger(__name__)
_DAY_S = 86400.0
_SPEAKING = ""  # of all that has no text, what is being spoken
_DRAIN_S = 4.0  # after a request to stop; what is not decoded by then stays in the spool


@dataclass
class _Speaking:
    """What is being spoken at a live source."""

    draft: tuple[Job, Result] | None = None
    """The last draft that was decoded."""
    shown: tuple[str, str] = ("", "")
    """The segment and the text that were handed out last."""
    cut_to: float = 0.0
    """End of the last whole segment."""
    in_memory: int = 0
    """Segments that wait, and whose samples are held."""
    decoded: tuple[tuple[float, ...], Hypothesis] | None = None
    """What the last segment was decoded as, together with segments that start there."""

    def decoding_of(self, turn: Job) -> Hypothesis | None:
        """What a turn was decoded as already, in the same context."""
        starts, found = self.decoded or ((), None)
        if found is None or found.context_s != turn.kind[1]:
            return None
        return found if starts == turn.starts else None


class Pipeline:
    """The state of one run; everything here happens in the caller's thread, but for decoding.

    What readers find comes as (number of the source, item) into `events`; a call that comes there
    is made. With `stays_open` it goes on when every source has ended, since others may come.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        decoder: Decoder,
        ledger: Ledger,
        ordering: Ordering,
        moments: Moments,
        events: queue.Queue[Any],
        *,
        workers: int,
        with_words: bool,
        stays_open: bool = False,
    ):
        self._sources, self._decoder, self._ledger = [*sources], decoder, ledger
        self._stays_open = stays_open
        self._ordering, self._moments, self._events = ordering, moments, events
        self._with_words = with_words
        self._speaking = [_Speaking() for _ in sources]
        self._priorities = {s.number: s.camera.priority for s in sources if s.is_live}
        self._is_endless = any(_is_endless(source) for source in sources)
        self._scheduler = Scheduler(workers)
        self._workers = Workers(workers, self._decode, events)

    def take_up(self) -> None:
        """Go on where an earlier session stopped, by journal and spool."""
        known, left = self._ledger.take_up({s.name for s in self._sources if not s.is_live})
        for source in self._sources:
            source.take_up(known)
        named = {source.name: source for source in self._sources}
        for name, identity, segment in left:
            if name not in named:  # it was taken out of the file of cameras meanwhile
                times = (segment.start, segment.end)
                why = "no such camera"
                logger.warning("%s: dropped a segment of a camera that is no more", name)
                if self._ledger.write(NoText(name, identity, *times, why, LineKind.DROPPED)):
                    self._ledger.forget(identity)
            elif identity in named[name].known:
                self._ledger.forget(identity)
            else:
                self._add(named[name], identity, segment, is_spooled=True)

    def admit(self, source: Source) -> None:
        """Take in one more source, before its reader starts; its number is the next."""
        self._sources.append(source)
        self._speaking.append(_Speaking())
        if source.is_live:
            self._priorities[source.number] = source.camera.priority
        self._is_endless = self._is_endless or _is_endless(source)
        self._decoder.admit(source)
        self._ordering.admit(source)
        if not source.is_live:
            source.take_up(self._ledger.known(source.name))

    def items(self, stopping: threading.Event) -> Iterator[Item]:
        """What happens, until every source has ended."""
        deadline: float | None = None
        while True:
            self._drop_old()
            self._dispatch()
            yield from self._ordering.items()
            if self._is_over and (stopping.is_set() or not self._stays_open):
                return
            if stopping.is_set() and deadline is None:
                deadline = time.monotonic() + _DRAIN_S
            if deadline is not None and time.monotonic() > deadline:
                if self._ledger.failure is not None:
                    raise self._ledger.failure
                return
            try:
                event = self._events.get(timeout=0.25)
            except queue.Empty:
                continue
            while True:  # all that has happened, so that batches are as full as they can be
                self._take_in(event)
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    break

    def close(self) -> None:
        """Wait for the batches that are being decoded."""
        self._workers.close()
        for source in self._sources:
            if source.silences is not None:
                source.silences.close()
        self._moments.close()

    @property
    def _is_over(self) -> bool:
        # That a clip could not be kept is reported before it counts as cut.
        is_quiet = self._ordering.is_over and not self._moments.is_busy
        return is_quiet and self._events.empty()

    def _output(self, source: Source) -> Output:
        return self._ordering.outputs[source.number]

    # --- what happens -------------------------------------------------------------------------

    def _take_in(self, event: Any) -> None:
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Decoded):
            self._take_results(event)
            return
        if callable(event):
            event()
            return
        number, item = event
        source, output = self._sources[number], self._ordering.outputs[number]
        if isinstance(item, SourceEnd):
            output.end = item
            if source.silences is not None:
                source.silences.finish()
            if not any(other.name == source.name for other in self._sources[number + 1 :]):
                source.stats.is_connected = False
        elif isinstance(item, SourceEvent):
            source.stats.events[item.event] += 1
            if item.event in (Occurrence.CONNECTED, Occurrence.LOST):
                source.stats.is_connected = item.event == Occurrence.CONNECTED
            self._ordering.add(item)
        elif isinstance(item, Sound | ClassifiedSound):
            if not source.is_known_sound(item):
                source.stats.alerts += 1
                if isinstance(item, ClassifiedSound):
                    source.stats.sounds[item.label] += 1
                self._ordering.add(replace(item, clip=self._moments.keep(source, item)))
        elif isinstance(item, Recording | FileDone):
            if isinstance(item, Recording):
                source.begin(item)
            output.put(output.place(), item)
        elif isinstance(item, Draft):
            self._add_draft(source, item)
        elif isinstance(item, Turn):
            self._add_turn(source, item.window)
        else:
            cut: Cut = item
            identity = segment_id(cut.of, cut.segment.start)
            if identity in source.known:
                if source.silences is not None:  # an earlier session knows what was spoken there
                    source.silences.begin(identity, cut.segment.start, cut.segment.end)
                    source.silences.hide(cut.segment.start, cut.segment.end)
                    source.silences.end(identity)
                output.put(output.place(), None)
                return
            if source.is_live:
                self._ledger.keep(source.name, identity, cut.segment)
            self._add(source, identity, cut.segment, cut.window)

    def _take_results(self, decoded: Decoded[Result]) -> None:
        self._scheduler.done(decoded.batch)
        for job, result in zip(decoded.batch.jobs, decoded.results, strict=True):
            if job.is_turn:
                longer = self._decoder.longer_turn(job, result)
                if longer is None:
                    self._ordering.outputs[job.camera].put_turn(job, result)
                else:
                    self._scheduler.add_turn_again(longer)
            elif job.is_draft and job.final is None:
                self._keep_draft(job, result)
            else:
                self._settle(job.final or job, result)

    # --- decoding -----------------------------------------------------------------------------

    def _dispatch(self) -> None:
        def is_ready(turn: Job) -> bool:
            return turn.after <= self._ordering.outputs[turn.camera].emitted

        def has_time(draft: Job) -> bool:
            return self._sources[draft.camera].recognizer.has_time

        while (batch := self._scheduler.next(is_ready, has_time)) is not None:
            for job in batch.jobs:
                window = job.segment if job.is_turn else job.window
                if window is not None:
                    job.known = self._ordering.outputs[job.camera].known_lines(window)
                if job.is_turn:
                    job.decoded = self._speaking[job.camera].decoding_of(job)
                elif job.is_spooled:
                    job.segment = self._ledger.load(job.id)
            self._workers.start(batch)

    def _decode(self, batch: list[Job]) -> list[Result]:
        """In a worker's thread."""
        started = time.perf_counter()
        results = self._decoder.recognize(batch)
        each = (time.perf_counter() - started) / len(batch)
        for job in batch:
            self._sources[job.camera].stats.decode_s += each
        if self._is_endless:
            give_back()
        return results

    # --- segments that are not over -----------------------------------------------------------

    def _add_draft(self, source: Source, draft: Draft) -> None:
        segment = draft.segment
        identity = segment_id(source.name, segment.start)
        if source.silences is not None:
            source.silences.begin(_SPEAKING, segment.start)
        job = self._job(source, -1, identity, segment, draft.window)
        self._scheduler.add_draft(replace(job, is_draft=True, is_whole=draft.is_whole))

    def _keep_draft(self, job: Job, result: Result) -> None:
        """Hand out the provisional text, unless its segment is over by now."""
        source, speaking = self._sources[job.camera], self._speaking[job.camera]
        segment = job.segment
        if segment.start < speaking.cut_to:
            return
        speaking.draft = (job, result)
        if rejection(result.hypothesis, segment.end - segment.start) is not None:
            return
        text = self._decoder.draft_text(job, result)
        source.stats.last_text = f"{text} …"
        if (job.id, text) != speaking.shown and self._ledger.failure is None:  # nothing piles up
            times = (round(segment.start, 3), round(segment.end, 3))
            self._ordering.add(Partial(source.name, job.id, *times, text))
        speaking.shown = (job.id, text)

    def _use_draft(self, job: Job) -> bool:
        """Whether the segment has been decoded, or is being, while it was not known to be over:
        then that is its text.
        """
        draft = self._speaking[job.camera].draft
        if draft is not None and draft[0].is_same(job):
            self._settle(job, draft[1])
            return True
        running = self._scheduler.running_draft(job)
        if running is not None:
            running.final = job
        return running is not None

    # --- turns that are over ------------------------------------------------------------------

    def _add_turn(self, source: Source, window: Segment) -> None:
        output, recognizer = self._output(source), source.recognizer
        context_s = recognizer.context_s(window.samples)
        identity = segment_id(source.name, window.start)
        job = Job(
            *(source.number, -1, identity, window, *self._decoder.kind(source.number, context_s)),
            is_turn=True,
            after=output.count,
        )
        output.open_turn()
        first_s = recognizer.context_s(window.samples, is_first=True)
        if len(window.pieces) == 1 and first_s == context_s:  # there is nothing more to know
            output.put_turn(job, Result(Hypothesis("", (), 0.0, 0.0, context_s), []))
            return
        late = self._scheduler.add_turn(job)
        if late is not None:
            self._sources[late.camera].stats.not_revised += 1
            self._ordering.outputs[late.camera].settle_turn(late)

    # --- segments -----------------------------------------------------------------------------

    def _job(
        self,
        source: Source,
        place: int,
        identity: str,
        segment: Segment,
        window: Segment | None = None,
    ) -> Job:
        """A segment is decoded with its turn before it, given as `window`, as the turn will be: so
        little of its text is revised. Without it, where text would come late, or nobody knows yet
        where the segment ends.
        """
        if window is None or not self._scheduler.has_time:
            context_s = source.recognizer.context_s(segment.samples, is_first=source.is_live)
            kind = self._decoder.kind(source.number, context_s)
            return Job(source.number, place, identity, segment, *kind)
        kind = self._decoder.kind(source.number, source.recognizer.context_s(window.samples))
        with_turn = window if len(window.pieces) > 1 else None
        return Job(source.number, place, identity, segment, *kind, window=with_turn)

    def _add(
        self,
        source: Source,
        identity: str,
        segment: Segment,
        window: Segment | None = None,
        *,
        is_spooled: bool = False,
    ) -> None:
        speaking = self._speaking[source.number]
        if source.is_live and self._ledger.holds(identity) and speaking.in_memory >= source.most:
            is_spooled = True
        place = self._output(source).place()
        job = self._job(source, place, identity, segment, None if is_spooled else window)
        source.stats.waiting += 1
        if source.silences is not None:
            source.silences.begin(identity, segment.start, segment.end)
            source.silences.end(_SPEAKING)
        if source.is_live:
            speaking.cut_to = segment.end
            self._scheduler.drop_draft(source.number)
            job.is_spooled = is_spooled
            if not is_spooled:
                speaking.in_memory += 1
                if self._use_draft(job):
                    return
            else:
                job.segment = replace(segment, samples=segment.samples[:0])
        self._scheduler.add(job)
        self._make_room()

    def _make_room(self) -> None:
        """Drop the oldest segments of the least important cameras when there is no room to wait."""
        most = max(WAITING_SEGMENTS, sum(source.most for source in self._sources))
        while self._ledger.is_full or sum(s.in_memory for s in self._speaking) > most:
            job = self._scheduler.drop(self._priorities)
            if job is None:
                return
            logger.warning(
                "%s: the queue is full; dropped a segment", self._sources[job.camera].name
            )
            self._drop(job, "no room")

    def _drop_old(self) -> None:
        """Drop what has waited longer than its camera's audio may be kept."""
        for source in self._sources:
            kept = source.camera.retention.audio if source.camera.retention else None
            if kept is None or not source.is_live:
                continue
            limit = self._ordering.clock() - kept * _DAY_S
            while job := self._scheduler.drop_before(source.number, limit):
                logger.warning("%s: dropped a segment that waited too long", source.name)
                self._drop(job, "retention")

    def _drop(self, job: Job, reason: str) -> None:
        segment, source = job.segment, self._sources[job.camera]
        source.stats.dropped += 1
        times = (segment.start, segment.end)
        dropped = NoText(source.name, job.id, *times, reason, LineKind.DROPPED)
        # Now, since only then its audio may go; if the disk is full, as soon as it is not.
        self._finish(job, None if self._ledger.write(dropped) else dropped)
        self._ledger.forget(job.id)

    def _settle(self, job: Job, result: Result) -> None:
        """Take a result as the segment's, or decode it again."""
        source, verdict = self._sources[job.camera], self._decoder.settle(job, result)
        if source.has_turns and not job.is_repeat:
            self._speaking[job.camera].decoded = result.whole
        if isinstance(verdict, list):
            source.stats.decoded_again += not job.is_repeat
            for part in verdict:
                part.is_repeat = True
                self._scheduler.add(part)
        elif isinstance(verdict, Rejected):
            times = (round(job.segment.start, 3), round(job.segment.end, 3))
            text = verdict.likeliest.text
            self._finish(job, NoText(source.name, job.id, *times, verdict.reason, text=text))
        else:
            self._keep(job, verdict)

    def _keep(self, job: Job, result: Result) -> None:
        """Take a result as the segment's, whatever it lacks."""
        source = self._sources[job.camera]
        found = lines_of(
            *(source.address_of(job.id), source.name, job.id, result), with_words=self._with_words
        )
        if source.has_turns and job.half_of is None:
            self._output(source).logprobs[job.id] = result.hypothesis.word_logprob
        self._finish(job, [*found])

    def _finish(self, job: Job, found: Found | None) -> None:
        source = self._sources[job.camera]
        if job.half_of is not None:
            whole, halves = job.half_of, job.half_of.halves
            halves[job.segment.start] = found
            if len(halves) == 2:
                both = of_halves(whole)
                if isinstance(both, Result):
                    self._keep(whole, both)
                else:
                    self._finish(whole, both)
            return
        for item in [found] if isinstance(found, NoText) else found or []:
            if isinstance(item, NoText) and item.event == LineKind.REJECTED:
                source.stats.rejected[item.reason] += 1
            if isinstance(item, NoText) and source.silences is not None:
                source.silences.hide(item.start, item.end)
        self._output(source).put(job.number, found)
        source.stats.waiting -= 1
        if source.silences is not None:
            if found is None:  # dropped
                source.silences.hide(job.segment.start, job.segment.end)
            source.silences.end(job.id)
        if source.is_live and not job.is_spooled:
            self._speaking[job.camera].in_memory -= 1


def _is_endless(source: Source) -> bool:
    return source.is_live or source.is_piped or source.is_folder
