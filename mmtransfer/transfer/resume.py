"""Checkpoints to resume from: weights, optimiser, position, and the settings they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmtransfer.cache import atomic_path
from mmtransfer.data.files import read_json
from mmtransfer.errors import UserError
from mmtransfer.runtime import is_out_of_memory


def write_weights(path: Path, model: torch.nn.Module, *, trained_only: bool = False) -> None:
    """Write a model's weights as safetensors, atomically; tied weights are stored once.

    With `trained_only`, weights without gradient are left out; buffers (running statistics) stay.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict().items():
        if trained_only and name in frozen:
            continue
        if value.data_ptr() not in seen or not value.numel():
            seen.add(value.data_ptr())
            state[name] = value.detach().cpu().contiguous()
    with atomic_path(path) as part:
        save_file(state, part)


def read_weights(path: Path, model: torch.nn.Module) -> None:
    """Put weights that `write_weights` wrote into the model."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in load_file(path).items():
            own[name].copy_(value)


def write_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: dict[str, Any],
    *,
    state: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write everything a stage needs to go on, atomically: there is the old one or the new one."""
    with atomic_path(folder) as part:
        part.mkdir(parents=True)
        write_weights(part / "model.safetensors", model, trained_only=True)
        torch.save(optimizer, part / "optimizer.pt")
        text = json.dumps({"state": state, "settings": settings})
        (part / "state.json").write_text(text, encoding="utf-8")


@contextmanager
def whole_checkpoint(folder: Path) -> Iterator[None]:
    """What is damaged in a checkpoint as one line."""
    try:
        yield
    except Exception as error:  # libraries raise whatever it is that they find
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{folder}: the checkpoint is damaged ({reason}). Start anew in another run folder."
        ) from None


def _saved(folder: Path) -> dict[str, Any]:
    saved = read_json(folder / "state.json")
    if not isinstance(saved, dict):
        raise ValueError(f"expected an object in state.json, found a {type(saved).__name__}")
    return saved


def read_position(folder: Path) -> dict[str, Any] | None:
    """Where the run of a checkpoint stands; None if there is no checkpoint."""
    if not folder.is_dir():
        return None
    with whole_checkpoint(folder):
        return dict(_saved(folder)["state"])


def read_checkpoint(
    folder: Path, model: torch.nn.Module, *, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the weights into the model; returns (optimiser state, position).

    Raises:
        UserError: the checkpoint is damaged, or was written with other settings.
    """
    with whole_checkpoint(folder):
        saved = _saved(folder)
        _check_settings(folder, saved["settings"], settings)
        read_weights(folder / "model.safetensors", model)
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return dict(optimizer), dict(saved["state"])


def _check_settings(folder: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, new in settings.items():
        old = saved.get(key)
        if old == new:
            continue
        if isinstance(new, dict) and isinstance(old, dict):
            changed = [name for name in new if old.get(name) != new[name]]
            key = ", ".join(f"{key}.{name}" for name in changed)
            old = ", ".join(str(old.get(name)) for name in changed)
            new = ", ".join(str(new[name]) for name in changed)
        raise UserError(
            f"{folder}: the checkpoint was written with another {key} ({old}, now {new}). Resume "
            "with the same settings, or start anew in another run folder."
        )
