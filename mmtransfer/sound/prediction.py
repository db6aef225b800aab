"""Classes of sounds: a few recordings, or every clip that a table names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmtransfer.config import DataConfig, RuntimeConfig
from mmtransfer.data.tables import SUFFIXES, numbered_rows, with_columns
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.progress import track
from mmtransfer.runtime import choose_device, use_runtime
from mmtransfer.sound.classifier import (
    LONGEST_CLIP_S,
    SoundModel,
    SoundPrediction,
    load_sound_model,
)
from mmtransfer.speech.audio import MediaError, check_file, decode_clip
from mmtransfer.speech.clips import file_name_cell, seconds_cell
from mmtransfer.speech.recordings import may_be_recording, visible_files
from mmtransfer.text.prediction import RowWriter, opened, written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Given:
    """A row of a table, and the clip that it names."""

    row: dict[str, Any]
    path: Path
    start: float = 0.0
    end: float | None = None


def predict_recordings(
    checkpoint: Checkpoint, paths: Sequence[str], *, runtime: RuntimeConfig
) -> Iterator[dict[str, Any]]:
    """Rows `file_name`, `label`, `probabilities` of recordings.

    Raises:
        UserError: no sound classifier.
        MediaError: a recording that cannot be decoded.
    """
    with use_runtime(runtime):
        model = _classifier(checkpoint, runtime)
        for path in paths:
            [one] = model.predict([path])
            yield {"file_name": path, "label": one.label, "probabilities": one.probabilities}


def predict_clips(
    checkpoint: Checkpoint,
    data: str,
    output: str | None,
    *,
    config: DataConfig,
    resume: bool = False,
    runtime: RuntimeConfig,
) -> dict[str, int]:
    """Classify every clip of a table or folder; returns how often each label was found.

    Rows keep their columns and get `label` and the probabilities, as with texts (see
    `text.prediction.predict_file`). A clip that cannot be decoded gets an empty label,
    and a warning names it.

    Raises:
        UserError: a model or data that cannot be used, or an output that is there already.
    """
    target = None if output is None else Path(output)
    kind = ".jsonl" if target is None else target.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise UserError(f"{output}: expected a .csv or .jsonl file to write, found '{kind}'.")
    part = None if target is None else target.with_name(target.name + ".part")
    if part is not None and part.exists() and not resume:
        raise UserError(f"{part}: an interrupted output. Continue it with --resume, or remove it.")
    rows = _rows(data, config)
    counts: Counter[str] = Counter()
    with use_runtime(runtime):
        model = _classifier(checkpoint, runtime)
        done = written(part, kind) if part is not None and resume else 0
        columns = list(dict.fromkeys(name for given in rows for name in given.row))
        with opened(part, done) as file:
            writer = RowWriter(file, kind, columns, model.labels, header=not done)
            for given in track(islice(rows, done, None), "classifying", total=len(rows) - done):
                found = _predict(model, given)
                writer.write(given.row, found.label, found.probabilities)
                counts[found.label] += 1
                file.flush()
    undecodable = counts.pop("", 0)
    if undecodable:
        logger.warning("%s: %d of %d clips could not be decoded", data, undecodable, len(rows))
    if part is not None and target is not None:
        part.replace(target)
    return dict(counts)


def _classifier(checkpoint: Checkpoint, runtime: RuntimeConfig) -> SoundModel:
    model = load_sound_model(checkpoint)
    model.network.to(choose_device(runtime))
    return model


def _predict(model: SoundModel, given: _Given) -> SoundPrediction:
    try:
        check_file(given.path)
        if given.end is None and not given.start:
            return model.predict([given.path])[0]
        samples = decode_clip(given.path, given.start, given.end, longest_s=LONGEST_CLIP_S)
    except MediaError as error:
        logger.warning("skipped: %s", error)
        return SoundPrediction("", {})
    return model.predict([samples])[0]


def _rows(data: str, config: DataConfig) -> list[_Given]:
    path = Path(data)
    tables = (path / f"metadata{suffix}" for suffix in SUFFIXES)
    table = path if path.is_file() else next((t for t in tables if t.is_file()), None)
    if table is None and path.is_dir():
        found = [p for p in visible_files(path) if may_be_recording(p)]
        rows = [_Given({"file_name": str(p.relative_to(path))}, p) for p in found]
    elif table is None:
        raise UserError(f"{path}: no such file or folder (expected clips of sounds).")
    elif table.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path}: expected a table of clips ({', '.join(SUFFIXES)}) or a folder. Name "
            "recordings with --audio."
        )
    else:
        rows = list(_named(table, config))
    if not rows:
        raise UserError(f"{path}: expected clips of sounds, found none.")
    return rows


def _named(table: Path, config: DataConfig) -> Iterator[_Given]:
    column = config.file_column
    needed = {"file_column": column}
    rows = with_columns(str(table), numbered_rows(str(table)), dict(needed), set(needed))
    for number, row in rows:
        where = f"{table}:{number}"
        start = seconds_cell(row.get("start"), where, "start") or 0.0
        end = seconds_cell(row.get("end"), where, "end")
        if end is not None and end <= start:
            raise UserError(f"{where}: end ({end:g} s) is not after start ({start:g} s).")
        path = table.parent / file_name_cell(row.get(column), where, column)
        yield _Given(row, path, start, end)
