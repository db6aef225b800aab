"""Folders that recordings are written to: which files are complete, what of them is unread, and
which follow each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmtransfer.data.printing import printable
from mmtransfer.monitoring.events import FileDone, Occurrence, Recording, SourceEvent
from mmtransfer.monitoring.journal.files import EPOCH_S
from mmtransfer.monitoring.sources.cameras import same_form
from mmtransfer.monitoring.sources.readers import Reader
from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    MediaError,
    MissingChannelError,
    beginning_digest,
    recording_length_s,
    stream_audio,
)
from mmtransfer.speech.recordings import is_recording, is_visible
from mmtransfer.speech.segments import Segment

_SETTLED_S = 10.0  # a file that has not changed for so long is complete
_LOOK_S = 1.0  # how often a folder is looked at
_JOINED_S = 1.0  # files this close follow each other without a gap
_PATIENCE_S = 60.0  # beyond twice a file's length, how long the next one of its series may take
_PROBE_BYTES = 1 << 22  # that show whether a file is still what it was
_EDGE = SAMPLE_RATE // 2  # the last samples of a file change when it grows


@dataclass(frozen=True)
class Unread:
    """A file that is complete, and was not read as it is now."""

    path: Path
    name: str
    before: tuple[FileDone, ...] = ()
    """What was read under its name, or of it under another name, if it is the same file."""


class _Digest:
    """Of the audio of a file, by which it is known again when it has grown."""

    def __init__(self) -> None:
        self._made, self._left = hashlib.sha256(), np.zeros(0, np.float32)
        self._count = 0

    def feed(self, samples: np.ndarray) -> None:
        """The next samples."""
        joined = np.concatenate([self._left, samples])
        ready = max(0, len(joined) - _EDGE)
        self._made.update(joined[:ready].tobytes())
        self._left = joined[ready:]
        self._count += ready

    def result(self) -> tuple[str, int]:
        """Digest, and of how many samples."""
        return self._made.hexdigest()[:16], self._count


def goes_on(path: Path, before: FileDone, channel: int | None = None) -> bool:
    """Whether a file holds all that was read of another, so that it is the same and has grown.

    Raises:
        MediaError: the file cannot be read.
    """
    made, left = hashlib.sha256(), before.hashed
    if left:
        for block in stream_audio(path, channel=channel):
            made.update(block[:left].tobytes())
            left -= min(left, len(block))
            if not left:
                break
    return not left and (not before.hashed or made.hexdigest()[:16] == before.digest)


def recorded_at(path: Path) -> float:
    """When a recording began, in seconds since 1970: when it was complete, less its length. Of one
    dated before there are such times (by a clock that was never set): when it came here.

    Raises:
        MediaError: the file cannot be read.
    """
    state, length_s = path.stat(), recording_length_s(path) or 0.0
    # That of its last change stays, so that what is read on keeps its times.
    ends = (state.st_mtime, state.st_ctime, time.time())
    return next((end for end in ends if end - length_s > EPOCH_S), ends[-1]) - length_s


def series(name: str) -> str:
    """What the names of recordings have in common that may follow each other: all but digits."""
    return re.sub(r"\d+", "\0", name)  # which is in no file's name


def follows(name: str, last: str) -> int:
    """Whether a name of the same series comes after another: the first number that differs is
    greater, and those behind it begin again (a counter, a date, a time). Returns how many numbers
    differ, 0 if it does not come after.
    """
    if series(name) != series(last):
        return 0
    pairs = zip(re.findall(r"\d+", name), re.findall(r"\d+", last), strict=True)
    differ = [(int(new), int(old)) for new, old in pairs if int(new) != int(old)]
    if not differ:
        return 0
    (new, old), *behind = differ
    return len(differ) if new > old and all(a < b for a, b in behind) else 0


class Folder:
    """Watches a folder and its subfolders.

    A file is complete when it has not changed for ten seconds: seen from here, or by its own time.
    It is known again by name, or under a new name by its inode; if it has changed since it was
    read, it is there to be read again.
    """

    def __init__(self, path: Path, done: Iterable[FileDone] = ()):
        self.path = path
        self.is_there = True
        """Whether it could be listed when it was last looked at."""
        self.writing: set[str] = set()
        """Series of which a file is being written."""
        self.others: Counter[str] = Counter()
        """Files that are no recordings by their ending, counted by it. Hidden files and what
        systems put beside files (`._gate.mp4`) are not even that.
        """
        self._by_name: dict[str, FileDone] = {}
        self._by_inode: dict[int, FileDone] = {}
        self._changing: dict[str, tuple[tuple[int, int], float]] = {}  # version, since when
        for one in done:
            self.add(one)

    def add(self, done: FileDone) -> None:
        """A file has been read."""
        self._by_name[same_form(done.name)] = self._by_inode[done.inode] = done

    def look(self) -> list[Unread]:
        """What is complete and unread, in the order of the last change."""
        now, today = time.monotonic(), time.time()
        found: list[tuple[int, str, Unread]] = []
        changing: dict[str, tuple[tuple[int, int], float]] = {}
        self.is_there, self.writing, self.others = True, set(), Counter()

        def failed(error: OSError) -> None:  # a subfolder was deleted meanwhile, or a share fails
            if error.filename == str(self.path):
                self.is_there = False

        walked = os.walk(self.path, onerror=failed)
        for path in (Path(folder, name) for folder, _, names in walked for name in names):
            if not is_visible(path, self.path):
                continue
            if not is_recording(path):
                if os.path.isfile(path):  # False where it cannot be told
                    self.others[path.suffix.lower()] += 1
                continue
            try:
                state = path.stat()
            except OSError:  # old recordings are deleted meanwhile
                continue
            if not stat.S_ISREG(state.st_mode):
                continue
            name = same_form(printable(path.relative_to(self.path).as_posix()))
            known = (self._by_inode.get(state.st_ino), self._by_name.get(name))
            before = tuple(dict.fromkeys(one for one in known if one is not None))
            version = (state.st_size, state.st_mtime_ns)
            if any(version == (one.size, one.mtime_ns) for one in before):
                continue
            last, since = self._changing.get(str(path), (None, 0.0))
            if last is None:  # a time in the future says nothing
                since = now - max(0.0, today - state.st_mtime)
            elif last != version:
                since = now
            changing[str(path)] = (version, since)
            if now - since < _SETTLED_S:
                self.writing.add(series(name))
            else:
                found.append((state.st_mtime_ns, name, Unread(path, name, before)))
        self._changing = changing
        return [unread for _, _, unread in sorted(found, key=lambda one: one[:2])]


@dataclass
class _Part:
    """A recording in a chain."""

    name: str
    of: str
    """Beginning of its segments' ids."""
    at: float
    """When it began: seconds since 1970."""
    known_s: float
    """Seconds of it that were decoded before."""
    begins: float = 0.0
    """Seconds of the chain before what is new in it."""
    done: FileDone | None = None
    """Once it has been read."""


class _Chain:
    """Recordings that follow each other without a gap, read as one.

    Each keeps its own times: a segment's are those of the recording that it began in, whichever
    recording a session starts with.
    """

    def __init__(self, reader: Reader):
        self._reader, self._segmenter = reader, reader.segmenter()
        self._sound = reader.sound_level()
        self._parts: deque[_Part] = deque()  # whose segments have not all been handed on
        self._length = self._handed_on = 0.0  # seconds of all that was fed; end of the last segment
        self.decoded_s = 0.0
        """Seconds of the next recording that were decoded before."""
        # Of the last recording: its name, its seconds, when it ended, when it had been read.
        self._name, self._file_s, self.end_at, self._read_at = "", 0.0, 0.0, 0.0

    def follows(self, name: str, at: float, known_s: float) -> int:
        """Whether this goes on where the last one ended, `known_s` of it having been read; if it
        does, how different its name is.
        """
        if known_s and name == self._name:
            return int(abs(known_s - self._file_s) < 0.001)
        return follows(name, self._name) if abs(at - self.end_at) < _JOINED_S else 0

    def may_go_on(self, pending: set[str], until: float | None = None) -> bool:
        """Whether the next recording may still come: one of its series is unread or is being
        written, and not too much time has passed (`until`: that was recorded meanwhile).
        """
        waited = time.monotonic() - self._read_at if until is None else until - self.end_at
        return series(self._name) in pending and waited < 2 * self._file_s + _PATIENCE_S

    def begin(self, part: _Part) -> None:
        """The next recording."""
        part.begins = self._length
        self._parts.append(part)
        self._name, self._file_s = part.name, part.known_s
        self.end_at, self.decoded_s = part.at + part.known_s, 0.0

    def feed(self, samples: np.ndarray) -> None:
        """Audio of it."""
        self._reader.hear(samples, self.end_at, self._sound, self._parts[-1].of)
        seconds = len(samples) / SAMPLE_RATE
        self._length += seconds
        self._file_s += seconds
        self.end_at += seconds
        for segment in self._segmenter.feed(samples):
            self._put(segment)

    def end(self, done: FileDone) -> None:
        """It has been read."""
        part = self._parts[-1]
        part.done, self._read_at = done, time.monotonic()
        self.decoded_s = max(0.0, part.known_s - done.seconds)
        self._file_s, self.end_at = done.seconds, part.at + done.seconds
        running_s = self._segmenter.running_s
        if running_s is not None:
            self._report_done(running_s)
        elif self._segmenter.is_idle:
            self._report_done(self._segmenter.scored_s)

    def finish(self) -> None:
        """Nothing follows."""
        for segment in self._segmenter.finish():
            self._put(segment)
        self._report_done(self._length)

    def _put(self, segment: Segment) -> None:
        part = next((p for p in reversed(self._parts) if p.begins <= segment.start), self._parts[0])
        self._reader.put(segment.moved(part.at + part.known_s - part.begins), part.of)
        self._handed_on = segment.end

    def _report_done(self, until: float) -> None:
        """Report the recordings that end by then."""
        while self._parts and self._parts[0].done is not None:
            after = self._parts[1] if len(self._parts) > 1 else None
            if (after.begins if after else self._length) > until:
                return
            done = self._parts.popleft().done
            # Stopped meanwhile, its last segments may not have been taken.
            if done is None or self._reader.stopping.is_set():
                return
            if after and self._handed_on > after.begins:
                reach = after.known_s + self._handed_on - after.begins
                done = replace(done, into=after.name, into_s=round(reach, 3))
            self._reader.report_last(done)


def read_folder(reader: Reader) -> None:
    """Read the recordings in a folder in the order they were written, and wait for more.

    A recording lies where it was written, so nothing is dropped: it waits there. One that is still
    being written is left until it is complete; one that grows later is read on. Those that follow
    each other are read as one.
    """
    folder, was_there = Folder(Path(reader.source), reader.folder.done.values()), True
    chains: list[_Chain] = []
    reported: set[str] = set()
    while not reader.stopping.is_set():
        looked = time.monotonic()
        found = folder.look()
        if folder.is_there != was_there:  # a disk that was unmounted
            was_there = folder.is_there
            event = Occurrence.CONNECTED if was_there else Occurrence.LOST
            why = "" if was_there else "the folder is not there"
            reader.report(SourceEvent(reader.name, event, reader.clock(), why))
        _report_skipped(reader, folder, reported)
        for place, unread in enumerate(found):
            folder.add(_read_file(reader, unread, chains))
            if reader.stopping.is_set():  # what is running is read again in the next session
                return
            pending = {series(one.name) for one in found[place + 1 :]} | folder.writing
            latest = max((chain.end_at for chain in chains), default=0.0)
            _finish(chains, [one for one in chains if not one.may_go_on(pending, latest)])
        if found:
            continue
        _finish(chains, [one for one in chains if not one.may_go_on(folder.writing)])
        took = time.monotonic() - looked  # months of recordings take a while to list
        reader.stopping.wait(max(_LOOK_S, 10 * took))


def _report_skipped(reader: Reader, folder: Folder, reported: set[str]) -> None:
    """Report skipped files, once for each suffix."""
    fresh = sorted(folder.others.keys() - reported)
    if not fresh:
        return
    reported.update(fresh)
    counts = ", ".join(
        f"{folder.others[ending]} {ending or 'without an ending'}" for ending in fresh
    )
    detail = printable(f"{counts}: no suffix of a recording; a file given by name is tried")
    reader.report(SourceEvent(reader.name, Occurrence.SKIPPED, reader.clock(), detail))


def _finish(chains: list[_Chain], over: list[_Chain]) -> None:
    for chain in over:
        chain.finish()
        chains.remove(chain)


def _read_file(reader: Reader, unread: Unread, chains: list[_Chain]) -> FileDone:
    """Read what is new in a file, as part of the chain that it follows or of a new one."""
    path, name = unread.path, unread.name
    # As it is now: if it changes while it is read, it will be read on.
    done = FileDone(name, *_state(path))
    chain: _Chain | None = None
    digest, seconds = _Digest(), 0.0
    try:
        at = recorded_at(path)
        before = next((one for one in unread.before if goes_on(path, one, reader.channel)), None)
        # Another recording under a known name, and what was added to one, has ids of its own.
        is_new = before is None and all(one.name != name for one in unread.before)
        of = f"{reader.name}/{name}" + ("" if is_new else f"~{done.mtime_ns:x}")
        if before is None and at > done.mtime_ns / 1e9:  # it cannot have begun after its end
            detail = f"{name}: dated before 2001-09-09, so its times count from when it came here"
            reader.report(SourceEvent(reader.name, Occurrence.UNDATED, reader.clock(), detail))
        known_s = done_s = before.seconds if before is not None else 0.0
        distances = [one.follows(name, at, known_s) for one in chains]
        if any(distances):
            chain = chains[distances.index(min(filter(None, distances)))]
        if chain is None:
            chain = _Chain(reader)
            chains.append(chain)
        decoded_s = _decoded_s(reader, path, name, done.inode, is_new)
        known_s = max(known_s, chain.decoded_s, decoded_s)
        probe = beginning_digest(path, _PROBE_BYTES, done.size)
        reader.report(Recording(name, done.inode, of, round(at, 6), done.size, probe, path))
        chain.begin(_Part(name, of, at, known_s))
        for block in stream_audio(path, channel=reader.channel):
            digest.feed(block)
            seconds += len(block) / SAMPLE_RATE
            # Segments that were handed on say nothing of sounds: those end with their file.
            fresh = min(len(block), round((seconds - done_s) * SAMPLE_RATE))
            if fresh > 0:
                reader.classify(block[-fresh:], at + seconds - fresh / SAMPLE_RATE, of)
            fresh = round((seconds - known_s) * SAMPLE_RATE)
            if fresh > 0:
                chain.feed(block[-fresh:])
            if reader.stopping.is_set():
                return done
    except MissingChannelError:
        pass  # a recording of one channel among those of two
    except (MediaError, OSError) as error:  # the other files are read all the same
        why = printable(str(error))
        reader.report(SourceEvent(reader.name, Occurrence.UNREADABLE, reader.clock(), why))
        if not seconds and unread.before:  # once it is whole again it may be read on
            last = unread.before[-1]
            known = (last.seconds, last.digest, last.hashed)
            done = FileDone(name, done.size, done.mtime_ns, done.inode, *known)
    if seconds:
        made, hashed = digest.result()
        done = replace(done, seconds=seconds, digest=made, hashed=hashed)
    reader.end_sounds()
    if chain is None:
        reader.report_last(done)
    else:
        chain.end(done)
    return done


def _decoded_s(reader: Reader, path: Path, name: str, inode: int, is_new: bool) -> float:
    """Seconds of a file that an earlier session has decoded without being done with it. It may
    have been touched, copied or renamed, or have grown since.
    """
    begun = reader.folder.begun
    same = [key for key in begun if inode == key[1] or name == same_form(key[0])]
    found = 0.0
    for key in sorted(same, key=lambda key: key != (name, inode)):
        decoded_s, size, probe = begun[key]
        if beginning_digest(path, _PROBE_BYTES, size) == probe:
            del begun[key]
            found = decoded_s
            break
    reach = reader.folder.into.pop(name, 0.0) if is_new else 0.0
    return max(found, reach)


def _state(path: Path) -> tuple[int, int, int]:
    """Size, time and inode; zeros for a file that was deleted since it was found."""
    try:
        state = os.stat(path)
    except OSError:
        return 0, 0, 0
    return state.st_size, state.st_mtime_ns, state.st_ino
