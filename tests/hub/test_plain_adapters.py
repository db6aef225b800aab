"""Adapters as peft writes them are models, on the base that they name."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    TEXT_ARCHITECTURES,
    tone,
    write_dataset,
    write_text_backbone,
    write_wave_backbone,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs.models import load
from mmtransfer.speech.ctc import load_ctc_model
from mmtransfer.speech.engines_ctranslate2 import converted
from mmtransfer.speech.whisper import SpeechModel, load_speech_model
from mmtransfer.text.classifier import TextModel, load_text_model


def write_adapter(model, folder, base, **options):
    """A random LoRA of attention, as published: weights, configuration, a card."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, init_lora_weights=False, **options)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


@pytest.fixture(scope="module")
def whisper_adapter(random_whisper, tmp_path_factory):
    from transformers import WhisperForConditionalGeneration

    folder = tmp_path_factory.mktemp("adapter")
    model = WhisperForConditionalGeneration.from_pretrained(random_whisper)
    adapted = write_adapter(model, folder, random_whisper, target_modules=["q_proj", "v_proj"])
    return folder, adapted.merge_and_unload()


def renamed(folder, target, **settings):
    """A copy of an adapter that says something else of itself."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


def test_a_speech_adapter_is_its_base_with_the_adapter_in_it(whisper_adapter, random_whisper):
    folder, merged = whisper_adapter
    model = load(str(folder))
    assert isinstance(model, SpeechModel)
    found = model.model.state_dict()
    base = load_speech_model(str(random_whisper)).model.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    changed = "model.encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(found[changed], base[changed])


def test_every_command_takes_a_speech_adapter(whisper_adapter, tmp_path, capsys):
    folder = whisper_adapter[0]
    data = write_dataset(tmp_path / "data", ["gate one", "gate two"])
    assert main(["evaluate", str(folder), "--data", str(data)]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert (converted(resolve(str(folder))) / "full" / "model.bin").is_file()
    assert main(["monitor", str(folder), str(data / "clip0.wav"), "--quiet"]) == 0


@pytest.mark.slow
def test_its_identity_is_that_of_both(whisper_adapter, random_whisper, tmp_path):
    folder = whisper_adapter[0]
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    torch.save(weights, other / "adapter_model.bin")
    (other / "adapter_model.safetensors").unlink()
    digests = {resolve(str(path)).digest for path in (folder, random_whisper, other)}
    assert len(digests) == 3
    # Weights from before safetensors are the same adapter.
    one, same = (load_speech_model(str(path)).model.state_dict() for path in (folder, other))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_a_base_beside_the_adapter_is_found_by_its_relative_name(whisper_adapter, tmp_path):
    folder, merged = whisper_adapter
    base = load_speech_model(str(folder)).base
    assert not base.is_portable  # what is trained on it is saved whole
    settings = json.loads((folder / "adapter_config.json").read_text())
    shutil.copytree(settings["base_model_name_or_path"], tmp_path / "base")
    moved = renamed(folder, tmp_path / "adapter", base_model_name_or_path="../base")
    found = load_speech_model(str(moved)).model.state_dict()
    assert torch.allclose(found["proj_out.weight"], merged.state_dict()["proj_out.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": "someone/not-there"}, "someone/not-there is not available"),
        ({"base_model_name_or_path": "/no/such/folder"}, "/no/such/folder is not available"),
        ({"base_model_name_or_path": "https://me:s3cret@host/m?t=s3cret"}, "an address"),
        ({"base_model_name_or_path": "ftp://host/model"}, r"an address \(ftp://host/model\)"),
        ({"base_model_name_or_path": None}, "expected the model it was made for"),
        ({"base_model_name_or_path": ""}, "expected the model it was made for"),
        ({"base_model_name_or_path": "."}, "expected a whole model"),
        ({"revision": 3}, "expected the model it was made for"),
        ({"peft_type": "PROMPT_TUNING"}, "cannot be loaded as an adapter"),
    ],
)
def test_an_adapter_without_its_base_is_one_line(whisper_adapter, tmp_path, settings, message):
    folder = renamed(whisper_adapter[0], tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=message) as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value)
    assert "adapter" in str(error.value)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_text_adapter_brings_its_output_layer(tmp_path, kind):
    from transformers import AutoModelForSequenceClassification

    assert kind in TEXT_ARCHITECTURES
    base = write_text_backbone(tmp_path / "base", kind)  # without one
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    modules = ["q_lin"] if kind == "distilbert" else ["query"]
    adapted = write_adapter(
        model, tmp_path / "adapter", base, task_type="SEQ_CLS", target_modules=modules
    )
    found = load(str(tmp_path / "adapter"))
    assert isinstance(found, TextModel)
    assert found.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    inputs = found.tokenizer("the harbour is good", return_tensors="pt")
    expected = adapted.eval()(**inputs).logits.softmax(-1)[0].tolist()
    (verdict,) = found.predict(["the harbour is good"])
    assert list(verdict.probabilities.values()) == pytest.approx(expected, abs=1e-5)


def test_a_text_adapter_on_a_classifier_has_its_classes(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    base = write_text_backbone(tmp_path / "base", labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    write_adapter(model, tmp_path / "adapter", base, target_modules=["query", "value"])
    assert load_text_model(resolve(str(tmp_path / "adapter"))).labels == ["LABEL_0", "LABEL_1"]
    assert main(["predict", str(tmp_path / "adapter"), "--text", "good news"]) == 0
    assert "LABEL_" in capsys.readouterr().out


def test_a_text_adapter_without_any_output_layer_is_refused(tmp_path):
    from transformers import AutoModel

    base = write_text_backbone(tmp_path / "base")
    model = AutoModel.from_pretrained(base)
    write_adapter(model, tmp_path / "adapter", base, target_modules=["query", "value"])
    with pytest.raises(UserError, match="no output layer"):
        load(str(tmp_path / "adapter"))


def test_a_ctc_adapter_is_a_recogniser(tmp_path):
    from transformers import AutoConfig, AutoModelForCTC

    base = write_wave_backbone(tmp_path / "base")
    config = AutoConfig.from_pretrained(base, vocab_size=5, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCTC.from_config(config).save_pretrained(base)
    (base / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}))
    model = AutoModelForCTC.from_pretrained(base)
    adapted = write_adapter(model, tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    found = load_ctc_model(resolve(str(tmp_path / "adapter")))
    assert found.symbols[3:] == ["a", "b"]
    merged = adapted.merge_and_unload().state_dict()
    own = found.network.encoder.model.state_dict()
    name = "encoder.layers.0.attention.q_proj.weight"
    assert torch.allclose(own[name], merged[f"wav2vec2.{name}"], atol=1e-6)
    assert found.inputs([tone(1.0).astype(np.float32)], 1.0)
