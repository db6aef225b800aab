"""What a monitor keeps no longer than it may, while it runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtransfer.monitoring.journal.files import day_of, parsed, time_or_day, whole_lines
from mmtransfer.monitoring.journal.forgetting import KEPT, Rule, forget, forget_clips
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.kinds import goes_on

logger = logging.getLogger(__name__)
_DAY_S = 86400.0
_EVERY_S = 3600.0


class Keeper:
    """Removes from a journal and a folder of clips what is older than its camera's `retention`
    says, now and every hour. Audio that waits is the pipeline's.
    """

    def __init__(self, cameras: Sequence[Camera], journal: Journal | None, clips: Path | None):
        self._cameras, self._journal, self._clips = cameras, journal, clips
        self._oldest: dict[Path, tuple[int, dict[str, float]]] = {}  # of files of such sizes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    @property
    def is_needed(self) -> bool:
        """Whether anything is to be removed ever."""
        return any(c.retention and (c.retention.text or c.retention.clips) for c in self._cameras)

    def start(self) -> None:
        """Remove what is due, if anything ever is, and go on with that in a thread."""
        if self.is_needed:
            self.enforce(time.time())
            self._thread.start()

    def change(self, cameras: Sequence[Camera]) -> None:
        """Go by what these cameras say from now on."""
        self._cameras = cameras
        if not self._thread.is_alive():
            self.start()

    def close(self) -> None:
        """End it; what is being removed is removed."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.enforce(time.time())

    def enforce(self, now: float) -> None:
        """Remove what is due at that time (seconds since 1970)."""
        try:
            if self._clips is not None:
                forget_clips(self._clips, self._limits("clips", now))
            if self._journal is not None:
                self._forget_text(self._journal, self._limits("text", now))
        except OSError as error:  # the next hour is another chance
            logger.warning("what is kept too long could not be removed (%s)", error)

    def _limits(self, kind: str, now: float) -> dict[str, float]:
        days = {camera.name: getattr(camera.retention, kind, None) for camera in self._cameras}
        return {name: now - kept * _DAY_S for name, kept in days.items() if kept is not None}

    def _forget_text(self, journal: Journal, limits: Mapping[str, float]) -> None:
        due = []
        for path in journal.files if limits else ():
            size = path.stat().st_size
            if path not in self._oldest or self._oldest[path][0] != size:  # it has grown since
                self._oldest[path] = size, _oldest(path)
            _, oldest = self._oldest[path]
            if any(oldest.get(name, limit) < limit for name, limit in limits.items()):
                due.append(path)
        if not due:
            return
        found = forget(
            *(journal.folder, Rule(limits), journal.write),
            files=due,
            recordings=[camera.name for camera in self._cameras if not goes_on(camera)],
            with_clips=False,  # they have a time of their own
        )
        for path in due:
            self._oldest.pop(path, None)
        logger.info("retention: %d lines and %d events removed", found.lines, found.events)


def _oldest(path: Path) -> dict[str, float]:
    """When the first of what a file may lose was, by camera."""
    oldest: dict[str, float] = {}
    day = day_of(path)
    for raw in whole_lines(path):
        line: dict[str, Any] | None = parsed(raw)
        if line is None or line.get("event") in KEPT:
            continue
        at = time_or_day(line, day)
        oldest[line["camera"]] = min(at, oldest.get(line["camera"], at))
    return oldest
