"""Recordings of what was around an alert or a sound."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mmtransfer.monitoring.events import Occurrence, Raised, SourceEvent, recording_of
from mmtransfer.monitoring.sources.clips import AROUND_S, clip_path, cut_recording
from mmtransfer.monitoring.sources.source import Source

_PATIENCE_S = 60.0  # for the text of what was spoken around a moment of a recording


class Moments:
    """Keeps a few seconds around each moment, in `folder`; nothing without one. `failed` is called
    for a moment whose recording cannot be kept, from any thread.
    """

    def __init__(self, folder: Path | None, failed: Callable[[Source, SourceEvent], None]):
        self._folder, self._failed = folder, failed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="clips")
        self._cutting: set[Future[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether one is being cut out of a recording."""
        return bool(self._cutting)

    def path(self, source: Source, moment: str) -> str | None:
        """Where the recording of a segment or sound of a source will be, if it is kept."""
        if self._folder is None or source.is_piped:  # what was piped in is gone
            return None
        return str(clip_path(self._folder, source.name, moment))

    def keep(self, source: Source, about: Raised) -> str | None:
        """Have the recording around an alert or sound kept; returns where it will be."""
        moment = about.key[0]
        name = self.path(source, moment)
        if name is None:
            return None
        start, end = about.start - AROUND_S, about.end + AROUND_S
        path = source.camera.url
        recording = source.recordings.get(recording_of(moment))
        if recording is not None:  # of which there is no more than lies in it
            path, start, end = str(recording.path), start - recording.at, end - recording.at

        def done(path: Path, why: str) -> None:
            if why:
                detail = f"{path}: {why}"
                event = SourceEvent(source.name, Occurrence.NO_CLIP, about.start, detail)
                self._failed(source, event)

        silences, begun = source.silences, 0.0 if recording is None else recording.at
        if source.recorder is not None:
            source.recorder.want(Path(name), start, end, done, silences)
            return name

        def cut() -> None:
            try:
                if silences is not None:
                    silences.wait(start + begun, end + begun, _PATIENCE_S)
                cut_recording(path, start, end, Path(name), silences, begun)
            except Exception as error:  # whatever it is, nobody looks into this future
                done(Path(name), str(error) or type(error).__name__)

        future = self._pool.submit(cut)
        self._cutting.add(future)
        future.add_done_callback(self._cutting.discard)
        return name

    def close(self) -> None:
        """Wait for the one that is being cut."""
        self._pool.shutdown(wait=True, cancel_futures=True)
