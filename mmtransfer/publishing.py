"""The model card of a run, and its upload to the Hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from mmtransfer.bundled import BUNDLES, PREFIX
from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.evaluation import silence_note
from mmtransfer.sources import MODEL_FILES, Base, read_metadata

_PIPELINES = {"speech": "automatic-speech-recognition", "sentiment": "text-classification"}
_RELATIONS = {"full": "finetune", "adapter": "adapter", "head": "finetune"}


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
    for name, pair in [("target", report["target"]), *report["sources"].items()]:
        before, after = pair["before"], pair["after"]
        label = name if name == "target" else f"source: {name}"
        is_known = before and before[metric] is not None and after[metric] is not None
        change = f"{after[metric] - before[metric]:+.4f}" if is_known else "–"
        rows.append((label, shown(before), shown(after), change))
    return rows


def forgetting_note(report: dict[str, Any]) -> str | None:
    """A line that says which source-domain sets lost more than they may, and what helps."""
    judged, metric = report["forgetting"], report["metric"]
    if not judged["over"]:
        return None
    losses = []
    for name in judged["over"]:
        before, after = (report["sources"][name][when][metric] for when in ("before", "after"))
        losses.append(f"{name} {before:.4f} -> {after:.4f}")
    return (
        f"forgotten beyond transfer.max_forgetting ({judged['limit']:g}): {', '.join(losses)}; "
        f"{judged['remedy']}"
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


def model_card(config: Config, report: dict[str, Any]) -> str:
    """A Hugging Face model card: metadata, results with intervals, how to use it, how it was made.

    Data is named, not located: no path of the machine that trained appears in it.
    """
    bundle = BUNDLES.get(config.source.removeprefix(PREFIX))
    base = bundle.base_model if bundle else config.source
    if Path(base).exists() or base.count("/") > 1:
        base = Path(base).name
    sections = [
        f"---\n{_metadata(config, report)}---\n",
        f"# {base}, transferred\n",
        f"`{base}`, {describe_stages(report)}, on {_amount(report['data']['train'])}.\n",
        _results(report),
        _use(config, report),
        _training(config, report),
        _limits(report),
    ]
    return "\n".join(sections)


def _metadata(config: Config, report: dict[str, Any]) -> str:
    bundle = BUNDLES.get(config.source.removeprefix(PREFIX))
    task = _PIPELINES[config.task]
    metric, after = report["metric"], report["target"]["after"]
    plain = report["loads_with_transformers"]
    metadata: dict[str, Any] = {
        "library_name": "peft" if report["form"] == "adapter" else "transformers",
        "pipeline_tag": task,
        "tags": ["mmtransfer", "transfer-learning"],
    }
    if not plain:
        metadata["library_name"] = "peft" if report["form"] == "adapter" else "mmtransfer"
    if report["model"].get("language"):
        spoken = report["model"].get("languages") or [report["model"]["language"]]
        metadata["language"] = spoken
    if bundle is not None:
        metadata["license"] = bundle.license
    base = bundle.base_model if bundle else config.source
    if bundle is not None or (base.count("/") == 1 and not Path(base).exists()):
        metadata["base_model"] = base
        metadata["base_model_relation"] = _RELATIONS[report["form"]]
    kind = "f1" if metric == "macro_f1" else metric
    metadata["model-index"] = [
        {
            "name": "mmtransfer run",
            "results": [
                {
                    "task": {"type": task},
                    "dataset": {"name": "target validation", "type": "private"},
                    "metrics": [
                        {"type": kind, "name": metric, "value": round(value, 4)}
                        for value in [after[metric]]
                        if value is not None
                    ],
                }
            ],
        }
    ]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _amount(data: dict[str, Any]) -> str:
    if "clips" in data:
        return f"{data['clips']} clips ({data['seconds'] / 60:.1f} min) of target speech"
    return f"{data['examples']} target texts"


def _results(report: dict[str, Any]) -> str:
    metric, after = report["metric"], report["target"]["after"]
    rows = "\n".join(
        f"| {name} | {before} | {after_} | {change} |"
        for name, before, after_, change in metric_rows(report)
    )
    name = "Macro-F1" if metric == "macro_f1" else metric.upper()
    direction = "higher" if report["higher_is_better"] else "lower"
    normalizer = f", normaliser `{after['normalizer']}`" if "normalizer" in after else ""
    text = f"""## Results

{name} with 95 % bootstrap interval{normalizer}; {direction} is better. A source row shows what the
model gained or lost on the domain it came from.

| set | before | after | change |
|---|---|---|---|
{rows}
"""
    if after.get("silence_clips"):
        text += f"\nWithout speech: {silence_note(after)} of the target.\n"
    if "per_class" in after:
        classes = "\n".join(
            f"| {label} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} "
            f"| {row['support']:.0f} |"
            for label, row in after["per_class"].items()
        )
        text += f"""
Accuracy {after["accuracy"]:.4f} [{after["accuracy_ci_low"]:.4f}, {after["accuracy_ci_high"]:.4f}],
expected calibration error {after["ece"]:.4f} (before temperature scaling
{after["ece_uncalibrated"]:.4f}).

| class | precision | recall | F1 | texts |
|---|---|---|---|---|
{classes}
"""
    return text


def _use(config: Config, report: dict[str, Any]) -> str:
    text = "## Use\n\n"
    model = report["model"]
    if report["loads_with_transformers"]:
        task = _PIPELINES[config.task]
        call = 'run("recording.wav")["text"]' if config.task == "speech" else 'run("A text.")'
        text += f"""```python
from transformers import pipeline

run = pipeline("{task}", model="path/or/id/of/this/model")
print({call})
```
"""
        if "shortest_context_s" in model:
            text += f"""
It reads contexts as short as {model["shortest_context_s"]:g} s without loss
(`shortest_context_s` in `config.json`); plain pipelines pad to {model["max_context_s"]:g} s.
"""
        return text
    if config.task == "sentiment":
        call = 'model.predict(["A text."])'
        loaded = 'model = mmtransfer.load("path/or/id/of/this/model")'
    else:
        call = '[piece.text for piece in mmtransfer.monitor(model, "recording.mp4")]'
        loaded = 'model = "path/or/id/of/this/model"'
    text += f"""```python
import mmtransfer

{loaded}
print({call})
```
"""
    if report["form"] != "full":
        text += f"\nThe {report['form']} is stored here; the base is loaded from its own place.\n"
    return text


def _training(config: Config, report: dict[str, Any]) -> str:
    cost = report["cost"]
    software = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"""## Training

{cost["steps"]} steps ({cost["epochs"]:g} epochs) in {cost["train_seconds"]:.0f} s on
{cost["device"]}; best weights from step {cost["best_step"]};
{cost["trained_parameters"]:,} weights trained. Weight decay {config.train.weight_decay:g}, seed
{config.runtime.seed}. {_rehearsed(report)}Software: {software}.
"""


def _rehearsed(report: dict[str, Any]) -> str:
    share = report["rehearsal"]["share"]
    if not share:
        return ""
    bundled = report["rehearsal"]["data"] == "bundled"
    what = "general speech bundled with mmtransfer" if bundled else "general data of its own"
    return f"Rehearsal: {share:.0%} {what}. "


def _limits(report: dict[str, Any]) -> str:
    after = report["target"]["after"]
    count = f"{after['clips']} clips" if "clips" in after else f"{after['examples']} texts"
    text = f"""## Limits

The target validation set holds {count}; the interval says how far to trust the figure. Where the
table shows a loss, input of that kind is read worse than by the source model.
"""
    judged = report["forgetting"]
    if judged["over"]:
        text += f"""
More than {judged["limit"]:g} is lost on: {", ".join(judged["over"])}. Use the source model there.
"""
    return text


# --- the Hub -------------------------------------------------------------------------------------


def publish(run: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = False) -> str:
    """Upload a run's model in one commit; returns the commit's address.

    With `dry_run` nothing is sent; the model card is checked and the files are returned, one per
    line with their size in bytes. Model files that the repository holds from before and that the
    run does not have are deleted: an old adapter would be put into a new model.

    Raises:
        UserError: no finished run, a model card whose metadata is wrong, a base that others cannot
            load, a repository that is public or private unlike what is asked, or a Hub that
            refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(run) / "model"
    if not (Path(run) / "report.json").is_file() or not folder.is_dir():
        raise UserError(f"{run}: expected the folder of a finished run (report.json and model/).")
    metadata = read_metadata(folder)
    base: Base | None = metadata["base"] if metadata else None
    if metadata and metadata["form"] != "full" and (base is None or not base.is_portable):
        raise UserError(
            f"{run}: the {metadata['form']} stands on a base that is in no public place. Train "
            "with transfer.merge_adapter: true to get a whole model."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: {error} Expected USER/NAME.") from None
    if "/" not in repo_id:
        raise UserError(f"{repo_id}: names no user or organisation. Expected USER/NAME.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{folder / 'README.md'}: not a model card ({reason}).") from None
    if dry_run:
        return "\n".join(f"{p.relative_to(folder)} {p.stat().st_size}" for p in paths)
    api = HfApi()
    try:
        card.validate(repo_type="model")
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if bool(there.private) != private:
            raise UserError(
                f"{repo_id}: exists and is {'private' if there.private else 'public'}. Change that "
                f"on the Hub, or publish {'with' if private else 'without'} --public."
            )
        names = {path.relative_to(folder).as_posix(): str(path) for path in paths}
        old = {file.rfilename for file in there.siblings or []} - names.keys()
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in names.items()]
            + [CommitOperationDelete(name) for name in sorted(old) if _is_model_file(name)],
            commit_message="Upload a model transferred with mmtransfer",
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{repo_id}: the Hub did not take the model ({reason}).") from None
    return str(commit.commit_url)


def _is_model_file(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in MODEL_FILES)
