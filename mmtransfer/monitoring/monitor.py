"""The speech of recordings and cameras as text, segment by segment, while it is being decoded."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtransfer.monitoring.decoding import Decoder, TextClasses
from mmtransfer.monitoring.events import Item, SourceEnd, SourceEvent, Transcript
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.ledger import SPOOL_BYTES, Ledger
from mmtransfer.monitoring.lines import LineSettings
from mmtransfer.monitoring.moments import Moments
from mmtransfer.monitoring.ordering import Ordering
from mmtransfer.monitoring.pipeline import Pipeline
from mmtransfer.monitoring.sound_events import SoundClasses, SoundWorker
from mmtransfer.monitoring.sources.cameras import Camera, named_cameras
from mmtransfer.monitoring.sources.clips import Recorder
from mmtransfer.monitoring.sources.folders import read_folder
from mmtransfer.monitoring.sources.kinds import settle
from mmtransfer.monitoring.sources.live import LiveSettings, SteadyClock
from mmtransfer.monitoring.sources.readers import (
    LiveAudio,
    Reader,
    read_camera,
    read_recording,
)
from mmtransfer.monitoring.sources.source import WAITING_SEGMENTS, Source
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import SegmenterSettings

_READER_EXIT_S = 0.8  # a read of a failing disk or server may hang; who stops has 5 s in all


@dataclass
class _Run:
    """What a `watch` works on."""

    sources: list[Source]
    events: queue.Queue[Any]
    pipeline: Pipeline
    clock: SteadyClock
    sounds: SoundWorker | None
    audio: Mapping[str, LiveAudio]
    readers: dict[int, threading.Thread] = field(default_factory=dict)
    """By number of the source."""


class Monitor:
    """Transcribes recordings and live sources with one recogniser.

    A thread for each source decodes audio, detects speech and cuts segments, while the recogniser's
    workers decode what has been cut, in batches of one context. A recording waits while too many
    segments are queued. A camera cannot wait: its segments are queued, on disk if there is a
    journal, and when that queue is full the oldest of the camera with the lowest priority is
    dropped, and the journal records it.

    The text of a live source is there at once, segment by segment; when the turn is over it is
    decoded as a whole, and lines whose words differ then come again, with the same id and a
    `revision`. Where there is no time for that the lines stay as they are.

    `others` are recognisers of cameras, by name, that have their own. With `classifier`,
    transcripts carry the class of their text. In `alert_clips` a short recording is kept around
    each alert. With `sounds`, a thread of its own classifies the sounds of all sources. `waiting`
    segments may be in memory; of a recording that is longer than `longest_s`, so much is
    transcribed, and the rest is an error.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        settings: SegmenterSettings | None = None,
        *,
        live: LiveSettings | None = None,
        spool_bytes: int = SPOOL_BYTES,
        others: Mapping[str, Recognizer] | None = None,
        classifier: TextClasses | None = None,
        alert_clips: Path | None = None,
        sounds: SoundClasses | None = None,
        lines: LineSettings | None = None,
        with_words: bool = False,
        waiting: int = WAITING_SEGMENTS,
        longest_s: float = math.inf,
    ):
        self._recognizer, self._others = recognizer, others or {}
        self._settings = settings or SegmenterSettings()
        self._lines, self._with_words = lines or LineSettings(), with_words
        self._live = live or LiveSettings()
        self._spool_bytes, self._classifier, self._clips = spool_bytes, classifier, alert_clips
        self._sounds = sounds
        self._waiting, self._longest_s = waiting, longest_s
        self._stopping = threading.Event()
        self._run: _Run | None = None
        self.stats = MonitorStats()

    def stop(self) -> None:
        """End `watch` soon, from any thread: what has been cut is decoded within a few seconds, or
        stays in the journal's spool for the next start.
        """
        self._stopping.set()
        for source in list(self._run.sources) if self._run is not None else ():
            source.stopping.set()

    @property
    def is_at_work(self) -> bool:
        """Whether `watch` is at work, and was not asked to end."""
        return self._run is not None and not self._stopping.is_set()

    def change(
        self, gone: Collection[str], fresh: Sequence[Camera], others: Mapping[str, Recognizer]
    ) -> None:
        """Let sources go, by name, and then take up others, whose recognisers are in `others` if
        they have their own; from another thread, while `watch` is at work and stays open. What has
        been cut of a source that goes is decoded, what is being spoken is cut there.
        """
        run = self._run
        assert run is not None
        ending = [s for s in run.sources if s.name in gone and not s.stopping.is_set()]
        for source in ending:
            source.stopping.set()
        deadline = time.monotonic() + _READER_EXIT_S
        for source in ending:  # some cameras take one connection at a time
            if source.number in run.readers:
                run.readers[source.number].join(max(0.0, deadline - time.monotonic()))

        def admit() -> None:
            self.stats.add_cameras(camera.name for camera in fresh)
            for camera in fresh:
                count = len(run.sources)
                recognizer = others.get(camera.name, self._recognizer)
                stats = self.stats.cameras[camera.name]
                source = Source(count, camera, recognizer, stats, count + 1, self._waiting)
                run.sources.append(source)
                run.pipeline.admit(source)
                self._start(run, source)

        run.events.put(admit)

    @property
    def is_stopping(self) -> bool:
        """Whether `watch` was asked to end, or has."""
        return self._stopping.is_set()

    def transcribe(self, source: str | Path) -> Iterator[Transcript]:
        """Transcripts of a recording, in order, each as soon as it is recognised.

        Raises:
            MediaError: unusable from the start, or cut (after the transcripts of all there is).
        """
        for item in self.watch([source]):
            if isinstance(item, Transcript):
                yield item
            elif isinstance(item, SourceEnd) and item.error is not None:
                raise item.error

    def watch(
        self,
        sources: Iterable[str | Path | Camera],
        *,
        journal: Journal | None = None,
        audio: Mapping[str, LiveAudio] | None = None,
        stays_open: bool = False,
    ) -> Iterator[Item]:
        """Transcripts of several sources side by side, each source's in order, and what happens to
        the sources: alerts, sounds, connections, ends. A source is a path, an address or a
        `Camera`, which has a name and settings of its own.

        With a journal, everything is written there before it is handed out, and what the journal
        holds already is neither decoded nor handed out again. When the disk is full, what live
        sources and standard input say is held until it can be written; where all sources are
        recordings, the error ends it.

        `audio` is, by name, that of live sources which bring it themselves; the source ends with
        it. With `stays_open` it goes on when all have ended, until `stop`: `change` may bring more.

        Raises:
            OSError: the journal cannot be written.
        """
        cameras = settle(named_cameras(sources))
        self.stats.add_cameras(camera.name for camera in cameras)
        at_work = [
            Source(
                *(number, camera, self._others.get(camera.name, self._recognizer)),
                *(self.stats.cameras[camera.name], len(cameras), self._waiting),
            )
            for number, camera in enumerate(cameras)
        ]
        stopping, clock = self._stopping, SteadyClock()
        # Everything that happens, in one queue: segments, events, ends, and decoded batches.
        events: queue.Queue[Any] = queue.Queue()
        pipeline = self._pipeline(at_work, journal, clock, events, stays_open=stays_open)
        sounds = None
        if self._sounds is not None:
            sounds = SoundWorker(self._sounds, events, stopping)
        run = self._run = _Run(at_work, events, pipeline, clock, sounds, audio or {})
        started = time.monotonic()
        try:
            pipeline.take_up()
            for source in at_work:
                self._start(run, source)
            if sounds is not None:
                sounds.start()
            yield from pipeline.items(stopping)
        finally:
            self.stop()
            self._run, self._stopping = None, threading.Event()  # of the next run
            pipeline.close()
            if sounds is not None:
                sounds.close()
            # A thread inside native code when the interpreter exits would abort the process.
            deadline = time.monotonic() + _READER_EXIT_S
            for thread in run.readers.values():
                thread.join(max(0.0, deadline - time.monotonic()))
            self.stats.wall_s += time.monotonic() - started

    def _start(self, run: _Run, source: Source) -> None:
        """Start what decodes a source's audio."""
        if self._stopping.is_set():
            source.stopping.set()
        if source.has_ended:
            run.events.put((source.number, SourceEnd(source.address, source.name, None)))
            return
        if self._clips is not None and source.is_live:
            source.recorder = Recorder()
        read = read_camera if source.is_live else read_recording
        reader = self._reader(source, run.events, run.clock)
        reader.audio = run.audio.get(source.name)
        if run.sounds is not None:
            reader.sounds = run.sounds.stream(source)
        run.readers[source.number] = reader.start(read_folder if source.is_folder else read)

    def _pipeline(
        self,
        sources: Sequence[Source],
        journal: Journal | None,
        clock: SteadyClock,
        events: queue.Queue[Any],
        *,
        stays_open: bool,
    ) -> Pipeline:
        """What makes text of what the readers of these sources find."""

        def failed(source: Source, event: SourceEvent) -> None:
            events.put((source.number, event))

        # Recordings can be read again; of other sources nothing may be lost while a disk is full.
        ledger = Ledger(
            journal,
            spools=stays_open or any(source.is_live for source in sources),
            waits=stays_open or any(source.is_live or source.is_piped for source in sources),
            spool_bytes=self._spool_bytes,
        )
        recognizers = [source.recognizer for source in sources]
        with_turns = {source.number for source in sources if source.has_turns}
        moments = Moments(self._clips, failed)
        return Pipeline(
            sources,
            Decoder(
                *(recognizers, self._lines, self._classifier, with_turns),
                redactors=[source.redactor for source in sources],
                silences=[source.silences for source in sources],
            ),
            ledger,
            Ordering(sources, ledger, moments, clock, with_words=self._with_words),
            moments,
            events,
            workers=max((recognizer.engine.workers for recognizer in recognizers), default=1),
            with_words=self._with_words,
            stays_open=stays_open,
        )

    def _reader(self, source: Source, events: queue.Queue[Any], clock: SteadyClock) -> Reader:
        camera, recognizer = source.camera, source.recognizer
        return Reader(
            camera=source.number,
            name=source.name,
            source=camera.url,
            events=events,
            room=source.room,
            stopping=source.stopping,
            stats=source.stats,
            settings=self._settings,
            live=self._live,
            clock=clock,
            window_s=recognizer.window_s,
            end_of_turn=recognizer.end_of_turn if self._live.learned_end else None,
            loud_db=camera.loud_db,
            recorder=source.recorder,
            channel=None if isinstance(camera.channels, str) else camera.channels - 1,
            folder=source.folder,
            known_s=source.known_s,
            longest_s=self._longest_s,
        )
