"""What a run reports: report.json, rows of its table, notes; its model card is in `card`."""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtransfer import __version__
from mmtransfer.cache import atomic_path
from mmtransfer.config import Config
from mmtransfer.runs.models import TASKS
from mmtransfer.runs.significance import Difference, holm, metric_of, paired_difference
from mmtransfer.transfer.task import Task
from mmtransfer.transfer.trainer import TrainResult

_SMALLEST_P = 0.001
_MOST_GROUPS = 50


def make_report(
    config: Config,
    task: Task,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    results: Sequence[TrainResult],
    accelerator: Any,
    base: dict[str, Any],
) -> dict[str, Any]:
    """The fields of report.json; `before` and `after` are scores of every set of
    `Splits.evaluated`, `base` what is known of the source (see `card.source_record`).
    """
    metric, splits = task.metric, task.splits
    tests = change_tests(before, after, metric, seed=config.runtime.seed)

    def lost(name: str) -> dict[str, Any]:
        test = tests[f"source domain {name}"]
        found = None if test is None else test.turned()
        return {
            "forgetting": None if found is None else found.value,
            "forgetting_test": None if found is None else found.as_dict(),
        }

    gain = tests["target"]
    report: dict[str, Any] = {
        "task": config.task,
        "metric": metric,
        "higher_is_better": task.higher_is_better,
        "source_model": config.source_model,
        "base": base,
        "architecture": task.host.config.model_type,
        "form": task.form,
        "loads_with_transformers": task.is_plain,
        "target": _pair(before["target"], after["target"])
        | group_scores(splits.validation, after["target"], metric),
        "source_domain": {
            name: _pair(before[f"source domain {name}"], after[f"source domain {name}"])
            | lost(name)
            for name in splits.source_domain
        },
        "gain": None if gain is None else gain.value,
        "gain_test": None if gain is None else gain.as_dict(),
        "rehearsal": _rehearsal_report(config, task),
        "cost": {
            "steps": sum(result.steps for result in results),
            "epochs": round(sum(result.epochs for result in results), 3),
            "best_step": results[-1].best_step,
            "early_stopped": any(result.early_stopped for result in results),
            "train_seconds": round(sum(result.seconds for result in results), 2),
            task.unit: round(sum(result.units for result in results), 2),
            "trained_parameters": max(result.trained_parameters for result in results),
            "device": _device_name(accelerator.device, accelerator.num_processes),
        },
        "stages": [
            {"frozen": stage.frozen, "adapter": stage.adapter, **asdict(result)}
            for stage, result in zip(task.stages, results, strict=True)
        ],
        "model": task.describe(),
        "data": {split.name: split.report() for split in splits.all},
        "versions": _versions(),
    }
    return report | {"forgetting": assess_forgetting(config, report)}


def change_tests(
    before: Mapping[str, Any], after: Mapping[str, Any], metric: str, *, seed: int
) -> dict[str, Difference | None]:
    """How much better each set is decoded or classified than before, and whether that is real. The
    gain on the target is one question, what is lost on the source domains another, of as many
    parts as there are sets (Holm 1979).
    """
    found = {}
    for name, scores in after.items():
        old = before[name]
        is_known = bool(old) and bool(scores)
        found[name] = (
            paired_difference(old["outcomes"], scores["outcomes"], metric, seed=seed)
            if is_known
            else None
        )
    sources = {name: test for name, test in found.items() if name != "target"}
    return found | holm(sources)


def _pair(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    return {
        "before": None if before is None else without_outcomes(before),
        "after": without_outcomes(after),
    }


def group_scores(examples: Any, scores: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Under `groups` the metric of each group of a set, where its data names several (speaker,
    camera, condition); no more than make a table.
    """
    listed = getattr(examples, "examples", None) or getattr(examples, "clips", [])
    rows: dict[str, list[int]] = defaultdict(list)
    for row, example in enumerate(listed):
        if example.group and not Path(example.group).is_absolute():  # a recording with subtitles
            rows[example.group].append(row)
    is_table = 1 < len(rows) <= _MOST_GROUPS and len(listed) > len(rows)
    if not is_table or not scores.get("outcomes"):
        return {}
    counts = np.zeros((len(rows), len(listed)))
    for number, own in enumerate(rows.values()):
        counts[number, own] = 1
    values = metric_of(scores["outcomes"], metric, counts)
    return {
        "groups": {
            name: {"value": float(value), "examples": len(own)}
            for (name, own), value in zip(rows.items(), values, strict=True)
            if np.isfinite(value)
        }
    }


def without_outcomes(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of a set, without those of each example."""
    return {name: value for name, value in scores.items() if name != "outcomes"}


def _rehearsal_report(config: Config, task: Task) -> dict[str, Any]:
    if task.splits.rehearsal is None:
        return {"data": "none", "share": 0.0}
    named = config.data.rehearsal
    return {
        "data": "bundled" if named == "auto" else named,
        "share": task.rehearsal_share(config),
    }


def assess_forgetting(config: Config, report: dict[str, Any]) -> dict[str, Any]:
    """Which source-domain sets lost more than they may, and what helps; see `forgetting_note`."""
    limit = config.transfer.max_forgetting
    lost = {name: found["forgetting"] for name, found in report["source_domain"].items()}
    over = [name for name, loss in lost.items() if loss is not None and loss > limit]
    share = report["rehearsal"]["share"]
    if not over:
        remedy = None
    elif share:
        remedy = (
            f"raise transfer.rehearsal (now {share:g}), lower train.learning_rate, or rehearse "
            "recordings like these (data.rehearsal)"
        )
    else:
        what = "bundled, or " if TASKS[config.task].bundled_rehearsal else ""
        remedy = f"rehearse: set data.rehearsal to {what}data like these"
    return {"limit": limit, "over": over, "remedy": remedy}


def write_report(run_dir: Path, report: dict[str, Any]) -> None:
    """Write report.json, which says that the run is finished."""
    with atomic_path(run_dir / "report.json") as part:
        text = json.dumps(finite(report), indent=2, ensure_ascii=False)
        part.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metric_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(set, before, after, change) of a report's main metric, target first."""
    metric = report["metric"]

    def shown(scores: dict[str, Any] | None) -> str:
        if scores is None:
            return "–"
        if scores[metric] is None:
            return f"undefined ({silence_note(scores)})"
        low, high = scores["ci_low"], scores["ci_high"]
        return f"{scores[metric]:.4f} [{low:.4f}, {high:.4f}]"

    rows = []
    for name, pair in [("target", report["target"]), *report["source_domain"].items()]:
        before, after = pair["before"], pair["after"]
        label = name if name == "target" else f"source domain: {name}"
        test = report["gain_test"] if name == "target" else pair["forgetting_test"]
        is_better_up = report["higher_is_better"] == (name == "target")
        change = change_text(test, turned=not is_better_up)
        rows.append((label, shown(before), shown(after), change))
    if "monitored" in report["target"]:
        rows.insert(1, ("target, as monitored", "–", shown(report["target"]["monitored"]), "–"))
    return rows


def change_text(test: Mapping[str, Any] | None, *, turned: bool = False) -> str:
    """A difference with its interval and whether it is real; `turned` where less of the metric is
    better.
    """
    if test is None:
        return "–"
    found = Difference(*(test[name] for name in ("value", "low", "high", "p", "examples")))
    return str(found.turned() if turned else found)


def choice_rows(choice: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what was tried before a structure was chosen."""
    tried = choice["tried"]
    columns = ["candidate", "share of its training", "steps", metric_name(tried[0]["metric"])]
    rows = [
        [
            one["candidate"] + (" (chosen)" if one["candidate"] == choice["chosen"] else ""),
            f"{one['share']:.1%}",
            str(one["steps"]),
            shown(one["score"]),
            f"{one['seconds']:.1f}",
        ]
        for one in tried
    ]
    return [*columns, "seconds"], rows


def gain_note(report: dict[str, Any]) -> str | None:
    """A line that says whether the gain on the target is real; None where it is not known."""
    test = report["gain_test"]
    if test is None:
        return None
    name, count = metric_name(report["metric"]), f"{test['examples']} {counted(report)}"
    p = f"p < {_SMALLEST_P:g}" if test["p"] < _SMALLEST_P else f"p = {test['p']:.3f}"
    interval = f"{abs(test['value']):.4f} {name} [{test['low']:+.4f}, {test['high']:+.4f}], {p}"
    where = f"on the target, by the same {count}"
    if not test["real"]:
        return f"no gain that is more than chance {where}: {interval}"
    return f"{'real gain' if test['value'] > 0 else 'real loss'} {where}: {interval}"


def forgetting_note(report: dict[str, Any]) -> str | None:
    """A line that names source-domain sets beyond `max_forgetting`, and a remedy."""
    found, metric = report["forgetting"], report["metric"]
    if not found["over"]:
        return None
    losses = []
    for name in found["over"]:
        before, after = (
            report["source_domain"][name][when][metric] for when in ("before", "after")
        )
        losses.append(f"{name} {before:.4f} -> {after:.4f}")
    return (
        f"forgotten beyond transfer.max_forgetting ({found['limit']:g}): {', '.join(losses)}; "
        f"{found['remedy']}"
    )


def describe_stages(report: dict[str, Any]) -> str:
    """The stages of a transfer in words."""
    parts = []
    for stage in report["stages"]:
        frozen, adapter = stage["frozen"], stage["adapter"]
        what = {"all": "backbone frozen", "none": "everything trained"}.get(
            str(frozen), f"first {frozen} layers frozen"
        )
        if adapter:
            what = f"{adapter['type']} adapter" + ("" if frozen == "none" else f", {what}")
        parts.append(f"{what} ({stage['steps']} steps, {stage['seconds']:.0f} s)")
    return ", then ".join(parts)


def counted(report: dict[str, Any]) -> str:
    """What the examples of a run are, in a word."""
    return "clips" if "clips" in report["data"]["train"] else "texts"


def metric_name(metric: str) -> str:
    """A metric for people."""
    return "Macro-F1" if metric == "macro_f1" else metric.upper()


def decoding_note(decoding: Mapping[str, Any]) -> str:
    """What clips were decoded by, in words."""
    beams = "greedy" if decoding["beams"] == 1 else f"{decoding['beams']} beams"
    guards = "guards" if decoding["guards"] else "no guards"
    prompt = ", with a prompt" if decoding.get("prompt") else ""
    return f"{decoding['engine']} in {decoding['precision']}, {beams}, {guards}{prompt}"


def shown(value: float | None, form: str = ".4f") -> str:
    """A score for people."""
    return "undefined" if value is None else format(value, form)


def silence_note(scores: Mapping[str, Any]) -> str:
    """How many words were emitted where nobody speaks; why there is no rate, if there is none."""
    words, clips = scores["hallucinated_words"], scores["silence_clips"]
    return f"{words} {'word' if words == 1 else 'words'} on {clips} silent clips"


def _device_name(device: torch.device, count: int) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    return f"{count} x {name}" if count > 1 else name


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "peft")
    return {"mmtransfer": __version__} | {name: version(name) for name in names}
