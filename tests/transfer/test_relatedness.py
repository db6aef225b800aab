"""Figures of relatedness on features whose answer is known."""

import numpy as np
import pytest

from mmtransfer.errors import UserError
from mmtransfer.transfer.relatedness import (
    draw,
    evenness,
    folds,
    frechet_distance,
    h_score,
    log_me,
    mmd,
    neighbour_accuracy,
    probe_accuracy,
    proxy_a_distance,
    shrunk_covariance,
    transport_cost,
)

ON_LABELS = [log_me, h_score, neighbour_accuracy, probe_accuracy]


def classes(count: int, apart: float, *, width: int = 24, kinds: int = 3, seed: int = 0):
    """Features whose classes' means lie so far apart, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % kinds
    return rng.normal(size=(count, width)) + apart * rng.normal(size=(kinds, width))[labels], labels


@pytest.mark.parametrize("figure", ON_LABELS)
def test_figures_rise_with_the_distance_of_the_classes(figure):
    scores = [figure(*classes(150, apart)) for apart in (0.0, 0.3, 1.0)]
    assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize("figure", ON_LABELS)
def test_more_dimensions_than_examples_are_no_obstacle(figure):
    far, labels = classes(40, 1.0, width=100)
    near, _ = classes(40, 0.0, width=100)
    assert np.isfinite(figure(far, labels))
    assert figure(far, labels) > figure(near, labels)


@pytest.mark.parametrize("width", [6, 60])
def test_log_me_is_the_highest_evidence(width):
    """Evidence of a linear model is the density of the labels under a Gaussian."""
    features, labels = classes(40, 0.7, width=width, kinds=2)
    wanted = (labels == 1).astype(float)

    def evidence(alpha, beta):
        covariance = np.eye(40) / beta + features @ features.T / alpha
        _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
        return -(logdet + wanted @ np.linalg.solve(covariance, wanted)) / 80

    grid = 10 ** np.linspace(-2, 4, 121)
    best = max(evidence(alpha, beta) for alpha in grid for beta in grid[40:100])
    # The other class's indicator has an offset of its own, so each is maximised alone.
    wanted = 1 - wanted
    other = max(evidence(alpha, beta) for alpha in grid for beta in grid[40:100])
    assert log_me(features, labels) == pytest.approx((best + other) / 2, abs=2e-3)


@pytest.mark.parametrize("figure", [neighbour_accuracy, probe_accuracy])
def test_no_example_is_judged_by_its_own_group(figure):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    features = rng.normal(size=(40, 16))[groups] + 0.01 * rng.normal(size=(200, 16))
    labels = rng.integers(0, 2, 40)[groups]
    assert figure(features, labels) > 0.8
    assert figure(features, labels, groups) < 0.7


def test_folds_keep_groups_whole_and_share_classes():
    groups = np.repeat(np.arange(50), 3)
    labels = (groups % 5 == 0).astype(int)
    fold = folds(labels, groups)
    assert all(len(set(fold[groups == group])) == 1 for group in range(50))
    assert [int((labels[fold == number] == 1).sum()) for number in range(5)] == [6] * 5


def test_a_feature_that_is_constant_says_nothing_and_breaks_nothing():
    features, labels = classes(60, 1.0)
    constant = np.concatenate([features, np.full((60, 1), 7.0)], 1)
    assert probe_accuracy(constant, labels) == probe_accuracy(features, labels)
    assert np.isfinite(log_me(np.zeros((60, 4)), labels))


def test_shrunk_covariance_has_an_inverse_and_nears_the_sample_s():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(10, 40))
    assert np.linalg.cond(shrunk_covariance(few - few.mean(0))[0]) < 1e4
    many = rng.normal(size=(20_000, 3)) * [1, 2, 3]
    covariance, share = shrunk_covariance(many - many.mean(0))
    assert share < 0.01
    assert np.diag(covariance) == pytest.approx([1, 4, 9], rel=0.05)


def test_one_domain_in_two_halves_is_at_distance_zero():
    rng = np.random.default_rng(1)
    both = rng.normal(size=(400, 32)) @ rng.normal(size=(32, 32))
    first, second = both[::2], both[1::2]
    squared, p = mmd(first, second)
    assert abs(squared) < 0.005
    assert p > 0.05
    assert proxy_a_distance(first, second) < 0.3
    assert frechet_distance(first, second) < 0.01


def test_distances_grow_with_the_shift():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 200, 16))
    shifts = (0.0, 0.3, 0.6)
    for distance in (lambda a, b: mmd(a, b)[0], proxy_a_distance, frechet_distance):
        found = [distance(first, second + shift) for shift in shifts]
        assert found[0] < found[1] < found[2]
    assert mmd(first, second + 0.3)[1] < 0.01


def test_frechet_distance_is_that_of_gaussians_in_units_of_the_spread():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 1000, 4))
    # Means 2 apart in one dimension, another of twice the deviation: 4 + (2 - 1)².
    second = second * [1, 2, 1, 1] + [2, 0, 0, 0]
    spread = (1 + 1) + (1 + 4) / 2 + 1 + 1
    assert frechet_distance(first, second) == pytest.approx(5 / spread, rel=0.08)


def test_transport_cost_is_the_way_of_a_shift_and_zero_within_a_domain():
    pytest.importorskip("ot", reason="needs the transport extra")
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2, 150, 3))
    assert (transport_cost(first, second) or 0) < 0.05
    spread = 3 + 3 * 1.5**2
    assert transport_cost(first, second + 3) == pytest.approx(27 / spread, rel=0.2)


def test_distances_need_two_examples_of_each():
    with pytest.raises(UserError, match="at least 2 examples in each set, found 1 and 5"):
        mmd(np.zeros((1, 3)), np.zeros((5, 3)))


def test_drawing_keeps_the_order_and_depends_on_the_seed_alone():
    numbers = list(range(100))
    assert draw(numbers, 200, 0) == numbers
    chosen = draw(numbers, 10, 0)
    assert chosen == sorted(chosen) == draw(numbers, 10, 0) != draw(numbers, 10, 1)
    assert len(set(chosen)) == 10


def test_evenness_is_one_for_equal_classes_and_counts_missing_ones():
    assert evenness([5, 5], 2) == pytest.approx(1)
    assert evenness([5, 5], 4) == pytest.approx(0.5)
    assert evenness([9, 1], 2) < 0.5
