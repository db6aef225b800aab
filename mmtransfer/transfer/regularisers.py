"""Regularisers: terms beside a task's own loss, any number of them at once.

A penalty pulls at parameters and has its gradient in closed form; a loss term is differentiated
with the loss. A new one is a class and its line in `REGULARISERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmtransfer.config import TransferConfig
from mmtransfer.transfer.stages import Layout


@dataclass(frozen=True)
class Outputs:
    """What a model gives for a micro-batch."""

    logits: torch.Tensor
    """[example, place, class], or [example, class]."""
    counted: torch.Tensor
    """Which places the loss counts [example, place], or [example]."""


class Regulariser(ABC):
    """One term; a subclass is a penalty or a loss term."""

    @classmethod
    @abstractmethod
    def of(cls, layout: Layout, config: TransferConfig) -> Regulariser | None:
        """The term that a configuration asks for; None if it does not."""

    def loss(self, outputs: Outputs, again: Callable[[], Outputs]) -> torch.Tensor | None:
        """A loss term: summed over what the task's loss is summed over. `again` runs the model once
        more on the same micro-batch, with other dropout.
        """
        return None

    def penalty(self) -> torch.Tensor | None:
        """A penalty: its value over what is being trained."""
        return None

    def add_gradient(self, scale: float = 1.0) -> None:  # noqa: B027 - a loss term has none
        """A penalty: add its gradient to that of the loss, which is multiplied by `scale`."""


class L2SP(Regulariser):
    """The L2-SP penalty (Li, Grandvalet & Davoine 2018, eq. 2):
    alpha / 2 * |w - w0|^2 over source weights + beta / 2 * |w|^2 over new ones.

    `w0` are the weights at construction.
    """

    def __init__(
        self,
        source: Sequence[nn.Parameter],
        new: Sequence[nn.Parameter],
        *,
        alpha: float,
        beta: float,
    ):
        self.alpha, self.beta = alpha, beta
        self._source = [(p, p.detach().clone()) for p in source] if alpha else []
        self._new = list(new) if beta else []

    @classmethod
    def of(cls, layout: Layout, config: TransferConfig) -> L2SP | None:
        """Towards the source by `l2sp`, of new layers towards zero by `l2sp_new`."""
        if not config.l2sp and not config.l2sp_new:
            return None
        source = layout.source_parameters()
        return cls(source, layout.new_parameters(), alpha=config.l2sp, beta=config.l2sp_new)

    def penalty(self) -> torch.Tensor:
        """Its value over what is being trained."""
        total = torch.zeros(())
        with torch.no_grad():
            for parameter, start in self._source:
                if parameter.requires_grad:
                    distance = parameter - start.to(parameter.device)
                    total = total + self.alpha / 2 * distance.square().sum().cpu()
            for parameter in self._new:
                if parameter.requires_grad:
                    total = total + self.beta / 2 * parameter.square().sum().cpu()
        return total

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        """Add its gradient to that of the loss, which is multiplied by `scale`."""
        for index, (parameter, start) in enumerate(self._source):
            if parameter.grad is not None:
                if start.device != parameter.device:
                    start = start.to(parameter.device)
                    self._source[index] = (parameter, start)
                parameter.grad.add_(parameter - start, alpha=scale * self.alpha)
        for parameter in self._new:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=scale * self.beta)


class RDrop(Regulariser):
    """R-Drop (Liang et al. 2021, eq. 2): two passes with different dropout are to give the same
    distribution, by alpha / 2 * (KL(p || q) + KL(q || p)) at every place.

    The task's own loss is taken from the first pass alone.
    """

    def __init__(self, alpha: float):
        self.alpha = alpha

    @classmethod
    def of(cls, layout: Layout, config: TransferConfig) -> RDrop | None:
        """By `r_drop`."""
        return cls(config.r_drop) if config.r_drop else None

    def loss(self, outputs: Outputs, again: Callable[[], Outputs]) -> torch.Tensor:
        """The divergence of two passes, summed over the places that count."""
        one, other = (
            found.logits[found.counted].float().log_softmax(-1) for found in (outputs, again())
        )
        # (p - q) (log p - log q) is the sum of both directions.
        both = ((one.exp() - other.exp()) * (one - other)).sum()
        return self.alpha / 2 * both


REGULARISERS: tuple[type[Regulariser], ...] = (L2SP, RDrop)


def regularisers(layout: Layout, config: TransferConfig) -> list[Regulariser]:
    """The terms that a configuration asks for."""
    found = (kind.of(layout, config) for kind in REGULARISERS)
    return [term for term in found if term is not None]
