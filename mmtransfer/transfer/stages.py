"""Transfer as a list of stages: what is frozen, what learns at which rate, in which batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtransfer.config import Config, StageConfig, build_config, merge
from mmtransfer.errors import UserError

_LORA = {"type": "lora", "r": 8, "lora_alpha": 16}
_EPOCHS, _FROZEN_EPOCHS = 3.0, 20.0  # epochs over cached features cost next to nothing


@dataclass(frozen=True)
class Stage:
    """A stage with every value filled in."""

    number: int
    """From 0."""
    frozen: int | str
    """all, none, or the number of frozen layers."""
    adapter: dict[str, Any] | None
    objective: str
    epochs: float | None
    steps: int | None
    learning_rate: float
    head_learning_rate: float
    layer_decay: float
    schedule: str
    warmup_steps: int

    def frozen_layers(self, depth: int) -> int | None:
        """Number of frozen layers of a backbone with `depth`; None if nothing is frozen.

        Raises:
            UserError: more layers than the backbone has.
        """
        if self.frozen == "none":
            return None
        if self.frozen == "all":
            return depth
        count = int(self.frozen)
        if count > depth:
            raise UserError(
                f"transfer.stages: frozen: {count}, but the backbone has {depth} layers. "
                f"Expected all, none, or a number up to {depth}."
            )
        return count


def stage_configs(config: Config) -> list[StageConfig]:
    """The stages given, or those of the preset.

    Raises:
        UserError: the preset is auto, which only training chooses for.
    """
    if config.transfer.stages:
        return config.transfer.stages
    if config.transfer.preset == "auto":
        raise UserError(
            "transfer.preset: auto is chosen by `mmtransfer train` alone; name a structure here, "
            "e.g. --transfer.preset feature."
        )
    presets = {
        "end_to_end": [StageConfig(frozen="none")],
        "feature": [StageConfig(frozen="all")],
        # The probe's head is no longer new in the second stage, so it learns at the backbone's rate
        # (Kumar et al. 2022).
        "combined": [
            StageConfig(frozen="all"),
            StageConfig(frozen="none", head_learning_rate=config.train.learning_rate),
        ],
        "lora": [StageConfig(frozen="none", adapter=_LORA)],
    }
    return presets[config.transfer.preset]


def with_stages(
    config: Config, stages: Sequence[StageConfig], run_dir: str, **over: dict[str, Any]
) -> Config:
    """The configuration of a transfer by these stages into another run folder, and with sections
    changed by `over`.
    """
    values = config.model_dump(mode="json")
    values["transfer"]["preset"] = "end_to_end"
    values["transfer"]["stages"] = [stage.model_dump(mode="json") for stage in stages]
    return build_config(merge(values, {"run_dir": run_dir, **over}), origin=run_dir)


def resolve_stages(config: Config) -> list[Stage]:
    """The stages of a transfer; what a stage does not set comes from the `train` section."""
    train = config.train
    stages = []
    for number, given in enumerate(stage_configs(config)):
        epochs, steps = given.epochs, given.steps
        if epochs is None and steps is None:
            epochs, steps = train.epochs, train.steps
        if epochs is None and steps is None:
            epochs = _FROZEN_EPOCHS if given.frozen == "all" else _EPOCHS

        def chosen(name: str, given: StageConfig = given) -> Any:
            value = getattr(given, name)
            return getattr(train, name) if value is None else value

        stages.append(
            Stage(
                number=number,
                frozen=given.frozen,
                adapter=given.adapter,
                objective=given.objective,
                epochs=epochs,
                steps=steps,
                learning_rate=chosen("learning_rate"),
                head_learning_rate=chosen("head_learning_rate"),
                layer_decay=chosen("layer_decay"),
                schedule=chosen("schedule"),
                warmup_steps=chosen("warmup_steps"),
            )
        )
    if stages[-1].objective == "contrastive":
        raise UserError(
            "transfer.stages: the last stage is contrastive, which trains no head. Add a stage "
            "{frozen: all} behind it."
        )
    return stages


# --- what is frozen ------------------------------------------------------------------------------


@dataclass
class Layout:
    """A model's modules in order from input to output."""

    levels: list[list[nn.Module]]
    """Source modules: what lies below the first layer, the backbone's layers, what is above."""
    depth: int
    """Number of backbone layers: `levels[0]` to `levels[depth]` can be frozen."""
    new: list[nn.Module]
    """Modules with new weights."""
    fixed: list[nn.Module]
    """Modules that are never trained (constants that count as weights)."""

    def parameters(self, level: int) -> list[nn.Parameter]:
        """Parameters of a level, without fixed ones."""
        return self._distinct(self.levels[level])

    def source_parameters(self) -> list[nn.Parameter]:
        """Parameters of all levels, without fixed ones."""
        return [p for level in range(len(self.levels)) for p in self.parameters(level)]

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters of new modules."""
        return self._distinct(self.new)

    def _distinct(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        fixed = {id(p) for module in self.fixed for p in module.parameters()}
        found = {id(p): p for module in modules for p in module.parameters()}
        return [p for key, p in found.items() if key not in fixed]


def frozen_modules(layout: Layout, frozen: int | None) -> list[nn.Module]:
    """The modules of the first `frozen` layers and below; none if nothing is frozen."""
    levels = layout.levels[: 0 if frozen is None else frozen + 1]
    return [module for level in levels for module in level]


def rest_of(model: nn.Module, known: Iterable[nn.Module]) -> list[nn.Module]:
    """The largest submodules of a model that hold none of the known ones: what is left over."""
    taken = {id(part) for module in known for part in module.modules()}
    left: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if id(child) in taken:
                continue
            if any(id(part) in taken for part in child.modules()):
                visit(child)
            else:
                left.append(child)

    visit(model)
    return left


def freeze(model: nn.Module, layout: Layout, frozen: int | None) -> None:
    """Only what lies above the first `frozen` layers gets gradients (None: everything)."""
    model.requires_grad_(True)
    for module in layout.fixed:
        module.requires_grad_(False)
    for module in frozen_modules(layout, frozen):
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def set_training(model: nn.Module, layout: Layout, frozen: int | None) -> None:
    """Training mode above the freeze line; below it no dropout and no batch-norm updates."""
    model.train()
    for module in frozen_modules(layout, frozen):
        module.eval()


def parameter_groups(
    model: nn.Module, layout: Layout, stage: Stage, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups of what is trained: rates by layer, new layers apart, no decay of vectors.

    Biases and the gains of norms are vectors; only matrices and convolutions are pulled to zero.
    """
    rates: dict[int, float] = {}
    top = len(layout.levels) - 1
    for level in range(top + 1):
        rate = stage.learning_rate * stage.layer_decay ** (top - level)
        rates |= {id(p): rate for p in layout.parameters(level)}
    rates |= {id(p): stage.head_learning_rate for p in layout.new_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            rate = rates.get(id(parameter), stage.learning_rate)  # adapters are in no level
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise UserError(
            "transfer.stages: everything is frozen and nothing new stands on the backbone, so "
            "there is nothing to train."
        )
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


# --- the way back to the source ------------------------------------------------------------------


class SourcePath:
    """The straight line from the source's weights to the tuned ones (Wortsman et al. 2022, eq. 1):
    source + share * (tuned - source).

    `source` are the parameters that have the source's values now. Of a LoRA adapter, whose product
    is what it adds, one factor is scaled.
    """

    def __init__(self, source: Sequence[nn.Parameter]):
        self._start = [(p, p.detach().cpu().clone()) for p in source]
        self._end: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []

    def close(self, model: nn.Module) -> None:
        """The model is tuned: its weights are the end of the line."""
        self._end = [(p, start, p.detach().cpu().clone()) for p, start in self._start]
        for name, p in model.named_parameters():
            if ".lora_B." in name or ".lora_embedding_B." in name:
                self._end.append((p, torch.zeros(()), p.detach().cpu().clone()))

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Put the weights at that share of the way into the model."""
        for parameter, start, end in self._end:
            parameter.copy_(end if share == 1 else start + share * (end - start))


def can_interpolate(stages: Sequence[Stage]) -> bool:
    """Whether there is a straight line to the source: every adapter is a plain LoRA."""
    kinds = [stage.adapter for stage in stages if stage.adapter is not None]
    bent = ("use_dora", "modules_to_save")
    return all(
        kind["type"].lower() == "lora" and not any(kind.get(name) for name in bent)
        for kind in kinds
    )


def set_dropout(modules: Iterable[nn.Module], rate: float) -> None:
    """Set the dropout rate everywhere in these modules."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = rate
            elif isinstance(getattr(part, "dropout", None), float):
                part.dropout = rate  # type: ignore[assignment]  # Whisper keeps the rate itself


def class_weights(counts: Sequence[int], kind: str, beta: float) -> list[float] | None:
    """A loss weight for each class; their mean over the examples is 1.

    `inverse`: proportional to 1 / n. `effective`: to (1 - beta) / (1 - beta^n), one over the
    effective number of examples (Cui et al. 2019, eq. 4). `none`: None.
    """
    if kind == "none":
        return None
    raw = [1 / n if kind == "inverse" else (1 - beta) / (1 - beta**n) for n in counts]
    scale = sum(counts) / sum(n * weight for n, weight in zip(counts, raw, strict=True))
    return [weight * scale for weight in raw]


def supervised_contrastive_loss(
    features: torch.Tensor, targets: torch.Tensor, *, temperature: float = 0.1
) -> torch.Tensor:
    """Sum over examples of the supervised contrastive loss (Khosla et al. 2020, eq. 2).

    `features` [example, width], `targets` [example]. An example without another of its class in
    the batch counts nothing.
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    similarity = unit @ unit.T / temperature
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    same = (targets[:, None] == targets[None]) & ~itself
    positives = same.sum(1)
    per_example = -log_share.masked_fill(~same, 0.0).sum(1) / positives.clamp(min=1)
    return per_example[positives > 0].sum()
