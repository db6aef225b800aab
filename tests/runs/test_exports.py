"""Runs in the formats of other engines: the same on real input, used without this package."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import child_environment, tone, write_media, write_text_backbone, write_wave_backbone

from mmtransfer.config import DataConfig, HeadConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.metadata import Base, Metadata
from mmtransfer.runs import exports
from mmtransfer.runs.exports import export
from mmtransfer.runs.models import load
from mmtransfer.runs.snippets import PLACE, onnx_snippet, snippet
from mmtransfer.speech.ctc import new_ctc_model
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.text.classifier import new_text_model

pytest.importorskip("onnxruntime")
LABELS = ["bad", "good"]

# Runs the Python of a card where neither this package nor torch can be imported, on a folder in the
# place of a download.
ALONE = """
import json, sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("mmtransfer", "torch"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
code, folder = json.load(sys.stdin)
import huggingface_hub
huggingface_hub.snapshot_download = lambda *_, **__: folder
exec(compile(code, "card", "exec"), {"__name__": "__main__"})
"""


def alone(code: str, folder, place) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=place,
        env=child_environment(),
        input=json.dumps([code.replace(PLACE, "user/model"), str(folder)]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(HeadConfig(), marks=pytest.mark.slow),
        pytest.param(HeadConfig(type="native"), marks=pytest.mark.slow),
        HeadConfig(layers="all", pooling="attention", conv_layers=1, batch_norm=True, relu=True),
    ],
    ids=["linear", "native", "mixed"],
)
def test_texts_as_onnx(head, tmp_path):
    base = write_text_backbone(tmp_path / "base")
    model = new_text_model(resolve(str(base)), LABELS, data=DataConfig(), head=head)
    model.network.eval()
    model.temperature = 0.5
    model.save(tmp_path / "model", "full")
    made = export(tmp_path / "model", tmp_path / "to" / "onnx", "onnx")
    assert made.examples == 3
    found = ast.literal_eval(alone(made.usage, tmp_path / "to", tmp_path))
    loaded: Any = load(str(tmp_path / "model"))
    assert found == pytest.approx(loaded.predict(["A text."])[0].probabilities, abs=1e-4)


def test_the_code_of_a_card_says_how_much_one_pass_takes():
    """What is beyond is decoded in windows by mmtransfer alone."""
    head = HeadConfig(type="classifier", layers="last").model_dump(mode="json")
    sound = Metadata("sound", "full", Base("x"), labels=LABELS, head=head, window_s=5.0)
    text = {"max_tokens": 64, "long_texts": "windows"}
    sentiment = Metadata("sentiment", "full", Base("x"), labels=LABELS, head=head, text=text)
    for code, expected in (
        (snippet(sound, "wav2vec2"), "up to 5 s"),
        (onnx_snippet(sound), "up to 5 s"),
        (snippet(sentiment, "bert"), "A text of one window"),
        (onnx_snippet(sentiment), "A text of one window"),
        (onnx_snippet(replace(sentiment, text={"max_tokens": 64})), "Tokenizer.from_file"),
    ):
        assert code is not None
        assert expected in code
        compile(code, "card", "exec")


@pytest.mark.parametrize("kind", ["wav2vec2", pytest.param("wavlm", marks=pytest.mark.slow)])
def test_ctc_as_onnx(kind, tmp_path):
    base = write_wave_backbone(tmp_path / "base", kind)
    model = new_ctc_model(resolve(str(base)), ["ab cd"], head=HeadConfig())
    model.network.eval()
    model.save(tmp_path / "model", "full")
    made = export(tmp_path / "model", tmp_path / "to" / "onnx", "onnx")
    write_media(tmp_path / "recording.wav", tone(1.5))
    found = alone(made.usage, tmp_path / "to", tmp_path)
    loaded: Any = load(str(tmp_path / "model"))
    assert found == Recognizer(loaded).transcribe([tone(1.5)])[0].text


def test_an_export_that_gives_something_else_is_not_kept(tmp_path, monkeypatch):
    base = write_text_backbone(tmp_path / "base")
    model = new_text_model(resolve(str(base)), LABELS, data=DataConfig(), head=HeadConfig())
    model.save(tmp_path / "model", "full")
    # A graph that is sure of the first class, whatever it gets.
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: None)
    monkeypatch.setattr(exports, "session", lambda path: lambda **_: np.array([[9.0, 0.0]]))
    with pytest.raises(UserError, match="does not give what it gives here"):
        export(tmp_path / "model", tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(UserError, match="ct2 is for Whisper"):
        export(tmp_path / "model", tmp_path / "ct2", "ct2")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(tmp_path / "model", tmp_path / "there", "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ct2", "onnx"])
def test_a_whisper_gives_the_same_text(kind, whisper_tiny, tmp_path):
    made = export(whisper_tiny, tmp_path / "to" / kind, kind)
    assert made.examples == 3
