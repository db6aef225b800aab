"""Which models can be merged, and what they started from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.files import METADATA
from mmtransfer.hub.loading import load_weights, loading
from mmtransfer.transfer.encoders import encoder_family

_CAREFUL = {"shortest_context_s": max, "window_s": min}
"""Of settings that training measured, the value of which model is safe for all."""


def snapshots(models: Sequence[str]) -> list[str]:
    if len(models) != 1:
        raise UserError(f"last takes one run, found {len(models)}.")
    found = sorted(Path(models[0], "snapshots").glob("step-*"))
    if len(found) < 2:
        raise UserError(
            f"{models[0]}: expected the last checkpoints in its snapshots folder, found "
            f"{len(found)}. Train with train.keep_checkpoints: 3."
        )
    return [str(path) for path in found]


def identity(found: Checkpoint) -> str:
    """What a model started from, as far as it is recorded; of a plain checkpoint itself."""
    base = found.metadata.base if found.metadata is not None else None
    base = base or found.as_base()
    place = base.model_id or Path(base.source).name
    return f"{place}@{base.revision}" if base.revision else place


def started_from(tuned: Checkpoint, source: Checkpoint) -> bool:
    """Whether a model is recorded to have started from another."""
    is_source = source.metadata is None or source.form == "full"
    return tuned.metadata is not None and is_source and _same_base(tuned, source)


def _same_base(tuned: Checkpoint, source: Checkpoint) -> bool:
    base = tuned.metadata.base if tuned.metadata is not None else None
    own = source.as_base()
    if base is None:
        return False
    if base.model_id is not None or own.model_id is not None:
        return base.model_id == own.model_id
    return Path(base.source).name == Path(own.source).name


def check_alike(models: Mapping[str, Checkpoint], method: str) -> None:
    (first_name, first), *others = models.items()
    for name, found in others:
        for what, one, other in (
            ("task", first.kind, found.kind),
            ("classes", _recorded(first, "labels"), _recorded(found, "labels")),
            ("symbols", _recorded(first, "symbols"), _recorded(found, "symbols")),
        ):
            if one != other:
                raise UserError(
                    f"{name}: expected the {what} of {first_name} ({one}), found {other}. Merge "
                    "models of one task with the same output."
                )
        if method == "ensemble":
            continue
        if (first.architecture, first.form) != (found.architecture, found.form):
            raise UserError(
                f"{name}: expected the form of {first_name} ({first.architecture}, {first.form}), "
                f"found {found.architecture}, {found.form}. Train all with "
                "transfer.merge_adapter: true, or use --method ensemble."
            )
        if identity(first) != identity(found):
            raise UserError(
                f"{name}: started from {identity(found)}, {first_name} from {identity(first)}. "
                "Weights of different sources have nothing in common to be averaged; combine their "
                "predictions with --method ensemble."
            )
        if _recorded(first, "head") != _recorded(found, "head"):
            raise UserError(
                f"{name}: expected the head of {first_name}, found other settings. Train both with "
                "one head, or use --method ensemble."
            )


def _recorded(found: Checkpoint, name: str) -> Any:
    value = None if found.metadata is None else getattr(found.metadata, name)
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key != "dropout"}
    return value


def bare_model(base: Checkpoint, kind: str) -> Any:
    """The model that an adapter sits in, without what stands on it."""
    from transformers import AutoModel, WhisperForConditionalGeneration

    with loading(base.source, "the base of adapters", base.weights):
        if kind == "sentiment":
            return load_weights(AutoModel, base.weights)
        if kind == "speech":
            return load_weights(WhisperForConditionalGeneration, base.weights)
        return encoder_family(base.architecture).load(base.weights, base.classes)


def carry_settings(folder: Path, parents: Sequence[Checkpoint]) -> None:
    """Put into a merged model what training had fitted to the weights of each: of contexts those
    that are safe for all, of temperatures the geometric mean; and the names of the parents.
    """
    for name in ("config.json", METADATA):
        files = [found.folder / name for found in parents]
        if not (folder / name).is_file() or not all(file.is_file() for file in files):
            continue
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        theirs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        for key, choose in _CAREFUL.items():
            known = [own[key] for own in theirs if own.get(key) is not None]
            if known:
                values[key] = choose(known)
        if name == METADATA:
            values["parents"] = [Path(found.source).name for found in parents]
            known = [own.get("temperature") for own in theirs]
            if all(isinstance(one, float) and one > 0 for one in known):
                values["temperature"] = math.exp(sum(map(math.log, known)) / len(known))
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
