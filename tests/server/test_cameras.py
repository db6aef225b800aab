"""Cameras in the process of the server: their text, their journal, the end by a signal."""

import asyncio
import json
import signal
import sys
from typing import Any

import httpx
import pytest
import yaml
from conftest import write_media
from support.children import Command
from support.servers import SpokenEngine, running
from support.sources import Server, transport_stream
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.monitoring import Partial, Transcript
from mmtransfer.monitoring.loading import Recognizers, resolve_models
from mmtransfer.server.cameras import camera_options
from mmtransfer.server.models import open_models
from mmtransfer.server.options import ServerOptions
from mmtransfer.server.shared import Urgency
from mmtransfer.speech.engine import DecodingOptions
from mmtransfer.speech.recognition import Recognizer


def cameras_file(folder, url, **options):
    path = folder / "cameras.yaml"
    content = {"cameras": [{"name": "gate", "url": url, "keywords": ["fitter"]}], **options}
    path.write_text(yaml.safe_dump(content))
    return path


def journal_lines(folder):
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_cameras_and_requests_share_a_recogniser(whisper_tiny, speech, tmp_path, monkeypatch):
    camera = Server([transport_stream(speech), 3600.0])
    path = cameras_file(tmp_path, camera.url, threads=1, beam_size=1)
    recording = write_media(tmp_path / "gate.ogg", speech)
    with running(
        {"site": "bundled:whisper-tiny.en"},
        cameras=path,
        journal=tmp_path / "journal",
        threads=1,
        beam_size=1,
    ) as server:
        models = server.state.models
        assert list(models._shared.values()) == [models.speech["site"]]  # one for both
        form: dict[str, Any] = {"files": {"file": recording.open("rb")}, "data": {"model": "site"}}
        answer = httpx.post(f"{server.url}/v1/audio/transcriptions", timeout=120, **form)
        assert len(answer.json()["text"].split()) > 15
        wait_for(lambda: server.state.stats.lines >= 2)
        numbers = httpx.get(f"{server.url}/metrics").text
        assert 'mmtransfer_connected{camera="gate"} 1.0' in numbers
        assert "mmtransfer_places_taken 0.0" in numbers
    camera.close()
    texts = [line["text"] for line in journal_lines(tmp_path / "journal") if "text" in line]
    assert any("gate" in text.casefold() for text in texts)


class Opened:
    """Recognisers that were opened, with a model whose training was in German."""

    def __init__(self, monkeypatch):
        self.options: list[dict[str, Any]] = []
        monkeypatch.setattr("mmtransfer.server.models.open_recognizer", self.open)

    def open(self, checkpoint, *, language, **options):
        self.options.append(options)
        engine: Any = SpokenEngine()
        engine.language, engine.own_language = language, "de"
        return Recognizer(engine)

    def doors(self, folder, models, content, **given):
        """What the cameras of a file decode with, by name, and a request's door."""
        path = folder / "cameras.yaml"
        path.write_text(yaml.safe_dump(content))
        options = ServerOptions(models, cameras=path, **given)
        watched = camera_options(options)
        assert watched is not None
        opened = open_models(options, watched)
        found = resolve_models(watched, watched.cameras())
        recognizers = Recognizers(watched, found, watched.cameras(), opened.open_speech)
        doors = recognizers.own(watched.cameras())
        doors |= {"": recognizers.open(watched.model, watched.language)}
        return doors, opened.recognizer(None).open(Urgency.REQUEST)


CAMERAS: list[dict[str, Any]] = [
    {"name": "gate", "url": "tcp://127.0.0.1:9", "language": "fr"},
    {"name": "yard", "url": "tcp://127.0.0.1:8"},
]


@pytest.mark.parametrize("named", [True, False])
def test_a_recogniser_is_as_the_file_of_cameras_says(named, whisper_tiny, tmp_path, monkeypatch):
    opened, own = Opened(monkeypatch), {"engine": "transformers", "threads": 1, "beam_size": 2}
    model = "bundled:whisper-tiny.en"
    content = {"cameras": CAMERAS, "model": model, "context_s": 7.0, "prompt": "Brannock", **own}
    doors, request = opened.doors(tmp_path, {"site": model} if named else {}, content, device="cpu")
    [options] = opened.options  # one for both
    assert options.pop("options") == DecodingOptions(2, 0.0)
    assert options == {"engine": "transformers", "threads": 1, "device": "cpu"} | {
        "compute_type": None
    }
    assert {name: door.shortest_context_s for name, door in doors.items()} == {"gate": 7.0, "": 7.0}
    assert request.shortest_context_s is None
    assert {name: door.engine.spoken for name, door in doors.items()} == {
        "gate": ("fr", "Brannock"),
        "": ("de", "Brannock"),  # as the model was trained
    }
    assert (request.engine.language, request.engine.spoken) == ("auto", (None, ""))


def test_cameras_with_other_options_have_a_recogniser_of_their_own(
    whisper_tiny, tmp_path, monkeypatch
):
    opened, model = Opened(monkeypatch), "bundled:whisper-tiny.en"
    content = {"cameras": CAMERAS, "model": model, "beam_size": 2}
    doors, request = opened.doors(tmp_path, {"site": model}, content, beam_size=3, language="de")
    assert [options["options"].beam_size for options in opened.options] == [3, 2]
    assert request._shared is not doors[""]._shared
    assert doors[""]._shared is doors["gate"]._shared


def test_the_language_of_one_camera_is_not_that_of_others(
    whisper_tiny, random_whisper, tmp_path, monkeypatch
):
    opened = Opened(monkeypatch)
    content = {"cameras": CAMERAS, "model": "bundled:whisper-tiny.en"}
    doors, request = opened.doors(tmp_path, {"other": str(random_whisper)}, content)
    assert len(opened.options) == 2
    assert doors["gate"].engine.spoken == ("fr", "")
    assert doors[""].engine.spoken == ("de", "")
    assert {door.engine.language for door in (request, *doors.values())} == {"auto"}
    doors, _ = opened.doors(tmp_path, {"site": content["model"]}, content, language="it")
    assert doors[""].engine.spoken == ("it", "")  # as everybody is told


def test_what_cameras_say_reaches_all_who_follow(fake_recognizer, speech, tmp_path):
    fake_recognizer()
    stream = transport_stream(speech)
    part = len(stream) // 40  # at once there would be no time for provisional texts
    script = [(stream[start : start + part], 0.1) for start in range(0, len(stream), part)]
    camera = Server([2.0, *(item for pair in script for item in pair), 3600.0])
    path = cameras_file(tmp_path, camera.url, model="bundled:whisper-tiny.en")

    async def follow(live):
        found: list[Any] = []
        with live.follow() as one, live.follow() as other:
            while not any(isinstance(item, Transcript) for item in found):
                found.append(await asyncio.wait_for(one.next(), 60))
            again = [await asyncio.wait_for(other.next(), 60) for _ in found]
        assert found == again
        return found

    with running({}, cameras=path) as server:
        assert server.state.models.names == ["whisper-tiny.en"]
        found = asyncio.run(follow(server.state.live))
        assert {item.camera for item in found} == {"gate"}
        assert any(isinstance(item, Partial) for item in found)
    camera.close()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_with_everything_kept(number, whisper_tiny, speech, tmp_path):
    camera = Server([transport_stream(speech), 3600.0])
    path = cameras_file(tmp_path, camera.url, model="bundled:whisper-tiny.en")
    command = ["serve", "--cameras", str(path), "--journal", str(tmp_path / "journal")]
    command += ["--port", "0", "--threads", "1", "--beam", "1"]
    with Command(*command) as process:
        wait_for(lambda: len(journal_lines(tmp_path / "journal")) > 3)
        if number == signal.SIGTERM:  # its file is loaded again first, then a broken one
            content = yaml.safe_load(path.read_text())
            content["cameras"].append({"name": "yard", "url": "tcp://127.0.0.1:9"})
            path.write_text(yaml.safe_dump(content))
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: "yard" in str(journal_lines(tmp_path / "journal")))
            path.write_text("cameras: 5")
            process.send_signal(signal.SIGHUP)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
    camera.close()
    assert "serving at http://127.0.0.1:" in errors
    assert "gate: connected" in errors
    if number == signal.SIGTERM:
        assert "cameras reloaded: new: yard" in errors
        assert f"the cameras go on as they were: {path}: expected" in errors
    assert "Traceback" not in errors
    lines = [line for line in journal_lines(tmp_path / "journal") if "avg_logprob" in line]
    assert len({line["id"] for line in lines}) >= 2


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "cameras.yaml"
    for arguments, message in (
        ([], "expected --model NAME=MODEL, --cameras FILE.yaml or --index, found none"),
        (["--model", "a=b", "--model", "a=c"], "--model: the name 'a' is given twice"),
        (["--model", "=b"], "expected a name before '='"),
        (["--cameras", str(path)], "cameras.yaml"),
        (["--model", "a=b", "--journal", str(path)], "expected the folder of a journal"),
        (["--model", "a=b", "--port", "0", "--index", "x"], "index: expected --journal DIR"),
        (["--model", "a=b", "--wyoming", "70000"], "wyoming: expected a port"),
        (["--model", "a=b", "--port", "x"], "argument --port: invalid int value"),
        (["--model", f"a={tmp_path / 'none'}", "--port", "0"], "none"),
    ):
        assert main(["serve", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mmtransfer.server.serve", raising=False)
    assert main(["serve", "--model", "a=bundled:whisper-tiny.en"]) == 2
    assert "serve needs uvicorn. pip install 'mmtransfer[server]'" in capsys.readouterr().err
