import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.transfer.classification import (
    confusion_matrix,
    fit_temperature,
    macro_f1_accuracy,
    score_classification,
)

LABELS = ["a", "b", "c"]


def logits_for(predictions, classes, confidence=0.9):
    """Logits whose softmax gives `confidence` to the predicted class, equal shares to the rest."""
    rest = (1 - confidence) / (classes - 1)
    chosen = np.eye(classes, dtype=bool)[np.asarray(predictions)]
    return np.log(np.where(chosen, confidence, rest))


def negative_log_likelihood(logits, targets, temperature):
    scaled = logits / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    log_probabilities = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return -log_probabilities[np.arange(len(targets)), targets].mean()


def test_hand_computed_scores():
    targets = np.array([0, 0, 0, 1, 1, 2])
    predictions = np.array([0, 0, 1, 1, 0, 1])
    score = score_classification(logits_for(predictions, 3), targets, LABELS)
    assert score.confusion == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert score.accuracy == pytest.approx(3 / 6)
    # F1: a 2*2/(3+3), b 2*1/(2+3), c 0
    assert score.macro_f1 == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert score.per_class["a"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert score.per_class["b"] == pytest.approx(
        {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "support": 2}
    )
    assert score.per_class["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert score.ece == pytest.approx(0.9 - 0.5)  # all in one bin
    assert (score.examples, score.labels, score.temperature) == (6, LABELS, 1.0)
    assert json.loads(json.dumps(score.as_dict()))["confusion"] == score.confusion


def test_classes_that_never_occur_do_not_count():
    score = score_classification(logits_for([0, 1], 3), np.array([0, 1]), LABELS)
    assert score.macro_f1 == score.accuracy == 1.0
    assert score.per_class["c"]["f1"] == 0.0
    predicted = score_classification(logits_for([0, 2], 3), np.array([0, 1]), LABELS)
    assert predicted.macro_f1 == pytest.approx(1 / 3)
    assert macro_f1_accuracy(np.zeros((3, 3), int)) == (0.0, 0.0)


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_examples():
    # Two bins: 4 examples at 0.95 of which 2 are right, 6 at 0.65 of which 3 are right.
    confidence = np.array([0.95] * 4 + [0.65] * 6)
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    targets = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    score = score_classification(logits, targets, ["x", "y"])
    assert score.ece == pytest.approx(0.4 * 0.45 + 0.6 * 0.15)
    # Within a bin, too much and too little confidence cancel.
    confidence = np.array([0.90, 0.92])
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    score = score_classification(logits, np.array([0, 1]), ["x", "y"])
    assert score.ece == pytest.approx(0.91 - 0.5)


def test_temperature_changes_calibration_only():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(500, 3)), rng.integers(0, 3, 500)
    plain = score_classification(logits, targets, LABELS)
    cooled = score_classification(logits, targets, LABELS, temperature=8.0)
    assert cooled.ece != plain.ece
    assert cooled.ece_uncalibrated == plain.ece == plain.ece_uncalibrated
    assert (cooled.macro_f1, cooled.ci_low) == (plain.macro_f1, plain.ci_low)


def random_predictions(seed, examples, classes):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, examples)
    logits = rng.normal(size=(examples, classes)) * 2
    logits[np.arange(examples), targets] += rng.normal(1, 1, examples)
    return logits, targets


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6), st.floats(0.05, 20))
def test_scores_keep_their_bounds(seed, examples, classes, temperature):
    logits, targets = random_predictions(seed, examples, classes)
    labels = [str(i) for i in range(classes)]
    score = score_classification(
        logits, targets, labels, temperature=temperature, bootstrap_samples=100
    )
    assert 0 <= score.ece <= 1
    assert 0 <= score.ece_uncalibrated <= 1
    assert 0 <= score.ci_low <= score.ci_high <= 1
    assert 0 <= score.accuracy_ci_low <= score.accuracy <= score.accuracy_ci_high <= 1
    assert sum(map(sum, score.confusion)) == score.examples == examples
    assert sum(row["support"] for row in score.per_class.values()) == examples


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6))
def test_scores_equal_those_of_scikit_learn(seed, examples, classes):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, targets = random_predictions(seed, examples, classes)
    predictions = logits.argmax(axis=1)
    labels = [str(i) for i in range(classes)]
    score = score_classification(logits, targets, labels, bootstrap_samples=100)
    assert score.macro_f1 == pytest.approx(
        metrics.f1_score(targets, predictions, average="macro", zero_division=0)
    )
    assert score.accuracy == pytest.approx(metrics.accuracy_score(targets, predictions))
    every = list(range(classes))
    assert score.confusion == metrics.confusion_matrix(targets, predictions, labels=every).tolist()
    expected = metrics.precision_recall_fscore_support(
        targets, predictions, labels=every, zero_division=0
    )
    for i, label in enumerate(labels):
        assert list(score.per_class[label].values()) == pytest.approx(
            [part[i] for part in expected]
        )


def test_interval_equals_that_of_resampled_examples():
    logits, targets = random_predictions(0, 300, 3)
    predictions = logits.argmax(axis=1)
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 300, (4000, 300))
    scores = np.array(
        [macro_f1_accuracy(confusion_matrix(targets[i], predictions[i], 3)) for i in drawn]
    )
    (f1_low, accuracy_low), (f1_high, accuracy_high) = np.percentile(scores, [2.5, 97.5], axis=0)
    score = score_classification(logits, targets, LABELS, bootstrap_samples=4000)
    assert (score.ci_low, score.ci_high) == pytest.approx((f1_low, f1_high), abs=0.006)
    assert (score.accuracy_ci_low, score.accuracy_ci_high) == pytest.approx(
        (accuracy_low, accuracy_high), abs=0.006
    )


def test_interval_covers_the_truth_about_95_times_in_100():
    """Predictions that are right in 4 of 5 cases."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        targets = rng.integers(0, 2, 120)
        predictions = np.where(rng.random(120) < 0.8, targets, 1 - targets)
        score = score_classification(
            logits_for(predictions, 2), targets, ["x", "y"], bootstrap_samples=300, seed=seed
        )
        covered += score.accuracy_ci_low <= 0.8 <= score.accuracy_ci_high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_are_reproducible_and_do_not_depend_on_block_size(monkeypatch):
    from mmtransfer.transfer import classification

    logits, targets = random_predictions(0, 200, 3)
    first = score_classification(logits, targets, LABELS, seed=3)
    assert first == score_classification(logits, targets, LABELS, seed=3)
    assert first != score_classification(logits, targets, LABELS, seed=4)
    monkeypatch.setattr(classification, "_CELLS_AT_ONCE", 50)
    assert first == score_classification(logits, targets, LABELS, seed=3)


def test_a_hundred_thousand_examples_have_a_narrow_interval():
    logits, targets = random_predictions(0, 100_000, 3)
    score = score_classification(logits, targets, LABELS, temperature=2.0)
    assert score.ci_high - score.ci_low < 0.01


@pytest.mark.slow  # for its clock
def test_a_hundred_thousand_examples_are_scored_in_a_moment():
    logits, targets = random_predictions(0, 100_000, 3)
    started = time.perf_counter()
    score_classification(logits, targets, LABELS, temperature=2.0)
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    ("logits", "targets", "temperature", "message"),
    [
        (np.zeros((0, 3)), [], 1.0, "no examples"),
        (np.zeros((2, 2)), [0, 1], 1.0, r"expected logits \[2, 3\].*found \(2, 2\)"),
        (np.zeros((3, 3)), [0, 1], 1.0, r"found \(3, 3\)"),
        (np.zeros((1, 3)), [3], 1.0, "targets from 0 to 2"),
        (np.zeros((1, 3)), [-1], 1.0, "targets from 0 to 2"),
        (np.full((1, 3), np.nan), [0], 1.0, "not finite"),
        (np.zeros((1, 3)), [0], 0.0, "positive temperature"),
        (np.zeros((1, 3)), [0], float("nan"), "positive temperature"),
    ],
)
def test_what_cannot_be_scored_is_refused(logits, targets, temperature, message):
    with pytest.raises(ValueError, match=message):
        score_classification(logits, np.array(targets), LABELS, temperature=temperature)


# --- temperature ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5), st.floats(0.01, 100))
def test_fitted_temperature_never_increases_the_loss(seed, examples, classes, scale):
    logits, targets = random_predictions(seed, examples, classes)
    logits = logits * scale
    temperature = fit_temperature(logits, targets)
    assert 0.05 <= temperature <= 20
    assert temperature == fit_temperature(logits, targets)
    fitted = negative_log_likelihood(logits, targets, temperature)
    assert fitted <= negative_log_likelihood(logits, targets, 1.0)
    if (logits.argmax(axis=1) != targets).any():
        for other in np.geomspace(0.05, 20, 50):
            assert fitted <= negative_log_likelihood(logits, targets, other) + 1e-4 * (1 + fitted)


def test_fitted_temperature_is_the_true_one():
    """Targets drawn from the softmax of logits, which are then multiplied."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50_000, 4)) * 2
    targets = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    for factor in (0.2, 1.0, 5.0):
        temperature = fit_temperature(logits * factor, targets)
        assert temperature == pytest.approx(factor, rel=0.03)
        score = score_classification(
            logits * factor, targets, ["a", "b", "c", "d"], temperature=temperature
        )
        assert score.ece < 0.01
        assert score.ece <= score.ece_uncalibrated + 0.002


def test_temperature_is_one_where_nothing_can_be_fitted():
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1.0
    assert fit_temperature(logits_for([0, 1], 3), np.array([0, 1])) == 1.0  # all right


def test_hopeless_predictions_get_the_highest_temperature():
    assert fit_temperature(logits_for([0, 1], 3), np.array([1, 2])) == pytest.approx(20, rel=1e-3)


def test_large_logits_do_not_overflow():
    logits = np.array([[3e4, -3e4], [-3e4, 3e4], [3e4, -3e4]])
    targets = np.array([0, 1, 1])
    with np.errstate(over="raise", invalid="raise"):
        temperature = fit_temperature(logits, targets)
        score = score_classification(logits, targets, ["x", "y"], temperature=temperature)
    assert score.ece == pytest.approx(1 / 3)
