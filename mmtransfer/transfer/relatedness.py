"""How near a source is to target data, in figures that need no training.

Features are float [example, width], labels integers from 0, `groups` say which examples belong
together (frames of one clip), so that none is judged by its neighbours from the same clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import numpy as np

from mmtransfer.errors import UserError

T = TypeVar("T")
NEIGHBOURS = 5
FOLDS = 5
PERMUTATIONS = 500
CARRIED = 200
_SHUFFLES = 5
_RIDGES = 10.0 ** np.arange(-4, 2)  # of the features' mean squared singular value
_ROUNDS, _SETTLED, _TINY = 100, 1e-4, 1e-10


@dataclass(frozen=True)
class Figure:
    """What a figure says."""

    title: str
    meaning: str
    limit: str
    paper: str
    higher_is_nearer: bool | None = None
    """None where it has no direction of its own."""


FIGURES = {
    "probe": Figure(
        "linear probe",
        "accuracy of a linear classifier on the frozen layer, on examples it was not fitted to",
        "what a head can use as it is; fine-tuning may gain more from a layer that it says less of",
        "Alain & Bengio 2016; ridge classifier of Rifkin et al. 2003",
        True,
    ),
    "log_me": Figure(
        "LogME",
        "log evidence per example that the labels are linear in the layer's features",
        "compares layers on the same examples; its size means nothing by itself",
        "You et al. 2021",
        True,
    ),
    "h_score": Figure(
        "H-score",
        "how far class means lie apart, in units of the features' spread",
        "sees means only, and at most one less than there are classes",
        "Bao et al. 2019, with the shrinkage of Ibrahim et al. 2022",
        True,
    ),
    "neighbours": Figure(
        f"{NEIGHBOURS}-NN",
        f"accuracy of the majority among the {NEIGHBOURS} nearest other examples, by cosine",
        "suffers where features hold much beside the classes",
        "Cover & Hart 1967",
        True,
    ),
    "mmd": Figure(
        "MMD²",
        "squared distance of the two sets' means under a Gaussian kernel; about 0 for one domain",
        "kernel width is the median distance, so very fine differences are not seen",
        "Gretton et al. 2012",
        False,
    ),
    "mmd_p": Figure(
        "p of MMD²",
        f"share of {PERMUTATIONS} random divisions of both sets that differ as much",
        "says whether there is a difference, not that it matters; many examples find any",
        "Gretton et al. 2012",
    ),
    "proxy_a": Figure(
        "proxy A-distance",
        "how well a linear classifier tells the sets apart: 0 not at all, 2 always",
        "reaches 2 for any two domains whose topics differ, and then orders them no more",
        "Ben-David et al. 2007",
        False,
    ),
    "frechet": Figure(
        "Fréchet distance",
        "distance of the sets' Gaussians, above that of a random division, in units of the spread",
        "means and covariances only, estimated from few examples",
        "Dowson & Landau 1982; Heusel et al. 2017",
        False,
    ),
    "transport": Figure(
        "transport cost",
        "mean squared way from one set onto the other, above that of a random division, in units "
        "of the spread",
        f"of {CARRIED} examples of each; in many dimensions all lie far from each other",
        "Peyré & Cuturi 2019; POT, Flamary et al. 2021",
        False,
    ),
}
"""Of labels on one layer, then of two sets of inputs."""


def draw(examples: Sequence[T], most: int, seed: int) -> list[T]:
    """Up to so many examples at random, in their order."""
    if len(examples) <= most:
        return list(examples)
    chosen = np.random.default_rng(seed).choice(len(examples), most, replace=False)
    return [examples[index] for index in sorted(chosen)]


def evenness(counts: Sequence[int], classes: int) -> float:
    """Entropy of classes with so many examples, over that of `classes` equal ones (Pielou 1966)."""
    shares = np.array([count for count in counts if count]) / sum(counts)
    return float(-(shares * np.log(shares)).sum() / np.log(classes))


# --- labels on a layer ---------------------------------------------------------------------------


def log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """Log evidence per example of a Bayesian linear model from features to each class's indicator,
    maximised over its two precisions; mean over classes (You et al. 2021, algorithm 1 with the
    fixed point of eq. 2).
    """
    features = np.asarray(features, float)
    count = len(features)
    left, singular, _ = _decomposed(features)
    powers = singular**2
    found = []
    for label in np.unique(labels):
        wanted = (labels == label).astype(float)
        along = (left.T @ wanted) ** 2
        outside = max(float(wanted @ wanted - along.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(_ROUNDS):
            ratio = alpha / beta
            gamma = (powers / (powers + ratio)).sum()
            weights = (powers * along / (ratio + powers) ** 2).sum()
            residual = (along / (1 + powers / ratio) ** 2).sum() + outside
            alpha = max(gamma, _TINY) / (weights + _TINY)
            beta = (count - gamma) / (residual + _TINY)
            if abs(alpha / beta - ratio) <= _SETTLED * ratio:
                break
        ratio = alpha / beta
        weights = (powers * along / (ratio + powers) ** 2).sum()
        residual = (along / (1 + powers / ratio) ** 2).sum() + outside
        # Directions without features, of which there are `width - len(powers)`, cancel out.
        evidence = len(powers) * np.log(alpha) + count * np.log(beta / (2 * np.pi))
        evidence -= np.log(alpha + beta * powers).sum() + beta * residual + alpha * weights
        found.append(evidence / (2 * count))
    return float(np.mean(found))


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Trace of the inverse covariance times the covariance of the class means (Bao et al. 2019).

    The covariance is shrunk towards a multiple of the identity (Ledoit & Wolf 2004): from fewer
    examples than dimensions it has no inverse (Ibrahim et al. 2022).
    """
    centred = np.asarray(features, float) - features.mean(0)
    means = np.stack([centred[labels == label].mean(0) for label in np.unique(labels)])
    shares = np.array([(labels == label).mean() for label in np.unique(labels)])
    covariance, shrinkage = shrunk_covariance(centred)
    solved = np.linalg.solve(covariance, means.T)
    return float((1 - shrinkage) * np.einsum("c,cw,wc->", shares, means, solved))


def shrunk_covariance(centred: np.ndarray) -> tuple[np.ndarray, float]:
    """The covariance of centred examples, shrunk towards a multiple of the identity, and by which
    share (Ledoit & Wolf 2004).
    """
    count, width = centred.shape
    sample = centred.T @ centred / count
    mean = np.trace(sample) / width
    distance = ((sample - mean * np.eye(width)) ** 2).sum() / width
    noise = (((centred**2).sum(1) ** 2).sum() / count - (sample**2).sum()) / (width * count)
    shrinkage = float(np.clip(noise / distance, 0, 1)) if distance > 0 else 1.0
    shrunk = (1 - shrinkage) * sample + shrinkage * mean * np.eye(width)
    return shrunk + 1e-12 * max(mean, 1e-12) * np.eye(width), shrinkage


def neighbour_accuracy(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> float:
    """Share of examples with the label of most of their nearest neighbours from other groups, by
    cosine of centred features; of equally many labels the one that is nearer counts.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    centred = np.asarray(features, float) - features.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    number = np.unique(labels, return_inverse=True)[1]
    right = 0
    for start in range(0, len(unit), 1024):  # all similarities at once would not fit
        rows = slice(start, start + 1024)
        similarity = unit[rows] @ unit.T
        similarity[groups[rows][:, None] == groups[None]] = -np.inf
        nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
        # Votes fall a little with the distance, which decides between equal numbers.
        votes = np.zeros((len(nearest), number.max() + 1))
        for place in range(nearest.shape[1]):
            own = np.isfinite(similarity[np.arange(len(nearest)), nearest[:, place]])
            np.add.at(
                votes,
                (np.arange(len(nearest)), number[nearest[:, place]]),
                own * (1 - 1e-3 * place),
            )
        right += int((votes.argmax(1) == number[rows]).sum())
    return right / len(unit)


def probe_accuracy(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> float:
    """Cross-validated accuracy of a linear classifier on standardised features.

    A ridge regression onto class indicators (Rifkin et al. 2003); its strength is chosen on the
    training part of each fold by the leave-one-out error, which has a closed form.
    """
    number = np.unique(labels, return_inverse=True)[1]
    fold = folds(number, groups, seed=seed)
    wanted = np.eye(number.max() + 1)[number]
    right = 0
    for held in range(fold.max() + 1):
        out = fold == held
        predicted = _ridge(np.asarray(features[~out], float), wanted[~out], features[out])
        right += int((predicted.argmax(1) == number[out]).sum())
    return right / len(number)


def folds(labels: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> np.ndarray:
    """Number of the fold of each example; a group is in one fold, and each fold has about its share
    of each class.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    order = shuffled[np.argsort(labels[first][shuffled], kind="stable")]
    count = min(FOLDS, len(first))
    of_unit = np.empty(len(first), int)
    of_unit[order] = np.arange(len(first)) % count
    return of_unit[unit]


def _ridge(known: np.ndarray, wanted: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Predictions [example, output] of a ridge regression for unknown features."""
    mean, scale = known.mean(0), known.std(0)
    scale = np.where(scale > 1e-8 * max(scale.max(), 1e-12), scale, np.inf)  # constants say nothing
    left, singular, right = _decomposed((known - mean) / scale)
    powers, offset = singular**2, wanted.mean(0)
    along = left.T @ (wanted - offset)
    best = None
    for strength in _RIDGES * max(powers.mean(), 1e-12):
        shrink = powers / (powers + strength)
        leverage = 1 / len(known) + (left**2) @ shrink
        residual = wanted - offset - left @ (shrink[:, None] * along)
        error = ((residual / np.maximum(1 - leverage, 1e-6)[:, None]) ** 2).mean()
        if best is None or error < best[0]:
            best = error, strength
    assert best is not None
    slope = (singular / (powers + best[1]))[:, None] * along
    return ((unknown - mean) / scale) @ right.T @ slope + offset


def _decomposed(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The thin singular value decomposition, without directions that are constant; by the smaller
    product of the matrix with itself, which takes a fraction of the time.
    """
    rows, columns = matrix.shape
    is_wide = rows < columns
    powers, vectors = np.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    kept = powers > 1e-10 * max(float(powers[-1]), 1e-300)
    singular, vectors = np.sqrt(powers[kept]), vectors[:, kept]
    if is_wide:
        return vectors, singular, vectors.T @ matrix / singular[:, None]
    return matrix @ vectors / singular, singular, vectors.T


# --- two sets of inputs --------------------------------------------------------------------------


def mmd(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy of two sets, and its permutation p-value (Gretton
    et al. 2012, eq. 3). The Gaussian kernel is as wide as the median distance.
    """
    joined = _joined(first, second)
    squared = _squared_distances(joined, joined)
    width = np.median(squared[np.triu_indices(len(joined), 1)])
    kernel = np.exp(-squared / max(width, 1e-12))
    np.fill_diagonal(kernel, 0.0)
    one, other = len(first), len(second)
    member = np.zeros((len(joined), PERMUTATIONS + 1))
    member[:one, 0] = 1
    rng = np.random.default_rng(seed)
    for column in range(1, PERMUTATIONS + 1):
        member[rng.permutation(len(joined))[:one], column] = 1
    towards = kernel @ member
    within = (member * towards).sum(0)
    between = ((1 - member) * towards).sum(0)
    rest = kernel.sum() - within - 2 * between
    found = within / (one * (one - 1)) + rest / (other * (other - 1)) - 2 * between / (one * other)
    p = (1 + int((found[1:] >= found[0]).sum())) / (1 + PERMUTATIONS)
    return float(found[0]), p


def proxy_a_distance(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> float:
    """2 (1 - 2 error) of a cross-validated linear classifier between two sets (Ben-David et al.
    2007); not below 0. The larger set is cut to the size of the smaller.
    """
    size = min(len(first), len(second))
    labels = np.repeat([0, 1], size)
    accuracy = probe_accuracy(np.concatenate([first[:size], second[:size]]), labels, seed=seed)
    return max(0.0, 2 * (2 * accuracy - 1))


def frechet_distance(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> float:
    """Squared Fréchet distance of the Gaussians of two sets (Dowson & Landau 1982), above that of
    random divisions of both, in units of the joint variance; not below 0.
    """
    return _above_chance(_frechet, first, second, seed)


def _frechet(first: np.ndarray, second: np.ndarray) -> float:
    mean = ((first.mean(0) - second.mean(0)) ** 2).sum()
    one, other = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second))
    # The trace of the root of the product of covariances: the sum of singular values of this.
    shared = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return float(mean + (one**2).sum() + (other**2).sum() - 2 * shared)


def transport_cost(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> float | None:
    """Mean squared way of the optimal transport of one set onto the other, above that of random
    divisions of both, in units of the joint variance; not below 0. None where POT is not installed.
    Of each set only the first `CARRIED` examples count: the time grows with their cube.
    """
    if find_spec("ot") is None:
        return None
    import ot

    def cost(one: np.ndarray, other: np.ndarray) -> float:
        shares = [np.full(len(x), 1 / len(x)) for x in (one, other)]
        return float(ot.emd2(*shares, _squared_distances(one, other)))

    return _above_chance(cost, first[:CARRIED], second[:CARRIED], seed)


def _above_chance(
    measure: Callable[[np.ndarray, np.ndarray], float],
    first: np.ndarray,
    second: np.ndarray,
    seed: int,
) -> float:
    """A distance of two sets less its mean over random divisions of them: estimated from samples,
    distances of one domain to itself are above 0.
    """
    joined = _joined(first, second)
    spread = max(((joined - joined.mean(0)) ** 2).sum(1).mean(), 1e-12)
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(len(joined)) for _ in range(_SHUFFLES))
    chance = [measure(joined[o[: len(first)]], joined[o[len(first) :]]) for o in orders]
    return max(
        0.0, (measure(joined[: len(first)], joined[len(first) :]) - np.mean(chance)) / spread
    )


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if min(len(first), len(second)) < 2:
        raise UserError(
            f"Distances need at least 2 examples in each set, found {len(first)} and {len(second)}."
        )
    return np.concatenate([first, second]).astype(float)


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.maximum(squares, 0.0)
