"""Sound classes on tiny backbones: tones, noise and clicks that are made here."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import tone, write_media, write_wave_backbone
from safetensors.torch import load_file

from mmtransfer import load, runs
from mmtransfer.cli import main
from mmtransfer.config import build_config, merge
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs.publishing import publish
from mmtransfer.sound.classifier import SoundModel
from mmtransfer.sound.classifier_task import SoundTask
from mmtransfer.sound.examples import hold_out_sounds, read_sounds
from mmtransfer.sound.scores import average_precision, score_multi_label
from mmtransfer.speech.audio import decode_clip
from mmtransfer.transfer.trainer import Interrupted

CLASSES = ("click", "noise", "tone")
CPU = torch.device("cpu")


def make_sound(kind: str, seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, CLASSES.index(kind)])
    count = round(seconds * 16_000)
    if kind == "tone":
        return tone(seconds, hertz=float(rng.uniform(300, 900)))
    if kind == "noise":
        return rng.normal(0, 0.1, count).astype(np.float32)
    samples = np.zeros(count, np.float32)
    samples[:: int(rng.integers(1500, 2500))] = 0.9
    return samples


def write_sounds(folder, each: int, *, seed: int = 0, seconds: float = 1.0, pairs: bool = False):
    """Clips with metadata.csv; with `pairs` some hold two sounds and some none."""
    folder.mkdir(parents=True)
    rows = []
    for index in range(each):
        kinds = [[kind] for kind in CLASSES]
        if pairs:
            kinds += [["noise", "tone"], []]
        for held in kinds:
            name = f"{'_'.join(held) or 'silence'}{index}.wav"
            length = seconds + 0.2 * (index % 3)
            parts = [make_sound(kind, length, 100 * seed + index) for kind in held]
            write_media(folder / name, sum(parts, np.zeros(round(length * 16_000), np.float32)))
            rows.append([name, " ; ".join(held), f"g{index}"])
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "label", "group"], *rows])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    write_sounds(folder / "train", 6)
    write_sounds(folder / "validation", 3, seed=1)
    write_sounds(folder / "multi", 6, pairs=True)
    write_sounds(folder / "multi_validation", 3, seed=1, pairs=True)
    return folder


@pytest.fixture(scope="module")
def wave(tmp_path_factory):
    return write_wave_backbone(tmp_path_factory.mktemp("wave") / "wavlm", "wavlm")


def values(folder, backbone, run_dir, **over):
    config = {
        "task": "sound",
        "source_model": str(backbone),
        "run_dir": str(run_dir),
        "data": {"train": str(folder / "train"), "validation": str(folder / "validation")},
        "transfer": {"preset": "feature"},
        "head": {"layers": "all"},
        "train": {
            "steps": 4,
            "head_learning_rate": 2e-2,
            "warmup_steps": 1,
            "batch_seconds": 12,
            "evaluate_every": 2,
        },
        "evaluation": {"bootstrap_samples": 100},
        "runtime": {"threads": 1, "device": "cpu"},
    }
    return merge(config, over)


@pytest.fixture(scope="module")
def run(data, wave, tmp_path_factory):
    """A finished run that has learnt its classes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = values(data, wave, folder, train={"steps": 120, "evaluate_every": 40})
    runs.train(build_config(config))
    return folder


# --- training ------------------------------------------------------------------------------------


def test_frozen_features_tell_sounds_apart(run, data):
    report = json.loads((run / "report.json").read_text())
    assert report["target"]["after"]["accuracy"] >= 0.85
    assert report["data"]["train"]["labels"] == dict.fromkeys(CLASSES, 6)
    scores = runs.evaluate(str(run), str(data / "validation"))
    assert scores["accuracy"] == report["target"]["after"]["accuracy"]
    assert "18 clips" in (run / "README.md").read_text()
    assert "README.md" in publish(run, "someone/sounds", dry_run=True)


def test_a_frozen_whisper_takes_clips_at_their_own_length(data, random_whisper, tmp_path):
    head = {"layers": "last", "conv_layers": 1, "conv_width": 16, "pooling": "max"}
    config = values(data, random_whisper, tmp_path / "run", head=head)
    task = runs.set_up(build_config(config), CPU)
    task.begin(task.stages[0], CPU)
    [micro, *_] = task.prepare([0], slice(None), 0)
    assert micro.inputs["stored"].shape[2] == micro.mask.shape[1] == 50
    runs.train(build_config(config))
    before = load_file(random_whisper / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(value, before[f"model.encoder.{name}"]) for name, value in after.items())


@pytest.mark.parametrize(
    "transfer",
    [
        {"preset": "feature"},
        {"preset": "end_to_end"},
        {"stages": [{"frozen": 1}]},
        {"preset": "lora"},
    ],
    ids=["feature", "end_to_end", "partial", "lora"],
)
def test_a_saved_model_gives_the_same_probabilities(data, wave, tmp_path, transfer):
    config = build_config(values(data, wave, tmp_path / "run", transfer=transfer))
    task = runs.set_up(config, CPU)
    assert isinstance(task, SoundTask)
    task.begin(task.stages[0], CPU)
    samples = [make_sound("tone", 0.7, 5), make_sound("noise", 12.3, 5)]
    micro = task.prepare([0, 1], slice(None), 0)[0]
    task.train_mode()
    task.loss(micro, CPU).backward()
    torch.optim.SGD(task.model.parameters(), 0.1).step()
    expected = task.sound.predict(samples)
    (tmp_path / "saved").mkdir()
    task.save(tmp_path / "saved")
    model = load(str(tmp_path / "saved"))
    assert isinstance(model, SoundModel)
    found = model.predict(samples)
    for one, other in zip(found, expected, strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_cached_features_give_the_logits_of_the_whole_network(data, wave, tmp_path):
    for head in ({"layers": "all"}, {"conv_layers": 1, "pooling": "attention"}):
        cache = {"cache_dtype": "float32"}
        config = values(data, wave, tmp_path / "run", head=head, transfer=cache)
        task = runs.set_up(build_config(config), CPU)
        task.begin(task.stages[0], CPU)
        cached = task.validate(range(task.validation_size), CPU)
        task._close_stores()
        np.testing.assert_allclose(
            cached, task.validate(range(task.validation_size), CPU), atol=1e-4
        )
        subset = task.validate([4, 1], CPU)
        np.testing.assert_allclose(subset, [cached[4], cached[1]], atol=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(data, wave, tmp_path, monkeypatch):
    augment = {"speed": [0.9, 1.1]}
    over = {"augment": augment, "transfer": {"cached_views": 2}, "train": {"steps": 8}}
    runs.train(build_config(values(data, wave, tmp_path / "whole", **over)))
    broken = build_config(values(data, wave, tmp_path / "broken", **over))
    from mmtransfer.sound.classifier_task import SoundTask

    summarize, calls = SoundTask.summarize, []

    def stop(task, records):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return summarize(task, records)

    monkeypatch.setattr(SoundTask, "summarize", stop)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        runs.train(broken)
    monkeypatch.setattr(SoundTask, "summarize", summarize)
    assert (tmp_path / "broken" / "checkpoints").is_dir()
    runs.train(broken, resume=True)
    for path in (tmp_path / "whole" / "model").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "broken" / "model" / path.name)
        assert all(torch.equal(one[key], other[key]) for key in one), path.name


def test_a_finished_model_is_the_source_of_the_next(run, data, tmp_path):
    config = values(data, run, tmp_path / "next", head={"layers": "all"})
    report = runs.train(build_config(config))
    assert report["target"]["before"]["accuracy"] >= 0.85


# --- windows -------------------------------------------------------------------------------------


def test_windows_cover_a_clip_and_probabilities_are_averaged(run):
    model = load(str(run))
    assert isinstance(model, SoundModel)
    assert model.windows(16_000) == [(0, 16_000)]
    assert model.windows(80_000) == [(0, 80_000)]
    assert model.windows(96_000) == [(0, 80_000), (16_000, 96_000)]
    assert [start for start, _ in model.windows(200_000)] == [0, 40_000, 80_000, 120_000]
    samples = np.concatenate([make_sound("tone", 5.0, 3), make_sound("noise", 5.0, 3)])
    model.temperature = 1.0
    pieces = model.predict([samples[start:end] for start, end in model.windows(len(samples))])
    [whole] = model.predict([samples])
    for label in CLASSES:
        mean = np.mean([piece.probabilities[label] for piece in pieces])
        assert whole.probabilities[label] == pytest.approx(mean, abs=1e-5)


# --- several labels ------------------------------------------------------------------------------


def test_a_long_recording_is_classified_in_parts(run, tmp_path, monkeypatch):
    """No more of it is held at a time; the mean is over the windows of all parts."""
    model = load(str(run))
    assert isinstance(model, SoundModel)
    samples = np.concatenate([make_sound("tone", 5.0, 3), make_sound("noise", 5.0, 3)])
    path = write_media(tmp_path / "long.wav", samples)
    seen: list[int] = []
    logits = model.logits

    def noted(lengths, *arguments, **options):
        seen.extend(lengths)
        return logits(lengths, *arguments, **options)

    monkeypatch.setattr(model, "logits", noted)
    monkeypatch.setattr(model, "temperature", 1.0)  # it comes after the mean
    monkeypatch.setattr("mmtransfer.sound.classifier._PART_S", 5.0)
    [parted] = model.predict([path])
    assert sum(seen) == len(samples)
    assert max(seen) <= 16_000 * 5.5
    first, _ = seen  # parts end where a block of decoded audio does
    halves = model.predict([samples[:first], samples[first:]])
    windows = [len(model.windows(length)) for length in (first, len(samples) - first)]
    for label in CLASSES:
        shares = [half.probabilities[label] for half in halves]
        mean = np.average(shares, weights=windows)
        assert parted.probabilities[label] == pytest.approx(mean, abs=0.005)


def test_clips_with_several_labels_or_none_are_learnt(data, wave, tmp_path):
    over = {
        "data": {
            "train": str(data / "multi"),
            "validation": str(data / "multi_validation"),
            "allow_leaks": ["same-audio"],
        },
        "train": {"steps": 200, "evaluate_every": 100},
    }
    report = runs.train(build_config(values(data, wave, tmp_path / "run", **over)))
    after = report["target"]["after"]
    assert report["metric"] == "map"
    assert after["map"] >= 0.8
    assert after["per_class"]["noise"]["support"] == 6
    model = load(str(tmp_path / "run"))
    assert isinstance(model, SoundModel)
    mixed = make_sound("noise", 1.0, 9) + make_sound("tone", 1.0, 9)
    shares = model.predict([mixed])[0].probabilities
    assert min(shares["noise"], shares["tone"]) > shares["click"]
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(data / "multi_validation")]) == 0


def test_average_precision_is_that_of_its_definition():
    scores, targets = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert average_precision(scores, targets) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(4), targets) == pytest.approx(0.5)  # all tie
    table = np.stack([scores, 1 - scores], 1)
    found = score_multi_label(table, np.stack([targets, 1 - targets], 1), ["a", "b"])
    assert found.map == pytest.approx((1 + 2 / 3) / 2)
    assert found.macro_f1 == pytest.approx((2 * 2 / 6 + 0) / 2)


# --- data ----------------------------------------------------------------------------------------


def test_a_folder_for_each_class_is_data(tmp_path):
    for kind in CLASSES:
        (tmp_path / kind).mkdir()
        write_media(tmp_path / kind / "a.wav", make_sound(kind, 1.0, 0))
    found = read_sounds(tmp_path, build_config({}).data, name="train")
    assert [clip.text for clip in found.clips] == list(CLASSES)


def test_held_out_clips_share_no_group_with_training_and_every_class_stays(data):
    sounds = read_sounds(data / "train", build_config({}).data, name="train")
    chosen, held = hold_out_sounds(sounds, 0.3, 0)
    groups = [{sounds.clips[i].group for i in part} for part in (chosen, held)]
    assert held
    assert not groups[0] & groups[1]
    assert {sounds.clips[i].text for i in chosen} == set(CLASSES)


def refusal(config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_sound_data_is_one_line(data, wave, tmp_path, capsys):
    train = data / "train"

    def with_table(text, **over):
        path = tmp_path / "table.csv"
        path.write_text(text)
        return refusal(
            values(data, wave, tmp_path / "run", data={"train": str(path)}, **over),
            tmp_path,
            capsys,
        )

    def rows(*labels):
        names = [f"{train}/tone{i}.wav,{label}" for i, label in enumerate(labels)]
        return "file_name,label\n" + "\n".join(names) + "\n"

    assert "column 'label' not found; columns are file_name, class" in with_table(
        f"file_name,class\n{train}/tone0.wav,tone\n"
    )
    assert "at least two classes, found only 'tone'" in with_table(rows("tone", "tone"))
    assert "at least two classes, found none" in with_table(rows("", ""))
    (tmp_path / "empty.wav").write_bytes(b"")
    assert "empty.wav" in with_table(f"file_name,label\n{tmp_path}/empty.wav,tone\n")
    assert "expected labels of the training data (click, tone), found 'noise'" in with_table(
        rows("tone", "click")
    )
    config = values(data, wave, tmp_path / "run", head={"type": "ctc"})
    assert "ctc is not for sounds" in refusal(config, tmp_path, capsys)
    config = values(data, wave, tmp_path / "run", data={"validation": str(train)})
    assert "are also in 'train'" in refusal(config, tmp_path, capsys)


def test_several_labels_where_the_model_has_one_are_refused(run, data, capsys):
    assert main(["evaluate", str(run), "--data", str(data / "multi_validation")]) == 2
    assert "expected one label" in capsys.readouterr().err


# --- command line --------------------------------------------------------------------------------


def test_predict_classifies_files_and_tables(run, data, tmp_path, capsys, caplog):
    clip = data / "validation" / "noise0.wav"
    assert main(["predict", str(run), "--audio", str(clip)]) == 0
    row = json.loads(capsys.readouterr().out)
    model = load(str(run))
    assert isinstance(model, SoundModel)
    expected = model.predict([decode_clip(clip)])[0]
    assert row["label"] == expected.label
    assert row["probabilities"] == pytest.approx(expected.probabilities)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    table = tmp_path / "clips.csv"
    table.write_text(
        f"file_name,place,start,end\n{clip},yard,0.2,0.9\n{tmp_path}/broken.wav,gate,,\n"
    )
    out = tmp_path / "out.csv"
    assert main(["predict", str(run), "--data", str(table), "--output", str(out)]) == 0
    assert "1 of 2 clips could not be decoded" in caplog.text
    first, second = csv.DictReader(out.open())
    assert first["place"] == "yard"
    assert first["label"] in CLASSES
    assert second["label"] == ""
    assert main(["predict", str(run), "--text", "a text"]) == 2
    assert "expected a text classifier, found a sound classifier" in capsys.readouterr().err


def test_other_models_are_no_sound_classifiers(wave, tmp_path, capsys):
    assert main(["predict", str(wave), "--audio", str(tmp_path / "x.wav")]) == 2
    assert "expected a sound classifier, found a speech recogniser" in capsys.readouterr().err
    assert resolve(str(wave)).kind == "ctc"
