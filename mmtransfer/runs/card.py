"""The model card of a run, by huggingface_hub's classes: metadata, results with intervals, how the
model is used, what it was made of and by, what it is for and where it fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config
from mmtransfer.data.printing import printable
from mmtransfer.data.tables import as_file
from mmtransfer.hub.bundled import BUNDLES
from mmtransfer.hub.card import card_license
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.hub.metadata import Metadata, read_metadata
from mmtransfer.hub.publish import EVAL_RESULTS
from mmtransfer.runs.models import TASKS
from mmtransfer.runs.report import (
    counted,
    decoding_note,
    describe_stages,
    gain_note,
    metric_name,
    metric_rows,
    silence_note,
)
from mmtransfer.runs.snippets import PLACE, snippet

_RELATIONS = {"full": "finetune", "adapter": "adapter", "head": "finetune"}
_NAMED_GROUPS = 8
_MONITORING = {
    "sentiment": """Texts of the kind it was trained on. Its classes are guesses about texts, no
facts about the people who wrote them: do not decide about a person by them alone.""",
    "sound": """Finding sounds of its classes in recordings and live cameras, where a person checks
what is reported. It is no safety system: what it misses is not reported.""",
    "speech": """Transcribing recordings and live cameras of the kind it was trained on, where a
person checks what follows from a line: words are missed, mistaken and now and then made up.""",
}
_LAW = """Recording people and transcribing what they say takes a ground in law in most places, and
often their consent or a visible notice; covert recording is a crime in many. Say that it is
recorded, keep no more and no longer than is needed, and do not identify people by what they say."""


def source_record(source: Checkpoint) -> dict[str, Any]:
    """What is reported of the model that a transfer starts from: `id` on the Hub and `revision`, if
    it has one, `license`, and a `name` that gives no place away.
    """
    base = source.as_base()
    if base.model_id is None and source.metadata is not None and source.metadata.base is not None:
        # A run that goes on from a run: the model on the Hub that both come from.
        base = source.metadata.base
    bundled = [bundle for bundle in BUNDLES.values() if bundle.base_model == base.model_id]
    license_ = bundled[0].license if bundled else card_license(source.folder)
    name = base.model_id or Path(base.source).name
    return {"id": base.model_id, "revision": base.revision, "license": license_, "name": name}


def write_card(run_dir: Path, config: Config, report: dict[str, Any]) -> None:
    """Write the card of a run whose model is saved, and what goes with it, beside the model and
    into the run folder.
    """
    folder = run_dir / "model"
    model = read_metadata(folder)
    assert model is not None  # every task writes it
    card = model_card(config, report, model)
    files = {folder / "README.md": card, run_dir / "README.md": card}
    files |= {folder / name: text for name, text in eval_results(config, report).items()}
    for path, text in files.items():
        with atomic_path(path) as part:
            part.write_text(text, encoding="utf-8")


def model_card(config: Config, report: dict[str, Any], model: Metadata) -> str:
    """A Hugging Face model card of a finished run; `model` is what its folder records.

    Data is named, not located: no path of the machine that trained appears in it.
    """
    base = report["base"]["name"]
    sections = [
        f"---\n{card_data(config, report).to_yaml()}\n---\n",
        f"# {base}, transferred\n",
        f"`{base}`, {describe_stages(report)}, on {_amount(report['data']['train'])}.\n",
        _results(report),
        usage(model, report["architecture"], is_plain=report["loads_with_transformers"]),
        _training(config, report),
        _limits(config, report),
    ]
    return "\n".join(sections)


def card_data(config: Config, report: dict[str, Any]) -> ModelCardData:
    """The metadata of a run's card."""
    base, pipeline = report["base"], TASKS[config.task].pipeline
    library = "transformers" if report["loads_with_transformers"] else "mmtransfer"
    model = report["model"]
    results = _results_of(config, report, pipeline)
    spoken = model.get("languages") or ([model["language"]] if model.get("language") else None)
    return ModelCardData(
        library_name="peft" if report["form"] == "adapter" else library,
        pipeline_tag=pipeline,
        tags=["mmtransfer", "transfer-learning"],
        language=spoken,
        license=base["license"],
        base_model=base["id"],
        base_model_relation=_RELATIONS[report["form"]] if base["id"] is not None else None,
        datasets=datasets(config) or None,
        metrics=[hub_metric(report["metric"])],
        model_name="mmtransfer run" if results else None,
        eval_results=results or None,
    )


def datasets(config: Config) -> list[str]:
    """Data sets on the Hub that it was trained or rehearsed on."""
    named = [config.data.train]
    if config.data.rehearsal not in ("auto", "none", "bundled"):
        named.append(config.data.rehearsal)
    found = [_hub_dataset(config, name) for name in named]
    return list(dict.fromkeys(name for name in found if name is not None))


def _hub_dataset(config: Config, place: str | None) -> str | None:
    """The id of a data set on the Hub; None for files, and for recordings, which are files."""
    if config.task != "sentiment" or place is None or as_file(place) is not None:
        return None
    return place.partition(":")[0]


def hub_metric(metric: str) -> str:
    """A metric as the Hub calls it."""
    return "f1" if metric == "macro_f1" else metric


def _sets(config: Config, report: dict[str, Any]) -> list[tuple[str, str | None, dict[str, Any]]]:
    """(name, where it comes from, scores) of each set that has a score."""
    metric, data = report["metric"], config.data
    sets = [("target validation", data.validation or data.train, report["target"]["after"])]
    for name, pair in report["source_domain"].items():
        sets.append((f"source domain {name}", data.source_domain.get(name), pair["after"]))
    return [one for one in sets if one[2][metric] is not None]


def _results_of(config: Config, report: dict[str, Any], pipeline: str) -> list[EvalResult]:
    metric, name = report["metric"], metric_name(report["metric"])
    found = []
    for label, place, scores in _sets(config, report):
        values = {metric: f"{name} [{scores['ci_low']:.4f}, {scores['ci_high']:.4f}]"}
        if "accuracy" in scores:
            low, high = scores["accuracy_ci_low"], scores["accuracy_ci_high"]
            values["accuracy"] = f"accuracy [{low:.4f}, {high:.4f}]"
        dataset = _hub_dataset(config, place)
        found += [
            EvalResult(
                task_type=pipeline,
                dataset_type=dataset or "private",
                dataset_name=label,
                metric_type=hub_metric(key),
                metric_name=text,
                metric_value=round(scores[key], 4),
            )
            for key, text in values.items()
        ]
    return found


def eval_results(config: Config, report: dict[str, Any]) -> dict[str, str]:
    """Files as the Hub documents them for results (see `huggingface_hub.EvalResultEntry`), by name:
    the scores on data sets that are on the Hub. Others have no place there.
    """
    files = {}
    metric, name = report["metric"], metric_name(report["metric"])
    for label, place, scores in _sets(config, report):
        dataset = _hub_dataset(config, place)
        if dataset is None:
            continue
        low, high = scores["ci_low"], scores["ci_high"]
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id="default",
            value=round(scores[metric], 4),
            notes=f"{name} of the {label}, 95 % interval {low:.4f} to {high:.4f}, mmtransfer",
        )
        file = re.sub(r"[^\w.-]+", "-", label)
        files[f"{EVAL_RESULTS}{file}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False
        )
    return files


# --- the text ------------------------------------------------------------------------------------


def _amount(data: dict[str, Any]) -> str:
    if "clips" in data:
        kind = "sounds" if "labels" in data else "speech"
        return f"{data['clips']} clips ({data['seconds'] / 60:.1f} min) of target {kind}"
    return f"{data['examples']} target texts"


def _results(report: dict[str, Any]) -> str:
    metric, after = report["metric"], report["target"]["after"]
    rows = "\n".join(
        f"| {name} | {before} | {after_} | {change} |"
        for name, before, after_, change in metric_rows(report)
    )
    name = metric_name(metric)
    direction = "higher" if report["higher_is_better"] else "lower"
    normalizer = f", normaliser `{after['normalizer']}`" if "normalizer" in after else ""
    text = f"""## Results

{name} with 95 % bootstrap interval{normalizer}; {direction} is better. A source-domain row
shows what the model gained or lost on the domain it came from. A change is real where a paired test
on the same {counted(report)} (approximate randomisation, p < 0.05, with Holm's correction over the
source domains) and the paired bootstrap interval agree that it is more than chance.

| set | before | after | change |
|---|---|---|---|
{rows}
"""
    note = gain_note(report)
    if note is not None:
        text += f"\n{note[0].upper()}{note[1:]}.\n"
    if "monitored" in report["target"]:
        text += f"""
As monitored: by {decoding_note(report["target"]["monitored"]["decoding"])}, as `mmtransfer monitor`
decodes on CPU. All other figures: by transformers in float32, greedy, no guards.
"""
    if after.get("silence_clips"):
        text += f"\nWithout speech: {silence_note(after)} of the target.\n"
    if "accuracy" in after:
        text += f"""
Accuracy {after["accuracy"]:.4f} [{after["accuracy_ci_low"]:.4f}, {after["accuracy_ci_high"]:.4f}],
expected calibration error {after["ece"]:.4f} (before temperature scaling
{after["ece_uncalibrated"]:.4f}).
"""
    return text + _per_class(report, after) + _per_group(report)


def _cell(name: str) -> str:
    """A name from the data within a table."""
    return printable(name).replace("|", "\\|")


def _per_class(report: dict[str, Any], after: Mapping[str, Any]) -> str:
    if "per_class" not in after:
        return ""
    classes = "\n".join(
        f"| {_cell(label)} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} "
        f"| {row['support']:.0f} |"
        for label, row in after["per_class"].items()
    )
    return f"""
| class | precision | recall | F1 | {counted(report)} |
|---|---|---|---|---|
{classes}
"""


def _per_group(report: dict[str, Any]) -> str:
    """The target by its groups, the worst first; of many no names, since those may be people."""
    groups = report["target"].get("groups")
    if not groups:
        return ""
    sign = 1 if report["higher_is_better"] else -1
    ordered = sorted(groups.items(), key=lambda item: sign * item[1]["value"])
    if len(ordered) > _NAMED_GROUPS:
        worst, median, best = (ordered[place][1]["value"] for place in (0, len(ordered) // 2, -1))
        return f"""
By the {len(ordered)} groups of the target (speakers, cameras, ...): worst {worst:.4f}, median
{median:.4f}, best {best:.4f}.
"""
    rows = "\n".join(
        f"| {_cell(name)} | {row['value']:.4f} | {row['examples']} |" for name, row in ordered
    )
    return f"""
By group of the target (speaker, camera, condition, ... as the data names it), the worst first:

| group | {metric_name(report["metric"])} | {counted(report)} |
|---|---|---|
{rows}
"""


def usage(model: Metadata, architecture: str, *, is_plain: bool) -> str:
    """The section on how a model is used: without this package where that can be, and with it."""
    task = TASKS[model.task]
    alone = snippet(model, architecture)
    if is_plain:
        alone = f"""from transformers import pipeline

run = pipeline("{task.pipeline}", model="{PLACE}")
print({task.pipeline_call})
"""
    own = f"```python\nimport mmtransfer\n\n{task.usage}\n```\n"
    text = "## Use\n\n"
    if alone is not None:
        what = "With transformers" if model.form != "adapter" else "With transformers and peft"
        text += f"{what} alone:\n\n```python\n{alone}```\n\nWith mmtransfer:\n\n"
    text += own
    if is_plain and model.shortest_context_s is not None:
        text += f"""
It decodes contexts as short as {model.shortest_context_s:g} s without loss
(`shortest_context_s` in `config.json`); plain pipelines pad to the full window.
"""
    if model.form != "full":
        text += f"\nThe {model.form} is stored here; the base is loaded from its own place.\n"
    return text


def _training(config: Config, report: dict[str, Any]) -> str:
    cost = report["cost"]
    software = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    rows = "\n".join(f"| {name} | {_size(data)} |" for name, data in report["data"].items())
    energy = ""
    if "energy_kwh" in cost:
        amount = Decimal(f"{cost['energy_kwh']:.3g}")  # of a short run 0.000004, not 4e-06
        energy = f", {amount:f} kWh by codecarbon"
    choice = " ".join(report["choice"]["reasons"]) + "\n\n" if "choice" in report else ""
    return f"""## Training

{choice}{cost["steps"]} steps ({cost["epochs"]:g} epochs) in {cost["train_seconds"]:.0f} s on
{cost["device"]}; best weights from step {cost["best_step"]};
{cost["trained_parameters"]:,} weights trained{energy}. Weight decay
{config.train.weight_decay:g}, seed {config.runtime.seed}. {_rehearsed(report)}Software: {software}.

| split | size |
|---|---|
{rows}
"""


def _size(data: Mapping[str, Any]) -> str:
    if "clips" in data:
        return f"{data['clips']} clips, {data['seconds'] / 60:.1f} min"
    return f"{data['examples']} texts"


def _rehearsed(report: dict[str, Any]) -> str:
    share = report["rehearsal"]["share"]
    if not share:
        return ""
    bundled = report["rehearsal"]["data"] == "bundled"
    what = "general speech bundled with mmtransfer" if bundled else "general data of its own"
    return f"Rehearsal: {share:.0%} {what}. "


def _limits(config: Config, report: dict[str, Any]) -> str:
    after = report["target"]["after"]
    count = f"{after['clips' if 'clips' in after else 'examples']} {counted(report)}"
    kind = config.task if config.task in _MONITORING else "speech"
    law = "" if kind == "sentiment" else f"\n{_LAW}\n"
    text = f"""## Intended use and limits

{_MONITORING[kind]}
{law}
The target validation set holds {count}; the interval says how far to trust the figure. Where the
table shows a loss, that kind of input is handled worse than by the source model. Noise, rooms,
microphones, accents, topics and languages that the target data lacks are not measured here.
"""
    found = report["forgetting"]
    if found["over"]:
        text += f"""
More than {found["limit"]:g} is lost on: {", ".join(found["over"])}. Use the source model there.
"""
    return text
