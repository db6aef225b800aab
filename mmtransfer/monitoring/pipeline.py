"""A recording's speech as text, segment by segment, while it is being read."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmtransfer.audio import SAMPLE_RATE, MediaError, stream_audio
from mmtransfer.decoding import DecodingOptions, Hypothesis
from mmtransfer.guards import rejection
from mmtransfer.monitoring.journal import Journal, camera_names, segment_id
from mmtransfer.recognition import Recognizer
from mmtransfer.recognizers import open_recognizer
from mmtransfer.segments import Segment, Segmenter, SegmenterSettings

logger = logging.getLogger(__name__)
_WAITING_SEGMENTS = 48  # bounds memory when recognition is slower than reading
_BATCH_SEGMENTS = 8
_READER_EXIT_S = 10.0  # a read of a failing disk may hang; do not wait for it for ever


@dataclass(frozen=True)
class Transcript:
    """A segment's text with its scores; the fields of a JSON line."""

    source: str
    camera: str
    """Name of the source, short and unique."""
    id: str
    """Name of the segment: the same whenever the same recording is read."""
    start: float
    """Seconds into the recording where speech starts."""
    end: float
    """Seconds into the recording where speech ends."""
    text: str
    avg_logprob: float
    """Mean natural-log probability of the tokens."""
    no_speech_prob: float
    compression_ratio: float
    context_s: float
    """Seconds of audio the encoder saw, padding included."""
    language: str | None = None
    """Language that it was read in; None for a model of one language."""
    words: list[dict[str, Any]] | None = None
    """Words with start and end in seconds into the recording, if asked for."""


@dataclass
class MonitorStats:
    """What a run did."""

    segments: int = 0
    audio_s: float = 0.0
    """Audio read."""
    wall_s: float = 0.0
    repeated: int = 0
    """Segments decoded again in longer contexts, because a guard objected."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Segments without text, by reason."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_audio(self, seconds: float) -> None:
        """Count audio; from any source's thread."""
        with self._lock:
            self.audio_s += seconds

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.wall_s / self.audio_s if self.audio_s else 0.0


@dataclass(frozen=True)
class SourceEnd:
    """Nothing more will come from a source."""

    source: str
    camera: str
    error: Exception | None
    """Why it ended before its time; what came before is transcribed."""


@dataclass(eq=False)  # jobs are told apart by identity
class _Job:
    """A segment on its way through the recogniser."""

    camera: int
    """Number of its source."""
    number: int
    """Place in the source's output."""
    segment: Segment
    context_s: float
    is_repeat: bool = False


class FairQueue:
    """Segments that wait, of all sources; a busy source does not delay the others beyond its share.

    Each source has a clock that advances by the audio decoded for it, and the source that is
    furthest behind comes first (start-time fair queueing, Goyal et al. 1996). A batch is filled up
    with segments of the same context, of whatever source.
    """

    def __init__(self, batch: int = _BATCH_SEGMENTS):
        self._batch = batch
        self._waiting: dict[int, list[_Job]] = {}
        self._clock: dict[int, float] = {}
        self._now = 0.0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, job: _Job) -> None:
        """Put a segment behind those of its source; one to be decoded again before them."""
        if job.camera not in self._waiting:
            # Time in which a source had nothing to say is no credit.
            self._clock[job.camera] = max(self._clock.get(job.camera, 0.0), self._now)
        jobs = self._waiting.setdefault(job.camera, [])
        jobs.insert(0 if job.is_repeat else len(jobs), job)

    def take(self) -> list[_Job]:
        """The next batch: the first segment of the source furthest behind, and others that share
        its context.
        """
        order = sorted(self._waiting, key=lambda camera: (self._clock[camera], camera))
        self._now = self._clock[order[0]]
        context = self._waiting[order[0]][0].context_s
        batch: list[_Job] = []
        for camera in order:
            for job in [job for job in self._waiting[camera] if job.context_s == context]:
                if len(batch) == self._batch:
                    break
                self._waiting[camera].remove(job)
                self._clock[camera] += context
                batch.append(job)
            if not self._waiting[camera]:
                del self._waiting[camera]
        return batch


@dataclass(frozen=True)
class _NoText:
    """A segment that gives no text, for the journal."""

    camera: str
    id: str
    start: float
    end: float
    reason: str
    event: str = "no text"


@dataclass
class _Output:
    """What a source's segments became, put back into order."""

    room: threading.Semaphore
    heard: set[str]
    """Segments that an earlier session of the monitor has dealt with."""
    count: int = 0
    emitted: int = 0
    done: dict[int, Transcript | _NoText | None] = field(default_factory=dict)
    """By place; None for one heard before."""
    end: SourceEnd | None = None


class Monitor:
    """Transcribes recordings with one recogniser.

    A thread for each source reads, finds speech and cuts segments, while the recogniser's workers
    decode what has been cut, in batches of one context. A bounded number of segments is in work,
    so memory does not grow with length.
    """

    def __init__(self, recognizer: Recognizer, settings: SegmenterSettings | None = None):
        self._recognizer = recognizer
        self._settings = settings or SegmenterSettings()
        self.stats = MonitorStats()

    def transcribe(self, source: str | Path) -> Iterator[Transcript]:
        """Transcripts of a recording, in order, each as soon as it is recognised.

        Raises:
            MediaError: unusable from the start, or cut (after the transcripts of all there is).
        """
        for item in self.watch([source]):
            if isinstance(item, Transcript):
                yield item
            elif item.error is not None:
                raise item.error

    def watch(
        self, sources: Sequence[str | Path], *, journal: Journal | None = None
    ) -> Iterator[Transcript | SourceEnd]:
        """Transcripts of several recordings read side by side, each source's in order, and the end
        of each source.

        With a journal, everything is written there before it is handed out, and what the journal
        holds already is neither decoded nor handed out again.
        """
        cameras = list(camera_names([str(source) for source in sources]).items())
        heard, ended = journal.heard() if journal is not None else ({}, set())
        # Everything that happens, in one queue: a segment, the end of a source, a decoded batch.
        events: queue.Queue[tuple[int, Segment | SourceEnd] | Future[list[Hypothesis]]]
        events = queue.Queue()
        stopping = threading.Event()
        room = max(_BATCH_SEGMENTS, _WAITING_SEGMENTS // max(1, len(cameras)))
        outputs = [
            _Output(threading.Semaphore(room), heard.get(name, set())) for name, _ in cameras
        ]
        readers = []
        for camera, (name, source) in enumerate(cameras):
            if name in ended:
                events.put((camera, SourceEnd(source, name, None)))
                continue
            arguments = (camera, cameras[camera], events, outputs[camera].room, stopping)
            readers.append(
                threading.Thread(
                    target=self._read, args=arguments, name=f"reader {name}", daemon=True
                )
            )
        workers = self._recognizer.engine.workers
        pool = ThreadPoolExecutor(workers, thread_name_prefix="recognizer")
        waiting = FairQueue()
        running: dict[Future[list[Hypothesis]], list[_Job]] = {}
        open_sources = len(cameras)
        started = time.monotonic()
        for reader in readers:
            reader.start()
        try:
            while open_sources:
                event = events.get()
                while True:  # all that has happened, so that batches are as full as they can be
                    if isinstance(event, Future):
                        for job, hypothesis in zip(running.pop(event), event.result(), strict=True):
                            again = self._settle(job, hypothesis, cameras, outputs)
                            if again is not None:
                                waiting.add(again)
                    else:
                        camera, item = event
                        output = outputs[camera]
                        if isinstance(item, SourceEnd):
                            output.end = item
                        else:
                            if segment_id(cameras[camera][0], item.start) in output.heard:
                                output.done[output.count] = None
                            else:
                                context = self._recognizer.context_s(item.samples)
                                waiting.add(_Job(camera, output.count, item, context))
                            output.count += 1
                    try:
                        event = events.get_nowait()
                    except queue.Empty:
                        break
                while waiting and len(running) < workers:
                    batch = waiting.take()
                    clips = [job.segment.samples for job in batch]
                    future = pool.submit(self._recognizer.decode, clips, batch[0].context_s)
                    running[future] = batch
                    future.add_done_callback(events.put)
                for output in outputs:
                    while output.emitted in output.done:
                        found = output.done.pop(output.emitted)
                        output.emitted += 1
                        output.room.release()
                        if found is not None and journal is not None:
                            journal.write(asdict(found))
                        if isinstance(found, Transcript):
                            self.stats.segments += 1
                            yield found
                    if output.end is not None and output.emitted == output.count:
                        end, output.end = output.end, None
                        open_sources -= 1
                        if journal is not None and end.camera not in ended:
                            journal.write(_end_line(end))
                        yield end
        finally:
            stopping.set()
            # A thread inside native code when the interpreter exits would abort the process.
            pool.shutdown(wait=True, cancel_futures=True)
            deadline = time.monotonic() + _READER_EXIT_S
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
            self.stats.wall_s += time.monotonic() - started

    def _settle(
        self,
        job: _Job,
        hypothesis: Hypothesis,
        cameras: list[tuple[str, str]],
        outputs: list[_Output],
    ) -> _Job | None:
        """Keep the text or drop it; or the job of decoding it again in a longer context."""
        segment = job.segment
        reason = rejection(hypothesis, segment.end - segment.start)
        longer = self._recognizer.longer_context_s(hypothesis.context_s)
        if reason is not None and longer is not None:
            self.stats.repeated += not job.is_repeat
            return _Job(job.camera, job.number, segment, longer, is_repeat=True)
        name, source = cameras[job.camera]
        found: Transcript | _NoText = _transcript(source, name, segment, hypothesis)
        if reason is not None:
            self.stats.rejected[reason] += 1
            logger.debug("%.1f s: rejected (%s): %s", segment.start, reason, hypothesis.text)
            found = _NoText(found.camera, found.id, found.start, found.end, reason)
        outputs[job.camera].done[job.number] = found
        return None

    def _read(
        self,
        camera: int,
        named: tuple[str, str],
        events: queue.Queue[Any],
        room: threading.Semaphore,
        stopping: threading.Event,
    ) -> None:
        name, source = named
        segmenter = Segmenter(self._settings)
        error: Exception | None = None

        def put(segment: Segment) -> None:
            while not room.acquire(timeout=0.2):
                if stopping.is_set():
                    return
            events.put((camera, segment))

        try:
            try:
                for block in stream_audio(source):
                    self.stats.add_audio(len(block) / SAMPLE_RATE)
                    for segment in segmenter.feed(block):
                        put(segment)
                    if stopping.is_set():
                        return
            except MediaError as cut:
                error = cut  # what came before it is still transcribed
            for segment in segmenter.finish():
                put(segment)
        except Exception as problem:
            error = problem
        events.put((camera, SourceEnd(source, name, error)))


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


def _end_line(end: SourceEnd) -> dict[str, Any]:
    """The journal's line: only a recording that was read to its end is not read again."""
    line = {"camera": end.camera, "event": "end" if end.error is None else "cut"}
    return line if end.error is None else {**line, "detail": str(end.error)}


def _transcript(source: str, camera: str, segment: Segment, hypothesis: Hypothesis) -> Transcript:
    offset = segment.samples_start
    words = [
        {
            "text": word.text,
            "start": round(offset + word.start_s, 2),
            "end": round(offset + word.end_s, 2),
            "probability": word.probability,
        }
        for word in hypothesis.words
    ]
    return Transcript(
        source=source,
        camera=camera,
        id=segment_id(camera, segment.start),
        start=round(segment.start, 3),
        end=round(segment.end, 3),
        text=hypothesis.text,
        avg_logprob=round(hypothesis.avg_logprob, 4),
        no_speech_prob=round(hypothesis.no_speech_prob, 4),
        compression_ratio=round(hypothesis.compression_ratio, 3),
        context_s=hypothesis.context_s,
        language=hypothesis.language,
        words=words or None,
    )
