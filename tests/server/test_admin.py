"""What changes a server while it runs: cameras loaded again, turned off and on, and forgetting."""

import json
import time
from collections import Counter
from typing import Any

import httpx
import pytest
import yaml
from conftest import EXAMPLE
from support.journals import NOON, text, write
from support.servers import running
from support.sources import Paced, decode
from support.web import wait_for

from mmtransfer.monitoring.stats import CameraStats
from mmtransfer.server.tokens import Role, Tokens
from mmtransfer.speech.audio import SAMPLE_RATE


def journal_lines(folder):
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def texts(folder, camera):
    return [x for x in journal_lines(folder) if x["camera"] == camera and "avg_logprob" in x]


def write_cameras(folder, **sources):
    listed = [{"name": name, "url": source.url} for name, source in sources.items()]
    content = {"cameras": listed, "model": "bundled:whisper-tiny.en"}
    (folder / "cameras.yaml").write_text(yaml.safe_dump(content))
    return folder / "cameras.yaml"


@pytest.fixture
def cameras():
    """Cameras that speak at once, twice as fast as people."""
    spoken = decode(EXAMPLE / "monitor.mp4")[int(5.5 * SAMPLE_RATE) : int(14.4 * SAMPLE_RATE)]
    made = [Paced([spoken], pace=2.0) for _ in range(3)]
    yield dict(zip(("gate", "yard", "hall"), made, strict=True))
    for one in made:
        one.close()


@pytest.fixture
def follow(monkeypatch):
    """What happens to cameras, counted by camera and event."""
    counted: Counter[tuple[str, str]] = Counter()

    def put(self, item):
        if hasattr(item, "event"):
            counted[item.camera, str(item.event)] += 1

    monkeypatch.setattr("mmtransfer.server.live.Live.put", put)
    return counted


def stats(server, name):
    """What a camera has done so far."""
    return server.state.stats.cameras.get(name, CameraStats())


def post(server, path, content, **options):
    return httpx.post(server.url + path, json=content, timeout=60, **options)


def test_a_reload_leaves_what_is_the_same_alone_and_loses_nothing_of_what_goes(
    cameras, fake_recognizer, follow, tmp_path
):
    fake_recognizer()
    gate, yard, hall = cameras.values()
    path = write_cameras(tmp_path, gate=gate, yard=yard)
    journal = tmp_path / "journal"
    with running({}, cameras=path, journal=journal) as server:
        wait_for(lambda: min(stats(server, name).audio_s for name in ("gate", "yard")) > 3.0)
        spoken_s = stats(server, "gate").audio_s
        write_cameras(tmp_path, yard=yard, hall=hall)
        answer = post(server, "/api/reload", {})
        assert answer.json() == {"changes": "new: hall; gone: gate"}
        wait_for(lambda: texts(journal, "gate") and texts(journal, "hall"))
        begun = texts(journal, "gate")[0]["start"]
        assert texts(journal, "gate")[-1]["end"] - begun > spoken_s - 2.5  # what was being spoken
        assert not stats(server, "gate").is_connected
        assert follow["yard", "connected"] == yard.connections == 1
        assert not follow["yard", "lost"] + follow["yard", "gap"]
        path.write_text("cameras: [{name: yard}]")
        answer = post(server, "/api/reload", {})
        assert answer.status_code == 409
        assert "camera 1: url" in answer.json()["error"]
        assert str(tmp_path) not in answer.text
        write_cameras(tmp_path, yard=yard)
        path.write_text(path.read_text() + "sentiment: other\n")
        answer = post(server, "/api/reload", {})
        assert answer.json()["error"].startswith("sentiment: changed, and only sources can")
        write_cameras(tmp_path, yard=yard, hall=hall)
        assert post(server, "/api/reload", {}).json() == {"changes": "nothing has changed"}
    with running({}, cameras=path, journal=journal):  # it is the journal of the new cameras
        pass


def test_a_camera_is_turned_off_and_on(cameras, fake_recognizer, follow, tmp_path):
    fake_recognizer()
    gate, yard, _ = cameras.values()
    path = write_cameras(tmp_path, gate=gate, yard=yard)
    journal, audit = tmp_path / "journal", tmp_path / "audit.jsonl"
    with running({}, cameras=path, journal=journal, audit=audit) as server:
        wait_for(lambda: stats(server, "gate").is_connected and stats(server, "yard").is_connected)
        for name in ("gate", "yard"):  # also all of them
            answer = post(server, "/api/turn", {"camera": name, "on": False})
            assert answer.json() == {"camera": name, "on": False}
        wait_for(
            lambda: (
                not stats(server, "gate").is_connected and not stats(server, "yard").is_connected
            )
        )
        assert post(server, "/api/reload", {}).json() == {"changes": "nothing has changed"}
        assert server.state.watch.off == {"gate", "yard"}
        assert post(server, "/api/turn", {"camera": "gate", "on": True}).status_code == 200
        wait_for(lambda: stats(server, "gate").is_connected and gate.connections == 2)
        answer = post(server, "/api/turn", {"camera": "none", "on": True})
        assert (answer.status_code, "no camera is called 'none'" in answer.text) == (409, True)
        assert post(server, "/api/turn", {"camera": "gate"}).status_code == 400
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [x["action"] for x in lines] == ["turn off", "turn off", "reload", "turn on"]


def test_an_admin_forgets_a_phrase_while_cameras_are_watched(cameras, fake_recognizer, tmp_path):
    fake_recognizer()
    journal, audit = tmp_path / "journal", tmp_path / "audit.jsonl"
    path = write_cameras(tmp_path, gate=cameras["gate"])
    with running({}, cameras=path, journal=journal, audit=audit) as server:
        write(
            journal,
            "2025-11-25",
            text("gate", NOON, "Call Hexburn now."),
            text("gate", NOON + 9, "Hello."),
        )
        index = server.state.indexer.index
        wait_for(lambda: index.search("hexburn").hits)
        found = post(server, "/api/forget", {"text": "Hexburn", "dry_run": True}).json()
        assert found["lines"] == 1
        assert index.search("hexburn").hits
        assert post(server, "/api/forget", {"text": "Hexburn"}).json()["lines"] == 1
        wait_for(lambda: not index.search("hexburn").hits)
        assert len(index.search("", after=NOON, before=NOON + 60).hits) == 1
        wrong: Any
        for wrong in ({}, {"before": "soon"}, {"text": "..."}, {"what": 1}, {"camera": 1}, []):
            assert post(server, "/api/forget", wrong).status_code == 400
        wait_for(lambda: texts(journal, "gate"))  # it goes on
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hexburn" not in everything.lower()
    line = json.loads(audit.read_text().splitlines()[-1])
    assert (line["action"], line["phrase"], line["found"]["lines"]) == ("forget", True, 1)


def test_an_admin_forgets_in_the_journal_of_a_monitor_beside(fake_recognizer, tmp_path):
    fake_recognizer()
    journal = tmp_path / "journal"
    write(journal, "2025-11-25", text("gate", NOON, "Call Hexburn now."))
    with running(journal=journal) as server:
        assert post(server, "/api/forget", {"camera": "gate"}).json()["lines"] == 1
        wait_for(lambda: not server.state.indexer.index.search().hits)
        assert post(server, "/api/reload", {}).status_code == 404


def test_nobody_but_an_admin_changes_anything(fake_recognizer, tmp_path):
    fake_recognizer()
    tokens, journal = tmp_path / "tokens.json", tmp_path / "journal"
    given = {role: Tokens(tokens).add(role.name.lower(), role) for role in Role}
    write(journal, "2025-11-25", text("gate", time.time() - 60, "Call Hexburn now."))
    with running(tokens=tokens, journal=journal) as server:
        for path in ("/api/forget", "/api/reload", "/api/turn"):
            assert httpx.get(server.url + path).status_code == 401
            for role in (Role.VIEWER, Role.OPERATOR):
                bearer = {"Authorization": f"Bearer {given[role]}"}
                assert post(server, path, {"camera": "gate"}, headers=bearer).status_code == 403
        with httpx.Client(base_url=server.url) as client:
            client.post("/login", json={"token": given[Role.ADMIN]})
            answer = client.post("/api/forget", json={"camera": "gate"})
            assert (answer.status_code, "CSRF" in answer.text) == (403, True)
        wait_for(lambda: len(server.state.indexer.index.search().hits) == 1)
