"""Which models can be merged, and what they started from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.hub.files import METADATA
from mmtransfer.hub.loading import load_weights, loading
from mmtransfer.transfer.encoders import encoder_family

_CAREFUL = {"shortest_context_s": max, "window_s": min}
"""Of settings that training measured, the value of which model is safe for all."""
_OF_SHORT = {"margin_s": max, "longest_s": min}
"""The same of adapters for short contexts."""


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


def finished(run: str) -> Checkpoint:
    """The model of a run: what is fitted and measured after training is recorded with it alone.

    Raises:
        UserError: a run that has not finished.
    """
    if not Path(run, "model").is_dir():
        raise UserError(
            f"{run}: expected a finished run, found no model in it: its contexts and temperature "
            "are measured at its end. Finish it with --resume."
        )
    return resolve(run)


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
    """Make sure that models can be merged that way.

    Raises:
        UserError: the reason why not.
    """
    for name, found in models.items():
        if found.form == "full" and _recorded(found, "short_reader"):
            raise UserError(
                f"{name}: holds an adapter for short contexts beside its weights, which cannot be "
                "merged with them. Merge the models without it, and train it on the result."
            )
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
        for what, key in (("head", "head"), ("windows of texts", "text")):
            if _recorded(first, key) != _recorded(found, key):
                raise UserError(
                    f"{name}: expected the {what} of {first_name}, found other settings. Train "
                    "both with the same, or use --method ensemble."
                )
        if _own(first, "is_multi") != _own(found, "is_multi"):
            raise UserError(
                f"{name}: expected several classes of a clip or one, as {first_name}, found the "
                "other. Train both alike."
            )


def _measured(own: Mapping[str, Any], key: str) -> Any:
    """What training measured; windows that are not recorded beside contexts are none."""
    is_trained = own.get("shortest_context_s") is not None and not own.get("short_reader")
    return own.get(key, 0.0 if key == "window_s" and is_trained else None)


def _carry_language(values: dict[str, Any], theirs: Sequence[Mapping[str, Any]]) -> None:
    languages = {own.get("language") for own in theirs}
    if len(languages) > 1:  # it must be named where the model is used
        values["language"] = None


def _careful_short(theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    languages = [set(own["languages"]) for own in theirs]
    limits = {key: choose(own[key] for own in theirs) for key, choose in _OF_SHORT.items()}
    return {**limits, "languages": sorted(set.intersection(*languages))}


def _own(found: Checkpoint, name: str) -> Any:
    return None if found.metadata is None else found.metadata.own.get(name)


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


def carry_settings(
    folder: Path, parents: Sequence[Checkpoint], measured: Sequence[Checkpoint] = ()
) -> None:
    """Put into a merged model what training had fitted to the weights of each: of contexts those
    that are safe for all, of temperatures the geometric mean, a language if it is that of all; and
    the names of the parents. Settings are those of `measured` instead, if given.
    """
    for name in ("config.json", "generation_config.json", METADATA):
        files = [found.folder / name for found in measured or parents]
        if not (folder / name).is_file() or not all(file.is_file() for file in files):
            continue
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        theirs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if name == "generation_config.json" or "language" in values:
            _carry_language(values, theirs)
        for key, choose in _CAREFUL.items():
            known = [_measured(own, key) for own in theirs]
            known = [value for value in known if value is not None]
            if known:
                values[key] = choose(known)
        if name == METADATA:
            values["parents"] = [Path(found.source).name for found in parents]
            known = [own.get("temperature") for own in theirs]
            if all(isinstance(one, float) and one > 0 for one in known):
                values["temperature"] = math.exp(sum(map(math.log, known)) / len(known))
            short = [own.get("short_reader") for own in theirs]
            if all(short):
                values["short_reader"] = _careful_short(short)
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
