"""Rows of tables for every task: CSV, TSV, JSON lines, Parquet and Hub sets, each with its line.

What cannot be understood is refused with file and line: a table read wrongly trains without a word.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmtransfer.data import USUAL_COLUMNS
from mmtransfer.data.files import check_regular
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
Row = dict[str, Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_LONGEST_FIELD = 2**26  # characters; a quote that is never closed must not swallow all memory
_FIELD_LIMIT = threading.Lock()
_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 512, 2**22  # of a CSV file
_LONGEST_LINE = 2 * _LONGEST_FIELD
_HEAD_CHARACTERS = 2**24  # of the rows that are looked at for column names
_BATCH_ROWS = 64  # of a Parquet file: a few bytes can stand for as many long texts
_QUOTED_LINES = 1000  # of a TSV file in one cell
_HEAD = 100  # rows looked at for column names: JSON objects may leave out what they lack
_NAMED = 5


def with_columns(
    source: str,
    rows: Iterator[tuple[int, Row]],
    roles: dict[str, str | None],
    needed: set[str],
    *,
    option: str = "data.{}",
) -> Iterator[tuple[int, Row]]:
    """The rows, if their first ones have the columns that are needed or were chosen by name;
    `option` is how a user sets one.

    Raises:
        UserError: a column that is not there.
    """
    head: list[tuple[int, Row]] = []
    characters = 0
    for numbered in islice(rows, _HEAD):
        head.append(numbered)
        characters += row_characters(numbered[1])
        if characters > _HEAD_CHARACTERS:
            break
    columns = list(dict.fromkeys(chain(*(row for _, row in head))))
    for setting, column in roles.items():
        if column is None or column in columns:
            continue
        if setting in needed or column != USUAL_COLUMNS.get(setting):
            shown = ", ".join(map(str, columns[:20])) + (", ..." if len(columns) > 20 else "")
            hint = _other_delimiter(columns)
            raise UserError(
                f"{source}: column '{column}' not found; columns are {shown}.{hint} "
                f"Set {option.format(setting.replace('_', '-') if option[0] == '-' else setting)}."
            )
    return chain(head, rows)


def row_characters(row: Row) -> int:
    """Characters of the texts in a row."""
    return sum(len(value) for value in row.values() if isinstance(value, str))


def _other_delimiter(columns: Sequence[str]) -> str:
    found = next((mark for mark in ";\t|" if any(mark in str(name) for name in columns)), None)
    if found is None:
        return ""
    return f" The cells seem to be separated by {found!r}; save the file with commas."


# --- rows ----------------------------------------------------------------------------------------


def iter_rows(source: str, *, split: str = "train", chunk: int = 4096) -> Iterator[Row]:
    """Rows of a CSV, TSV, JSON-lines or Parquet file, or of a Hub dataset given as NAME,
    NAME:SPLIT or NAME:CONFIGURATION:SPLIT; see `numbered_rows`.
    """
    return (row for _, row in numbered_rows(source, split=split, chunk=chunk))


def numbered_rows(
    source: str, *, split: str = "train", chunk: int = 4096
) -> Iterator[tuple[int, Row]]:
    """Rows with the line on which each begins (Parquet and Hub: their number, from 1).

    Rows are read as they are asked for; at most `chunk` of them are in memory. What exists is a
    file, and so is what ends or begins like one; anything else is the name of a Hub dataset, of
    which `split` is read unless the name says otherwise. Cells of CSV and TSV files are text;
    integers of a class column (Parquet and Hub) become the names of classes, and None where a row
    is unlabelled. A header that comes again among the rows is left out and said.

    Raises:
        UserError: at once for a path that is no readable kind of file; while reading for a file
            that is malformed, not UTF-8 or without rows, and a Hub dataset that cannot be loaded.
    """
    path = as_file(source)
    if path is None:
        return _hub_rows(source, split, chunk)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file (expected a table).")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a file: {', '.join(SUFFIXES)}.")
    check_regular(path)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(
            f"{path}: expected a file of {', '.join(SUFFIXES)}, found '{kind or 'no suffix'}'."
        )
    return _file_rows(path, kind, chunk)


def as_file(source: str) -> Path | None:
    """The path that a source means; None for a Hub dataset."""
    path = Path(os.path.expanduser(source))
    if os.path.exists(path) or source.lower().endswith(SUFFIXES) or source[:1] in ("", *"./~"):
        return path
    return None


def _file_rows(path: Path, kind: str, chunk: int) -> Iterator[tuple[int, Row]]:
    if kind == ".csv":
        rows = _csv_rows(path)
    elif kind == ".tsv":
        rows = _tsv_rows(path)
    elif kind == ".parquet":
        rows = _parquet_rows(path, chunk)
    else:
        rows = _json_rows(path)
    empty = True
    first = ""  # name of the first column
    headers: list[int] = []
    try:
        for numbered in rows:
            if empty:
                first, empty = next(iter(numbered[1]), ""), False
            if numbered[1].get(first) == first and _is_header(numbered[1]):
                headers.append(numbered[0])
            else:
                yield numbered
    except UnicodeDecodeError:
        line, byte = _first_not_utf8(path)
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {byte} of the line cannot be read). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if empty:
        below = "below its header" if kind in (".csv", ".tsv") and path.stat().st_size else "in it"
        raise UserError(f"{path}: the file is empty: expected rows {below}, found none.")
    if headers:
        logger.warning(
            "skipped: %s: the header comes again as data, in %s", path.name, some_lines(headers)
        )


def some_lines(numbers: Sequence[int]) -> str:
    """The first few line numbers and how many more there are, for messages."""
    shown = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"line{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _is_header(row: Row) -> bool:
    """Whether a row of several columns holds nothing but their names."""
    for name, value in row.items():
        if value != name and not (isinstance(value, str) and value.strip() == name):
            return False
    return len(row) > 1


def _first_not_utf8(path: Path) -> tuple[int, int]:
    """Line and byte within it (both from 1) of the first that is not UTF-8. A decoder that reads
    ahead does not know them.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, error.start + 1
    return 1, 1


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within the block the csv module reads long fields; its limit belongs to the process, so it
    is put back, and one thread at a time may change it.
    """
    with _FIELD_LIMIT:
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _lines(path: Path, file: Any) -> Iterator[str]:
    """The lines of a file.

    Raises:
        UserError: one that would take all memory.
    """
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE + 1), ""), 1):
        if len(line) > _LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: a line of more than {_LONGEST_LINE >> 20} million characters. "
                "Expected a row to a line."
            )
        yield line


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file), strict=True)
        header: list[str] = []
        shape: _Shape | None = None
        while rows := _next_csv(path, reader):
            if not header:
                header = _header(path, rows[0][0], rows[0][2])
                del rows[0]
            folded = [row for row in rows if row[1] > row[0]]
            if shape is None and folded:
                shape = _Shape(len(header), [cells for _, _, cells in rows])
            for line, _, cells in folded:
                if shape is not None and shape.is_swallowing(cells):
                    raise UserError(
                        f"{path}:{line}: a quoted cell holds what looks like the next row; a "
                        'double quote is not closed. Close it, or write it twice ("") inside a '
                        "quoted cell."
                    )
            width = len(header)
            for line, _, cells in rows:
                if len(cells) == width:
                    yield line, dict(zip(header, cells, strict=True))
                else:
                    yield line, _mended_row(path, line, header, cells)


def _next_csv(path: Path, reader: Any) -> list[tuple[int, int, list[str]]]:
    """The next rows as (first line, last line, cells); blank lines are left out."""
    rows: list[tuple[int, int, list[str]]] = []
    characters = 0
    line = reader.line_num + 1
    try:
        with _long_fields():
            for cells in islice(reader, _ROWS_AT_ONCE):
                last = reader.line_num  # a quoted cell may hold line breaks
                if cells:
                    rows.append((line, last, cells))
                    characters += len(cells[0]) if len(cells) == 1 else len("".join(cells))
                    if characters > _CHARACTERS_AT_ONCE:
                        break
                line = last + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: not valid CSV: {error}. Is a double quote not closed, or not written "
            'twice ("") inside a quoted cell?'
        ) from None
    return rows


def _header(path: Path, line: int, cells: Sequence[str]) -> list[str]:
    header = [_unquoted(name.strip()) for name in cells]
    if not any(header):
        raise UserError(f"{path}:{line}: expected a header with the names of the columns.")
    _refuse_repeated(f"{path}:{line}", header)
    return header


def _mended_row(path: Path, line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    """The cells by their columns, as many as in the header; blank ones may follow."""
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    if not any(cell.strip() for cell in cells[len(header) :]) and not any(header[len(cells) :]):
        return dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))
    advice = (
        "Put cells that hold commas or line breaks in double quotes."
        if len(cells) > len(header)
        else "An empty cell needs its comma; cells that hold line breaks need double quotes."
    )
    raise UserError(
        f"{path}:{line}: expected {len(header)} cells as in the header, found {len(cells)}. "
        f"{advice}"
    )


class _Shape:
    """What rows of a file have in common, by which a row inside a cell is known."""

    _FILE = re.compile(r"\S(.*[^\s.])?\.[A-Za-z][A-Za-z0-9]{1,4}")
    _NUMBER = re.compile(r"[^\s,;]*[0-9][^\s,;]*")  # also as a part of a name

    def __init__(self, width: int, rows: Sequence[Sequence[str]]):
        self._width = width
        self._kinds: list[re.Pattern[str] | set[str] | None] = []
        for column in range(width):
            cells = [row[column] for row in rows if column < len(row) and "\n" not in row[column]]
            self._kinds.append(self._kind([cell for cell in cells if cell]))

    def _kind(self, cells: Sequence[str]) -> re.Pattern[str] | set[str] | None:
        """What the cells of a column are: few values, files or numbers; None for prose."""
        values = set(cells)
        if len(cells) >= 3 * len(values) > 0 and len(values) <= 20:
            return values
        for kind in (self._FILE, self._NUMBER):
            if cells and all(map(kind.fullmatch, cells)):
                return kind
        return None

    def is_swallowing(self, cells: Sequence[str]) -> bool:
        """Whether all lines but the first of a cell look like rows."""
        for number, cell in enumerate(cells):
            if "\n" not in cell:
                continue
            _, *lines, last = re.split(r"\r\n|\r|\n", cell)
            rows = [_split(line) for line in lines]
            if last and number:  # the end of a row's first cell is not told from a row's
                rows.append([*_split(last), *cells[number + 1 :]])
            if rows and all(map(self._is_row, rows)):
                return True
        return False

    def _is_row(self, cells: Sequence[str]) -> bool:
        if len(cells) != self._width or not any(self._kinds):
            return False
        return all(
            kind is None
            or (cell in kind if isinstance(kind, set) else kind.fullmatch(cell) is not None)
            for kind, cell in zip(self._kinds, cells, strict=True)
        )


def _split(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _tsv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Tables with tabs often hold quotes that mean themselves, so a line is a row; but libraries
    quote cells that hold tabs or line breaks.
    """
    with path.open(encoding="utf-8-sig") as file:
        header: list[str] = []
        ahead: deque[tuple[int, str]] = deque()  # lines that are rows of their own after all
        numbered = enumerate(_lines(path, file), 1)

        def following() -> tuple[int, str] | None:
            return ahead.popleft() if ahead else next(numbered, None)

        for number, line in iter(following, None):
            if not line.strip():
                continue
            cells = line.rstrip("\n").split("\t")
            if not header:
                header = _header(path, number, [_unquoted(cell) for cell in cells])
                continue
            if len(cells) != len(header):
                taken: list[tuple[int, str]] = []
                quoted = _quoted_tsv(line, iter(following, None), len(header), taken)
                if quoted is None:
                    ahead.extendleft(reversed(taken))
                cells = quoted or cells
            yield number, _mended_row(path, number, header, [_unquoted(cell) for cell in cells])


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner:
        return cell[1:-1].replace('""', '"')
    return cell


def _quoted_tsv(
    line: str, more: Iterable[tuple[int, str]], width: int, taken: list[tuple[int, str]]
) -> list[str] | None:
    """The cells of a row that has tabs or line breaks within quotes; None if it has not. The lines
    after it that were looked at are put into `taken`.
    """
    for number, following in chain([(0, "")], islice(more, _QUOTED_LINES)):
        line += following
        if number:
            taken.append((number, following))
            if '"' not in following:  # which closes nothing
                continue
        try:
            with _long_fields():
                rows = list(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error:
            if line.count('"') % 2 == 0:
                return None
            continue
        return rows[0] if len(rows) == 1 and len(rows[0]) == width else None
    return None


def _refuse_repeated(where: str, columns: Sequence[str]) -> None:
    # Spreadsheets leave columns without a name at the right; nobody can ask for those.
    repeated = [name for name, count in Counter(columns).items() if count > 1 and name.strip()]
    if repeated:
        raise UserError(
            f"{where}: column '{repeated[0]}' occurs more than once; expected distinct names. "
            "Rename or remove one."
        )


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    # By line breaks alone: text may hold other characters that end lines elsewhere.
    with path.open(encoding="utf-8-sig") as file:
        first = True
        for number, line in enumerate(_lines(path, file), 1):
            if not line.strip():
                continue
            try:
                if line[0] == "{":  # without a look for blanks around the object
                    row, end = _DECODER.raw_decode(line)
                if line[0] != "{" or line[end:] not in ("\n", ""):
                    row = _DECODER.decode(line)
            except _RepeatedNameError as error:
                _refuse_repeated(f"{path}:{number}", error.names)
                row = json.loads(line)  # names that nobody can ask for
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(
                    f"{path}:{number}: not valid JSON: {reason}. Expected one object per line."
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}:{number}: expected a JSON object per line, found a "
                    f"{type(row).__name__}."
                )
            if first and row and all(isinstance(value, (dict, list)) for value in row.values()):
                raise UserError(
                    f"{path}:{number}: the object holds whole columns; expected one object per row "
                    "and line, as pandas writes them with to_json(orient='records', lines=True)."
                )
            first = False
            has_half = ("\\ud" in line or "\\uD" in line) and _HALF.search(line)
            yield number, _whole(row) if has_half else row


def _whole(value: Any) -> Any:
    """A value of JSON, which can spell half of a surrogate pair (a cut emoji), without such."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [_whole(part) for part in value]
    if isinstance(value, dict):
        return {whole_text(name): _whole(part) for name, part in value.items()}
    return value


class _RepeatedNameError(ValueError):
    """A JSON object with a name more than once."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names


def _distinct_names(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _RepeatedNameError([name for name, _ in pairs])
    return row


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_names)


def _parquet_rows(path: Path, chunk: int) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_repeated(str(path), file.schema_arrow.names)
            classes = _class_names(file.schema_arrow)
            for batch in file.iter_batches(batch_size=min(chunk, _BATCH_ROWS)):
                for row in batch.to_pylist():
                    number += 1
                    _name_classes(row, classes, f"{path}:{number}")
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a valid Parquet file: {_first_line(error)}") from None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of class columns, which the datasets library notes in the schema."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        features = noted["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _name_classes(row: Row, classes: dict[str, list[str]], where: str) -> None:
    """Put the names of classes in the place of their numbers; -1 is a row without a label."""
    for column, names in classes.items():
        value = row.get(column)
        if not isinstance(value, int):
            continue
        if value >= len(names):
            raise UserError(
                f"{where}: column '{column}': expected a class from 0 to {len(names) - 1}, found "
                f"{value}."
            )
        row[column] = names[value] if value >= 0 else None


def _hub_rows(source: str, split: str, chunk: int) -> Iterator[tuple[int, Row]]:
    import datasets

    name, _, inside = source.partition(":")
    configuration = None
    if ":" in inside.partition("[")[0]:  # a split may be sliced: train[:10%]
        configuration, _, inside = inside.partition(":")
    split = inside or split
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=False)
    except Exception as error:  # the library raises whatever its many readers do
        raise UserError(
            f"{source}: no such file, and the Hub dataset '{name}' (split '{split}') cannot be "
            f"loaded: {_first_line(error)}{_configurations(name, configuration)}"
        ) from None
    classes = {
        column: feature.names
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if not len(rows):
        raise UserError(f"{source}: the Hub dataset has no rows in split '{split}'.")
    number = 0
    for batch in rows.iter(batch_size=chunk):
        for cells in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, cells, strict=True))
            _name_classes(row, classes, f"{source}:{number}")
            yield number, row


def _configurations(name: str, chosen: str | None) -> str:
    """A hint at a dataset's configurations, if it has several and none of them was chosen."""
    import datasets

    try:
        known = datasets.get_dataset_config_names(name)
    except Exception:  # the message already says why it cannot be loaded
        return ""
    if len(known) < 2 or chosen in known:
        return ""
    shown = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
    return f" It has the configurations {shown}: name one as {name}:CONFIGURATION:SPLIT."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- cells ---------------------------------------------------------------------------------------


def plain(value: Any, where: str, column: str) -> str:
    """A cell as text with single spaces; empty for null and NaN.

    Numbers become what they are written as: 1 and 1.0 are "1", True is "true".

    Raises:
        UserError: a cell that is no text or number.
    """
    if type(value) is str:
        return " ".join(whole_text(value).split())
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict, bytes)):
        found = "dict" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: column '{column}': expected text or a number, found a {found}.")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).split())
