"""The range test: where the loss falls fastest, and what is refused."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import write_texts

from mmtransfer import lr_range
from mmtransfer.cli import main
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.runs.lr_range import steepest


@pytest.fixture(scope="module")
def values(tmp_path_factory, text_backbone):
    folder = tmp_path_factory.mktemp("ranges")
    return {
        "task": "sentiment",
        "source_model": str(text_backbone),
        "data": {"train": str(write_texts(folder / "train.csv", 64))},
        "transfer": {"preset": "combined"},
        "train": {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "batch_tokens": 128},
        "runtime": {"device": "cpu", "threads": 1},
    }


def test_the_steepest_fall_is_suggested_and_the_lowest_point_named():
    rates = (10 ** np.linspace(-6, 0, 121)).tolist()
    # Falls around 1e-3, rises again around 1e-1.
    x = np.log10(rates)
    loss = 1 - 0.8 / (1 + np.exp(-6 * (x + 3))) + 2 / (1 + np.exp(-8 * (x + 1)))
    suggested, lowest = steepest(rates, loss.tolist())
    assert suggested == pytest.approx(1e-3, rel=0.15)
    assert 3e-3 < lowest < 5e-2
    assert steepest(rates, np.linspace(1, 2, 121).tolist())[0] is None


def test_rates_grow_a_million_fold_around_the_configured_one(values):
    found = lr_range(build_config(values), stage=2, steps=60)
    assert found.field == "train.learning_rate"
    assert found.configured == 1e-3
    assert found.rates[0] == pytest.approx(1e-6)
    ratios = np.divide(found.rates[1:], found.rates[:-1])
    assert ratios == pytest.approx(10 ** (6 / 59))
    assert found.diverged or len(found.rates) == 60
    assert found.suggested is not None
    assert found.rates[0] < found.suggested <= found.highest
    assert "suggested, where the loss falls fastest" in str(found)
    assert found == lr_range(build_config(values), stage=2, steps=60)


def test_a_frozen_stage_is_tested_by_the_head_s_rate_and_drawn(values, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    run_dir = tmp_path / "run"
    assert main(["lr-range", str(path), "--run_dir", str(run_dir), "--range-steps", "40"]) == 0
    printed = capsys.readouterr().out
    assert "train.head_learning_rate" in printed
    drawing = ElementTree.parse(run_dir / "lr_range.svg").getroot()
    assert drawing.tag.endswith("svg")
    lines = [part for part in drawing if part.tag.endswith("polyline")]
    assert len(lines) == 2
    assert "prefers-color-scheme: dark" in (run_dir / "lr_range.svg").read_text()
    assert list(run_dir.iterdir()) == [run_dir / "lr_range.svg"]  # a run may still go there
    assert main(["lr-range", str(path), "--plot", str(tmp_path / "p.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["field"] == "train.head_learning_rate"


def test_a_stage_that_there_is_not_and_too_few_steps_are_refused(values):
    with pytest.raises(UserError, match="stage: expected a number from 1 to 2, found 3"):
        lr_range(build_config(values), stage=3)
    with pytest.raises(UserError, match="steps: expected at least 20, found 5"):
        lr_range(build_config(values), steps=5)
