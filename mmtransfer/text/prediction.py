"""Classes of texts: a few at once, or a file larger than memory, row by row."""

from __future__ import annotations

import csv
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from mmtransfer.cache import open_private
from mmtransfer.config import DataConfig, RuntimeConfig, text_columns
from mmtransfer.data.printing import json_line, spreadsheet_cell
from mmtransfer.data.tables import numbered_rows, plain, row_characters, with_columns
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, other_kind, resolve
from mmtransfer.progress import track
from mmtransfer.runtime import choose_device, use_runtime
from mmtransfer.text.classifier import (
    Prediction,
    TextModel,
    TextSettings,
    cut_note,
    load_text_model,
)
from mmtransfer.text.ensemble import is_ensemble, load_ensemble

logger = logging.getLogger(__name__)
_ROWS = 2048  # held at a time; sorted by length within, so batches waste little
_CHARACTERS = 2**24  # of their texts, likewise
_PREFIX = "probability_"
_GIVEN = "given_"


def predict(
    model: str | TextModel,
    texts: Sequence[str],
    targets: Sequence[str | None] | None = None,
    *,
    runtime: RuntimeConfig | None = None,
) -> list[Prediction]:
    """Classes of texts, in their order; see `TextModel.predict`.

    Raises:
        UserError: a model that classifies no texts.
    """
    runtime = runtime or RuntimeConfig()
    with use_runtime(runtime):
        found = open_classifier(model, runtime)
        return found.predict(texts, targets)


def predict_texts(
    model: str | Checkpoint, texts: Sequence[str], target: str | None, *, runtime: RuntimeConfig
) -> list[dict[str, Any]]:
    """Rows `text`, `label`, `probabilities` of a few texts about one target."""
    targets = [target] * len(texts) if target else None
    with use_runtime(runtime):
        classifier = open_classifier(model, runtime)
        found = classifier.predict(texts, targets)
    note = cut_note(sum(one.is_cut for one in found), len(found), classifier.settings)
    if note is not None:
        logger.warning("%s", note)
    if target and classifier.settings.targets is False:
        logger.warning("the target is not used; the model was trained without targets")
    return [
        {"text": text, "label": one.label, "probabilities": one.probabilities}
        for text, one in zip(texts, found, strict=True)
    ]


def open_classifier(model: str | Checkpoint | TextModel, runtime: RuntimeConfig) -> TextModel:
    """A text classifier on its device.

    Raises:
        UserError: a model that classifies no texts, or a device that is not there.
    """
    if not isinstance(model, TextModel):
        checkpoint = resolve(model) if isinstance(model, str) else model
        if checkpoint.kind != "sentiment":
            raise other_kind(checkpoint, "a text classifier")
        model = (
            load_ensemble(checkpoint) if is_ensemble(checkpoint) else load_text_model(checkpoint)
        )
    model.network.to(choose_device(runtime))
    return model


def predict_file(
    model: str | Checkpoint,
    data: str,
    output: str | None,
    *,
    config: DataConfig,
    resume: bool = False,
    runtime: RuntimeConfig | None = None,
) -> dict[str, int]:
    """Classify every row of a file into another; returns how often each class was found.

    Rows keep their columns and get `label` and the probabilities (CSV: one column each, JSONL: a
    mapping). Memory does not grow with the file. Until it is whole the output is FILE.part; with
    `resume`, an interrupted one is continued. Without `output` JSON lines go to standard output.

    Raises:
        UserError: a model or data that cannot be used, or an output that is there already.
    """
    runtime = runtime or RuntimeConfig()
    target = None if output is None else Path(output)
    kind = ".jsonl" if target is None else target.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise UserError(
            f"{output}: expected a .csv or .jsonl file to write, or a folder, found '{kind}'."
        )
    part = None if target is None else target.with_name(target.name + ".part")
    if part is not None and part.exists() and not resume:
        raise UserError(f"{part}: an interrupted output. Continue it with --resume, or remove it.")
    columns = text_columns(config, labelled=False)
    rows = given_rows(data, columns)
    first = next(rows)
    with use_runtime(runtime):
        text_model = open_classifier(model, runtime)
        done = written(part, kind) if part is not None and resume else 0
        counts: Counter[str] = Counter()
        with opened(part, done) as file:
            writer = RowWriter(file, kind, list(first.row), text_model.labels, header=not done)
            everything = islice(chain([first], rows), done, None)
            cut = empty = total = with_target = 0
            for chunk in chunked(track(everything, "classifying"), _ROWS):
                targets = [given.target or None for given in chunk]
                found = text_model.predict([given.text for given in chunk], targets)
                for given, one in zip(chunk, found, strict=True):
                    writer.write(given.row, one.label, one.probabilities)
                    counts[one.label] += 1
                file.flush()
                total += len(chunk)
                cut += sum(one.is_cut for one in found)
                empty += sum(not given.text for given in chunk)
                with_target += sum(target is not None for target in targets)
    for note in (
        *notes(total, cut, empty, with_target, columns, text_model.settings),
        f"{writer.formulas} cells that begin as formulas do got a ' before them, so that no "
        "spreadsheet runs them."
        if writer.formulas
        else None,
    ):
        if note is not None:
            logger.warning("%s: %s", data, note)
    if part is not None and target is not None:
        part.replace(target)
    return dict(counts)


def notes(
    total: int,
    cut: int,
    empty: int,
    with_target: int,
    columns: Mapping[str, str | None],
    settings: TextSettings,
) -> list[str | None]:
    """Lines about rows that were classified: so many, cut, without text, with a target."""
    return [
        cut_note(cut, total, settings),
        f"{empty} of {total} rows have no text; their class means nothing." if empty else None,
        f"column '{columns['target_column']}' is not used; the model was trained without targets."
        if with_target and settings.targets is False
        else None,
    ]


@dataclass(frozen=True)
class Given:
    """A row of a file, and what of it is classified."""

    number: int
    """Line on which it begins, or its number."""
    row: dict[str, Any]
    text: str
    target: str


def given_rows(data: str, columns: dict[str, str | None]) -> Iterator[Given]:
    """The rows of data as `numbered_rows` takes it.

    Raises:
        UserError: there are none; a column that is not there, a cell that is no text or number.
    """
    text, target = columns["text_column"], columns["target_column"]
    assert text is not None  # only the others may be left out
    rows = with_columns(data, numbered_rows(data), columns, {"text_column"}, option="--{}")
    for number, row in rows:
        where = f"{data}:{number}"
        about = row.get(target) if target is not None else None
        yield Given(
            number,
            row if text in row else {**row, text: ""},
            plain(row.get(text), where, text),
            plain(about, where, str(target)),
        )


def chunked(rows: Iterator[Given], most: int) -> Iterator[list[Given]]:
    """Rows in lists of at most so many, fewer if they are long; by the rows alone."""
    chunk: list[Given] = []
    characters = 0
    for given in rows:
        chunk.append(given)
        characters += row_characters(given.row)
        if len(chunk) == most or characters > _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def free_name(name: str, taken: set[str]) -> str:
    """The name of a column that a row came with, beside those that are taken; takes it."""
    while name in taken:
        name = _GIVEN + name
    taken.add(name)
    return name


@contextmanager
def opened(part: Path | None, done: int) -> Iterator[IO[str]]:
    """An output to write, behind the rows that are `done`; standard output without a file."""
    if part is None:
        yield sys.stdout
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    with open_private(part, "a" if done else "w", encoding="utf-8", newline="") as file:
        yield file


def written(part: Path, kind: str) -> int:
    """Whole rows of an interrupted output; what follows them is cut off."""
    if not part.exists():
        return 0
    position = end = rows = 0
    quoted = False
    with open_private(part, "r+b") as file:
        for line in file:
            position += len(line)
            # A quoted CSV cell may hold line breaks: a row ends at a break outside quotes.
            if kind == ".csv":
                quoted ^= line.count(b'"') % 2 == 1
            if not quoted and line.endswith(b"\n"):
                end, rows = position, rows + 1
        rows -= kind == ".csv"  # the header
        file.truncate(end if rows > 0 else 0)
    return max(0, rows)


class RowWriter:
    """Rows with their predictions, as CSV or JSON lines. A column that a row came with, and that is
    written anew (its label), is kept as `given_label`.
    """

    def __init__(
        self, file: IO[str], kind: str, columns: Sequence[str], labels: list[str], *, header: bool
    ):
        self._file, self._kind = file, kind
        names = ["label", *(_PREFIX + label for label in labels)]
        self._taken = {*names} if kind == ".csv" else {"label", "probabilities"}
        self._own: dict[str, str] = {}
        self.formulas = 0
        """Cells that a spreadsheet would have run."""
        self._csv = csv.writer(file, lineterminator="\n")
        self._columns, self._names = list(columns), names
        if kind == ".csv" and header:
            self._write_cells([*map(self._own_name, columns), *names])

    def write(self, row: dict[str, Any], label: str, probabilities: dict[str, float]) -> None:
        """Write one row."""
        shares = {name: round(p, 6) for name, p in probabilities.items()}
        if self._kind == ".csv":
            values = {"label": label} | {_PREFIX + name: p for name, p in shares.items()}
            own = [row.get(name, "") for name in self._columns]
            self._write_cells([*own, *(values.get(name, "") for name in self._names)])
            return
        given = {self._own_name(name): value for name, value in row.items()}
        self._file.write(json_line({**given, "label": label, "probabilities": shares}) + "\n")

    def _own_name(self, name: str) -> str:
        if name not in self._own:
            self._own[name] = free_name(name, self._taken)
        return self._own[name]

    def _write_cells(self, cells: Sequence[Any]) -> None:
        safe = [spreadsheet_cell(cell) for cell in cells]
        self.formulas += sum(a is not b for a, b in zip(safe, cells, strict=True))
        self._csv.writerow(safe)
