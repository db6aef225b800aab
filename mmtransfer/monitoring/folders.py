"""Folders that recordings are written to: which files are complete, what of them is unread, and
which follow each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmtransfer.audio import (
    AUDIO_SUFFIXES,
    SAMPLE_RATE,
    MediaError,
    length_s,
    open_media,
    stream_audio,
)
from mmtransfer.monitoring.cameras import printable
from mmtransfer.monitoring.live import SourceEvent
from mmtransfer.monitoring.readers import Reader, moved
from mmtransfer.monitoring.transcripts import FileDone, Recording
from mmtransfer.segments import Segment, Segmenter

_SETTLED_S = 10.0  # a file that has not changed for so long is complete
_LOOK_S = 1.0  # how often a folder is looked at
_JOINED_S = 1.0  # files this close follow each other without a gap
_PATIENCE_S = 60.0  # beyond twice a file's length, how long the next one of its series may take
_BEGINNING = 10 * SAMPLE_RATE  # samples that tell a recording from another of the same name
_EDGE = SAMPLE_RATE // 2  # the last samples of a file change when it grows
MEDIA_SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".avi", ".webm", ".ts", ".flv", ".mpg"),
    *AUDIO_SUFFIXES,
)
"""Files of a folder that are read."""


@dataclass(frozen=True)
class Unread:
    """A file that is complete, and was not read as it is now."""

    path: Path
    name: str
    before: FileDone | None = None
    """What was read under its name, or of it under another name."""


class Beginning:
    """The first samples of a recording, by which it is known again when it has grown."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._kept = self._all = 0

    def feed(self, samples: np.ndarray) -> None:
        """The next samples."""
        self._all += len(samples)
        if self._kept < _BEGINNING:
            self._blocks.append(samples[: _BEGINNING - self._kept])
            self._kept += len(self._blocks[-1])

    def digest(self) -> tuple[str, int]:
        """Digest, and of how many samples."""
        count = max(0, min(self._kept, self._all - _EDGE))
        return _digest(self._blocks, count), count


def _digest(blocks: Iterable[np.ndarray], count: int) -> str:
    """Of the first `count` samples; empty if there are fewer, or none are asked for."""
    made, left = hashlib.sha256(), count
    for block in blocks:
        if not left:
            break
        made.update(block[:left].tobytes())
        left -= min(left, len(block))
    return made.hexdigest()[:16] if count and not left else ""


def begins_alike(path: Path, before: FileDone) -> bool:
    """Whether a file begins like one that was read, so that it has only grown since.

    Raises:
        MediaError: the file cannot be read.
    """
    blocks = stream_audio(path) if before.hashed else iter(())
    return _digest(blocks, before.hashed) == before.beginning


def recorded_at(path: Path) -> float:
    """When a recording began, in seconds since 1970: when it was complete, less its length.

    Raises:
        MediaError: the file cannot be read.
    """
    with open_media(path) as container:
        return path.stat().st_mtime - (length_s(container) or 0.0)


def series(name: str) -> str:
    """What the names of recordings have in common that may follow each other: all but digits."""
    return re.sub(r"\d+", "#", name)


def differing_numbers(one: str, other: str) -> tuple[int, int]:
    """How far apart two names of a series are: how many numbers differ, and how far to the left
    (what counts the recordings of a camera stands behind what names the camera).
    """
    pairs = list(zip(re.findall(r"\d+", one), re.findall(r"\d+", other), strict=True))
    differ = [place for place, (a, b) in enumerate(pairs) if a != b]
    return len(differ), -differ[0] if differ else 0


class Folder:
    """Watches a folder and its subfolders.

    A file is complete when it has not changed for ten seconds: seen from here, or by its own time.
    It is known again by name, or under a new name by its inode; if it has changed since it was
    read, it is there to be read again.
    """

    def __init__(self, path: Path, done: Iterable[FileDone] = ()):
        self.path = path
        self.writing: set[str] = set()
        """Series of which a file is being written."""
        self._by_name: dict[str, FileDone] = {}
        self._by_inode: dict[int, FileDone] = {}
        self._changing: dict[str, tuple[tuple[int, int], float]] = {}  # version, since when
        for one in done:
            self.add(one)

    def add(self, done: FileDone) -> None:
        """A file has been read."""
        self._by_name[done.name] = self._by_inode[done.inode] = done

    def look(self) -> list[Unread]:
        """What is complete and unread, in the order of the last change."""
        now, today = time.monotonic(), time.time()
        found: list[tuple[int, str, Unread]] = []
        changing: dict[str, tuple[tuple[int, int], float]] = {}
        self.writing = set()
        for path in self.path.rglob("*"):
            if path.suffix.lower() not in MEDIA_SUFFIXES:
                continue
            try:
                state = path.stat()
            except OSError:  # old recordings are deleted meanwhile
                continue
            if not stat.S_ISREG(state.st_mode):
                continue
            name = printable(path.relative_to(self.path).as_posix())
            before = self._by_name.get(name) or self._by_inode.get(state.st_ino)
            version = (state.st_size, state.st_mtime_ns)
            if before is not None and version == (before.size, before.mtime_ns):
                continue
            known, since = self._changing.get(name, (None, 0.0))
            if known is None:  # a time in the future says nothing
                since = now - max(0.0, today - state.st_mtime)
            elif known != version:
                since = now
            changing[name] = (version, since)
            if now - since < _SETTLED_S:
                self.writing.add(series(name))
            else:
                found.append((state.st_mtime_ns, name, Unread(path, name, before)))
        self._changing = changing
        return [unread for _, _, unread in sorted(found, key=lambda one: one[:2])]


@dataclass
class _Part:
    """A recording in a chain."""

    of: str
    """Beginning of its segments' ids."""
    begins: float
    """Seconds of the chain before it."""
    at: float
    """When it was recorded: seconds since 1970."""
    done: FileDone | None = None
    """Once it has been read."""


class _Chain:
    """Recordings that follow each other without a gap, read as one.

    Each keeps its own times: a segment's are those of the recording that it began in, whichever
    recording a session starts with.
    """

    def __init__(self, reader: Reader):
        self._reader, self._segmenter = reader, Segmenter(reader.settings)
        self._sound = reader.sound_level()
        self._parts: deque[_Part] = deque()  # whose segments have not all been handed on
        self._length = 0.0  # seconds of all that was fed
        # Of the last recording: its name, its seconds, when it ended, when it had been read.
        self._name, self._file_s, self._end, self._read_at = "", 0.0, 0.0, 0.0

    def follows(self, name: str, at: float, known_s: float) -> bool:
        """Whether this goes on where the last one ended; `known_s` of it have been read."""
        if known_s:
            return name == self._name and abs(known_s - self._file_s) < 0.001
        return series(name) == series(self._name) and abs(at - self._end) < _JOINED_S

    def distance(self, name: str) -> tuple[int, int]:
        """How different a name is from that of the last recording."""
        return differing_numbers(name, self._name)

    def may_go_on(self, folder: Folder) -> bool:
        """Whether a file is being written that may be the next one."""
        waited = time.monotonic() - self._read_at
        return series(self._name) in folder.writing and waited < 2 * self._file_s + _PATIENCE_S

    def begin(self, name: str, part: _Part, known_s: float) -> None:
        """The next recording."""
        part.begins = self._length
        self._parts.append(part)
        self._name, self._file_s, self._end = name, known_s, part.at

    def feed(self, samples: np.ndarray) -> None:
        """Audio of it."""
        self._reader.hear(samples, self._end, self._sound, self._parts[-1].of)
        seconds = len(samples) / SAMPLE_RATE
        self._length += seconds
        self._file_s += seconds
        self._end += seconds
        for segment in self._segmenter.feed(samples):
            self._put(segment)

    def end(self, done: FileDone) -> None:
        """It has been read."""
        self._parts[-1].done, self._read_at = done, time.monotonic()
        running = self._segmenter.running()
        if running is not None:
            self._tell_done(running[0].start)
        elif self._segmenter.is_idle:
            self._tell_done(self._segmenter.scored_s)

    def finish(self) -> None:
        """Nothing follows."""
        for segment in self._segmenter.finish():
            self._put(segment)
        self._tell_done(self._length)

    def _put(self, segment: Segment) -> None:
        part = next((p for p in reversed(self._parts) if p.begins <= segment.start), self._parts[0])
        self._reader.put(moved(segment, part.at - part.begins), part.of)

    def _tell_done(self, until: float) -> None:
        """Tell of the recordings that end by then."""
        while self._parts and self._parts[0].done is not None:
            ends = self._parts[1].begins if len(self._parts) > 1 else self._length
            if ends > until:
                return
            self._reader.tell(self._parts.popleft().done)


def is_folder(source: str) -> bool:
    """Whether a source is a folder that recordings are written to."""
    return "://" not in source and Path(source).is_dir()


def read_folder(reader: Reader) -> None:
    """Read the recordings in a folder in the order they were written, and wait for more.

    A recording lies where it was written, so nothing is dropped: it waits there. One that is still
    being written is left until it is complete; one that grows later is read on. Those that follow
    each other are read as one.
    """
    folder, is_there = Folder(Path(reader.source), reader.files_done), True
    chains: list[_Chain] = []
    while not reader.stopping.is_set():
        looked = time.monotonic()
        if folder.path.is_dir() != is_there:  # a disk that was unmounted
            is_there = not is_there
            event = ("connected", "") if is_there else ("lost", "the folder is not there")
            reader.tell(SourceEvent(reader.name, event[0], reader.clock(), event[1]))
        found = folder.look()
        for unread in found:
            folder.add(_read_file(reader, unread, chains))
            if reader.stopping.is_set():  # what is running is read again in the next session
                return
        if found:
            continue
        for chain in [chain for chain in chains if not chain.may_go_on(folder)]:
            chain.finish()
            chains.remove(chain)
        took = time.monotonic() - looked  # months of recordings take a while to list
        reader.stopping.wait(max(_LOOK_S, 10 * took))


def _read_file(reader: Reader, unread: Unread, chains: list[_Chain]) -> FileDone:
    """Read what is new in a file, as part of the chain that it follows or of a new one."""
    path, name, before = unread.path, unread.name, unread.before
    # As it is now: if it changes while it is read, it will be read on.
    done = FileDone(name, *_state(path))
    chain: _Chain | None = None
    beginning, seconds = Beginning(), 0.0
    try:
        at = recorded_at(path)
        is_known = before is not None and begins_alike(path, before)
        known_s = before.seconds if before is not None and is_known else 0.0
        # Another recording under a known name, and what was added to one, has ids of its own.
        is_new = before is None or not (is_known or before.name == name)
        of = f"{reader.name}/{name}" if is_new else f"{reader.name}/{name}~{done.mtime_ns:x}"
        following = [one for one in chains if one.follows(name, at, known_s)]
        chain = min(following, key=lambda one: one.distance(name), default=None)
        if chain is None:
            chain = _Chain(reader)
            chains.append(chain)
        reader.tell(Recording(of, path, at))
        chain.begin(name, _Part(of, 0.0, at + known_s), known_s)
        for block in stream_audio(path):
            beginning.feed(block)
            seconds += len(block) / SAMPLE_RATE
            fresh = round((seconds - known_s) * SAMPLE_RATE)
            if fresh > 0:
                chain.feed(block[-fresh:])
            if reader.stopping.is_set():
                return done
    except (MediaError, OSError) as error:  # the other files are read all the same
        why = printable(str(error))
        reader.tell(SourceEvent(reader.name, "unreadable", reader.clock(), why))
        if not seconds and before is not None:  # once it is whole again it may be read on
            known = (before.seconds, before.beginning, before.hashed)
            done = FileDone(name, done.size, done.mtime_ns, done.inode, *known)
    if seconds:
        digest, hashed = beginning.digest()
        done = replace(done, seconds=seconds, beginning=digest, hashed=hashed)
    if chain is None:
        reader.tell(done)
    else:
        chain.end(done)
    return done


def _state(path: Path) -> tuple[int, int, int]:
    """Size, time and inode; zeros for a file that was deleted since it was found."""
    try:
        state = os.stat(path)
    except OSError:
        return 0, 0, 0
    return state.st_size, state.st_mtime_ns, state.st_ino
