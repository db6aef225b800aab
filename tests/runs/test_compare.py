"""Structures side by side: what is found, how it goes on after a kill, what it refuses."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tone, write_dataset, write_media, write_texts
from support.children import Command

from mmtransfer import UserError, load
from mmtransfer.config import build_config, load_config, resolved
from mmtransfer.runs import compare as comparing
from mmtransfer.runs.compare import compare
from mmtransfer.runs.comparison import Cell, summarize
from mmtransfer.runs.inputs import contents
from mmtransfer.runs.training import train
from mmtransfer.text.classifier import TextModel

NAMES = ["feature", "end_to_end"]
STEPS = 12


def values(folder, backbone):
    return {
        "task": "sentiment",
        "source_model": str(backbone),
        "data": {
            "train": str(folder / "train.csv"),
            "validation": str(folder / "validation.csv"),
        },
        "train": {
            "learning_rate": 3e-3,
            "head_learning_rate": 1e-2,
            "warmup_steps": 2,
            "batch_tokens": 160,
        },
        "runtime": {"device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "train.csv", 64)
    write_texts(folder / "validation.csv", 60, seed=1)
    return folder


@pytest.fixture(scope="module")
def compared(texts, text_backbone):
    """Every structure with two seeds, and two on half of the data."""
    folder = texts / "compared"
    config = build_config(values(texts, text_backbone))
    structures: dict[str, Any] = {
        **dict.fromkeys(["source", "scratch", *NAMES]),
        "gradual": [{"frozen": "all"}, {"frozen": 2}],
    }
    found = compare(
        config, structures=structures, seeds=2, steps=STEPS, shares=[0.5], to=str(folder)
    )
    return folder, found


def test_every_cell_is_an_ordinary_run_under_one_budget(compared):
    folder, _ = compared
    cells = sorted(path.name for path in (folder / "cells").iterdir())
    assert len(cells) == 4 * 2 * 2
    for path in (folder / "cells").iterdir():
        assert json.loads((path / "report.json").read_text())["cost"]["steps"] == STEPS
    gradual = json.loads((folder / "cells" / "gradual-1-0" / "report.json").read_text())
    assert [stage["steps"] for stage in gradual["stages"]] == [STEPS // 2] * 2
    model = load(str(folder / "cells" / "end_to_end-1-0"))
    assert isinstance(model, TextModel)
    assert model.labels == ["negative", "positive"]
    half = json.loads((folder / "cells" / "feature-0.5-1" / "report.json").read_text())
    assert half["data"]["train"]["examples"] == 32


def test_the_result_holds_scores_costs_and_differences(compared):
    folder, found = compared
    assert {one.name for one in found.structures} == {"scratch", *NAMES, "gradual"}
    means = [one.mean for one in found.structures]
    assert means == sorted(means, reverse=True)
    for one in found.structures:
        assert len(one.scores) == 2
        assert one.train_seconds > 0
        assert one.stored_bytes > 1000
        assert one.examples_per_second > 0
        assert one.peak_bytes is None or one.peak_bytes > 1e8
    trained = {one.name: one.trained_parameters for one in found.structures}
    assert trained["feature"] < trained["gradual"] < trained["end_to_end"] == trained["scratch"]
    assert len(found.differences) == 6
    assert any(one.is_on_front for one in found.structures)
    written = json.loads((folder / "comparison.json").read_text())
    assert written["structures"][0]["name"] == found.best.name
    assert [point["examples"] for point in written["curves"]["feature"]] == [32, 64]
    table = str(found)
    assert "source as it is" in table
    assert "± " in table
    assert "none is both faster to train and better than" in table


def test_the_page_needs_no_other_file(compared):
    page = (compared[0] / "comparison.html").read_text()
    assert page.count("<svg") == 2
    assert "light dark" in page
    assert not re.search(r"(src|href)=|https?://|url\(|<script", page)


def test_a_second_start_trains_nothing_and_more_seeds_may_come(
    compared, texts, text_backbone, monkeypatch
):
    folder, found = compared
    trained = []

    def noted(config, **options):
        trained.append(config.run_dir)
        return train(config, **options)

    monkeypatch.setattr("mmtransfer.runs.compare.train", noted)
    config = build_config(values(texts, text_backbone))
    again = compare(config, structures=NAMES, seeds=2, steps=STEPS, to=str(folder))
    assert not trained
    assert {one.name: one.scores for one in again.structures} == {
        one.name: one.scores for one in found.structures if one.name in NAMES
    }
    compare(config, structures=["feature"], seeds=3, steps=STEPS, to=str(folder))
    assert [path.rsplit("/", 1)[-1] for path in trained] == ["feature-1-2"]
    with pytest.raises(UserError, match=r"other settings \(steps\)"):
        compare(config, structures=NAMES, seeds=2, steps=STEPS + 1, to=str(folder))


def test_other_stages_behind_a_name_are_refused(compared, texts, text_backbone):
    config, folder = build_config(values(texts, text_backbone)), str(compared[0])
    for name in ("gradual", "feature"):
        other = {name: [{"frozen": "none", "learning_rate": 1e-2}]}
        with pytest.raises(UserError, match=rf"other settings \(stages of {name}\)"):
            compare(config, structures=other, seeds=2, steps=STEPS, to=folder)


def test_cells_of_other_data_or_another_source_are_refused(text_backbone, tmp_path):
    """And adopted with a warning where a former version kept nothing of what they came from."""
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(text_backbone, source)
    train, validation = tmp_path / "train.csv", tmp_path / "validation.csv"
    write_texts(train, 64)
    write_texts(validation, 60, seed=1)
    config = build_config(values(tmp_path, source))

    def again():
        compare(config, structures=["feature"], seeds=2, steps=2, to=str(folder))

    again()
    before = train.read_bytes()
    write_texts(train, 64, seed=7)
    with pytest.raises(UserError, match=r"results from before data\.train changed"):
        again()
    train.write_bytes(before)
    again()
    plan = json.loads((folder / "plan.json").read_text())
    del plan["contents"]
    (folder / "plan.json").write_text(json.dumps(plan))
    again()
    write_texts(validation, 40, seed=9)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"note": 1}))
    with pytest.raises(UserError, match=r"before data\.validation, source_model changed"):
        again()
    # Of a former version, too, where the cells to come would be scored on other examples.
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="scored on different validation data"):
        compare(config, structures=["feature"], seeds=3, steps=2, to=str(folder))


def test_contents_are_those_of_what_is_used(text_backbone, tmp_path):
    talks = write_dataset(tmp_path / "talks", ["one", "two"])
    sounds = tmp_path / "sounds"
    for name in ("dog", "cat"):
        (sounds / name).mkdir(parents=True)
        write_media(sounds / name / "1.wav", tone(0.5))
    noise = tmp_path / "noise"
    noise.mkdir()
    write_media(noise / "1.wav", tone(0.5))

    def found(task, data):
        given = {"task": task, "source_model": str(text_backbone), "data": {"train": str(data)}}
        return contents(build_config(given | {"augment": {"noise_dir": str(noise)}}))

    first, other = found("speech", talks), found("sound", sounds)
    assert first.keys() == {"source_model", "data.train", "augment.noise_dir"}
    (talks / "notes.txt").write_text("of no set")
    (talks / "run").mkdir()
    write_media(talks / "run" / "other.wav", tone(0.5))
    assert found("speech", talks) == first
    write_media(talks / "clip1.wav", tone(0.7, hertz=300))
    write_media(noise / "2.wav", tone(0.5))
    changed = found("speech", talks)
    assert {name for name in first if first[name] != changed[name]} == {
        "data.train",
        "augment.noise_dir",
    }
    shutil.move(sounds / "dog" / "1.wav", sounds / "cat" / "2.wav")
    assert found("sound", sounds)["data.train"] != other["data.train"]
    (talks / "clip1.srt").write_text("1\n00:00:00,000 --> 00:00:00,500\none\n")
    (talks / "metadata.csv").unlink()
    by_subtitles = found("speech", talks)
    (talks / "clip1.srt").write_text("1\n00:00:00,000 --> 00:00:00,500\ntwo\n")
    assert found("speech", talks)["data.train"] != by_subtitles["data.train"]


def test_a_source_from_random_weights_has_lost_its_own(compared, text_backbone):
    from safetensors.torch import load_file

    folder, _ = compared
    name = "embeddings.position_embeddings.weight"  # hardly trained: mostly unused rows
    source = load_file(text_backbone / "model.safetensors")[name][100:]
    # The first seed is the one that the backbone of these tests was drawn from.
    scratch = load_file(folder / "cells" / "scratch-1-1" / "model" / "model.safetensors")
    tuned = load_file(folder / "cells" / "end_to_end-1-0" / "model" / "model.safetensors")
    assert (scratch[name][100:] - source).abs().mean() > 0.01
    assert (tuned[name][100:] - source).abs().mean() < 0.002


def test_random_weights_are_not_held_near_their_start(texts, text_backbone, tmp_path):
    config = build_config(values(texts, text_backbone) | {"transfer": {"l2sp": 10.0}})
    compare(config, structures=["scratch", "feature"], seeds=2, steps=1, to=str(tmp_path / "to"))
    pulls = [
        load_config(tmp_path / "to" / "cells" / f"{name}-1-0" / "config.yaml").transfer.l2sp
        for name in ("scratch", "feature")
    ]
    assert pulls == [0.0, 10.0]


_KILLED = """
import itertools, os, signal
from mmtransfer import cli
from mmtransfer.transfer.trainer import Trainer

steps, take_step = itertools.count(), Trainer._step

def killed(*arguments):
    if next(steps) == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(*arguments)

Trainer._step = killed
cli.entry()
"""


def test_a_killed_comparison_goes_on_to_the_same_result(texts, text_backbone, tmp_path):
    """Killed in the second cell; the first is not trained again, the second goes on."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(texts, text_backbone)))
    options = ["--structures", *NAMES, "--seeds", "2", "--steps", "8", "--to"]
    command = ["compare", path, *options, tmp_path / "killed"]
    with Command(*command, program=_KILLED) as first:
        first.communicate()
        assert first.wait() == -signal.SIGKILL
    done = [p.parent for p in (tmp_path / "killed" / "cells").glob("*/report.json")]
    assert len(done) == 1
    before = {p: p.stat().st_mtime_ns for p in done[0].rglob("*") if p.is_file()}
    config = build_config(values(texts, text_backbone))
    settings: dict[str, Any] = {"structures": NAMES, "seeds": 2, "steps": 8}
    resumed = compare(config, **settings, to=str(tmp_path / "killed"))
    whole = compare(config, **settings, to=str(tmp_path / "whole"))
    assert {one.name: one.scores for one in resumed.structures} == {
        one.name: one.scores for one in whole.structures
    }
    assert before == {p: p.stat().st_mtime_ns for p in done[0].rglob("*") if p.is_file()}


def cell(structure, seed, predictions, seconds):
    """A finished run with known predictions of forty examples."""
    targets = [0, 1] * 20
    right = sum(p == t for p, t in zip(predictions, targets, strict=True)) / 40
    return Cell(
        structure,
        1.0,
        seed,
        {
            "metric": "accuracy",
            "target": {"before": None, "after": {"accuracy": right}},
            "source_domain": {},
            "cost": {"train_seconds": seconds, "steps": 8, "trained_parameters": 9},
            "data": {"train": {"examples": 64}},
        },
        {
            "before": {"target": None},
            "after": {"target": {"targets": targets, "predictions": predictions}},
        },
        {"stored_bytes": 1},
    )


def test_only_differences_beyond_chance_are_called_real():
    right, wrong = [0, 1] * 20, [0, 1] * 10 + [1, 0] * 10
    nearly = [0, 1] * 19 + [1, 1]
    cells = [
        cell(name, seed, rows, seconds)
        for name, rows, seconds in (("a", right, 9.0), ("b", nearly, 1.0), ("c", wrong, 5.0))
        for seed in (0, 1)
    ]
    plan = {"structures": {"a": [], "b": [], "c": []}, "seeds": [0, 1], "shares": [1.0]}
    found = summarize({**plan, "steps": 8, "seconds": None}, cells, seed=0)
    assert [one.name for one in found.structures] == ["a", "b", "c"]
    real = {pair: one.is_real for pair, one in found.differences.items()}  # type: ignore[union-attr]
    assert real == {"b / a": False, "c / a": True, "c / b": True}
    assert [one.name for one in found.structures if one.is_on_front] == ["a", "b"]
    assert "a is really better than c" in str(found)
    assert "a and b differ by no more than chance" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one budget"),
        ({"steps": 8, "seconds": 3.0}, "one budget"),
        ({"steps": 8, "seeds": 1}, "seeds: expected 2 or more"),
        ({"steps": 1, "structures": ["combined"]}, "do not hold one run of 2 stages"),
        ({"steps": 8, "structures": ["best"]}, "found 'best'"),
        ({"steps": 8, "structures": ["source"]}, "one that is trained"),
        ({"steps": 8, "shares": [0.5, 2.0]}, "found 2"),
        ({"seconds": float("inf")}, "expected a finite number above 0, found inf"),
        ({"seconds": float("nan")}, "expected a finite number above 0, found nan"),
        ({"steps": 0}, "expected a finite number above 0, found 0"),
        ({"steps": 8, "structures": {"x": 5}}, "x: expected a list of one stage or more, found 5"),
        ({"steps": 8, "structures": {"x": []}}, r"one stage or more, found \[\]"),
        ({"steps": 8, "structures": {"x": [5]}}, r"transfer\.stages\.0.*found 5"),
        ({"steps": 8, "structures": {"a / b": [{}]}}, "expected a name of letters.*'a / b'"),
        ({"steps": 8, "structures": {"..": [{}]}}, "expected a name of letters"),
    ],
)
def test_what_cannot_be_compared_gets_one_line(texts, text_backbone, tmp_path, options, message):
    config = build_config(values(texts, text_backbone))
    with pytest.raises(UserError, match=message):
        compare(config, to=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_comparison_needs_one_validation_set(texts, text_backbone, tmp_path):
    config = values(texts, text_backbone)
    del config["data"]["validation"]
    with pytest.raises(UserError, match=r"data\.validation is not set"):
        compare(build_config(config), steps=8, to=str(tmp_path / "out"))


@pytest.mark.parametrize("pause", [0.0, 0.5])
@pytest.mark.parametrize("name", ["end_to_end", "combined", "shaped"])
def test_a_budget_in_seconds_is_spent_on_steps_and_evaluations(
    texts, text_backbone, tmp_path, monkeypatch, name, pause
):
    """By a clock of our own: a step takes 0.01 s, an evaluation as long as it is told."""
    shaped: dict[str, Any] = {"objective": "contrastive", "steps": 3}
    structures: dict[str, list[dict[str, Any]] | None]
    structures = {name: [shaped, {"frozen": "all"}] if name == "shaped" else None}
    config = build_config(values(texts, text_backbone))
    trained = []

    def spend(own, **_):
        """As the trainer writes it."""
        rows, evaluations, seconds = [], 0, 0.0
        for number, stage in enumerate(own.transfer.stages):
            spent = 0.0
            for step in range(1, stage.steps + 1):
                spent += 0.01
                rows.append({"stage": number, "loss": 1.0, "seconds": round(spent, 3)})
                is_due = step % own.train.evaluate_every == 0 or step == stage.steps
                if is_due and stage.objective == "target":
                    spent += pause
                    evaluations += 1
                    rows.append({"stage": number, "validation_loss": 1.0})
            seconds += spent
        folder = Path(own.run_dir)
        folder.mkdir(parents=True)
        (folder / "report.json").write_text("{}")
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved(own)))
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        trained.append((seconds, evaluations))

    monkeypatch.setattr(comparing, "train", spend)
    plan = comparing._Plan(config, tmp_path, structures, 2, None, 30.0, [1.0])
    first, second = plan.cells()
    spend(plan._config(first, tmp_path / "cells" / first.folder))
    (_, tried), (seconds, evaluations) = trained
    assert 0.9 * 30 < seconds <= 30 + 1e-6
    assert tried == evaluations / 2  # in the middle and at the end of a stage
    # Other seeds get as many steps, whatever a trial says by then.
    (tmp_path / "trials" / name / "metrics.jsonl").unlink()
    again = comparing._Plan(config, tmp_path, structures, 2, None, 30.0, [1.0])
    assert again._budget(second) == plan._budget(first)


def test_a_budget_in_seconds_becomes_steps(texts, text_backbone, tmp_path, monkeypatch):
    """Of a real trial, whose figures do not decide: a busy machine makes them any."""
    measured = []
    real = comparing._seconds_of

    def steady(metrics):
        measured.append(real(metrics))
        return 0.02, 0.01

    monkeypatch.setattr(comparing, "_seconds_of", steady)
    config = build_config(values(texts, text_backbone))
    compare(config, structures=["feature"], seeds=2, seconds=0.2, to=str(tmp_path / "out"))
    [(each, pause)] = measured
    assert each > 0
    assert pause >= 0
    reports = [
        json.loads(path.read_text()) for path in (tmp_path / "out").glob("cells/*/report.json")
    ]
    assert len(reports) == 2
    steps = {report["cost"]["steps"] for report in reports}
    assert len(steps) == 1  # the same for every seed
    [spent] = steps
    assert 0.1 < 0.02 * spent < 0.2  # the rest is for evaluations
    with pytest.raises(UserError, match="do not hold one run of end_to_end"):
        compare(config, structures=["end_to_end"], seconds=1e-6, to=str(tmp_path / "short"))
