"""Journals as a monitor writes them, without one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtransfer.data.printing import json_line
from mmtransfer.monitoring import Alert, ClassifiedSound, Sound, Transcript
from mmtransfer.monitoring.events import Delivery
from mmtransfer.monitoring.sources.clips import clip_path

NOON = 1_764_072_000.0
"""2025-11-25 12:00 UTC."""


def text(camera: str, start: float, spoken: str, *, number: int = 0, **more: Any) -> dict[str, Any]:
    """A line of a live source (seconds since 1970) or a recording."""
    identity = f"{camera}@{start:.3f}" + (f"#{number}" if number else "")
    known = (f"rtsp://10.0.0.7/{camera}", camera, identity, start, start + 2.0, spoken)
    return asdict(Transcript(*known, -0.2, 0.01, 1.2, 3.0, **more))


def alert(line: dict[str, Any], keyword: str, clips: Path | None = None) -> dict[str, Any]:
    """An alert of a line; with `clips`, its clip, which is made."""
    found = (line["camera"], keyword, keyword, 1.0, line["id"], line["start"], line["end"])
    return asdict(Alert(*found, line["text"], clip=_clip(clips, line["camera"], line["id"])))


def delivered(line: dict[str, Any], keyword: str) -> dict[str, Any]:
    """That this alert has arrived."""
    return Delivery(line["camera"], "webhook", line["id"], keyword).line()


def sound(camera: str, start: float, label: str | None = None) -> dict[str, Any]:
    """A sound of a class, or a loud one."""
    identity = f"{camera}@{start:.3f}#{label or 'sound'}"
    if label is None:
        return asdict(Sound(camera, identity, start, start + 0.25, -10.0, -50.0))
    return asdict(ClassifiedSound(camera, identity, label, start, start + 1.0, 0.9))


def write(folder: Path, day: str, *lines: dict[str, Any]) -> Path:
    """Append lines to a day's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}.0000.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json_line(line) + "\n" for line in lines)
    return path


@contextmanager
def time_zone(name: str) -> Iterator[None]:
    """Days are those of this time zone (as in POSIX's TZ) meanwhile."""
    before = os.environ.get("TZ")
    try:
        os.environ["TZ"] = name
        time.tzset()
        yield
    finally:
        del os.environ["TZ"]
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


def _clip(folder: Path | None, camera: str, moment: str) -> str | None:
    if folder is None:
        return None
    path = clip_path(folder, camera, moment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"what was spoken")
    return str(path)
