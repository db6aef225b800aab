"""Scores of clips that can have several classes, or none; those of one class each are in
`transfer.classification`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MultiLabelScore:
    """Scores of a set of examples, each with any number of classes."""

    map: float
    """Mean average precision over the classes that occur."""
    macro_f1: float
    """Mean F1 over the classes that occur in targets or predictions, at a threshold of 0.5."""
    ci_low: float
    """Lower end of the 95 % bootstrap interval of mean average precision."""
    ci_high: float
    examples: int
    per_class: dict[str, dict[str, float]]
    """Label to precision, recall, f1, average_precision and support (examples)."""
    labels: list[str]
    outcomes: dict[str, list[list[float]]] = field(default_factory=dict, repr=False)
    """`targets` and `probabilities` of each example, by class."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the examples of a class of the precision at their rank, examples of one score at
    once (as in scikit-learn): scores [example], targets [example] of 0 and 1. 0 without any.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(targets[order])
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    if not hits[-1]:
        return 0.0
    precision = hits[ends] / (ends + 1)
    return float((precision * np.diff(hits[ends], prepend=0)).sum() / hits[-1])


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the average precision of the classes that occur: both [example, class]."""
    occurring = np.flatnonzero(targets.any(axis=0))
    found = [average_precision(scores[:, c], targets[:, c]) for c in occurring]
    return float(np.mean(found)) if found else 0.0


def multi_macro_f1(decided: np.ndarray, targets: np.ndarray) -> float:
    """Mean F1 over the classes that occur in either: both [example, class] of 0 and 1."""
    right = (decided * targets).sum(axis=0)
    seen = decided.sum(axis=0) + targets.sum(axis=0)
    f1 = 2 * right / np.maximum(seen, 1)
    return float(f1.sum() / max((seen > 0).sum(), 1))


def score_multi_label(
    probabilities: np.ndarray,
    targets: np.ndarray,
    labels: Sequence[str],
    *,
    threshold: float = 0.5,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> MultiLabelScore:
    """Scores of probabilities [example, class] against targets [example, class] of 0 and 1. The
    interval comes from resampling examples (Efron & Tibshirani 1993).

    Raises:
        ValueError: no examples.
    """
    if not len(targets):
        raise ValueError("no examples to score")
    targets = targets.astype(np.int64)
    decided = (probabilities > threshold).astype(np.int64)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(bootstrap_samples):
        rows = rng.integers(len(targets), size=len(targets))
        resampled.append(mean_average_precision(probabilities[rows], targets[rows]))
    low, high = np.percentile(resampled, [2.5, 97.5])
    right, support, found = (decided * targets).sum(0), targets.sum(0), decided.sum(0)
    return MultiLabelScore(
        map=mean_average_precision(probabilities, targets),
        macro_f1=multi_macro_f1(decided, targets),
        ci_low=float(low),
        ci_high=float(high),
        examples=len(targets),
        per_class={
            label: {
                "precision": float(right[i] / max(found[i], 1)),
                "recall": float(right[i] / max(support[i], 1)),
                "f1": float(2 * right[i] / max(support[i] + found[i], 1)),
                "average_precision": average_precision(probabilities[:, i], targets[:, i]),
                "support": int(support[i]),
            }
            for i, label in enumerate(labels)
        },
        labels=list(labels),
        outcomes={
            "targets": targets.tolist(),
            "probabilities": np.round(probabilities.astype(float), 6).tolist(),
        },
    )
