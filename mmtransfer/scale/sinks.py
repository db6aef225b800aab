"""Where shipped lines are taken in: an index, or a folder of Parquet files."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmtransfer.cache import atomic_path, make_private
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.monitoring.journal.files import day_of, parsed, time_of
from mmtransfer.scale.ship import Line, Sink
from mmtransfer.server.entries import block_of
from mmtransfer.server.indexing import is_address, open_index
from mmtransfer.server.rows import LATEST_S

_OFFSETS = b"mmtransfer"  # in the metadata of a file: how far journals are in it and in others
_COLUMNS = pa.schema(
    [
        ("journal", pa.string()),
        ("site", pa.string()),
        ("camera", pa.string()),
        ("event", pa.string()),
        ("id", pa.string()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("revision", pa.int32()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("sentiment", pa.string()),
        ("keyword", pa.string()),
        ("label", pa.string()),
        ("line", pa.string()),
    ]
)

_KINDS = {column.name: str(column.type) for column in _COLUMNS}


def open_sink(place: str) -> Sink:
    """The sink that is called so: postgresql://…, a file that ends in .sqlite, or a folder.

    Raises:
        UserError: it cannot be used.
    """
    if is_address(place) or place.endswith(".sqlite"):
        return IndexSink(place)
    if "://" in place:
        raise UserError(
            f"{place}: expected postgresql://…, a file that ends in .sqlite, or a folder."
        )
    return ParquetSink(place)


class IndexSink:
    """Takes lines into an index."""

    most, within_s = 2000, 0.5

    def __init__(self, place: str):
        self._place, self._index = place, open_index(place)

    def mark(self, name: str) -> int:
        """How far a stream is in it."""
        return self._index.mark(name)

    def take(self, lines: Iterable[Line], marks: Mapping[str, int]) -> None:
        """Take them in, each once.

        Raises:
            UserError: the index cannot be written.
        """
        blocks = []
        for (journal, site, name), some in itertools.groupby(lines, _file):
            own = list(some)
            data, size = [line.data for line in own], own[-1].end - own[0].begin
            blocks.append((journal, block_of(name, own[0].begin, data, size, site)))
        try:
            self._index.take(blocks, marks)
        except sqlite3.Error as error:
            raise UserError(f"{self._place}: cannot be written ({error}).") from None

    def close(self) -> None:
        """Let go of it."""
        self._index.close()


class ParquetSink:
    """Writes lines into files of a folder: a row for each line of a journal, in its order.

    A revision is a row of its own, and so is what says that lines were forgotten; rows that are
    written stay. What was taken in is in the metadata of the files, so that a row and that it is
    there are one thing.
    """

    most, within_s = 20_000, 30.0

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        make_private(self._folder)
        self._offsets: dict[str, int] = {}
        self._number = 0
        for path in sorted(self._folder.glob("lines-*.parquet")):
            try:
                known = json.loads((pq.read_schema(path).metadata or {})[_OFFSETS])
                self._number = int(path.stem.removeprefix("lines-")) + 1
            except (ValueError, KeyError, OSError) as error:
                raise UserError(
                    f"{path}: expected a file of shipped lines ({error}). Name another folder."
                ) from None
            for name, offset in known.items():
                self._offsets[name] = max(offset, self._offsets.get(name, 0))

    def mark(self, name: str) -> int:
        """How far a stream is in it."""
        return self._offsets.get(name, 0)

    def take(self, lines: Iterable[Line], marks: Mapping[str, int]) -> None:
        """Write those that are not there yet into one more file.

        Raises:
            OSError: the disk is full or gone; nothing of them was written.
        """
        offsets, rows = dict[str, int](), list[dict[str, Any]]()
        for line in lines:
            name = f"{line.journal}/{line.file}"
            if line.begin >= offsets.get(name, self._offsets.get(name, 0)):
                offsets[name] = line.end
                rows.append(_row(line))
        if not rows:
            return
        offsets |= marks
        schema = _COLUMNS.with_metadata({_OFFSETS: json.dumps(offsets)})
        table = pa.Table.from_pylist(rows, schema=schema)
        with atomic_path(self._folder / f"lines-{self._number:08d}.parquet") as part:
            pq.write_table(table, part, compression="zstd")
        self._number += 1
        self._offsets |= offsets

    def close(self) -> None:
        """Nothing is open."""


def _file(line: Line) -> tuple[str, str, str]:
    return line.journal, line.site, line.file


def _fitting(value: Any, kind: str) -> Any:
    """A value as a column takes it; None for one that it does not, also of a damaged line."""
    if kind == "string":
        return whole_text(value) if isinstance(value, str) else None
    if not isinstance(value, int | float):
        return None
    if kind == "int32":
        return value if isinstance(value, int) and abs(value) < 1 << 31 else None
    with suppress(OverflowError):
        return float(value)
    return None


def _row(line: Line) -> dict[str, Any]:
    found = parsed(line.data) or {}
    row: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        row[name] = _fitting(found.get(name), kind)
    if isinstance(found.get("segment"), str):  # of an alert
        row["id"] = whole_text(found["segment"])
    row["at"] = None
    with suppress(TypeError, ValueError, OverflowError):
        at = time_of(found, day_of(Path(line.file)))
        row["at"] = int(at * 1e6) if abs(at) <= LATEST_S else None
    if line.site and row["camera"]:
        row["camera"] = f"{line.site}/{row['camera']}"
    text = line.data.decode("utf-8", "replace").rstrip("\n")
    return row | {"journal": line.journal, "site": line.site or None, "line": text}
