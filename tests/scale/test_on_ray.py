"""On Ray: the same rows as in process, whatever dies."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import EXAMPLE, child_environment, write_media
from support.clusters import kill_one, tree, when_gone

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import RecognitionOptions
from mmtransfer.scale import cluster
from mmtransfer.scale.transcribe import BulkOptions, transcribe

MODEL = "bundled:whisper-tiny.en"


def test_without_ray_the_line_that_installs_it_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    source = str(EXAMPLE / "monitor.mp4")
    out = tmp_path / "out"
    assert main(["transcribe", MODEL, source, "--output", str(out), "--ray", "local"]) == 2
    assert "pip install 'mmtransfer[ray]'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no answer"),
        ("ray://127.0.0.1:10001", "expected local, auto or HOST:PORT"),
        ("somewhere", "expected local, auto or HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(tmp_path, capsys, address, message):
    pytest.importorskip("ray")
    source = str(EXAMPLE / "monitor.mp4")
    out = tmp_path / "out"
    assert main(["transcribe", MODEL, source, "--output", str(out), "--ray", address]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_what_answers_but_is_no_cluster_is_not_waited_for(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "_ANSWER_S", 3.0)
    source, out = str(EXAMPLE / "monitor.mp4"), tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert main(["transcribe", MODEL, source, "--output", str(out), "--ray", address]) == 2
    assert f"--ray {address}: no cluster answers there in 3 s." in capsys.readouterr().err


def test_a_head_that_is_gone_ends_the_run_with_one_line(monkeypatch):
    monkeypatch.setattr(cluster, "_GONE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = cluster.Head(f"127.0.0.1:{server.getsockname()[1]}", "The same command goes on")
        time.sleep(0.3)
        head.check()
    time.sleep(0.1)
    head.check()  # once is no proof
    time.sleep(0.3)
    with pytest.raises(UserError, match=r"head of the cluster, 127\.0\.0\.1:\d+, .*goes on"):
        head.check()


@pytest.mark.parametrize("place", ["home", "path", "value", None])
def test_the_token_that_this_machine_has_is_sent(tmp_path, monkeypatch, place):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if place == "home":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    elif place == "path":
        (tmp_path / "elsewhere").write_text("secret")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    elif place == "value":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setattr(os, "environ", copied := dict(os.environ))
    cluster._send_token()
    assert copied.get("RAY_AUTH_MODE") == ("token" if place else None)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A long recording of several pieces, and short ones in folders of their own."""
    from mmtransfer.speech.audio import decode_clip

    folder = tmp_path_factory.mktemp("archive")
    speech = decode_clip(EXAMPLE / "monitor.mp4", 5.5, 14.2)
    for number in range(5):
        (folder / str(number)).mkdir()
        write_media(folder / str(number) / "short.flac", np.tile(speech, 1 + number))
    (folder / "0" / "bad.wav").write_bytes(b"no recording")
    write_media(folder / "long.flac", np.tile(speech, 60))
    return folder


@pytest.fixture(scope="module")
def undisturbed(archive, tmp_path_factory):
    """What one process writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    transcribe(options(archive, out))
    return tree(out)


def options(archive, out, **given):
    recognition = RecognitionOptions(MODEL, words=True)
    return BulkOptions(recognition, [str(archive)], str(out), max_errors=50, **given)


def when_kept(out, count):
    """Wait until so many pieces and groups are on disk."""
    while len([*out.glob("files/*.parquet"), *out.glob("_run/pieces/*/*.json")]) < count:
        time.sleep(0.05)


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(archive, undisturbed, tmp_path):
    pytest.importorskip("ray")
    summary = transcribe(options(archive, tmp_path / "out", ray="local", workers=2))
    assert summary.workers == 2
    assert summary.cpu_s > 0
    assert tree(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_killed_workers_leave_no_trace(archive, undisturbed, tmp_path, caplog):
    pytest.importorskip("ray")
    out, killed = tmp_path / "out", []

    def kill():
        for count in (1, 2, 4):
            when_kept(out, count)
            killed.append(kill_one("ray::Worker"))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    transcribe(options(archive, out, ray="local", workers=2))
    killer.join(1)
    assert sum(killed) >= 2
    assert "a worker died" in caplog.text
    assert tree(out) == undisturbed


@pytest.mark.slow
def test_a_killed_driver_goes_on(archive, undisturbed, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    command = ["transcribe", MODEL, str(archive), "--output", str(out), "--words"]
    command += ["--max-errors", "50", "--ray", "local", "--workers", "2"]
    for count in (1, 2, 4):
        program = [sys.executable, "-m", "mmtransfer", *command]
        driver = subprocess.Popen(program, env=child_environment(), start_new_session=True)
        when_kept(out, count)
        driver.kill()
        driver.wait()
        when_gone(driver.pid)
    assert tree(out) != undisturbed
    assert main(command) == 0
    assert tree(out) == undisturbed


@pytest.mark.slow
def test_a_lost_node_leaves_no_trace(archive, undisturbed, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster, out = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), tmp_path / "out"
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(4)]
        cluster.wait_for_nodes()

        def kill():
            for count in (1, 2, 4):
                when_kept(out, count)
                cluster.remove_node(nodes.pop(0), allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        transcribe(options(archive, out, ray=cluster.address, workers=2))
        killer.join(60)
    finally:
        cluster.shutdown()
    assert tree(out) == undisturbed
