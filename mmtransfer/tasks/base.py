"""The contract between a task and the training loop, and the order of training examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch


class Task(Protocol):
    """What the training loop asks of a task. Micro-batches are opaque to the loop."""

    model: torch.nn.Module
    metric: str
    """Name of the validation metric that chooses the best checkpoint; lower is better."""

    @property
    def lengths(self) -> list[float]:
        """Cost of each training example, in the unit of the batch budget."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the training data; a run resumes only on the same data."""
        ...

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[Any]:
        """Micro-batches of this process's share of a batch of training examples, on the CPU.

        Depends on its arguments and the seed only; called from another thread.
        """
        ...

    def weight(self, micro: Any) -> float:
        """Number of target units that the loss sums over."""
        ...

    def split(self, micro: Any) -> list[Any]:
        """The micro-batch as two halves, or as itself if it cannot be split."""
        ...

    def loss(self, micro: Any, device: torch.device) -> torch.Tensor:
        """Sum of the loss over the micro-batch's target units."""
        ...

    def describe(self, indices: Sequence[int]) -> str:
        """Names of training examples, for messages."""
        ...

    @property
    def validation_size(self) -> int:
        """Number of validation examples."""
        ...

    def validate(self, indices: Sequence[int], device: torch.device) -> list[Any]:
        """One picklable record for each of these validation examples."""
        ...

    def summarize(self, records: Sequence[Any]) -> dict[str, float]:
        """Metrics of validation records, `metric` among them."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model as a plain Hugging Face checkpoint."""
        ...


def plan_epoch(
    lengths: Sequence[float], budget: float, *, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of example indices for one epoch, each within the budget, padding counted.

    Examples are shuffled, sorted by length within windows of 50 batches' worth, cut into batches,
    and the batches shuffled: batches hold examples of like length and still differ by epoch. Every
    example occurs exactly once; one longer than the budget is a batch of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    mean = float(np.mean(lengths)) if len(lengths) else 1.0
    window = max(1, int(50 * budget / mean))
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
