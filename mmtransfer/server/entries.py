"""Lines of a journal as an index takes them in; many are parsed in a process of their own."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from zlib import crc32

from mmtransfer.data.printing import whole_text
from mmtransfer.monitoring.events import LineKind
from mmtransfer.monitoring.journal.files import day_of, journal_files, parsed, time_of
from mmtransfer.monitoring.journal.forgetting import FORGOTTEN

KINDS = ("line", "alert", "sound")
LOUD = "loud"
"""What a sound without a class is called."""
_BLOCK_BYTES = 8 << 20
_MANY_BYTES = 64 << 20  # from which another process is worth its start
_AHEAD = 3  # blocks
SLOTS = 12
"""Bits of a key that tell lines of the same hundredth of a second apart."""
LATEST_S = 1e10
Entry = tuple[Any, ...]
"""Number of its kind, key, camera, id, start, end, text; class of a line or sound, or keyword of an
alert; probability of a line's class; clip, source. Of a recording that begins its kind (3), when,
camera, and how its ids begin. Empty for what is of no interest here.
"""
Entries = list[Entry | dict[str, Any] | None]
"""A line that says what was forgotten is there as it is; None stands for one that is damaged."""
Block = tuple[str, int, int, Entries]
"""Name of the file, where the block begins and ends in it, and its lines."""


def parsed_blocks(folder: Path, offsets: Mapping[str, int]) -> Generator[Block, None, None]:
    """What is in a journal's files behind these places."""
    files = [(path, offsets.get(path.name, 0)) for path in journal_files(folder)]
    sizes = [(path, offset, path.stat().st_size - offset) for path, offset in files]
    parts = [(path, offset) for path, offset, more in sizes if more > 0]
    if sum(more for _, _, more in sizes) < _MANY_BYTES:
        for path, start, block in _blocks(parts):
            yield path.name, start, start + len(block), entries(block, day_of(path))
        return
    # Not a fork: the server has threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[tuple[str, int, int, Future[Entries]]] = deque()
        for path, start, block in _blocks(parts):
            future = pool.submit(entries, block, day_of(path))
            waiting.append((path.name, start, start + len(block), future))
            if len(waiting) > _AHEAD:
                name, begin, end, done = waiting.popleft()
                yield name, begin, end, done.result()
        for name, begin, end, done in waiting:
            yield name, begin, end, done.result()


def _blocks(parts: list[tuple[Path, int]]) -> Iterator[tuple[Path, int, bytes]]:
    """Whole lines, many at a time."""
    for path, offset in parts:
        with path.open("rb") as file:
            file.seek(offset)
            while block := file.read(_BLOCK_BYTES) + file.readline():
                block = block[: block.rfind(b"\n") + 1]  # the last one may be being written
                if not block:
                    break
                yield path, offset, block
                offset += len(block)


def entries(block: bytes, day: float) -> Entries:
    """The lines of a block, written on a day."""
    return [_entry(line, day) for line in block.splitlines()]


def _entry(raw: bytes, day: float) -> Entry | dict[str, Any] | None:
    line = parsed(raw)
    if line is None:
        return None
    event = line.get("event")
    try:
        if event is None:
            return _made(0, line, line["id"], line["text"], line.get("sentiment"), day)
        if event == LineKind.ALERT:
            keyword = line.get("keyword", line.get("phrase"))  # as version 0.1 wrote it
            return _made(1, line, line["segment"], line.get("text", ""), keyword, day)
        if event == LineKind.READING and isinstance(line["of"], str):
            return (3, time_of(line, day), line["camera"], line["of"], *[None] * 7)
        if event in (LineKind.SOUND, LineKind.SOUND_CLASS):
            label = line["label"] if event == LineKind.SOUND_CLASS else LOUD
            return _made(2, line, line["id"], label, label, day)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
    return line if event == FORGOTTEN else ()


def _made(
    kind: int, line: Mapping[str, Any], identity: str, text: str, name: str | None, day: float
) -> Entry:
    camera, start, end = line["camera"], float(line["start"]), float(line["end"])
    prob, clip, source = line.get("sentiment_prob"), line.get("clip"), line.get("source")
    names = (camera, name, clip, source)
    if not all(value is None or isinstance(value, str) for value in names):
        raise TypeError("expected texts")
    identity = whole_text(identity)
    key = key_of(camera, identity, time_of(line, day))
    prob = None if prob is None else float(prob)
    return kind, key, camera, identity, start, end, whole_text(text), name, prob, clip, source


def first_key(at: float) -> int:
    """The first key of a time (seconds since 1970): keys are its hundredths of a second, with room
    for several lines. So they are in the order of time, also where the journal is not.
    """
    # 0.29 * 100 is a little less than 29.
    return int(min(max(at, 0.0), LATEST_S) * 100 + 1e-4) << SLOTS


def key_of(camera: str, identity: str, at: float) -> int:
    """The key of a line, unless another one has it."""
    digest = crc32(f"{camera} {identity}".encode("utf-8", "replace"))
    return first_key(at) | digest & ((1 << SLOTS) - 1)
