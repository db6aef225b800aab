"""One thread for each source: audio to segments, handed on as each ends."""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.monitoring.events import (
    FolderState,
    Occurrence,
    Sound,
    SourceEnd,
    SourceEvent,
    Stopped,
    segment_id,
)
from mmtransfer.monitoring.sound_events import SoundStream
from mmtransfer.monitoring.sound_level import SoundLevel
from mmtransfer.monitoring.sources.clips import Recorder
from mmtransfer.monitoring.sources.live import (
    Block,
    LiveSettings,
    SteadyClock,
    read_live,
)
from mmtransfer.monitoring.stats import CameraStats
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    LongMediaError,
    MediaError,
    is_piped,
    stream_audio,
)
from mmtransfer.speech.end_of_turn import EndOfTurn
from mmtransfer.speech.segments import (
    Segment,
    Segmenter,
    SegmenterSettings,
    TurnJoiner,
    WindowSegmenter,
)

_LIVE_BLOCK_FRAMES = 3  # scored at once: a tenth of a second

LiveAudio = Callable[[threading.Event], Iterator[Block | SourceEvent]]
"""Audio of a live source as `read_live` gives it, until the event is set."""


@dataclass(frozen=True)
class Draft:
    """A segment of a live source that may not have ended yet."""

    segment: Segment
    is_whole: bool
    """Whether it is the segment, unless more is spoken."""
    window: Segment | None = None
    """The segment and its turn before it, as far as the model takes it in at a time."""


@dataclass(frozen=True)
class Turn:
    """A turn of a live source that is over, or as much of it as the model takes at a time: the
    segments that were handed on, as one window.
    """

    window: Segment


@dataclass(frozen=True)
class Cut:
    """A segment that is over."""

    segment: Segment
    of: str
    """Beginning of its id."""
    window: Segment | None = None
    """Of a live source: see `Draft`."""


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
    window_s: float = 0.0
    """Seconds of speech that are joined over pauses; see `Engine.window_s`."""
    end_of_turn: EndOfTurn | None = None
    """What decides whether a pause of a live source ends a segment; None: its length alone."""
    loud_db: float | None = None
    sounds: SoundStream | None = None
    """Takes the audio in which sounds are classified, if any are."""
    recorder: Recorder | None = None
    channel: int | None = None
    """The one that is read, counted from 0; by default all, mixed."""
    folder: FolderState = field(default_factory=FolderState)
    """What an earlier session read of a folder."""
    known_s: float = 0.0
    """Seconds of a recording that an earlier session read, before it grew."""
    longest_s: float = math.inf
    """Of a longer recording, so many seconds are read."""
    audio: LiveAudio | None = None
    """Of a live source that brings its audio itself."""
    size: int | None = None
    """Bytes of the recording that was read."""
    read_s: float = 0.0
    """Seconds of it that were read."""

    def start(self, read: Callable[[Reader], None]) -> threading.Thread:
        """Start reading; the thread ends when the source does or `stopping` is set."""

        def run() -> None:
            error: Exception | None = None
            try:
                read(self)
            except Exception as problem:
                error = problem
            if self.stopping.is_set() and (error is None or is_piped(self.source)):
                error = Stopped("stopped before the end")
            end = SourceEnd(
                public_address(self.source), self.name, error, self.size, round(self.read_s, 6)
            )
            if self.sounds is not None:
                self.sounds.end(end)
            else:
                self.report(end)

        thread = threading.Thread(target=run, name=f"reader {self.name}", daemon=True)
        thread.start()
        return thread

    def put(self, segment: Segment, of: str) -> None:
        """Hand on a segment of a recording, when there is room; not at all when `stopping` is
        set meanwhile.
        """
        while not self.room.acquire(timeout=0.2):
            if self.stopping.is_set():
                return
        self.events.put((self.camera, Cut(segment, of)))

    def report(self, item: Any) -> None:
        """Hand on something that needs no room."""
        self.events.put((self.camera, item))

    def classify(self, samples: np.ndarray, at: float, of: str) -> None:
        """Have the sounds in audio classified, if any are; the first sample is at `at` seconds."""
        if self.sounds is not None:
            self.sounds.feed(samples, at, of)

    def end_sounds(self) -> None:
        """Sounds end here: what is classified next does not follow the last audio."""
        if self.sounds is not None:
            self.sounds.finish()

    def report_last(self, item: Any) -> None:
        """Hand on something that says that all before it is dealt with, sounds included."""
        if self.sounds is not None:
            self.sounds.then(item)
        else:
            self.report(item)

    def segmenter(self) -> Segmenter | WindowSegmenter:
        """What cuts the speech of a recording."""
        if self.window_s:
            return WindowSegmenter(self.settings, self.window_s)
        return Segmenter(self.settings)

    def sound_level(self) -> SoundLevel | None:
        """What watches for loud sounds, if they are asked for."""
        return None if self.loud_db is None else SoundLevel(self.loud_db)

    def hear(self, samples: np.ndarray, at: float, sound: SoundLevel | None, of: str) -> None:
        """Count audio, the first sample at `at` seconds, and report what is loud in it; `of` is
        the beginning of the sounds' ids.
        """
        self.stats.audio_s += len(samples) / SAMPLE_RATE
        for level in sound.feed(samples, at) if sound is not None else ():
            if level.is_dead:
                why = "nothing but silence"
                self.report(SourceEvent(self.name, Occurrence.SILENT, level.at, why))
                continue
            start, end = round(level.at, 3), round(level.at + 0.25, 3)
            name = f"{segment_id(of, start)}#sound"
            self.report(Sound(self.name, name, start, end, level.level_db, level.background_db))


def read_recording(reader: Reader) -> None:
    """Read to the end; a cut recording is read to the cut, and then raises."""
    segmenter, sound = reader.segmenter(), reader.sound_level()
    is_once = is_piped(reader.source)
    cut: MediaError | None = None

    def put(segment: Segment) -> None:
        of = reader.name + (_of_its_own(segment.samples) if is_once else "")
        reader.put(segment.moved(reader.known_s), of)

    if not is_once and "://" not in reader.source and Path(reader.source).is_file():
        reader.size = Path(reader.source).stat().st_size
    try:
        for block in stream_audio(reader.source, reader.stopping.is_set, channel=reader.channel):
            at = reader.read_s
            if at > reader.longest_s:
                shown = public_address(reader.source)
                raise LongMediaError(f"{shown}: is longer than {reader.longest_s:g} s.")
            reader.read_s += len(block) / SAMPLE_RATE
            fresh = round((reader.read_s - reader.known_s) * SAMPLE_RATE)
            if fresh <= 0:
                continue
            of = reader.name + (_of_its_own(block) if is_once else "")
            reader.hear(block[-fresh:], max(at, reader.known_s), sound, of)
            reader.classify(block[-fresh:], max(at, reader.known_s), of)
            for segment in segmenter.feed(block[-fresh:]):
                put(segment)
            if reader.stopping.is_set():
                if is_once:  # running speech will not come again
                    break
                return
    except MediaError as error:
        cut = error  # what came before it is still transcribed
    for segment in segmenter.finish():
        put(segment)
    if cut is not None:
        raise cut


def _audio(reader: Reader) -> Iterator[Block | SourceEvent]:
    if reader.audio is not None:
        return reader.audio(reader.stopping)
    return read_live(
        reader.name,
        reader.source,
        reader.stopping,
        settings=reader.live,
        now=reader.clock,
        recorder=reader.recorder,
        channel=reader.channel,
    )


def _of_its_own(samples: np.ndarray) -> str:
    """What is piped in is another stream the next time: what is in it goes by how it sounds."""
    return f"~{hashlib.sha256(samples.tobytes()).hexdigest()[:8]}"


def read_camera(reader: Reader) -> None:
    """Decode until asked to stop; running speech is handed on as well.

    A segment is handed on as soon as a short pause follows it, and once more as a part of its turn.
    """
    settings = replace(reader.settings, pause_s=min(reader.settings.pause_s, reader.live.pause_s))
    segmenter: Segmenter | None = None
    endpointer = reader.end_of_turn.endpointer() if reader.end_of_turn is not None else None
    sound = SoundLevel(reader.loud_db or float("inf"))  # a dead microphone is reported in any case
    base = fed_s = 0.0
    drafted_to, is_whole = 0.0, False  # of the last draft

    turns = None
    if reader.window_s:
        turns = TurnJoiner(reader.settings, reader.window_s, close_s=reader.live.turn_s)

    def with_before(segment: Segment) -> Segment | None:
        return turns.with_before(segment) if turns is not None else None

    def report(segment: Segment) -> None:
        reader.report(Cut(segment, reader.name, with_before(segment)))
        for window in turns.add(segment) if turns is not None else ():
            reader.report(Turn(window))

    def finish() -> None:
        if segmenter is None:
            return
        reader.end_sounds()
        for segment in segmenter.finish():
            report(segment.moved(base))
        for window in turns.finish() if turns is not None else ():
            reader.report(Turn(window))

    for item in _audio(reader):
        if not isinstance(item, Block):
            if item.event == Occurrence.LOST:
                finish()
                segmenter = None
            reader.report(item)
            continue
        if segmenter is None or not item.is_joined:
            finish()
            segmenter = Segmenter(settings, _LIVE_BLOCK_FRAMES, endpointer)
            base = item.at
            fed_s = drafted_to = 0.0
            is_whole = False
        elif segmenter.is_idle:  # here the time line may follow a clock that drifts
            base = item.at - fed_s
        fed_s += len(item.samples) / SAMPLE_RATE
        reader.hear(item.samples, item.at, sound, reader.name)
        reader.classify(item.samples, item.at, reader.name)
        for segment in segmenter.feed(item.samples):
            report(segment.moved(base))
        running = segmenter.running()
        if turns is not None:
            over: list[Segment] = []
            if running is not None:  # what counts is when somebody began to speak again
                speech = running[0].moved(base)
                over = [*turns.wait_until(speech.start), *turns.go_on(speech)]
            elif segmenter.is_idle:
                over = [*turns.wait_until(base + segmenter.scored_s)]
            for window in over:
                reader.report(Turn(window))
        if running is None:
            continue
        # What may be the whole segment is decoded in the pause that decides whether it is.
        segment = running[0]
        has_grown = segment.end - max(drafted_to, segment.start) >= reader.live.partial_s
        is_new_pause = running[1] and not (is_whole and segment.end == drafted_to)
        if has_grown or is_new_pause:
            drafted_to, is_whole = segment.end, running[1]
            draft = segment.moved(base)
            reader.report(Draft(draft, is_whole, with_before(draft) if is_whole else None))
    finish()
