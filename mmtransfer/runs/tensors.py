"""Weights of several checkpoints combined tensor by tensor, so that memory holds one model's file
and one tensor of each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmtransfer.errors import UserError
from mmtransfer.hub.pickled import safe_weights
from mmtransfer.transfer.adapters import safe_adapter

Rule = Callable[[torch.Tensor | None, list[torch.Tensor]], torch.Tensor]
"""A tensor from the source's (None where the source has none) and those of the tuned models, all in
float32."""
DENSITY = {"ties": 0.2, "dare": 0.5}
"""Share of each model's change that is kept."""
_HEAD = "head.safetensors"


class Weights:
    """Tensors of a checkpoint's files by name, opened one at a time."""

    def __init__(self, files: Mapping[Path, Any]):
        self._where = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._where.items()}

    def find(self, name: str) -> str | None:
        """A tensor's name here: the same, or with or without the name of the part around it
        (`bert.`, `model.`), which checkpoints of other classes lack.
        """
        if name in self._where:
            return name
        beneath = name.partition(".")[2]
        if beneath in self._where:
            return beneath
        around = [own for own in self._where if own.partition(".")[2] == name]
        return around[0] if len(around) == 1 else None

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """The tensors of a checkpoint folder: whole weights, and a head beside them."""
    with ExitStack() as opened:
        safe = opened.enter_context(safe_weights(folder))
        paths = {*_weight_files(safe), *_weight_files(folder)}
        yield Weights({p: opened.enter_context(safe_open(p, "pt")) for p in sorted(paths)})


def _weight_files(folder: Path) -> list[Path]:
    """Files of whole weights and of a head; none of adapters."""
    index = folder / "model.safetensors.index.json"
    found = [folder / "model.safetensors"]
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        found = [folder / name for name in sorted(set(names))]
    return [path for path in (*found, folder / _HEAD) if path.is_file()]


def check_shapes(names: Sequence[str], folders: Sequence[Path]) -> None:
    """Make sure that models have the same tensors.

    Raises:
        UserError: one has others, or in other shapes.
    """
    with open_weights(folders[0]) as first:
        expected = first.shapes()
    for name, folder in zip(names[1:], folders[1:], strict=True):
        with open_weights(folder) as other:
            found = other.shapes()
        differing = sorted(
            key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)
        )
        if differing:
            key = differing[0]
            raise UserError(
                f"{name}: expected the tensors of {names[0]}, found {len(differing)} that differ "
                f"({key}: {expected.get(key, 'missing')} and {found.get(key, 'missing')}). Merge "
                "models of one shape, or combine their predictions with --method ensemble."
            )


def merge_folders(
    tuned: Sequence[Path], source: Path | None, rule: Rule, target: Path, *, seed: int = 0
) -> None:
    """Write a checkpoint whose weights follow a rule; everything else is the first model's.

    A tensor that the source lacks (a new head) has no point to start from: its mean is taken.
    """
    target.mkdir(parents=True)
    weights = _weight_files(tuned[0])
    for path in tuned[0].iterdir():
        if path.is_file() and path not in weights and path.name != "README.md":
            shutil.copyfile(path, target / path.name)
    with ExitStack() as opened:
        models = [opened.enter_context(open_weights(folder)) for folder in tuned]
        base = opened.enter_context(open_weights(source)) if source is not None else None
        for path in weights:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                metadata = file.metadata()
            merged = {}
            for number, name in enumerate(names):
                merged[name] = _merged(name, models, base, rule, seed + number)
            save_file(merged, target / path.name, metadata=metadata)


def _merged(
    name: str, models: Sequence[Weights], base: Weights | None, rule: Rule, seed: int
) -> torch.Tensor:
    first = models[0][name]
    if not first.is_floating_point():
        return first
    start = None
    own = base.find(name) if base is not None else None
    if base is not None and own is not None:
        start = base[own].float()
        if start.shape != first.shape:
            raise UserError(
                f"{name}: expected the source's shape {tuple(start.shape)}, found "
                f"{tuple(first.shape)}. Name the model it was trained from with --source-model."
            )
    tensors = [first.float(), *(model[name].float() for model in models[1:])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return rule(start, tensors).to(first.dtype).contiguous()


# --- rules ---------------------------------------------------------------------------------------


def mean(start: torch.Tensor | None, tensors: list[torch.Tensor]) -> torch.Tensor:
    """A uniform soup (Wortsman et al. 2022a), also of the last checkpoints of one run."""
    return torch.stack(tensors).mean(0)


def interpolation(share: float) -> Rule:
    """WiSE-FT (Wortsman et al. 2022b, eq. 1): source + share * (tuned - source)."""

    def rule(start: torch.Tensor | None, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0] if start is None else torch.lerp(start, tensors[0], share)

    return rule


def arithmetic(method: str, scale: float, density: float) -> Rule:
    """The source plus what the tuned models changed of it, by peft's rules for adapters: summed
    (task arithmetic, Ilharco et al. 2023), the largest changes with one sign (TIES, Yadav et al.
    2023), or random ones scaled up (DARE, Yu et al. 2024); times `scale`.
    """
    from peft.utils import merge_utils

    def rule(start: torch.Tensor | None, tensors: list[torch.Tensor]) -> torch.Tensor:
        if start is None:
            return mean(None, tensors)
        changes = [tensor - start for tensor in tensors]
        weights = torch.full((len(changes),), scale)
        if method == "task_arithmetic":
            return start + merge_utils.task_arithmetic(changes, weights)
        prune = merge_utils.ties if method == "ties" else merge_utils.dare_linear
        return start + prune(changes, weights, density)

    return rule


# --- adapters ------------------------------------------------------------------------------------


def merge_adapters(
    model: Any,
    adapters: Sequence[Path],
    target: Path,
    *,
    method: str,
    weights: Sequence[float],
    density: float,
    seed: int = 0,
) -> None:
    """Write the adapter that peft makes of several on one base: their exact weighted sum (method
    `sum`, of as many ranks as they have together), or by TIES or DARE. Everything else in the
    folder is the first one's, but a head is their mean.

    Raises:
        UserError: adapters that peft cannot combine.
    """
    from peft import PeftModel

    kind = {"sum": "cat", "ties": "ties", "dare": "dare_linear"}[method]
    target.mkdir(parents=True)
    names = [f"parent{number}" for number in range(len(adapters))]
    try:
        with safe_adapter(model, adapters[0]) as safe:
            first = {"adapter_name": names[0], "use_safetensors": True}
            found = PeftModel.from_pretrained(model, safe, trust_remote_code=False, **first)
        for name, folder in zip(names[1:], adapters[1:], strict=True):
            with safe_adapter(model, folder) as safe:
                found.load_adapter(str(safe), adapter_name=name, use_safetensors=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.add_weighted_adapter(
                names,
                list(weights),
                "merged",
                combination_type=kind,
                **({} if kind == "cat" else {"density": density}),
            )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{adapters[0].parent.name}: these adapters cannot be combined ({reason}). Merge them "
            "into their base first, with transfer.merge_adapter: true."
        ) from None
    for path in adapters[0].iterdir():
        skipped = path.name.startswith("adapter_") or path.name in (_HEAD, "README.md")
        if path.is_file() and not skipped:
            shutil.copyfile(path, target / path.name)
    found.save_pretrained(target, selected_adapters=["merged"], save_embedding_layers=False)
    for path in (target / "merged").iterdir():
        path.replace(target / path.name)
    (target / "merged").rmdir()
    (target / "README.md").unlink(missing_ok=True)
    heads = [folder / _HEAD for folder in adapters]
    if heads[0].is_file():
        with ExitStack() as opened:
            files = [opened.enter_context(safe_open(path, "pt")) for path in heads]
            merged = {
                name: _merged(name, [Weights({heads[0]: f}) for f in files], None, mean, seed)
                for name in files[0].keys()  # noqa: SIM118
            }
            save_file(merged, target / _HEAD)
