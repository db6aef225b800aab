"""Paired tests: known cases, how often chance is called real, what a run reports of them."""

import json

import numpy as np
import pytest
import torch
from conftest import write_texts
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config
from mmtransfer.runs.report import gain_note, metric_rows
from mmtransfer.runs.significance import (
    Difference,
    holm,
    metric_of,
    paired_difference,
    seed_difference,
    t_probability,
    t_quantile,
)
from mmtransfer.sound.scores import mean_average_precision
from mmtransfer.speech.scores import ClipScore, summarize_speech
from mmtransfer.transfer.classification import confusion_matrix, macro_f1_accuracy


def classes(targets, predictions):
    return {"targets": list(targets), "predictions": list(predictions)}


def noisy(targets, accuracy, rng):
    """Predictions that are right so often."""
    wrong = rng.integers(0, targets.max() + 1, len(targets))
    return np.where(rng.random(len(targets)) < accuracy, targets, wrong)


def test_metrics_of_resamples_are_those_of_the_repeated_examples():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 40)
    predictions = noisy(targets, 0.6, rng)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=5)
    found = {
        name: metric_of(classes(targets, predictions), name, counts)
        for name in ("macro_f1", "accuracy")
    }
    for row, weights in enumerate(counts):
        rows = np.repeat(np.arange(40), weights)
        expected = macro_f1_accuracy(confusion_matrix(targets[rows], predictions[rows], 3))
        assert (found["macro_f1"][row], found["accuracy"][row]) == pytest.approx(expected)
    several = rng.integers(0, 2, (40, 4))
    several[:, 3] = 0  # a class that never occurs
    shares = rng.random((40, 4)).round(1)  # many the same
    precision = metric_of({"targets": several, "probabilities": shares}, "map", counts)
    for row, weights in enumerate(counts):
        rows = np.repeat(np.arange(40), weights)
        assert precision[row] == pytest.approx(mean_average_precision(shares[rows], several[rows]))
    clips = [ClipScore(1, 4, 2, 20, 4), ClipScore(0, 3, 0, 12, 3), ClipScore(2, 0, 5, 0, 2)]
    score = summarize_speech(clips, normalizer="none-v1", metric="cer", bootstrap_samples=100)
    [rate] = metric_of(score.outcomes, "cer", np.ones((1, 3)))
    assert rate == score.cer == 7 / 32


def test_the_same_outcomes_are_no_difference():
    targets = np.arange(60) % 2
    same = classes(targets, 1 - targets)
    found = paired_difference(same, same, "macro_f1")
    assert found is not None
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.is_real


def test_fewer_errors_are_better_and_a_clear_difference_is_real():
    units = [6] * 60
    old, new = {"errors": [3] * 60, "units": units}, {"errors": [0, 1] * 30, "units": units}
    found = paired_difference(old, new, "wer")
    assert found is not None
    assert found.value == pytest.approx(2.5 / 6)
    assert found.low < found.value < found.high
    assert found.is_real
    back = paired_difference(new, old, "wer")
    assert back is not None
    assert back.value == pytest.approx(-found.value)
    assert back.is_real
    assert back.turned().value == pytest.approx(found.value)
    assert paired_difference(old, new, "wer") == found  # a fixed seed


def test_the_probability_of_a_few_changed_examples_is_that_of_the_sign_test():
    """Approximate randomisation of accuracy is the sign test on those that changed."""
    targets = np.zeros(100, int)
    old, new = targets.copy(), targets.copy()
    old[:6] = 1
    new[6:7] = 1
    found = paired_difference(classes(targets, old), classes(targets, new), "accuracy")
    assert found is not None
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7, abs=0.02)
    assert not found.is_real


def test_an_undefined_metric_has_no_difference():
    silent = {"errors": [1, 0], "units": [0, 0]}
    assert paired_difference(silent, silent, "wer") is None


def test_outcomes_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="same examples"):
        paired_difference(classes([0, 1], [0, 1]), classes([1, 1], [0, 1]), "accuracy")


def test_chance_is_called_real_as_often_as_the_level_says():
    rng, real, inside = np.random.default_rng(0), 0, 0
    for number in range(200):
        targets = rng.integers(0, 2, 150)
        pair = [classes(targets, noisy(targets, 0.7, rng)) for _ in range(2)]
        found = paired_difference(pair[0], pair[1], "accuracy", seed=number, samples=500)
        assert found is not None
        real += found.is_real
        inside += found.low <= 0 <= found.high
    assert real <= 200 * 0.08
    assert inside >= 200 * 0.9


def test_the_tails_of_students_t_are_those_of_its_table():
    table = {1: 12.706, 2: 4.303, 5: 2.571, 30: 2.042, float("inf"): 1.960}
    for degrees, quantile in table.items():
        assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-3)
        assert t_probability(quantile, degrees) == pytest.approx(0.05, abs=1e-4)


def test_holm_corrects_for_the_number_of_comparisons():
    found = {str(p): Difference(0.1, 0.05, 0.2, p, 10) for p in (0.03, 0.01, 0.04)}
    corrected = holm({**found, "unknown": None})
    assert [corrected[name].p for name in ("0.01", "0.03", "0.04")] == [0.03, 0.06, 0.06]  # type: ignore[union-attr]
    assert [one.is_real for one in corrected.values() if one] == [False, True, False]
    assert corrected["unknown"] is None


# --- seeds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads():
    """Outcomes of logistic heads on one small training set, which differ in their seed alone:
    starting weights, dropout and order of the examples; and of one trained on more.
    """
    rng = np.random.default_rng(0)
    direction = rng.normal(size=24)

    def data(count):
        features = rng.normal(size=(count, 24)).astype(np.float32)
        noise = rng.normal(size=count) * 2
        return torch.tensor(features), torch.tensor((features @ direction + noise > 0).astype(int))

    many, few, test = data(2000), data(30), data(400)

    def trained(seed, examples):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(2, 24, generator=generator).requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.05)
        for _ in range(60):
            rows = torch.randint(len(examples[1]), (16,), generator=generator)
            kept = torch.rand(16, 24, generator=generator) > 0.3
            logits = (examples[0][rows] * kept / 0.7) @ weights.T
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, examples[1][rows]).backward()
            optimizer.step()
        predictions = (test[0] @ weights.detach().T).argmax(-1)
        return classes(test[1].tolist(), predictions.tolist())

    return lambda seed, more=False: trained(seed, many if more else few)


def test_of_twenty_pairs_that_differ_in_seed_alone_at_most_two_are_called_real(heads):
    """With three seeds on either side, whose variance counts."""
    found = [
        seed_difference(
            [heads(100 * pair + n) for n in range(3)],
            [heads(100 * pair + 50 + n) for n in range(3)],
            "macro_f1",
            seed=pair,
        )
        for pair in range(20)
    ]
    assert sum(one.is_real for one in found) <= 2  # type: ignore[union-attr]


def test_a_difference_between_ways_of_training_is_real(heads):
    seeds = range(3)
    found = seed_difference(
        [heads(n) for n in seeds], [heads(n, more=True) for n in seeds], "macro_f1"
    )
    assert found is not None
    assert found.value > 0
    assert found.is_real


@settings(max_examples=60, deadline=None)
@given(
    changed=st.integers(0, 12),
    same=st.integers(0, 20),
    seeds=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    metric=st.sampled_from(["accuracy", "macro_f1", "wer"]),
    noise=st.integers(0, 3),
)
def test_few_changed_examples_are_no_real_difference(changed, same, seeds, metric, noise):
    """As the sign test has it, even where all seeds agree."""
    total = changed + same
    if not total:
        return

    def outcomes(is_old, seed):
        wrong = np.arange(total) < (changed if is_old else 0)
        wrong[total - min(seed * noise, same) :] = True  # other seeds, other errors
        if metric == "wer":
            return {"errors": wrong.astype(int), "units": [3] * total}
        return classes(np.arange(total) % 2, (np.arange(total) + wrong) % 2)

    old, new = ([outcomes(number == 0, n) for n in range(seeds[number])] for number in (0, 1))
    for pair, sign in (((old, new), 1), ((new, old), -1)):
        found = seed_difference(*pair, metric, samples=100)
        assert found is not None
        if seeds[0] == seeds[1]:
            assert found.p >= min(1, 2 ** (1 - changed))
            if metric != "macro_f1":
                assert (found.value * sign > 0) == (changed > 0)
        assert 0 < found.p <= 1
        if found.p >= 0.05:
            assert found.low <= 0 <= found.high
            assert not found.is_real
        corrected = holm({"this": found, "other": found})["this"]
        assert corrected is not None
        assert corrected.p == min(1, 2 * found.p)


@pytest.mark.parametrize(("count", "is_real"), [(1, False), (3, False), (5, False), (2000, True)])
def test_seeds_that_agree_on_every_example_have_no_probability_of_zero(count, is_real):
    wrong, right = classes([0] * count, [1] * count), classes([0] * count, [0] * count)
    found = seed_difference([wrong] * 3, [right] * 3, "accuracy")
    assert found is not None
    assert found.value == 1
    assert found.p == pytest.approx(max(2.0 ** (1 - count), 2.0**-1000))
    assert found.is_real == is_real


def test_a_wrong_class_for_another_changes_no_accuracy():
    first, second = classes([0] * 8, [1] * 8), classes([0] * 8, [2] * 8)
    found = seed_difference([first] * 2, [second] * 2, "accuracy")
    assert found is not None
    assert (found.value, found.p) == (0, 1)


def test_one_seed_says_nothing_of_seeds(heads):
    assert seed_difference([heads(0)], [heads(1), heads(2)], "macro_f1") is None


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def improved(text_backbone, tmp_path_factory):
    """A run that starts at a classifier of the same classes, and its folder."""
    folder = tmp_path_factory.mktemp("improved")
    for name, seed in (("train", 0), ("validation", 1), ("old", 2)):
        write_texts(folder / f"{name}.csv", 64, seed=seed)

    def config(source, run, steps, rate):
        return build_config(
            {
                "task": "sentiment",
                "source_model": str(source),
                "run_dir": str(folder / run),
                "data": {
                    "train": str(folder / "train.csv"),
                    "validation": str(folder / "validation.csv"),
                    "source_domain": {"old": str(folder / "old.csv")},
                },
                "train": {"steps": steps, "learning_rate": rate, "head_learning_rate": 1e-2},
                "runtime": {"device": "cpu", "threads": 1},
            }
        )

    runs.train(config(text_backbone, "first", 2, 1e-4))
    report = runs.train(config(folder / "first", "second", 80, 3e-3))
    return folder / "second", report


def test_a_run_says_whether_gain_and_forgetting_are_real(improved):
    run, report = improved
    assert report["gain_test"]["real"]
    assert report["gain_test"]["low"] < report["gain"] < report["gain_test"]["high"]
    lost = report["source_domain"]["old"]["forgetting_test"]
    assert lost["value"] == pytest.approx(report["source_domain"]["old"]["forgetting"])
    assert lost["high"] < 0  # it was gained
    written = json.loads((run / "report.json").read_text())
    assert written["gain_test"] == report["gain_test"]
    target, old = metric_rows(report)
    assert target[3] == f"{report['gain']:+.4f} " + target[3].split(" ", 1)[1]
    assert target[3].endswith("real")
    assert old[3].startswith(f"{-lost['value']:+.4f} [{-lost['high']:+.4f}, {-lost['low']:+.4f}]")
    card = ModelCard.load(run / "README.md").content
    note = gain_note(report)
    assert note is not None
    assert note[1:] in card
    assert target[3] in card


def test_outcomes_stay_in_the_run_folder_and_out_of_the_report(improved):
    run, report = improved
    outcomes = json.loads((run / "outcomes.json").read_text())
    after = outcomes["after"]["target"]
    [score] = metric_of(after, "macro_f1", np.ones((1, 64)))
    assert score == pytest.approx(report["target"]["after"]["macro_f1"])
    assert "outcomes" not in (run / "report.json").read_text()


def test_train_prints_whether_the_gain_is_real(improved, tmp_path, capsys):
    run, _ = improved
    command = ["train", str(run / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main([*command, "--train.learning_rate", "1e-9", "--train.steps", "1"]) == 0
    assert "no gain that is more than chance" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--data", str(run.parent / "old.csv"), "--json"]) == 0
    assert "outcomes" not in json.loads(capsys.readouterr().out)
