"""Texts in bulk: each row once, the same bits in process and on Ray, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, child_environment, write_text_backbone, write_texts
from support.clusters import kill_one, tree, when_gone

from mmtransfer import load
from mmtransfer.cli import main
from mmtransfer.config import DataConfig, HeadConfig, RuntimeConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.scale import texts
from mmtransfer.scale.folder import RunFolder
from mmtransfer.scale.texts import Classifier, TextOptions, classify
from mmtransfer.text.classifier import TextModel, new_text_model
from mmtransfer.text.prediction import given_rows


def save_model(folder, backbone, seed=0, head=None):
    """A text classifier that nobody has trained."""
    checkpoint = resolve(str(backbone))
    head, data = head or HeadConfig(), DataConfig()
    model = new_text_model(checkpoint, ["bad", "good"], data=data, head=head, seed=seed)
    folder.mkdir()
    model.save(folder, "full")
    return folder


@pytest.fixture(scope="module")
def model(text_backbone, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model", text_backbone)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(texts, "_PART_ROWS", 16)


def rows(out):
    return ds.dataset(out / "rows").to_table().to_pylist()


def run(model, data, out, **options):
    return classify(TextOptions(str(model), str(data), str(out), **options))


def test_rows_are_those_of_the_model_in_order_with_their_columns(model, tmp_path, small_parts):
    data = write_texts(tmp_path / "data.csv", 70, targets=True)
    out = tmp_path / "out"
    assert main(["predict", str(model), "--data", str(data), "--output", str(out)]) == 0
    found = rows(out)
    source = ds.dataset(data, format="csv").to_table().to_pylist()
    for name in ("text", "group", "target"):
        assert [row[name] for row in found] == [row[name] for row in source]
    assert [row["given_label"] for row in found] == [row["label"] for row in source]
    assert [row["row"] for row in found] == list(range(2, 72))  # lines
    classifier = load(str(model))
    assert isinstance(classifier, TextModel)
    given = [row["text"] for row in source], [row["target"] for row in source]
    expected = classifier.predict(*given)
    assert [row["label"] for row in found] == [one.label for one in expected]
    assert [row["probability_good"] for row in found] == pytest.approx(
        [one.probabilities["good"] for one in expected], abs=2e-5
    )
    assert len(list((out / "rows").iterdir())) == 5


@pytest.mark.parametrize("layers", ["all", [2]])
def test_parts_classified_at_the_same_time_keep_out_of_each_other(
    text_backbone, layers, tmp_path, small_parts
):
    """Of layers below the last as well, which a forward pass leaves in its modules."""
    head = HeadConfig(type="classifier", layers=layers)
    model = save_model(tmp_path / "model", text_backbone, head=head)
    data = write_texts(tmp_path / "data.csv", 700)
    for threads in (1, 4):
        run(model, data, tmp_path / f"out{threads}", runtime=RuntimeConfig(threads=threads))
    assert rows(tmp_path / "out4") == rows(tmp_path / "out1")


def test_each_thread_has_modules_of_its_own_on_the_same_weights(text_backbone, tmp_path):
    head = HeadConfig(type="classifier", layers="all")
    classifier = Classifier(
        str(save_model(tmp_path / "model", text_backbone, head=head)), RuntimeConfig()
    )
    both = threading.Barrier(2)
    networks = []

    def wait(*_):  # in the middle of the forward pass
        both.wait(60)

    classifier._model.network.encoder.layers[0].register_forward_hook(wait)

    def own(text):
        found = classifier.classify([text], [None])
        networks.append(classifier._of_thread.model.network)
        return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(own, [WORDS[5], WORDS[6]]))
    assert found[0] != found[1]
    one, other = networks
    assert one is not other
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a is b


def test_a_killed_run_goes_on_and_ends_the_same(model, tmp_path, small_parts, monkeypatch):
    data = write_texts(tmp_path / "data.csv", 200)
    whole = run(model, data, tmp_path / "whole")
    assert (whole.rows, whole.known, whole.parts) == (200, 0, 13)
    out = tmp_path / "killed"

    def killed_at(count):
        """Run it in a process that is killed once it has written so many parts."""
        if (child := os.fork()) == 0:
            write, kept = RunFolder.write_table, []

            def counted(*given):
                write(*given)
                kept.append(given)
                if len(kept) == count:
                    os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(RunFolder, "write_table", counted)
            run(model, data, out, runtime=RuntimeConfig(threads=1))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    for count in (1, 2, 4):
        killed_at(count)
    classified, one = [], Classifier.classify

    def noted(self, given, targets):
        classified.extend(given)
        return one(self, given, targets)

    monkeypatch.setattr(Classifier, "classify", noted)
    rest = run(model, data, out, runtime=RuntimeConfig(threads=3))  # bits are those of one
    assert (rest.known, rest.rows) == (7 * 16, 200 - 7 * 16)
    assert len(classified) == rest.rows
    assert tree(out) == tree(tmp_path / "whole")
    again = run(model, data, out)
    assert (again.rows, again.known) == (0, 200)
    assert len(classified) == rest.rows
    assert json.loads((out / "summary.json").read_text())["rows"] == rest.rows


def test_parts_that_changed_are_classified_anew(model, tmp_path, small_parts, caplog):
    data = write_texts(tmp_path / "data.csv", 60)
    out = tmp_path / "out"
    run(model, data, out)
    lines = data.read_text().splitlines()
    lines[20] = lines[20].replace(",g", ",h")  # in a column that is only kept
    data.write_text("\n".join(lines[:40]) + "\n")
    summary = run(model, data, out)
    assert (summary.known, summary.rows) == (16, 23)
    assert "2 parts were classified anew, 1 removed" in caplog.text
    run(model, data, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_columns_of_any_kind_are_kept_in_one_type(model, tmp_path, small_parts):
    data = tmp_path / "data.jsonl"
    given: list[dict[str, Any]] = [
        {"text": "good news", "id": n, "row": None if n % 2 else {"a": [n]}} for n in range(40)
    ]
    given += [{"text": "bad \ud83d", "id": "x", "late": 1.5}] * 100
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    run(model, data, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [found[n]["id"] for n in (0, 1, 50)] == ["0", "1", "x"]
    assert [found[n]["given_row"] for n in (0, 1, 50)] == ['{"a": [0]}', None, None]
    assert [found[n]["late"] for n in (0, 50)] == [None, "1.5"]
    data.write_text(data.read_text() + '{"text": "fine", "later": [1]}\n')
    run(model, data, tmp_path / "out")
    assert rows(tmp_path / "out")[-1]["others"] == '{"later": [1]}'


def test_an_output_belongs_to_a_model_and_its_data(model, text_backbone, tmp_path, capsys):
    data, out = write_texts(tmp_path / "data.csv", 8), tmp_path / "out"
    run(model, data, out)
    other = save_model(tmp_path / "other", text_backbone, seed=1)
    with pytest.raises(UserError, match="was made with model"):
        run(other, data, out)
    with pytest.raises(UserError, match="was made with data"):
        run(model, write_texts(tmp_path / "more.csv", 8), out)
    command = ["predict", str(model), "--data", str(data), "--output"]
    assert main([*command, str(tmp_path / "x.csv"), "--workers", "2"]) == 2
    assert "expected with ray" in capsys.readouterr().err
    for ray in (["--ray", "local"], ["--ray", "127.0.0.1:9"]):
        assert main([*command, str(tmp_path / "x.csv"), *ray]) == 2
        assert "a folder as --output" in capsys.readouterr().err


def test_rows_held_do_not_grow_with_the_data(model, tmp_path, small_parts, monkeypatch):
    data = write_texts(tmp_path / "data.csv", 1600)
    taken, ahead = list[int](), list[int]()
    written: list[int] = []
    write = RunFolder.write_table

    def counted(*given):
        for row in given_rows(*given):
            taken.append(row.number)
            ahead.append(len(taken) - sum(written))
            yield row

    def noted(self, name, table):
        write(self, name, table)
        written.append(len(table))

    monkeypatch.setattr(texts, "given_rows", counted)
    monkeypatch.setattr(RunFolder, "write_table", noted)
    run(model, data, tmp_path / "out", runtime=RuntimeConfig(threads=2))
    assert sum(written) == 1600
    assert max(ahead) <= 100 + 16 * 5


def test_without_a_cluster_one_line_says_so(model, tmp_path, monkeypatch, capsys):
    data, out = write_texts(tmp_path / "data.csv", 8), tmp_path / "out"
    command = ["predict", str(model), "--data", str(data), "--output", str(out), "--ray"]
    pytest.importorskip("ray")
    assert main([*command, "127.0.0.1:9"]) == 2
    assert "no answer" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "local"]) == 2
    assert "pip install 'mmtransfer[ray]'" in capsys.readouterr().err
    assert not out.exists()


# --- on Ray --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A model that takes a moment, texts of twelve parts, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    backbone = write_text_backbone(folder / "backbone", layers=4)
    slow = save_model(folder / "model", backbone)
    data = folder / "data.csv"
    words = " ".join(WORDS[4:16])
    data.write_text("text\n" + "".join(f"{words} {n}\n" for n in range(12 * 4096 - 100)))
    run(slow, data, folder / "out")
    return slow, data, tree(folder / "out")


def when_written(out, count):
    while len(list(out.glob("rows/*.parquet"))) < count:
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_workers_and_nodes_leave_no_trace(many, tmp_path, caplog):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    slow, data, undisturbed = many
    cluster, out = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), tmp_path / "out"
    killed = []
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(4)]
        cluster.wait_for_nodes()

        def kill():
            for count in (1, 4):
                when_written(out, count)
                killed.append(kill_one("ray::Worker"))
                when_written(out, count + 1)
                cluster.remove_node(nodes.pop(0), allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        summary = run(slow, data, out, ray=cluster.address, workers=2)
        killer.join(60)
    finally:
        cluster.shutdown()
    assert any(killed)
    assert "a worker died" in caplog.text
    assert summary.workers == 2
    assert summary.rows == 12 * 4096 - 100
    assert tree(out) == undisturbed


@pytest.mark.slow
def test_a_killed_driver_goes_on(many, tmp_path):
    pytest.importorskip("ray")
    slow, data, undisturbed = many
    out = tmp_path / "out"
    command = ["predict", str(slow), "--data", str(data), "--output", str(out)]
    command += ["--ray", "local", "--workers", "2"]
    for count in (1, 2, 4):
        program = [sys.executable, "-m", "mmtransfer", *command]
        driver = subprocess.Popen(program, env=child_environment(), start_new_session=True)
        when_written(out, count)
        driver.kill()
        driver.wait()
        when_gone(driver.pid)
    there = {path.name: path.stat().st_mtime_ns for path in Path(out, "rows").iterdir()}
    assert tree(out) != undisturbed
    assert main(command) == 0
    assert tree(out) == undisturbed
    after = {path.name: path.stat().st_mtime_ns for path in Path(out, "rows").iterdir()}
    assert there.items() <= after.items()  # none is written again
    assert sum(pq.read_metadata(path).num_rows for path in Path(out, "rows").iterdir()) == (
        12 * 4096 - 100
    )
