"""The learning-rate range test (Smith 2017): the loss while the rate grows from step to step."""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.progress import track
from mmtransfer.runs.training import set_up
from mmtransfer.runtime import make_accelerator, use_runtime
from mmtransfer.transfer.trainer import NotFiniteError, Trainer

logger = logging.getLogger(__name__)
STEPS = 100
_LOW, _HIGH = 1e-3, 1e3  # times the configured rates
_SMOOTHING = 0.9
_DIVERGED = 3.0  # times the lowest smoothed loss
_FEWEST = 10  # steps before the loss can have diverged
_WIDE, _HIGH_PX, _LEFT, _BOTTOM = 720, 400, 64, 48  # of the plot


@dataclass(frozen=True)
class RateRange:
    """What a range test found. It prints as a line."""

    field: str
    """The rate's name in the configuration; other rates grow with it."""
    configured: float
    suggested: float | None
    """Where the loss falls fastest; None if it never falls."""
    highest: float
    """Where the loss is lowest: beyond, it rises."""
    rates: list[float]
    losses: list[float]
    """Of each step."""
    smoothed: list[float]
    """The same, as an exponential mean without the bias of its start."""
    diverged: bool
    """Whether the test ended since the loss rose beyond three times its lowest."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.suggested is None:
            return (
                f"{self.field}: the loss does not fall at any rate from {self.rates[0]:.1e} to "
                f"{self.rates[-1]:.1e}; look at the data, or at another stage."
            )
        return (
            f"{self.field}: {self.suggested:.1e} suggested, where the loss falls fastest (now "
            f"{self.configured:.1e}; lowest loss at {self.highest:.1e}); {len(self.rates)} steps"
        )

    def svg(self) -> str:
        """The plot as a self-contained SVG, for light and dark."""
        return _plot(self)


class _RangeTrainer(Trainer):
    """A trainer whose rates grow exponentially."""

    def rate(self, step: int) -> float:
        """Times the peak rates."""
        return float(_LOW * (_HIGH / _LOW) ** (step / max(1, self.total_steps - 1)))


def lr_range(config: Config, *, stage: int = 1, steps: int = STEPS) -> RateRange:
    """Train a stage of a transfer (1: the first) for some steps while its rates grow from a
    thousandth to a thousand times the configured ones, and find where the loss falls fastest.

    Nothing is kept but the cache of a frozen prefix.

    Raises:
        UserError: unusable configuration or data, or a stage that there is not.
    """
    if steps < 2 * _FEWEST:
        raise UserError(f"steps: expected at least {2 * _FEWEST}, found {steps}.")
    with use_runtime(config.runtime), tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.train, config.runtime)
        task = set_up(config, accelerator.device)
        if not 1 <= stage <= len(task.stages):
            raise UserError(
                f"stage: expected a number from 1 to {len(task.stages)}, found {stage}."
            )
        chosen = replace(task.stages[stage - 1], steps=steps, epochs=None)
        trainer = _RangeTrainer(task, chosen, config, accelerator, Path(folder))
        is_new = chosen.frozen == "all"
        field = "train.head_learning_rate" if is_new else "train.learning_rate"
        configured = chosen.head_learning_rate if is_new else chosen.learning_rate
        return _measured(trainer, field, configured)


def _measured(trainer: _RangeTrainer, field: str, configured: float) -> RateRange:
    trainer.task.train_mode()
    rates, losses, smoothed = list[float](), list[float](), list[float]()
    mean, diverged = 0.0, False
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        prepared = track(trainer._prepared(), "range test", total=trainer.total_steps)
        for step, (_, _, indices, micros) in enumerate(prepared):
            try:
                loss, _ = trainer._step(step, indices, micros)
            except NotFiniteError:
                diverged = True
                break
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
            rates.append(configured * trainer.rate(step))
            losses.append(loss)
            smoothed.append(mean / (1 - _SMOOTHING ** (step + 1)))
            if step >= _FEWEST and smoothed[-1] > _DIVERGED * min(smoothed):
                diverged = True
                break
    if len(rates) < 2:
        raise UserError(
            f"The loss is not finite at a thousandth of {field} ({configured:g}). Lower it, or "
            "look at the data."
        )
    suggested, lowest = steepest(rates, smoothed)
    return RateRange(field, configured, suggested, lowest, rates, losses, smoothed, diverged)


def steepest(rates: list[float], smoothed: list[float]) -> tuple[float | None, float]:
    """The rate at which a smoothed loss falls fastest on a logarithmic scale, before its lowest
    point, and the rate of that; None where it does not fall.
    """
    bottom = int(np.argmin(smoothed))
    if bottom < 2:
        return None, rates[bottom]
    slopes = np.gradient(smoothed, np.log(rates))[: bottom + 1]
    place = int(np.argmin(slopes))
    return (rates[place] if slopes[place] < 0 else None), rates[bottom]


def write_plot(found: RateRange, path: Path) -> None:
    """Write the plot of a range test."""
    with atomic_path(path) as part:
        part.write_text(found.svg(), encoding="utf-8")


def _plot(found: RateRange) -> str:
    top = 3 * min(found.smoothed) + 1e-9
    top = min(top, max(found.losses)) if max(found.losses) > min(found.losses) else top
    bottom = min(0.9 * min(found.losses), min(found.losses))
    low, high = math.log10(found.rates[0]), math.log10(found.rates[-1])

    def x(rate: float) -> float:
        share = (math.log10(rate) - low) / max(high - low, 1e-9)
        return _LEFT + share * (_WIDE - _LEFT - 16)

    def y(loss: float) -> float:
        share = (min(loss, top) - bottom) / max(top - bottom, 1e-9)
        return _HIGH_PX - _BOTTOM - share * (_HIGH_PX - _BOTTOM - 32)

    def line(values: list[float]) -> str:
        pairs = zip(found.rates, values, strict=True)
        return " ".join(f"{x(rate):.1f},{y(value):.1f}" for rate, value in pairs)

    floor = _HIGH_PX - _BOTTOM
    ticks = "".join(
        f'<line class="grid" x1="{x(10.0**p):.1f}" x2="{x(10.0**p):.1f}" y1="32" y2="{floor}"/>'
        f'<text x="{x(10.0**p):.1f}" y="{floor + 18}" text-anchor="middle">1e{p}</text>'
        for p in range(math.ceil(low), math.floor(high) + 1)
    )
    for share in (0.0, 0.5, 1.0):
        value = bottom + share * (top - bottom)
        ticks += (
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - 16}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.3g}</text>'
        )
    mark = ""
    if found.suggested is not None:
        place = x(found.suggested)
        mark = (
            f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="32" y2="{floor}"/>'
            f'<text class="strong" x="{place:.1f}" y="24" text-anchor="middle">'
            f"{found.suggested:.1e}</text>"
        )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {_HIGH_PX}"
 role="img" aria-label="Loss by learning rate">
<style>
svg {{ background: #fff; font: 13px system-ui, sans-serif; }}
text {{ fill: #444; }} .strong {{ font-weight: 600; fill: #111; }}
.grid {{ stroke: #ddd; }} .mark {{ stroke: #c2410c; stroke-dasharray: 4 3; }}
.raw {{ stroke: #93c5fd; fill: none; }} .mean {{ stroke: #1d4ed8; stroke-width: 2; fill: none; }}
@media (prefers-color-scheme: dark) {{
svg {{ background: #161616; }} text {{ fill: #bbb; }} .strong {{ fill: #eee; }}
.grid {{ stroke: #333; }} .mark {{ stroke: #fb923c; }}
.raw {{ stroke: #1e4480; }} .mean {{ stroke: #7db3ff; }}
}}
</style>
{ticks}
<polyline class="raw" points="{line(found.losses)}"/>
<polyline class="mean" points="{line(found.smoothed)}"/>
{mark}
<text x="{_WIDE // 2}" y="{_HIGH_PX - 8}" text-anchor="middle">{found.field}</text>
<text x="8" y="20">loss</text>
</svg>
"""
