"""Whether `--structure auto` finds the best preset, for how much of the time of running all.

    python benchmarks/auto.py choose --data shared/data --work work [--cases NAME ...] [--seeds N]
    python benchmarks/auto.py seeds --data shared/data

choose: for each case every preset and `auto` train on the same data with the same seeds; each is
scored on a test set that none of them saw (validation data is held out of the training data). How
far `auto` is behind the best preset has its 95 % interval over the test examples (and seeds, where
there are several); the best of four scores is partly luck, so that a distance of 0 is rare. Time is
CPU time of everything, from loading the data to the report; the presets share one feature cache,
`auto` begins with an empty one. One thread, since waiting threads count as CPU time too. A run that
is finished is used again.

seeds: 20 pairs of ways to train that differ in the seeds alone, on SST-2 with 128 texts and a
frozen backbone: how many of them `compare` calls different, which has two seeds or more of each;
and how many the paired test of single models, which knows nothing of other seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from mmtransfer import train
from mmtransfer.config import Config, DataConfig, build_config, merge
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs import set_up
from mmtransfer.runs.choose import PRESETS
from mmtransfer.runs.models import task_of
from mmtransfer.runs.significance import is_higher_better, paired_difference, seed_difference
from mmtransfer.runtime import choose_device, make_accelerator, use_runtime
from mmtransfer.text.examples import hold_out_texts, read_texts
from mmtransfer.transfer.trainer import train_stages

WITHIN = 0.01
PAIRS, SEEDS, TEXTS = 20, 2, 128
TEXT: dict[str, Any] = {
    "task": "sentiment",
    "source_model": "bundled:minilm-l6",
    "data": {"max_tokens": 64, "allow_leaks": ["same-text"]},
}
SHORT: dict[str, Any] = {"steps": 100, "evaluate_every": 25}  # an epoch is a step or three
SPEECH: dict[str, Any] = {"data": {"language": "en"}, "train": {"evaluate_every": 50}}


@dataclass(frozen=True)
class Case:
    """A transfer whose structure is to be chosen."""

    values: dict[str, Any]
    """Of the configuration, beside the data."""
    source: str
    """Training data, below the data folder."""
    test: str | None
    """Test data; a fifth of the source where there is none."""
    size: int
    """Training examples, at most."""


def texts(source: str, size: int, test: str | None = None, **length: Any) -> Case:
    """A case of texts."""
    return Case(merge(TEXT, {"train": length}), source, test, size)


CASES = {
    "sst2_16": texts("sst2/train.csv", 16, "sst2/validation.csv", **SHORT),
    "sst2_128": texts("sst2/train.csv", 128, "sst2/validation.csv", **SHORT),
    "sst2_6920": texts("sst2/train.csv", 6920, "sst2/validation.csv"),
    "news_mtsc": texts("news_mtsc/train.csv", 2000),
    "books": texts("product_reviews/books.csv", 800),
    "dvd": texts("product_reviews/dvd.csv", 800),
    "electronics": texts("product_reviews/electronics.csv", 800),
    "grid_40": Case(
        merge(SPEECH, {"train": {"steps": 40}}), "grid_s1/train", "grid_s1/validation", 40
    ),
    "grid_400": Case(
        merge(SPEECH, {"train": {"steps": 100}}), "grid_s1/train", "grid_s1/validation", 400
    ),
}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A CSV file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def prepare(case: Case, data: Path, folder: Path) -> tuple[str, str]:
    """Write training and test data of a case; returns their paths."""
    if case.source.startswith("grid"):
        with (data / case.source / "metadata.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        random.Random(0).shuffle(rows)
        for clip in rows:
            clip["file_name"] = str((data / case.source / clip["file_name"]).resolve())
        return write(folder / "train.csv", rows[: case.size]), str(data / str(case.test))
    examples = read_texts(str(data / case.source), DataConfig(), name="train").examples
    kept, held = list(range(len(examples))), list[int]()
    if case.test is None:
        kept, held = hold_out_texts(examples, 0.2, 0)
    random.Random(0).shuffle(kept)

    def row(index: int) -> dict[str, Any]:
        one = examples[index]
        found = {"text": one.text, "label": one.label, "target": one.target, "group": one.group}
        return {key: value for key, value in found.items() if value is not None}

    training = write(folder / "train.csv", [row(index) for index in kept[: case.size]])
    if case.test is not None:
        return training, str(data / case.test)
    return training, write(folder / "test.csv", [row(index) for index in held])


def run(case: Case, name: str, seed: int, data: tuple[str, str], folder: Path) -> dict[str, Any]:
    """Train a preset or auto, and score it on the test data."""
    path = folder / f"{name}-{seed}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    # The presets share what a frozen backbone gives.
    cache = folder / f"cache-{seed}-{'auto' if name == 'auto' else 'presets'}"
    os.environ["MMTRANSFER_CACHE"] = str(cache)
    values = {
        "run_dir": str(folder / f"run-{name}-{seed}"),
        "data": {"train": data[0]},
        "transfer": {"preset": name},
        "runtime": {"seed": seed, "threads": 1},
    }
    config = build_config(merge(case.values, values))
    started = time.process_time()
    report = train(config, resume=True)
    seconds = time.process_time() - started
    with use_runtime(config.runtime):
        model = resolve(config.run_dir)
        device = choose_device(config.runtime)
        scores = task_of(model).evaluate(model, data[1], config, device)
    found = {
        "score": scores[report["metric"]],
        "metric": report["metric"],
        "outcomes": scores["outcomes"],
        "seconds": seconds,
        "choice": report.get("choice"),
    }
    path.write_text(json.dumps(found))
    return found


def choose(options: argparse.Namespace) -> None:
    """Print the table."""
    print(f"{'case':12}{'best preset':>24}{'auto':>10}{'behind':>28}{'time':>6}  chosen")
    near, count = 0, 0
    for name in options.cases or CASES:
        case, folder = CASES[name], options.work / name
        case = replace(case, size=min(case.size, options.most or case.size))
        data = prepare(case, options.data, folder)
        seeds = range(options.seeds)
        found = {
            each: [run(case, each, seed, data, folder) for seed in seeds]
            for each in (*PRESETS, "auto")
        }
        sign = 1 if is_higher_better(found["auto"][0]["metric"]) else -1
        means = {each: mean(one["score"] for one in rows) for each, rows in found.items()}
        best = max(PRESETS, key=lambda each: sign * means[each])
        behind = sign * (means[best] - means["auto"])
        interval = difference(found["auto"], found[best])
        everything = sum(one["seconds"] for each in PRESETS for one in found[each])
        share = sum(one["seconds"] for one in found["auto"]) / everything
        chosen = ", ".join(one["choice"]["chosen"] for one in found["auto"])
        print(
            f"{name:12}{best:>15} {means[best]:8.4f}{means['auto']:10.4f}"
            f"{behind:10.4f} {interval:17}{share:6.0%}  {chosen}   ("
            + ", ".join(f"{each} {means[each]:.4f}" for each in PRESETS)
            + ")",
            flush=True,
        )
        near, count = near + (behind <= WITHIN), count + 1
    print(f"within {WITHIN} of the best preset: {near} of {count}")


def difference(auto: list[dict[str, Any]], best: list[dict[str, Any]]) -> str:
    """The 95 % interval of how far the first is behind the second."""
    metric = auto[0]["metric"]
    old, new = ([one["outcomes"] for one in rows] for rows in (auto, best))
    several = seed_difference(old, new, metric)
    found = several or paired_difference(old[0], new[0], metric)
    return "" if found is None else f"[{found.low:.3f}, {found.high:.3f}]"


def outcomes(config: Config) -> tuple[str, dict[str, Any]]:
    """What a run makes of each validation example at its end; nothing is selected on them."""
    with use_runtime(config.runtime), tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.train, config.runtime)
        task = set_up(config, accelerator.device)
        train_stages(task, task.stages, config, accelerator, Path(folder))
        return task.outcomes(task.validate(range(task.validation_size), accelerator.device))


def seeds(options: argparse.Namespace) -> None:
    """Print how many pairs that differ in the seeds alone are called different."""
    case = CASES["sst2_128"]
    together = alone = 0
    with tempfile.TemporaryDirectory() as folder:
        training, test = prepare(case, options.data, Path(folder))
        values = merge(
            case.values,
            {
                "data": {"train": training, "validation": test},
                "transfer": {"preset": "feature"},
                "train": {"evaluate_every": 10**9},
            },
        )
        for pair in range(options.pairs):
            first = 2 * SEEDS * pair
            runs = [
                outcomes(build_config(merge(values, {"runtime": {"seed": seed}})))
                for seed in range(first, first + 2 * SEEDS)
            ]
            metric, found = runs[0][0], [each for _, each in runs]
            several = seed_difference(found[:SEEDS], found[SEEDS:], metric)
            single = paired_difference(found[0], found[SEEDS], metric)
            print(pair + 1, several, "| single models:", single, flush=True)
            together += several is not None and several.is_real
            alone += single is not None and single.is_real
    count = options.pairs
    print(f"real: {together} of {count} pairs; of single models {alone} of {count}")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("choose", "seeds"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--most", type=int, help="training examples of a case, at most")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of `seeds`")
    options = parser.parse_args()
    {"choose": choose, "seeds": seeds}[options.part](options)


if __name__ == "__main__":
    main()
