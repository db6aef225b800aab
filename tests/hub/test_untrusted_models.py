"""Models made to do harm, or damaged: their code, their numbers, their weights."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    WHISPER_TOKENS,
    random_text_model,
    random_token,
    write_media,
    write_text_backbone,
    write_texts,
    write_wave_backbone,
)
from safetensors.torch import load_file, save_file
from support.hub_programs import TOKEN, environment
from support.hub_server import Hub

from mmtransfer import load
from mmtransfer.cli import main
from mmtransfer.config import DataConfig, HeadConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.loading import loading
from mmtransfer.speech.engines_ctranslate2 import converted
from mmtransfer.speech.generation import check_generation
from mmtransfer.speech.whisper import SpeechModel, load_speech_model
from mmtransfer.text.classifier import load_text_model, new_text_model
from mmtransfer.transfer.adapters import add_adapter

ANSWER = "y\n"


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """Standard input that would consent to anything."""
    path = tmp_path / "answer"
    path.write_text(ANSWER)
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield file


@pytest.fixture(scope="module")
def recording(speech, tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("recording") / "gate.wav", speech)


def change(path, **values):
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}), encoding="utf-8")


def finished(source, folder, form, base=None):
    """A transfer from a local source, which names that, or `base`, as what it stands on."""
    model = new_text_model(
        resolve(str(source)), ["a", "b"], data=DataConfig(), head=HeadConfig(type="classifier")
    )
    adapted = None
    if form == "adapter":
        adapted = add_adapter(model.network.encoder.model, {"type": "lora", "r": 2})
    folder.mkdir()
    model.save(folder, form, adapted)
    change(folder / "mmtransfer.json", base={"source": str(base or source)})
    return folder


def refusal(argv, capsys):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("converting ")]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("mmtransfer: error: ")
    return lines[0]


# --- code -----------------------------------------------------------------------------------------


@pytest.fixture
def coded(tmp_path, text_backbone):
    """A text model of an architecture of its own, whose code leaves a mark where it is run."""
    folder = tmp_path / "coded"
    shutil.copytree(text_backbone, folder)
    (folder / "x.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    kinds = ("Config", "Model", "ModelForSequenceClassification", "ModelForCTC", "FeatureExtractor")
    change(
        folder / "config.json",
        model_type="unheard",
        architectures=["UnheardForSequenceClassification"],
        auto_map={f"Auto{kind}": "x.C" for kind in kinds},
    )
    return folder


def command(name, coded, text_backbone, recording, folder):
    """A command line that leads to the coded model."""
    if name in ("head", "adapter"):
        model = finished(text_backbone, folder / "model", name, base=coded)
        return ["predict", model, "--text", "good"]
    if name == "named by an adapter":
        model = finished(text_backbone, folder / "model", "full")
        (model / "config.json").unlink()
        change(model / "adapter_config.json", base_model_name_or_path=str(coded), peft_type="LORA")
        return ["predict", model, "--text", "good"]
    if name == "feature extractor":
        model = write_wave_backbone(folder / "wave")
        change(model / "config.json", architectures=["Wav2Vec2ForCTC"], vocab_size=3)
        change(model / "vocab.json", **{"<pad>": 0, "a": 1, "|": 2})
        weights = load_file(model / "model.safetensors")
        weights |= {"lm_head.weight": torch.zeros(3, 32), "lm_head.bias": torch.zeros(3)}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(coded / "x.py", model)
        (model / "preprocessor_config.json").unlink()
        auto_map = {"AutoFeatureExtractor": "x.C"}
        change(model / "preprocessor_config.json", auto_map=auto_map)
        return ["monitor", model, recording]
    if name == "camera":
        table = folder / "cameras.yaml"
        rows = [{"name": "gate", "url": str(recording), "model": str(coded)}]
        table.write_text(yaml.safe_dump({"cameras": rows}))
        return ["monitor", "bundled:whisper-tiny.en", "--cameras", table]
    if name == "train":
        config = folder / "config.yaml"
        data = {"train": str(write_texts(folder / "texts.csv", 20))}
        values = {"task": "sentiment", "source_model": str(coded), "data": data}
        config.write_text(yaml.safe_dump({**values, "run_dir": str(folder / "run")}))
        return ["train", config]
    return {
        "predict": ["predict", coded, "--text", "good"],
        "evaluate": ["evaluate", coded, "--data", write_texts(folder / "texts.csv", 4)],
        "monitor": ["monitor", coded, recording],
        "standard input": ["monitor", coded, "-"],
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "predict",
        "evaluate",
        "monitor",
        "standard input",
        "train",
        "camera",
        "head",
        "adapter",
        "named by an adapter",
        "feature extractor",
    ],
)
def test_code_that_comes_with_a_model_is_never_run_and_nobody_is_asked(
    name, coded, text_backbone, recording, tmp_path, answered, capsys
):
    message = refusal(command(name, coded, text_backbone, recording, tmp_path), capsys)
    assert not (tmp_path / "mark").exists()
    assert answered.read() == ANSWER  # standard input is data
    if name == "named by an adapter":
        assert "config.json" in message
    else:
        folder = tmp_path / ("wave" if name == "feature extractor" else "coded")
        assert f"{folder}: it asks for code of its own (auto_map)" in message


def test_a_known_architecture_is_loaded_without_the_code_beside_it(
    coded, tmp_path, answered, capsys
):
    model = write_text_backbone(tmp_path / "known", labels=2)
    shutil.copy(coded / "x.py", model)
    auto_map = json.loads((coded / "config.json").read_text())["auto_map"]
    change(model / "config.json", auto_map=auto_map)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.C", "x.C"]})
    assert main(["predict", str(model), "--text", "good"]) == 0
    assert not (tmp_path / "mark").exists()
    assert answered.read() == ANSWER


def test_a_whisper_does_not_load_a_model_that_its_processor_names(
    coded, random_whisper, tmp_path, answered
):
    model = tmp_path / "whisper"
    shutil.copytree(random_whisper, model)
    named = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(coded)}
    change(model / "processor_config.json", audio_tokenizer=named)
    loaded = load(str(model))
    assert isinstance(loaded, SpeechModel)
    assert loaded.max_context_s == 30.0
    assert not (tmp_path / "mark").exists()
    assert answered.read() == ANSWER


def test_what_a_library_loads_unasked_is_refused_without_a_question(coded, tmp_path, answered):
    """Inside transformers a model's parts are loaded without the word that forbids their code."""
    from transformers import AutoModel

    with (
        pytest.raises(UserError, match="asks for code of its own") as refused,
        loading("this", "a model", tmp_path),
    ):
        AutoModel.from_pretrained(coded)
    assert str(tmp_path) in str(refused.value)
    assert not (tmp_path / "mark").exists()
    assert answered.read() == ANSWER


def test_attention_from_a_repository_is_refused(text_backbone, tmp_path, capsys):
    model = write_text_backbone(tmp_path / "kernel", labels=2)
    for key in ("attn_implementation", "_attn_implementation"):
        shutil.copytree(model, tmp_path / key)
        change(tmp_path / key / "config.json", **{key: "evil/kernel"})
        message = refusal(["predict", tmp_path / key, "--text", "good"], capsys)
        assert f"{key}: expected eager or sdpa, found 'evil/kernel'" in message


def test_code_in_a_second_repository_is_not_downloaded(coded, tmp_path):
    served = Hub(TOKEN)
    code = tmp_path / "code"
    code.mkdir()
    shutil.move(coded / "x.py", code)
    config = json.loads((coded / "config.json").read_text())
    change(
        coded / "config.json",
        auto_map={kind: f"evil/code--{name}" for kind, name in config["auto_map"].items()},
    )
    served.put("evil/model", coded)
    served.put("evil/code", code)
    result = subprocess.run(
        [sys.executable, "-m", "mmtransfer.cli", "predict", "evil/model", "--text", "good"],
        env=environment(served.endpoint, tmp_path / "home"),
        input=ANSWER,
        capture_output=True,
        text=True,
    )
    served.close()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "it asks for code of its own (auto_map), which is never run" in result.stderr
    assert any("evil/model" in path for _, path in served.requests)
    assert not [path for _, path in served.requests if "evil/code" in path or ".py" in path]
    assert not (tmp_path / "mark").exists()


# --- numbers that become places in memory ---------------------------------------------------------


@pytest.fixture
def whisper(random_whisper, tmp_path):
    """A copy of the random Whisper, to change."""
    folder = tmp_path / "whisper"
    shutil.copytree(random_whisper, folder)
    return folder


_LAST = WHISPER_TOKENS - 1
MULTILINGUAL = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": random_token(50258)},
    "task_to_id": {"transcribe": random_token(50358)},
}


@pytest.mark.parametrize(
    ("file", "field", "value", "found"),
    [
        ("generation_config", "suppress_tokens", [1, 1_000_000_000], "1000000000"),
        *(
            pytest.param("generation_config", *case, marks=pytest.mark.slow)
            for case in (
                ("begin_suppress_tokens", [-1_000_000_000], "-1000000000"),
                ("no_timestamps_token_id", 1_000_000, "1000000"),
            )
        ),
        ("generation_config", "lang_to_id", {"<|en|>": 1_000_000}, "1000000"),
        ("config", "decoder_start_token_id", 1_000_000, "1000000"),
    ],
)
def test_tokens_that_a_whisper_does_not_have_are_refused(
    file, field, value, found, whisper, recording, capsys
):
    converted(resolve(str(whisper)))  # what was converted before is no way around it
    path = whisper / f"{file}.json"
    extra = MULTILINGUAL if field == "lang_to_id" else {}
    change(path, **{**extra, field: value})
    options = ["--language", "en"] * bool(extra)
    with pytest.raises(UserError) as refused:
        load(str(whisper), language="en" if extra else None)
    assert f"{path}: {field}: expected a token id from 0 to {_LAST}, found {found}. " in str(
        refused.value
    )
    message = refusal(["monitor", whisper, recording, *options], capsys)
    assert message == f"mmtransfer: error: {refused.value}"


@pytest.fixture(scope="module")
def loaded(random_whisper):
    return load_speech_model(str(random_whisper))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suppress_tokens", [WHISPER_TOKENS]),
        ("suppress_tokens", [-2]),
        ("suppress_tokens", "all"),
        ("suppress_tokens", [1.0]),
        ("suppress_tokens", [[1]]),
        ("suppress_tokens", [True]),
        ("suppress_tokens", [10**30]),
        ("begin_suppress_tokens", [None]),
        ("no_timestamps_token_id", None),
        ("no_timestamps_token_id", -1),
        ("decoder_start_token_id", WHISPER_TOKENS),
        ("eos_token_id", [1, -1]),
        ("pad_token_id", WHISPER_TOKENS),
        ("bos_token_id", "1"),
        ("prev_sot_token_id", WHISPER_TOKENS),
        ("forced_decoder_ids", [[1, WHISPER_TOKENS]]),
        ("forced_decoder_ids", [1, 2]),
        ("alignment_heads", [[0]]),
        ("alignment_heads", [[0, 1.0]]),
        ("alignment_heads", ["ab"]),
        ("alignment_heads", [0, 1]),
        ("lang_to_id", {"<|en|>": WHISPER_TOKENS}),
        ("lang_to_id", [1]),
        ("task_to_id", {"transcribe": -1}),
    ],
)
def test_every_field_of_the_generation_settings_is_checked(
    field, value, loaded, random_whisper, monkeypatch
):
    monkeypatch.setattr(loaded.model.generation_config, field, value, raising=False)
    tokenizer = loaded.processor.tokenizer
    with pytest.raises(UserError, match=rf"generation_config\.json: {field}: expected .*found"):
        check_generation(loaded.model, tokenizer, random_whisper, random_whisper)


@pytest.mark.parametrize("missing", ["lang_to_id", "task_to_id"])
def test_a_multilingual_whisper_names_its_languages_and_tasks(
    missing, loaded, random_whisper, monkeypatch
):
    settings = loaded.model.generation_config
    for name, value in {**MULTILINGUAL, missing: {}}.items():
        monkeypatch.setattr(settings, name, value, raising=False)
    with pytest.raises(UserError, match=f"{missing}: expected names with their token ids"):
        check_generation(loaded.model, loaded.processor.tokenizer, random_whisper, random_whisper)


@pytest.mark.parametrize(
    "field", ["decoder_start_token_id", "eos_token_id", "bos_token_id", "pad_token_id"]
)
def test_every_token_of_the_configuration_is_checked(field, whisper):
    change(whisper / "config.json", **{field: WHISPER_TOKENS})
    found = rf"/config\.json: {field}: expected a token id .*{WHISPER_TOKENS}"
    with pytest.raises(UserError, match=found):
        load(str(whisper))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"gate": WHISPER_TOKENS},
            rf"'gate': expected a token id from 0 to {_LAST}, found {WHISPER_TOKENS}",
        ),
        (
            {"<|endoftext|>": 5},
            f"vocabulary: expected all token ids from 0 to {_LAST}, found {_LAST}",
        ),
        (
            {"<|startoftranscript|>": random_token(50258), "<|en|>": random_token(50257)},
            rf"<\|startoftranscript\|>: expected the start token, {random_token(50257)}, "
            f"found {random_token(50258)}",
        ),
    ],
)
def test_the_tokenizer_is_checked(changed, expected, loaded, random_whisper):
    vocabulary = {**loaded.processor.tokenizer.get_vocab(), **changed}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    with pytest.raises(UserError, match=rf"tokenizer\.json: {expected}"):
        check_generation(loaded.model, tokenizer, random_whisper, random_whisper)


@pytest.mark.parametrize(
    ("heads", "kept"),
    [
        ([[99, 0], [1, 1], [0, -1], [0, 2]], [[1, 1]]),
        pytest.param([[2, 0]], None, marks=pytest.mark.slow),
    ],
)
def test_heads_that_a_whisper_does_not_have_are_left_out_and_counted(
    heads, kept, whisper, recording, caplog
):
    """Distilled models come with those of their teacher; CTranslate2 crashes on them."""
    change(whisper / "generation_config.json", alignment_heads=heads)
    model = load_speech_model(str(whisper)).model
    assert model.generation_config.alignment_heads == kept
    assert main(["monitor", str(whisper), str(recording), "--words"]) == 0
    lost = len(heads) - len(kept or [])
    expected = (
        f"alignment_heads: {lost} of {len(heads)} are not in this model (layers 0 to 1, heads"
    )
    assert caplog.text.count(expected) == 2  # loaded, and converted
    written = json.loads((converted(resolve(str(whisper))) / "full" / "config.json").read_text())
    assert written["alignment_heads"] == (kept or [[1, 0], [1, 1]])


def test_settings_that_name_no_token_are_read(whisper, loaded, recording):
    settings = whisper / "generation_config.json"
    change(settings, suppress_tokens=[-1, 1], begin_suppress_tokens=[-1], alignment_heads=[])
    change(settings, forced_decoder_ids=[[1, None], [2, random_token(50362)]])
    for engine in ("ctranslate2", "transformers"):
        command = ["monitor", str(whisper), str(recording), "--engine", engine, "--words"]
        assert main(command) == 0
    written = json.loads((converted(resolve(str(whisper))) / "full" / "config.json").read_text())
    assert (written["suppress_ids"], written["suppress_ids_begin"]) == ([1], [])


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A text classifier of three layers, as a plain checkpoint."""
    return write_text_backbone(tmp_path_factory.mktemp("classifier"), labels=2)


def edited(source, folder, edit, **config):
    """A copy of a checkpoint with other weights (`edit` changes them in place) and settings."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", **config)
    return folder


def drop(part):
    def edit(weights):
        for name in [name for name in weights if part in name]:
            del weights[name]

    return edit


def put(part, value):
    def edit(weights):
        name = next(name for name in weights if part in name)
        weights[name].view(-1)[0] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "config", "expected"),
    [
        (drop("classifier"), {}, "2 of the weights that its config.json asks for are missing"),
        (drop("layer.1."), {}, "16 of the weights that its config.json asks for are missing"),
        (drop(""), {}, "are missing"),
        (drop("none"), {"num_hidden_layers": 4}, "16 of the weights"),
        (drop("none"), {"num_hidden_layers": 2}, "more layers of weights than its config.json"),
        (put("layer.1.", math.nan), {}, "values that are not finite"),
        (put("classifier", math.inf), {}, "values that are not finite"),
    ],
)
def test_a_classifier_with_weights_that_are_missing_or_no_numbers_is_refused(
    edit, config, expected, classifier, tmp_path, capsys
):
    model = edited(classifier, tmp_path / "model", edit, **config)
    assert expected in refusal(["predict", model, "--text", "good"], capsys)


@pytest.mark.parametrize(
    ("edit", "config", "expected"),
    [
        (drop("decoder.layers.1."), {}, "are missing"),
        (drop(""), {}, "are missing"),
        (drop("none"), {"encoder_layers": 5}, "are missing"),
        (drop("none"), {"decoder_layers": 1}, "more layers of weights than its config.json"),
        (put("encoder.layers.0", math.nan), {}, "values that are not finite"),
    ],
)
def test_a_recogniser_with_weights_that_are_missing_or_no_numbers_is_refused(
    edit, config, expected, random_whisper, recording, tmp_path, capsys
):
    model = edited(random_whisper, tmp_path / "model", edit, **config)
    assert expected in refusal(["monitor", model, recording], capsys)


def test_a_head_that_is_to_be_trained_may_be_missing_and_nothing_else(
    classifier, text_backbone, tmp_path
):
    native: dict[str, Any]
    native = {"labels": ["a", "b", "c"], "data": DataConfig(), "head": HeadConfig(type="native")}
    bare = edited(text_backbone, tmp_path / "bare", drop("pooler"))
    for source in (bare, classifier):  # without a head, and with one of other classes
        model = new_text_model(resolve(str(source)), **native)
        assert model.labels == ["a", "b", "c"]
    cut = edited(text_backbone, tmp_path / "cut", drop("layer.1."))
    for head in ("native", "classifier"):
        with pytest.raises(UserError, match="are missing"):
            new_text_model(resolve(str(cut)), **{**native, "head": HeadConfig(type=head)})


def test_what_no_head_reads_may_be_missing_and_is_the_same_every_time(tmp_path, text_backbone):
    """A masked language model has no pooler; the base of a head is known again all the same."""
    from transformers import AutoModelForMaskedLM

    base = tmp_path / "base"
    shutil.copytree(text_backbone, base)
    config = random_text_model("bert").config
    AutoModelForMaskedLM.from_config(config).save_pretrained(base)
    head: dict[str, Any] = {"data": DataConfig(), "head": HeadConfig(type="classifier")}
    models = [new_text_model(resolve(str(base)), ["a", "b"], **head) for _ in range(2)]
    one, other = (model.network.encoder.model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("form", "file", "edit", "expected"),
    [
        ("adapter", "adapter_model", drop(""), "Found missing adapter keys"),
        ("adapter", "adapter_model", drop("layer.1."), "Found missing adapter keys"),
        ("adapter", "adapter_model", put("lora_B", math.nan), "values that are not finite"),
        ("head", "head", put("", math.inf), "values that are not finite"),
    ],
)
def test_an_adapter_or_a_head_that_is_not_whole_is_refused(
    form, file, edit, expected, text_backbone, tmp_path, capsys
):
    model = finished(text_backbone, tmp_path / "model", form)
    assert load_text_model(resolve(str(model))).labels == ["a", "b"]
    path = model / f"{file}.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)
    assert expected in refusal(["predict", model, "--text", "good"], capsys)


def test_an_adapter_names_no_module_to_import(text_backbone, tmp_path, capsys):
    model = finished(text_backbone, tmp_path / "model", "adapter")
    change(model / "adapter_config.json", megatron_config={"a": 1}, megatron_core="megatron.x")
    message = refusal(["predict", model, "--text", "good"], capsys)
    assert "megatron_config: expected null" in message


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 5e-324, "warm", None])
def test_a_temperature_that_is_none_is_refused(value, text_backbone, tmp_path, capsys):
    model = finished(text_backbone, tmp_path / "model", "head")
    change(model / "mmtransfer.json", temperature=value)
    message = refusal(["predict", model, "--text", "good"], capsys)
    # What no JSON can hold is refused before anything is looked at.
    is_finite = not isinstance(value, float) or math.isfinite(value)
    limits = "a number from 0.001 to 1000" if is_finite else "a finite number"
    assert f"mmtransfer.json: temperature: expected {limits}" in message
