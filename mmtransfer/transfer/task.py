"""The contract between a task and the training loop; stages; the order of training examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.metadata import Base
from mmtransfer.transfer.adapters import add_adapter, merge_adapter
from mmtransfer.transfer.networks import Network, encoder_digest
from mmtransfer.transfer.regularisers import Outputs, regularisers
from mmtransfer.transfer.splits import Splits, rehearsal_count, training_data
from mmtransfer.transfer.stages import (
    Layout,
    SourcePath,
    Stage,
    freeze,
    frozen_modules,
    parameter_groups,
    resolve_stages,
    set_dropout,
    set_training,
)


def comparable(metrics: Mapping[str, Any], name: str) -> float:
    """A metric by which two scores of one set are compared: where it is undefined, since nothing
    is said in the whole set, the words emitted there take its place.
    """
    value = metrics[name]
    return float(metrics["hallucinated_words"] if value is None else value)


class Carrier(Protocol):
    """A model with what belongs to it (tokenizer, labels, ...)."""

    base: Base

    def save(self, folder: Path, form: str, adapted: Any = None) -> None:
        """Write it in one of the forms of `networks`."""
        ...


class Task(ABC):
    """A transfer of one kind: what the training loop and a run ask of it. In common are stages,
    adapters, regularisers, rehearsal and saving; a subclass says how it is set up, what it learns,
    how it is scored and what it reports. Micro-batches are opaque to the loop.

    `carrier` holds the model with what belongs to it (tokenizer, labels, ...) and writes it; `host`
    is the Hugging Face model in which adapters sit.
    """

    metric: str
    """Name of the validation metric that chooses the best weights, and the report's main one."""
    higher_is_better: bool
    tie_metric: str
    """Validation metric, lower is better, that decides between weights of the same score."""
    unit: ClassVar[str]
    """What `lengths` counts, as report.json names it."""
    speed_unit: ClassVar[str]
    """The same in a second, as it is shown."""
    pipeline: ClassVar[str]
    """The task's name on the Hub."""
    pipeline_call: ClassVar[str]
    """How the pipeline `run` of plain transformers is called, for the model card."""
    usage: ClassVar[str]
    """How any form of the result is used with this package, for the model card."""
    usual_rehearsal: ClassVar[float] = 0.0
    """Share of rehearsal where there is data for it and `transfer.rehearsal` is not set."""
    bundled_rehearsal: ClassVar[bool] = False
    """Whether this package has data to rehearse."""

    lengths: list[float]
    """Cost of each training example, in the unit of the batch budget."""
    splits: Splits[Any]
    """The data of the run; set by `set_up`."""
    source: Checkpoint
    """What the transfer starts from; set by `runs.set_up`."""

    def __init__(
        self,
        carrier: Carrier,
        model: Any,
        layout: Layout,
        host: Any,
        stages: Sequence[Stage],
        config: Config,
    ):
        self.carrier, self.model, self.layout, self.host = carrier, model, layout, host
        self.stages, self.config = stages, config
        self.stage, self.frozen = stages[0], None  # type: Stage, int | None
        self.adapted: Any = None
        for stage in stages:
            stage.frozen_layers(layout.depth)  # refuses what the backbone does not have
        if self.form != "full":  # what is saved is of use on these very weights only
            carrier.base = replace(carrier.base, digest=encoder_digest(host))
        transfer = config.transfer
        if transfer.dropout is not None:
            set_dropout([m for level in layout.levels for m in level], transfer.dropout)
        self.regularisers = regularisers(layout, transfer)

    # --- from configuration to task ----------------------------------------------------------

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            UserError: settings that are missing, have no effect, or contradict each other.
        """
        training_data(config)
        resolve_stages(config)
        if config.data.rehearsal not in ("auto", "none") and not cls.rehearsal_share(config):
            raise UserError("data.rehearsal is not used: set transfer.rehearsal, e.g. to 0.3.")

    @classmethod
    @abstractmethod
    def set_up(cls, config: Config, source: Checkpoint, device: torch.device) -> Self:
        """The task with its model and data (`splits`).

        Raises:
            UserError: unusable data or source.
        """

    @classmethod
    @abstractmethod
    def load(cls, checkpoint: Checkpoint, language: str | None) -> Any:
        """A finished model of this kind; `language` is that of speech.

        Raises:
            UserError: no such model.
        """

    @classmethod
    @abstractmethod
    def evaluate(
        cls, checkpoint: Checkpoint, data: Any, config: Config, device: torch.device
    ) -> dict[str, Any]:
        """Scores of a finished model on data (a path or name, or a set that was loaded), with
        `metric`, `skipped`, `seconds_wall` and the `outcomes` of each example.
        """

    @classmethod
    def rehearsal_share(cls, config: Config) -> float:
        """The share of rehearsal that a transfer has where there is data for it."""
        share = config.transfer.rehearsal
        return cls.usual_rehearsal if share is None else share

    # --- what a run reports ------------------------------------------------------------------

    @abstractmethod
    def score(self, examples: Any, device: torch.device) -> dict[str, Any]:
        """Scores of a set of examples (one of `splits`)."""

    def score_source(self, examples: Any, device: torch.device) -> dict[str, Any]:
        """The same before training, where `evaluate` uses more of the source than training does."""
        return self.score(examples, device)

    def score_monitored(
        self, folder: Path, examples: Any, device: torch.device
    ) -> dict[str, Any] | None:
        """The same of the saved result, by what `monitor` decodes with; None if by nothing else."""
        return None

    @property
    def is_scored_before(self) -> bool:
        """False where the source has no output for the target yet."""
        return True

    def finish(self, device: torch.device) -> None:  # noqa: B027
        """Fit on validation data what is fitted after training."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The report's section on the finished model."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether the result loads with plain transformers pipelines."""

    def source_path(self) -> SourcePath | None:
        """The line back to the source, if the result may lie on it."""
        return None

    def forget_source(self) -> None:
        """Put random weights, by the seed, into the place of the source's."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.runtime.seed)
            fresh = type(self.host)(self.host.config)
        self.host.load_state_dict(fresh.state_dict())
        # L2-SP pulls towards the weights that training starts from.
        self.regularisers = regularisers(self.layout, self.config.transfer)

    # --- stages ------------------------------------------------------------------------------

    def begin(self, stage: Stage, device: torch.device) -> None:
        """Freeze what the stage freezes, put in its adapter, compute what is cached for it."""
        self.stage, self.frozen = stage, stage.frozen_layers(self.layout.depth)
        freeze(self.model, self.layout, self.frozen)
        if self.frozen is not None and self.config.transfer.cache == "disk":
            self._open_stores(self.frozen, device)
        else:
            self._close_stores()
        if stage.adapter is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.runtime.seed)
                self.adapted = add_adapter(
                    self.host, stage.adapter, model_id=self.carrier.base.model_id
                )
            self.model.to(device)
            for module in self.layout.new:
                module.requires_grad_(True)  # peft freezes all but the adapter
            for module in frozen_modules(self.layout, self.frozen):
                module.requires_grad_(False)

    def end(self, *, last: bool) -> None:
        """Leave the stage; unless it was the last, the next one starts from plain weights."""
        if not last:
            self.merge()

    def merge(self) -> None:
        """Fold an adapter into the weights."""
        if self.adapted is not None:
            merge_adapter(self.adapted)
            self.adapted = None

    def train_mode(self) -> None:
        """Training mode, but for what is frozen."""
        set_training(self.model, self.layout, self.frozen)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of what the stage trains, with their peak rates."""
        decay = self.config.train.weight_decay
        return parameter_groups(self.model, self.layout, self.stage, decay)

    def plan(self, budget: float, *, seed: Sequence[int], epoch: int) -> list[list[int]]:
        """Batches of an epoch's training examples, each within a budget of `lengths`."""
        examples = self.epoch(epoch)
        return plan_epoch(self.lengths, budget, seed=seed, epoch=epoch, examples=examples)

    def plan_with(
        self, targets: int, budget: float, *, seed: Sequence[int], epoch: int
    ) -> list[list[int]]:
        """Batches of the first `targets` examples, and of those behind them if there are any."""
        share = self.rehearsal_share(self.config)
        if targets == len(self.lengths) or not share:
            return Task.plan(self, budget, seed=seed, epoch=epoch)
        return plan_mixed(self.lengths, targets, share, budget, seed=seed, epoch=epoch)

    def epoch_of(self, targets: int, rehearsals: int, epoch: int) -> Sequence[int]:
        """All target examples, and as many rehearsal examples (numbered behind them) as asked."""
        share = self.rehearsal_share(self.config)
        if not rehearsals or not share:
            return range(targets)
        wanted = rehearsal_count(targets, share)
        order = np.random.default_rng([self.config.runtime.seed, 1]).permutation(rehearsals)
        # One long walk through the rehearsal set, so that all of it is used before any repeats.
        walk = np.arange(epoch * wanted, (epoch + 1) * wanted) % rehearsals
        return [*range(targets), *(targets + int(i) for i in order[walk])]

    @property
    def form(self) -> str:
        """The smallest form that holds the result; see `networks`."""
        native = isinstance(self.model, Network) and self.model.head is None
        # Random weights are nowhere else: what would be left out could not be found again.
        whole = not self.carrier.base.is_portable or self.config.transfer.scratch
        whole = whole or self.config.transfer.merge_adapter or native
        tuned = [stage for stage in self.stages if stage.frozen != "all"]
        if whole or any(stage.adapter is None for stage in tuned):
            return "full"
        if not tuned:
            return "head" if isinstance(self.model, Network) else "full"
        return "adapter" if tuned == [self.stages[-1]] else "full"

    def save(self, folder: Path) -> None:
        """Write the model in its smallest form; an adapter is merged afterwards."""
        if self.form != "adapter":
            self.merge()
        self.carrier.save(folder, self.form, self.adapted)
        self.merge()

    def loss(self, micro: Any, device: torch.device) -> torch.Tensor:
        """Sum of the loss over the micro-batch's target units, and loss terms beside it."""
        outputs = self.outputs(micro, device)
        total = self.target_loss(outputs, micro)
        for term in self.regularisers:
            own = term.loss(outputs, lambda: self.outputs(micro, device))
            total = total if own is None else total + own
        return total

    @abstractmethod
    def outputs(self, micro: Any, device: torch.device) -> Outputs:
        """What the model gives for a micro-batch."""

    @abstractmethod
    def target_loss(self, outputs: Outputs, micro: Any) -> torch.Tensor:
        """The task's own loss, summed over the micro-batch's target units."""

    @abstractmethod
    def epoch(self, epoch: int) -> Sequence[int]:
        """Training examples of an epoch."""

    @property
    @abstractmethod
    def batch_budget(self) -> float:
        """Cost that one device processes per forward pass, in the unit of `lengths`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the training data; a run resumes only on the same data."""

    @abstractmethod
    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[Any]:
        """Micro-batches of this process's share of a batch of training examples, on the CPU.

        Depends on its arguments and the seed only; called from another thread.
        """

    @abstractmethod
    def weight(self, micro: Any) -> float:
        """Number of target units that the loss sums over."""

    @abstractmethod
    def split(self, micro: Any) -> list[Any]:
        """The micro-batch as two halves, or as itself if it cannot be split."""

    @abstractmethod
    def names(self, indices: Sequence[int]) -> str:
        """Names of training examples, for messages."""

    @property
    @abstractmethod
    def validation_size(self) -> int:
        """Number of validation examples."""

    @abstractmethod
    def validate(self, indices: Sequence[int], device: torch.device) -> list[Any]:
        """One picklable record for each of these validation examples."""

    @property
    def path_size(self) -> int:
        """Number of validation examples that decide how far weights go back to the source."""
        return self.validation_size

    def validate_path(self, indices: Sequence[int], device: torch.device) -> list[Any]:
        """One picklable record for each of these, as `validate` gives them."""
        return self.validate(indices, device)

    @abstractmethod
    def summarize(self, records: Sequence[Any]) -> dict[str, float | None]:
        """Metrics of validation records, `metric` among them."""

    @abstractmethod
    def outcomes(self, records: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """The metric that orders weights after few steps already, and what validation records say
        of each example in it (see `runs.significance`).
        """

    def _open_stores(self, frozen: int, device: torch.device) -> None:  # noqa: B027
        """Compute what the frozen layers give, or find it in the cache; a task may keep nothing."""

    def _close_stores(self) -> None:  # noqa: B027
        """Take inputs again instead of cached activations."""


def name_some(names: Sequence[str]) -> str:
    """The first few names and how many more there are, for messages."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def refuse_contrastive(stages: Sequence[Stage]) -> None:
    """Contrastive stages are for classifiers.

    Raises:
        UserError: one of them is contrastive.
    """
    if any(stage.objective == "contrastive" for stage in stages):
        raise UserError("transfer.stages: objective: contrastive is for classes, not for speech.")


def plan_epoch(
    lengths: Sequence[float],
    budget: float,
    *,
    seed: int | Sequence[int],
    epoch: int,
    examples: Sequence[int] | None = None,
) -> list[list[int]]:
    """Batches of example indices for one epoch, each within the budget, padding counted.

    Examples are shuffled, sorted by length within windows of at most 50 batches' worth (a quarter
    of the epoch, if that is less), cut into batches, and the batches shuffled: batches hold
    examples of like length and still differ by epoch. Every one of `examples` (by default all)
    occurs exactly once; one longer than the budget is a batch of its own.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    rng = np.random.default_rng([*seeds, epoch])
    order = rng.permutation(len(lengths) if examples is None else np.asarray(examples, int))
    mean = float(np.mean(lengths)) if len(lengths) else 1.0
    # Sorted whole, a small set would give nearly the same batches in every epoch.
    window = max(1, int(min(50 * budget / mean, max(budget / mean, len(order) / 4))))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        batch: list[int] = []
        longest = 0.0
        for index in sorted(order[start : start + window], key=lambda i: lengths[i]):
            length = max(longest, lengths[index])
            if batch and (len(batch) + 1) * length > budget * (1 + 1e-9):
                batches.append(batch)
                batch, length = [], lengths[index]
            batch.append(int(index))
            longest = length
        batches.append(batch)
    return [batches[i] for i in rng.permutation(len(batches))]


def plan_mixed(
    lengths: Sequence[float],
    targets: int,
    share: float,
    budget: float,
    *,
    seed: Sequence[int],
    epoch: int,
) -> list[list[int]]:
    """Batches of an epoch that all hold some rehearsal: of the budget, `share` is for examples
    numbered from `targets` on.

    So every step moves towards the target and holds the source at once. Every target example
    occurs once; the rehearsal's are walked through, round after round, over the epochs.
    """
    plan = plan_epoch(lengths[:targets], budget * (1 - share), seed=seed, epoch=epoch)

    def rehearsed(number: int) -> list[list[int]]:
        return plan_epoch(lengths[targets:], budget * share, seed=[*seed, 1], epoch=number)

    rounds = {0: rehearsed(0)}
    each = len(rounds[0])
    for position, batch in enumerate(plan):
        number, place = divmod(epoch * len(plan) + position, each)
        if number not in rounds:
            rounds[number] = rehearsed(number)
        chosen = rounds[number][place % len(rounds[number])]
        batch += [targets + index for index in chosen]
    return plan
