"""Several domains in one: single models merged, against the best of them and joint training.

    python benchmarks/merge_domains.py --data product_reviews --work work

Every domain's reviews are split 4 to 1; each is trained on its own from MiniLM, all are trained
together, and the single ones are merged by every method. A run that is finished is used again.
"""

from __future__ import annotations

import argparse
import csv
import logging
import random
import shutil
from pathlib import Path
from statistics import mean

from mmtransfer import merge, train
from mmtransfer.config import RuntimeConfig, build_config
from mmtransfer.runs import evaluate

METHODS = ("uniform", "greedy", "task_arithmetic", "ties", "dare")


def split(data: Path, work: Path) -> list[str]:
    """Write the splits; returns the domains."""
    together: list[dict[str, str]] = []
    names = []
    for path in sorted(data.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list({row["text"]: row for row in csv.DictReader(file)}.values())
        random.Random(0).shuffle(rows)
        cut = len(rows) * 4 // 5
        write(work / f"{path.stem}.csv", rows[:cut])
        write(work / f"{path.stem}_validation.csv", rows[cut:])
        together += rows[:cut]
        names.append(path.stem)
    write(work / "joint.csv", together)
    return names


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write texts with their labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def run(work: Path, name: str, validation: str, options: argparse.Namespace) -> str:
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
                        "train": str(work / f"{name}.csv"),
                        "validation": str(work / f"{validation}_validation.csv"),
                        "max_tokens": options.max_tokens,
                        "allow_leaks": ["same-text"],
                    },
                    "train": {
                        "epochs": options.epochs,
                        "batch_tokens": 2048,
                        "gradient_accumulation": 2,
                    },
                }
            ),
            resume=True,
        )
    return str(folder)


def main() -> None:
    """Train, merge, and print accuracies."""
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    names = split(options.data, options.work)
    models = {name: run(options.work, name, name, options) for name in names}
    single = list(models.values())
    models["joint"] = run(options.work, "joint", names[0], options)
    for method in METHODS:
        folder = options.work / "runs" / method
        shutil.rmtree(folder, ignore_errors=True)
        merge(single, str(folder), method=method, runtime=RuntimeConfig())
        models[method] = str(folder)
    print(f"{'accuracy':16}{''.join(f'{name:>14}' for name in names)}{'mean':>14}")
    for name, model in models.items():
        found = [
            evaluate(model, str(options.work / f"{domain}_validation.csv"))["accuracy"]
            for domain in names
        ]
        print(f"{name:16}{''.join(f'{value:14.4f}' for value in found)}{mean(found):14.4f}")


if __name__ == "__main__":
    main()
