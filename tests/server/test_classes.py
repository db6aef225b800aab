"""Hugging Face's own client on classifiers of texts and of sounds."""

import httpx
import pytest
from conftest import WORDS, tone, write_media, write_text_backbone, write_wave_backbone
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from support.servers import running

from mmtransfer.config import DataConfig, HeadConfig
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.server.models import Models
from mmtransfer.sound.classifier import load_sound_model, new_sound_model
from mmtransfer.text.classifier import load_text_model
from mmtransfer.text.ensemble import write_ensemble


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random classifiers of texts and of sounds."""
    folder = tmp_path_factory.mktemp("classifiers")
    news = write_text_backbone(folder / "news", labels=3)
    wave = write_wave_backbone(folder / "wave")
    sounds = new_sound_model(
        resolve(str(wave)),
        ["alarm", "glass", "dog"],
        is_multi=False,
        data=DataConfig(window_seconds=1.0),
        head=HeadConfig(),
    )
    sounds.save(folder / "sounds", "full")
    return {"news": str(news), "sounds": str(folder / "sounds")}


@pytest.fixture(scope="module")
def served(models):
    with running(models, max_audio_s=30) as server:
        yield server


@pytest.fixture(autouse=True)
def _on_line(monkeypatch):
    """The client refuses this machine's own server, too, while the Hub must not be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def client_of(served, model):
    return InferenceClient(model=f"{served.url}/models/{model}", token="none")


def test_texts_get_the_classes_that_predict_finds(served, models):
    text = " ".join(WORDS[:6])
    [expected] = load_text_model(resolve(models["news"])).predict([text])
    found = client_of(served, "news").text_classification(text)
    assert {one.label: one.score for one in found} == pytest.approx(expected.probabilities)
    assert found[0].label == expected.label
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    best = client_of(served, "news").text_classification(text, top_k=1)
    assert [one.label for one in best] == [expected.label]
    batch = ["good rain", {"text": "bad news", "text_pair": "news"}, text]
    answer = httpx.post(f"{served.url}/models/news", json={"inputs": batch}).json()
    assert len(answer) == 3
    assert {one["label"]: one["score"] for one in answer[2]} == pytest.approx(
        expected.probabilities
    )


def test_several_classifiers_in_one_are_served_as_well(models, tmp_path):
    members = {name: resolve(models["news"]) for name in ("one", "two")}
    loaded = [load_text_model(found) for found in members.values()]
    write_ensemble(tmp_path / "both", list(members.values()), loaded, [0.5, 0.5])
    served, text = Models(), " ".join(WORDS[:6])
    found = resolve(str(tmp_path / "both"))
    served.add("both", found, RecognitionOptions("both"))
    [verdict], [expected] = served.texts["both"].predict([text]), loaded[0].predict([text])
    assert verdict.probabilities == pytest.approx(expected.probabilities, abs=1e-4)


def test_sounds_get_the_classes_that_predict_finds(served, models, tmp_path):
    path = write_media(tmp_path / "tone.flac", tone(2.0))
    [expected] = load_sound_model(resolve(models["sounds"])).predict([path])
    for given in (path, path.read_bytes()):
        found = client_of(served, "sounds").audio_classification(given)
        assert {one.label: one.score for one in found} == pytest.approx(expected.probabilities)
    best = client_of(served, "sounds").audio_classification(path, top_k=1)  # as JSON
    assert [one.label for one in best] == [expected.label]
    assert not list(served.state.uploads.folder.iterdir())


@pytest.mark.parametrize(
    ("model", "body", "status", "message"),
    [
        ("other", b"{}", 404, "no classifier 'other' is served; known: news, sounds"),
        ("news", b"{", 400, "expected JSON"),
        ("news", b"[" * 100_000, 400, "expected JSON"),
        ("news", b"{}", 400, 'expected {"inputs"'),
        ("news", b'{"inputs": []}', 400, "inputs: expected 1 to 1024 texts, found 0"),
        ("news", b'{"inputs": [3]}', 400, "inputs: expected texts"),
        ("news", b'{"inputs": "a", "parameters": {"top_k": 0}}', 400, "top_k: expected"),
        ("sounds", b'{"inputs": "a!"}', 400, "inputs: expected a recording in base64"),
        ("sounds", b'{"inputs": "aaaa"}', 400, "file: not a readable video or audio file"),
        ("sounds", b'{"inputs": ""}', 400, "file: the file is empty"),
    ],
)
def test_bad_input_is_one_line(model, body, status, message, served):
    kind = {"Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/models/{model}", content=body, headers=kind)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert "/tmp" not in answer.text
    assert not list(served.state.uploads.folder.iterdir())


def test_the_client_shows_what_was_wrong(served):
    with pytest.raises(HfHubHTTPError, match="file: not a readable video or audio file"):
        client_of(served, "sounds").audio_classification(b"nothing at all")
