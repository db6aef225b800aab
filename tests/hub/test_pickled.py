"""Weights from before safetensors load wherever a model is taken, and nothing else of them does."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import tone, write_dataset
from safetensors.torch import load_file
from support.children import run_module
from support.hub_programs import OUTPUTS, TOKEN, python
from support.hub_server import Hub

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.hub import pickled
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.pickled import safe_weights
from mmtransfer.speech.engines_ctranslate2 import converted
from mmtransfer.speech.engines_transformers import transformers_engine
from mmtransfer.speech.whisper import load_speech_model


@pytest.fixture
def old(random_whisper, tmp_path):
    """A checkpoint without weights, and the weights."""
    folder = shutil.copytree(random_whisper, tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder, weights


def whole(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")


def legacy(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def parameters(folder, weights):
    """As a model's own state: parameters, two names for one tensor, half precision for none."""
    found = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    torch.save(found, folder / "pytorch_model.bin")


def sharded(folder, weights):
    names = sorted(weights)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for shard, own in shards.items():
        torch.save({name: weights[name] for name in own}, folder / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture
def forked(monkeypatch):
    """The process that opens weights is forked, which takes no time for its imports."""
    monkeypatch.setattr("mmtransfer.hub.pickled.subprocess.run", run_module)


@pytest.mark.parametrize("form", [whole, legacy, parameters, sharded])
@pytest.mark.usefixtures("forked")
def test_old_weights_are_the_same_model(old, random_whisper, form):
    form(*old)
    found = load_speech_model(str(old[0])).model.state_dict()
    for name, value in load_speech_model(str(random_whisper)).model.state_dict().items():
        assert torch.equal(found[name], value), name


def test_they_are_converted_once(old, monkeypatch):
    whole(*old)
    with safe_weights(old[0]) as first:
        path = (first / "model.safetensors").resolve()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: 1 / 0)
    with safe_weights(old[0]) as second:
        assert (second / "model.safetensors").resolve() == path
    monkeypatch.undo()
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    monkeypatch.setattr(pickled, "_convert_apart", lambda _, target: target.write_bytes(data))
    with safe_weights(old[0]) as third:  # damaged, so made anew
        assert (third / "model.safetensors").read_bytes() == data
    before = resolve(str(old[0])).digest
    whole(old[0], {**old[1], "more": torch.zeros(1)})
    assert resolve(str(old[0])).digest != before  # another model


def test_safetensors_are_taken_where_there_are_both(random_whisper, tmp_path):
    folder = shutil.copytree(random_whisper, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with safe_weights(folder) as found:
        assert found == folder
    assert load_speech_model(str(folder)).model is not None


def test_every_command_takes_them(old, tmp_path, capsys):
    whole(*old)
    data = write_dataset(tmp_path / "data", ["gate one", "gate two"])
    assert main(["evaluate", str(old[0]), "--data", str(data)]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert (converted(resolve(str(old[0]))) / "full" / "model.bin").is_file()
    engine = transformers_engine(load_speech_model(str(old[0])))
    assert len(engine.decode([tone(1.0)], 2.0)) == 1


class _Evil:
    """Makes a folder when it is opened by whoever trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda path: {"weight": _Evil(path)}, "more than tensors"),
        (lambda path: {"weight": torch.zeros(1).expand(1 << 40)}, "more memory"),
        (lambda path: {"state_dict": {"weight": torch.zeros(2)}}, "state_dict.*is a dict"),
        (lambda path: _Evil(path), "more than tensors"),
        (lambda path: [torch.zeros(2)], "holds a list"),
        (lambda path: {"epoch": 3, "weight": torch.zeros(2)}, "epoch.*is a int"),
        (lambda path: {"weight": torch.zeros(2).to_sparse()}, "not a plain tensor"),
        (lambda path: {"weight": torch.zeros(1, device="meta")}, "not a plain tensor|more than"),
    ],
)
@pytest.mark.usefixtures("forked")
def test_anything_but_tensors_is_refused_and_never_run(old, tmp_path, made, reason):
    trap = str(tmp_path / "trap")
    torch.save(made(trap), old[0] / "pytorch_model.bin")
    with pytest.raises(UserError, match=reason) as error:
        load_speech_model(str(old[0]))
    assert "\n" not in str(error.value)
    assert not Path(trap).exists()


@pytest.mark.parametrize("data", [b"no weights", b"", pickle.dumps({"a": 1}), b"PK\x03\x04" * 9])
@pytest.mark.usefixtures("forked")
def test_damaged_files_are_one_line(old, data):
    (old[0] / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be loaded as weights"):
        load_speech_model(str(old[0]))


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "missing.bin", 3, None])
def test_an_index_names_files_beside_it_alone(old, tmp_path, name):
    folder, weights = old
    torch.save(weights, tmp_path / "outside.bin")
    index = {"weight_map": {} if name is None else {"a": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: expected the names"):
        load_speech_model(str(folder))


def test_a_repository_that_holds_old_weights_alone_loads_like_the_new_ones(
    random_whisper, old, tmp_path
):
    folder, weights = old
    whole(folder, weights)
    served = Hub(TOKEN)
    served.put("someone/old", folder)
    served.put("someone/new", random_whisper)
    models = [[name, f"someone/{name}", None] for name in ("old", "new")]
    given = {"models": models, "texts": []}
    try:
        found = json.loads(python(OUTPUTS, given, served.endpoint, tmp_path / "home"))
    finally:
        served.close()
    assert found["old"] == found["new"]
    asked = [path for _, path in served.requests if "someone/old" in path]
    assert any("pytorch_model.bin" in path for path in asked)
