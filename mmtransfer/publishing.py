"""The model card of a run."""

from __future__ import annotations

from typing import Any

import yaml

from mmtransfer.bundled import BUNDLES, PREFIX
from mmtransfer.config import Config


def metric_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(set, before, after, change) of a report's main metric, target first."""
    metric = report["metric"]
    rows = []
    for name, pair in [("target", report["target"]), *report["sources"].items()]:
        before, after = pair["before"], pair["after"]
        label = name if name == "target" else f"source: {name}"
        rows.append(
            (
                label,
                f"{before[metric]:.4f} [{before['ci_low']:.4f}, {before['ci_high']:.4f}]",
                f"{after[metric]:.4f} [{after['ci_low']:.4f}, {after['ci_high']:.4f}]",
                f"{after[metric] - before[metric]:+.4f}",
            )
        )
    return rows


def model_card(config: Config, report: dict[str, Any]) -> str:
    """A Hugging Face model card: metadata, results with intervals, how to use it, how it was made.

    Data is named, not located: no path of the machine that trained appears in it.
    """
    bundle = BUNDLES.get(config.source.removeprefix(PREFIX))
    metric = report["metric"]
    after = report["target"]["after"]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["mmtransfer", "transfer-learning", "speech-recognition"],
    }
    if report["model"]["language"]:
        metadata["language"] = [report["model"]["language"]]
    if bundle is not None:
        metadata["license"] = bundle.license
    base = bundle.base_model if bundle else config.source
    if bundle is not None or base.count("/") == 1:
        metadata["base_model"] = base
        metadata["base_model_relation"] = "finetune"
    metadata["model-index"] = [
        {
            "name": "mmtransfer run",
            "results": [
                {
                    "task": {"type": "automatic-speech-recognition"},
                    "dataset": {"name": "target validation", "type": "private"},
                    "metrics": [{"type": metric, "value": round(after[metric], 4)}],
                }
            ],
        }
    ]
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    rows = "\n".join(
        f"| {name} | {before} | {after_} | {change} |"
        for name, before, after_, change in metric_rows(report)
    )
    cost, data = report["cost"], report["data"]
    software = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    silence = ""
    if after["silence_clips"]:
        silence = (
            f"\nOn {after['silence_clips']} target clips without speech it emits "
            f"{after['hallucinated_words']} words.\n"
        )
    return f"""---
{header}---

# {base}, adapted end to end

All weights of `{base}` were fine-tuned on {data["train"]["clips"]} clips
({data["train"]["seconds"] / 60:.1f} min) of target speech.

## Results

{metric.upper()} with 95 % bootstrap interval, normaliser `{after["normalizer"]}`. A source row
shows what the model lost on the domain it came from.

| set | before | after | change |
|---|---|---|---|
{rows}
{silence}
## Use

```python
from transformers import pipeline

recognize = pipeline("automatic-speech-recognition", model="path/or/id/of/this/model")
print(recognize("recording.wav")["text"])
```

It reads contexts as short as {report["model"]["shortest_context_s"]:g} s without loss
(`shortest_context_s` in `config.json`); plain pipelines pad to
{report["model"]["max_context_s"]:g} s.

## Training

{cost["steps"]} steps ({cost["epochs"]:g} epochs) in {cost["train_seconds"]:.0f} s on
{cost["device"]}; best weights from step {cost["best_step"]}. Learning
rate {config.train.learning_rate:g}, {config.train.schedule} schedule, weight decay
{config.train.weight_decay:g}, seed {config.runtime.seed}. Software: {software}.

## Limits

The target validation set holds {after["clips"]} clips; the interval says how far to trust the
figure. Where the table shows a loss, speech of that kind is read worse than by the source model.
"""
