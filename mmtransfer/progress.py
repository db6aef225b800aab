"""Progress on standard error: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)
_LOG_EVERY_S = 10.0


def console() -> Any:
    """The console that progress goes to."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def no_library_bars() -> Iterator[None]:
    """No progress bars of transformers within the block; loading a model takes a moment only."""
    from transformers.utils import logging as library

    was_enabled = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            library.enable_progress_bar()


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar that shows count, speed and time left; off a terminal, log the count."""
    from rich.progress import track as rich_track

    screen = console()
    if screen.is_terminal:
        yield from rich_track(items, description, total=total, console=screen, transient=True)
        return
    last_log = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last_log > _LOG_EVERY_S:
            last_log = now
            logger.info("%s: %d%s", description, done, f"/{total}" if total else "")


class TrainingProgress:
    """Step, loss, validation metric, speed and time left: a bar on a terminal, a log line every
    few seconds elsewhere.
    """

    def __init__(self, total: int, done: int, *, unit: str, enabled: bool = True):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        screen = console()
        self._total, self._done, self._unit = total, done, unit
        self._enabled = enabled
        self._score = ""
        self._last_log = time.monotonic()
        self._started, self._started_at = time.monotonic(), done
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=screen,
            disable=not (enabled and screen.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def evaluated(self, metric: str, value: float | None) -> None:
        """A new validation score; None where it is undefined."""
        self._score = f"{metric} undefined" if value is None else f"{metric} {value:.4f}"
        self._last_log = 0.0

    def step(self, loss: float, units_per_second: float) -> None:
        """One step is done; `units_per_second` is e.g. audio seconds trained on a second."""
        self._done += 1
        status = f"loss {loss:.4f}  {self._score}  {units_per_second:.0f} {self._unit}"
        self._bar.update(self._task, advance=1, status=status)
        now = time.monotonic()
        if self._enabled and self._bar.disable and now - self._last_log > _LOG_EVERY_S:
            self._last_log = now
            per_step = (now - self._started) / max(1, self._done - self._started_at)
            left = per_step * (self._total - self._done)
            logger.info("step %d/%d  %s  %.0f s left", self._done, self._total, status, left)
