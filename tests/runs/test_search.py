"""A search over fields: what is tried, pruned, kept, and continued after a kill."""

import json
import shutil
import signal

import pytest
from conftest import write_texts
from support.children import start_training

from mmtransfer import load, runs
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.runs import search as searching
from mmtransfer.runs.training import train_watched
from mmtransfer.text.classifier import TextModel

pytest.importorskip("optuna", reason="needs the search extra")


@pytest.fixture(scope="module")
def values(tmp_path_factory, text_backbone):
    folder = tmp_path_factory.mktemp("searched")
    return {
        "task": "sentiment",
        "source_model": str(text_backbone),
        "data": {
            "train": str(write_texts(folder / "train.csv", 64)),
            "validation": str(write_texts(folder / "validation.csv", 24, seed=1)),
        },
        "transfer": {"preset": "feature"},
        "train": {"steps": 6, "evaluate_every": 2, "warmup_steps": 0, "batch_tokens": 256},
        "evaluation": {"bootstrap_samples": 100},
        "search": {
            "trials": 3,
            "space": {
                "train.head_learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
                "head.batch_norm": [True, False],
            },
        },
        "runtime": {"device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """The report of a search that nothing disturbed, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return runs.train(build_config(values | {"run_dir": str(folder)})), folder


def test_the_best_trial_is_the_run(whole, values):
    report, folder = whole
    tried = report["search"]["trials"]
    assert len(tried) == 3
    scores = [trial["score"] for trial in tried if trial["state"] == "complete"]
    assert report["target"]["after"]["macro_f1"] == max(scores)
    best = tried[report["search"]["best"] - 1]
    assert best["score"] == max(scores)
    assert 1e-4 <= best["values"]["train.head_learning_rate"] <= 1e-1
    assert json.loads((folder / "report.json").read_text()) == report
    model = load(str(folder))
    assert isinstance(model, TextModel)
    assert model.predict(["a good day"])
    assert not list((folder / "trials").glob("*/model"))
    with pytest.raises(UserError, match="holds a finished run"):
        runs.train(build_config(values | {"run_dir": str(folder)}))


def test_a_killed_search_goes_on_where_it_was(values, whole, tmp_path, monkeypatch):
    """Whatever comes after is the same, and no trial that had ended runs again."""
    config = build_config(values | {"run_dir": str(tmp_path / "run")})
    real, started = train_watched, []

    def killed(own, **options):
        started.append(own.run_dir)
        if len(started) == 2:  # dies in the middle of it, with a checkpoint
            watch = options["watch"]

            def die(step, value):
                watch(step, value)
                if step == 4:
                    raise MemoryError("killed")

            return real(own, resume=options["resume"], watch=die)
        return real(own, **options)

    monkeypatch.setattr(searching, "train_watched", killed)
    with pytest.raises(MemoryError):
        runs.train(config)
    with pytest.raises(UserError, match="an unfinished search"):
        runs.train(config)
    started.clear()

    def noted(own, **options):
        started.append(own.run_dir)
        return real(own, **options)

    monkeypatch.setattr(searching, "train_watched", noted)
    report = runs.train(config, resume=True)
    assert [path[-4:] for path in started] == ["0001", "0002"]
    assert [t["values"] for t in report["search"]["trials"]] == [
        t["values"] for t in whole[0]["search"]["trials"]
    ]
    assert [t["score"] for t in report["search"]["trials"]] == [
        t["score"] for t in whole[0]["search"]["trials"]
    ]
    other = build_config(
        values | {"run_dir": str(tmp_path / "run"), "source_model": "bundled:minilm-l6"}
    )
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(UserError, match="holds a search with other settings"):
        runs.train(other, resume=True)


def test_a_search_on_other_data_does_not_go_on(values, tmp_path, monkeypatch):
    data = {
        "train": str(write_texts(tmp_path / "train.csv", 64)),
        "validation": str(write_texts(tmp_path / "validation.csv", 24, seed=1)),
    }
    config = build_config(values | {"data": data, "run_dir": str(tmp_path / "run")})

    def killed(own, **options):
        raise MemoryError("killed")

    monkeypatch.setattr(searching, "train_watched", killed)
    with pytest.raises(MemoryError):
        runs.train(config)
    write_texts(tmp_path / "validation.csv", 20, seed=2)
    with pytest.raises(UserError, match=r"results from before data\.validation changed"):
        runs.train(config, resume=True)
    write_texts(tmp_path / "validation.csv", 24, seed=1)
    with pytest.raises(MemoryError):
        runs.train(config, resume=True)


def test_every_source_that_is_tried_is_part_of_the_search(values, text_backbone, tmp_path):
    other = shutil.copytree(text_backbone, tmp_path / "other")
    space = {"source_model": [str(text_backbone), str(other)]}
    config = build_config(values | {"source_model": "none/such", "search": {"space": space}})
    first = searching._contents(config)
    assert len(first["source_model"]) == 2
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"note": 1}))
    again = searching._contents(config)
    assert [name for name in first if again[name] != first[name]] == ["source_model"]


def test_a_trial_that_falls_behind_is_pruned(values, tmp_path, monkeypatch):
    """The sixth trial, behind five that did well, ends at its first evaluation."""
    space = {"train.head_learning_rate": [0.05, 0.04]}
    changed = values | {"run_dir": str(tmp_path / "run")}
    changed["search"] = {"trials": 6, "space": space}

    def poor(own, **options):
        watch = options["watch"]
        is_last = own.run_dir.endswith("0005")
        return train_watched(
            own,
            resume=options["resume"],
            watch=lambda step, value: watch(step, -1.0 if is_last else value),
        )

    monkeypatch.setattr(searching, "train_watched", poor)
    report = runs.train(build_config(changed))
    states = [trial["state"] for trial in report["search"]["trials"]]
    assert states[:5] == ["complete"] * 5
    assert states[5] == "pruned"
    assert report["search"]["trials"][5]["steps"] == 2
    assert not (tmp_path / "run" / "trials" / "0005").exists()


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"train.learning_rat": [1, 2]}, "Did you mean 'train.learning_rate'"),
        ({"train.learning_rate": [1e-3]}, "expected a range or at least two values"),
        ({"train.learning_rate": {"low": 1, "high": 0}}, "expected low < high"),
        ({"train.learning_rate": {"low": 0, "high": 1, "log": True}}, "log needs low > 0"),
        ({"run_dir": ["a", "b"]}, "unknown field 'run_dir'"),
    ],
)
def test_a_space_that_cannot_be_is_one_line(values, space, match):
    with pytest.raises(UserError, match=match):
        build_config(values | {"search": {"space": space}})


def test_values_that_a_field_does_not_take_are_refused_before_training(values, tmp_path):
    folder = tmp_path / "run"
    changed = values | {"run_dir": str(folder)}
    changed["search"] = {"space": {"train.learning_rate": [1e-3, -1.0]}}
    with pytest.raises(UserError, match=r"search\.space: train\.learning_rate"):
        runs.train(build_config(changed))
    assert not folder.exists()


def test_a_search_survives_sigkill(values, whole, tmp_path):
    config = values | {"run_dir": str(tmp_path / "run")}
    process = start_training(config, tmp_path, stop=(10, signal.SIGKILL))  # in the second trial
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "report.json").exists()
    report = runs.train(build_config(config), resume=True)
    assert [t["score"] for t in report["search"]["trials"]] == [
        t["score"] for t in whole[0]["search"]["trials"]
    ]
