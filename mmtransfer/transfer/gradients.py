"""Gradients of several processes, added up while the backward pass still goes on.

What torch's DistributedDataParallel does (Li et al. 2020, section 3.2: buckets in the order in
which gradients come, each summed as soon as it is whole), with three differences that this loop
needs: sums instead of means, any number of micro-batches in a process (also none), and a pass that
runs out of memory in one process can be taken again in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn

_BUCKET_BYTES = 25 << 20


class _Bucket:
    """Neighbouring parameters whose gradients lie in one flat tensor and are summed at once."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        first = parameters[0]
        self._sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(self._sizes), dtype=first.dtype, device=first.device)
        self.missing = 0
        """Parameters whose gradient is not whole yet."""

    def begin(self) -> None:
        """Set the gradients to zero."""
        self.flat.zero_()
        self.missing = len(self.parameters)
        # New views each time: what moves a model puts other memory under the old ones.
        parts = torch.split(self.flat, self._sizes)
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


class GradientSums:
    """Sums of the gradients of these parameters (in the order of the forward pass) over processes.

    Of each step: `begin`, the backward passes, `last` before the last one, `finish`. Gradients are
    views of the buckets, so they take no more memory than in one process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = _BUCKET_BYTES):
        self._buckets = [_Bucket(part) for part in _parts(parameters[::-1], bucket_bytes)]
        self._parameters = [p for bucket in self._buckets for p in bucket.parameters]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        hooked: Sequence[Any] = parameters  # torch does not say what this method takes
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in hooked]
        self._used: set[nn.Parameter] = set()
        self._works: list[Any] = []
        self._is_last = False

    def begin(self) -> None:
        """Set all gradients to zero."""
        self._used.clear()
        self._works, self._is_last = [], False
        for bucket in self._buckets:
            bucket.begin()

    def last(self) -> None:
        """The next backward pass is the last: what it has gone through is summed."""
        self._is_last = True

    def finish(self, own: torch.Tensor) -> torch.Tensor:
        """Wait for the sums; returns that of `own` [value], too. A parameter that no process used
        has no gradient.
        """
        while len(self._works) < len(self._buckets):
            self._sum_next()
        used = own.new_tensor([float(p in self._used) for p in self._parameters])
        both = torch.cat([own, used])
        distributed.all_reduce(both)
        for work in self._works:
            work.wait()
        for parameter, count in zip(self._parameters, both[len(own) :].tolist(), strict=True):
            if not count:
                parameter.grad = None
        return both[: len(own)]

    def close(self) -> None:
        """Take no part in backward passes any more."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def _ready(self, parameter: nn.Parameter) -> None:
        self._used.add(parameter)
        if not self._is_last:
            return
        self._bucket_of[parameter].missing -= 1
        # In the same order in all processes.
        while len(self._works) < len(self._buckets) and not self._buckets[len(self._works)].missing:
            self._sum_next()

    def _sum_next(self) -> None:
        flat = self._buckets[len(self._works)].flat
        self._works.append(distributed.all_reduce(flat, async_op=True))


def _parts(parameters: Sequence[nn.Parameter], most_bytes: int) -> list[list[nn.Parameter]]:
    """Neighbours of one type, as many together as fit."""
    parts: list[list[nn.Parameter]] = []
    used = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        is_same = parts and parts[-1][0].dtype == parameter.dtype
        if not is_same or used + size > most_bytes:
            parts.append([])
            used = 0
        parts[-1].append(parameter)
        used += size
    return parts
