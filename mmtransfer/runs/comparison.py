"""What a comparison of structures found: typed, as a table, as JSON, and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mmtransfer.cache import atomic_path
from mmtransfer.runs.pages import Line, chart, render, text_table
from mmtransfer.runs.report import finite, metric_name
from mmtransfer.runs.significance import (
    Difference,
    holm,
    is_higher_better,
    paired_difference,
    seed_difference,
)


@dataclass(frozen=True)
class Cell:
    """A run of a comparison."""

    structure: str
    share: float
    seed: int
    report: Mapping[str, Any]
    outcomes: Mapping[str, Any]
    measured: Mapping[str, Any]

    @property
    def score(self) -> float | None:
        """The target's main metric."""
        value = self.report["target"]["after"][self.report["metric"]]
        return None if value is None else float(value)


@dataclass(frozen=True)
class StructureResult:
    """A structure on the whole data, over its seeds."""

    name: str
    scores: list[float]
    """Target metric of each seed."""
    mean: float | None
    spread: float
    """Standard deviation over the seeds."""
    sources: dict[str, float]
    """Mean metric on every source-domain set."""
    gain: Difference | None
    """Over the source as it is, by the first seed's run; None where the source has no output."""
    train_seconds: float
    """Mean over the seeds."""
    steps: int
    peak_bytes: int | None
    trained_parameters: int
    stored_bytes: int
    examples_per_second: float | None
    """Speed of use."""
    is_on_front: bool
    """Whether no other is both faster to train and better."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of structures; prints as a table."""

    plan: dict[str, Any]
    metric: str
    source: float | None
    """The target metric of the source as it is."""
    source_sets: dict[str, float]
    """The source's metric on every source-domain set."""
    structures: list[StructureResult]
    """From the best to the worst."""
    differences: dict[str, Difference | None]
    """How much better the second of `FIRST / SECOND` is than the first, corrected for the number of
    comparisons (Holm 1979).
    """
    curves: dict[str, list[dict[str, float]]]
    """For every structure and share of the data: examples, mean, low and high over the seeds."""

    def __str__(self) -> str:
        lines = [text_table(*_table(self)), *_sentences(self)]
        return "\n".join(lines)

    @property
    def best(self) -> StructureResult:
        """The structure with the best mean."""
        return self.structures[0]


def summarize(plan: dict[str, Any], cells: Sequence[Cell], *, seed: int) -> Comparison:
    """The comparison of finished cells."""
    metric = str(cells[0].report["metric"])
    sign = 1 if is_higher_better(metric) else -1
    whole: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.share == 1:
            whole.setdefault(cell.structure, []).append(cell)
    results = [_result(name, own, metric, seed) for name, own in whole.items()]
    fast = {one.name: _is_on_front(one, results, sign) for one in results}
    results = [StructureResult(**{**vars(one), "is_on_front": fast[one.name]}) for one in results]
    results.sort(key=lambda one: sign * (one.mean if one.mean is not None else 0), reverse=True)
    differences = {}
    for one, other in combinations([result.name for result in results], 2):
        # The better one second, so that differences are gains.
        old, new = ([c.outcomes["after"]["target"] for c in whole[name]] for name in (other, one))
        differences[f"{other} / {one}"] = seed_difference(old, new, metric, seed=seed)
    first = next(iter(whole.values()))[0]
    before = first.report["target"]["before"]
    sources = {
        name: pair["before"][metric]
        for name, pair in first.report["source_domain"].items()
        if pair["before"] is not None and pair["before"][metric] is not None
    }
    return Comparison(
        plan=plan,
        metric=metric,
        source=None if before is None else before[metric],
        source_sets=sources,
        structures=results,
        differences=holm(differences),
        curves=_curves(cells, plan["shares"]),
    )


def _result(name: str, cells: Sequence[Cell], metric: str, seed: int) -> StructureResult:
    scores = [cell.score for cell in cells]
    known = [score for score in scores if score is not None]
    first = cells[0]
    before = first.outcomes["before"]["target"]
    after = first.outcomes["after"]["target"]
    sources: dict[str, float] = {}
    for each in first.report["source_domain"]:
        found = [cell.report["source_domain"][each]["after"][metric] for cell in cells]
        if None not in found:
            sources[each] = mean(found)
    peaks = [cell.measured.get("peak_bytes") for cell in cells]
    cost = first.report["cost"]
    return StructureResult(
        name=name,
        scores=known,
        mean=mean(known) if known else None,
        spread=stdev(known) if len(known) > 1 else 0.0,
        sources=sources,
        gain=None if before is None else paired_difference(before, after, metric, seed=seed),
        train_seconds=mean(cell.report["cost"]["train_seconds"] for cell in cells),
        steps=cost["steps"],
        peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
        trained_parameters=cost["trained_parameters"],
        stored_bytes=first.measured["stored_bytes"],
        examples_per_second=first.measured.get("examples_per_second"),
        is_on_front=False,
    )


def _is_on_front(one: StructureResult, all_: Sequence[StructureResult], sign: int) -> bool:
    """Whether no other is at least as good and as fast to train, and better in one of both."""
    if one.mean is None:
        return False
    own = (sign * one.mean, -one.train_seconds)
    others = [
        (sign * x.mean, -x.train_seconds) for x in all_ if x is not one and x.mean is not None
    ]
    return not any(a >= own[0] and b >= own[1] and (a, b) != own for a, b in others)


def _curves(cells: Sequence[Cell], shares: Sequence[float]) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for name in dict.fromkeys(cell.structure for cell in cells):
        for share in shares:
            own = [cell for cell in cells if (cell.structure, cell.share) == (name, share)]
            scores = [cell.score for cell in own if cell.score is not None]
            if scores:
                data = own[0].report["data"]["train"]
                found.setdefault(name, []).append(
                    {
                        "share": share,
                        "examples": data.get("clips", data.get("examples")),
                        "mean": mean(scores),
                        "low": min(scores),
                        "high": max(scores),
                    }
                )
    return found


# --- for people ----------------------------------------------------------------------------------


def _table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    sets = list(found.structures[0].sources)
    columns = ["structure", f"{metric_name(found.metric)}", "gain over the source"]
    columns += [f"source domain: {name}" for name in sets]
    columns += ["training", "peak memory", "weights trained", "stored", "use"]
    rows = []
    for one in found.structures:
        gain = one.gain
        if gain is not None and not is_higher_better(found.metric):
            gain = gain.turned()
        rows.append(
            [
                one.name,
                "–" if one.mean is None else f"{one.mean:.4f} ± {one.spread:.4f}",
                "–" if gain is None else str(gain),
                *(_shown(one.sources.get(name)) for name in sets),
                f"{one.train_seconds:.1f} s",
                "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f} GiB",
                f"{one.trained_parameters:,}",
                f"{one.stored_bytes / 2**20:.1f} MiB",
                "–" if one.examples_per_second is None else f"{one.examples_per_second:.1f}/s",
            ]
        )
    if "source" in _asked(found):
        empty = ["–"] * 5
        values = [found.source_sets.get(name) for name in sets]
        rows.append(["source as it is", _shown(found.source), "–", *map(_shown, values), *empty])
    return columns, rows


def _asked(found: Comparison) -> list[str]:
    return ["source", *found.plan["structures"]]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _sentences(found: Comparison) -> list[str]:
    """What it comes to, in a few lines."""
    seeds, best = len(found.plan["seeds"]), found.best
    budget = (
        f"{found.plan['steps']} steps" if found.plan["steps"] else f"{found.plan['seconds']:g} s"
    )
    better = "higher" if is_higher_better(found.metric) else "lower"
    lines = [
        f"{metric_name(found.metric)}: mean ± standard deviation over {seeds} seeds; {better} is "
        f"better; {budget} a run"
    ]
    own = [
        (pair.split(" / ")[0], difference)
        for pair, difference in found.differences.items()
        if pair.endswith(f" / {best.name}")
    ]
    real = [name for name, one in own if one is not None and one.is_real]
    open_ = [name for name, one in own if one is None or not one.is_real]
    if real:
        lines.append(f"{best.name} is really better than {', '.join(real)}")
    if open_:
        lines.append(f"{best.name} and {', '.join(open_)} differ by no more than chance")
    front = [one.name for one in found.structures if one.is_on_front]
    lines.append(f"none is both faster to train and better than: {', '.join(front)}")
    return lines


def as_dict(found: Comparison) -> dict[str, Any]:
    """Plain values, for JSON."""
    structures = [
        asdict(one) | {"gain": None if one.gain is None else one.gain.as_dict()}
        for one in found.structures
    ]
    differences = {
        pair: None if one is None else one.as_dict() for pair, one in found.differences.items()
    }
    return asdict(found) | {"structures": structures, "differences": differences}


def write_comparison(folder: Path, found: Comparison) -> None:
    """Write comparison.json and comparison.html."""
    text = json.dumps(finite(as_dict(found)), indent=2, ensure_ascii=False) + "\n"
    for name, content in (("comparison.json", text), ("comparison.html", page(found))):
        with atomic_path(folder / name) as part:
            part.write_text(content, encoding="utf-8")


def page(found: Comparison) -> str:
    """One page that needs no other file."""
    columns, rows = _table(found)
    metric = metric_name(found.metric)
    higher = is_higher_better(found.metric)
    direction = "higher is better" if higher else "lower is better"
    front = [
        Line(one.name, [(one.train_seconds, one.mean)])
        for one in found.structures
        if one.mean is not None
    ]
    curves = [
        Line(
            one.name,
            [(point["examples"], point["mean"]) for point in found.curves.get(one.name, [])],
            [(p["examples"], p["low"], p["high"]) for p in found.curves.get(one.name, [])],
        )
        for one in found.structures
    ]
    pairs = []
    for pair, difference in found.differences.items():
        worse, better = pair.split(" / ")
        shown = "–"
        if difference is not None:
            shown = str(difference if higher else difference.turned())
        pairs.append([f"{better} against {worse}", shown, _p(difference)])
    sentences = _sentences(found)
    return render(
        "compare.html.jinja",
        title=f"{found.plan['source_model']}: which transfer",
        lead=sentences[1:],
        note=sentences[0],
        pareto=chart(
            front, x="seconds of training", y=f"{metric}, {direction}", is_connected=False
        ),
        curves=(
            chart(curves, x="training examples", y=f"{metric}, {direction}", logarithmic=True)
            if len(found.plan["shares"]) > 1
            else {}
        ),
        columns=columns,
        rows=rows,
        pairs=pairs,
        lower_is_better=not higher,
        structures=found.plan["structures"],
    )


def _p(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    return "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
