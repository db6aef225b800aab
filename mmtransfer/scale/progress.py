"""Files, hours, speed and time left of a run: a line on a terminal, in the log elsewhere."""

from __future__ import annotations

import logging
import time

from mmtransfer.progress import console

logger = logging.getLogger(__name__)
_EVERY_S = 10.0


class BulkProgress:
    """Of a run over so many files of so many bytes, by which the time that is left is guessed."""

    def __init__(self, files: int, size: int):
        self._files, self._size = files, size
        self._done_files = self._done_size = 0
        self._started = self._last = time.monotonic()
        screen = console()
        self._line = screen.status("transcribing") if screen.is_terminal and files else None
        if self._line is not None:
            self._line.start()

    def advance(self, files: int, size: int, *, audio_hours: float, pieces: int) -> None:
        """So many files more are finished, or another piece; hours and pieces are all so far."""
        self._done_files += files
        self._done_size += size
        now = time.monotonic()
        seconds = max(now - self._started, 1e-6)
        share = self._done_size / self._size if self._size else 1.0
        left = f", {_duration(seconds / share - seconds)} left" if share else ""
        speed = 3600 * audio_hours / seconds
        text = (
            f"{self._done_files}/{self._files} files, {pieces} pieces, "
            f"{audio_hours:.2f} h of audio, {speed:.1f} times real time{left}"
        )
        if self._line is not None:
            self._line.update(text)
        elif now - self._last > _EVERY_S:
            self._last = now
            logger.info("%s", text)

    def close(self) -> None:
        """No more will come."""
        if self._line is not None:
            self._line.stop()


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
