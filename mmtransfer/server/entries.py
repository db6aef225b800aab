"""Lines of a journal as an index takes them in; many are parsed in a process of their own."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtransfer.data.printing import whole_text
from mmtransfer.monitoring.events import LineKind
from mmtransfer.monitoring.journal.files import day_of, journal_files, parsed, time_of
from mmtransfer.monitoring.journal.forgetting import FORGOTTEN
from mmtransfer.server.rows import ALERT, LATEST_S, LINE, RECORDING, SOUND, Row, first_key, key_of
from mmtransfer.server.words import spaced

LOUD = "loud"
"""What a sound without a class is called."""
_BLOCK_BYTES = 8 << 20
_MANY_BYTES = 64 << 20  # from which another process is worth its start
_AHEAD = 3  # blocks
_LONGEST_NAMES = 2000  # bytes; PostgreSQL's keys end at 2704
Plain = tuple[Any, ...]
"""The values of a row, and its words as `spaced` gives them."""


@dataclass
class Block:
    """Lines that follow each other in a file of a journal."""

    name: str
    """Of the file."""
    begin: int
    """Where they begin in it, and below where they end."""
    end: int
    lines: int = 0
    damaged: int = 0
    plain: list[Plain] = field(default_factory=list)
    """Lines of text and sounds that nothing else in the block is about, by their keys."""
    others: list[Row | dict[str, Any]] = field(default_factory=list)
    """The rest, in its order. Of a line that says what was forgotten `camera`, the key `before` and
    the ids and first keys of `lines` are there, and with one everything is here."""


def parsed_blocks(
    folder: Path, offsets: Mapping[str, int], site: str = ""
) -> Generator[Block, None, None]:
    """What is in a journal's files behind these places; `site` stands before names of cameras."""
    files = [(path, offsets.get(path.name, 0)) for path in journal_files(folder)]
    sizes = [(path, offset, path.stat().st_size - offset) for path, offset in files]
    parts = [(path, offset) for path, offset, more in sizes if more > 0]
    if sum(more for _, _, more in sizes) < _MANY_BYTES:
        for path, start, data in _blocks(parts):
            yield block_of(path.name, start, data.splitlines(), len(data), site)
        return
    # Not a fork: the server has threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Block]] = deque()
        for path, start, data in _blocks(parts):
            waiting.append(pool.submit(_split_block, path.name, start, data, site))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        for done in waiting:
            yield done.result()


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


def _split_block(name: str, begin: int, data: bytes, site: str) -> Block:
    return block_of(name, begin, data.splitlines(), len(data), site)


def block_of(name: str, begin: int, lines: Iterable[bytes], size: int, site: str = "") -> Block:
    """A block of `size` bytes of a file."""
    block, day = Block(name, begin, begin + size), day_of(Path(name))
    found: list[Row | dict[str, Any]] = []
    is_forgetting = False
    for line in lines:
        block.lines += 1
        entry = _entry(line, day, site)
        if entry is None:
            block.damaged += 1
        elif entry:
            found.append(entry)
            is_forgetting = is_forgetting or isinstance(entry, dict)
    if is_forgetting:
        block.others = found
        return block
    keys = Counter(row[0] for row in found if isinstance(row, tuple))
    for row in found:
        assert isinstance(row, tuple)
        if row[1] in (LINE, SOUND) and row[6] and keys[row[0]] == 1:
            block.plain.append((*row, spaced(row[6])))
        else:
            block.others.append(row)
    block.plain.sort(key=lambda plain: plain[0])
    return block


def _entry(raw: bytes, day: float, site: str) -> Row | dict[str, Any] | tuple[()] | None:
    """What a line is about; nothing of what is of no interest here, None of one that is damaged."""
    line = parsed(raw)
    if line is None:
        return None
    if site:
        line["camera"] = f"{site}/{line['camera']}" if line["camera"] else ""
    event = line.get("event")
    try:
        if event is None:
            return _row(LINE, line, line["id"], line["text"], line.get("sentiment"), (), day)
        if event == LineKind.ALERT:
            keyword = line.get("keyword", line.get("phrase"))  # as version 0.1 wrote it
            alerts = ("", keyword) if keyword else ("",)
            return _row(ALERT, line, line["segment"], line.get("text", ""), None, alerts, day)
        if event == LineKind.READING and isinstance(line["of"], str):
            (camera, name), began = _names(line["camera"], line["of"]), time_of(line, day)
            return Row(0, RECORDING, camera, name, began, 0.0, "", None, (), None, None, None)
        if event in (LineKind.SOUND, LineKind.SOUND_CLASS):
            label = line["label"] if event == LineKind.SOUND_CLASS else LOUD
            return _row(SOUND, line, line["id"], label, label, (), day)
        return _forgotten(line) if event == FORGOTTEN else ()
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _forgotten(line: Mapping[str, Any]) -> dict[str, Any] | tuple[()]:
    """What a line says was forgotten."""
    camera, before = whole_text(line["camera"]), line.get("before")
    key = None if before is None else first_key(before)
    lines = [(whole_text(identity), first_key(at)) for identity, at in line.get("lines") or ()]
    if not camera or (key is None and not lines):  # it was itself
        return ()
    return {"camera": camera, "before": key, "lines": lines}


def _names(*texts: str) -> tuple[str, ...]:
    """Texts that an index may have in a key together."""
    names = tuple(map(whole_text, texts))
    if sum(map(len, names)) > _LONGEST_NAMES // 4 and len("".join(names).encode()) > _LONGEST_NAMES:
        raise ValueError("names that are too long")
    return names


def _row(
    kind: int,
    line: Mapping[str, Any],
    identity: str,
    text: str,
    name: str | None,
    alerts: tuple[str, ...],
    day: float,
) -> Row:
    (camera,), start, end = _names(line["camera"]), float(line["start"]), float(line["end"])
    prob, clip, source = line.get("sentiment_prob"), line.get("clip"), line.get("source")
    identity, at = whole_text(identity), time_of(line, day)
    if at >= LATEST_S:  # no table's month ends later
        raise ValueError("a time that is too late")
    key = key_of(camera, identity, at)
    # PostgreSQL's `real` ends at 1e-45 and 1e38.
    prob = None if prob is None else min(max(round(float(prob), 9), 0.0), 1.0)
    name = None if name is None else _names(name)[0]
    places = [None if value is None else whole_text(value) for value in (clip, source)]
    alerts = _names(*alerts)
    text = whole_text(text)
    return Row(key, kind, camera, identity, start, end, text, name, alerts, prob, *places)
