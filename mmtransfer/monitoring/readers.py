"""One thread for each source: audio to segments, handed on as each ends."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtransfer.audio import AUDIO_SUFFIXES, SAMPLE_RATE, MediaError, open_media, stream_audio
from mmtransfer.monitoring.clips import Recorder
from mmtransfer.monitoring.live import (
    Block,
    LiveSettings,
    SourceEvent,
    SteadyClock,
    is_live,
    read_live,
)
from mmtransfer.monitoring.sound import SoundLevel
from mmtransfer.monitoring.transcripts import CameraStats, Sound, SourceEnd, Stopped, segment_id
from mmtransfer.segments import Segment, Segmenter, SegmenterSettings

_LIVE_BLOCK_FRAMES = 3  # scored at once: a tenth of a second
_SETTLED_S = 10.0  # a file that has not grown for so long is complete
_LOOK_S = 1.0  # how often a folder is looked at
_JOINED_S = 1.0  # files this close follow each other without a gap
MEDIA_SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".avi", ".webm", ".ts", ".flv", ".mpg"),
    *AUDIO_SUFFIXES,
)
"""Files of a folder that are read."""


@dataclass(frozen=True)
class Draft:
    """A segment of a live source that may not have ended yet."""

    segment: Segment
    is_whole: bool
    """Whether it is the segment, unless more is said."""


@dataclass(frozen=True)
class FileDone:
    """All segments that began in a file of a folder have been handed on."""

    name: str


@dataclass
class Reader:
    """Reads one source in a thread; what it finds goes into `events` as (camera, item)."""

    camera: int
    name: str
    source: str
    events: queue.Queue[Any]
    room: threading.Semaphore
    """Segments that may be in work; a recording waits for room, a live source cannot."""
    stopping: threading.Event
    stats: CameraStats
    settings: SegmenterSettings
    live: LiveSettings
    clock: SteadyClock
    sound: SoundLevel | None = None
    recorder: Recorder | None = None
    files_done: set[str] = field(default_factory=set)
    """Files of a folder that an earlier session was done with."""

    def start(self, read: Callable[[Reader], None]) -> threading.Thread:
        """Start reading; the thread ends when the source does or `stopping` is set."""

        def run() -> None:
            error: Exception | None = None
            try:
                read(self)
                if self.stopping.is_set():
                    error = Stopped("stopped before the end")
            except Exception as problem:
                error = problem
            self.events.put((self.camera, SourceEnd(self.source, self.name, error)))

        thread = threading.Thread(target=run, name=f"reader {self.name}", daemon=True)
        thread.start()
        return thread

    def put(self, segment: Segment) -> None:
        """Hand on a segment of a recording, when there is room."""
        while not self.room.acquire(timeout=0.2):
            if self.stopping.is_set():
                return
        self.events.put((self.camera, segment))

    def tell(self, item: Any) -> None:
        """Hand on something that needs no room."""
        self.events.put((self.camera, item))

    def hear(self, samples: Any, at: float) -> None:
        """Count audio, the first sample at `at` seconds, and tell of what is loud in it."""
        self.stats.audio_s += len(samples) / SAMPLE_RATE
        for level in self.sound.feed(samples, at) if self.sound is not None else ():
            if level.is_dead:
                self.tell(SourceEvent(self.name, "silent", level.at, "nothing but silence"))
                continue
            start, end = round(level.at, 3), round(level.at + 0.25, 3)
            name = f"{segment_id(self.name, start)}#sound"
            self.tell(Sound(self.name, name, start, end, level.level_db, level.usual_db))


def reader_of(source: str) -> Callable[[Reader], None]:
    """What reads a source: a live one, a folder, a recording."""
    if is_live(source):
        return read_camera
    return read_folder if is_folder(source) else read_recording


def is_folder(source: str) -> bool:
    """Whether a source is a folder that recordings are written to."""
    return "://" not in source and Path(source).is_dir()


def read_recording(reader: Reader) -> None:
    """Read to the end; a cut recording is read to the cut, and then raises."""
    segmenter = Segmenter(reader.settings)
    cut: MediaError | None = None
    at = 0.0
    try:
        for block in stream_audio(reader.source):
            reader.hear(block, at)
            at += len(block) / SAMPLE_RATE
            for segment in segmenter.feed(block):
                reader.put(segment)
            if reader.stopping.is_set():
                return
    except MediaError as error:
        cut = error  # what came before it is still transcribed
    for segment in segmenter.finish():
        reader.put(segment)
    if cut is not None:
        raise cut


def moved(segment: Segment, base: float) -> Segment:
    """A segment on another time line."""
    return replace(
        segment,
        start=base + segment.start,
        end=base + segment.end,
        samples_start=base + segment.samples_start,
    )


def read_camera(reader: Reader) -> None:
    """Read until told to stop; what is being said then is handed on as well."""
    settings = replace(reader.settings, pause_s=min(reader.settings.pause_s, reader.live.pause_s))
    segmenter: Segmenter | None = None
    base = fed_s = 0.0
    drafted_to, is_whole = 0.0, False  # of the last draft

    def finish() -> None:
        if segmenter is not None:
            for segment in segmenter.finish():
                reader.tell(moved(segment, base))

    for item in read_live(
        reader.name,
        reader.source,
        reader.stopping,
        settings=reader.live,
        now=reader.clock,
        recorder=reader.recorder,
    ):
        if not isinstance(item, Block):
            if item.event == "lost":
                finish()
                segmenter = None
            reader.tell(item)
            continue
        if segmenter is None or not item.is_joined:
            finish()
            segmenter, base = Segmenter(settings, _LIVE_BLOCK_FRAMES), item.at
            fed_s = drafted_to = 0.0
            is_whole = False
        elif segmenter.is_idle:  # here the time line may follow a clock that drifts
            base = item.at - fed_s
        fed_s += len(item.samples) / SAMPLE_RATE
        reader.hear(item.samples, item.at)
        for segment in segmenter.feed(item.samples):
            reader.tell(moved(segment, base))
        running = segmenter.running()
        if running is None:
            continue
        # What may be the whole segment is decoded in the pause that decides whether it is.
        segment = running[0]
        has_grown = segment.end - max(drafted_to, segment.start) >= reader.live.partial_s
        is_new_pause = running[1] and not (is_whole and segment.end == drafted_to)
        if has_grown or is_new_pause:
            drafted_to, is_whole = segment.end, running[1]
            reader.tell(Draft(moved(segment, base), is_whole))
    finish()


def read_folder(reader: Reader) -> None:
    """Read the recordings in a folder in the order they were written, and wait for more.

    A recording lies where it was written, so nothing is dropped: it waits there. One that is still
    being written is left until it is complete. Those that follow each other are read as one.
    """
    segmenter: Segmenter | None = None
    base = end = 0.0
    waiting: list[tuple[float, str]] = []  # (end, name) of files with a segment still running

    def tell_done(until: float) -> None:
        while waiting and waiting[0][0] <= until:
            reader.tell(FileDone(waiting.pop(0)[1]))

    def finish() -> None:
        if segmenter is not None:
            for segment in segmenter.finish():
                reader.put(moved(segment, base))
        if not reader.stopping.is_set():
            tell_done(float("inf"))

    folder = Path(reader.source)
    for path in _completed(folder, reader):
        try:
            started = _started(path)
            if segmenter is None or not -_JOINED_S < started - end < _JOINED_S:
                finish()
                segmenter, base = Segmenter(reader.settings), max(started, end)
                end = base
            for block in stream_audio(path):
                reader.hear(block, end)
                end += len(block) / SAMPLE_RATE
                for segment in segmenter.feed(block):
                    reader.put(moved(segment, base))
                running = segmenter.running()
                tell_done(base + running[0].start if running else end)
                if reader.stopping.is_set():
                    return
        except (MediaError, OSError) as error:  # the other files are read all the same
            reader.tell(SourceEvent(reader.name, "unreadable", reader.clock(), str(error)))
        waiting.append((end, path.relative_to(folder).as_posix()))
    finish()


def _started(path: Path) -> float:
    """When a recording began, in seconds since 1970: when it was complete, less its length."""
    with open_media(path) as container:
        length = container.duration / 1e6 if container.duration else 0.0
    return path.stat().st_mtime - length


def _completed(folder: Path, reader: Reader) -> Iterator[Path]:
    """Files not yet read, in the order of their last change; waits for more."""
    seen = set(reader.files_done)
    while not reader.stopping.is_set():
        found, looked = [], time.monotonic()
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.suffix.lower() in MEDIA_SUFFIXES and name not in seen and path.is_file():
                with suppress(FileNotFoundError):  # old recordings are deleted meanwhile
                    found.append((path.stat().st_mtime, name, path))
        found.sort()
        if found and time.time() - found[-1][0] < _SETTLED_S:
            found.pop()  # still being written
        for _, name, path in found:
            if reader.stopping.is_set():
                return
            seen.add(name)
            yield path
        if not found:
            took = time.monotonic() - looked  # months of recordings take a while to list
            reader.stopping.wait(max(_LOOK_S, 10 * took))
