"""Predictions of several classifiers in one model, for those whose weights cannot be combined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.runs.domains import Domain
from mmtransfer.text.classifier import load_text_model
from mmtransfer.text.ensemble import fit_weights, is_ensemble, member_probabilities, write_ensemble
from mmtransfer.text.examples import read_texts


def make_ensemble(
    models: Mapping[str, Checkpoint],
    domains: Mapping[str, Domain],
    folder: Path,
    device: torch.device,
) -> dict[str, float]:
    """Write an ensemble, its weights learnt on the target domains, and return them by model; all
    the same without any.

    Raises:
        UserError: models of another kind than text classifiers, or ensembles.
    """
    for name, found in models.items():
        if found.kind != "sentiment" or is_ensemble(found):
            what = "an ensemble" if found.kind == "sentiment" else f"a {found.kind} model"
            raise UserError(f"{name}: ensembles are of single text classifiers, found {what}.")
    members = [load_text_model(found) for found in models.values()]
    for member in members:
        member.network.to(device)
    columns, targets = [], []
    for domain in domains.values():
        if domain.is_source:
            continue
        texts = domain.examples
        if isinstance(texts, str):
            texts = read_texts(texts, domain.config.data, name=domain.name, split="validation")
        words = [example.text for example in texts.examples]
        about = [example.target for example in texts.examples]
        encoded = [member.encode(words, about) for member in members]
        budget = domain.config.evaluation.batch_tokens
        columns.append(member_probabilities(members, encoded, device, budget))
        number = {label: index for index, label in enumerate(members[0].labels)}
        targets += [number[example.label] for example in texts.examples]
    weights = [1 / len(members)] * len(members)
    if columns:
        weights = fit_weights(np.concatenate(columns, axis=1), np.array(targets))
    write_ensemble(folder, list(models.values()), members, weights)
    return dict(zip(models, weights, strict=True))
