"""Whether relatedness, which trains nothing, orders transfers as training does.

    python benchmarks/relatedness.py domains --reviews product_reviews --sst2 sst2
    python benchmarks/relatedness.py text-layers --sst2 sst2
    python benchmarks/relatedness.py speech-layers --grid grid_s1

domains: a head is trained by feature transfer on each domain and scored on every other; for all
ordered pairs the loss of accuracy, against a head trained on the domain itself, is correlated
(Spearman) with each distance of `relate`.

text-layers, speech-layers: a head is trained by feature transfer on each layer of pretrained and of
random backbones of the same shape, one layer at a time, and its score is correlated with each
figure of `relate`. Nothing is selected on the validation data: each run is scored at its end.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtransfer import relate
from mmtransfer.config import Config, DataConfig, build_config, merge
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs import set_up
from mmtransfer.runtime import choose_device, make_accelerator, use_runtime
from mmtransfer.text.examples import TextExample, hold_out_texts, read_texts
from mmtransfer.transfer.task import Task
from mmtransfer.transfer.trainer import train_stages

TRAIN, TEST = 1000, 300
MINILM = "bundled:minilm-l6"
WHISPERS = ("bundled:whisper-tiny.en", "bundled:whisper-base")
DISTANCES = ("mmd", "proxy_a", "frechet", "vocabulary_overlap")
FIGURES = ("probe", "log_me", "h_score", "neighbours")
TEXT: dict[str, Any] = {
    "task": "sentiment",
    "source_model": MINILM,
    "data": {"allow_leaks": ["same-text"], "max_tokens": 64},
    "transfer": {"preset": "feature"},
    "head": {"batch_norm": True},
    "train": {"epochs": 20, "batch_tokens": 2048, "evaluate_every": 10**9},
}
SPEECH: dict[str, Any] = {
    "data": {"rehearsal": "none", "language": "en"},
    "transfer": {"preset": "feature"},
    "head": {"type": "ctc"},
    "train": {"epochs": 30, "head_learning_rate": 3e-3, "evaluate_every": 10**9},
}


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks, equal values sharing theirs."""

    def ranks(values: list[float]) -> np.ndarray:
        array = np.array(values)
        return np.array([((array < v).sum() + (array <= v).sum()) / 2 for v in array])

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def trained(config: Config) -> tuple[Task, list[Any]]:
    """A task after its stages, and its validation records."""
    with use_runtime(config.runtime), tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.train, config.runtime)
        task = set_up(config, accelerator.device)
        train_stages(task, task.stages, config, accelerator, Path(folder))
        records = task.validate(range(task.validation_size), choose_device(config.runtime))
    return task, records


def write(path: Path, examples: list[TextExample]) -> str:
    """A CSV file of texts; returns its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([example.text, example.label] for example in examples)
    return str(path)


def domains(reviews: Path, sst2: Path, folder: Path) -> dict[str, Any]:
    """Distances and losses of every ordered pair."""
    paths = {name: reviews / f"{name}.csv" for name in ("books", "dvd", "electronics")}
    paths["sst2"] = sst2 / "train.csv"
    files, tests, owners = {}, list[TextExample](), list[str]()
    for name, path in paths.items():
        examples = read_texts(str(path), DataConfig(), name=name).examples
        kept, held = hold_out_texts(examples, 0.2, 0)
        files[name] = write(folder / f"{name}.csv", [examples[i] for i in kept[:TRAIN]])
        tests += [examples[i] for i in held[:TEST]]
        owners += [name] * min(TEST, len(held))
    everything = write(folder / "tests.csv", tests)
    owner = np.array(owners)
    accuracy: dict[str, dict[str, float]] = {}
    for name, train in files.items():
        own = {"train": train, "validation": everything}
        _, records = trained(build_config(merge(TEXT, {"data": own})))
        labels = sorted({text.label for text in tests})
        right = np.array(records).argmax(1) == [labels.index(text.label) for text in tests]
        accuracy[name] = {other: float(right[owner == other].mean()) for other in files}
        print(name, json.dumps(accuracy[name]), flush=True)
    rows: list[dict[str, Any]] = []
    for target in files:
        others = {name: path for name, path in files.items() if name != target}
        data: dict[str, Any] = {"train": files[target], "source_domain": others}
        found = relate(build_config(merge(TEXT, {"data": data})))
        print(target, f"relate: {found.seconds:.1f} s", flush=True)
        for source, figures in found.distances.items():
            loss = accuracy[target][target] - accuracy[source][target]
            rows.append({"source": source, "target": target, "loss": loss} | figures)
    losses = [row["loss"] for row in rows]
    orders = {name: spearman([row[name] for row in rows], losses) for name in DISTANCES}
    return {"accuracy": accuracy, "pairs": rows, "spearman": orders}


def random_like(source: str, folder: Path) -> str:
    """A model of the same shape with random weights, as a checkpoint."""
    from transformers import AutoConfig, AutoModel

    path = resolve(source).folder
    target = folder / f"random-{source.partition(':')[2]}"
    shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    AutoModel.from_config(config, trust_remote_code=False).save_pretrained(target)
    return str(target)


def layers(values: dict[str, Any], models: list[str], score: str) -> dict[str, Any]:
    """Figures and tuned scores of every layer of some models, the first the source."""
    first, *others = models
    found = relate(build_config(values | {"source_model": first}), others)
    print(found, flush=True)
    rows: list[dict[str, Any]] = []
    for row in found.layers:
        own = {"source_model": row.model, "head": {"layers": [row.layer]}}
        task, records = trained(build_config(merge(values, own)))
        metrics = task.summarize(records)
        rows.append({"model": Path(row.model).name, "layer": row.layer, "tuned": metrics[score]})
        rows[-1] |= {name: getattr(row, name) for name in FIGURES}
        print(json.dumps(rows[-1]), flush=True)
    sign = 1 if task.higher_is_better else -1
    tuned = [sign * row["tuned"] for row in rows]
    orders = {name: spearman([row[name] for row in rows], tuned) for name in FIGURES}
    best = {
        model: max((row for row in rows if row["model"] == Path(model).name), key=lambda r: r[p])
        for model, p in itertools.product(models, ["probe"])
    }
    return {"layers": rows, "spearman": orders, "best_by_probe": best, "seconds": found.seconds}


def text_layers(sst2: Path, folder: Path) -> dict[str, Any]:
    """MiniLM and a random one, on SST-2."""
    data = {}
    for name, count in (("train", TRAIN), ("validation", 2 * TEST)):
        examples = read_texts(str(sst2 / f"{name}.csv"), DataConfig(), name=name).examples
        data[name] = write(folder / f"{name}.csv", examples[:count])
    values = merge(TEXT, {"data": data})
    return layers(values, [MINILM, random_like(MINILM, folder)], "macro_f1")


def speech_layers(grid: Path, clips: int, folder: Path) -> dict[str, Any]:
    """Two Whispers and random ones, on GRID."""
    data = {"validation": str(grid / "validation")}
    with (grid / "train" / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:clips]
    data["train"] = str(folder / "train.csv")
    with open(data["train"], "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for row in rows:
            writer.writerow([(grid / "train" / row["file_name"]).resolve(), row["transcription"]])
    models = [*WHISPERS, *(random_like(source, folder) for source in WHISPERS)]
    return layers(merge(SPEECH, {"data": data}), models, "cer")


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("domains", "text-layers", "speech-layers"))
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--clips", type=int, default=150, help="training clips of GRID")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part == "domains":
            found = domains(arguments.reviews, arguments.sst2, Path(folder))
        elif arguments.part == "text-layers":
            found = text_layers(arguments.sst2, Path(folder))
        else:
            found = speech_layers(arguments.grid, arguments.clips, Path(folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
