"""One set of options for Python, a file of cameras and the command line; each value is checked."""

import argparse
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tone, write_media

from mmtransfer.cli import main
from mmtransfer.cli.monitor import _options, add_arguments
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Camera, MonitorOptions, RecognitionOptions, load_options
from mmtransfer.monitoring.lines import LineSettings

WRONG: dict[str, Any] = {
    "model": " ",
    "language": 3,
    "engine": "onnx",
    "compute_type": "int4",
    "device": "tpu",
    "threads": -1,
    "context_s": 0,
    "beam_size": 2.5,
    "prompt": None,
    "words": "yes",
    "line_s": float("inf"),
    "line_characters": 0,
    "sentiment": "",
    "sounds": 3,
    "sound_thresholds": {"glass": 1.5},
    "sources": "gate.mp4",
    "channels": 0,
    "live": "no",
    "keywords": "fire",
    "loud_db": 100,
    "partial": 1,
    "journal": "",
    "output": "gate.srt",
    "alert_clips": 7,
    "webhook": 7,
    "mqtt": "",
    "redact": "phone",
    "redact_clips": "yes",
    "retention": {"text": 0},
    "metrics_port": 1.5,
}
GIVEN: dict[str, Any] = {
    "language": "de",
    "engine": "transformers",
    "compute_type": "float32",
    "device": "cpu",
    "threads": 2,
    "context_s": "full",
    "beam_size": 3,
    "prompt": "Hexburn yard",
    "words": True,
    "line_s": 5.5,
    "line_characters": 60,
    "sentiment": "runs/news",
    "sounds": "runs/sounds",
    "sound_thresholds": {"glass": 0.9, "dog bark": 0.5},
    "channels": 2,
    "live": False,
    "keywords": ("fire", "open the gate"),
    "loud_db": 25,
    "partial": True,
    "journal": "heard",
    "output": ("gate.jsonl", "gate.txt"),
    "alert_clips": "clips",
    "webhook": "https://desk.example/alerts",
    "mqtt": "mqtt://broker/topic",
    "redact": ("phone", {"pattern": "a=b"}),
    "redact_clips": True,
    "retention": {"text": 90, "clips": 0.5},
    "metrics_port": "0.0.0.0:9100",
}
FLAGS = [
    *("--language", "de", "--engine", "transformers", "--compute", "float32", "--device", "cpu"),
    *("--threads", "2", "--context", "full", "--beam", "3", "--prompt", "Hexburn yard", "--words"),
    *("--line-seconds", "5.5", "--line-characters", "60", "--sentiment", "runs/news"),
    *("--sounds", "runs/sounds", "--sound-thresholds", "glass=0.9", "dog bark=0.5"),
    *("--channels", "2", "--no-live", "--keywords", "fire", "--keywords", "open the gate"),
    *("--loud", "25", "--partial", "--journal", "heard", "--output", "gate.jsonl", "gate.txt"),
    *("--retention", "text=90", "clips=0.5", "--redact", "phone", "pattern=a=b"),
    *("--alert-clips", "clips", "--redact-clips", "--webhook", "https://desk.example/alerts"),
    *("--mqtt", "mqtt://broker/topic", "--metrics-port", "0.0.0.0:9100"),
]


def parsed(*arguments):
    """Options of a command line behind `mmtransfer monitor`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _options(parser.parse_args(arguments))


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_cannot_be_used_is_one_line_with_its_name(name):
    values = {"model": "m", name: WRONG[name]}
    with pytest.raises(UserError, match=rf"^{name}: expected .*, found ") as caught:
        MonitorOptions(**values)
    assert "\n" not in str(caught.value)


def test_every_option_is_checked_and_none_is_forgotten_in_these_tests():
    names = {field.name for field in fields(MonitorOptions)}
    assert names == set(WRONG)
    assert names - {"model", "sources"} == set(GIVEN)


def test_a_secret_in_a_value_is_not_quoted():
    with pytest.raises(UserError) as caught:
        MonitorOptions("m", output="rtsp://me:hush@cam/1")
    assert "hush" not in str(caught.value)


def test_the_command_line_the_file_and_python_mean_the_same(tmp_path):
    there = MonitorOptions("m", sources=["gate.mp4"], **GIVEN)
    assert parsed("m", "gate.mp4", *FLAGS) == there
    camera: dict[str, Any] = {"name": "gate", "url": "rtsp://cam/1", "loud_db": 20}
    path = tmp_path / "cameras.yaml"
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in GIVEN.items()}
    path.write_text(yaml.safe_dump({"cameras": [camera], "model": "m", **plain}))
    # Paths in the file are beside it.
    places: dict[str, Any] = {
        "journal": str(tmp_path / "heard"),
        "alert_clips": str(tmp_path / "clips"),
    }
    places["output"] = [str(tmp_path / name) for name in GIVEN["output"]]
    assert load_options(path) == replace(there, sources=[Camera(**camera)], **places)
    assert parsed("m", "--cameras", str(path), *FLAGS) == replace(there, sources=[Camera(**camera)])


def test_the_command_line_goes_before_the_file(tmp_path):
    path = tmp_path / "cameras.yaml"
    path.write_text("cameras: [{name: a, url: a.mp4}]\nbeam_size: 4\nwords: true\nlanguage: de\n")
    options = parsed("m", "--cameras", str(path), "--beam", "1")
    assert (options.beam_size, options.words, options.language) == (1, True, "de")
    with pytest.raises(UserError, match="expected a model"):
        load_options(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beam: 4", r"found 'beam'\. Did you mean 'beam_size'"),
        ("sources: [a.mp4]", "found 'sources'"),
        ("beam_size: many", r"cameras\.yaml: beam_size: expected a number from 1 to 100"),
        ("keywords: fire", r"cameras\.yaml: keywords: expected a list"),
        ("output: [cameras.yaml]", "names the cameras"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message, capsys):
    path = tmp_path / "cameras.yaml"
    path.write_text(f"cameras: [{{name: a, url: a.mp4}}]\n{text}\n")
    with pytest.raises(UserError, match=message):
        load_options(path, model="m")
    assert main(["monitor", "m", "--cameras", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beam", "0"], "argument --beam: expected a number from 1 to 100, found 0"),
        (["--beam", "many"], "argument --beam: expected a number from 1 to 100, found 'many'"),
        (["--beam", "3000"], "argument --beam: expected a number from 1 to 100, found 3000"),
        (["--threads", "100000"], "argument --threads: expected a number from 0 to 1024"),
        (["--loud", "nan"], "argument --loud: expected dB above"),
        (["--context", "none"], "argument --context: expected seconds or 'full', found 'none'"),
        (["--channels", "both"], "argument --channels: expected mix, split or a number"),
        (["--engine", "onnx"], "argument --engine: expected one of auto, ctranslate2"),
        (["--journal", ""], "argument --journal: expected a folder"),
        (["--line-seconds", "0"], "argument --line-seconds: expected seconds above 0"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named_as_it_was_given(flags, message, capsys):
    assert main(["monitor", "m", "gate.mp4", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "mmtransfer monitor --help" in line


def test_options_are_what_recognition_is_opened_with():
    options = RecognitionOptions("m", words=True, context_s="full", line_s=3, prompt="Hexburn")
    assert options.decoding.words_from_s == 0
    assert options.decoding.prompt == "Hexburn"
    assert options.lines == LineSettings(3, 84)
    assert options.shortest_context_s == float("inf")
    assert RecognitionOptions("m").decoding.words_from_s == float("inf")
    assert RecognitionOptions("m").shortest_context_s is None
    with pytest.raises(FrozenInstanceError):
        options.words = False  # type: ignore[misc]
    with pytest.raises(TypeError):
        RecognitionOptions("m", loud_db=3)  # type: ignore[call-arg]


def test_what_is_for_all_sources_is_not_for_one_that_has_its_own(tmp_path):
    write_media(tmp_path / "call.wav", tone(1.0), channels=2)
    url = str(tmp_path / "call.wav")
    own = Camera("own", url, keywords=["fire"], loud_db=30, channels=2, live=False)
    options = MonitorOptions(
        "m", sources=[own, Path(url)], keywords=["gate"], loud_db=20, channels="split"
    )
    own, first, second = options.cameras()
    assert (own.keywords, own.loud_db, own.channels) == (["fire", "gate"], 30, 2)
    assert (first.name, first.keywords, first.loud_db) == ("call-1", ["gate"], 20)
    assert (second.name, second.channels) == ("call-2", 2)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "expected at least one"),
        ([Camera("a", "a.mp4"), Camera("a", "b.mp4")], "'a' occurs twice"),
        (["-", "pcm:16000"], "standard input is given twice"),
    ],
)
def test_sources_that_cannot_be_monitored_together(sources, message):
    with pytest.raises(UserError, match=message):
        MonitorOptions("m", sources=sources).cameras()


def test_options_of_a_file_work_by_their_former_names(tmp_path, caplog):
    path = tmp_path / "cameras.yaml"
    camera = {"name": "gate", "url": "rtsp://gate/1", "watch": ["fire"]}
    path.write_text(
        yaml.safe_dump({"cameras": [camera], "model": "m", "watch": ["x"], "clips": "c"})
    )
    options = load_options(path)
    assert (options.keywords, options.alert_clips) == (("x",), str(tmp_path / "c"))
    (found,) = options.sources
    assert isinstance(found, Camera)
    assert list(found.keywords) == ["fire"]
    assert caplog.text.count("is called 'keywords' now") == 2
    assert "'clips' is called 'alert_clips' now" in caplog.text
