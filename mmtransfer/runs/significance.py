"""Which differences are real: paired tests of two models on the examples of one set.

What a model makes of each example is its *outcomes*, as the scores of every task keep them:
`errors` and `units` of clips, `targets` and `predictions` of classes, `targets` and
`probabilities` where an example can have several classes. All metrics here are functions of how
often each example counts, so that a resample is a row of counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

Outcomes = Mapping[str, Any]
_LEVEL = 0.05
_RESAMPLES = 2000
_CELLS_AT_ONCE = 2_000_000  # bounds the memory of resampling
_LEAST_EXPONENT = -1000  # of 2, near the smallest number above 0


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another, and whether that is more than chance."""

    value: float
    """Positive: better, whatever the direction of the metric."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    p: float
    """Probability of a difference so large if the two were equally good; after `holm`, corrected
    for the number of comparisons.
    """
    examples: int
    """Examples, or for means over seeds examples of one seed."""

    @property
    def is_real(self) -> bool:
        """Whether test and interval agree that there is one."""
        return self.p < _LEVEL and not self.low <= 0 <= self.high

    def turned(self) -> Difference:
        """How much worse."""
        return replace(self, value=0 - self.value, low=0 - self.high, high=0 - self.low)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "real": self.is_real}

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}] {self.verdict}"

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return "real" if self.is_real else "within chance"


def paired_difference(
    old: Outcomes, new: Outcomes, metric: str, *, seed: int = 0, samples: int = _RESAMPLES
) -> Difference | None:
    """How much better `new` is than `old` on the same examples; None where the metric is undefined.

    The interval is that of the paired bootstrap (Efron & Tibshirani 1993; for word error rates
    Bisani & Ney 2004), the probability that of approximate randomisation (Noreen 1989): for each
    example it is drawn which of the two outcomes is whose. Both say how sure it is that these two
    models differ on examples like these; what another seed of training would have given they do
    not say (see `seed_difference`).

    Raises:
        ValueError: outcomes of different examples.
    """
    pairs = _Pairs(old, new, metric)
    whole = pairs.difference(pairs.counts[None])
    if not np.isfinite(whole).all():
        return None
    value = float(whole[0])
    rng = np.random.default_rng(seed)
    drawn = _in_parts(
        samples,
        pairs.counts.size,
        lambda size: pairs.difference(
            rng.multinomial(pairs.total, pairs.counts / pairs.total, size=size)
        ),
    )
    drawn = drawn[np.isfinite(drawn)]
    low, high = map(float, np.percentile(drawn, [2.5, 97.5]))
    swapped = _in_parts(
        samples,
        pairs.counts.size,
        lambda size: pairs.swapped(rng.binomial(pairs.counts, 0.5, (size, pairs.counts.size))),
    )
    # Rounding must not make a draw that changes nothing smaller than what was found.
    extreme = int((np.abs(swapped) >= abs(value) - 1e-12).sum())
    return Difference(value, low, high, (extreme + 1) / (samples + 1), pairs.total)


def seed_difference(
    old: Sequence[Outcomes],
    new: Sequence[Outcomes],
    metric: str,
    *,
    seed: int = 0,
    samples: int = _RESAMPLES,
) -> Difference | None:
    """How much better one way of training is than another, by the outcomes of several seeds each.

    The difference of the means over the seeds has two sources of chance: which examples are in the
    set (the paired bootstrap of the means), and which seeds were drawn (their variance). Both are
    added, with the degrees of freedom of Welch and Satterthwaite, since few seeds say little of
    their own variance; Sellam et al. 2022 (MultiBERTs) resample both instead, which takes more
    seeds than two or three. Both are estimates that a few examples do not bear, so that p is never
    below what the sign test may give for the examples on which the two differ. None where the
    metric is undefined, or where either has one seed alone.

    Raises:
        ValueError: outcomes of different examples.
    """
    if min(len(old), len(new)) < 2:
        return None
    sets = _Sets([*old, *new], metric)
    scores = sets.scores(sets.counts[None])[:, 0]
    if not np.isfinite(scores).all():
        return None
    before, after = scores[: len(old)], scores[len(old) :]
    value = float(after.mean() - before.mean())
    rng = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        counts = rng.multinomial(sets.total, sets.counts / sets.total, size=size)
        found = sets.scores(counts)
        return found[len(old) :].mean(0) - found[: len(old)].mean(0)

    drawn = _in_parts(samples, sets.counts.size * len(scores), draw)
    parts = [
        (float(np.var(drawn[np.isfinite(drawn)])), math.inf),
        (float(np.var(before, ddof=1)) / len(before), len(before) - 1),
        (float(np.var(after, ddof=1)) / len(after), len(after) - 1),
    ]
    variance = sum(part for part, _ in parts)
    half, p = 0.0, 0.0 if value else 1.0
    if variance > 0:
        shares = sum(part**2 / degrees for part, degrees in parts)
        degrees = variance**2 / shares if shares else math.inf
        spread = math.sqrt(variance)
        half, p = t_quantile(degrees) * spread, t_probability(abs(value) / spread, degrees)
    p = max(p, _least_p(sets.changed(len(old))))
    if p >= _LEVEL:  # which the interval must not deny
        half = max(half, abs(value))
    return Difference(value, value - half, value + half, p, sets.total)


def _least_p(changed: int) -> float:
    """What an exact test by signs may give for so many examples that differ: two of the ways to
    sign them are as extreme as that in which all agree.
    """
    return 2.0 ** min(0, max(1 - changed, _LEAST_EXPONENT))


def holm(found: Mapping[str, Difference | None]) -> dict[str, Difference | None]:
    """The same differences with their probabilities corrected for being several (Holm 1979)."""
    known = {name: difference for name, difference in found.items() if difference is not None}
    corrected, largest = dict(found), 0.0
    for rank, (name, one) in enumerate(sorted(known.items(), key=lambda item: item[1].p)):
        largest = max(largest, min(1.0, one.p * (len(known) - rank)))
        corrected[name] = replace(one, p=largest)
    return corrected


# --- metrics of resamples ------------------------------------------------------------------------


def metric_of(outcomes: Outcomes, metric: str, counts: np.ndarray) -> np.ndarray:
    """A metric where each example counts so often: counts [resample, example] -> [resample]; NaN
    where it is undefined.

    Raises:
        ValueError: no such metric, or one that these outcomes do not give.
    """
    if metric in ("wer", "cer"):
        errors, units = (np.asarray(outcomes[name], float) for name in ("errors", "units"))
        totals = counts @ units
        return np.divide(
            counts @ errors, totals, out=np.full(len(totals), np.nan), where=totals > 0
        )
    targets = np.asarray(outcomes["targets"])
    if metric == "map":
        return _mean_average_precision(np.asarray(outcomes["probabilities"]), targets, counts)
    predictions = np.asarray(outcomes["predictions"])
    if metric == "accuracy":
        return counts @ (targets == predictions) / counts.sum(axis=1)
    if metric != "macro_f1":
        raise ValueError(f"no metric '{metric}'")
    classes = int(max(targets.max(initial=0), predictions.max(initial=0))) + 1
    is_target, is_predicted = (np.eye(classes)[rows] for rows in (targets, predictions))
    seen = counts @ (is_target + is_predicted)
    f1 = 2 * (counts @ (is_target * is_predicted)) / np.maximum(seen, 1)
    return f1.sum(axis=1) / np.maximum((seen > 0).sum(axis=1), 1)


def _mean_average_precision(
    probabilities: np.ndarray, targets: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """As `sound.scores.mean_average_precision`, for each resample."""
    total, classes = np.zeros(len(counts)), np.zeros(len(counts))
    for scores, wanted in zip(probabilities.T, targets.T, strict=True):
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
        hits = (counts[:, order] * wanted[order]).cumsum(axis=1)[:, ends]
        seen = counts[:, order].cumsum(axis=1)[:, ends]
        gained = np.diff(hits, prepend=0, axis=1)
        found = (hits / np.maximum(seen, 1) * gained).sum(axis=1)
        total += np.divide(found, hits[:, -1], out=np.zeros(len(counts)), where=hits[:, -1] > 0)
        classes += hits[:, -1] > 0
    return np.divide(total, classes, out=np.full(len(counts), np.nan), where=classes > 0)


def is_higher_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric not in ("wer", "cer")


class _Sets:
    """Outcomes of several models on one set; examples with the same outcomes count together."""

    def __init__(self, outcomes: Sequence[Outcomes], metric: str):
        self.metric, self.sign = metric, 1 if is_higher_better(metric) else -1
        fixed = "units" if metric in ("wer", "cer") else "targets"
        first = np.asarray(outcomes[0][fixed])
        for other in outcomes[1:]:
            if not np.array_equal(first, np.asarray(other[fixed])):
                raise ValueError("expected outcomes of the same examples")
        names = [sorted(one) for one in outcomes]
        columns = [
            np.asarray(one[name], float).reshape(len(first), -1)
            for one, own in zip(outcomes, names, strict=True)
            for name in own
        ]
        rows, counts = np.unique(np.concatenate(columns, axis=1), axis=0, return_counts=True)
        self.counts, self.total = counts, len(first)
        parts = iter(np.split(rows, np.cumsum([c.shape[1] for c in columns])[:-1], axis=1))
        self.outcomes = [{name: self._restored(next(parts), name) for name in own} for own in names]

    def _restored(self, part: np.ndarray, name: str) -> np.ndarray:
        if self.metric == "map":
            return part
        return part[:, 0].astype(np.int64) if name in ("targets", "predictions") else part[:, 0]

    def changed(self, first: int) -> int:
        """On how many examples the first so many models differ from the others, in whatever order
        each group has its outcomes.
        """
        what = next(
            name for name in ("errors", "probabilities", "predictions") if name in self.outcomes[0]
        )
        each = np.stack([one[what] for one in self.outcomes])
        if self.metric == "accuracy":  # one wrong class is as good as another
            each = each == np.stack([one["targets"] for one in self.outcomes])
        each = each.reshape(*each.shape[:2], -1)
        old, new = each[:first], each[first:]
        # Each as often as the other group is large, so that shares of outcomes are compared.
        old, new = (
            np.sort(np.repeat(part, len(other), axis=0), axis=0)
            for part, other in ((old, new), (new, old))
        )
        return int(self.counts[(old != new).any(axis=(0, 2))].sum())

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """Scores [model, resample], higher is better."""
        return self.sign * np.stack([metric_of(o, self.metric, counts) for o in self.outcomes])


class _Pairs(_Sets):
    """Outcomes of two models on one set."""

    def __init__(self, old: Outcomes, new: Outcomes, metric: str):
        super().__init__([old, new], metric)

    def difference(self, counts: np.ndarray) -> np.ndarray:
        """New minus old [resample]."""
        old, new = self.scores(counts)
        return new - old

    def swapped(self, moved: np.ndarray) -> np.ndarray:
        """The same where so many of each group of examples changed sides: moved [draw, group]."""
        old, new = self.outcomes
        both = {name: np.concatenate([old[name], new[name]]) for name in old}
        kept = self.counts - moved
        left, right = (
            metric_of(both, self.metric, np.concatenate(parts, axis=1))
            for parts in ((kept, moved), (moved, kept))
        )
        return self.sign * (right - left)


def _in_parts(samples: int, width: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    at_once = max(1, _CELLS_AT_ONCE // max(1, width))
    sizes = [min(at_once, samples - start) for start in range(0, samples, at_once)]
    return np.concatenate([draw(size) for size in sizes])


# --- Student's t ---------------------------------------------------------------------------------


def t_probability(t: float, degrees: float) -> float:
    """Two-sided probability of a value of Student's t so far from 0; infinite degrees of freedom
    make it the normal distribution.
    """
    if math.isinf(degrees) or degrees > 1e4:
        return math.erfc(t / math.sqrt(2))
    # t = sqrt(degrees) tan(angle), so that the tail is a finite stretch of angles.
    angles = np.linspace(math.atan(t / math.sqrt(degrees)), math.pi / 2, 4001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    density = np.maximum(np.cos(angles), 0) ** (degrees - 1)
    return min(1.0, 2 * math.exp(log_scale) * float(np.trapezoid(density, angles)))


def t_quantile(degrees: float, probability: float = _LEVEL) -> float:
    """The value that Student's t exceeds, on either side, with that probability."""
    low, high = 0.0, 1e4
    while high - low > 1e-6 * max(1.0, low):
        middle = (low + high) / 2
        if t_probability(middle, degrees) > probability:
            low = middle
        else:
            high = middle
    return high
