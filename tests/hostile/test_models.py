"""Models made to do harm, or damaged, by the command line: each file and each field of it."""

import io
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tone, write_media, write_text_backbone, write_wave_backbone
from safetensors.torch import load_file, save_file
from support.hostile import ABSENT, change, copied, outcome, reason, refused, rewrite

from mmtransfer.config import DataConfig, HeadConfig
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.panics import without_panics
from mmtransfer.text.classifier import new_text_model
from mmtransfer.transfer.adapters import add_adapter
from mmtransfer.transfer.resume import read_checkpoint, write_checkpoint

TEXT = ["--text", "the mayor is good"]
VALUES = [ABSENT, None, "evil", "\ud83d\x1b[2J", -1, 0, 10**9, 10**30, 1.5, math.nan, math.inf]
VALUES += [True, [], {}, [[[]]], {"a": {"b": 1}}, [-1], ["x"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory, random_whisper):
    """A small model of each kind and form."""
    root = tmp_path_factory.mktemp("models")
    write_text_backbone(root / "text", labels=2)
    for form in ("head", "adapter"):
        source = resolve(str(root / "text"))
        model = new_text_model(
            source, ["a", "b"], data=DataConfig(), head=HeadConfig(type="classifier")
        )
        adapted = None
        if form == "adapter":
            adapted = add_adapter(model.network.encoder.model, {"type": "lora", "r": 2})
        (root / form).mkdir()
        model.save(root / form, form, adapted)
        change(root / form / "mmtransfer.json", "base.source", str(root / "text"))
    ctc = write_wave_backbone(root / "ctc")
    change(ctc / "config.json", "architectures", ["Wav2Vec2ForCTC"])
    change(ctc / "config.json", "vocab_size", 3)
    rewrite(ctc / "vocab.json", '{"<pad>": 0, "a": 1, "|": 2}')
    weights = {f"wav2vec2.{k}": v for k, v in load_file(ctc / "model.safetensors").items()}
    weights |= {"lm_head.weight": torch.randn(3, 32), "lm_head.bias": torch.zeros(3)}
    save_file(weights, ctc / "model.safetensors", metadata={"format": "pt"})
    write_media(root / "tone.wav", tone(1.0))
    (root / "whisper").symlink_to(random_whisper)
    return root


def command(kind, model, models):
    if kind in ("ctc", "whisper"):
        return ["monitor", model, models / "tone.wav", "--engine", "transformers"]
    return ["predict", model, *TEXT]


FIELDS = {
    ("text", "config.json"): [
        *("model_type", "architectures", "hidden_size", "num_hidden_layers", "vocab_size"),
        *("num_attention_heads", "intermediate_size", "max_position_embeddings", "hidden_act"),
        *("type_vocab_size", "layer_norm_eps", "id2label", "label2id", "num_labels", "dtype"),
        *("pad_token_id", "problem_type", "torch_dtype", "auto_map", "quantization_config"),
        *("attn_implementation", "hidden_dropout_prob", "chunk_size_feed_forward"),
    ],
    ("text", "tokenizer_config.json"): [
        *("tokenizer_class", "model_max_length", "pad_token", "extra_special_tokens", "auto_map"),
        *("added_tokens_decoder", "backend", "chat_template", "padding_side"),
    ],
    ("text", "tokenizer.json"): [
        *("version", "model", "model.type", "model.vocab", "model.unk_token", "normalizer"),
        *("pre_tokenizer", "post_processor", "decoder", "added_tokens", "padding", "truncation"),
    ],
    ("head", "mmtransfer.json"): [
        *("format", "task", "form", "base", "base.source", "base.digest", "labels", "head"),
        *("head.type", "head.layers", "head.conv_layers", "head.conv_width", "head.pooling"),
        *("text", "text.max_tokens", "text.max_windows", "text.long_texts", "temperature"),
    ],
    ("adapter", "adapter_config.json"): [
        *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern"),
        *("alpha_pattern", "layer_replication", "init_lora_weights", "modules_to_save", "bias"),
        *("layers_to_transform", "layers_pattern", "use_dora", "megatron_config", "auto_mapping"),
    ],
    ("ctc", "config.json"): [
        *("model_type", "architectures", "hidden_size", "num_hidden_layers", "vocab_size"),
        *("conv_dim", "conv_kernel", "conv_stride", "num_feat_extract_layers", "pad_token_id"),
        *("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "feat_extract_norm"),
    ],
    ("ctc", "preprocessor_config.json"): [
        *("feature_extractor_type", "feature_size", "sampling_rate", "padding_value", "auto_map"),
        *("do_normalize", "return_attention_mask", "padding_side"),
    ],
    ("ctc", "vocab.json"): ["<pad>", "a", "|"],
}


SWEPT = [(kind, file, field) for (kind, file), fields in FIELDS.items() for field in fields]


def sweep(kind, file, field, values, models, tmp_path, capsys):
    for number, value in enumerate(values):
        model = copied(models / kind, tmp_path / str(number))
        change(model / file, field, value)
        _, out, _ = outcome(command(kind, model, models), capsys)
        assert "NaN" not in out, value


@pytest.mark.parametrize(("kind", "file", "field"), SWEPT)
def test_a_fields_wrong_values_are_an_answer_or_one_line(
    kind, file, field, models, tmp_path, capsys
):
    """Some for each field, others for the next one."""
    first = SWEPT.index((kind, file, field)) % 6
    sweep(kind, file, field, VALUES[first::6], models, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file", "field"), SWEPT)
def test_all_of_a_fields_wrong_values_are_an_answer_or_one_line(
    kind, file, field, models, tmp_path, capsys
):
    sweep(kind, file, field, VALUES, models, tmp_path, capsys)


WHISPER = {
    "config.json": ["d_model", "encoder_layers", "max_source_positions", "num_mel_bins"],
    "generation_config.json": ["no_timestamps_token_id", "suppress_tokens", "is_multilingual"],
    "processor_config.json": ["feature_extractor", "feature_extractor.chunk_length"],
}


WHISPER_SWEPT = [(file, field) for file, fields in WHISPER.items() for field in fields]
WHISPER_VALUES = [ABSENT, "evil", -1, 10**9, math.nan]


@pytest.mark.parametrize(("file", "field"), WHISPER_SWEPT)
def test_a_recognisers_field_of_a_wrong_value_is_an_answer_or_one_line(
    file, field, models, tmp_path, capsys
):
    """Two for each field, others for the next one."""
    first = WHISPER_SWEPT.index((file, field)) % 3
    sweep("whisper", file, field, WHISPER_VALUES[first::3], models, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "field"), WHISPER_SWEPT)
def test_any_value_of_a_recognisers_field_is_an_answer_or_one_line(
    file, field, models, tmp_path, capsys
):
    sweep("whisper", file, field, WHISPER_VALUES, models, tmp_path, capsys)


CONTENTS: dict[str, str | bytes] = {
    "nothing": "",
    "half": '{"model_type": "bert", ',
    "a list": "[]",
    "a number": "1" * 5000,
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "deep, and small enough for a parser": '{"a":' * 300 + "1" + "}" * 300,
    "not UTF-8": b"\xff\xfe\x00",
    "zeros": b"\0" * 4096,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch mark'\ntR.",
    "an archive": b"PK\x03\x04" + b"\0" * 64,
}
FILES = [
    ("text", "config.json"),
    ("text", "tokenizer.json"),
    ("text", "tokenizer_config.json"),
    ("text", "model.safetensors"),
    ("head", "mmtransfer.json"),
    ("head", "head.safetensors"),
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter_model.safetensors"),
    ("ctc", "preprocessor_config.json"),
    ("ctc", "vocab.json"),
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("kind", "file"), FILES)
def test_a_damaged_file_is_refused(kind, file, content, models, tmp_path, capsys):
    model = copied(models / kind, tmp_path / "model")
    rewrite(model / file, CONTENTS[content])
    refused(command(kind, model, models), capsys)
    assert not Path("mark").exists()


@pytest.mark.parametrize("what", ["pipe", "endless", "folder", "loop", "nowhere"])
@pytest.mark.parametrize(
    ("kind", "file"),
    [*FILES, ("text", "x.json"), ("text", "x.txt"), ("text", "x.safetensors")],
)
def test_only_regular_files_are_opened(kind, file, what, models, tmp_path, capsys):
    model = copied(models / kind, tmp_path / "model")
    path = model / file
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"endless": "/dev/zero", "loop": file, "nowhere": "none"}[what])
    refused(command(kind, model, models), capsys)


@pytest.mark.parametrize(
    "named",
    ["../text/model.safetensors", "/dev/zero", "x.safetensors/../model.safetensors", 5, None],
)
def test_weights_lie_in_the_models_folder(named, models, tmp_path, capsys):
    model = copied(models / "text", tmp_path / "model")
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, named)}
    rewrite(model / "model.safetensors.index.json", json.dumps(index))
    assert "the names of the files beside it" in refused(["predict", model, *TEXT], capsys)


def header(size, text=b"{}", more=b""):
    return size.to_bytes(8, "little") + text + more


@pytest.mark.parametrize(
    "content",
    [
        header(2**63),
        header(10**9),
        header(2, b"[]"),
        header(4, b"null"),
        header(100, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(100)),
        header(100, b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,9]}}'.ljust(100)),
        header(100, b'{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}'.ljust(100), b"0" * 4),
        header(100, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}'.ljust(100)),
    ],
)
def test_a_header_that_lies_is_refused(content, models, tmp_path, capsys):
    model = copied(models / "text", tmp_path / "model")
    rewrite(model / "model.safetensors", content)
    refused(["predict", model, *TEXT], capsys)


BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
NESTED = {"pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}
SLOW = {**NESTED, "pattern": {"Regex": "(a|aa)+$"}}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [BOMB] * 10}, "grows more than"),
        (
            "normalizer",
            {
                "type": "Sequence",
                "normalizers": [{**BOMB, "pattern": {"Regex": "."}, "content": "x" * 100}] * 5,
            },
            "grows more than",
        ),
        (
            "added_tokens",
            [{"id": n, "content": f"<{n}>", "special": True} for n in range(100_001)],
            "at most 100000 tokens",
        ),
        ("pre_tokenizer", {"type": "Split", **NESTED}, "a regular expression that ends"),
        ("padding", {"strategy": {"Fixed": 10**9}, "direction": "Right"}, "expected a length"),
    ],
)
def test_what_a_tokenizer_may_cost_is_limited(field, value, expected, models, tmp_path, capsys):
    model = copied(models / "text", tmp_path / "model")
    change(model / "tokenizer.json", field, value)
    assert expected in refused(["predict", model, *TEXT], capsys)


def test_a_regular_expression_of_a_tokenizer_that_gives_up_is_one_line(models, tmp_path, capfd):
    model = copied(models / "text", tmp_path / "model")
    change(model / "tokenizer.json", "pre_tokenizer", {"type": "Split", **SLOW})
    code, _, err = outcome(["predict", model, "--text", "a" * 400 + "!"], capfd)
    assert code == 2
    assert err.count("\n") == 1, err


def test_lines_of_others_come_through_where_those_of_a_panic_do_not(capfd):
    panic = "thread '<unnamed>' (7) panicked at src/lib.rs:1:2:\ncalled unwrap()\n"
    with without_panics(), without_panics():
        os.write(2, b"before\n\n\n")
        os.write(2, panic.encode() + b"note: run with `RUST_BACKTRACE=1`\nbetween\n")
        os.write(2, panic.encode() + b"stack backtrace:\n   0: main\n      at x.rs:1\n")
        os.write(2, b"\nafter")
    assert capfd.readouterr().err == "before\n\nbetween\n\nafter"


ENDLESS = "([a-z_.0-9]+)+!"


@pytest.mark.parametrize(
    ("field", "value", "works"),
    [
        ("target_modules", ENDLESS, True),  # the tensors' names say which modules
        ("exclude_modules", ENDLESS, True),
        ("rank_pattern", {ENDLESS: 2}, False),
        ("alpha_pattern", {ENDLESS: 2}, False),
        ("layers_pattern", ENDLESS, False),
        ("layer_replication", [[0, 3]] * 200_000, False),
        ("init_lora_weights", "pissa_niter_1000000", False),
        ("r", 10**9, False),
        ("target_modules", r".*attention\.self\.(query|value)", True),
    ],
)
def test_what_an_adapter_may_cost_is_limited(field, value, works, models, tmp_path, capsys):
    model = copied(models / "adapter", tmp_path / "model")
    change(model / "adapter_config.json", field, value)
    code, out, _ = outcome(["predict", model, *TEXT], capsys)
    assert (code == 0) == works
    if works:
        assert out == outcome(["predict", models / "adapter", *TEXT], capsys)[1]


@pytest.mark.parametrize("names", [["good", "good"], [], ["", ""]])
def test_classes_that_cannot_be_told_apart_are_refused(names, models, tmp_path, capsys):
    plain = copied(models / "text", tmp_path / "plain")
    change(plain / "config.json", "id2label", dict(enumerate(names)))
    refused(["predict", plain, *TEXT], capsys)
    head = copied(models / "head", tmp_path / "head")
    change(head / "mmtransfer.json", "labels", names)
    refused(["predict", head, *TEXT], capsys)


# --- a canary -------------------------------------------------------------------------------------


class Canary:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def disguised(form, mark):
    if form == "archive":
        data = io.BytesIO()
        torch.save({"a": Canary(mark)}, data)
        return data.getvalue()
    if form == "array":
        data = io.BytesIO()
        np.save(data, np.array([Canary(mark)], object), allow_pickle=True)
        return data.getvalue()
    if form == "behind a header":
        return header(2) + pickle.dumps(Canary(mark))
    return pickle.dumps(Canary(mark), protocol=int(form))


PICKLES = [
    ("text", "model.safetensors", form)
    for form in ("0", "2", "5", "archive", "array", "behind a header")
]
PICKLES += [("text", "pytorch_model.bin", form) for form in ("2", "archive")]
PICKLES += [("adapter", "adapter_model.bin", "archive"), ("head", "head.safetensors", "archive")]
PICKLES += [("adapter", "adapter_model.safetensors", "archive"), ("text", "tokenizer.json", "0")]


@pytest.mark.parametrize(("kind", "file", "form"), PICKLES)
def test_no_pickle_is_run(kind, file, form, models, tmp_path, capsys):
    mark = tmp_path / "mark"
    model = copied(models / kind, tmp_path / "model")
    if file.endswith(".bin"):
        (model / file.replace("pytorch_", "").replace(".bin", ".safetensors")).unlink()
    rewrite(model / file, disguised(form, mark))
    refused(command(kind, model, models), capsys)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["2", "archive", "array"])
def test_no_pickle_of_a_checkpoint_of_training_is_run(form, tmp_path):
    mark, model = tmp_path / "mark", torch.nn.Linear(2, 1)
    write_checkpoint(tmp_path / "c", model, {}, state={}, settings={})
    rewrite(tmp_path / "c" / "optimizer.pt", disguised(form, mark))
    assert "damaged" in reason(lambda: read_checkpoint(tmp_path / "c", model, settings={}))
    assert not mark.exists()


@pytest.mark.parametrize("field", ["prefix", "folder"])
def test_an_adapter_for_short_contexts_lies_in_the_models_folder(field, models, tmp_path):
    model = copied(models / "whisper", tmp_path / "model")
    short = {"margin_s": 1.0, "languages": ["en"], field: "../outside/"}
    values = {"format": 1, "task": "speech", "form": "full", "base": None}
    rewrite(
        model / "mmtransfer.json",
        json.dumps({**values, "shortest_context_s": 3.0, "short_reader": short}),
    )
    found = resolve(str(model)).short
    assert found is not None
    assert (found.folder, found.prefix) == (model, "short_")


CODE = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"),
    "tokenizer_config.json": ("AutoTokenizer",),
    "preprocessor_config.json": ("AutoFeatureExtractor", "AutoProcessor", "AutoImageProcessor"),
    "processor_config.json": ("AutoProcessor", "AutoFeatureExtractor", "AutoTokenizer"),
    "adapter_config.json": ("AutoModel",),
}


@pytest.mark.parametrize(
    ("kind", "file", "where"),
    [
        pytest.param(
            *(kind, file, where),
            # A recogniser loads slowly; some for each file, others for the next one.
            marks=[pytest.mark.slow] if kind == "whisper" and place != number % 3 else [],
        )
        for kind in ("text", "head", "adapter", "ctc", "whisper")
        for number, file in enumerate(CODE)
        if file != "adapter_config.json" or kind == "adapter"
        for place, where in enumerate(["x.C", "evil/code--x.C", ["x.C", "x.C"]])
    ],
)
def test_no_code_beside_a_model_is_run(kind, file, where, models, tmp_path, capsys, monkeypatch):
    mark, answer = tmp_path / "mark", tmp_path / "answer"
    model = copied(models / kind, tmp_path / "model")
    for name in ("x.py", "__init__.py", "modeling_x.py", "setup.py", "conftest.py", "x.jinja"):
        rewrite(model / name, f"open({str(mark)!r}, 'w')\n")
    change(model / file, "auto_map", dict.fromkeys(CODE[file], where))
    change(model / "tokenizer_config.json", "chat_template", "{{ cycler.__init__.__globals__ }}")
    change(model / "config.json", "custom_pipelines", {"x": {"impl": "x.C", "pt": ["AutoModel"]}})
    answer.write_text("y\n" * 100)
    with answer.open() as given:
        monkeypatch.setattr("sys.stdin", given)
        outcome(command(kind, model, models), capsys)
        assert given.tell() == 0
    assert not mark.exists()
