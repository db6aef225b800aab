"""Scores of classification: macro-F1 and accuracy with bootstrap intervals, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

_BINS = 15
_TEMPERATURES = (0.05, 20.0)
_CELLS_AT_ONCE = 2_000_000  # bounds the memory of the bootstrap


@dataclass(frozen=True)
class ClassificationScore:
    """Scores of a set of examples."""

    accuracy: float
    macro_f1: float
    """Mean F1 of the classes that occur in targets or predictions."""
    ece: float
    """Expected calibration error after temperature scaling."""
    ece_uncalibrated: float
    """The same at temperature 1."""
    ci_low: float
    """Lower end of the 95 % bootstrap interval of macro-F1."""
    ci_high: float
    accuracy_ci_low: float
    accuracy_ci_high: float
    examples: int
    per_class: dict[str, dict[str, float]]
    """Label to precision, recall, f1 and support (examples)."""
    confusion: list[list[int]]
    """Examples by [true class, predicted class], in the order of `labels`."""
    labels: list[str]
    temperature: float
    """What logits are divided by."""
    outcomes: dict[str, list[int]] = field(default_factory=dict, repr=False)
    """`targets` and `predictions` of each example, as class indices."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def confusion_matrix(targets: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Int64 [true class, predicted class] from class indices [example]."""
    cells = np.asarray(targets, np.int64) * classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def macro_f1_accuracy(confusion: np.ndarray) -> tuple[float, float]:
    """Macro-F1 and accuracy of a confusion matrix [true class, predicted class].

    Classes that occur neither in targets nor in predictions do not count; F1 is 0 for a class
    that is never right (both as in scikit-learn). An empty matrix scores 0.
    """
    macro_f1, accuracy = _macro_f1_accuracy(np.asarray(confusion)[None])
    return float(macro_f1[0]), float(accuracy[0])


def _macro_f1_accuracy(confusions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both of [matrix, true class, predicted class], as [matrix]."""
    right = np.diagonal(confusions, axis1=1, axis2=2)
    seen = confusions.sum(axis=1) + confusions.sum(axis=2)  # support + predicted
    f1 = 2 * right / np.maximum(seen, 1)
    macro_f1 = f1.sum(axis=1) / np.maximum((seen > 0).sum(axis=1), 1)
    return macro_f1, right.sum(axis=1) / np.maximum(confusions.sum(axis=(1, 2)), 1)


def score_classification(
    logits: np.ndarray,
    targets: np.ndarray,
    labels: Sequence[str],
    *,
    temperature: float = 1.0,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> ClassificationScore:
    """Scores of logits [example, class] against class indices [example].

    The intervals come from resampling examples (Efron & Tibshirani 1993). A resample matters only
    through its confusion matrix, which is multinomial over the cells of the full one.

    Raises:
        ValueError: no examples, shapes that do not fit, a target that is no class, logits that are
            not finite, or a temperature that is not positive.
    """
    logits, targets = _checked(logits, targets, len(labels))
    if not len(targets):
        raise ValueError("no examples to score")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"expected a positive temperature, found {temperature}")
    predictions = logits.argmax(axis=1)
    confusion = confusion_matrix(targets, predictions, len(labels))
    macro_f1, accuracy = macro_f1_accuracy(confusion)
    resampled = _resample(confusion, bootstrap_samples, seed)
    (ci_low, ci_high), (accuracy_ci_low, accuracy_ci_high) = (
        (float(low), float(high)) for low, high in np.percentile(resampled, [2.5, 97.5], axis=1).T
    )
    right, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return ClassificationScore(
        accuracy=accuracy,
        macro_f1=macro_f1,
        ece=_calibration_error(logits / temperature, targets),
        ece_uncalibrated=_calibration_error(logits, targets),
        ci_low=ci_low,
        ci_high=ci_high,
        accuracy_ci_low=accuracy_ci_low,
        accuracy_ci_high=accuracy_ci_high,
        examples=len(targets),
        per_class={
            label: {
                "precision": float(right[i] / max(predicted[i], 1)),
                "recall": float(right[i] / max(support[i], 1)),
                "f1": float(2 * right[i] / max(support[i] + predicted[i], 1)),
                "support": int(support[i]),
            }
            for i, label in enumerate(labels)
        },
        confusion=confusion.tolist(),
        labels=list(labels),
        temperature=float(temperature),
        outcomes={"targets": targets.tolist(), "predictions": predictions.tolist()},
    )


def _checked(logits: np.ndarray, targets: np.ndarray, classes: int) -> tuple[np.ndarray, ...]:
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets, np.int64)
    if logits.shape != (len(targets), classes) or targets.ndim != 1:
        raise ValueError(
            f"expected logits [{len(targets)}, {classes}] for targets of shape {targets.shape}, "
            f"found {logits.shape}"
        )
    if len(targets) and not (targets.min() >= 0 and targets.max() < classes):
        raise ValueError(f"expected targets from 0 to {classes - 1}")
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return logits, targets


def _resample(confusion: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Macro-F1 and accuracy of each resample, as [2, sample]."""
    rng = np.random.default_rng(seed)
    counts = confusion.ravel()
    filled = np.flatnonzero(counts)
    total = counts.sum()
    at_once = max(1, _CELLS_AT_ONCE // counts.size)
    scores = []
    for start in range(0, samples, at_once):
        drawn = np.zeros((min(at_once, samples - start), counts.size), np.int64)
        drawn[:, filled] = rng.multinomial(total, counts[filled] / total, size=len(drawn))
        scores.append(np.stack(_macro_f1_accuracy(drawn.reshape(-1, *confusion.shape))))
    return np.concatenate(scores, axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _calibration_error(logits: np.ndarray, targets: np.ndarray) -> float:
    """Expected calibration error: the gap between accuracy and top probability, averaged over
    equal-width bins of the latter, weighted by their examples (Guo et al. 2017).
    """
    confidence = np.exp(_log_softmax(logits).max(axis=1))
    right = logits.argmax(axis=1) == targets
    # Bins are open below and closed above.
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence, _BINS)).sum() / len(targets))


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature from 0.05 to 20 with the least negative log-likelihood of class indices
    [example] under logits [example, class] (Guo et al. 2017); never worse than 1.

    It is 1 where nothing can be fitted: no examples, or all of them right, when the likelihood
    only grows towards temperature 0 and every confidence towards certainty.

    Raises:
        ValueError: as in `score_classification`.
    """
    logits = np.asarray(logits, np.float64)
    if not len(logits):
        return 1.0
    logits, targets = _checked(logits, targets, logits.shape[-1])
    if (logits.argmax(axis=1) == targets).all():
        return 1.0
    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        return -float(_log_softmax(logits / math.exp(log_temperature))[rows, targets].mean())

    # The loss is convex in 1/T, so it has one minimum in log T too: golden-section search.
    ratio = (math.sqrt(5) - 1) / 2
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-4:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = loss(right)
    best = (low + high) / 2
    return math.exp(best) if loss(best) < loss(0.0) else 1.0
