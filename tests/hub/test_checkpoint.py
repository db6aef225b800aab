"""What a model is, decided once, and everything loaded from that answer."""

import dataclasses
import json
import shutil

import pytest
from conftest import write_dataset, write_text_backbone, write_texts, write_wave_backbone

import mmtransfer
from mmtransfer import runs
from mmtransfer.config import build_config
from mmtransfer.errors import UserError
from mmtransfer.hub import checkpoint as hub
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.metadata import Base, read_metadata, write_metadata
from mmtransfer.runs.models import load, task_for, task_of
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.text.classifier import TextModel

CPU = {"threads": 1, "device": "cpu"}


@pytest.fixture
def resolved(monkeypatch):
    """Names of the models that were resolved, in order; those beneath others are not named."""
    names, whole = [], hub._resolve

    def count(source, revision, *, is_base):
        if not is_base:
            names.append(source)
        return whole(source, revision, is_base=is_base)

    monkeypatch.setattr(hub, "_resolve", count)
    return names


def trained(folder, source, task="sentiment", **sections):
    """A short run, and the data that it is evaluated on."""
    if task == "sentiment":
        data = {"train": write_texts(folder / "t.csv", 24), "validation": folder / "v.csv"}
        write_texts(folder / "v.csv", 8, seed=1)
    else:
        data = {"train": write_dataset(folder / "train", ["ab", "ba", "a b", "b"])}
        data["validation"] = write_dataset(folder / "validation", ["ab", "b"])
    values = {
        "task": task,
        "source_model": str(source),
        "run_dir": str(folder / "run"),
        "data": {name: str(path) for name, path in data.items()} | {"rehearsal": "none"},
        "train": {"steps": 1, "batch_tokens": 200, "batch_seconds": 8, "full_context": 0.0},
        "runtime": CPU,
        **sections,
    }
    runs.train(build_config(values))
    return str(folder / "run"), str(data["validation"])


@pytest.fixture(scope="module")
def wave(tmp_path_factory):
    return write_wave_backbone(tmp_path_factory.mktemp("wave"))


@pytest.mark.parametrize(
    ("kind", "transfer"),
    [
        ("text", {"preset": "end_to_end"}),
        ("text", {"preset": "lora"}),
        ("whisper", {"preset": "end_to_end", "interpolate": "none"}),
        ("wave", {"preset": "feature"}),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_every_verb_resolves_each_model_once(
    kind, transfer, resolved, text_backbone, random_whisper, wave, tmp_path
):
    source = {"text": text_backbone, "whisper": random_whisper, "wave": wave}[kind]
    task = "sentiment" if kind == "text" else "speech"
    run, data = trained(tmp_path, source, task, transfer=transfer)
    # What was trained is one more model, where `monitor` decodes it with another engine.
    named = [str(source), *([f"{run}/model"] if kind == "whisper" else [])]
    assert resolved == named
    runs.evaluate(run, data)
    named.append(run)
    assert resolved == named
    if kind == "text":
        mmtransfer.predict(run, ["good news"])
    else:
        open_recognizer(run, engine="transformers", threads=1)
    named.append(run)
    assert resolved == named
    load(run)
    assert resolved == [*named, run]


def test_nothing_is_looked_up_again_of_a_resolved_model(whisper_tiny, monkeypatch, tmp_path):
    found = resolve("bundled:whisper-tiny.en")

    def refuse(*_):
        pytest.fail("looked up again")

    monkeypatch.setattr(hub, "_resolve", refuse)
    monkeypatch.setattr(hub, "fetch", refuse)
    one, other = (  # base, adapter, tokenizer, conversion
        open_recognizer(found, engine=engine, threads=1)
        for engine in ("ctranslate2", "transformers")
    )
    assert one.engine.short_s == other.engine.short_s
    assert one.end_of_turn is not None
    model = load(found)
    assert isinstance(model, SpeechModel)
    assert model.short is not None


# --- what it finds -------------------------------------------------------------------------------


def test_kinds_of_plain_checkpoints(text_backbone, random_whisper, wave, tmp_path):
    assert resolve(str(text_backbone)).kind == "sentiment"
    assert resolve(str(random_whisper)).kind == "speech"
    found = resolve(str(wave))
    assert (found.kind, found.architecture) == ("ctc", "wav2vec2")
    tasks = {
        ("speech", "auto", wave): "CtcTask",
        ("speech", "auto", random_whisper): "SpeechTask",
        ("speech", "ctc", random_whisper): "CtcTask",
        ("short_context", "auto", random_whisper): "ShortContextTask",
        ("sentiment", "auto", text_backbone): "SentimentTask",
    }
    for (task, head, source), name in tasks.items():
        config = build_config({"task": task, "head": {"type": head}})
        assert task_for(config, resolve(str(source))).__name__ == name


def test_a_model_that_stands_on_another_names_both(text_backbone, tmp_path):
    base = write_text_backbone(tmp_path / "base")
    run, _ = trained(tmp_path, base, transfer={"preset": "feature"})
    assert resolve(run).form == "full"  # a folder is in no public place
    metadata = read_metadata(tmp_path / "run" / "model")
    assert metadata is not None
    model = tmp_path / "head"
    shutil.copytree(tmp_path / "run" / "model", model)
    (model / "model.safetensors").unlink()
    values = dataclasses.asdict(metadata)
    write_metadata(
        model,
        **{k: v for k, v in values.items() if k not in ("own", "form", "base")},
        form="head",
        base=Base(str(base), None, "someone/text"),
    )
    found = resolve(str(model))
    assert (found.form, found.kind, found.architecture) == ("head", "sentiment", "bert")
    assert found.base is not None
    assert found.base.source == str(base)
    assert found.weights == base
    assert found.digest != found.base.digest
    loaded = load(found)
    assert isinstance(loaded, TextModel)
    assert loaded.labels == ["negative", "positive"]
    deeper = tmp_path / "deeper"
    shutil.copytree(model, deeper)
    described = json.loads((deeper / "mmtransfer.json").read_text())
    described["base"]["source"] = str(model)
    (deeper / "mmtransfer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="expected a whole model as base, found an adapter"):
        resolve(str(deeper))


def test_the_digest_is_that_of_every_file_it_is_loaded_from(text_backbone, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(text_backbone, folder)
    before = resolve(str(folder))
    assert before.digest == resolve(str(folder)).digest
    (folder / "tokenizer_config.json").write_text("{}")
    assert resolve(str(folder)).digest != before.digest


@pytest.mark.parametrize(
    ("field", "value"),
    [("labels", "ab"), ("labels", [1]), ("symbols", {}), ("head", []), ("language", 3)],
)
def test_records_of_another_kind_are_refused(field, value, text_backbone, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(text_backbone, folder)
    values = {"task": "sentiment", "form": "full", "base": None, field: value}
    write_metadata(folder, **values)
    with pytest.raises(UserError, match=r"mmtransfer\.json: damaged"):
        resolve(str(folder))


def test_what_a_later_task_records_is_kept_and_an_unknown_task_refused(text_backbone, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(text_backbone, folder)
    write_metadata(folder, task="smell", form="full", base=None, noses=2)
    found = resolve(str(folder))
    assert found.metadata is not None
    assert found.metadata.own == {"noses": 2}
    with pytest.raises(UserError, match=r"expected a model for speech, .* found one for 'smell'"):
        task_of(found)
    with pytest.raises(UserError, match="found one for 'smell'"):
        load(str(folder))
