"""What a merge reports: a table, report.json, the model card, the page of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.metadata import Metadata
from mmtransfer.runs.card import hub_metric, source_record, usage
from mmtransfer.runs.domains import Domain, Scores
from mmtransfer.runs.models import TASKS
from mmtransfer.runs.pages import Line, chart, render, text_table
from mmtransfer.runs.report import finite, metric_name, without_outcomes
from mmtransfer.runs.significance import Difference, holm, is_higher_better, paired_difference

_RELATIONS = {"full": "merge", "adapter": "adapter", "head": "merge"}


@dataclass(frozen=True)
class Point:
    """A result that was tried: at a share of the way from the source, or with scaled changes."""

    value: float
    scores: Scores

    def describe(self) -> str:
        """Its metric on every domain."""
        shown = (f"{name} {one['value']:.4f}" for name, one in self.scores.items() if one)
        return ", ".join(shown)


@dataclass(frozen=True)
class DomainResult:
    """A domain's scores by the models and by what they became."""

    name: str
    metric: str
    is_source: bool
    source: float | None
    """By the model that all started from; None where it has no score."""
    parents: dict[str, float]
    merged: float
    low: float
    """Lower end of the 95 % interval of the merged model's."""
    high: float
    compared_with: str
    """What the merged model is compared with here: of several parents the one that is best over all
    target domains; for one parent its source.
    """
    change: Difference | None
    """How much better the merged model is than that, tested on the same examples."""


@dataclass(frozen=True)
class Merged:
    """What came of a merge; prints as a table."""

    run_dir: str
    task: str
    form: str
    method: str
    chosen: float | list[str] | None
    """Share of the way or scale; of a greedy soup the models in it."""
    source: str | None
    parents: list[str]
    domains: list[DomainResult]
    points: list[Point] = field(default_factory=list, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [text_table(*_table(self))] if self.domains else []
        return "\n".join([*lines, *_notes(self), f"run folder: {self.run_dir}"])

    @property
    def mean(self) -> float | None:
        """Mean of the metric over target domains."""
        found = [one.merged for one in self.domains if not one.is_source]
        return sum(found) / len(found) if found else None


def make_merged(
    *,
    to: str,
    kind: str,
    form: str,
    method: str,
    chosen: float | list[str] | None,
    domains: Mapping[str, Domain],
    source: str | None,
    before: Scores | None,
    parents: Mapping[str, Scores],
    after: Scores,
    points: Sequence[Point],
    settings: dict[str, Any],
    seed: int,
) -> Merged:
    """The result by the scores of the source (`before`), the models and what they became."""
    against, reference = _reference(parents, domains, source, before)
    tests: dict[str, Difference | None] = {}
    for name in domains:
        old, new = reference.get(name), after[name]
        tests[name] = None
        if old is not None and new is not None:
            tests[name] = paired_difference(
                old["outcomes"], new["outcomes"], new["metric"], seed=seed
            )
    tests = holm(tests)
    results = []
    for name, domain in domains.items():
        new = after[name]
        if new is None or new["value"] is None:
            continue
        old = None if before is None else before[name]
        results.append(
            DomainResult(
                name=name,
                metric=new["metric"],
                is_source=domain.is_source,
                source=None if old is None else old["value"],
                parents={
                    model: found["value"]
                    for model, scores in parents.items()
                    if (found := scores[name]) is not None
                },
                merged=new["value"],
                low=new["ci_low"],
                high=new["ci_high"],
                compared_with=against,
                change=tests[name],
            )
        )
    return Merged(
        run_dir=to,
        task=kind,
        form=form,
        method=method,
        chosen=chosen,
        source=source,
        parents=list(parents),
        domains=results,
        points=list(points),
        settings={key: value for key, value in settings.items() if value is not None},
    )


def _reference(
    parents: Mapping[str, Scores],
    domains: Mapping[str, Domain],
    source: str | None,
    before: Scores | None,
) -> tuple[str, Scores]:
    if len(parents) == 1:
        if before is not None and source is not None:
            return source, before
        [(name, scores)] = parents.items()
        return name, scores

    def mean(scores: Scores) -> float:
        found = [
            one["value"] if is_higher_better(one["metric"]) else -one["value"]
            for name, one in scores.items()
            if one is not None and one["value"] is not None and not domains[name].is_source
        ]
        return sum(found) / len(found) if found else float("-inf")

    name = max(parents, key=lambda key: mean(parents[key]))
    return name, parents[name]


# --- for people ----------------------------------------------------------------------------------


def _table(merged: Merged) -> tuple[list[str], list[list[str]]]:
    with_source = any(one.source is not None for one in merged.domains)
    names = [Path(name).name for name in merged.parents]
    columns = ["set", *(["source"] if with_source else []), *names, "merged", "change"]
    rows = []
    for one in merged.domains:
        # Of error rates less is better; a change is shown as the metric moves.
        change = one.change
        if change is not None and not is_higher_better(one.metric):
            change = change.turned()
        known = [one.source] if with_source else []
        rows.append(
            [
                f"source domain: {one.name}" if one.is_source else one.name,
                *(
                    _shown(value)
                    for value in (*known, *(one.parents.get(p) for p in merged.parents))
                ),
                f"{one.merged:.4f} [{one.low:.4f}, {one.high:.4f}]",
                "–" if change is None else str(change),
            ]
        )
    targets = [one for one in merged.domains if not one.is_source]
    if len(targets) > 1:
        mean = ["mean of targets"]
        if with_source:
            mean.append(_mean([one.source for one in targets]))
        mean += [_mean([one.parents.get(name) for one in targets]) for name in merged.parents]
        rows.append([*mean, _mean([one.merged for one in targets]), ""])
    return columns, rows


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _shown(sum(known) / len(known) if len(known) == len(values) else None)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _notes(merged: Merged) -> list[str]:
    notes = [_how(merged)]
    if merged.domains:
        first = merged.domains[0]
        better = "higher" if is_higher_better(first.metric) else "lower"
        notes.append(
            f"{metric_name(first.metric)}, {better} is better; change against "
            f"{Path(first.compared_with).name}, by paired tests with Holm's correction"
        )
    else:
        notes.append("not scored: no run folder names its data; give --data NAME=PATH")
    if merged.points and merged.domains:
        notes.append("the sweep: sweep.html in the run folder")
    return notes


def _how(merged: Merged) -> str:
    names = ", ".join(Path(name).name for name in merged.parents)
    chosen = merged.chosen
    if merged.method == "interpolate":
        return f"{names} at {chosen:g} of the way from the source"
    if merged.method == "ensemble" and isinstance(chosen, list):
        return f"ensemble of the predictions of {', '.join(chosen)}"
    if isinstance(chosen, list):
        return f"greedy soup of {', '.join(Path(name).name for name in chosen)} out of {names}"
    scale = "" if chosen is None else f" at a scale of {chosen:g}"
    return f"{merged.method} of {names}{scale}"


# --- files ---------------------------------------------------------------------------------------


def write_merged(run_dir: Path, merged: Merged, after: Scores) -> None:
    """Write report.json, outcomes.json, the card, and the page of a sweep; the model is there."""
    report = as_dict(merged)
    (run_dir / "report.json").write_text(
        json.dumps(finite(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    outcomes = {name: one and one["outcomes"] for name, one in after.items()}
    (run_dir / "outcomes.json").write_text(json.dumps({"after": outcomes}), encoding="utf-8")
    card = (run_dir / "model" / "README.md").read_text(encoding="utf-8")
    (run_dir / "README.md").write_text(card, encoding="utf-8")
    if merged.points and merged.domains:
        (run_dir / "sweep.html").write_text(_page(merged), encoding="utf-8")


def as_dict(merged: Merged) -> dict[str, Any]:
    """Plain values, for JSON; without what was made of each example."""
    points = [
        {
            "value": point.value,
            "scores": {
                name: None if one is None else without_outcomes(one)
                for name, one in point.scores.items()
            },
        }
        for point in merged.points
    ]
    domains = [
        asdict(one) | {"change": None if one.change is None else one.change.as_dict()}
        for one in merged.domains
    ]
    return asdict(merged) | {"points": points, "domains": domains}


def _page(merged: Merged) -> str:
    """Gain against forgetting along the line that was tried."""
    lines = []
    for one in merged.domains:
        values = [
            (point.value, score["value"])
            for point in merged.points
            if (score := point.scores[one.name]) is not None and score["value"] is not None
        ]
        lines.append(Line(f"source domain: {one.name}" if one.is_source else one.name, values))
    mark = merged.chosen if isinstance(merged.chosen, float) else None
    is_path = merged.method == "interpolate"
    axis = "share of the way from the source" if is_path else "scale of the changes"
    metric = metric_name(merged.domains[0].metric)
    columns, rows = _table(merged)
    sweep = [
        [f"{point.value:g}", *(_shown(s["value"] if s else None) for s in point.scores.values())]
        for point in merged.points
    ]
    return render(
        "merge.html.jinja",
        title=_how(merged),
        notes=_notes(merged)[1:2],
        figure=chart(lines, x=axis, y=metric, mark=mark),
        columns=columns,
        rows=rows,
        lower_is_better=not is_higher_better(merged.domains[0].metric),
        sweep_columns=[axis, *merged.points[0].scores],
        sweep=sweep,
    )


def card_of(merged: Merged, models: Mapping[str, Checkpoint], model: Metadata) -> str:
    """A model card that names the parents; no path of the machine appears in it. `model` is what
    the merged model's folder records.
    """
    first = next(iter(models.values()))
    base = source_record(first)
    is_plain = merged.task == "speech" and merged.form == "full"
    library = "transformers" if is_plain else "mmtransfer"
    pipeline = TASKS[merged.task].pipeline
    targets = [one for one in merged.domains if not one.is_source]
    data = ModelCardData(
        library_name="peft" if merged.form == "adapter" else library,
        pipeline_tag=pipeline,
        tags=["mmtransfer", "transfer-learning", "merge"],
        license=base["license"],
        base_model=base["id"],
        base_model_relation=_RELATIONS.get(merged.form, "merge") if base["id"] else None,
        language=model.language,
        metrics=sorted({hub_metric(one.metric) for one in targets}) or None,
        model_name="mmtransfer merge" if targets else None,
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type="private",
                dataset_name=one.name,
                metric_type=hub_metric(one.metric),
                metric_name=f"{metric_name(one.metric)} [{one.low:.4f}, {one.high:.4f}]",
                metric_value=round(one.merged, 4),
            )
            for one in targets
        ]
        or None,
    )
    parents = "\n".join(f"- `{Path(name).name}`" for name in merged.parents)
    source = f"\nAll started from `{Path(merged.source).name}`.\n" if merged.source else ""
    columns, rows = _table(merged)
    table = "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])
    settings = "".join(f" {k.replace('_', ' ')} {v:g}." for k, v in merged.settings.items())
    results = f"## Results\n\n{_notes(merged)[1]}.\n\n{table}\n" if merged.domains else ""
    return f"""---
{data.to_yaml()}
---

# Merged model

{_how(merged)}.{settings}

## Parents

{parents}
{source}
{results}
{usage(model, first.architecture, is_plain=is_plain)}
## Limits

What was chosen (share, scale, members) was chosen by the sets in the table, which therefore flatter
it a little. Contexts and temperature are those of the parents: the careful one, the mean.
"""
