"""Classes of texts: a few at once, or a file larger than memory, row by row."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from mmtransfer.config import DataConfig, RuntimeConfig
from mmtransfer.errors import UserError
from mmtransfer.models import load
from mmtransfer.progress import track
from mmtransfer.runtime import choose_device, use_runtime
from mmtransfer.text_models import Prediction, TextModel
from mmtransfer.texts import iter_rows

_ROWS = 2048  # held at a time; sorted by length within, so batches waste little
_PREFIX = "probability_"
_GIVEN = "given_label"


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
        found = _classifier(model, runtime)
        return found.predict(texts, targets)


def predict_texts(
    model: str, texts: Sequence[str], target: str | None, *, runtime: RuntimeConfig
) -> list[dict[str, Any]]:
    """Rows `text`, `label`, `probabilities` of a few texts about one target."""
    targets = [target] * len(texts) if target else None
    found = predict(model, texts, targets, runtime=runtime)
    return [
        {"text": text, "label": one.label, "probabilities": one.probabilities}
        for text, one in zip(texts, found, strict=True)
    ]


def _classifier(model: str | TextModel, runtime: RuntimeConfig) -> TextModel:
    found = load(model) if isinstance(model, str) else model
    if not isinstance(found, TextModel):
        raise UserError(f"{model}: expected a text classifier, found a speech recogniser.")
    found.network.to(choose_device(runtime))
    return found


def predict_file(
    model: str,
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
        raise UserError(f"{output}: expected a .csv or .jsonl file to write, found '{kind}'.")
    part = None if target is None else target.with_name(target.name + ".part")
    if part is not None and part.exists() and not resume:
        raise UserError(f"{part}: an interrupted output. Continue it with --resume, or remove it.")
    rows = _checked(iter_rows(data), data, config)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{data}: expected rows of texts, found none.")
    with use_runtime(runtime):
        text_model = _classifier(model, runtime)
        done = _written(part, kind) if part is not None and resume else 0
        counts: Counter[str] = Counter()
        with _opened(part, done) as file:
            writer = _Writer(file, kind, list(first), text_model.labels, header=not done)
            everything = islice(chain([first], rows), done, None)
            for chunk in _chunks(track(everything, "classifying")):
                texts = [str(row[config.text_column or "text"]) for row in chunk]
                targets = [_cell(row.get(config.target_column)) for row in chunk]
                found = text_model.predict([" ".join(t.split()) for t in texts], targets)
                for row, one in zip(chunk, found, strict=True):
                    writer.write(row, one)
                    counts[one.label] += 1
                file.flush()
    if part is not None and target is not None:
        part.replace(target)
    return dict(counts)


def _cell(value: Any) -> str | None:
    return " ".join(str(value).split()) or None if value is not None else None


def _checked(
    rows: Iterable[dict[str, Any]], data: str, config: DataConfig
) -> Iterator[dict[str, Any]]:
    column = config.text_column or "text"
    for number, row in enumerate(rows, 1):
        if row.get(column) is None:
            if number == 1:
                found = ", ".join(map(str, row))
                raise UserError(
                    f"{data}: column '{column}' not found; columns are {found}. Set --text-column."
                )
            row = {**row, column: ""}
        yield row


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(islice(rows, _ROWS)):
        yield chunk


@contextmanager
def _opened(part: Path | None, done: int) -> Iterator[TextIO]:
    if part is None:
        yield sys.stdout
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a" if done else "w", encoding="utf-8", newline="") as file:
        yield file


def _written(part: Path, kind: str) -> int:
    """Whole rows of an interrupted output; what follows them is cut off."""
    if not part.exists():
        return 0
    position = end = rows = 0
    quoted = False
    with part.open("r+b") as file:
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


class _Writer:
    """Rows with their predictions, as CSV or JSON lines. A label that a row came with is kept as
    `given_label`.
    """

    def __init__(
        self, file: TextIO, kind: str, columns: Sequence[str], labels: list[str], *, header: bool
    ):
        self._file, self._kind = file, kind
        own = [_GIVEN if name == "label" else name for name in columns]
        names = [*own, "label", *(_PREFIX + label for label in labels)]
        self._csv = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        if kind == ".csv" and header:
            self._csv.writeheader()

    def write(self, row: dict[str, Any], found: Prediction) -> None:
        """Write one row."""
        own = {_GIVEN if name == "label" else name: value for name, value in row.items()}
        shares = {name: round(p, 6) for name, p in found.probabilities.items()}
        if self._kind == ".csv":
            columns = {_PREFIX + name: p for name, p in shares.items()}
            self._csv.writerow({**own, "label": found.label, **columns})
            return
        out = {**own, "label": found.label, "probabilities": shares}
        self._file.write(json.dumps(out, ensure_ascii=False, default=str) + "\n")
