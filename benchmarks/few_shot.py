"""Accuracy and training time from a few examples per class: our methods and SetFit.

    pip install "setfit==1.2.*"
    python benchmarks/few_shot.py --train sst2/train.csv --validation sst2/validation.csv

For each number of examples and each seed every method gets the same texts, the same backbone and
the same threads. Nothing is selected on the test texts (--validation): our methods validate on the
texts they train on. SetFit runs with its defaults, in a process of its own, so that it may live in
another environment (--setfit-python). Seconds are those of training, without imports and loading
of the model: for ours everything from the frozen layers' output to the last checkpoint, for SetFit
`Trainer.train`. Each side trains once on a few texts first, which is not counted. "+labels" after
a method: each label's name, alone and in a sentence, is learnt as two more texts (data.label_texts;
SetFit gets them as rows).
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import t as student_t

import mmtransfer
from mmtransfer.cache import cache_path
from mmtransfer.config import DataConfig, build_config, merge
from mmtransfer.errors import UserError
from mmtransfer.hub.bundled import materialize
from mmtransfer.runs import training
from mmtransfer.text.examples import TextExample, TextSet, add_label_texts, read_texts
from mmtransfer.transfer.trainer import train_stages

SOURCE = "bundled:minilm-l6"
COMMON: dict[str, Any] = {
    "task": "sentiment",
    "data": {"allow_leaks": ["same-text"]},
    # There is nothing to select on, so every stage is evaluated at its end only.
    "train": {"evaluate_every": 10**9, "schedule": "linear"},
    "evaluation": {"bootstrap_samples": 100},
}
# Epochs of the stages that train the backbone: more texts get more steps.
PROBE = {"frozen": "all", "steps": 50, "head_learning_rate": 1e-3}
TUNE = {"frozen": "none", "epochs": 12, "learning_rate": 5e-5}
CONTRAST = {"frozen": "none", "objective": "contrastive", "epochs": 10, "learning_rate": 1e-4}
HEAD = {"layers": "all", "conv_layers": 1, "pooling": "max"}
METHODS: dict[str, dict[str, Any]] = {
    "end_to_end": {"transfer": {"stages": [TUNE]}, "head": HEAD, "train": {"batch_tokens": 512}},
    "feature": {"transfer": {"stages": [PROBE]}, "head": HEAD, "train": {"batch_tokens": 4096}},
    "combined": {
        "transfer": {"stages": [PROBE, TUNE | {"head_learning_rate": 5e-5}]},
        "head": HEAD,
        "train": {"batch_tokens": 512},
    },
    # The backbone by contrast, then the head on it frozen; about 60 texts of SST-2 in a batch.
    "contrastive": {
        "transfer": {"stages": [CONTRAST, PROBE]},
        "train": {"batch_tokens": 1536},
    },
    "contrastive_long": {  # at half the rate
        "transfer": {"stages": [CONTRAST | {"epochs": 30, "learning_rate": 5e-5}, PROBE]},
        "train": {"batch_tokens": 1536},
    },
}
LABEL_TEXTS = ("{label}", "This sentence is {label}.")
DEFAULT = (
    "end_to_end,feature,combined,contrastive,feature+labels,contrastive+labels,"
    "contrastive_long+labels,setfit,setfit+labels"
)
WARM_UP_SHOTS = 2


def draw(examples: list[TextExample], shots: int, seed: int) -> list[TextExample]:
    """So many examples of every class; a larger number of shots holds those of a smaller one."""
    by_label: dict[str, list[TextExample]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    generator = random.Random(seed)
    drawn = []
    for label in sorted(by_label):
        if len(by_label[label]) < shots:
            sys.exit(f"{label}: {len(by_label[label])} examples, but {shots} shots are asked for.")
        drawn += generator.sample(by_label[label], len(by_label[label]))[:shots]
    return drawn


def write_texts(path: Path, examples: list[TextExample]) -> str:
    """A CSV file of the examples; returns its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([example.text, example.label] for example in examples)
    return str(path)


class Stopwatch:
    """Stands in for a function and adds up the seconds spent in it."""

    def __init__(self, function: Any):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.function(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - started


def ours(
    method: str,
    train: str,
    test: str,
    seed: int,
    threads: int,
    extra: dict[str, list[str]],
) -> tuple[float, float]:
    """Test accuracy and training seconds of one of our methods."""
    # A rerun must not find the frozen layers' output of the run before.
    cached = cache_path("features")
    if cached.is_dir():
        shutil.rmtree(cached)
    stopwatch = Stopwatch(train_stages)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(training, "train_stages", stopwatch),
    ):
        given = {
            "source_model": SOURCE,
            "run_dir": str(Path(folder, "run")),
            "data": {"train": train, "validation": train, "label_texts": extra},
            "runtime": {"seed": seed, "threads": threads},
        }
        config = build_config(merge(merge(COMMON, METHODS[method]), given), origin=method)
        mmtransfer.train(config)
        scores = mmtransfer.evaluate(config.run_dir, test, config=config)
    return scores["accuracy"], stopwatch.seconds


def setfit_worker() -> None:
    """Runs in SetFit's environment: jobs as JSON on standard input, a line of JSON for each."""
    import contextlib
    import csv
    import json
    import logging
    import sys
    import tempfile
    import time

    import torch
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    logging.disable(logging.WARNING)
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])

    def read(path: str) -> tuple[list[str], list[str]]:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [row["text"] for row in rows], [row["label"] for row in rows]

    test_texts, test_labels = read(given["test"])
    labels = sorted(set(test_labels))
    for job in given["jobs"]:
        texts, names = read(job["train"])
        classes = [labels.index(name) for name in names]
        model = SetFitModel.from_pretrained(
            given["model"], local_files_only=True, trust_remote_code=False
        )
        # transformers prints its log on standard output.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            arguments = TrainingArguments(
                output_dir=folder,
                seed=job["seed"],
                report_to="none",
                save_strategy="no",
                show_progress_bar=False,
            )
            data = Dataset.from_dict({"text": texts, "label": classes})
            trainer = Trainer(model=model, args=arguments, train_dataset=data)
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        found = [labels[int(number)] for number in model.predict(test_texts)]
        right = sum(a == b for a, b in zip(found, test_labels, strict=True))
        print(json.dumps({"accuracy": right / len(found), "seconds": seconds}), flush=True)


def setfit(
    jobs: list[dict[str, Any]], test: str, threads: int, python: str
) -> list[tuple[float, float]]:
    """Test accuracy and training seconds of SetFit for each job."""
    program = f"{inspect.getsource(setfit_worker)}\nsetfit_worker()"
    given = {"jobs": jobs, "test": test, "threads": threads, "model": str(materialize(SOURCE))}
    result = subprocess.run(
        [python, "-c", program],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if result.returncode:
        sys.exit(f"SetFit failed in {python}:\n{result.stderr[-2000:]}")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return [(row["accuracy"], row["seconds"]) for row in rows]


def interval(values: list[float]) -> float:
    """Half the width of the mean's 95 % t interval."""
    if len(values) < 2:
        return math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(student_t.ppf(0.975, len(values) - 1)) * error


def cell(results: list[tuple[float, float]]) -> str:
    """Mean accuracy with its interval, and mean seconds."""
    accuracies, seconds = [a for a, _ in results], [s for _, s in results]
    return (
        f"{statistics.mean(accuracies):.3f} ± {interval(accuracies):.3f}, "
        f"{statistics.mean(seconds):.1f} s"
    )


def main() -> None:
    """Print a table: methods by numbers of examples per class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="texts that the examples are drawn from")
    parser.add_argument("--validation", required=True, help="test texts")
    parser.add_argument("--shots", default="8,32,64", help="examples per class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=DEFAULT)
    parser.add_argument("--limit", type=int, help="use this many test texts only")
    parser.add_argument("--setfit-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = arguments.methods.split(",")
    known = {*METHODS, "setfit"}
    unknown = set(methods) - known - {f"{name}+labels" for name in known}
    if unknown:
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    shots = [int(number) for number in arguments.shots.split(",")]

    try:
        examples = read_texts(arguments.train, DataConfig(), name="train").examples
        tests = read_texts(arguments.validation, DataConfig(), name="test").examples
    except UserError as error:
        parser.error(str(error))
    if arguments.limit:
        tests = random.Random(0).sample(tests, min(arguments.limit, len(tests)))
    results: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MMTRANSFER_CACHE"] = str(Path(folder, "cache"))
        test = write_texts(Path(folder, "test.csv"), tests)
        meanings = {
            label: [text.format(label=label) for text in LABEL_TEXTS]
            for label in sorted({example.label for example in examples})
        }
        jobs: list[dict[str, Any]] = []
        for count in [WARM_UP_SHOTS, *shots]:
            for seed in range(1 if count == WARM_UP_SHOTS else arguments.seeds):
                drawn, name = TextSet("train", draw(examples, count, seed)), f"{count}-{seed}"
                meant = add_label_texts(drawn, meanings)
                plain = write_texts(Path(folder, f"{name}.csv"), drawn.examples)
                named = write_texts(Path(folder, f"{name}-labels.csv"), meant.examples)
                jobs.append({"shots": count, "seed": seed, "train": plain, "named": named})
        for method in methods:
            name, _, labelled = method.partition("+")
            if name == "setfit":
                given = [job | {"train": job["named" if labelled else "train"]} for job in jobs]
                found = setfit(given, test, arguments.threads, arguments.setfit_python)
            else:
                extra = meanings if labelled else {}
                found = [
                    ours(name, job["train"], test, job["seed"], arguments.threads, extra)
                    for job in jobs
                ]
            for job, (accuracy, seconds) in list(zip(jobs, found, strict=True))[1:]:
                results[method, job["shots"]].append((accuracy, seconds))
                print(
                    f"{method}, {job['shots']} per class, seed {job['seed']}: "
                    f"accuracy {accuracy:.3f}, {seconds:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )

    print(f"{arguments.seeds} seeds, {len(tests)} test texts, {arguments.threads} threads\n")
    print(f"| method | {' | '.join(f'{count} per class' for count in shots)} |")
    print("|---" * (len(shots) + 1) + "|")
    for method in methods:
        print(f"| {method} | {' | '.join(cell(results[method, count]) for count in shots)} |")


if __name__ == "__main__":
    main()
