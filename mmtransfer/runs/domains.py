"""The sets on which models are compared: those of their own run folders, and further ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmtransfer.config import Config, RuntimeConfig, build_config, load_config, merge
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.runs.models import task_for, task_of

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any] | None]
"""By domain: what `Task.evaluate` gives, with the `value` of its main metric; None where the model
has no score.
"""


@dataclass(frozen=True)
class Domain:
    """A set of examples, and how it is scored."""

    name: str
    examples: Any
    """A loaded set, or a path or name."""
    config: Config
    is_source: bool
    """Whether it measures forgetting, not gain."""


def run_folder(model: str) -> Path | None:
    """The run folder of a model that lies in one: itself, or around its model or snapshots."""
    path = Path(model)
    around = (path, path.parent, path.parent.parent)
    return next((folder for folder in around if (folder / "config.yaml").is_file()), None)


def domains_of(models: Mapping[str, Checkpoint], device: torch.device) -> dict[str, Domain]:
    """Validation and source-domain sets of the models' run folders; a set that several name is one
    domain, called by the first.

    Raises:
        UserError: two runs that held out different parts of the same data, so that each validates
            on what the other has learnt.
    """
    found: dict[str, Domain] = {}
    known: dict[str, str] = {}
    held: dict[str, tuple[str, int, float]] = {}
    for model, checkpoint in models.items():
        folder = run_folder(model)
        if folder is None:
            logger.info("%s: no run folder, so that its domain is not known", model)
            continue
        config = load_config(folder / "config.yaml")
        data = config.data
        places = dict(data.source_domain)
        own = data.validation or f"part of {data.train}"
        if data.validation is None:
            split = (model, config.runtime.seed, data.validation_fraction)
            other = held.setdefault(str(data.train), split)
            if other[1:] != split[1:]:
                raise UserError(
                    f"{model} and {other[0]} held out different parts of {data.train}: each would "
                    "be scored on what the other learnt. Train both with one data.validation."
                )
        wanted = {"target": (_free(folder.name, found), own, False)}
        for name, place in places.items():
            wanted[f"source domain {name}"] = (_free(name, found), place, True)
        new = {key: v for key, v in wanted.items() if v[1] not in known}
        if not new:
            continue
        splits = _splits(config, checkpoint, device)
        for key, (name, place, is_source) in new.items():
            known[place] = name
            found[name] = Domain(name, splits.evaluated[key], config, is_source)
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name}-{number}"
    return free


def _splits(config: Config, checkpoint: Checkpoint, device: torch.device) -> Any:
    """The sets of a run, as they were split for it."""
    values = merge(
        config.model_dump(),
        {"data": {"rehearsal": "none"}, "transfer": {"rehearsal": None, "interpolate": "none"}},
    )
    plain = build_config(values, origin="config.yaml")
    return task_for(plain, checkpoint).set_up(plain, checkpoint, device).splits


def further_domains(
    data: Mapping[str, str],
    source_domain: Mapping[str, str],
    models: Mapping[str, Checkpoint],
) -> dict[str, Domain]:
    """Sets named beside those of run folders, with the columns that the first run's data has."""
    folders = [folder for folder in map(run_folder, models) if folder is not None]
    config = load_config(folders[0] / "config.yaml") if folders else Config()
    return {
        name: Domain(name, place, config, is_source)
        for named, is_source in ((data, False), (source_domain, True))
        for name, place in named.items()
    }


def score(
    model: Checkpoint, domain: Domain, runtime: RuntimeConfig, device: torch.device
) -> dict[str, Any]:
    """Scores of a model on a domain; see `Scores`."""
    # Speech is decoded as in training: by transformers in float32, greedy.
    plain = domain.config.evaluation.model_copy(update={"engine": None, "beam_size": None})
    config = domain.config.model_copy(update={"runtime": runtime, "evaluation": plain})
    found = task_of(model).evaluate(model, domain.examples, config, device)
    return {**found, "value": found[found["metric"]]}
