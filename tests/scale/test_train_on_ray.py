"""Training on Ray: the losses of one process with the batch of all workers, whatever dies."""

import json
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_text_backbone, write_texts
from safetensors.torch import load_file
from support.clusters import kill_one
from support.web import wait_for

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.scale import cluster
from mmtransfer.scale.cluster import Head
from mmtransfer.scale.train_on_ray import _failure


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tiny encoder and texts."""
    folder = tmp_path_factory.mktemp("source")
    write_text_backbone(folder / "backbone")
    write_texts(folder / "train.csv", 200)
    write_texts(folder / "validation.csv", 24, seed=1)
    return folder


def values(source, run_dir, **train):
    return {
        "task": "sentiment",
        "source_model": str(source / "backbone"),
        "run_dir": str(run_dir),
        "data": {name: str(source / f"{name}.csv") for name in ("train", "validation")},
        "train": {"steps": 4, "evaluate_every": 2, "batch_tokens": 100, **train},
        # Each process has dropout of its own.
        "transfer": {"dropout": 0.0},
        "head": {"dropout": 0.0},
        "runtime": {"threads": 1, "device": "cpu"},
    }


def command(source, run_dir, *options, **train):
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(values(source, run_dir, **train)))
    return ["train", str(path), "--ray", "local", *options]


def losses(run_dir):
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-worker", "0.5"], "gpus_per_worker: expected 0 or 1 in training, found 0.5"),
        (["--workers", "0"], "workers: expected 1 or more, found 0"),
        (["--ray", "somewhere"], "expected local, auto or HOST:PORT"),
        (["--structure", "auto"], "--ray trains one structure"),
    ],
)
def test_what_ray_cannot_train_is_one_line(source, tmp_path, capsys, options, message):
    pytest.importorskip("ray")
    assert main(command(source, tmp_path / "run", *options)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


class EndlessTrainer:
    """As Ray Train without a cluster: it waits for the workers."""

    def fit(self):
        threading.Event().wait()


def test_a_run_that_is_stopped_says_how_it_continues(caplog):
    class Stopped(Head):  # SIGINT comes while the head is looked at
        def check(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _failure(EndlessTrainer(), Stopped("127.0.0.1:1", ""))
    assert "--resume continues" in caplog.text


def test_training_ends_with_one_line_when_the_head_is_gone(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = Head(f"127.0.0.1:{server.getsockname()[1]}", "--resume goes on")
    monkeypatch.setattr(cluster, "_GONE_S", 0.1)
    with pytest.raises(UserError, match=r"head of the cluster, .*--resume goes on once"):
        _failure(EndlessTrainer(), head)


def test_why_ray_train_failed_is_one_line():
    class Failing:
        def fit(self):
            raise RuntimeError("Worker group\n  failed")

    # Of a head that is not looked at so soon.
    assert _failure(Failing(), Head("127.0.0.1:1", "")) == "Worker group failed"


def test_without_ray_the_line_that_installs_it_is_printed(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(command(source, tmp_path / "run")) == 2
    assert "pip install 'mmtransfer[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_follow_the_loss_curve_of_one_process(
    source, tmp_path, monkeypatch, capsys, caplog
):
    pytest.importorskip("ray")
    runs.train(build_config(values(source, tmp_path / "one", batch_tokens=200)))
    monkeypatch.chdir(source)  # a folder that workers do not run in
    two = ["--workers", "2", "--source_model", "backbone"]
    assert main(command(source, tmp_path / "two", *two)) == 0
    assert "run folder" in capsys.readouterr().out
    assert "step 4: validation_macro_f1" in caplog.text
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(a) == list(b) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["cost"]["device"][0] == "2"
    names = ("one", "two")
    assert len({tuple(sorted(p.name for p in (tmp_path / n).iterdir())) for n in names}) == 1

    broken = ["--data.validation", str(tmp_path / "nothing.csv"), "--workers", "2"]
    assert main(command(source, tmp_path / "broken", *broken)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "nothing.csv" in error[-1]
    assert main(command(source, tmp_path / "two", "--workers", "2")) == 2
    assert "holds a finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_worker_leaves_no_trace(source, tmp_path):
    pytest.importorskip("ray")
    long = {"steps": 60, "evaluate_every": 20, "checkpoint_every": 5}
    assert main(command(source, tmp_path / "whole", "--workers", "2", **long)) == 0

    def kill():
        metrics = tmp_path / "broken" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 12, 300)
        killed.append(kill_one("ray::RayTrainWorker"))

    killed: list[bool] = []
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert main(command(source, tmp_path / "broken", "--workers", "2", **long)) == 0
    killer.join(1)
    assert killed == [True]
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
