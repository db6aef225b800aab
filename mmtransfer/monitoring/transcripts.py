"""What a monitor tells: segments with their text, segments without, what happens to sources."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mmtransfer.decoding import Hypothesis
from mmtransfer.monitoring.watch import WatchList
from mmtransfer.segments import Segment


@dataclass(frozen=True)
class Transcript:
    """A segment's text with its scores; the fields of a JSON line."""

    source: str
    camera: str
    """Name of the source, short and unique."""
    id: str
    """Name of the segment: the same whenever the same recording is read."""
    start: float
    """Where speech starts: seconds into the recording, or since 1970 for a live source."""
    end: float
    """Where speech ends, likewise."""
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
    """Words with start and end, likewise in seconds, if asked for."""


@dataclass(frozen=True)
class NoText:
    """A segment that gives no text, for the journal."""

    camera: str
    id: str
    start: float
    end: float
    reason: str
    event: str = "no text"
    """no text: a guard rejected what was recognised. dropped: there was no room to wait."""


@dataclass(frozen=True)
class Alert:
    """Something that a watcher wants to know."""

    camera: str
    phrase: str
    """The watch word or phrase."""
    said: str
    """The words that were taken for it."""
    score: float
    """Similarity of the two, 1 for equal."""
    segment: str
    """The segment's id."""
    start: float
    end: float
    text: str
    event: str = "alert"


@dataclass(frozen=True)
class SourceEnd:
    """Nothing more will come from a source."""

    source: str
    camera: str
    error: Exception | None
    """Why it ended before its time; what came before is transcribed."""

    def line(self) -> dict[str, Any]:
        """The journal's line: only a recording that was read to its end is not read again."""
        if self.error is None:
            return {"camera": self.camera, "event": "end"}
        return {"camera": self.camera, "event": "cut", "detail": str(self.error)}


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """The monitor was asked to stop before the source ended."""


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
    dropped: int = 0
    """Segments for which there was no room to wait."""
    events: Counter[str] = field(default_factory=Counter)
    """What happened to live sources: connected, gap, lost."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_audio(self, seconds: float) -> None:
        """Count audio; from any source's thread."""
        with self._lock:
            self.audio_s += seconds

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.wall_s / self.audio_s if self.audio_s else 0.0


def segment_id(camera: str, start: float) -> str:
    """Name of a segment: the same whenever the same recording is read with the same settings."""
    return f"{camera}@{start:.3f}"


def transcript(source: str, camera: str, segment: Segment, hypothesis: Hypothesis) -> Transcript:
    """A segment with what it was recognised as."""
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


def alerts(found: Transcript, watched: WatchList) -> list[Alert]:
    """The watch words in a segment."""
    return [
        Alert(
            found.camera,
            match.phrase,
            match.said,
            match.score,
            found.id,
            found.start,
            found.end,
            found.text,
        )
        for match in watched.find(found.text)
    ]
