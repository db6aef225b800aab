"""Text classification with MiniLM: speed and accuracy of our transfers and of the usual recipes.

    pip install scikit-learn
    python benchmarks/sentiment.py --train sst2/train.csv --validation sst2/validation.csv

Everything runs in one process, on the same threads, one after the other:

- end_to_end: our loop against the plain transformers Trainer, with its random batches of 32 padded
  to their longest text. Our batches have as many tokens as 32 texts of mean length, so that both
  take about as many steps.
- feature: an epoch over the cached output of the frozen backbone against one that computes it, and
  the accuracy against scikit-learn's logistic regression on frozen, mean-pooled features; for a
  head on the same features, and for one of weighted layers and a convolution.
- partial: the lower half of the backbone frozen against end to end.

No run is evaluated before its end, so nothing is selected on the validation texts, and seconds are
those of training alone. The head with the convolution is configs/news_sentiment/feature.yaml's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as library

import mmtransfer
from mmtransfer.config import DataConfig, build_config, merge, read_yaml
from mmtransfer.hub.bundled import materialize
from mmtransfer.text import classifier_task as sentiment
from mmtransfer.text.examples import TextExample, read_texts
from mmtransfer.transfer.features import cached_features

SOURCE = "bundled:minilm-l6"
BATCH = 32
PARTS = ("end_to_end", "feature", "partial")
CONFIG = Path(__file__).parents[1] / "configs" / "news_sentiment" / "feature.yaml"
POOLED: dict[str, Any] = {
    # As strong as the C that cross-validation on the training texts chooses: 1 / (0.0032 * 6920).
    "transfer": {"preset": "feature", "l2sp_new": 0.045},
    "head": {"batch_norm": True},
    "train": {"epochs": 20, "head_learning_rate": 1e-3, "batch_tokens": 2048},
}
CONVOLUTION: dict[str, Any] = {
    "transfer": {"preset": "feature"},
    "head": {"layers": "all", "conv_layers": 1, "pooling": "max", "dropout": 0.3},
    "train": {"epochs": 8, "head_learning_rate": 1e-3, "batch_tokens": 2048},
}


def convolution() -> dict[str, Any]:
    """The settings of the configuration that the package ships, or those above."""
    if not CONFIG.is_file():
        return CONVOLUTION
    given = read_yaml(CONFIG)
    return {name: given[name] for name in ("transfer", "head", "train") if name in given}


class Bench:
    """The data, the settings that all measurements share, and the rows of the table."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.epochs, self.seed = arguments.epochs, arguments.seed
        self.threads, self.learning_rate = arguments.threads, arguments.learning_rate
        self.folder, self.model = folder, str(materialize(SOURCE))
        self.tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
        self.rows: list[tuple[str, str, str, str]] = []
        self.train = self._read(arguments.train, arguments.limit)
        self.validation = self._read(arguments.validation, arguments.limit)
        self.labels = sorted({example.label for example in self.train})
        lengths = [len(ids) for ids in self.tokenizer([e.text for e in self.train]).input_ids]
        self.batch_tokens = round(BATCH * float(np.mean(lengths)))
        self._end_to_end: tuple[float, float] | None = None

    def _read(self, path: str, limit: int | None) -> list[TextExample]:
        examples = read_texts(path, DataConfig(), name=Path(path).stem).examples
        if limit is None or limit >= len(examples):
            return examples
        return random.Random(self.seed).sample(examples, limit)

    def add(self, what: str, ours: str, other: str, ratio: float | None = None) -> None:
        """A row of the table, told at once."""
        row = (what, ours, other, "" if ratio is None else f"{ratio:.2f}")
        self.rows.append(row)
        print(" | ".join(row), flush=True)

    # --- mmtransfer -------------------------------------------------------------------------

    def _csv(self, name: str, examples: list[TextExample]) -> str:
        path = self.folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([example.text, example.label] for example in examples)
        return str(path)

    def run(self, name: str, values: dict[str, Any]) -> tuple[float, list[float], float]:
        """Trains; returns the accuracy, the seconds of each epoch, and those of the computation
        of the frozen layers' output of the training texts.
        """
        common = {
            "task": "sentiment",
            "source_model": SOURCE,
            "run_dir": str(self.folder / name),
            "data": {
                "train": self._csv("train", self.train),
                "validation": self._csv("validation", self.validation),
                "allow_leaks": ["same-text"],
            },
            # Full precision on a GPU too, like the other recipes.
            "train": {"evaluate_every": 10**9, "mixed_precision": "no"},
            "runtime": {"seed": self.seed, "threads": self.threads},
        }
        caching = 0.0

        def timed(what: str, *rest: Any, **options: Any) -> Any:
            nonlocal caching
            started = time.perf_counter()
            store = cached_features(what, *rest, **options)
            if what == "the training texts":
                caching += time.perf_counter() - started
            return store

        with patch.object(sentiment, "cached_features", timed):
            report = mmtransfer.train(build_config(merge(values, common), origin=name))
        ends: dict[int, float] = {}
        for line in (self.folder / name / "metrics.jsonl").read_text().splitlines():
            logged = json.loads(line)
            if "seconds" in logged:  # a step, not the evaluation behind the last one
                ends[logged["epoch"]] = logged["seconds"]
        seconds = np.diff([0.0, *ends.values()]).tolist()
        return report["target"]["after"]["accuracy"], seconds, caching

    def _fine_tuning(self, frozen: str | int) -> dict[str, Any]:
        return {
            "transfer": {"stages": [{"frozen": frozen}]},
            "train": {
                "epochs": self.epochs,
                "learning_rate": self.learning_rate,
                "schedule": "linear",
                "batch_tokens": self.batch_tokens,
            },
        }

    def _speed(self, seconds: list[float]) -> float:
        return len(self.train) * len(seconds) / sum(seconds)

    # --- the measurements -------------------------------------------------------------------

    def our_end_to_end(self) -> tuple[float, float]:
        """Accuracy and training texts per second; measured once."""
        if self._end_to_end is None:
            accuracy, seconds, _ = self.run("end_to_end", self._fine_tuning("none"))
            self._end_to_end = accuracy, self._speed(seconds)
        return self._end_to_end

    def plain_trainer(self) -> tuple[float, float]:
        """Accuracy and training texts per second of the transformers Trainer."""

        def encode(examples: list[TextExample]) -> Dataset:
            encoded = self.tokenizer([example.text for example in examples], truncation=True)
            labels = [self.labels.index(example.label) for example in examples]
            return Dataset.from_dict({**encoded, "labels": labels})

        set_seed(self.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.model,
            num_labels=len(self.labels),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=self.learning_rate,
            seed=self.seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encode(self.train),
            data_collator=DataCollatorWithPadding(self.tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"]
        found = trainer.predict(encode(self.validation))
        accuracy = float((found.predictions.argmax(-1) == found.label_ids).mean())
        return accuracy, len(self.train) * self.epochs / seconds

    def end_to_end(self) -> None:
        """Our loop against the Trainer."""
        (accuracy, speed), (other_accuracy, other_speed) = (
            self.our_end_to_end(),
            self.plain_trainer(),
        )
        ratio = speed / other_speed
        trainer = "transformers Trainer"
        self.add("end to end, texts/s", f"{speed:.1f}", f"{trainer}: {other_speed:.1f}", ratio)
        self.add("end to end, accuracy", f"{accuracy:.4f}", f"{trainer}: {other_accuracy:.4f}")

    def feature(self) -> None:
        """Cached against computed features, and the accuracy of what stands on them."""
        plain, chosen, best = self.regression()
        other = (
            f"logistic regression: {plain:.4f}; C = {best:.2g} by cross-validation: {chosen:.4f}"
        )
        for name, values in (("pooled", POOLED), ("convolution", convolution())):
            accuracy, seconds, caching = self.run(name, values)
            once = merge(values, {"transfer": {"cache": "none"}, "train": {"epochs": 1}})
            computed = sum(self.run(f"{name}-computed", once)[1])
            cached = float(np.mean(seconds[1:] or seconds))
            self.add(
                f"feature, {name}, s/epoch (computed once in {caching:.1f} s)",
                f"cached: {cached:.3f}",
                f"not cached: {computed:.2f}",
                computed / cached,
            )
            self.add(f"feature, {name}, accuracy", f"{accuracy:.4f}", other)

    def regression(self) -> tuple[float, float, float]:
        """Accuracy of logistic regression with C = 1, and with C by 5-fold cross-validation on
        the training texts; that C.
        """
        train, validation = self.pooled(self.train), self.pooled(self.validation)
        targets = [example.label for example in self.train]
        truth = [example.label for example in self.validation]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        plain = model.fit(train, targets).score(validation, truth)
        grid = {"logisticregression__C": [float(c) for c in np.logspace(-4, 1, 11)]}
        search = GridSearchCV(model, grid, cv=5).fit(train, targets)
        best = search.best_params_["logisticregression__C"]
        return float(plain), float(search.score(validation, truth)), best

    def pooled(self, examples: list[TextExample]) -> np.ndarray:
        """Means of the source's last hidden states over tokens [text, width]."""
        model = AutoModel.from_pretrained(
            self.model, dtype=torch.float32, trust_remote_code=False
        ).eval()
        texts = [example.text for example in examples]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            chosen = [texts[i] for i in part]
            batch = self.tokenizer(chosen, truncation=True, padding=True, return_tensors="pt")
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            shown = batch["attention_mask"][..., None].to(states.dtype)
            result[part] = ((states * shown).sum(1) / shown.sum(1)).numpy()
        return result

    def partial(self) -> None:
        """The lower half of the backbone frozen, against end to end."""
        accuracy, seconds, caching = self.run("partial", self._fine_tuning(3))
        whole_accuracy, whole_speed = self.our_end_to_end()
        speed = self._speed(seconds)
        with_caching = self._speed([*seconds[:-1], seconds[-1] + caching])
        whole = f"end to end: {whole_speed:.1f}"
        self.add("3 of 6 layers frozen, texts/s", f"{speed:.1f}", whole, speed / whole_speed)
        self.add(
            f"the same with the {caching:.1f} s of caching",
            f"{with_caching:.1f}",
            whole,
            with_caching / whole_speed,
        )
        other = f"end to end: {whole_accuracy:.4f}"
        self.add("3 of 6 layers frozen, accuracy", f"{accuracy:.4f}", other)


def main() -> None:
    """Measure what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--epochs", type=int, default=3, help="of end to end and partial")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the backbone")
    parser.add_argument("--limit", type=int, help="use this many texts of each file only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    library.set_verbosity_error()
    library.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # What is measured must not be in the cache already.
        os.environ["MMTRANSFER_CACHE"] = str(Path(folder, "cache"))
        bench = Bench(arguments, Path(folder))
        for part in parts:
            getattr(bench, part)()
    print(
        f"\n{len(bench.train)} training and {len(bench.validation)} validation texts, "
        f"{arguments.epochs} epochs, seed {arguments.seed}, {arguments.threads} threads\n"
    )
    print("| what | mmtransfer | other | ratio |\n|---|---|---|---|")
    for row in bench.rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
