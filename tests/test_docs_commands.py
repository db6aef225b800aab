"""Every command in the README and the documentation works: against the example data and stand-ins,
without network and cameras. `support/docs_commands.py` says how each is checked; one that is not
there fails.
"""

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import (
    EXAMPLE,
    ROOT,
    tone,
    write_dataset,
    write_media,
    write_text_backbone,
    write_texts,
)
from support.docs_commands import (
    BEFORE,
    COMMANDS,
    FIXTURES,
    INSTALL,
    LAUNCH,
    MORE,
    NEEDS,
    OPTIONS,
    PART,
    RUN,
    RUN_SLOWLY,
    SERVE,
    SHORTENED,
    TEXTS,
    TRAIN,
    TRAIN_SLOWLY,
)
from support.hub_programs import TOKEN, environment
from support.hub_server import Hub
from support.journals import NOON, alert, text, write
from support.keys import write_keys
from support.programs import Nats, postgres
from support.servers import write_certificate

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config, merge
from mmtransfer.server.tokens import Role, Tokens, tokens_path

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = r"(?:mmtransfer|python3?|pip|accelerate|torchrun|mkdocs|just|hf|\.ci/\w+)"


def commands_of(text: str) -> list[str]:
    """Commands in blocks without a language, and in back quotes, each on one line."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language in ("", "bash"):
            found += [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", rest)
    found += [span for span in spans if re.match(rf"{PROGRAMS}\s", span)]
    return [" ".join(command.split()) for command in found]


def checked_by(*checks: str) -> list[str]:
    return [command for command, check in COMMANDS.items() if check in checks]


def cases(check: str) -> list[Any]:
    """Commands with a check, those that take long marked."""
    slow = [pytest.param(c, marks=pytest.mark.slow) for c in checked_by(f"{check} slowly")]
    return [*checked_by(check), *slow]


def test_every_command_has_its_check_and_every_check_a_command():
    written = {c for page in PAGES for c in commands_of(page.read_text(encoding="utf-8"))}
    assert written - set(COMMANDS) == set()
    assert set(COMMANDS) - written == set()


# --- stand-ins -----------------------------------------------------------------------------------


def write_spoken(folder: Path, first: int, last: int) -> None:
    """A data set of some clips of real speech."""
    folder.mkdir(parents=True, exist_ok=True)
    with (EXAMPLE / "source" / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[first:last]
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for row in rows:
            shutil.copyfile(EXAMPLE / "source" / row["file_name"], folder / row["file_name"])
            writer.writerow([row["file_name"], row["transcription"]])


def write_model(folder: Path, model: Path) -> None:
    """A finished run with a model that is here."""
    (folder / "model").mkdir(parents=True)
    for file in model.iterdir():
        shutil.copyfile(file, folder / "model" / file.name)
    (folder / "report.json").write_text("{}")


def write_speech(folder: Path) -> None:
    """Recordings, cameras and data sets."""
    speech = EXAMPLE / "source" / "source_000.ogg"
    long = ("wh_weekly_address_ms13.ogg", "dictation_rosehill_v1.ogg", "dictation_rosehill_v2.ogg")
    copies = ("gate.mp4", "yard.mp4", "more/0.mp4", "archive/2025/0.ogg", "streams/7.ogg")
    for name in (*copies, "streams/8.ogg", *long, "p25_dispatch_first.flac"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(speech, folder / name)
    for name in (*long, "p25_dispatch_first.flac"):
        spoken = [{"start": 0, "end": 3, "text": "the council"}]
        (folder / name).with_suffix(".json").write_text(json.dumps(spoken))
    for ending in (".mp4", ".json"):
        (folder / f"desk_10min{ending}").symlink_to(EXAMPLE / f"monitor{ending}")
    (folder / "talk.mp3").symlink_to(folder / "gate.mp4")
    (folder / "talk.srt").write_text("1\n00:00:00,000 --> 00:00:03,000\nsome words\n")
    (folder / "list.csv").write_text("file_name\ngate.mp4\n")
    (folder / "names.txt").write_text("Jane Doe\n")
    (folder / "cameras.yaml").write_text(
        "model: runs/my_site\ncameras:\n- {name: gate, url: gate.mp4, loud_db: 25}\n"
    )
    words = ["gate one", "all clear", "", "stop", "go", "crane two", "yard", "hook"]
    for name in ("my_site/train", "sets/read_speech"):
        write_dataset(folder / name, words)
    write_dataset(folder / "my_site/validation", words[:3])
    write_spoken(folder / "grid_s1/train", 0, 8)
    write_spoken(folder / "grid_s1/validation", 8, 11)
    for name in ("ljspeech", "telephone_prompts", "held_out", "speech"):
        write_spoken(folder / name, 11, 15)
    (folder / "recordings").mkdir()
    for path in sorted((EXAMPLE / "source").glob("*.ogg"))[:2]:
        shutil.copyfile(path, folder / "recordings" / path.name)
    site = yaml.safe_load((ROOT / "configs/video_monitoring/example_site.yaml").read_text())
    small = {"train": "my_site/train", "validation": "my_site/validation", "source_domain": {}}
    (folder / "small_site.yaml").write_text(yaml.safe_dump(site | {"data": small}))


def write_sounds(folder: Path) -> None:
    """Sounds of two classes, and noise."""
    for label, base in (("alarm", 200), ("dog", 2000)):
        (folder / "sounds" / label).mkdir(parents=True)
        for index in range(4):
            sound = tone(1.0, hertz=base + 30 * index)
            write_media(folder / "sounds" / label / f"{index}.wav", sound)
    write_media(folder / "alarm.wav", tone(1.0, hertz=200))
    for label, base in (("hum", 100), ("hiss", 3000)):
        (folder / "noise" / label).mkdir(parents=True)
        for index in range(8):  # enough for folds, and parts of them
            sound = tone(1.0, hertz=base + 10 * index)
            write_media(folder / "noise" / label / f"{index}-{label}-A.wav", sound)


def write_tables(folder: Path) -> None:
    """Texts with labels."""
    for name, count in {"news": 48, "few": 48, "more_news": 12, "news_mtsc/train": 48}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_texts(folder / f"{name}.csv", count, seed=len(name), targets=True)
    (folder / "archive.jsonl").write_text('{"text": "red green", "target": "red"}\n')
    reviews = [f"product_reviews/{name}" for name in ("books", "dvd", "electronics")]
    sets = ("sst2/train", "sst2/validation", "USER/SET/train")
    for seed, name in enumerate(("books", "dvd", "electronics", "zh", *reviews, *sets)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_texts(folder / f"{name}.csv", 300 if name in sets else 80, seed=seed)
    (folder / "data").symlink_to(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory, whisper_tiny, random_whisper):
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("benchmarks", "examples", "tasks"):  # copies: what some write lies beside them
        shutil.copytree(ROOT / name, folder / name)
    package = ROOT / "mmtransfer" / "speech"
    for name in ("short_context", "turn_ends"):
        shutil.copytree(package / name, folder / "mmtransfer" / "speech" / name)
    for name in ("my_site", "grid"):
        write_model(folder / "runs" / name, whisper_tiny)
    write_model(folder / "runs" / "short", package / "short_context" / "whisper-tiny.en")
    (folder / "runs" / "my_site" / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    write_text_backbone(folder / "backbone", layers=6)
    (folder / "runs" / "other").symlink_to(folder / "backbone")
    (folder / "whisper").symlink_to(random_whisper)
    write_speech(folder)
    write_sounds(folder)
    write_tables(folder)
    write_keys(folder, "maker")
    (folder / "peer" / "bin").mkdir(parents=True)  # a peer that always gives the same text
    (folder / "peer" / "bin" / "python").write_text("#!/bin/sh\necho '[\"the council\"]'\n")
    (folder / "peer" / "bin" / "python").chmod(0o755)
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """The working folder of a command: what it writes there is its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for folder in (place, place / "runs"):
        for path in folder.iterdir():
            if path != place / "runs":
                (tmp_path / path.relative_to(place)).symlink_to(path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MMTRANSFER_CACHE", os.environ["MMTRANSFER_CACHE"])  # some benchmarks set it
    return tmp_path


@pytest.fixture
def desk(receiver):
    return receiver().url


@pytest.fixture(scope="module")
def database():
    with postgres() as (address, _):
        yield f"{address}postgres"


@pytest.fixture
def site_broker(tmp_path):
    made = Nats(tmp_path / "nats")
    made.start()
    yield made.address
    made.stop()


@pytest.fixture
def bucket(tmp_path):
    """Where an address in an object store leads to; workers in other processes see it too."""
    return f"file://{tmp_path}/"


@pytest.fixture
def cluster():
    """A cluster whose GPUs are only counted."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
    yield made.address
    made.shutdown()


@pytest.fixture
def hub():
    made = Hub(TOKEN)
    yield made
    made.close()


def stood_in(command: str, request: pytest.FixtureRequest) -> str:
    """A command with what is here in the place of what is not."""
    for pattern, replacement in TEXTS.items():
        command = re.sub(pattern, replacement, command)
    for pattern, name in FIXTURES.items():
        if re.search(pattern, command):
            command = re.sub(pattern, request.getfixturevalue(name), command)
    if not torch.cuda.is_available():
        command = command.replace("--device cuda", "--device cpu")
    return command


def entry(table: dict[str, Any], command: str, default: Any) -> Any:
    """What a table has for a command, by its longest beginning there."""
    begins = [beginning for beginning in table if command.startswith(beginning)]
    return table[max(begins, key=len)] if begins else default


SHORT = {"steps": 2, "epochs": None}


@pytest.fixture(scope="module")
def short_training(place, random_whisper):
    """`runs.train` on a tiny source model, for two steps."""
    whole = runs.train

    def train(config, *, resume=False):
        values = config.model_dump(mode="json")
        stages = [{**stage, **SHORT} for stage in values["transfer"]["stages"]]
        cut: dict[str, Any] = {"train": {**SHORT, "evaluate_every": 2, "full_context": 0.0}}
        cut["runtime"] = {"threads": 1, "device": "cpu"}
        if config.task == "sentiment":
            cut["source_model"] = str(place / "backbone")
        elif config.task != "short_context":  # its teacher is one that can transcribe
            cut["source_model"] = str(random_whisper)
        if config.task == "speech":
            cut |= {"data": {"rehearsal": "none"}, "transfer": {"interpolate": "none"}}
        values = merge(values, cut)
        values["transfer"]["stages"] = stages
        if config.task == "sentiment":
            values["data"]["label_texts"] = {}
        return whole(build_config(values), resume=resume)

    return train


def arguments_of(command: str) -> list[str]:
    """What stands behind `mmtransfer`."""
    words = shlex.split(command)
    return words[words.index("mmtransfer") + 1 :]


@pytest.fixture(scope="module")
def trained(place, short_training):
    """The runs that other commands use, made by their own commands."""
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    patch.setattr(runs, "train", short_training)
    for command in checked_by(TRAIN):
        assert main(arguments_of(command)) == 0
    patch.undo()


def run(command: str, here: Path, request: pytest.FixtureRequest) -> None:
    """Run a command in this process; what talks to the Hub in one of its own."""
    words = shlex.split(stood_in(command, request)) + shlex.split(entry(MORE, command, ""))
    if "--run-dir" in words:  # a new one
        (here / words[words.index("--run-dir") + 1]).unlink(missing_ok=True)
    if "--ray" in words:
        pytest.importorskip("ray")
    if words[0] == "python":
        patch = request.getfixturevalue("monkeypatch")
        script = here / words[1]
        patch.syspath_prepend(script.parent)
        patch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(script), run_name="__main__")
    elif "USER/NAME" in words and "--dry-run" not in words:
        hub = request.getfixturevalue("hub")
        surroundings = environment(hub.endpoint, here / "home")
        program = [sys.executable, "-m", "mmtransfer", *words[1:]]
        done = subprocess.run(program, env=surroundings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sys.stdout.write(done.stdout)
    else:
        assert main(words[1:]) == 0


@pytest.mark.parametrize("command", cases(RUN))
def test_a_command_runs(command, here, trained, short_training, request, monkeypatch, capsys):
    for script, program in NEEDS.items():
        if script in command and shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if command.startswith(SHORTENED):
        monkeypatch.setattr(runs, "train", short_training)
    if re.match(r"mmtransfer (index|forget|ship) ", command):
        line = text("gate", NOON + 60 * 86400, "Please open the gate.")
        write(here / "journal", "2026-01-24", line, alert(line, "gate"))
    for one in entry(BEFORE, command, []):
        run(one, here, request)
    run(command, here, request)
    printed = capsys.readouterr()
    assert "error" not in printed.err
    made = re.search(r"--(?:output|to) ([^-]*)", command)
    for name in made[1].replace("FILE", "FILE.csv").split() if made else []:
        if "://" not in (name := name.removeprefix("s3://")):
            assert (here / name).stat().st_size > 0
    if "--search" in command:
        assert "Please open the gate." in printed.out
    if " monitor " in command:
        assert "segments from" in printed.err


@pytest.mark.parametrize("command", cases(SERVE))
def test_a_server_begins_and_ends(command, here, trained, broker, request, monkeypatch, caplog):
    async def stop(program):
        program.signal = signal.SIGTERM

    monkeypatch.setattr("mmtransfer.server.serve.Program.main_loop", stop)
    Tokens(tokens_path()).add("desk", Role.OPERATOR)
    write_certificate(here)
    if "--home-assistant" in command:
        port, start, _ = broker
        start()
        cameras = yaml.safe_load((here / "cameras.yaml").read_text())
        (here / "cameras.yaml").unlink()
        address = {"mqtt": f"mqtt://127.0.0.1:{port}/site/cameras"}
        (here / "cameras.yaml").write_text(yaml.safe_dump(cameras | address))
    words = shlex.split(stood_in(command, request))
    assert main([*words[1:], "--port", "0"]) == 128 + signal.SIGTERM
    assert "serving at http" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("command", checked_by(TRAIN_SLOWLY))
def test_a_training_command_trains(command, here, short_training, request, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # each has a precision of its own
    monkeypatch.setattr(runs, "train", short_training)
    run_dir = here / "run"
    words = arguments_of(stood_in(command, request))
    assert main([*words, "--run-dir", str(run_dir)]) == 0
    assert json.loads((run_dir / "report.json").read_text())["cost"]["steps"] > 0


@pytest.mark.parametrize("command", checked_by(LAUNCH))
def test_the_options_of_a_launcher_exist(command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words[1:])
        assert found.training_script == "mmtransfer"
    else:
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(words[2:])
        assert found.training_script == "mmtransfer"


@pytest.mark.parametrize("command", checked_by(TRAIN, TRAIN_SLOWLY, LAUNCH))
def test_a_training_command_describes_a_run(command, place, request, monkeypatch, capsys):
    configs = []
    monkeypatch.chdir(place)
    command = stood_in(command, request)
    monkeypatch.setattr(runs, "train", lambda config, *, resume: configs.append(config))
    monkeypatch.setattr("mmtransfer.cli.train._print_report", lambda run_dir, report: None)
    assert main(arguments_of(command)) == 0
    (config,) = configs
    assert Path(config.data.train).exists()
    words = shlex.split(command)
    assert config.run_dir == words[words.index("--run-dir") + 1]


@pytest.mark.parametrize("test", sorted({c for c in COMMANDS.values() if "::" in c}))
def test_the_test_that_runs_a_command_exists(test):
    path, name = test.split("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", checked_by(PART))
def test_what_is_named_in_passing_is_run_elsewhere(command):
    verb, *flags = command.split()[1:]
    running = checked_by(RUN, RUN_SLOWLY, TRAIN, TRAIN_SLOWLY)
    assert any(
        c.startswith(f"mmtransfer {verb} ") and set(flags) <= set(c.split()) for c in running
    )


@pytest.mark.parametrize("command", checked_by(OPTIONS))
def test_the_options_of_a_command_exist(command):
    words = shlex.split(command)
    script = (ROOT / words[1]).read_text(encoding="utf-8")
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in script] == []


@pytest.mark.parametrize("command", checked_by(INSTALL))
def test_what_is_installed_exists(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\[([\w,]+)\]'", command):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for file in re.findall(r"-c (\S+)|python (\S+\.py)", command):
        assert all((ROOT / name).is_file() for name in file if name)
    named = re.match(r"(?:accelerate|hf) ", command)
    assert not named or any(
        d.startswith(("accelerate", "huggingface-hub")) for d in project["dependencies"]
    )
