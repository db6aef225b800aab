"""Accuracy of sound classes on a frozen speech encoder, cross-validated by recording.

    python benchmarks/sound.py --data FOLDER

FOLDER holds a folder of recordings for each class, as `mmtransfer train` takes it. Files whose
names differ only behind the last hyphen (takes of one recording, as ESC-50 names them) are in one
fold. Of the settings of the head one is chosen in each fold on a part of its training recordings,
then it is trained on all of them; the recordings of the fold itself are used for its score alone.
Training validates on what it trains on, so that nothing is selected there either. The interval
comes from resampling recordings, takes together.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer import load, runs
from mmtransfer.config import build_config, merge
from mmtransfer.sound.classifier import SoundModel

SETTINGS: dict[str, dict[str, Any]] = {
    "last layer, mean": {"layers": "last"},
    "all layers, mean": {"layers": "all"},
    "lower layers, mean": {"layers": [0, 1, 2]},
    "all layers, attention": {"layers": "all", "pooling": "attention"},
    "all layers, max": {"layers": "all", "pooling": "max"},
    "all layers, conv 128, max": {
        "layers": "all",
        "conv_layers": 1,
        "conv_width": 128,
        "pooling": "max",
    },
}
INNER_PARTS = 4
Clip = tuple[Path, str]


def recording(path: Path) -> str:
    """The recording that a file is a take of."""
    return path.stem.rpartition("-")[0] or path.stem


def parts(clips: Sequence[Clip], count: int, seed: int) -> list[list[Clip]]:
    """So many disjoint parts with about the same share of each class; takes stay together."""
    takes: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        takes[recording(clip[0])].append(clip)
    names = sorted(takes)
    random.Random(seed).shuffle(names)
    names.sort(key=lambda name: -len(takes[name]))  # the large ones while there is room
    found: list[list[Clip]] = [[] for _ in range(count)]
    held = [Counter[str]() for _ in range(count)]
    for name in names:
        label = takes[name][0][1]
        to = min(range(count), key=lambda part: (held[part][label], len(found[part]), part))
        found[to] += takes[name]
        held[to].update(label for _, label in takes[name])
    return found


def correct(
    train: Sequence[Clip], test: Sequence[Clip], head: dict[str, Any], options: argparse.Namespace
) -> list[bool]:
    """Whether each test clip is classified rightly by a head trained on the training clips."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "train.csv")
        with table.open("w", newline="", encoding="utf-8") as file:
            rows = [(str(path.resolve()), label) for path, label in train]
            csv.writer(file).writerows([("file_name", "label"), *rows])
        values = {
            "task": "sound",
            "source_model": options.source_model,
            "run_dir": str(Path(folder, "run")),
            "data": {
                "train": str(table),
                "validation": str(table),
                "allow_leaks": ["same-recording", "same-audio"],
            },
            "transfer": {"preset": "feature"},
            "train": {
                "steps": options.steps,
                "head_learning_rate": options.learning_rate,
                "batch_seconds": 160,
                "evaluate_every": 10**9,  # there is nothing to select on
            },
            "evaluation": {"bootstrap_samples": 100},
            "runtime": {"seed": options.seed, "threads": options.threads},
        }
        config = build_config(merge(values, {"head": head}))
        runs.train(config)
        model = load(config.run_dir)
        assert isinstance(model, SoundModel)
        found = model.predict([path for path, _ in test])
    return [one.label == label for one, (_, label) in zip(found, test, strict=True)]


def interval(right: dict[Path, bool], samples: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy, over recordings."""
    takes: dict[str, list[bool]] = defaultdict(list)
    for path, is_right in right.items():
        takes[recording(path)].append(is_right)
    sums = np.array([(sum(found), len(found)) for found in takes.values()])
    rng = np.random.default_rng(seed)
    drawn = sums[rng.integers(len(sums), size=(samples, len(sums)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--source_model", default="bundled:whisper-tiny.en")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    paths = sorted(path for path in options.data.glob("*/*") if path.is_file())
    clips = [(path, path.parent.name) for path in paths]
    folds = parts(clips, options.folds, options.seed)
    right: dict[Path, bool] = {}
    tally: dict[str, list[bool]] = defaultdict(list)
    chosen = []
    for number, fold in enumerate(folds):
        others = [clip for other in folds if other is not fold for clip in other]
        inner = parts(others, INNER_PARTS, options.seed + 1)
        kept = [clip for part in inner[1:] for clip in part]
        scores = {}
        for name, head in SETTINGS.items():
            found = correct(kept, inner[0], head, options)
            scores[name] = float(np.mean(found))
            tally[name] += found
        best = max(SETTINGS, key=lambda name: scores[name])
        found = correct(others, fold, SETTINGS[best], options)
        right |= {path: is_right for (path, _), is_right in zip(fold, found, strict=True)}
        chosen.append(best)
        print(
            json.dumps(
                {"fold": number, "inner": scores, "chosen": best, "accuracy": np.mean(found)}
            ),
            flush=True,
        )
    print(f"\n| setting ({len(SETTINGS)} tried) | inner accuracy | chosen in |\n|---|---|---|")
    for name in SETTINGS:
        print(f"| {name} | {np.mean(tally[name]):.3f} | {chosen.count(name)} of {len(folds)} |")
    print("\n| class | right | clips |\n|---|---|---|")
    for label in sorted({label for _, label in clips}):
        mine = [is_right for path, is_right in right.items() if path.parent.name == label]
        print(f"| {label} | {sum(mine)} | {len(mine)} |")
    low, high = interval(right, 10_000, options.seed)
    recordings = len({recording(path) for path in paths})
    print(
        f"\naccuracy {np.mean(list(right.values())):.4f} [{low:.4f}, {high:.4f}] over {len(right)} "
        f"clips of {recordings} recordings in {len(folds)} folds"
    )


if __name__ == "__main__":
    main()
