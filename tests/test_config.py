import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT, child_environment

from mmtransfer.cli import main
from mmtransfer.config import Config, build_config, field_names, load_config, read_yaml
from mmtransfer.errors import UserError


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    assert read_yaml(write(tmp_path, "a: 2e-5\nb: 1E3\nc: e5\nd: 2e-5x"))["a"] == 2e-5
    config = load_config(write(tmp_path, "train:\n  learning_rate: 2e-5"))
    assert config.train.learning_rate == 2e-5


def test_unknown_key_is_refused_with_the_nearest_valid_one(tmp_path):
    with pytest.raises(UserError, match=r"'train\.lerning_rate'.*'train\.learning_rate'"):
        load_config(write(tmp_path, "train:\n  lerning_rate: 1"))
    with pytest.raises(UserError, match=r"'learning_rate'.*'train\.learning_rate'"):
        load_config(write(tmp_path, "learning_rate: 1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 5, epochs: 1}", "not both"),
        ("train: {learning_rate: fast}", "train.learning_rate"),
        ("train: {steps: -1}", "train.steps"),
        ("augment: {speed: [1.2, 0.8]}", r"expected \[low, high\]"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("data: {allow_leaks: [everything]}", "allow_leaks"),
        ("runtime: {seed: -1}", r"runtime\.seed.*found -1"),
        ("runtime: {seed: 99999999999999999999999}", r"runtime\.seed.*less than"),
        ("auto: {budget_seconds: .inf}", r"auto\.budget_seconds.*finite number, found inf"),
        ("auto: {budget_seconds: .nan}", r"auto\.budget_seconds.*found nan"),
        ("train: {max_grad_norm: .inf}", r"train\.max_grad_norm.*finite"),
        ("transfer: {interpolate: .nan}", r"transfer\.interpolate"),
        ("augment: {noise_snr_db: [0, .inf]}", r"noise_snr_db.*finite"),
        ("search: {space: {train.learning_rate: {low: 1, high: .inf}}}", "finite"),
    ],
)
def test_wrong_values_get_one_clear_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_merge_refuses_a_seed_that_is_none(tmp_path, capsys):
    arguments = ["merge", "a", "b", "--to", str(tmp_path / "run"), "--seed", "-1"]
    assert main(arguments) == 2
    assert "merge: seed: Input should be greater than or equal to 0" in capsys.readouterr().err


def test_missing_file_and_wrong_encoding(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "nothing.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"source: caf\xe9")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(path)


def test_overrides_reach_nested_fields(tmp_path):
    config = load_config(
        write(tmp_path, "train: {steps: 7, learning_rate: 1e-3}\ndata: {source_domain: {a: x}}"),
        {"train": {"learning_rate": "1e-4"}, "data": {"source_domain": {"b": "y"}}},
    )
    assert config.train.steps == 7
    assert config.train.learning_rate == 1e-4
    assert config.data.source_domain == {"a": "x", "b": "y"}


def test_every_field_has_help_and_a_command_line_option():
    result = subprocess.run(
        [sys.executable, "-m", "mmtransfer.cli", "train", "--help"],
        env={**child_environment(), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for name in field_names():
        leaf = name.rsplit(".", 1)[-1]
        model: Any = Config
        for part in name.split(".")[:-1]:
            model = model.model_fields[part].annotation
        if name in (
            "data",
            "augment",
            "transfer",
            "head",
            "train",
            "evaluation",
            "search",
            "auto",
            "runtime",
        ):
            continue
        assert f"--{name}" in result.stdout, name
        description = model.model_fields[leaf].description
        assert description, f"{name} has no help text"
        assert " ".join(description.split())[:40] in " ".join(result.stdout.split()), name


def test_command_line_names_the_nearest_option(tmp_path, capsys):
    path = write(tmp_path, "train: {steps: 1}")
    assert main(["train", str(path), "--train.lerning_rate", "1"]) == 2
    error = capsys.readouterr().err
    assert "--train.learning_rate" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data", "foo"),
        ("--data.source_domain", "foo"),
        ("--data.label_texts", "{positive: [good]}"),
        ("--head.layers", "[1"),
    ],
)
def test_lists_and_objects_that_are_no_json_are_one_line(tmp_path, capsys, option, value):
    path = write(tmp_path, "train: {steps: 1}")
    assert main(["train", str(path), option, value]) == 2
    error = capsys.readouterr().err
    assert f"{option}: expected JSON" in error
    assert repr(value) in error
    assert len(error.strip().splitlines()) == 1


def test_every_shipped_configuration_is_valid_and_names_its_command():
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)
        head = path.read_text(encoding="utf-8").split("task:")[0]
        assert f"mmtransfer train {path.relative_to(ROOT).as_posix()}" in head


def test_defaults_survive_a_round_trip():
    config = build_config({})
    assert build_config(config.model_dump(mode="json")) == config


def test_a_field_works_by_its_former_name_and_names_the_new_one(tmp_path, caplog):
    path = write(tmp_path, "source: x\ndata: {sources: {a: b}}")
    config = load_config(path, {"source_model": "y"})
    assert (config.source_model, config.data.source_domain) == ("y", {"a": "b"})
    assert "'source' is called 'source_model' now" in caplog.text
    assert "data: 'sources' is called 'source_domain' now" in caplog.text
    assert build_config({"source": "x"}).source_model == "x"
    with pytest.raises(UserError, match="give one of them"):
        build_config({"source": "x", "source_model": "y"})
