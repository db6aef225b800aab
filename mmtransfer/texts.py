"""Target data for text classification: CSV, JSONL, Parquet and Hub sets, splits, leak checks."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmtransfer.config import DataConfig
from mmtransfer.data import connected
from mmtransfer.errors import UserError
from mmtransfer.progress import track

logger = logging.getLogger(__name__)
_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
_LONGEST_FIELD = 2**26  # characters; a quote that is never closed must not swallow all memory
_FIELD_LIMIT = threading.Lock()
_HEAD = 100  # rows looked at for column names: JSON objects may leave out what they lack
_NAMED_SKIPS = 3
_TOLERATED_LEAK = 0.01


@dataclass(frozen=True)
class TextExample:
    """A text with its class."""

    text: str
    """White space is single spaces."""
    label: str
    """Name of the class; empty where there is none."""
    target: str | None = None
    """What the sentiment is about."""
    group: str | None = None
    """What must stay in one split: article, author, product."""
    name: str = ""
    """Short name for messages: the file and the line (Parquet and Hub: the row, from 1)."""


@dataclass(frozen=True)
class TextSet:
    """The usable examples of one split, and what was left out."""

    name: str
    examples: list[TextExample]
    skipped: list[str] = field(default_factory=list)
    """One line per row that could not be used, with the reason."""

    def __len__(self) -> int:
        return len(self.examples)


# --- reading -------------------------------------------------------------------------------------


def iter_rows(source: str, *, split: str = "train", chunk: int = 4096) -> Iterator[dict[str, Any]]:
    """Rows of a CSV, JSONL or Parquet file, or of a Hub dataset given as NAME or NAME:SPLIT.

    Rows are read as they are asked for; at most `chunk` of them are in memory. What exists is a
    file, and so is what ends or begins like one; anything else is the name of a Hub dataset, of
    which `split` is read unless the name says otherwise. Cells of a CSV file are text, and None
    where a row ends early; integers of a Hub dataset's class column become the names of classes.

    Raises:
        UserError: at once for a path that is no readable kind of file; while reading for a file
            that is malformed, not UTF-8 or without rows, and a Hub dataset that cannot be loaded.
    """
    return (row for _, row in _numbered_rows(source, split, chunk))


def _numbered_rows(source: str, split: str, chunk: int = 4096) -> Iterator[tuple[int, Any]]:
    """Rows with their line in the file (Parquet and Hub: their number, from 1)."""
    path = _as_file(source)
    if path is None:
        return _hub_rows(source, split, chunk)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file (expected text data).")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a file: {', '.join(_SUFFIXES)}.")
    kind = path.suffix.lower()
    if kind not in _SUFFIXES:
        raise UserError(
            f"{path}: expected a file of {', '.join(_SUFFIXES)}, found '{kind or 'no suffix'}'."
        )
    return _file_rows(path, kind, chunk)


def _as_file(source: str) -> Path | None:
    """The path that a source means; None for a Hub dataset."""
    path = Path(os.path.expanduser(source))
    if os.path.exists(path) or source.lower().endswith(_SUFFIXES) or source[:1] in ("", *"./~"):
        return path
    return None


def _file_rows(path: Path, kind: str, chunk: int) -> Iterator[tuple[int, Any]]:
    if kind == ".csv":
        rows = _csv_rows(path)
    elif kind == ".parquet":
        rows = _parquet_rows(path, chunk)
    else:
        rows = _json_rows(path)
    empty = True
    try:
        for numbered in rows:
            empty = False
            yield numbered
    except UnicodeDecodeError:
        line, byte = _first_not_utf8(path)
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {byte} of the line cannot be read). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if empty:
        below = "below its header" if kind == ".csv" and path.stat().st_size else "in it"
        raise UserError(f"{path}: the file is empty: expected rows {below}, found none.")


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


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1  # where the row begins: a quoted cell may hold line breaks
            try:
                with _long_fields():
                    cells = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{path}:{line}: not valid CSV: {error}.") from None
            if cells is None:
                return
            if not cells:
                continue  # a blank line
            if not header:
                header = [name.strip() for name in cells]
                _refuse_repeated(path, header)
                continue
            if len(cells) > len(header):
                raise UserError(
                    f"{path}:{line}: expected {len(header)} cells as in the header, found "
                    f"{len(cells)}. Put cells that hold commas or line breaks in double quotes."
                )
            # A row that ends early lacks its last cells.
            yield line, dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _refuse_repeated(path: Path, columns: Sequence[str]) -> None:
    # Spreadsheets leave columns without a name at the right; nobody can ask for those.
    repeated = [name for name, count in Counter(columns).items() if count > 1 and name]
    if repeated:
        raise UserError(
            f"{path}: column '{repeated[0]}' occurs more than once; expected distinct names. "
            "Rename or remove one."
        )


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
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
            yield number, row


def _parquet_rows(path: Path, chunk: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_repeated(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=chunk):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a valid Parquet file: {_first_line(error)}") from None


def _hub_rows(source: str, split: str, chunk: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    name, _, own_split = source.partition(":")
    split = own_split or split
    try:
        rows = datasets.load_dataset(name, split=split, streaming=False)
    except Exception as error:  # the library raises whatever its many readers do
        raise UserError(
            f"{source}: no such file, and the Hub dataset '{name}' (split '{split}') cannot be "
            f"loaded: {_first_line(error)}"
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
            for column, names in classes.items():
                value = row[column]
                # Splits without published labels hold -1.
                row[column] = names[value] if value is not None and value >= 0 else None
            yield number, row


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_texts(
    source: str, config: DataConfig, *, name: str, split: str = "train", labelled: bool = True
) -> TextSet:
    """Read a set of texts (see `iter_rows` for what `source` and `split` mean).

    Rows without a text, and unless `labelled` is off without a label, are left out and listed.
    Numbers become the label that they are written as: 1 and 1.0 are "1", True is "true".

    Raises:
        UserError: see `iter_rows`; a missing column; a cell that is no text or number; nothing
            usable is left.
    """
    rows = _numbered_rows(source, split)
    head = list(islice(rows, _HEAD))
    text_column = config.text_column or "text"
    _check_columns(source, list(dict.fromkeys(chain(*(row for _, row in head)))), config, labelled)
    path = _as_file(source)
    short = path.name if path else source if ":" in source else f"{source}:{split}"
    examples: list[TextExample] = []
    skipped: list[str] = []
    for number, row in track(chain(head, rows), f"reading {name}"):
        where = f"{short}:{number}"
        text, label, target, group = (
            _plain(row.get(column), where, column)
            for column in (
                text_column,
                config.label_column,
                config.target_column,
                config.group_column,
            )
        )
        if not text or (labelled and not label):
            empty = config.label_column if text else text_column
            skipped.append(f"{where}: column '{empty}' is empty.")
            continue
        examples.append(TextExample(text, label, target or None, group or None, where))
    if not examples:
        needed = "a text and a label" if labelled else "a text"
        raise UserError(
            f"{source}: expected rows with {needed}, found none among {len(skipped)}. "
            f"First: {skipped[0]}"
        )
    for line in skipped[:_NAMED_SKIPS]:
        logger.warning("skipped: %s", line)
    if len(skipped) > _NAMED_SKIPS:
        more = len(skipped) - _NAMED_SKIPS
        logger.warning("skipped: %d more rows of '%s', for the same reasons", more, name)
    return TextSet(name, examples, skipped)


def _check_columns(source: str, columns: Sequence[str], config: DataConfig, labelled: bool) -> None:
    needed = {"text_column": config.text_column or "text"}
    if labelled:
        needed["label_column"] = config.label_column
    for setting in ("target_column", "group_column"):  # needed only if the user named them
        if getattr(config, setting) != DataConfig.model_fields[setting].default:
            needed[setting] = getattr(config, setting)
    for setting, column in needed.items():
        if column not in columns:
            raise UserError(
                f"{source}: column '{column}' not found; columns are {', '.join(columns)}. "
                f"Set data.{setting}."
            )


def _plain(value: Any, where: str, column: str) -> str:
    """A cell as text with single spaces; empty for null and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict, bytes)):
        raise UserError(
            f"{where}: column '{column}': expected text or a number, found a "
            f"{type(value).__name__}."
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # JSON can spell half of a surrogate pair (a cut emoji), which no tokeniser takes.
    return " ".join(str(value).encode("utf-8", "replace").decode("utf-8").split())


# --- labels --------------------------------------------------------------------------------------


def label_names(train: TextSet) -> list[str]:
    """The classes of the training data, sorted; by value if all are integers.

    Raises:
        UserError: fewer than two.
    """
    labels = sorted({example.label for example in train.examples})
    if len(labels) < 2:
        found = f"only '{labels[0]}'" if labels else "none"
        raise UserError(f"'{train.name}': expected at least two classes, found {found}.")
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels):
        labels.sort(key=int)
    return labels


def check_labels(examples: TextSet, labels: Sequence[str], *, where: str) -> None:
    """Refuse labels that are not among the known ones; `where` names the set's origin.

    Raises:
        UserError: a label that training data does not have.
    """
    known = set(labels)
    unseen: dict[str, str] = {}
    for example in examples.examples:
        if example.label not in known:
            unseen.setdefault(example.label, example.name)
    if unseen:
        named = ", ".join(f"'{label}'" for label in sorted(unseen)[:5])
        raise UserError(
            f"{where}: expected labels of the training data ({_shorten(labels)}), found "
            f"{named}{', ...' if len(unseen) > 5 else ''}. First: {next(iter(unseen.values()))}. "
            "Rename the labels or remove the rows."
        )


def add_label_texts(train: TextSet, texts: Mapping[str, Sequence[str]]) -> TextSet:
    """The training examples, and those that say what a label means (`data.label_texts`).

    Raises:
        UserError: a label that the training data does not have.
    """
    where = "data.label_texts"
    added = [
        TextExample(_plain(text, where, label), label, name=f"{where}.{label}")
        for label, meaning in texts.items()
        for text in meaning
    ]
    check_labels(TextSet(train.name, added), label_names(train), where=where)
    return TextSet(train.name, [*train.examples, *added], train.skipped)


def _shorten(labels: Sequence[str], most: int = 20) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")


# --- splits and leaks ----------------------------------------------------------------------------


def hold_out_texts(
    examples: Sequence[TextExample], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of (training, validation) examples; about `fraction` of them held out.

    If any example has a group, groups and identical texts stay together and are drawn at random.
    Otherwise every class gives about its share, and identical texts about the same target stay
    together. Every class keeps at least one example in training. Case does not distinguish texts.

    Raises:
        UserError: nothing can be held out, e.g. because everything belongs together.
    """
    grouped = any(example.group is not None for example in examples)
    if grouped:
        units = connected(
            [f"text {e.text.casefold()}", *([] if e.group is None else [f"group {e.group}"])]
            for e in examples
        )
    else:
        units = connected([repr(_identity(example))] for example in examples)
    rng = random.Random(seed)
    rng.shuffle(units)
    left = Counter(example.label for example in examples)  # in training
    if not grouped:
        units = _interleaved(units, examples, left, rng)

    def labels(unit: list[int]) -> Counter[str]:
        return Counter(examples[index].label for index in unit)

    def can_go(unit: list[int]) -> bool:
        return all(left[label] > count for label, count in labels(unit).items())

    wanted = max(1, round(fraction * len(examples)))
    held: list[int] = []
    for unit in units:
        # Take a unit only if that brings the share nearer to what was asked.
        nearer = abs(len(held) + len(unit) - wanted) < abs(len(held) - wanted)
        if nearer and can_go(unit):
            held += unit
            left -= labels(unit)
    if not held:
        held = min(filter(can_go, units), key=len, default=[])
    if not held:
        raise UserError(
            f"No validation data can be held out of {len(examples)} training examples in "
            f"{len(units)} {'group(s)' if grouped else 'distinct text(s)'}: some class would have "
            "none left. Name data.validation, or give more examples."
        )
    chosen = set(held)
    return [i for i in range(len(examples)) if i not in chosen], sorted(held)


def _interleaved(
    units: list[list[int]],
    examples: Sequence[TextExample],
    totals: Counter[str],
    rng: random.Random,
) -> list[list[int]]:
    """Units in an order of which every beginning holds about the same share of each class."""
    passed: Counter[str] = Counter()
    position = []
    for unit in units:
        label = examples[unit[0]].label
        # The random part decides which of the small classes, all below one example's share, give.
        position.append((passed[label] + rng.random() * len(unit)) / totals[label])
        passed[label] += len(unit)
    return [units[i] for i in sorted(range(len(units)), key=position.__getitem__)]


def _identity(example: TextExample) -> tuple[str, str]:
    return example.text.casefold(), (example.target or "").casefold()


def text_leaks(first: TextSet, second: TextSet) -> dict[str, list[str]]:
    """What two splits share: `same-text`, examples of `second` whose text and target are also in
    `first`. Case does not count.
    """
    known = {_identity(example): example for example in first.examples}
    names = []
    for example in second.examples:
        twin = known.get(_identity(example))
        if twin is not None:
            same_label = "same" if twin.label == example.label else "different"
            names.append(f"{example.name} = {twin.name} ({same_label} label)")
    return {"same-text": names} if names else {}


def refuse_text_leaks(
    first: TextSet, second: TextSet, allowed: Sequence[str]
) -> dict[str, list[str]]:
    """Leaks between two splits; those not allowed by name end the run.

    Up to 1 % of `second` is only warned of: short sentences recur by chance.

    Raises:
        UserError: a larger leak that is not in `allowed`.
    """
    leaks = text_leaks(first, second)
    for kind, names in leaks.items():
        message = (
            f"{len(names)} of {len(second)} texts of '{second.name}' are also in '{first.name}' "
            f"({kind}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
        )
        if kind in allowed:
            logger.warning("%s Accepted by data.allow_leaks.", message)
        elif len(names) <= _TOLERATED_LEAK * len(second):
            logger.warning("%s Accepted: no more than 1 %%.", message)
        else:
            raise UserError(
                f"{message} Scores would flatter the model. Remove them from one of the two, or "
                f"accept them with data.allow_leaks: [{kind}]."
            )
    return leaks
