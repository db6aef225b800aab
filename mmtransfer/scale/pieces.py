"""Recordings as pieces of speech: decoded, cut at silences as `monitor` cuts them, and packed so
that a piece is work of its own for whoever transcribes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mmtransfer.monitoring.events import ClassifiedSound, segment_id
from mmtransfer.monitoring.sound_events import RecordingSounds, SoundClasses
from mmtransfer.scale.sources import BulkFile, Group
from mmtransfer.scale.storage import fetched, problem
from mmtransfer.speech.audio import SAMPLE_RATE, MediaError, check_file, stream_audio
from mmtransfer.speech.segments import Segment, Segmenter, SegmenterSettings, WindowSegmenter

PIECE_S = 240.0
"""Speech in a piece: full batches of several contexts, and little to do again after a kill."""
_DIGITS = 16  # of a digest, in ids and names


@dataclass(frozen=True)
class Spoken:
    """A stretch of speech of one file."""

    file: int
    """Number in its group."""
    id: str
    """Digest of the file's content, and where it starts."""
    segment: Segment


@dataclass(frozen=True)
class Piece:
    """Speech that is transcribed together: what is in it depends on its group alone."""

    number: int
    spoken: tuple[Spoken, ...]

    @property
    def name(self) -> str:
        """Its number, and a digest of what is in it: cut again, a group whose audio is no longer
        the same has other pieces.
        """
        parts = [(spoken.file, spoken.id, spoken.segment.end) for spoken in self.spoken]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"{self.number:06d}-{digest[:_DIGITS]}"


@dataclass(frozen=True)
class FileEnd:
    """A file has been decoded."""

    file: int
    """Number in its group."""
    digest: str = ""
    """SHA-256 of its content."""
    seconds: float = 0.0
    """Audio in it."""
    error: str = ""
    """Why nothing, or not all of it, could be used."""
    sounds: tuple[ClassifiedSound, ...] = ()
    """Classified sounds, where they are asked for."""


def cut(
    group: Group, window_s: float, sounds: SoundClasses | None = None
) -> Iterator[Piece | FileEnd]:
    """The speech of a group's files in pieces, and how each file ended; in bounded memory.

    A file that cannot be used is an end with an error. `window_s` as `Engine.window_s`; with
    `sounds` an end has those of its file.
    """
    waiting: list[Spoken] = []
    samples = number = 0
    for place, file in enumerate(group.files):
        for found in _file(place, file, window_s, sounds):
            if isinstance(found, FileEnd):
                yield found
                continue
            waiting.append(found)
            samples += len(found.segment.samples)
            if samples >= PIECE_S * SAMPLE_RATE:
                yield Piece(number, tuple(waiting))
                waiting, samples, number = [], 0, number + 1
    if waiting:
        yield Piece(number, tuple(waiting))


def _file(
    place: int, file: BulkFile, window_s: float, classes: SoundClasses | None
) -> Iterator[Spoken | FileEnd]:
    digest, seconds, error = "", 0.0, ""
    found: list[ClassifiedSound] = []
    try:
        with fetched(file.address) as path:
            if path.is_file():
                with path.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
            segmenter = _segmenter(window_s)
            sounds = RecordingSounds(classes, file.name, digest[:_DIGITS]) if classes else None
            try:
                check_file(path)
                for block in stream_audio(path):
                    found += sounds.feed(block, seconds) if sounds else ()
                    seconds += len(block) / SAMPLE_RATE
                    for segment in segmenter.feed(block):
                        yield _spoken(place, digest, segment)
            except MediaError as reason:  # what came before is transcribed
                error = re.sub("^file:", lambda _: f"{file.shown}:", str(reason))
            found += sounds.finish() if sounds else ()
            for segment in segmenter.finish():
                yield _spoken(place, digest, segment)
    except OSError as reason:
        error = f"{file.shown}: {problem(reason, file.address)}."
    yield FileEnd(place, digest, round(seconds, 3), error, tuple(found))


def _segmenter(window_s: float) -> Segmenter | WindowSegmenter:
    settings = SegmenterSettings()
    return WindowSegmenter(settings, window_s) if window_s else Segmenter(settings)


def _spoken(place: int, digest: str, segment: Segment) -> Spoken:
    return Spoken(place, segment_id(digest[:_DIGITS], segment.start), segment)
