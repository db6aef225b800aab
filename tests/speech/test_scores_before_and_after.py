"""The score of a source before training is the one that evaluate gives; undefined is no crash."""

import csv
import json
import shutil

import pytest
import torch
from conftest import EXAMPLE, write_dataset
from huggingface_hub import ModelCard

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config
from mmtransfer.runs import training as run_training

pytestmark = pytest.mark.usefixtures("unmeasured")


def few(split, folder, count):
    """The first clips of the example site."""
    folder.mkdir(parents=True)
    with (EXAMPLE / split / "metadata.csv").open(encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    for row in rows[:count]:
        shutil.copy(EXAMPLE / split / row[0], folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows[:count]])
    return folder


def values(train, validation, source, run):
    return {
        "data": {"train": str(train), "validation": str(validation), "rehearsal": "none"},
        "source_model": str(source),
        "run_dir": str(run),
        "train": {"steps": 1},
        "transfer": {"interpolate": "none"},
        "runtime": {"device": "cpu"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", None])
def test_the_score_before_is_that_of_evaluate(whisper_tiny, tmp_path, language):
    """Also of a source for which an adapter for short contexts ships."""
    train, validation = few("train", tmp_path / "a", 2), few("validation", tmp_path / "b", 2)
    config = values(train, validation, "bundled:whisper-tiny.en", tmp_path / "run")
    config["data"]["language"] = language
    report = runs.train(build_config(config))
    scores = runs.evaluate("bundled:whisper-tiny.en", str(validation), language=language)
    before, after = report["target"]["before"], report["target"]["after"]
    assert {name: scores[name] for name in before} == before
    own = runs.evaluate(str(tmp_path / "run"), str(validation), language=language)
    assert {name: own[name] for name in after} == after


def test_the_score_before_of_any_other_source_is_that_of_evaluate(random_whisper, tmp_path):
    train = write_dataset(tmp_path / "train", ["gate one", "gate two"])
    validation = write_dataset(tmp_path / "validation", ["crane one", ""])
    report = runs.train(build_config(values(train, validation, random_whisper, tmp_path / "run")))
    scores = runs.evaluate(str(random_whisper), str(validation))
    before = report["target"]["before"]
    assert {name: scores[name] for name in before} == before


def test_scores_before_are_kept_for_a_resumed_run_unless_their_metric_is_not_known(
    random_whisper, tmp_path, monkeypatch
):
    train = write_dataset(tmp_path / "train", ["gate one", "gate two"])
    validation = write_dataset(tmp_path / "validation", ["crane one", "gate"])
    run, cpu = tmp_path / "run", torch.device("cpu")
    task = runs.set_up(build_config(values(train, validation, random_whisper, run)), cpu)
    kept = run / "checkpoints" / "before.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"target": {"wer": 0.5}}))
    scores = run_training._scores_before(task, run, cpu)
    assert set(scores["target"]) > {"wer", "cer", "outcomes"}
    monkeypatch.setattr(task, "score_source", lambda *_: pytest.fail("scored again"))
    assert run_training._scores_before(task, run, cpu) == scores


def test_a_validation_set_of_silence_is_no_crash(random_whisper, tmp_path):
    train = write_dataset(tmp_path / "train", ["gate one", "gate two"])
    quiet = write_dataset(tmp_path / "quiet", ["", "(laughs)", "..."])
    config = values(train, quiet, random_whisper, tmp_path / "run")
    other = write_dataset(tmp_path / "other", ["crane one"])
    config["data"]["source_domain"] = {"other": str(other)}
    report = runs.train(build_config(config))
    assert report["target"]["after"]["wer"] is None
    assert report["gain"] is None
    run = tmp_path / "run"
    for path in (run / "report.json", run / "metrics.jsonl", run / "README.md"):
        words = path.read_text().replace("\n", " ").lower().split()
        assert not {"inf", "nan", "infinity", "inf,", "nan,", "infinity,"} & set(words), path
    for text in (run / "report.json").read_text(), *(run / "metrics.jsonl").open():
        json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert "undefined" in ModelCard.load(run / "README.md").content


def test_evaluate_says_how_many_words_it_emits_on_silence(random_whisper, tmp_path, capsys):
    quiet = write_dataset(tmp_path / "quiet", ["", ""])
    assert main(["evaluate", str(random_whisper), "--data", str(quiet)]) == 0
    out = capsys.readouterr().out
    assert "WER undefined (no reference words)" in out
    assert "on 2 silent clips" in out
    assert main(["evaluate", str(random_whisper), "--data", str(quiet), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["wer"] is found["cer"] is found["ci_low"] is None
    mixed = write_dataset(tmp_path / "mixed", ["", "gate one"])  # one that says something
    assert main(["evaluate", str(random_whisper), "--data", str(mixed)]) == 0
    out = capsys.readouterr().out
    assert "undefined" not in out
    assert "on 1 silent clips" in out
