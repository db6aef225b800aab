"""A recording's speech as text, segment by segment, while it is being read."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtransfer.audio import SAMPLE_RATE, MediaError, stream_audio
from mmtransfer.decoding import DecodingOptions, Hypothesis
from mmtransfer.guards import rejection
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

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.wall_s / self.audio_s if self.audio_s else 0.0


@dataclass(eq=False)  # jobs are told apart by identity
class _Job:
    """A segment on its way through the recogniser."""

    number: int
    """Place in the output."""
    segment: Segment
    context_s: float
    is_repeat: bool = False


class Monitor:
    """Transcribes recordings with one recogniser.

    A thread reads, finds speech and cuts segments, while the recogniser's workers decode what has
    been cut, in batches of one context. A bounded number of segments is in work, so memory does
    not grow with length.
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
        # Everything that happens, in one queue: a segment, a decoded batch, the end of reading.
        events: queue.Queue[Segment | Future[list[Hypothesis]] | _End] = queue.Queue()
        room = threading.Semaphore(_WAITING_SEGMENTS)
        stopping = threading.Event()
        started = time.monotonic()
        reader = threading.Thread(
            target=self._read, args=(source, events, room, stopping), name="reader", daemon=True
        )
        workers = self._recognizer.engine.workers
        pool = ThreadPoolExecutor(workers, thread_name_prefix="recognizer")
        waiting: list[_Job] = []
        running: dict[Future[list[Hypothesis]], list[_Job]] = {}
        done: dict[int, Transcript | None] = {}
        count = emitted = 0
        end: _End | None = None
        reader.start()
        try:
            while end is None or emitted < count:
                event = events.get()
                while True:  # all that has happened, so that batches are as full as they can be
                    if isinstance(event, Segment):
                        context = self._recognizer.context_s(event.samples)
                        waiting.append(_Job(count, event, context))
                        count += 1
                    elif isinstance(event, Future):
                        for job, hypothesis in zip(running.pop(event), event.result(), strict=True):
                            self._settle(str(source), job, hypothesis, waiting, done)
                    else:
                        end = event
                    try:
                        event = events.get_nowait()
                    except queue.Empty:
                        break
                while waiting and len(running) < workers:
                    batch = _next_batch(waiting)
                    clips = [job.segment.samples for job in batch]
                    future = pool.submit(self._recognizer.decode, clips, batch[0].context_s)
                    running[future] = batch
                    future.add_done_callback(events.put)
                while emitted in done:
                    transcript = done.pop(emitted)
                    emitted += 1
                    room.release()
                    if transcript is not None:
                        self.stats.segments += 1
                        yield transcript
        finally:
            stopping.set()
            # A thread inside native code when the interpreter exits would abort the process.
            pool.shutdown(wait=True, cancel_futures=True)
            reader.join(_READER_EXIT_S)
            self.stats.wall_s += time.monotonic() - started
        if end.error is not None:
            raise end.error

    def _settle(
        self,
        source: str,
        job: _Job,
        hypothesis: Hypothesis,
        waiting: list[_Job],
        done: dict[int, Transcript | None],
    ) -> None:
        """Keep the text, drop it, or have the segment decoded again in a longer context."""
        segment = job.segment
        reason = rejection(hypothesis, segment.end - segment.start)
        longer = self._recognizer.longer_context_s(hypothesis.context_s)
        if reason is not None and longer is not None:
            self.stats.repeated += not job.is_repeat
            waiting.insert(0, _Job(job.number, segment, longer, is_repeat=True))
        elif reason is not None:
            self.stats.rejected[reason] += 1
            logger.debug("%.1f s: rejected (%s): %s", segment.start, reason, hypothesis.text)
            done[job.number] = None
        else:
            done[job.number] = _transcript(source, segment, hypothesis)

    def _read(
        self,
        source: str | Path,
        events: queue.Queue[Any],
        room: threading.Semaphore,
        stopping: threading.Event,
    ) -> None:
        segmenter = Segmenter(self._settings)
        error: BaseException | None = None

        def put(segment: Segment) -> None:
            while not room.acquire(timeout=0.2):
                if stopping.is_set():
                    return
            events.put(segment)

        try:
            try:
                for block in stream_audio(source):
                    self.stats.audio_s += len(block) / SAMPLE_RATE
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
        events.put(_End(error))


@dataclass(frozen=True)
class _End:
    """Nothing more will be read."""

    error: BaseException | None


def _next_batch(waiting: list[_Job]) -> list[_Job]:
    """Take the first job and those that share its context, so that none waits behind later ones."""
    context = waiting[0].context_s
    batch = [job for job in waiting if job.context_s == context][:_BATCH_SEGMENTS]
    for job in batch:
        waiting.remove(job)
    return batch


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


def _transcript(source: str, segment: Segment, hypothesis: Hypothesis) -> Transcript:
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
