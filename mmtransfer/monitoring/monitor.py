"""The speech of recordings and cameras as text, segment by segment, while it is being read."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import (
    Alert,
    FileDone,
    FolderState,
    Item,
    LineKind,
    NoText,
    Occurrence,
    Partial,
    Recording,
    Sound,
    SourceEnd,
    SourceEvent,
    Stopped,
    Transcript,
    line_id,
    recording_of,
    segment_id,
)
from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS, FairQueue, Job
from mmtransfer.monitoring.journal.heard import Heard
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.monitoring.lines import (
    Line,
    LineSettings,
    split_lines,
    split_pieces,
    text_ends_at,
)
from mmtransfer.monitoring.memory import give_back
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.monitoring.sources.cameras import Camera, named_cameras, printable
from mmtransfer.monitoring.sources.clips import AROUND_S, Recorder, clip_path, cut_recording
from mmtransfer.monitoring.sources.folders import read_folder
from mmtransfer.monitoring.sources.kinds import goes_on, is_folder, settle
from mmtransfer.monitoring.sources.live import LiveSettings, SteadyClock
from mmtransfer.monitoring.sources.readers import (
    Cut,
    Draft,
    Reader,
    Turn,
    read_camera,
    read_recording,
)
from mmtransfer.monitoring.stats import CameraStats, MonitorStats
from mmtransfer.monitoring.texts import alerts, new_alerts, revised, transcripts
from mmtransfer.monitoring.watch import WatchList
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import is_piped
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.guards import LOOPING, agreed, rejection
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.segments import Segment, SegmenterSettings

logger = logging.getLogger(__name__)
_Found = list[Transcript | NoText] | NoText
"""What became of a segment: lines of text, with a half that gave none behind them; or no text."""
Judge = Callable[[list[str]], list[tuple[str, float]]]
"""Texts to their classes, each with its probability."""
_WAITING_SEGMENTS = 48  # bounds memory when recognition is slower than reading
_SPOOL_BYTES = 2 << 30  # audio that may wait on disk
_READER_EXIT_S = 0.8  # a read of a failing disk or server may hang; who stops has 5 s in all
_DRAIN_S = 4.0  # after a request to stop; what is not decoded by then stays in the spool
_DRAFTS = 4  # provisional readings in a batch; a full batch would keep what is final waiting
_MISSED_S = 2.0  # speech at the end of a window without a word is decoded on its own
_TURN_THREADS = 1  # one turn at a time: in a batch the first would wait for the others
_WAITING_TURNS = 32  # beyond that the machine is too slow to decode everything twice
_TIMED_FROM_S = 1.5  # the words of a turn this long get times, by which they find their lines
_DISK_RETRY_S = 1.0
_RECORDINGS = 4096  # more than there are segments in work
_DELAY_S = 0.3  # by which a doubted segment is moved in its window when it is decoded again
_SAME_SOUND_S = 1.0  # a sound is told again after a second of less at the soonest


class Monitor:
    """Transcribes recordings and live sources with one recogniser.

    A thread for each source reads, finds speech and cuts segments, while the recogniser's workers
    decode what has been cut, in batches of one context. A recording waits while too many segments
    are in work. A camera cannot wait: its segments do, on disk if there is a journal, and when that
    room is full the oldest of the least important camera is dropped, and the journal says so.

    The text of a live source is there at once, segment by segment; when the turn is over it is
    decoded as a whole, and lines that read differently then come again, with the same id and a
    `revision`. Where there is no time for that the lines stay as they are.

    `others` are recognisers of cameras, by name, that have their own. With `judge`, transcripts
    carry the class of their text. In `clips` a short recording is kept around each alert.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        settings: SegmenterSettings | None = None,
        *,
        live: LiveSettings | None = None,
        spool_bytes: int = _SPOOL_BYTES,
        others: Mapping[str, Recognizer] | None = None,
        judge: Judge | None = None,
        clips: Path | None = None,
        lines: LineSettings | None = None,
        with_words: bool = False,
    ):
        self._recognizer, self._others = recognizer, others or {}
        self._settings = settings or SegmenterSettings()
        self._lines, self._with_words = lines or LineSettings(), with_words
        self._live = live or LiveSettings()
        self._spool_bytes, self._judge, self._clips = spool_bytes, judge, clips
        self._stopping = threading.Event()
        self.stats = MonitorStats()

    def stop(self) -> None:
        """End `watch` soon, from any thread: what has been cut is decoded within a few seconds, or
        stays in the journal's spool for the next start.
        """
        self._stopping.set()

    @property
    def is_stopping(self) -> bool:
        """Whether `watch` was asked to end, or has."""
        return self._stopping.is_set()

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
        self, sources: Iterable[str | Path | Camera], *, journal: Journal | None = None
    ) -> Iterator[Item]:
        """Transcripts of several sources side by side, each source's in order, and what happens to
        the sources: alerts, sounds, connections, ends. A source is a path, an address or a
        `Camera`, which has a name and settings of its own.

        With a journal, everything is written there before it is handed out, and what the journal
        holds already is neither decoded nor handed out again. When the disk is full, what live
        sources and standard input say is held until it can be written; where all sources are
        recordings, the error ends it.

        Raises:
            OSError: the journal cannot be written.
        """
        cameras = settle(named_cameras(sources))
        self.stats.add_cameras(camera.name for camera in cameras)
        self._stopping = threading.Event()
        clock, readers = SteadyClock(), []
        outputs = [
            _Output(
                camera,
                self._others.get(camera.name, self._recognizer),
                self.stats.cameras[camera.name],
                len(cameras),
            )
            for camera in cameras
        ]
        run = _Run(
            outputs,
            journal,
            clock,
            self._judge,
            self._clips,
            self._spool_bytes,
            self._lines,
            self._with_words,
        )
        started = time.monotonic()
        try:
            run.restore()
            for number, output in enumerate(outputs):
                camera = output.camera
                if output.has_ended:
                    run.events.put((number, SourceEnd(output.source, camera.name, None)))
                    continue
                if self._clips is not None and output.is_live:
                    output.recorder = Recorder()
                reader = Reader(
                    camera=number,
                    name=camera.name,
                    source=camera.url,
                    events=run.events,
                    room=output.room,
                    stopping=self._stopping,
                    stats=output.stats,
                    settings=self._settings,
                    live=self._live,
                    clock=clock,
                    window_s=output.recognizer.window_s,
                    end_of_turn=output.recognizer.end_of_turn if self._live.learned_end else None,
                    loud_db=camera.loud_db,
                    recorder=output.recorder,
                    channel=None if isinstance(camera.channels, str) else camera.channels - 1,
                    folder=output.folder,
                    known_s=output.known_s,
                )
                read = read_camera if output.is_live else read_recording
                readers.append(reader.start(read_folder if output.is_folder else read))
            yield from run.items(self._stopping)
        finally:
            self._stopping.set()
            run.close()
            # A thread inside native code when the interpreter exits would abort the process.
            deadline = time.monotonic() + _READER_EXIT_S
            for thread in readers:
                thread.join(max(0.0, deadline - time.monotonic()))
            self.stats.wall_s += time.monotonic() - started


def _kind(recognizer: Recognizer, context_s: float) -> tuple[tuple[int, float], int]:
    """Kind of a job, and how many of it make a batch."""
    most = min(BATCH_SEGMENTS, recognizer.batch_size(context_s))
    return (id(recognizer), context_s), most


def _joined(identity: str, halves: Sequence[_Found]) -> _Found:
    """What became of a window that was decoded in halves: lines, and the half that gave none."""
    lines = [line for half in halves if isinstance(half, list) for line in half]
    rejected = [half for half in halves if isinstance(half, NoText)]
    if not lines:
        text = " ".join(half.text for half in rejected).strip()
        return replace(rejected[0], end=rejected[-1].end, text=text)
    numbered = [replace(line, id=line_id(identity, number)) for number, line in enumerate(lines)]
    return [*numbered, *rejected]


@dataclass
class _Result:
    """What a worker made of a job."""

    hypothesis: Hypothesis
    lines: list[Line]
    judged: list[tuple[str, float]] = field(default_factory=list)
    """Class and probability of each line's text."""
    pieces: list[int] = field(default_factory=list)
    """Of a turn: how many lines each of its segments has."""


class _Output:
    """What a source's segments became, put back into order."""

    def __init__(self, camera: Camera, recognizer: Recognizer, stats: CameraStats, count: int):
        self.camera, self.name = camera, camera.name
        self.recognizer, self.stats = recognizer, stats
        self.source = printable(public_address(camera.url))
        self.is_live, self.is_folder = goes_on(camera), is_folder(camera.url)
        self.is_piped = is_piped(camera.url)
        self.watched = WatchList(camera.watch)
        self.most = max(BATCH_SEGMENTS, _WAITING_SEGMENTS // max(1, count))
        self.room = threading.Semaphore(self.most)
        self.recorder: Recorder | None = None
        self.recordings: dict[str, Recording] = {}  # the last files of a folder
        # What an earlier session of the monitor has dealt with.
        self.heard: set[str] = set()
        self.sounds: dict[str, list[float]] = {}
        self.folder = FolderState()
        self.has_ended, self.known_s = False, 0.0
        self.count = self.emitted = 0
        self.in_memory = 0  # segments of a live source whose samples are held
        # By place; None for one that the journal has already.
        self.done: dict[int, _Found | FileDone | Recording | None] = {}
        self.end: SourceEnd | None = None
        self.draft: tuple[Job, _Result] | None = None  # the last that was read
        self.said = ("", "")  # its segment, and its text
        self.cut_to = 0.0  # end of the last whole segment
        # Of a live source: the lines of segments whose turn is not over, by segment, and turns that
        # have been decoded.
        self.recent: dict[str, list[Transcript]] = {}
        self.turns: deque[tuple[Job, _Result]] = deque()
        self.open_turns = 0

    def take_up(self, heard: Heard) -> None:
        """What an earlier session has dealt with."""
        self.heard = heard.ids.get(self.name, set())
        self.folder = heard.folders.get(self.name, self.folder)
        if self.is_folder:
            self.sounds = heard.sounds.get(self.name, {})
        end = heard.ends.get(self.name)
        if end is None or self.is_live or self.is_folder or self.is_piped:
            return
        path = Path(self.camera.url)
        size = path.stat().st_size if path.is_file() else None
        if size == end.size:
            self.has_ended = end.error is None
        else:  # it has grown, and is read on
            self.known_s = end.seconds

    def is_known_sound(self, sound: Sound) -> bool:
        """Whether an earlier session told of a sound; in a folder, where reading may begin in the
        middle of a file, not at the very same time.
        """
        told = self.sounds.get(recording_of(sound.id), ())
        return sound.id in self.heard or any(abs(at - sound.start) < _SAME_SOUND_S for at in told)


class _Run:
    """The state of one `watch`; everything here happens in the caller's thread."""

    def __init__(
        self,
        outputs: list[_Output],
        journal: Journal | None,
        clock: SteadyClock,
        judge: Judge | None,
        clips: Path | None,
        spool_bytes: int,
        lines: LineSettings,
        with_words: bool,
    ):
        self._lines, self._with_words = lines, with_words
        self.outputs, self._journal, self._clock = outputs, journal, clock
        self._judge, self._clips, self._spool_bytes = judge, clips, spool_bytes
        # Everything that happens, in one queue: segments, events, ends, and decoded batches.
        self.events: queue.Queue[Any] = queue.Queue()
        self._priorities = {
            number: output.camera.priority
            for number, output in enumerate(outputs)
            if output.is_live
        }
        # Recordings can be read again; of other sources nothing may be lost while a disk is full.
        self._waits = any(output.is_live or output.is_piped for output in outputs)
        self._is_endless = self._waits or any(output.is_folder for output in outputs)
        self._spool: Spool | None = None
        engines = {id(o.recognizer.engine): o.recognizer.engine for o in outputs}
        self._workers = max((engine.workers for engine in engines.values()), default=1)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="recognizer")
        self._waiting = FairQueue()
        self._drafts: dict[int, Job] = {}
        self._turns: deque[Job] = deque()
        self._running: dict[Future[list[_Result]], list[Job]] = {}
        self._turn_pool = ThreadPoolExecutor(_TURN_THREADS, thread_name_prefix="turns")
        self._turning: dict[Future[list[_Result]], list[Job]] = {}
        self._open = len(outputs)
        self._told: deque[Item | NoText] = deque()
        self._clip_pool = ThreadPoolExecutor(1, thread_name_prefix="clips")
        self._cutting: set[Future[None]] = set()
        self._disk_error: OSError | None = None
        self._disk_retry = 0.0

    def restore(self) -> None:
        """Take up what an earlier session left in journal and spool."""
        if self._journal is None:
            return
        left = []
        if self._priorities:
            self._spool = self._journal.spool()
            left = list(self._spool.waiting())
        recordings = {output.name for output in self.outputs if not output.is_live}
        heard = self._journal.heard(recordings, {identity for _, identity, _ in left})
        for output in self.outputs:
            output.take_up(heard)
        numbers = {output.name: number for number, output in enumerate(self.outputs)}
        for name, identity, segment in left:
            if identity not in self.outputs[numbers[name]].heard:
                self._add(numbers[name], identity, segment, spooled=True)
            elif self._spool is not None:
                self._spool.remove(identity)

    def items(self, stopping: threading.Event) -> Iterator[Item]:
        """What happens, until every source has ended."""
        deadline: float | None = None
        while self._open or self._cutting:
            self._dispatch()
            yield from self._in_order()
            if not self._open and not self._cutting:
                return
            if stopping.is_set() and deadline is None:
                deadline = time.monotonic() + _DRAIN_S
            if deadline is not None and time.monotonic() > deadline:
                if self._disk_error is not None:
                    raise self._disk_error
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
        self._turn_pool.shutdown(wait=True, cancel_futures=True)
        self._clip_pool.shutdown(wait=True, cancel_futures=True)

    def _take_in(self, event: Any) -> None:
        if isinstance(event, Future):
            self._take_results(event)
            return
        number, item = event
        output = self.outputs[number]
        if isinstance(item, SourceEnd):
            output.end = item
        elif isinstance(item, SourceEvent):
            output.stats.events[item.event] += 1
            if item.event in (Occurrence.CONNECTED, Occurrence.LOST):
                output.stats.is_connected = item.event == Occurrence.CONNECTED
            self._told.append(item)
        elif isinstance(item, Sound):
            if not output.is_known_sound(item):
                output.stats.alerts += 1
                self._told.append(replace(item, clip=self._clip(output, item)))
        elif isinstance(item, Recording):
            output.recordings[item.of] = item
            if len(output.recordings) > _RECORDINGS:
                del output.recordings[next(iter(output.recordings))]
            output.done[output.count] = item
            output.count += 1
        elif isinstance(item, FileDone):
            output.done[output.count] = item
            output.count += 1
        elif isinstance(item, Draft):
            self._add_draft(number, item)
        elif isinstance(item, Turn):
            self._add_turn(number, item.window)
        else:
            cut = Cut(item, output.name) if isinstance(item, Segment) else item
            segment = cut.segment
            identity = segment_id(cut.of, segment.start)
            if identity in output.heard:
                output.done[output.count] = None
                output.count += 1
                return
            if self._spool is not None and output.is_live:
                try:
                    self._spool.add(output.name, identity, segment)
                except OSError as error:  # no room on the disk; it is still in memory
                    logger.warning("%s: a segment is held in memory alone (%s)", output.name, error)
            self._add(number, identity, segment)

    def _take_results(self, event: Future[list[_Result]]) -> None:
        if event in self._turning:
            for job, result in zip(self._turning.pop(event), event.result(), strict=True):
                output, segment = self.outputs[job.camera], job.segment
                longer = output.recognizer.longer_context_s(result.hypothesis.context_s)
                doubt = rejection(result.hypothesis, segment.end - segment.start)
                if doubt is None or longer is None:
                    output.turns.append((job, result))
                    continue
                kind, most = _kind(output.recognizer, longer)
                self._turns.appendleft(replace(job, kind=kind, most=most))
            return
        for job, result in zip(self._running.pop(event), event.result(), strict=True):
            if job.is_draft and job.final is None:
                self._keep_draft(job, result)
            else:
                self._settle(job.final or job, result)

    # --- segments that are not over -----------------------------------------------------------

    def _add_draft(self, number: int, draft: Draft) -> None:
        output, segment = self.outputs[number], draft.segment
        identity = segment_id(output.name, segment.start)
        context_s = output.recognizer.context_s(segment.samples, is_first=True)
        kind = _kind(output.recognizer, context_s)
        self._drafts[number] = Job(
            *(number, -1, identity, segment, *kind), is_draft=True, is_whole=draft.is_whole
        )

    def _keep_draft(self, job: Job, result: _Result) -> None:
        """Tell the provisional text, unless its segment is over by now."""
        output, segment = self.outputs[job.camera], job.segment
        if segment.start < output.cut_to:
            return
        output.draft = (job, result)
        if rejection(result.hypothesis, segment.end - segment.start) is not None:
            return
        text = result.hypothesis.text
        output.stats.last_text = f"{text} …"
        if (job.id, text) != output.said and self._disk_error is None:  # nothing piles up
            times = (round(segment.start, 3), round(segment.end, 3))
            self._told.append(Partial(output.name, job.id, *times, text))
        output.said = (job.id, text)

    def _use_draft(self, job: Job) -> bool:
        """Whether the segment has been read, or is being read, while it was not known to be over:
        then that reading is the final one.
        """
        output = self.outputs[job.camera]

        def is_same(other: Job) -> bool:
            same = other.id == job.id and other.segment.end == job.segment.end
            return same and len(other.segment.samples) == len(job.segment.samples)

        if output.draft is not None and is_same(output.draft[0]):
            self._settle(job, output.draft[1])
            return True
        for batch in self._running.values():
            for other in batch:
                if other.is_draft and other.camera == job.camera and is_same(other):
                    other.final = job
                    return True
        return False

    # --- turns that are over ------------------------------------------------------------------

    def _add_turn(self, number: int, window: Segment) -> None:
        output = self.outputs[number]
        kind = _kind(output.recognizer, output.recognizer.context_s(window.samples))
        identity = segment_id(output.name, window.start)
        job = Job(number, -1, identity, window, *kind, is_turn=True, after=output.count)
        output.open_turns += 1
        first_s = output.recognizer.context_s(window.samples, is_first=True)
        if len(window.pieces) == 1 and first_s == job.kind[1]:  # there is nothing more to know
            output.turns.append((job, _Result(Hypothesis("", (), 0.0, 0.0, kind[0][1]), [])))
            return
        self._turns.append(job)
        if len(self._turns) > _WAITING_TURNS:
            job = self._turns.popleft()
            self.outputs[job.camera].stats.not_revised += 1
            self._forget(job)

    def _forget(self, job: Job) -> None:
        """The turn is settled."""
        output = self.outputs[job.camera]
        output.open_turns -= 1
        for piece in job.segment.pieces:
            output.recent.pop(segment_id(output.name, piece.start), None)

    def _revise(self, output: _Output) -> Iterator[Item]:
        """Hand out the lines that read differently now that their turn is known."""
        while output.turns and output.turns[0][0].after <= output.emitted:
            job, result = output.turns[0]
            segment, hypothesis = job.segment, result.hypothesis
            is_known = rejection(hypothesis, segment.end - segment.start) is None
            is_known = is_known and self._missed_from(segment, hypothesis) is None
            lines = iter(self._transcripts(output, job.id, result))
            changed: list[Transcript] = []
            before: list[Transcript] = []
            after: list[Transcript] = []
            for piece, count in zip(segment.pieces, result.pieces, strict=False):
                name = segment_id(output.name, piece.start)
                known = output.recent.get(name, [])
                found = [replace(next(lines), id=line_id(name, number)) for number in range(count)]
                before += known
                after += found
                changed += revised(known, found)
            if not is_known:
                changed = []
            now = self._clock()
            changed = [replace(line, delay_s=round(now - segment.end, 3)) for line in changed]
            raised = new_alerts(after, before, output.watched) if changed else []
            raised = [replace(a, clip=self._clip_name(output, a.segment)) for a in raised]
            if changed and not self._write(*changed, *raised):
                return
            output.turns.popleft()
            self._forget(job)
            output.stats.revised += len(changed)
            output.stats.alerts += len(raised)
            for alert in {a.segment: a for a in reversed(raised)}.values():
                self._clip(output, alert)
            yield from changed
            yield from raised

    # --- segments -----------------------------------------------------------------------------

    def _add(self, number: int, identity: str, segment: Segment, *, spooled: bool = False) -> None:
        output = self.outputs[number]
        context_s = output.recognizer.context_s(segment.samples, is_first=output.is_live)
        kind = _kind(output.recognizer, context_s)
        job = Job(number, output.count, identity, segment, *kind)
        output.count += 1
        output.stats.waiting += 1
        if output.is_live:
            output.cut_to = segment.end
            self._drafts.pop(number, None)
            is_kept = self._spool is not None and self._spool.holds(identity)
            job.is_spooled = spooled or (is_kept and output.in_memory >= output.most)
            if not job.is_spooled:
                output.in_memory += 1
                if self._use_draft(job):
                    return
            else:
                job.segment = replace(segment, samples=segment.samples[:0])
        self._waiting.add(job)
        self._make_room()

    def _make_room(self) -> None:
        """Drop the oldest segments of the least important cameras when there is no room to wait."""

        def is_full() -> bool:
            if self._spool is not None and self._spool.bytes > self._spool_bytes:
                return True
            held = sum(output.in_memory for output in self.outputs)
            most = sum(output.most for output in self.outputs)
            return held > max(_WAITING_SEGMENTS, most)

        while is_full():
            job = self._waiting.drop(self._priorities)
            if job is None:
                return
            segment, output = job.segment, self.outputs[job.camera]
            output.stats.dropped += 1
            logger.warning("%s: no room to wait; dropped a segment", output.name)
            times = (segment.start, segment.end)
            dropped = NoText(output.name, job.id, *times, "no room", LineKind.DROPPED)
            # Now, since only then its audio may go; if the disk is full, as soon as it is not.
            self._finish(job, None if self._write(dropped) else dropped)
            if self._spool is not None:
                self._spool.remove(job.id)

    def _dispatch(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            batch = self._waiting.take()
            for job in batch:
                if job.is_spooled and self._spool is not None:
                    job.segment = self._spool.load(job.id)
            self._submit(batch)
        self._dispatch_turns()
        # One worker at most decodes what is not over, so that what is over finds another one.
        is_reading = any(batch[0].is_draft for batch in self._running.values())
        if self._drafts and not self._waiting and not is_reading:
            if len(self._running) >= self._workers:
                return
            jobs = sorted(
                self._drafts.values(), key=lambda job: (not job.is_whole, job.segment.end)
            )
            batch = [job for job in jobs if job.kind == jobs[0].kind]
            batch = batch[: min(_DRAFTS, jobs[0].most)]
            for job in batch:
                del self._drafts[job.camera]
            self._submit(batch)

    def _dispatch_turns(self) -> None:
        """Decode turns of which every segment has its text, in threads of their own, unless so much
        waits that texts would come late.
        """
        while len(self._turning) < _TURN_THREADS and len(self._waiting) <= BATCH_SEGMENTS:
            ready = [job for job in self._turns if job.after <= self.outputs[job.camera].emitted]
            if not ready:
                return
            job = ready[0]
            self._turns.remove(job)
            output = self.outputs[job.camera]
            names = [segment_id(output.name, piece.start) for piece in job.segment.pieces]
            job.known = [
                [Line(line.start, line.end, line.text) for line in output.recent.get(name, ())]
                for name in names
            ]
            future = self._turn_pool.submit(self._recognize, [job])
            self._turning[future] = [job]
            future.add_done_callback(self.events.put)

    def _submit(self, batch: list[Job]) -> None:
        future = self._pool.submit(self._recognize, batch)
        self._running[future] = batch
        future.add_done_callback(self.events.put)

    def _recognize(self, batch: list[Job]) -> list[_Result]:
        """Decode and judge a batch; in a worker's thread."""
        started = time.perf_counter()
        recognizer = self.outputs[batch[0].camera].recognizer
        clips = [job.segment.samples for job in batch]
        found = recognizer.decode(clips, batch[0].kind[1])
        results = self._results(found, batch)
        each = (time.perf_counter() - started) / len(batch)
        for job in batch:
            self.outputs[job.camera].stats.decode_s += each
        if self._is_endless:
            give_back()
        return results

    def _results(self, found: Sequence[Hypothesis], jobs: Sequence[Job]) -> list[_Result]:
        """Hypotheses with their lines, and the classes of these."""
        results = []
        for job, hypothesis in zip(jobs, found, strict=True):
            if job.is_turn:
                pieces = split_pieces(hypothesis, job.segment, self._lines, job.known)
                lines = [line for piece in pieces for line in piece]
                results.append(_Result(hypothesis, lines, pieces=[len(piece) for piece in pieces]))
            else:
                lines = split_lines(hypothesis, job.segment, self._lines)
                results.append(_Result(hypothesis, lines))
        if self._judge is not None:
            judged = [result for result in results if result.hypothesis.text.strip()]
            texts = [line.text for result in judged for line in result.lines]
            verdicts = iter(self._judge(texts) if texts else [])
            for result in judged:
                result.judged = [next(verdicts) for _ in result.lines]
        return results

    def _settle(self, job: Job, result: _Result) -> None:
        """Keep the text, reject it, or decode the segment again: in a longer context, and when
        there is none, in two halves; and once more if it is doubted for its repetitions alone.
        """
        segment, output, hypothesis = job.segment, self.outputs[job.camera], result.hypothesis
        seconds = segment.end - segment.start
        reason = rejection(hypothesis, seconds)
        if reason is not None:
            job.readings = (*job.readings, hypothesis)
            again, believed = self._longer_or_halves(job), None
            if reason == LOOPING and not again:
                believed = agreed(job.readings, seconds)
                if believed is None and not job.is_delayed:
                    later = segment.delayed(_DELAY_S)
                    again = [replace(job, segment=later, is_delayed=True)]
            if again:
                output.stats.repeated += not job.is_repeat
                for part in again:
                    part.is_repeat = True
                    self._waiting.add(part)
                return
            if believed is None:
                likeliest = max(
                    job.readings, key=lambda found: (bool(found.text), found.avg_logprob)
                )
                times = (round(segment.start, 3), round(segment.end, 3))
                rejected = NoText(output.name, job.id, *times, reason, text=likeliest.text)
                self._finish(job, rejected)
                return
            [result] = self._results([believed], [job])
        else:
            cut = self._missed_from(segment, hypothesis)
            if cut is not None:
                output.stats.repeated += not job.is_repeat
                for part in self._parts(job, segment.parts(cut)):
                    part.is_repeat = True
                    self._waiting.add(part)
                return
        self._finish(job, [*self._transcripts(output, job.id, result)])

    def _transcripts(self, output: _Output, identity: str, result: _Result) -> list[Transcript]:
        recording = output.recordings.get(recording_of(identity))
        source = printable(str(recording.path)) if recording else output.source
        found = transcripts(
            *(source, output.name, identity, result.hypothesis, result.lines),
            with_words=self._with_words,
        )
        if result.judged:
            found = [
                replace(line, sentiment=label, sentiment_prob=round(share, 4))
                for line, (label, share) in zip(found, result.judged, strict=True)
            ]
        return found

    def _longer_or_halves(self, job: Job) -> list[Job]:
        """What is to be decoded in the place of a segment whose text is doubted; empty if there is
        no longer context, nor a pause in it.
        """
        output = self.outputs[job.camera]
        recognizer = output.recognizer
        longer = recognizer.longer_context_s(job.readings[-1].context_s)
        is_first = output.is_live and recognizer.window_s > 0
        if is_first and longer == recognizer.engine.max_context_s:
            return []  # its turn will be decoded in that
        if longer is not None:
            kind, most = _kind(recognizer, longer)
            return [replace(job, kind=kind, most=most)]
        return self._parts(job, job.segment.halves() or ())

    def _parts(self, job: Job, segments: Sequence[Segment]) -> list[Job]:
        recognizer = self.outputs[job.camera].recognizer
        parts = []
        for segment in segments:
            kind, most = _kind(recognizer, recognizer.context_s(segment.samples))
            part = replace(job, segment=segment, kind=kind, most=most, half_of=job, halves={})
            parts.append(part)
        return parts

    @staticmethod
    def _missed_from(segment: Segment, hypothesis: Hypothesis) -> int | None:
        """The piece behind which a window has no text, if so much is spoken from there on."""
        cut = text_ends_at(hypothesis, segment)
        missed = sum(piece.end - piece.start for piece in segment.pieces[cut:])
        return cut if cut > 0 and missed >= _MISSED_S else None

    def _finish(self, job: Job, found: _Found | None) -> None:
        output = self.outputs[job.camera]
        if job.half_of is not None:
            whole, halves = job.half_of, job.half_of.halves
            halves[job.segment.start] = found
            if len(halves) == 2:
                self._finish(whole, _joined(whole.id, [halves[at] for at in sorted(halves)]))
            return
        for item in [found] if isinstance(found, NoText) else found or []:
            if isinstance(item, NoText) and item.event == NoText.event:
                output.stats.rejected[item.reason] += 1
        output.done[job.number] = found
        output.stats.waiting -= 1
        if output.is_live and not job.is_spooled:
            output.in_memory -= 1

    # --- telling ------------------------------------------------------------------------------

    def _write(self, *lines: Any) -> bool:
        """Put lines into the journal; False if the disk does not take them now, but may later."""
        if self._journal is None or not lines:
            return True
        try:
            self._journal.write(
                *(line if isinstance(line, dict) else asdict(line) for line in lines)
            )
        except OSError as error:
            if not self._waits:
                raise
            if self._disk_error is None:
                logger.warning("the journal cannot be written (%s); its lines wait", error.strerror)
            self._disk_error, self._disk_retry = error, time.monotonic() + _DISK_RETRY_S
            return False
        self._disk_error = None
        return True

    def _in_order(self) -> Iterator[Item]:
        """Write and hand out what is ready."""
        if self._disk_error is not None and time.monotonic() < self._disk_retry:
            return
        while self._told:
            item = self._told[0]
            if not isinstance(item, Partial) and not self._write(item):
                return
            self._told.popleft()
            if not isinstance(item, NoText):
                yield item
        for output in self.outputs:
            while output.emitted in output.done:
                found = output.done[output.emitted]
                raised: list[Alert] = []
                written: list[Any] = [] if found is None else [found]
                if isinstance(found, list | NoText):
                    told = found if isinstance(found, list) else [found]
                    if output.is_live:
                        now = self._clock()
                        told = [
                            replace(line, delay_s=round(now - line.end, 3))
                            if isinstance(line, Transcript)
                            else line
                            for line in told
                        ]
                    raised = alerts(told, output.watched)
                    raised = [replace(a, clip=self._clip_name(output, a.segment)) for a in raised]
                    written = [*told, *raised]
                elif isinstance(found, FileDone | Recording):
                    written = [found.line(output.name)]
                if written and not self._write(*written):
                    return
                del output.done[output.emitted]
                output.emitted += 1
                if isinstance(found, FileDone | Recording):
                    continue
                if not output.is_live:
                    output.room.release()
                if found is None:
                    continue
                if self._spool is not None:
                    self._spool.remove(found[0].id if isinstance(found, list) else found.id)
                lines = [line for line in told if isinstance(line, Transcript)]
                if lines:
                    if output.is_live and output.recognizer.window_s:
                        output.recent[lines[0].id] = lines
                    output.stats.segments += 1
                    output.stats.lines += len(lines)
                    output.stats.last_text = lines[-1].text
                    if lines[-1].delay_s is not None:
                        output.stats.add_delay(lines[-1].delay_s)
                output.stats.alerts += len(raised)
                for alert in {a.segment: a for a in reversed(raised)}.values():
                    self._clip(output, alert)
                yield from lines
                yield from raised
            yield from self._revise(output)
            if output.turns and output.turns[0][0].after <= output.emitted:
                return  # the disk takes no more
            is_settled = output.emitted == output.count and not output.open_turns
            if output.end is not None and is_settled:
                end = output.end
                is_news = not output.has_ended and not isinstance(end.error, Stopped)
                if is_news and not self._write(end.line()):
                    return
                output.end = None
                if end.error is not None and not isinstance(end.error, Stopped):
                    output.stats.failure = str(end.error)
                self._open -= 1
                yield end

    # --- clips --------------------------------------------------------------------------------

    def _clip_name(self, output: _Output, moment: str) -> str | None:
        if self._clips is None or output.is_piped:  # what was piped in is gone
            return None
        return str(clip_path(self._clips, output.name, moment))

    def _clip(self, output: _Output, about: Alert | Sound) -> str | None:
        """Have the recording around an alert kept; returns where it will be."""
        moment = about.segment if isinstance(about, Alert) else about.id
        name = self._clip_name(output, moment)
        if name is None:
            return None
        start, end = about.start - AROUND_S, about.end + AROUND_S
        number, path = self.outputs.index(output), output.camera.url
        recording = output.recordings.get(recording_of(moment))
        if recording is not None:  # of which there is no more than lies in it
            path, start, end = str(recording.path), start - recording.at, end - recording.at

        def done(path: Path, why: str) -> None:
            if why:
                failed = SourceEvent(output.name, Occurrence.NO_CLIP, about.start, f"{path}: {why}")
                self.events.put((number, failed))

        if output.recorder is not None:
            output.recorder.want(Path(name), start, end, done)
            return name

        def cut() -> None:
            try:
                cut_recording(path, start, end, Path(name))
                done(Path(name), "")
            except Exception as error:  # whatever it is, nobody looks into this future
                done(Path(name), str(error) or type(error).__name__)

        future = self._clip_pool.submit(cut)
        self._cutting.add(future)
        future.add_done_callback(self._cutting.discard)
        return name


def load_monitor(
    model: str | Path | RecognitionOptions,
    *,
    cameras: Sequence[Camera] = (),
    settings: SegmenterSettings | None = None,
    live: LiveSettings | None = None,
    clips: Path | None = None,
    **options: Any,
) -> Monitor:
    """A monitor with a run folder's, checkpoint's, Hub or bundled model; other `options` are fields
    of `RecognitionOptions`, which may stand in the place of the model.

    `cameras` may name models and languages of their own; if one is live, all memory that
    recognition needs is taken at once. In `clips` a short recording is kept around each alert.

    Raises:
        UserError: a model or an option that cannot be used.

    Example:
        load_monitor("runs/site", language="de", words=True).watch(["gate.mp4"])
    """
    if isinstance(model, RecognitionOptions):
        model = replace(model, **options)
    else:
        model = RecognitionOptions(str(model), **options)
    decoding = model.decoding
    # What may have to be split into lines needs the times of its words.
    words_from_s = min(decoding.words_from_s, model.line_s)
    has_live = any(goes_on(camera) for camera in cameras)
    if has_live:
        words_from_s = min(words_from_s, _TIMED_FROM_S)
    decoding = replace(decoding, words_from_s=words_from_s)
    opened: dict[tuple[str, str | None], Recognizer] = {}

    def recognizer_for(name: str, spoken: str | None) -> Recognizer:
        if (name, spoken) not in opened:
            opened[name, spoken] = open_recognizer(
                name,
                language=spoken,
                engine=model.engine,
                compute_type=model.compute_type,
                device=model.device,
                threads=model.threads,
                context_s=model.shortest_context_s,
                options=decoding,
            )
        return opened[name, spoken]

    others = {
        camera.name: recognizer_for(camera.model or model.model, camera.language or model.language)
        for camera in cameras
        if camera.model or camera.language
    }
    judge = text_judge(model.sentiment) if model.sentiment else None
    own = recognizer_for(model.model, model.language)
    if has_live:
        for recognizer in opened.values():
            recognizer.warm_up(BATCH_SEGMENTS)
    return Monitor(
        own,
        settings,
        live=live,
        others=others,
        judge=judge,
        clips=clips,
        lines=model.lines,
        with_words=model.words,
    )


def text_judge(source: str) -> Judge:
    """What gives texts the classes of a sentiment model.

    Raises:
        UserError: not a text classifier.
    """
    from mmtransfer.models import load
    from mmtransfer.text.classifier import TextModel

    model = load(source)
    if not isinstance(model, TextModel):
        raise UserError(f"{source}: expected a model that classifies texts, found one of speech.")

    def judge(texts: list[str]) -> list[tuple[str, float]]:
        found = model.predict(texts)
        return [(verdict.label, verdict.probabilities[verdict.label]) for verdict in found]

    return judge


def monitor(model: str, source: str | Path, **settings: Any) -> Iterator[Transcript]:
    """Transcripts of a recording, each as soon as it is recognised; settings as `load_monitor`."""
    yield from load_monitor(model, **settings).transcribe(source)
