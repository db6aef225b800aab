"""Texts in bulk: classified here or on Ray, each part of the rows one Parquet file, written once.

Parts are so many rows in the order of the data, and each is classified by one thread, so that its
bits depend on the model and its rows alone. A file's name has the number of its part and a digest
of the part's rows: the names alone tell a later run what is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmtransfer.config import DataConfig, RuntimeConfig, text_columns
from mmtransfer.data.printing import json_line, whole_text
from mmtransfer.data.tables import as_file
from mmtransfer.hub.checkpoint import Checkpoint, other_kind, resolve
from mmtransfer.progress import track
from mmtransfer.runtime import cores, use_runtime
from mmtransfer.scale.cluster import check_ray, check_workers
from mmtransfer.scale.folder import RunFolder
from mmtransfer.text.classifier import Prediction, TextSettings
from mmtransfer.text.prediction import Given, chunked, free_name, given_rows, notes, open_classifier

logger = logging.getLogger(__name__)
_PART_ROWS = 4096
_HEAD = 100  # rows whose columns get columns in the output
_ROWS, _SUMMARY = "rows", "summary.json"
_OTHERS = "others"


@dataclass(frozen=True)
class TextOptions:
    """What is classified, and where to.

    Raises:
        UserError: a value that cannot be used.
    """

    model: str
    data: str
    """A CSV, TSV, JSONL or Parquet file, or a Hub dataset."""
    output: str
    """Folder or address of the rows; the same again resumes."""
    _: KW_ONLY
    columns: DataConfig = field(default_factory=DataConfig)
    """Names of the columns with the text and the target."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, and parts that are classified at the same time (threads; on Ray of each worker)."""
    ray: str | None = None
    """`local`, `auto` or HOST:PORT of a Ray cluster; None: this process."""
    workers: int | None = None
    """Classifiers on Ray; by default as many as there is room for."""
    gpus_per_worker: float = 0.0
    """Share of a GPU that each takes, or how many."""

    def __post_init__(self) -> None:
        check_workers(self.ray, self.workers, self.gpus_per_worker)


@dataclass
class TextSummary:
    """What a run did, earlier runs with the same output not counted."""

    rows: int = 0
    known: int = 0
    """Rows that an earlier run had classified."""
    parts: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """How often each class was found."""
    cut: int = 0
    """Texts longer than the model takes."""
    empty: int = 0
    """Rows without a text."""
    with_target: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Processor time of all that took part."""
    workers: int = 1

    def line(self) -> str:
        """The last line of a run."""
        speed = self.rows / self.wall_s if self.wall_s else 0.0
        counted = "".join(f", {count} {label}" for label, count in sorted(self.labels.items()))
        return (
            f"{self.rows} rows ({self.known} known before) in {self.wall_s:.0f} s "
            f"({speed:.0f} rows a second){counted}"
        )


@dataclass(frozen=True)
class Part:
    """Rows that are classified together."""

    number: int
    rows: Sequence[Given]
    name: str
    """Of its file: its number, and a digest of its rows."""

    @property
    def texts(self) -> list[str]:
        """What is classified."""
        return [given.text for given in self.rows]

    @property
    def targets(self) -> list[str | None]:
        """What each text is classified about."""
        return [given.target or None for given in self.rows]


class Classifier:
    """A text classifier that several threads use at the same time."""

    def __init__(self, model: str | Checkpoint, runtime: RuntimeConfig):
        self._model = open_classifier(model, runtime)
        self._model.network.eval()
        self._tokenizing = threading.Lock()  # a tokenizer keeps how it was last asked to cut
        self._of_thread = threading.local()
        self.settings = self._model.settings

    def classify(self, texts: Sequence[str], targets: Sequence[str | None]) -> list[Prediction]:
        """Classes of a part's texts, by this thread alone."""
        import torch

        torch.set_num_threads(1)  # of this thread; with more, sums are in another order
        with self._tokenizing:
            encoded = self._model.encode(texts, targets)
        if not hasattr(self._of_thread, "model"):
            # A forward pass keeps states in its modules; the weights are shared.
            self._of_thread.model = self._model.with_own_modules()
        return self._of_thread.model.predict_encoded(encoded)


class TextRun:
    """What is to be classified, and what was; whoever classifies takes parts from `todo` and calls
    `add`, from one thread.
    """

    def __init__(self, output: RunFolder, rows: Iterator[Given], columns: Sequence[str]):
        self._output = output
        self._columns, self._known_columns = columns, set(columns)
        self._there: dict[int, list[str]] = {}
        for name in output.storage.names(_ROWS):
            self._there.setdefault(int(name.partition("-")[0]), []).append(name)
        self._rows = rows
        self._started = time.monotonic()
        self.summary = TextSummary()

    def todo(self) -> Iterator[Part]:
        """The parts that are not there, in order. Files of rows that the data no longer has are
        removed.
        """
        number, changed = -1, 0
        for number, rows in enumerate(chunked(track(self._rows, "classifying"), _PART_ROWS)):
            part = Part(number, rows, f"{number:07d}-{self._digest(rows)}.parquet")
            there = self._there.get(number, [])
            if part.name in there:
                self.summary.known += len(rows)
                self._remove_others(part)
                continue
            changed += bool(there)
            yield part
        gone = [name for there, names in self._there.items() if there > number for name in names]
        for name in gone:
            self._output.storage.remove(f"{_ROWS}/{name}")
        if changed or gone:
            logger.warning(
                "the data has changed since an earlier run: %d parts were classified anew, %d "
                "removed",
                changed,
                len(gone),
            )

    def add(self, part: Part, found: Sequence[Prediction]) -> None:
        """A part has been classified."""
        self._output.write_table(f"{_ROWS}/{part.name}", self._table(part, found))
        self._remove_others(part)
        summary = self.summary
        summary.parts += 1
        summary.rows += len(found)
        summary.labels.update(one.label for one in found)
        summary.cut += sum(one.is_cut for one in found)
        summary.empty += sum(not given.text for given in part.rows)
        summary.with_target += sum(bool(given.target) for given in part.rows)

    def _remove_others(self, part: Part) -> None:
        for name in self._there.get(part.number, ()):
            if name != part.name:
                self._output.storage.remove(f"{_ROWS}/{name}")

    def _digest(self, rows: Sequence[Given]) -> str:
        found = hashlib.sha256()
        for given in rows:
            line = [given.number, given.text, given.target, *self._cells(given)]
            found.update(json.dumps(line).encode())
        return found.hexdigest()[:16]

    def _cells(self, given: Given) -> list[str | None]:
        """The columns that a row came with, and what else it has."""
        others = {n: value for n, value in given.row.items() if n not in self._known_columns}
        return [
            *(_cell(given.row.get(name)) for name in self._columns),
            _cell(others) if others else None,
        ]

    def _table(self, part: Part, found: Sequence[Prediction]) -> pa.Table:
        labels = list(found[0].probabilities)
        shares = {f"probability_{label}": label for label in labels}
        taken = {"row", "label", _OTHERS, *shares}
        names = [*(free_name(name, taken) for name in self._columns), _OTHERS]
        cells = zip(*map(self._cells, part.rows), strict=True)
        columns: dict[str, Any] = {"row": pa.array([given.number for given in part.rows])}
        columns |= {n: pa.array(own, pa.string()) for n, own in zip(names, cells, strict=True)}
        columns["label"] = pa.array([one.label for one in found])
        for name, label in shares.items():
            values = [round(one.probabilities[label], 6) for one in found]
            columns[name] = pa.array(values, pa.float64())
        return pa.table(columns)

    def close(self) -> TextSummary:
        """The run has ended."""
        self.summary.wall_s = round(time.monotonic() - self._started, 3)
        if self.summary.parts:  # else that of the last run stays
            values = json.dumps(vars(self.summary), indent=1)
            self._output.storage.write(_SUMMARY, values.encode())
        return self.summary


def _cell(value: Any) -> str | None:
    """A cell as text; what is none as JSON. A column has one type in all parts, whatever comes."""
    if value is None or isinstance(value, str):
        return None if value is None else whole_text(value)
    return json_line(value)


def classify(options: TextOptions) -> TextSummary:
    """Classify all rows that are not in the output yet.

    Raises:
        UserError: something that cannot be used.
        OSError: the output cannot be written.

    Example:
        classify(TextOptions("runs/news", "archive.jsonl", "rows", ray="local"))
    """
    if options.ray is not None:
        check_ray(options.ray)
    checkpoint = resolve(options.model)
    if checkpoint.kind != "sentiment":
        raise other_kind(checkpoint, "a text classifier")
    roles = text_columns(options.columns, labelled=False)
    rows = given_rows(options.data, roles)
    head = list(islice(rows, _HEAD))
    columns = list(dict.fromkeys(chain(*(given.row for given in head))))
    path = as_file(options.data)
    settings: Mapping[str, Any] = {
        "model": checkpoint.digest,
        "data": options.data if path is None else str(Path(path).resolve()),
        "text_column": roles["text_column"],
        "target_column": roles["target_column"],
        "columns": columns,
    }
    output = RunFolder(options.output, settings)
    with output.alone():
        run = TextRun(output, chain(head, rows), columns)
        try:
            parts = run.todo()
            part = next(parts, None)
            if part is None:
                logger.info("%s: all is classified already", output.storage.name)
                return run.summary
            parts = chain([part], parts)
            if options.ray is None:
                used = classify_here(run, parts, checkpoint, options.runtime)
            else:
                from mmtransfer.scale.texts_on_ray import classify_on_ray

                used = classify_on_ray(run, parts, checkpoint, options)
        finally:
            summary = run.close()
    counts = (summary.rows, summary.cut, summary.empty, summary.with_target)
    for note in notes(*counts, roles, used):
        if note is not None:
            logger.warning("%s: %s", options.data, note)
    return summary


def classify_here(
    run: TextRun, parts: Iterator[Part], checkpoint: Checkpoint, runtime: RuntimeConfig
) -> TextSettings:
    """Classify parts in this process, one to a thread; returns the settings of the model."""
    count = runtime.threads or cores()
    running: dict[Future[list[Prediction]], Part] = {}

    def collect(most: int) -> None:
        while len(running) > most:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                run.add(running.pop(done), done.result())

    started = time.process_time()
    with use_runtime(RuntimeConfig(threads=1)), ThreadPoolExecutor(count, "classifier") as pool:
        classifier = Classifier(checkpoint, runtime)
        try:
            for part in parts:
                running[pool.submit(classifier.classify, part.texts, part.targets)] = part
                collect(2 * count - 1)
            collect(0)
        finally:
            pool.shutdown(cancel_futures=True)
    run.summary.cpu_s = time.process_time() - started
    return classifier.settings
