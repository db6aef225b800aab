"""One transfer from source to run folder, and the evaluation of a finished model."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from mmtransfer.backbones import SpeechModel, load_speech_model
from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, DataConfig
from mmtransfer.data import ClipSet, hold_out, load_clips, refuse_leaks
from mmtransfer.errors import UserError
from mmtransfer.evaluation import speech_metric
from mmtransfer.publishing import model_card
from mmtransfer.runtime import choose_device, make_accelerator, use_runtime
from mmtransfer.tasks.speech import SpeechTask, evaluate_clips
from mmtransfer.training import Trainer

logger = logging.getLogger(__name__)


def load_splits(config: Config, max_seconds: float) -> tuple[ClipSet, ClipSet, dict[str, ClipSet]]:
    """Training, validation and source-domain clips, checked for leaks.

    Raises:
        UserError: no training data named, unusable data, or a leak between splits.
    """
    data = config.data
    if data.train is None:
        raise UserError("data.train is not set. Name the training data: --data.train FOLDER")
    train = load_clips(data.train, data, name="train", max_seconds=max_seconds)
    if data.validation is None:
        chosen, held = hold_out(train.clips, data.validation_fraction, config.runtime.seed)
        validation = ClipSet("validation (held out)", [train.clips[i] for i in held])
        train = ClipSet("train", [train.clips[i] for i in chosen], train.skipped)
    else:
        validation = load_clips(data.validation, data, name="validation", max_seconds=max_seconds)
    refuse_leaks(train, validation, data.allow_leaks)
    sources = {
        name: load_clips(path, data, name=name, max_seconds=max_seconds)
        for name, path in data.sources.items()
    }
    return train, validation, sources


def train(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Run a transfer and write its run folder; returns the report.

    With `resume`, continues from the run folder's checkpoint if there is one.

    Raises:
        UserError: unusable configuration or data, or a run folder that holds another run.
        training.Interrupted: SIGINT or SIGTERM; a checkpoint is written.
    """
    with use_runtime(config.runtime):
        return _train(config, resume)


def _train(config: Config, resume: bool) -> dict[str, Any]:
    run_dir = Path(config.run_dir)
    accelerator = make_accelerator(config.train, config.runtime)
    if accelerator.is_main_process:
        _claim(run_dir, resume)
    accelerator.wait_for_everyone()
    if config.data.train is None:
        raise UserError("data.train is not set. Name the training data: --data.train FOLDER")
    speech = load_speech_model(
        config.source, revision=config.revision, language=config.data.language
    )
    with accelerator.main_process_first():  # the others then find decoded clips in the cache
        train_set, validation, sources = load_splits(config, speech.max_context_s)
    logger.info(
        "train %d clips (%.0f s), validation %d clips (%.0f s)",
        len(train_set),
        train_set.seconds,
        len(validation),
        validation.seconds,
    )
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(run_dir / "config.yaml") as part:
            text = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
            part.write_text(text, encoding="utf-8")
    accelerator.wait_for_everyone()

    evaluated = {"target": validation, **{f"source {k}": v for k, v in sources.items()}}
    before = _scores_before(config, run_dir, speech, evaluated, accelerator)
    task = SpeechTask(speech, train_set, validation, config)
    trainer = Trainer(task, config.train, config.runtime, accelerator, run_dir)
    result = trainer.run(resume=resume)

    report: dict[str, Any] = {}
    if accelerator.is_main_process:
        device = accelerator.device
        task.measure_shortest_context(device)
        with atomic_path(run_dir / "model") as folder:
            task.save(folder)
        after = _scores(config, speech, evaluated, device)
        report = {
            "task": config.task,
            "metric": task.metric,
            "source_model": config.source,
            "target": {"before": before["target"], "after": after["target"]},
            "sources": {
                name: {
                    "before": before[f"source {name}"],
                    "after": after[f"source {name}"],
                    "forgetting": after[f"source {name}"][task.metric]
                    - before[f"source {name}"][task.metric],
                }
                for name in sources
            },
            "gain": before["target"][task.metric] - after["target"][task.metric],
            "cost": {
                "steps": result.steps,
                "epochs": result.epochs,
                "best_step": result.best_step,
                "early_stopped": result.early_stopped,
                "train_seconds": result.seconds,
                "audio_seconds": result.units,
                "trained_parameters": sum(p.numel() for p in trainer.parameters),
                "device": _device_name(device, result.devices),
            },
            "model": {
                "language": speech.language or "en",
                "shortest_context_s": speech.shortest_context_s,
                "max_context_s": speech.max_context_s,
            },
            "data": {
                split.name: {
                    "clips": len(split),
                    "seconds": round(split.seconds, 2),
                    "skipped": split.skipped,
                }
                for split in (train_set, validation, *sources.values())
            },
            "versions": _versions(),
        }
        _write_report(run_dir, config, report)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    return trainer.from_main_process(report)


def _claim(run_dir: Path, resume: bool) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected a folder for the run, found a file.")
    if (run_dir / "report.json").exists():
        raise UserError(
            f"{run_dir}: holds a finished run. Choose another with --run-dir, or remove it."
        )
    if (run_dir / "checkpoints").exists() and not resume:
        raise UserError(
            f"{run_dir}: holds an unfinished run. Continue it with --resume, choose another "
            "--run-dir, or remove it."
        )


def _scores(
    config: Config, speech: SpeechModel, sets: dict[str, ClipSet], device: torch.device
) -> dict[str, dict[str, Any]]:
    return {
        name: evaluate_clips(speech, clips, config, device).as_dict()
        for name, clips in sets.items()
    }


def _scores_before(
    config: Config, run_dir: Path, speech: SpeechModel, sets: dict[str, ClipSet], accelerator: Any
) -> dict[str, Any]:
    """Scores of the source model; kept in the run folder so that resuming does not repeat them."""
    path = run_dir / "checkpoints" / "before.json"
    scores: dict[str, Any] = {}
    if accelerator.is_main_process:
        if path.is_file():
            scores = json.loads(path.read_text(encoding="utf-8"))
        else:
            logger.info("evaluating the source model")
            speech.model.to(accelerator.device)
            scores = _scores(config, speech, sets, accelerator.device)
            with atomic_path(path) as part:
                part.write_text(json.dumps(scores), encoding="utf-8")
    accelerator.wait_for_everyone()
    return scores


def _write_report(run_dir: Path, config: Config, report: dict[str, Any]) -> None:
    for name, text in (
        ("report.json", json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n"),
        ("README.md", model_card(config, report)),
    ):
        with atomic_path(run_dir / name) as part:
            part.write_text(text, encoding="utf-8")
    shutil.copyfile(run_dir / "README.md", run_dir / "model" / "README.md")


def _finite(value: Any) -> Any:
    """Infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with every default filled in and local paths made absolute."""
    values = config.model_dump(mode="json")

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    data, augment = values["data"], values["augment"]
    for section, key in (
        (data, "train"),
        (data, "validation"),
        (augment, "noise_dir"),
        (augment, "reverb_dir"),
    ):
        section[key] = absolute(section[key])
    data["sources"] = {name: absolute(path) for name, path in data["sources"].items()}
    return values


def evaluate(
    model: str,
    data: str,
    *,
    config: Config | None = None,
    language: str | None = None,
) -> dict[str, Any]:
    """Score a model on speech data.

    `model` is a run folder, a checkpoint folder, a Hub id or `bundled:NAME`; `data` any form that
    training takes. Returns the fields of `evaluation.SpeechScore` with `metric`, `seconds_audio`,
    `seconds_wall` (recognition alone) and `skipped`.

    Raises:
        UserError: a model or data that cannot be used.
    """
    config = config or Config(data=DataConfig(language=language))
    with use_runtime(config.runtime):
        device = choose_device(config.runtime)
        speech = load_speech_model(model, revision=config.revision, language=config.data.language)
        clips = load_clips(data, config.data, name="data", max_seconds=speech.max_context_s)
        speech.model.to(device)
        started = time.perf_counter()
        score = evaluate_clips(speech, clips, config, device)
        seconds = time.perf_counter() - started
    result = {
        **score.as_dict(),
        "metric": speech_metric(speech.language),
        "seconds_audio": round(clips.seconds, 3),
        "seconds_wall": round(seconds, 3),
        "skipped": len(clips.skipped),
    }
    return _finite(result)


def _device_name(device: torch.device, count: int) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    return f"{count} x {name}" if count > 1 else name


def _versions() -> dict[str, str]:
    names = ("mmtransfer", "torch", "transformers", "accelerate")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # running from a source tree without installation
            continue
    return found
