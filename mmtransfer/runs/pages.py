"""Tables and charts of results, for the terminal and for HTML pages that need no other file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_WIDTH, _HEIGHT = 640.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 12.0, 44.0
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y)."""
    bands: Sequence[tuple[float, float, float]] = field(default_factory=list)
    """(x, low, high), drawn behind it."""


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; the first column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=1000).print(table)
    return out.getvalue().rstrip()


def render(template: str, **values: Any) -> str:
    """A page from a template beside this module."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, keep_trailing_newline=True
    )


def chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    mark: float | None = None,
    logarithmic: bool = False,
    is_connected: bool = True,
) -> dict[str, Any]:
    """What the template `chart` draws: lines (or dots) with their bands in a frame with ticks;
    `mark` is a vertical line.
    """
    xs = [point[0] for line in lines for point in line.points]
    ys = [point[1] for line in lines for point in line.points]
    ys += [value for line in lines for band in line.bands for value in band[1:]]
    if not xs:
        return {}
    to_x, x_ticks = _axis(xs, _LEFT, _WIDTH - _RIGHT, logarithmic)
    to_y, y_ticks = _axis(ys, _HEIGHT - _BOTTOM, _TOP, False)
    drawn = []
    for number, line in enumerate(lines):
        dots = [(round(to_x(a), 1), round(to_y(b), 1), a, b) for a, b in line.points]
        around = [(to_x(a), to_y(low)) for a, low, _ in line.bands]
        around += [(to_x(a), to_y(high)) for a, _, high in reversed(line.bands)]
        drawn.append(
            {
                "name": line.name,
                "colour": number % 8,
                "dots": dots,
                "path": " ".join(f"{a},{b}" for a, b, _, _ in dots) if is_connected else "",
                "band": " ".join(f"{a:.1f},{b:.1f}" for a, b in around),
            }
        )
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "x": x,
        "y": y,
        "x_ticks": [(round(to_x(value), 1), f"{value:g}") for value in x_ticks],
        "y_ticks": [(round(to_y(value), 1), f"{value:g}") for value in y_ticks],
        "mark": None if mark is None else round(to_x(mark), 1),
        "lines": drawn,
    }


def _axis(values: Sequence[float], start: float, end: float, logarithmic: bool) -> Any:
    """(where a value lies between start and end, round values to label)."""
    if logarithmic:
        low, high = math.log(min(values)), math.log(max(values))
        ticks = sorted(set(values))
    else:
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - pad, high + pad
        ticks = _round_values(low, high)
    span = high - low or 1.0

    def place(value: float) -> float:
        position = math.log(value) if logarithmic else value
        return start + (end - start) * (position - low) / span

    return place, ticks


def _round_values(low: float, high: float) -> list[float]:
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]
