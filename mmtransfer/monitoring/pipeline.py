"""A recording's speech as text, segment by segment, while it is being read."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmtransfer.audio import SAMPLE_RATE, MediaError, stream_audio
from mmtransfer.config import RuntimeConfig
from mmtransfer.models import load_recognizable
from mmtransfer.monitoring.filters import rejection
from mmtransfer.monitoring.segments import Segment, Segmenter, SegmenterSettings
from mmtransfer.recognition import Hypothesis, Recognizer
from mmtransfer.runtime import choose_device, use_runtime

logger = logging.getLogger(__name__)
_QUEUED_SEGMENTS = 16  # bounds memory when recognition is slower than reading
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


@dataclass
class MonitorStats:
    """What a run did."""

    segments: int = 0
    audio_s: float = 0.0
    """Audio read."""
    wall_s: float = 0.0
    repeated: int = 0
    """Segments decoded again with the full context, because a guard objected."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Segments without text, by reason."""

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.wall_s / self.audio_s if self.audio_s else 0.0


class Monitor:
    """Transcribes recordings with one recogniser.

    A thread reads, finds speech and cuts segments; the caller's thread recognises whatever has
    been cut by then, in batches. A bounded queue joins them, so memory does not grow with length.
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
        segments: queue.Queue[Segment | BaseException | None] = queue.Queue(_QUEUED_SEGMENTS)
        stopping = threading.Event()
        started = time.monotonic()
        reader = threading.Thread(
            target=self._read, args=(source, segments, stopping), name="reader", daemon=True
        )
        reader.start()
        ending: Segment | BaseException | None = None
        try:
            running = True
            while running:
                batch: list[Segment] = []
                item = segments.get()
                while True:
                    if not isinstance(item, Segment):
                        running, ending = False, item
                        break
                    batch.append(item)
                    if len(batch) == _BATCH_SEGMENTS:
                        break
                    try:
                        item = segments.get_nowait()
                    except queue.Empty:
                        break
                yield from self._recognize(str(source), batch)
        finally:
            stopping.set()
            # A thread inside native code when the interpreter exits would abort the process.
            reader.join(_READER_EXIT_S)
            self.stats.wall_s += time.monotonic() - started
        if isinstance(ending, BaseException):
            raise ending

    def _read(
        self,
        source: str | Path,
        segments: queue.Queue[Segment | BaseException | None],
        stopping: threading.Event,
    ) -> None:
        segmenter = Segmenter(self._settings)
        ending: BaseException | None = None

        def put(item: Segment | BaseException | None) -> None:
            while not stopping.is_set():
                try:
                    segments.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        try:
            try:
                for block in stream_audio(source):
                    self.stats.audio_s += len(block) / SAMPLE_RATE
                    for segment in segmenter.feed(block):
                        put(segment)
                    if stopping.is_set():
                        return
            except MediaError as error:
                ending = error  # what came before it is still transcribed
            for segment in segmenter.finish():
                put(segment)
        except Exception as error:
            ending = error
        put(ending)

    def _recognize(self, source: str, batch: list[Segment]) -> Iterator[Transcript]:
        hypotheses = self._recognizer.transcribe([segment.samples for segment in batch])
        full = self._recognizer.speech.max_context_s
        for segment, hypothesis in zip(batch, hypotheses, strict=True):
            chosen = hypothesis
            reason = rejection(chosen, segment.end - segment.start)
            if reason is not None and chosen.context_s < full:
                # Short contexts are the commoner cause; the full one is what the model knows best.
                self.stats.repeated += 1
                chosen = self._recognizer.transcribe([segment.samples], context_s=full)[0]
                reason = rejection(chosen, segment.end - segment.start)
            if reason is not None:
                self.stats.rejected[reason] += 1
                logger.debug("%.1f s: rejected (%s): %s", segment.start, reason, chosen.text)
                continue
            self.stats.segments += 1
            yield _transcript(source, segment, chosen)


def load_monitor(
    model: str,
    *,
    language: str | None = None,
    context_s: float | None = None,
    settings: SegmenterSettings | None = None,
    runtime: RuntimeConfig | None = None,
) -> Monitor:
    """A monitor with a run folder's, checkpoint's, Hub or bundled model.

    `context_s` overrides the shortest context stored with the model (infinity: always the full).

    Raises:
        UserError: a model that cannot be used.
    """
    device = choose_device(runtime or RuntimeConfig())
    speech = load_recognizable(model, language=language)
    speech.model.to(device)
    budget = _BATCH_SEGMENTS * speech.max_context_s  # a batch is decoded in one go
    recognizer = Recognizer(
        speech, device=device, batch_seconds=budget, shortest_context_s=context_s
    )
    return Monitor(recognizer, settings)


def monitor(
    model: str,
    source: str | Path,
    *,
    language: str | None = None,
    settings: SegmenterSettings | None = None,
    runtime: RuntimeConfig | None = None,
) -> Iterator[Transcript]:
    """Transcripts of a recording, each as soon as it is recognised; see `load_monitor`."""
    runtime = runtime or RuntimeConfig()
    with use_runtime(runtime):
        loaded = load_monitor(model, language=language, settings=settings, runtime=runtime)
        yield from loaded.transcribe(source)


def _transcript(source: str, segment: Segment, hypothesis: Hypothesis) -> Transcript:
    return Transcript(
        source=source,
        start=round(segment.start, 3),
        end=round(segment.end, 3),
        text=hypothesis.text,
        avg_logprob=round(hypothesis.avg_logprob, 4),
        no_speech_prob=round(hypothesis.no_speech_prob, 4),
        compression_ratio=round(hypothesis.compression_ratio, 3),
        context_s=hypothesis.context_s,
    )
