"""One thread for each source: audio to segments, handed on as each ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mmtransfer.audio import SAMPLE_RATE, MediaError, stream_audio
from mmtransfer.monitoring.live import Block, LiveSettings, SteadyClock, read_live
from mmtransfer.monitoring.transcripts import MonitorStats, SourceEnd, Stopped
from mmtransfer.segments import Segment, Segmenter, SegmenterSettings

_LIVE_BLOCK_FRAMES = 4  # scored at once: an eighth of a second


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
    stats: MonitorStats
    settings: SegmenterSettings
    live: LiveSettings
    clock: SteadyClock

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


def read_recording(reader: Reader) -> None:
    """Read to the end; a cut recording is read to the cut, and then raises."""
    segmenter = Segmenter(reader.settings)
    cut: MediaError | None = None
    try:
        for block in stream_audio(reader.source):
            reader.stats.add_audio(len(block) / SAMPLE_RATE)
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


def read_camera(reader: Reader) -> None:
    """Read until told to stop; what is being said then is handed on as well."""
    segmenter: Segmenter | None = None
    base = 0.0

    def hand_on(segment: Segment) -> None:
        reader.events.put(
            (
                reader.camera,
                replace(
                    segment,
                    start=base + segment.start,
                    end=base + segment.end,
                    samples_start=base + segment.samples_start,
                ),
            )
        )

    def finish() -> None:
        if segmenter is not None:
            for segment in segmenter.finish():
                hand_on(segment)

    for item in read_live(
        reader.name, reader.source, reader.stopping, settings=reader.live, now=reader.clock
    ):
        if not isinstance(item, Block):
            if item.event == "lost":
                finish()
                segmenter = None
            reader.events.put((reader.camera, item))
            continue
        if segmenter is None or not item.is_joined:
            finish()
            segmenter, base = Segmenter(reader.settings, _LIVE_BLOCK_FRAMES), item.at
        reader.stats.add_audio(len(item.samples) / SAMPLE_RATE)
        for segment in segmenter.feed(item.samples):
            hand_on(segment)
    finish()
