import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    ROOT,
    WORDS,
    write_text_backbone,
    write_texts,
)
from safetensors.torch import load_file
from support.children import run_command, start_training

from mmtransfer import load, runs
from mmtransfer.cli import main
from mmtransfer.config import DataConfig, HeadConfig, build_config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.text.classifier import TextModel, average_windows, length_batches, new_text_model
from mmtransfer.text.classifier_task import SentimentTask
from mmtransfer.text.examples import read_texts
from mmtransfer.text.splits import load_text_splits
from mmtransfer.transfer.trainer import Trainer

CPU = {"device": "cpu", "threads": 1}
PRESETS: dict[str, list[Any]] = {
    "end_to_end": [{"frozen": "none"}],
    "feature": [{"frozen": "all"}],
    "combined": [{"frozen": "all", "steps": 12}, {"frozen": "none", "head_learning_rate": 1e-3}],
    "lora": [{"frozen": "none", "adapter": {"type": "lora", "r": 4}}],
    "few_shot": [{"objective": "contrastive", "steps": 12}, {"frozen": "all"}],
    "gradual": [{"frozen": "all", "steps": 6}, {"frozen": 2, "steps": 6}, {"frozen": 0}],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "train.csv", 64)
    write_texts(folder / "validation.csv", 24, seed=1)
    return folder


def values(texts, backbone, run_dir, stages="end_to_end", **train):
    return {
        "task": "sentiment",
        "source_model": str(backbone),
        "run_dir": str(run_dir),
        "data": {"train": str(texts / "train.csv"), "validation": str(texts / "validation.csv")},
        "transfer": {"stages": PRESETS[stages]},
        "head": {"batch_norm": True},
        "train": {
            "steps": 24,
            "learning_rate": 3e-3,
            "head_learning_rate": 1e-2,
            "warmup_steps": 2,
            "batch_tokens": 160,
            "evaluate_every": 6,
            **train,
        },
        "runtime": CPU,
    }


def rows(run_dir, key="loss"):
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {row["step"]: row[key] for row in found if key in row}


# --- the whole path ------------------------------------------------------------------------------


def test_a_run_learns_reports_and_loads_to_the_same_outputs(texts, text_backbone, tmp_path):
    config = values(texts, text_backbone, tmp_path / "run", steps=80)
    report = runs.train(build_config(config))
    after = report["target"]["after"]
    assert report["target"]["before"] is None
    assert after["accuracy"] > 0.9
    assert after["ci_low"] <= after["macro_f1"] <= after["ci_high"]
    assert np.array(after["confusion"]).sum() == after["examples"] == 24
    assert report["form"] == "full"
    scores = runs.evaluate(str(tmp_path / "run"), str(texts / "validation.csv"))
    assert scores["macro_f1"] == pytest.approx(after["macro_f1"])
    assert {"accuracy", "macro_f1", "ece", "ci_low", "ci_high", "examples"} <= set(scores)
    assert scores["seconds_wall"] > 0
    model = load(str(tmp_path / "run"))
    assert isinstance(model, TextModel)
    assert model.labels == ["negative", "positive"]
    assert model.temperature == pytest.approx(report["model"]["temperature"])
    found = model.predict(["good harbour", "the awful port", "good harbour"])
    assert [one.label for one in found] == ["positive", "negative", "positive"]
    assert sum(found[0].probabilities.values()) == pytest.approx(1)
    assert found[0] == found[2]


@pytest.mark.parametrize("stages", ["feature", "combined", "lora", "few_shot"])
def test_every_structure_learns(texts, text_backbone, tmp_path, stages):
    count = {"feature": 120, "lora": 150}.get(stages, 60)
    config = values(texts, text_backbone, tmp_path / "run", stages, steps=count)
    report = runs.train(build_config(config))
    # Half would be chance; a random backbone gives an adapter little to work with.
    assert report["target"]["after"]["accuracy"] > (0.65 if stages == "lora" else 0.8)
    assert len(report["stages"]) == len(PRESETS[stages])
    steps = [stage["steps"] for stage in report["stages"]]
    assert list(rows(tmp_path / "run")) == list(range(1, sum(steps) + 1))


def test_frozen_bytes_are_unchanged_after_training(texts, text_backbone, tmp_path):
    config = values(texts, text_backbone, tmp_path / "run")
    config["transfer"] = {"stages": [{"frozen": 2}], "dropout": 0.3}
    runs.train(build_config(config))
    before = load_file(text_backbone / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".2." in name or name.startswith("pooler") for name in moved)


def test_a_later_stage_does_not_end_below_the_one_before(texts, text_backbone, tmp_path):
    config = values(texts, text_backbone, tmp_path / "run", "combined", steps=60)
    # A rate at which the second stage destroys what the first has learnt.
    config["transfer"]["stages"][1] |= {"learning_rate": 3.0, "head_learning_rate": 3.0}
    config["transfer"]["stages"][0] |= {"steps": 100}
    report = runs.train(build_config(config))
    first, second = report["stages"]
    assert second["best"] >= first["best"]
    assert report["target"]["after"]["macro_f1"] == pytest.approx(second["best"])


@pytest.mark.parametrize(("score", "step"), [(0.75, 4), (0.6, 2)])
def test_a_later_stage_holds_within_a_standard_error_of_the_one_before(
    texts, text_backbone, tmp_path, monkeypatch, score, step
):
    """The best of many evaluations on 24 texts is partly luck."""
    scores = iter([0.7, 0.8, 0.7, score, score - 0.05, score - 0.1])
    measured = Trainer.evaluate
    monkeypatch.setattr(
        Trainer, "evaluate", lambda own: {**measured(own), "macro_f1": next(scores)}
    )
    config = values(texts, text_backbone, tmp_path / "run", "combined", evaluate_every=1)
    for stage in config["transfer"]["stages"]:
        stage["steps"] = 3
    report = runs.train(build_config(config))
    assert [stage["best"] for stage in report["stages"]] == [0.8, score if step > 3 else 0.8]
    assert report["cost"]["best_step"] == step


def test_pairs_of_text_and_target_are_told_apart(text_backbone, tmp_path):
    data = DataConfig(target_column="target")
    model = new_text_model(resolve(str(text_backbone)), ["a", "b"], data=data, head=HeadConfig())
    alone, with_port, with_mayor = model.encode(
        ["the port is good", "the port is good", "the port is good"], [None, "port", "mayor"]
    )
    assert alone.types is None or not any(alone.types[0])
    assert len(with_port.windows[0]) == len(alone.windows[0]) + 2
    assert not np.array_equal(with_port.windows[0], with_mayor.windows[0])
    long = model.encode(["good " * 900], ["very " * 900])[0]
    assert len(long.windows[0]) <= 512
    assert np.sum(long.windows[0] == 4) > 200  # at least half the window is the text's


def test_a_source_with_the_same_classes_is_scored_before_and_keeps_its_head(
    texts, text_backbone, tmp_path
):
    first = values(texts, text_backbone, tmp_path / "first", steps=60)
    runs.train(build_config(first))
    second = values(texts, tmp_path / "first", tmp_path / "second", steps=6, learning_rate=1e-6)
    second["head"] = {}
    second["data"]["source_domain"] = {"old": str(texts / "validation.csv")}
    report = runs.train(build_config(second))
    assert report["target"]["before"]["accuracy"] > 0.8
    assert report["source_domain"]["old"]["forgetting"] == pytest.approx(
        report["source_domain"]["old"]["before"]["macro_f1"]
        - report["source_domain"]["old"]["after"]["macro_f1"]
    )
    assert report["gain"] is not None
    load(str(tmp_path / "second"))


def test_rehearsal_is_mixed_into_the_epochs(texts, text_backbone, tmp_path):
    write_texts(tmp_path / "old.csv", 32, seed=7)
    config = values(texts, text_backbone, tmp_path / "run")
    config["data"]["rehearsal"] = str(tmp_path / "old.csv")
    with pytest.raises(UserError, match=r"set transfer\.rehearsal"):
        runs.train(build_config(config))
    config["transfer"]["rehearsal"] = 0.25
    task = runs.set_up(build_config(config), torch.device("cpu"))
    assert isinstance(task, SentimentTask)
    epochs = [list(task.epoch(epoch)) for epoch in range(2)]
    old = [[index for index in epoch if index >= 64] for epoch in epochs]
    assert [len(part) for part in old] == [21, 21]  # 21 / 85 is a quarter
    assert len(set(old[0]) | set(old[1])) == 32  # all are used before any is repeated twice
    assert (
        task.examples[64].text
        == read_texts(str(tmp_path / "old.csv"), DataConfig(), name="old").examples[0].text
    )


def test_what_a_label_means_is_learnt_from_its_texts(text_backbone, tmp_path):
    with (tmp_path / "few.csv").open("w", newline="", encoding="utf-8") as file:
        columns = csv.writer(file)
        columns.writerow(["text", "label"])
        for word in ("port", "mayor", "crane", "gate", "news", "rain"):
            columns.writerows([[f"good {word}", "1"], [f"the bad {word}", "0"]])
    config = values(tmp_path, text_backbone, tmp_path / "run", steps=60)
    config["data"] = {
        "train": str(tmp_path / "few.csv"),
        "validation_fraction": 0.3,
        "label_texts": {0: ["awful", " awful\n news "], "1": ["fine"]},
    }
    config = build_config(config)
    splits, _ = load_text_splits(config)
    assert [(one.text, one.label) for one in splits.train.examples[-3:]] == [
        ("awful", "0"),
        ("awful news", "0"),
        ("fine", "1"),
    ]
    assert len(splits.train) + len(splits.validation) == 12 + 3
    assert not {"awful", "awful news", "fine"} & {one.text for one in splits.validation.examples}
    runs.train(config)
    model = load(str(tmp_path / "run"))
    assert isinstance(model, TextModel)
    found = model.predict(["fine crane", "the awful crane"])
    assert [one.label for one in found] == ["1", "0"]


def test_label_smoothing_and_class_weights_change_the_loss_as_computed(
    texts, text_backbone, tmp_path
):
    config = values(texts, text_backbone, tmp_path / "run")
    config["transfer"] |= {"label_smoothing": 0.2, "class_weights": "inverse"}
    rows_ = (texts / "train.csv").read_text().splitlines()
    unbalanced = tmp_path / "unbalanced.csv"
    kept = [row for index, row in enumerate(rows_) if ",positive," not in row or index % 8 == 2]
    unbalanced.write_text("\n".join(kept) + "\n")
    config["data"]["train"] = str(unbalanced)
    task = runs.set_up(build_config(config), torch.device("cpu"))
    assert isinstance(task, SentimentTask)
    task.begin(task.stages[0], torch.device("cpu"))
    task.model.eval()
    micro = task.prepare([0, 1, len(kept) - 2], slice(None), 0)[0]
    with torch.no_grad():
        scores = task._logits(micro, torch.device("cpu")).log_softmax(-1)
    expected = total = 0.0
    for row, target in zip(scores.tolist(), micro.targets.tolist(), strict=True):
        weight = task._weights.tolist()
        smooth = [0.9 if i == target else 0.1 for i in range(2)]  # 0.8 + 0.2 / 2, and 0.2 / 2
        expected -= sum(w * s * x for w, s, x in zip(weight, smooth, row, strict=True))
        total += weight[target]
    assert float(task.loss(micro, torch.device("cpu")).detach()) == pytest.approx(
        expected, rel=1e-5
    )
    assert task.weight(micro) == pytest.approx(total)
    counts = [sum(e.label == label for e in task.examples) for label in task.text.labels]
    assert task._weights[0] / task._weights[1] == pytest.approx(counts[1] / counts[0])


# --- long texts ----------------------------------------------------------------------------------


def test_windows_cover_a_long_text_and_their_logits_are_averaged(text_backbone):
    data = DataConfig(max_tokens=32, long_texts="windows", window_overlap=4)
    model = new_text_model(resolve(str(text_backbone)), ["a", "b"], data=data, head=HeadConfig())
    words = [WORDS[index % len(WORDS)] for index in range(100)]
    (encoded,) = model.encode([" ".join(words)], [None])
    assert len(encoded.windows) > 3
    inner = [list(window[1:-1]) for window in encoded.windows]
    assert all(len(window) <= 32 for window in encoded.windows)
    joined = inner[0]
    for window in inner[1:]:
        assert joined[-4:] == window[:4]
        joined += window[4:]
    assert len(joined) == 100
    model.network.eval()
    whole = model.encoded_logits([encoded], device="cpu")
    parts = [type(encoded)((window,), None) for window in encoded.windows]
    single = model.encoded_logits(parts, device="cpu")
    np.testing.assert_allclose(whole[0], single.mean(0), rtol=1e-4, atol=1e-6)


def test_windows_train_from_tokens_and_from_the_cache(texts, text_backbone, tmp_path):
    for stages in ("end_to_end", "feature"):
        config = values(texts, text_backbone, tmp_path / stages, stages, steps=12)
        config["data"] |= {"max_tokens": 16, "long_texts": "windows", "window_overlap": 2}
        config["head"] |= {"conv_layers": 1}
        long = tmp_path / "long.csv"
        with long.open("w") as file:
            file.write("text,label\n")
            for index in range(16):
                opinion = ["bad", "good"][index % 2]
                file.write(f"{'the port is ' * (2 + index)}{opinion},{opinion}\n")
        config["data"] |= {"train": str(long), "validation": None}
        report = runs.train(build_config(config))
        assert report["model"]["max_tokens"] == 16


def test_a_text_of_ten_million_characters_is_read_up_to_its_limit(text_backbone):
    tokenised = []

    def counted(texts, *arguments, **options):
        tokenised.append(sum(map(len, texts)))
        return tokenizer(texts, *arguments, **options)

    model = new_text_model(
        resolve(str(text_backbone)), ["a", "b"], data=DataConfig(), head=HeadConfig()
    )
    tokenizer, model.tokenizer = model.tokenizer, counted
    (cut,) = model.encode(["good news " * 1_000_000], [None])
    assert len(cut.windows) == 1
    assert len(cut.windows[0]) == 512
    windows = DataConfig(long_texts="windows", max_windows=5)
    model = new_text_model(resolve(str(text_backbone)), ["a", "b"], data=windows, head=HeadConfig())
    tokenizer, model.tokenizer = model.tokenizer, counted
    (several,) = model.encode(["good news " * 1_000_000], [None])
    assert len(several.windows) == 5
    assert 0 < min(tokenised) <= max(tokenised) < 100_000  # of ten million


def test_averaging_windows_by_hand():
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 0.0]])
    owner = torch.tensor([0, 0, 1])
    assert average_windows(logits, owner, 2).tolist() == [[2.0, 3.0], [10.0, 0.0]]


def test_length_batches_hold_everything_within_the_budget():
    lengths = list(np.random.default_rng(0).integers(1, 60, 200))
    batches = length_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)


def test_results_do_not_depend_on_the_batch(text_backbone):
    model = new_text_model(
        resolve(str(text_backbone)), ["a", "b"], data=DataConfig(), head=HeadConfig()
    )
    lines = [" ".join(WORDS[: 1 + index % 15]) for index in range(20)]
    encoded = model.encode(lines, [None] * 20)
    one = model.encoded_logits(encoded, device="cpu", batch_tokens=1)
    many = model.encoded_logits(encoded, device="cpu", batch_tokens=10_000)
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", ["feature", "lora"])
def test_what_stands_on_random_weights_is_saved_with_them(texts, text_backbone, tmp_path, preset):
    """Even where the source could be found again by its name, which these are not of."""
    config = values(texts, text_backbone, tmp_path / "run")
    config["transfer"] = {"preset": preset, "scratch": True}
    source = replace(resolve(str(text_backbone)), source="bundled:minilm-l6")
    made = SentimentTask.set_up(build_config(config), source, torch.device("cpu"))
    assert made.carrier.base.is_portable
    assert made.form == "full"


# --- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages",
    [
        *("feature", "few_shot", "gradual", "lora"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("combined", "end_to_end")),
    ],
)
def test_every_structure_resumes_to_the_same_losses_and_weights(
    texts, text_backbone, tmp_path, stages
):
    whole = values(texts, text_backbone, tmp_path / "whole", stages, checkpoint_every=5)
    whole["transfer"] |= {"l2sp": 0.01}
    torch.manual_seed(99)  # what the process did before must not matter
    runs.train(build_config(whole))
    total = max(rows(tmp_path / "whole"))

    broken = {**whole, "run_dir": str(tmp_path / "broken")}
    process = start_training(broken, tmp_path, stop=(total - 8, signal.SIGKILL))
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "broken" / "report.json").exists()
    if stages == "feature":
        other = write_text_backbone(tmp_path / "other", layers=2)
        for changed, match in (
            ({"source_model": str(other)}, "another source_model"),
            ({"data": whole["data"] | {"max_tokens": 16}}, r"another data\.max_tokens"),
        ):
            with pytest.raises(UserError, match=match):
                runs.train(build_config({**broken, **changed}), resume=True)
    runs.train(build_config(broken), resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    for path in (tmp_path / "whole" / "model").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "broken" / "model" / path.name)
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one), path.name


# --- bad input -----------------------------------------------------------------------------------


def refusal(config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_bad_text_data_is_one_line(texts, text_backbone, tmp_path, capsys):
    config = values(texts, text_backbone, tmp_path / "run")

    def with_train(content, **data):
        path = tmp_path / "bad.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return refusal(
            config | {"data": config["data"] | {"train": str(path)} | data}, tmp_path, capsys
        )

    assert "column 'label' not found; columns are text, class" in with_train("text,class\na,b\n")
    assert "at least two classes, found only 'x'" in with_train("text,label\na,x\nb,x\n")
    line = with_train("text,label\na,x\nb,y\n")
    assert "expected labels of the training data (x, y), found 'negative', 'positive'" in line
    assert "not UTF-8" in with_train("text,label\ncafé,x\n".encode("latin-1"))
    assert "no such file" in with_train("text,label\na,x\nb,y\n", validation="nothing.csv")
    assert "found none" in with_train("text,label\n,x\n , y\n")
    good = (texts / "train.csv").read_text(encoding="utf-8")
    line = with_train(good, label_texts={"positiv": ["good"]})
    assert "data.label_texts: expected labels of the training data (negative, positive)" in line
    assert "found 'positiv'" in line
    line = with_train(good, label_texts={"positive": [" "]})
    assert "expected texts for the label 'positive', found [' ']" in line
    leak = (texts / "validation.csv").read_bytes()
    assert "are also in 'train' (same-text)" in with_train(leak)
    line = with_train(good, source_domain={"general": str(texts / "train.csv")})
    assert "texts of 'general' are also in 'train' (same-text)" in line


def test_impossible_configurations_are_one_line(texts, text_backbone, tmp_path, capsys):
    config = values(texts, text_backbone, tmp_path / "run")

    def with_section(**sections):
        return refusal(config | sections, tmp_path, capsys)

    stages: list[dict[str, Any]] = [{"frozen": 9}]
    assert "the backbone has 3 layers" in with_section(transfer={"stages": stages})
    stages = [{"frozen": "none", "adapter": {"type": "lorra"}}]
    assert "expected one of dora" in with_section(transfer={"stages": stages})
    stages = [{"frozen": "none", "adapter": {"type": "lora", "rank": 8}}]
    assert "rank" in with_section(transfer={"stages": stages})
    assert "is for speech" in with_section(head={"type": "ctc"})
    assert "layers 0 to 3" in with_section(head={"layers": [7]})
    assert "at most 512 tokens" in with_section(data=config["data"] | {"max_tokens": 900})
    native = {"type": "native"}
    stages = [{"objective": "contrastive"}, {"frozen": "all"}]
    line = with_section(head=native, transfer={"stages": stages})
    assert "set head.type: classifier" in line
    if not torch.cuda.is_available():
        assert "no usable GPU" in with_section(runtime={"device": "cuda"})


def test_a_contrastive_stage_is_not_validated(texts, text_backbone, tmp_path, monkeypatch):
    config = values(texts, text_backbone, tmp_path / "run", steps=4, evaluate_every=2)
    config["transfer"] = {"stages": PRESETS["few_shot"]}
    scored = []
    whole = SentimentTask.validate

    def validate(task, *given):
        scored.append(task.stage.number)
        return whole(task, *given)

    monkeypatch.setattr(SentimentTask, "validate", validate)
    report = runs.train(build_config(config))
    stages = {row["stage"] for row in map(json.loads, (tmp_path / "run/metrics.jsonl").open())}
    assert stages == {0, 1}
    assert set(scored) == {1}
    assert set(rows(tmp_path / "run", "validation_macro_f1")) == {14, 16}
    assert report["stages"][0]["best"] is None


def test_a_speech_model_is_no_text_model_and_the_other_way_round(
    texts, text_backbone, random_whisper, tmp_path, capsys
):
    config = values(texts, random_whisper, tmp_path / "run")
    assert "whisper" in refusal(config, tmp_path, capsys)
    assert main(["monitor", str(text_backbone), str(ROOT / "examples/site/monitor.mp4")]) == 2
    assert "expected a" in capsys.readouterr().err
    assert main(["predict", str(random_whisper), "--text", "x"]) == 2
    assert "expected a text classifier" in capsys.readouterr().err
    assert main(["evaluate", str(text_backbone), "--data", str(texts / "train.csv")]) == 2
    assert "expected a text classifier" in capsys.readouterr().err


# --- predict -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(texts, text_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    runs.train(build_config(values(texts, text_backbone, folder / "run", steps=40)))
    return folder / "run"


def test_predict_prints_a_line_of_json_for_each_text(classifier, capsys):
    assert (
        main(["predict", str(classifier), "--text", "good news", "awful", "--target", "port"]) == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["good news", "awful"]
    for line in lines:
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_predict_writes_every_row_in_order_with_its_columns(
    classifier, texts, tmp_path, ending, monkeypatch
):
    monkeypatch.setattr("mmtransfer.text.prediction._ROWS", 10)
    output = tmp_path / f"out.{ending}"
    command = ["predict", str(classifier), "--data", str(texts / "train.csv")]
    assert main([*command, "--output", str(output)]) == 0
    with (texts / "train.csv").open() as file:
        source = list(csv.DictReader(file))
    text = output.read_text(encoding="utf-8")
    if ending == "csv":
        found: list[Any] = list(csv.DictReader(text.splitlines()))
        shares = [float(row["probability_positive"]) for row in found]
    else:
        found = [json.loads(line) for line in text.splitlines()]
        shares = [row["probabilities"]["positive"] for row in found]
    assert [row["text"] for row in found] == [row["text"] for row in source]
    assert [row["given_label"] for row in found] == [row["label"] for row in source]
    model = load(str(classifier))
    assert isinstance(model, TextModel)
    expected = model.predict([row["text"] for row in source])
    assert [row["label"] for row in found] == [one.label for one in expected]
    np.testing.assert_allclose(shares, [o.probabilities["positive"] for o in expected], atol=2e-5)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_interrupted_prediction_resumes_to_the_same_file(
    classifier, texts, tmp_path, ending, monkeypatch, capsys
):
    monkeypatch.setattr("mmtransfer.text.prediction._ROWS", 10)
    data = tmp_path / "quoted.csv"
    lines = [f'"good\nnews ""{index}""",x' for index in range(35)]
    data.write_text("text,label\n" + "\n".join(lines) + "\n")
    command = ["predict", str(classifier), "--data", str(data), "--output"]
    whole, broken = tmp_path / f"whole.{ending}", tmp_path / f"broken.{ending}"
    assert main([*command, str(whole)]) == 0
    part = tmp_path / f"broken.{ending}.part"
    content = whole.read_bytes()
    for cut in (0, 5, len(content) // 3, len(content) // 2 + 3, len(content)):
        part.write_bytes(content[:cut])
        assert main([*command, str(broken)]) == 2
        assert "--resume" in capsys.readouterr().err
        assert main([*command, str(broken), "--resume"]) == 0
        assert broken.read_bytes() == content, cut


def test_predict_refuses_what_it_cannot_use(classifier, texts, tmp_path, capsys):
    command = ["predict", str(classifier), "--data"]
    assert main([*command, str(texts / "train.csv"), "--output", str(tmp_path / "x.xlsx")]) == 2
    assert "expected a .csv or .jsonl file" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("body\nx\n")
    assert main([*command, str(other)]) == 2
    assert "Set --text-column" in capsys.readouterr().err
    assert main([*command, str(other), "--text-column", "body"]) == 0
    assert main(["predict", str(classifier)]) == 2


def test_the_task_script_trains_and_classifies(texts, text_backbone, tmp_path):
    config = values(texts, text_backbone, tmp_path / "run", steps=20)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    script = ROOT / "tasks" / "news_sentiment.py"
    options = ["--config", path, "--text", "good news", "--target", "port", "--data"]
    code, out, error = run_command(*options, texts / "train.csv", program=script)
    assert code == 0, error
    assert "macro-F1" in out
    assert out.splitlines()[-1].endswith("good news")
    other = ["nothing.csv", "--run-dir", tmp_path / "other"]
    code, out, error = run_command(*options, *other, program=script)
    assert code == 2
    assert error.strip().splitlines()[-1].startswith("error: nothing.csv: no such file")


# --- other architectures -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert"])
def test_other_backbones_train_partly_frozen_with_their_own_head(texts, kind, tmp_path):
    backbone = write_text_backbone(tmp_path / "backbone", kind)
    config = values(texts, backbone, tmp_path / "run", steps=4)
    config |= {"head": {"type": "native"}, "transfer": {"stages": [{"frozen": 1}]}}
    report = runs.train(build_config(config))
    assert report["loads_with_transformers"]
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(tmp_path / "run" / "model"))
    model = load(str(tmp_path / "run"))
    assert isinstance(model, TextModel)
    found = classify("good harbour news")[0]
    assert found["label"] in model.labels


# --- texts that are too long, and columns ---------------------------------------------------------


def long_text(mention, at, words=3000):
    text = ["port"] * words
    text[at] = mention
    return " ".join(text)


@pytest.mark.parametrize("long_texts", ["truncate", "windows"])
@pytest.mark.parametrize("at", [3, 700, 2990])
def test_of_a_long_text_the_part_that_mentions_its_target_is_read(text_backbone, long_texts, at):
    data = DataConfig(max_tokens=64, long_texts=long_texts, max_windows=2, window_overlap=8)
    model = new_text_model(resolve(str(text_backbone)), ["a", "b"], data=data, head=HeadConfig())
    texts = [long_text("Mayor rain", at), long_text("rain", at), "the mayor is good"]
    encoded = model.encode(texts, ["Mayor  Rain", "mayor rain", "mayor"])
    assert [one.is_cut for one in encoded] == [True, True, False]
    for one, word in zip(encoded, ("mayor", "rain", "mayor"), strict=True):
        assert len(one.windows) <= 2
        assert max(map(len, one.windows)) <= 64
        read = [model.tokenizer.decode(window) for window in one.windows]
        assert any(word in text.split("[SEP]")[0] for text in read)
    plain = model.encode([texts[0]], [None])[0]
    assert plain.is_cut
    assert model.encode([texts[0]], ["gate"])[0].windows[0][1] == plain.windows[0][1]


def test_texts_that_are_cut_are_counted_and_said(classifier, tmp_path, capsys, caplog):
    data = tmp_path / "long.csv"
    rows = [long_text("good", 5), "good news", long_text("bad", 5)]
    data.write_text("text,label\n" + "\n".join(f"{text},positive" for text in rows) + "\n")
    line = "2 of 3 texts are longer than 512 tokens and were cut"
    assert main(["predict", str(classifier), "--data", str(data)]) == 0
    assert line in caplog.text
    caplog.clear()
    assert main(["evaluate", str(classifier), "--data", str(data)]) == 0
    assert line in caplog.text
    caplog.clear()
    assert main(["predict", str(classifier), "--text", rows[0]]) == 0
    assert "1 of 1 texts are longer" in caplog.text
    assert main(["predict", str(classifier), "--text", rows[1]]) == 0
    assert caplog.text.count("longer than") == 1


def test_predict_refuses_what_is_no_text_and_says_what_it_does_not_use(
    classifier, tmp_path, caplog, capsys
):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "good", "target": 1}\n{"text": null, "target": 0}\n')
    assert main(["predict", str(classifier), "--data", str(data)]) == 0
    assert "column 'target' is not used; the model was trained without targets" in caplog.text
    assert "1 of 2 rows have no text" in caplog.text
    data.write_text('{"text": "good"}\n{"text": {"0": "bad"}}\n')
    assert main(["predict", str(classifier), "--data", str(data)]) == 2
    assert "a.jsonl:2: column 'text': expected text or a number, found a dict" in (
        capsys.readouterr().err
    )
    data.write_text('{"text": {"0": "good", "1": "bad"}}\n')
    assert main(["predict", str(classifier), "--data", str(data)]) == 2
    assert "holds whole columns" in capsys.readouterr().err
    csv_data = tmp_path / "a.csv"
    csv_data.write_text("text,other\ngood,x\nbad\n")
    assert main(["predict", str(classifier), "--data", str(csv_data)]) == 2
    assert "a.csv:3: expected 2 cells" in capsys.readouterr().err
    command = ["predict", str(classifier), "--data", str(csv_data), "--text-column", "other"]
    assert main([*command, "--target-column", "other"]) == 2
    assert "are the same column" in capsys.readouterr().err


def test_a_label_in_the_target_column_scores_no_better_than_chance(classifier, tmp_path, capsys):
    rows = "".join(f"{i},news port gate,{i % 2}\n" for i in range(12))
    data = tmp_path / "tweets.csv"
    data.write_text(
        "id,text,target\n" + rows.replace(",0\n", ",positive\n").replace(",1\n", ",negative\n")
    )
    command = ["evaluate", str(classifier), "--data", str(data), "--label-column", "target"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macro_f1"] < 0.6
