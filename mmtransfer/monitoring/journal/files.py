"""The files of a journal, as those go through them who do not write it."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from mmtransfer.cache import open_private
from mmtransfer.errors import UserError

LONGEST_LINE = 16 << 20
"""Bytes; what is longer is damaged."""
ID_NAME = "journal.id"
"""The file that holds what `journal_id` gives."""
EPOCH_S = 1e9
"""Times from here on are since 1970, of live sources and folders; others are of recordings."""


def journal_files(folder: Path) -> list[Path]:
    """A journal's files, oldest first."""
    found = folder.glob("????-??-??.*.jsonl")
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from writing a journal meanwhile.

    Raises:
        UserError: somebody is writing it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: another monitor is writing this journal. Stop it, or give --journal "
            "another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def mend(path: Path) -> None:
    """Cut off a line that was being written when the process was killed."""
    with open_private(path, "rb+") as file:
        file.seek(max(0, path.stat().st_size - 1))
        if file.read(1) in (b"\n", b""):
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def whole_lines(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The lines of a file from a place on; not the last one while it is being written."""
    with path.open("rb") as file:
        file.seek(offset)
        begun = b""
        for part in iter(partial(file.readline, LONGEST_LINE), b""):
            if begun or not part.endswith(b"\n"):
                begun += part
                part = begun if part.endswith(b"\n") else b""
            if part:
                begun = b""
                yield part


def parsed(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None if it is damaged."""
    try:
        found = from_json(line, cache_strings="keys")  # three times as fast as json
    except ValueError:  # it takes no halves of surrogate pairs
        try:
            found = json.loads(line.decode())
        except (ValueError, RecursionError):
            return None
    is_whole = isinstance(found, dict) and isinstance(found.get("camera"), str)
    return found if is_whole else None


def journal_id(folder: Path) -> str:
    """What tells a journal from those of other machines: at random, and then kept beside it.

    Raises:
        OSError: it cannot be kept there.
    """
    path = folder / ID_NAME
    if not path.exists():
        part = folder / f".{ID_NAME}.{uuid.uuid4().hex}.part"
        with open_private(part, "w", encoding="utf-8") as file:
            file.write(uuid.uuid4().hex)
        with suppress(FileExistsError):  # another process was faster
            os.link(part, path)
        part.unlink()
    return path.read_text(encoding="utf-8").strip()


def day_of(path: Path) -> float:
    """When the day began on which a file was written: seconds since 1970."""
    with suppress(ValueError, OverflowError):
        return time.mktime(time.strptime(path.name[:10], "%Y-%m-%d"))
    return 0.0


def time_of(line: Mapping[str, Any], day: float) -> float:
    """When a line's moment was: seconds since 1970. A recording counts from the day on which it was
    transcribed.

    Raises:
        TypeError, ValueError, OverflowError: its time is no number, or a larger one than there are.
    """
    start = line.get("start", line.get("at"))
    if start is None:  # of a delivery: what it delivered has its time in its name
        segment = str(line.get("segment", "")).rpartition("@")[2].partition("#")[0]
        start = segment or 0.0
    start = float(start)
    return start if start > EPOCH_S else day + start


def time_or_day(line: Mapping[str, Any], day: float) -> float:
    """When a line's moment was; the day on which it was written for one that says no such thing."""
    with suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(at := time_of(line, day)):
            return at
    return day
