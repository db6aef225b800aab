"""The data of a run: training, validation, source domains and rehearsal, checked for leaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from mmtransfer.config import Config
from mmtransfer.errors import UserError


class ExampleSet(Protocol):
    """The usable examples of one split, and what was left out."""

    @property
    def name(self) -> str:
        """Its name in messages and in the report."""
        ...

    @property
    def size(self) -> str:
        """How large it is, in words."""
        ...

    def __len__(self) -> int: ...

    def subset(self, name: str, indices: Sequence[int], *, skipped: bool = False) -> Self:
        """Some of its examples; with `skipped` what was left out stays listed."""
        ...

    def report(self) -> dict[str, Any]:
        """Its entry in report.json."""
        ...


Split = TypeVar("Split", bound=ExampleSet)


@dataclass
class Splits(Generic[Split]):
    """The data of a run."""

    train: Split
    validation: Split
    source_domain: dict[str, Split]
    rehearsal: Split | None = None

    @property
    def evaluated(self) -> dict[str, Split]:
        """Sets that are scored before and after: the target, then the source domains."""
        sources = {f"source domain {name}": split for name, split in self.source_domain.items()}
        return {"target": self.validation} | sources

    @property
    def all(self) -> list[Split]:
        """Every set."""
        named = [self.train, self.validation, *self.source_domain.values(), self.rehearsal]
        return [split for split in named if split is not None]


def load_splits(
    config: Config,
    read: Callable[[str, str, str], Split],
    hold_out: Callable[[Split], tuple[list[int], list[int]]],
    refuse_leaks: Callable[[Split, Split], object],
    extend: Callable[[Split], Split] = lambda train: train,
) -> Splits[Split]:
    """Training, validation and source-domain sets.

    `read` takes a path, the set's name and its role (train, validation, source), `hold_out` gives
    indices of (training, validation) examples where no validation data is named, `extend` adds to
    the training data what is never validated on.

    Raises:
        UserError: no training data named, unusable data, or a leak between splits.
    """
    data = config.data
    train = read(training_data(config), "train", "train")
    if data.validation is None:
        chosen, held = hold_out(train)
        validation = train.subset("validation (held out)", held)
        train = train.subset("train", chosen, skipped=True)
    else:
        validation = read(data.validation, "validation", "validation")
    if data.train_share < 1:
        # By one order for all shares and seeds.
        order = np.random.default_rng(0).permutation(len(train))
        kept = sorted(order[: max(1, round(len(train) * data.train_share))].tolist())
        train = train.subset("train", kept, skipped=True)
    train = extend(train)
    refuse_leaks(train, validation)
    sources = {name: read(path, name, "source") for name, path in data.source_domain.items()}
    for source in sources.values():
        refuse_leaks(train, source)
    return Splits(train, validation, sources)


def training_data(config: Config) -> str:
    """The path or name of the training data.

    Raises:
        UserError: none is named.
    """
    if config.data.train is None:
        raise UserError("data.train is not set. Name the training data: --data.train PATH")
    return config.data.train


def choose_rehearsal(config: Config, *, usual: str | None = None) -> str | None:
    """What a transfer rehearses: a path, `bundled` or nothing; `usual` is what `auto` stands for.

    Raises:
        UserError: a share of rehearsal without data for it.
    """
    named = config.data.rehearsal
    found = usual if named == "auto" else None if named == "none" else named
    if found is None and config.transfer.rehearsal:
        raise UserError("transfer.rehearsal needs source-domain data: set data.rehearsal.")
    return found


def rehearsal_count(examples: int, share: float) -> int:
    """Rehearsal examples of an epoch so that they are `share` of all its examples."""
    return round(examples * share / (1 - share))
