"""What a monitor hands out and writes into its journal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Occurrence(StrEnum):
    """What happens to a source."""

    CONNECTED = "connected"
    GAP = "gap"
    """Audio is missing."""
    LOST = "lost"
    """No connection; once for attempts that fail alike. Of a folder: it is not there."""
    SILENT = "silent"
    """Digital silence for a minute."""
    UNREADABLE = "unreadable"
    """A file of a folder."""
    SKIPPED = "skipped"
    """Files of a folder whose suffixes are not those of recordings."""
    UNDATED = "undated"
    """A file of a folder whose date cannot be that of a recording."""
    NO_CLIP = "no clip"
    """What was around an alert could not be kept."""
    UNCLASSIFIED = "unclassified"
    """Sounds of a live source were not classified, for lack of time."""


class LineKind(StrEnum):
    """What else a line of the journal with an `event` is about."""

    REJECTED = "rejected"
    """A guard rejected what was recognised."""
    DROPPED = "dropped"
    """A segment was dropped because the queue was full."""
    ALERT = "alert"
    SOUND = "sound"
    SOUND_CLASS = "sound class"
    READING = "reading"
    """A file of a folder is being transcribed."""
    FILE = "file"
    """A file of a folder has been transcribed."""
    END = "end"
    """A source has ended."""
    CUT = "cut"
    """It broke off."""
    DELIVERED = "alert delivered"
    NOT_DELIVERED = "alert not delivered"


@dataclass(frozen=True)
class Transcript:
    """A line of a segment's text with the segment's scores; the fields of a JSON line."""

    source: str
    camera: str
    """Name of the source, short and unique."""
    id: str
    """Name of the segment, with a number for each line behind the first: the same whenever the same
    recording is decoded."""
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
    """Language it was decoded in; None for a model of one language."""
    words: list[dict[str, Any]] | None = None
    """Words with start and end, likewise in seconds, if asked for."""
    delay_s: float | None = None
    """Of a live source: seconds from the end of speech to its text; of a revised line, from the end
    of its turn."""
    revision: int = 0
    """Of a live source: 1 for a line that replaces the one of the same id, because
    decoding the whole turn gave other words; one without text removes it."""
    sentiment: str | None = None
    """The text's class, if a sentiment model was given."""
    sentiment_prob: float | None = None
    """Its probability."""


@dataclass(frozen=True)
class Partial:
    """What is being spoken at a live source: provisional, never in the journal."""

    camera: str
    id: str
    """The id that the segment will have."""
    start: float
    end: float
    """How far it was transcribed."""
    text: str


@dataclass(frozen=True)
class NoText:
    """A segment that gives no text, for the journal."""

    camera: str
    id: str
    start: float
    end: float
    reason: str
    event: LineKind = LineKind.REJECTED
    """That, or DROPPED."""
    text: str = ""
    """What was rejected: of several decodings the likeliest."""


@dataclass(frozen=True)
class Alert:
    """A keyword in a transcript."""

    camera: str
    keyword: str
    """The keyword, as it was given."""
    matched: str
    """The words of the transcript that matched it."""
    score: float
    """Similarity of the two, 1 for equal."""
    segment: str
    """The segment's id."""
    start: float
    end: float
    text: str
    clip: str | None = None
    """File that holds the moment, once the moment is over, if clips are kept."""
    event: LineKind = LineKind.ALERT
    rejected: str = ""
    """Why a guard rejected the text, if it did: the keyword is doubtful then."""

    @property
    def key(self) -> tuple[str, str]:
        """What distinguishes it from other alerts and sounds of its camera: segment and keyword."""
        return self.segment, self.keyword


@dataclass(frozen=True)
class Sound:
    """Something loud, whether it was speech or not."""

    camera: str
    id: str
    start: float
    """Seconds, as for segments."""
    end: float
    level_db: float
    """Of a quarter of a second, in dB of full scale."""
    background_db: float
    """Background level: median of the minute before, in dB of full scale."""
    clip: str | None = None
    """As for alerts."""
    event: LineKind = LineKind.SOUND

    @property
    def key(self) -> tuple[str, str]:
        """As for alerts: its id, and no keyword."""
        return self.id, ""


@dataclass(frozen=True)
class ClassifiedSound:
    """A sound of a class that is reported, once it is over."""

    camera: str
    id: str
    label: str
    """Its class."""
    start: float
    """Seconds, as for segments."""
    end: float
    probability: float
    """The highest while it lasted, smoothed over time."""
    clip: str | None = None
    """As for alerts."""
    event: LineKind = LineKind.SOUND_CLASS

    @property
    def key(self) -> tuple[str, str]:
        """As for loud sounds."""
        return self.id, ""


@dataclass(frozen=True)
class SourceEvent:
    """Something happened to a source."""

    camera: str
    event: Occurrence
    at: float
    """Seconds since 1970."""
    detail: str = ""


@dataclass(frozen=True)
class Delivery:
    """An alert has arrived where alerts are sent, or has not."""

    camera: str
    to: str
    """The name of the channel."""
    segment: str
    """Of the alert; of a loud sound its own id."""
    keyword: str = ""
    """Of the alert; empty for a sound."""
    failure: str = ""
    """Why it has not arrived."""

    def line(self) -> dict[str, Any]:
        """The journal's line."""
        event = LineKind.NOT_DELIVERED if self.failure else LineKind.DELIVERED
        line = {"camera": self.camera, "event": event, "to": self.to, "segment": self.segment}
        line |= {"keyword": self.keyword} if self.keyword else {}
        return line | ({"detail": self.failure} if self.failure else {})


@dataclass(frozen=True)
class Recording:
    """A file of a folder is being transcribed."""

    name: str
    """Its path in the folder."""
    inode: int
    of: str
    """Beginning of the ids of what is in it."""
    at: float
    """When it began: seconds since 1970."""
    size: int
    probe: str
    """Digest of its first bytes, behind what is written again at its end."""
    path: Path

    def line(self, camera: str) -> dict[str, Any]:
        """The journal's line: by it, what was transcribed of a file is found again."""
        line = {"camera": camera, "event": LineKind.READING, **asdict(self)}
        del line["path"]
        return line


@dataclass(frozen=True)
class FileDone:
    """A file as it was when it was transcribed; all its segments are in the journal."""

    name: str
    """Its path in the folder."""
    size: int
    mtime_ns: int
    inode: int
    seconds: float = 0.0
    """Seconds of audio that were decoded."""
    digest: str = ""
    """Of the samples."""
    hashed: int = 0
    """How many samples that is the digest of."""
    into: str = ""
    """The file that went on where it ended, if a segment reaches into it."""
    into_s: float = 0.0
    """How far, in seconds."""

    def line(self, camera: str) -> dict[str, Any]:
        """The journal's line."""
        return {"camera": camera, "event": LineKind.FILE, **asdict(self)}


@dataclass(frozen=True)
class FolderState:
    """What earlier sessions have transcribed of a folder."""

    done: dict[tuple[str, int], FileDone] = field(default_factory=dict)
    """Files that are done with, by name and inode."""
    begun: dict[tuple[str, int], tuple[float, int, str]] = field(default_factory=dict)
    """Of the others, seconds that were transcribed, and size and probe."""
    into: dict[str, float] = field(default_factory=dict)
    """Seconds of a file into which a segment of the one before it reaches."""


@dataclass(frozen=True)
class SourceEnd:
    """Nothing more will come from a source."""

    source: str
    camera: str
    error: Exception | None
    """Why it ended early; what came before is transcribed."""
    size: int | None = None
    """Bytes of a recording."""
    seconds: float = 0.0
    """Seconds of audio that were decoded."""

    def line(self) -> dict[str, Any]:
        """The journal's line: a recording that was decoded to its end, and has not grown since, is
        not transcribed again.
        """
        read = {"size": self.size, "seconds": self.seconds}
        if self.error is None:
            return {"camera": self.camera, "event": LineKind.END, **read}
        return {"camera": self.camera, "event": LineKind.CUT, **read, "detail": str(self.error)}


Raised = Alert | Sound | ClassifiedSound
"""What is sent to those who are to know."""
Item = Transcript | Partial | Raised | SourceEvent | SourceEnd
"""What a monitor hands out."""
Shown = Transcript | Partial | Raised
"""Of that, what is for those who follow a source."""


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """The monitor was asked to stop before the source ended."""


def segment_id(of: str, start: float) -> str:
    """Name of a segment of a camera or of one of its recordings: the same whenever the same
    recording is decoded with the same settings.
    """
    return f"{of}@{start:.3f}"


def recording_of(identity: str) -> str:
    """What the segment of this name is of."""
    return identity.rpartition("@")[0]


def line_id(identity: str, number: int) -> str:
    """Name of a line of a segment: the first has the segment's own."""
    return f"{identity}#{number}" if number else identity
