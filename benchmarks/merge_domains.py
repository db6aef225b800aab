"""Several domains in one: single models merged, against the best of them and joint training.

    python benchmarks/merge_domains.py --data product_reviews --work work [--texts N] [--scored N]

Each domain's reviews are split 3 : 1 : 1 into texts to train on, texts on which runs and merges
choose, and texts that nothing has seen, on which all are scored. Each domain is trained on its own
from MiniLM, all are trained together, and the single ones are merged by every method. A run that is
finished is used again. Differences of the mean accuracy have their paired 95 % interval.
"""

from __future__ import annotations

import argparse
import csv
import logging
import random
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from mmtransfer import merge, train
from mmtransfer.config import RuntimeConfig, build_config
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs.models import task_of
from mmtransfer.runs.significance import paired_difference
from mmtransfer.runtime import choose_device, use_runtime

METHODS = ("uniform", "greedy", "task_arithmetic", "ties", "dare")
RUNTIME = RuntimeConfig(threads=1)


def split(data: Path, work: Path, texts: int | None, scored: int | None) -> list[str]:
    """Write the splits; returns the domains."""
    together: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    names = []
    for path in sorted(data.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list({row["text"]: row for row in csv.DictReader(file)}.values())
        random.Random(0).shuffle(rows)
        fifth = len(rows) // 5
        parts = {
            "train": rows[: 3 * fifth][:texts],
            "validation": rows[3 * fifth : 4 * fifth][:scored],
            "test": rows[4 * fifth : 5 * fifth][:scored],
        }
        for part, own in parts.items():
            write(work / f"{path.stem}_{part}.csv", own)
            together.setdefault(part, []).extend(own)
        names.append(path.stem)
    for part, rows in together.items():
        write(work / f"joint_{part}.csv", rows)
    return names


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write texts with their labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def run(work: Path, name: str, options: argparse.Namespace) -> str:
    """Train on a domain, unless that is done."""
    folder = work / "runs" / name
    if not (folder / "report.json").is_file():
        train(
            build_config(
                {
                    "task": "sentiment",
                    "source_model": "bundled:minilm-l6",
                    "run_dir": str(folder),
                    "data": {
                        "train": str(work / f"{name}_train.csv"),
                        "validation": str(work / f"{name}_validation.csv"),
                        "max_tokens": options.max_tokens,
                        "allow_leaks": ["same-text"],
                    },
                    "train": {"epochs": options.epochs, "batch_tokens": 1024},
                    "runtime": RUNTIME.model_dump(),
                }
            ),
            resume=True,
        )
    return str(folder)


def outcomes(model: str, data: Path) -> dict[str, Any]:
    """Class and predicted class of each text."""
    with use_runtime(RUNTIME):
        found = resolve(model)
        config = build_config({"task": "sentiment"})
        return task_of(found).evaluate(found, str(data), config, choose_device(RUNTIME))["outcomes"]


def main() -> None:
    """Train, merge, and print accuracies."""
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, help="training texts of a domain, at most")
    parser.add_argument("--scored", type=int, help="texts of a domain to choose and to score on")
    options = parser.parse_args()
    names = split(options.data, options.work, options.texts, options.scored)
    models = {name: run(options.work, name, options) for name in names}
    single = list(models.values())
    models["joint"] = run(options.work, "joint", options)
    for method in METHODS:
        folder = options.work / "runs" / method
        shutil.rmtree(folder, ignore_errors=True)
        merge(single, str(folder), method=method, runtime=RUNTIME)
        models[method] = str(folder)
    print(f"{'accuracy':16}{''.join(f'{name:>14}' for name in names)}{'mean':>10}")
    means, together = dict[str, float](), dict[str, dict[str, list[Any]]]()
    for name, model in models.items():
        parts = [outcomes(model, options.work / f"{domain}_test.csv") for domain in names]
        right = [mean(map(int.__eq__, p["targets"], p["predictions"])) for p in parts]
        means[name] = mean(right)
        together[name] = {key: [one for p in parts for one in p[key]] for key in parts[0]}
        print(f"{name:16}{''.join(f'{v:14.4f}' for v in right)}{means[name]:10.4f}", flush=True)
    best = max(names, key=lambda name: means[name])
    for method in METHODS:
        against = {
            old: paired_difference(together[old], together[method], "accuracy")
            for old in (best, "joint")
        }
        print(f"{method:16}", "; ".join(f"against {old}: {d}" for old, d in against.items()))


if __name__ == "__main__":
    main()
