"""What a monitor tells: segments with their text, segments without, what happens to sources."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmtransfer.monitoring.lines import Line
from mmtransfer.monitoring.watch import Match, WatchList
from mmtransfer.speech.engine import Hypothesis, Word

# With the space before it; a character where words are not separated.
_WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")
_SPOKEN = re.compile(r"\w+(?:['’]\w+)*")
_SAME_ALERT_S = 1.0  # a word may move into the line before or behind
_DELAYS = 1000  # segments whose delays are kept, for their quantiles


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
    """Language that it was read in; None for a model of one language."""
    words: list[dict[str, Any]] | None = None
    """Words with start and end, likewise in seconds, if asked for."""
    delay_s: float | None = None
    """Of a live source: seconds from the end of speech until its text was there; of a revised line,
    from the end of its turn."""
    revision: int = 0
    """Of a live source: 1 for a line that replaces the one of the same id, because it reads
    differently in the context of its whole turn; one without text removes it."""
    sentiment: str | None = None
    """The text's class, if a sentiment model was given."""
    sentiment_prob: float | None = None
    """Its probability."""


@dataclass(frozen=True)
class Partial:
    """What is being said at a live source, before it ends: provisional, never in the journal."""

    camera: str
    id: str
    """The id that the segment will have."""
    start: float
    end: float
    """How far it was heard."""
    text: str
    confirmed: str
    """The beginning of the text that did not change since the last reading."""


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
    text: str = ""
    """What was rejected: of several decodings the likeliest."""


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
    clip: str | None = None
    """File that holds the moment, once the moment is over, if clips are kept."""
    event: str = "alert"
    rejected: str = ""
    """Why a guard rejected the text, if it did: the keyword is doubtful then."""


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
    usual_db: float
    """Median of the minute before."""
    clip: str | None = None
    """As for alerts."""
    event: str = "sound"


@dataclass(frozen=True)
class Recording:
    """A file of a folder is being read."""

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
        """The journal's line: by it, what was heard of a file is found again."""
        line = {"camera": camera, "event": "reading", **asdict(self)}
        del line["path"]
        return line


@dataclass(frozen=True)
class FileDone:
    """A file as it was when it was read, and all segments that began in it have been handed on."""

    name: str
    """Its path in the folder."""
    size: int
    mtime_ns: int
    inode: int
    seconds: float = 0.0
    """Audio that was read."""
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
        return {"camera": camera, "event": "file", **asdict(self)}

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> FileDone:
        """What a line of the journal says."""
        return cls(**{field.name: line[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class FolderState:
    """What an earlier session has read of a folder."""

    done: dict[tuple[str, int], FileDone] = field(default_factory=dict)
    """Files that are done with, by name and inode."""
    begun: dict[tuple[str, int], tuple[float, int, str]] = field(default_factory=dict)
    """Of the others, seconds that were heard, and size and probe."""
    into: dict[str, float] = field(default_factory=dict)
    """Seconds of a file into which a segment of the one before it reaches."""


@dataclass(frozen=True)
class SourceEnd:
    """Nothing more will come from a source."""

    source: str
    camera: str
    error: Exception | None
    """Why it ended before its time; what came before is transcribed."""
    size: int | None = None
    """Bytes of a recording."""
    seconds: float = 0.0
    """Audio that was read."""

    def line(self) -> dict[str, Any]:
        """The journal's line: a recording that was read to its end, and has not grown since, is not
        read again.
        """
        read = {"size": self.size, "seconds": self.seconds}
        if self.error is None:
            return {"camera": self.camera, "event": "end", **read}
        return {"camera": self.camera, "event": "cut", **read, "detail": str(self.error)}


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """The monitor was asked to stop before the source ended."""


@dataclass
class CameraStats:
    """What happened to one source; each number has one thread that writes it."""

    audio_s: float = 0.0
    """Audio read."""
    decode_s: float = 0.0
    """Time of the recogniser's workers."""
    segments: int = 0
    """Segments with text."""
    lines: int = 0
    """Lines of text, revised ones not counted again."""
    revised: int = 0
    """Lines of a live source that were replaced when their turn was over."""
    not_revised: int = 0
    """Turns that there was no time to decode as a whole; their lines stay as they are."""
    repeated: int = 0
    """Segments decoded again in longer contexts or in halves, because a guard objected."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Segments, and halves of windows, without text, by reason."""
    dropped: int = 0
    """Segments for which there was no room to wait."""
    waiting: int = 0
    """Segments cut, and not read yet."""
    alerts: int = 0
    """Watch words that were said, and loud sounds."""
    is_connected: bool = False
    """Of a live source, whether audio comes."""
    last_text: str = ""
    events: Counter[str] = field(default_factory=Counter)
    """What happened to a live source: connected, gap, lost."""
    delays_s: deque[float] = field(default_factory=lambda: deque(maxlen=_DELAYS))
    """Of a live source's last segments: from the end of speech to its text."""

    @property
    def real_time_factor(self) -> float:
        """Recognition time over audio time."""
        return self.decode_s / self.audio_s if self.audio_s else 0.0

    @property
    def reconnects(self) -> int:
        """Connections after the first."""
        return max(0, self.events["connected"] - 1)

    def delay_s(self, quantile: float) -> float:
        """A quantile of the last segments' delays, 0 where there is none."""
        delays = sorted(self.delays_s)
        return delays[min(len(delays) - 1, int(quantile * len(delays)))] if delays else 0.0


class MonitorStats:
    """What a monitor did: for each source, and in sum."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cameras: dict[str, CameraStats] = {}

    def add_cameras(self, names: Iterable[str]) -> None:
        """Count for these sources as well."""
        self.cameras = {name: CameraStats() for name in names} | self.cameras

    @property
    def segments(self) -> int:
        """Segments with text."""
        return sum(camera.segments for camera in self.cameras.values())

    @property
    def audio_s(self) -> float:
        """Audio read."""
        return sum(camera.audio_s for camera in self.cameras.values())

    @property
    def lines(self) -> int:
        """Lines of text."""
        return sum(camera.lines for camera in self.cameras.values())

    @property
    def revised(self) -> int:
        """Lines that were replaced when their turn was over."""
        return sum(camera.revised for camera in self.cameras.values())

    @property
    def not_revised(self) -> int:
        """Turns that there was no time to decode as a whole."""
        return sum(camera.not_revised for camera in self.cameras.values())

    @property
    def repeated(self) -> int:
        """Segments decoded again in longer contexts."""
        return sum(camera.repeated for camera in self.cameras.values())

    @property
    def rejected(self) -> Counter[str]:
        """Segments without text, by reason."""
        return sum((camera.rejected for camera in self.cameras.values()), Counter())

    @property
    def dropped(self) -> int:
        """Segments for which there was no room to wait."""
        return sum(camera.dropped for camera in self.cameras.values())

    @property
    def events(self) -> Counter[str]:
        """What happened to live sources."""
        return sum((camera.events for camera in self.cameras.values()), Counter())

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.wall_s / self.audio_s if self.audio_s else 0.0


def segment_id(of: str, start: float) -> str:
    """Name of a segment of a camera or of one of its recordings: the same whenever the same
    recording is read with the same settings.
    """
    return f"{of}@{start:.3f}"


def recording_of(identity: str) -> str:
    """What the segment of this name is of."""
    return identity.rpartition("@")[0]


def agreed_beginning(one: str, other: str) -> str:
    """The words with which both texts begin. What two readings in a row agree on will hardly change
    (local agreement, Liu et al. 2020).
    """
    words = [_WORD.findall(text) for text in (one, other)]
    count = 0
    for a, b in zip(*words, strict=False):
        if a != b:
            break
        count += 1
    return "".join(words[1][:count]).strip()


def line_id(identity: str, number: int) -> str:
    """Name of a line of a segment: the first has the segment's own."""
    return f"{identity}#{number}" if number else identity


def transcripts(
    source: str,
    camera: str,
    identity: str,
    hypothesis: Hypothesis,
    lines: Sequence[Line],
    *,
    with_words: bool = False,
) -> list[Transcript]:
    """A segment's lines of text, with the scores of the whole."""
    return [
        Transcript(
            source=source,
            camera=camera,
            id=line_id(identity, number),
            start=round(line.start, 3),
            end=round(line.end, 3),
            text=line.text,
            avg_logprob=round(hypothesis.avg_logprob, 4),
            no_speech_prob=round(hypothesis.no_speech_prob, 4),
            compression_ratio=round(hypothesis.compression_ratio, 3),
            context_s=hypothesis.context_s,
            language=hypothesis.language,
            words=[_word(word) for word in line.words] if with_words and line.words else None,
        )
        for number, line in enumerate(lines)
    ]


def revised(lines: Sequence[Transcript], found: Sequence[Transcript]) -> list[Transcript]:
    """The lines of a segment that read differently in `found`, with ids of the first; those that
    `found` has no text for are empty. Case and punctuation alone make no difference.
    """
    if _spoken(lines) == _spoken(found):
        return []
    changed = [
        replace(new, id=old.id, revision=old.revision + 1)
        for old, new in zip(lines, found, strict=False)
        if _spoken([old]) != _spoken([new])
    ]
    more = [replace(new, revision=1) for new in found[len(lines) :]]
    gone = [
        replace(old, text="", words=None, revision=old.revision + 1) for old in lines[len(found) :]
    ]
    return [*changed, *more, *gone]


def _spoken(lines: Iterable[Transcript]) -> list[str]:
    return _SPOKEN.findall(" ".join(line.text for line in lines).casefold())


def _word(word: Word) -> dict[str, Any]:
    return {
        "text": word.text,
        "start": word.start_s,
        "end": word.end_s,
        "probability": word.probability,
    }


def alerts(found: Sequence[Transcript | NoText], watched: WatchList) -> list[Alert]:
    """The keywords in a segment's lines, those that begin in one line and end in the next, and
    those in what was rejected.
    """
    lines = [line for line in found if isinstance(line, Transcript)]
    heard: list[tuple[Transcript | NoText, list[Match]]] = [
        *zip(lines, _matches(lines, watched), strict=True)
    ]
    heard += [(line, watched.find(line.text)) for line in found if isinstance(line, NoText)]
    return [
        Alert(
            line.camera,
            match.phrase,
            match.said,
            match.score,
            line.id,
            line.start,
            line.end,
            line.text,
            rejected=line.reason if isinstance(line, NoText) else "",
        )
        for line, matches in heard
        for match in matches
    ]


def new_alerts(
    lines: Sequence[Transcript], before: Sequence[Transcript], watched: WatchList
) -> list[Alert]:
    """The keywords in a turn's lines that were in none of the lines at that time before."""
    known = alerts(before, watched)
    return [
        alert
        for alert in alerts(lines, watched)
        if not any(
            other.phrase == alert.phrase
            and other.start <= alert.end + _SAME_ALERT_S
            and alert.start <= other.end + _SAME_ALERT_S
            for other in known
        )
    ]


def _matches(lines: Sequence[Transcript], watched: WatchList) -> list[list[Match]]:
    own = [watched.find(line.text) for line in lines]
    for number, (line, after) in enumerate(pairwise(lines)):
        known = {match.phrase for match in (*own[number], *own[number + 1])}
        both = watched.find(f"{line.text} {after.text}")
        own[number] += [match for match in both if match.phrase not in known]
    return own
