"""One transfer from source to run folder, and the evaluation of a finished model."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml
from accelerate.utils import broadcast_object_list

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, DataConfig, build_config, merge
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.models import load
from mmtransfer.report import model_card
from mmtransfer.runtime import choose_device, make_accelerator, use_runtime
from mmtransfer.speech.clips import (
    Clip,
    ClipSet,
    bundled_speech,
    hold_out,
    load_clips,
    read_clips,
    refuse_leaks,
    usual_language,
)
from mmtransfer.speech.ctc import CtcModel, new_ctc_model
from mmtransfer.speech.ctc_task import CtcTask
from mmtransfer.speech.scores import SpeechScore
from mmtransfer.speech.short_context_task import ShortContextTask
from mmtransfer.speech.whisper import SpeechModel, load_speech_model
from mmtransfer.speech.whisper_task import ClipScoring, SpeechTask, evaluate_clips, transcribe
from mmtransfer.text.classifier import TextModel, new_text_model
from mmtransfer.text.classifier_task import SentimentTask, evaluate_texts
from mmtransfer.text.examples import (
    TextSet,
    add_label_texts,
    check_labels,
    hold_out_texts,
    label_names,
    read_texts,
    refuse_text_leaks,
)
from mmtransfer.transfer.classification import ClassificationScore
from mmtransfer.transfer.stages import (
    SourcePath,
    Stage,
    can_interpolate,
    rehearsal_share,
    resolve_stages,
)
from mmtransfer.transfer.task import refuse_objective
from mmtransfer.transfer.trainer import TrainResult, go_back, train_stages

logger = logging.getLogger(__name__)
Split = TypeVar("Split", ClipSet, TextSet)
_UNITS = {"speech": "audio_seconds", "sentiment": "tokens"}


@dataclass
class Splits(Generic[Split]):
    """The data of a run."""

    train: Split
    validation: Split
    sources: dict[str, Split]
    rehearsal: Split | None

    @property
    def evaluated(self) -> dict[str, Split]:
        """Sets that are scored before and after: the target, then the source domains."""
        return {"target": self.validation} | {f"source {k}": v for k, v in self.sources.items()}

    @property
    def all(self) -> list[Any]:
        """Every set."""
        named = [self.train, self.validation, *self.sources.values(), self.rehearsal]
        return [split for split in named if split is not None]


def _check_data(config: Config) -> str:
    if config.data.train is None:
        raise UserError("data.train is not set. Name the training data: --data.train PATH")
    if config.task == "speech" and config.data.language == "auto":
        raise UserError(
            "data.language: training needs the language of the speech, found 'auto'. Name it (en, "
            "zh, ...), or give the clips a column 'language'."
        )
    if config.data.rehearsal not in ("auto", "none") and not rehearsal_share(config):
        raise UserError("data.rehearsal is not used: set transfer.rehearsal, e.g. to 0.3.")
    return config.data.train


def choose_rehearsal(config: Config, language: str | None = None) -> str | None:
    """What a transfer rehearses: a path, `bundled` or nothing.

    `language` is that in which the source transcribes; None if it does not transcribe, so that
    there is nothing to forget.

    Raises:
        UserError: a share of rehearsal without data for it.
    """
    named = config.data.rehearsal
    if named == "auto":
        named = "none"
        if language is not None and rehearsal_share(config):
            if bundled_speech(language) is not None:
                named = "bundled"
            else:
                logger.info(
                    "rehearsal: off, since this package has general speech in English alone and "
                    "the source transcribes '%s'; name some with data.rehearsal",
                    language,
                )
    if named != "none":
        return named
    if config.transfer.rehearsal:
        raise UserError("transfer.rehearsal needs source-domain data: set data.rehearsal.")
    return None


def add_rehearsal(
    splits: Splits[ClipSet],
    source: SpeechModel | CtcModel,
    language: str | None,
    config: Config,
    device: torch.device,
) -> None:
    """Give a speech transfer the clips that it rehearses, checked for leaks; without transcripts
    they get the source's.

    `language` as for `choose_rehearsal`.

    Raises:
        UserError: unusable data, or a leak into validation or source-domain sets.
    """
    named = choose_rehearsal(config, language)
    if named is None:
        return
    path, columns = Path(named), config.data
    if named == "bundled":
        spoken = language or config.data.language or "en"
        found = bundled_speech(spoken)
        if found is None:
            raise UserError(
                f"data.rehearsal: bundled is speech in English, the language is '{spoken}'. Name a "
                "folder with general speech in that language, or none."
            )
        path, columns = found, DataConfig()  # it has its own column names, whatever the user's are
    clips = load_clips(
        path, columns, name="rehearsal", max_seconds=source.max_context_s, labelled=False
    )
    for other in (splits.validation, *splits.sources.values()):
        refuse_leaks(clips, other, config.data.allow_leaks)
    if not any(clip.text for clip in clips.clips):
        if language is None:
            raise UserError(
                f"{named}: expected transcripts, found none, and {config.source} has no output yet "
                "that could take their place."
            )
        clips = transcribe(source, clips, config, device)
    splits.rehearsal = clips
    logger.info(
        "rehearsal: %s, %s, %.0f %% of each batch; data.rehearsal: none turns it off",
        named,
        _size(clips),
        100 * rehearsal_share(config),
    )


def load_splits(
    config: Config,
    max_seconds: float,
    *,
    labelled: bool = True,
    languages: Sequence[str] | None = None,
    train_clips: list[Clip] | None = None,
) -> Splits[ClipSet]:
    """Training, validation and source-domain clips, checked for leaks.

    Unless `labelled`, training and validation clips need no transcripts. `languages` are those
    that the source has, `train_clips` what `read_clips` gave of the training data.

    Raises:
        UserError: no training data named, unusable data, or a leak between splits.
    """
    data, named = config.data, _check_data(config)
    load = partial(load_clips, config=data, max_seconds=max_seconds, languages=languages)
    train = load(named, name="train", labelled=labelled, clips=train_clips)
    if data.validation is None:
        chosen, held = hold_out(train.clips, data.validation_fraction, config.runtime.seed)
        validation = ClipSet("validation (held out)", [train.clips[i] for i in held])
        train = ClipSet("train", [train.clips[i] for i in chosen], train.skipped)
    else:
        validation = load(data.validation, name="validation", labelled=labelled)
    refuse_leaks(train, validation, data.allow_leaks)
    sources = {name: load(path, name=name) for name, path in data.sources.items()}
    return Splits(train, validation, sources, None)


def load_text_splits(config: Config) -> tuple[Splits[TextSet], list[str]]:
    """Training, validation, source-domain and rehearsal texts, checked for leaks; and the classes.

    Raises:
        UserError: no training data named, unusable data, one class only, a label that training
            data does not have, or a leak between splits.
    """
    data, named = config.data, _check_data(config)
    train = read_texts(named, data, name="train")
    labels = label_names(train)
    if data.validation is None:
        chosen, held = hold_out_texts(train.examples, data.validation_fraction, config.runtime.seed)
        validation = TextSet("validation (held out)", [train.examples[i] for i in held])
        train = TextSet("train", [train.examples[i] for i in chosen], train.skipped)
    else:
        validation = read_texts(data.validation, data, name="validation", split="validation")
    train = add_label_texts(train, data.label_texts)
    refuse_text_leaks(train, validation, data.allow_leaks)
    sources = {
        name: read_texts(path, data, name=name, split="validation")
        for name, path in data.sources.items()
    }
    rehearsal, rehearsed = None, choose_rehearsal(config)
    if rehearsed == "bundled":
        raise UserError("data.rehearsal: bundled is speech; for texts name a file, or none.")
    if rehearsed is not None:
        rehearsal = read_texts(rehearsed, data, name="rehearsal")
        for other in (validation, *sources.values()):
            refuse_text_leaks(rehearsal, other, data.allow_leaks)
    splits = Splits(train, validation, sources, rehearsal)
    for texts in splits.all:
        check_labels(texts, labels, where=texts.name)
    return splits, labels


@dataclass
class _Job:
    """A transfer that is set up: what is trained, and how it is scored."""

    task: SpeechTask | CtcTask | SentimentTask
    splits: Splits[Any]
    score: Callable[[Any, torch.device], dict[str, Any]]
    is_scored_before: bool
    """False where the source has no output for the target yet."""
    finish: Callable[[torch.device], None]
    """What is fitted on validation data after training."""
    describe: Callable[[], dict[str, Any]]
    """The report's section on the finished model."""
    is_plain: Callable[[], bool]
    """Whether the result loads with plain transformers pipelines."""
    score_source: Callable[[Any, torch.device], dict[str, Any]] | None = None
    """The same before training, where `evaluate` uses more of the source than training does."""


def _job(config: Config, device: torch.device) -> _Job:
    source = resolve(config.source, config.revision)
    if config.task == "speech":
        return _speech_job(config, source, device)
    return _text_job(config, source)


def _speech_job(config: Config, source: Checkpoint, device: torch.device) -> _Job:
    stages = resolve_stages(config)
    is_short = any(stage.objective == "short_context" for stage in stages)
    clips = read_clips(_check_data(config), config.data, labelled=not is_short)
    language = config.data.language or usual_language(clips)
    if _reads_by_ctc(config, source):
        splits = load_splits(config, 30.0, train_clips=clips)
        ctc = new_ctc_model(
            source,
            [clip.text for clip in splits.train.clips],
            language=language,
            head=config.head,
            seed=config.runtime.seed,
        )
        heard = (ctc.language or "unknown") if ctc.is_source_head else None
        add_rehearsal(splits, ctc, heard, config, device)
        ctc_task = CtcTask(ctc, splits.train, splits.validation, config, stages, splits.rehearsal)
        splits.train = ctc_task.target
        return _Job(
            ctc_task,
            splits,
            lambda clips, device: evaluate_clips(ctc, clips, config, device).as_dict(),
            ctc.is_source_head,
            lambda device: None,
            lambda: {"language": ctc.language, "max_context_s": ctc.max_context_s},
            lambda: ctc_task.form == "full" and ctc.is_plain,
        )
    speech = load_speech_model(source, language=language, short_contexts=False, can_detect=False)
    if is_short:
        return _short_context_job(speech, config, stages, clips)
    refuse_objective(stages, "another objective")
    splits = load_splits(
        config, speech.max_context_s, languages=speech.languages, train_clips=clips
    )
    add_rehearsal(splits, speech, speech.language or "en", config, device)
    task = SpeechTask(speech, splits.train, splits.validation, config, stages, splits.rehearsal)
    splits.train = task.target
    spoken = sorted({clip.language or speech.language or "en" for clip in splits.train.clips})

    def finish(device: torch.device) -> None:
        task.measure_shortest_context(device, list(splits.sources.values()))
        task.measure_window(device, list(splits.sources.values()))

    return _Job(
        task,
        splits,
        lambda clips, device: evaluate_clips(speech, clips, config, device).as_dict(),
        True,
        finish,
        lambda: {
            "language": speech.language or "en",
            **({"languages": spoken} if len(spoken) > 1 else {}),
            "shortest_context_s": speech.shortest_context_s,
            "window_s": speech.window_s,
            "max_context_s": speech.max_context_s,
        },
        lambda: task.form == "full",
        score_source=_source_scorer(speech, source, config),
    )


def _source_scorer(
    speech: SpeechModel, source: Checkpoint, config: Config
) -> Callable[[Any, torch.device], dict[str, Any]] | None:
    """What scores a source with the adapter for short contexts that this package has for it, as
    `evaluate` and `monitor` use it; training begins without. None where there is no such adapter.
    """
    if source.short is None:
        return None

    @cache
    def as_used() -> SpeechModel:
        found = load_speech_model(source, language=config.data.language or speech.language)
        return replace(speech, short=found.short)

    return lambda clips, device: evaluate_clips(as_used(), clips, config, device).as_dict()


def _short_context_job(
    speech: SpeechModel, config: Config, stages: Sequence[Stage], clips: list[Clip]
) -> _Job:
    if config.data.rehearsal not in ("auto", "none"):
        raise UserError(
            "data.rehearsal: a short_context stage has the source as its target and forgets "
            "nothing; remove it, or put those recordings into data.train."
        )
    splits = load_splits(
        config,
        speech.max_context_s,
        labelled=False,
        languages=speech.languages,
        train_clips=clips,
    )
    task = ShortContextTask(speech, splits.train, splits.validation, config, stages)
    splits.train = task.target

    def finish(device: torch.device) -> None:
        task.measure_margin(device)
        task.measure_shortest_context(device, list(splits.sources.values()))

    def describe() -> dict[str, Any]:
        return {
            "languages": task.languages,
            "shortest_context_s": speech.shortest_context_s,
            "margin_s": speech.margin_s,
            "max_context_s": speech.max_context_s,
        }

    labelled = all(clip.text for split in splits.evaluated.values() for clip in split.clips)
    return _Job(
        task,
        splits,
        # Without transcripts, what the source reads in full takes their place.
        lambda clips, device: task.score(
            task.validation if clips is splits.validation else clips, device
        ).as_dict(),
        labelled,
        finish,
        describe,
        lambda: False,
    )


def _reads_by_ctc(config: Config, source: Checkpoint) -> bool:
    kind = config.head.type
    if kind in ("classifier", "native"):
        raise UserError(f"head.type: {kind} is for texts; for speech use ctc, decoder or auto.")
    if kind != "auto":
        return kind == "ctc"
    return source.kind == "ctc"


def _text_job(config: Config, source: Checkpoint) -> _Job:
    if config.head.type in ("ctc", "decoder"):
        raise UserError(
            f"head.type: {config.head.type} is for speech; for texts use classifier, native or "
            "auto."
        )
    stages = resolve_stages(config)
    splits, labels = load_text_splits(config)
    text = new_text_model(
        source,
        labels,
        data=config.data,
        head=config.head,
        seed=config.runtime.seed,
    )
    text.settings = replace(text.settings, targets=any(e.target for e in splits.train.examples))
    task = SentimentTask(text, splits.train, splits.validation, config, stages, splits.rehearsal)

    def finish(device: torch.device) -> None:
        task.calibrate(device)

    return _Job(
        task,
        splits,
        lambda texts, device: evaluate_texts(text, texts, config, device).as_dict(),
        text.is_source_head,
        finish,
        lambda: {
            "labels": text.labels,
            "temperature": text.temperature,
            "max_tokens": text.settings.max_tokens,
        },
        lambda: text.network.head is None,
    )


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
    _check_data(config)
    with accelerator.main_process_first():  # the others then find decoded clips in the cache
        job = _job(config, accelerator.device)
    task, splits = job.task, job.splits
    logger.info("train %s, validation %s", _size(splits.train), _size(splits.validation))
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(run_dir / "config.yaml") as part:
            text = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
            part.write_text(text, encoding="utf-8")
    accelerator.wait_for_everyone()

    task.model.to(accelerator.device)
    before: dict[str, Any] = dict.fromkeys(splits.evaluated)
    if job.is_scored_before and accelerator.is_main_process:
        before = _scores_before(job, run_dir, accelerator.device)
    accelerator.wait_for_everyone()
    path = _source_path(config, job)
    results = train_stages(task, task.stages, config, accelerator, run_dir, resume=resume)
    share = 1.0
    if path is not None:
        wanted, best = config.transfer.interpolate, results[-1].best
        assert best is not None  # the last stage has the task's own loss
        share = go_back(task, path, wanted, best, accelerator)

    report: dict[str, Any] = {}
    if accelerator.is_main_process:
        device = accelerator.device
        job.finish(device)
        with atomic_path(run_dir / "model") as folder:
            folder.mkdir(parents=True)
            task.save(folder)
        after = _scores(job, device)
        report = _report(config, job, before, after, results, accelerator)
        report["share_of_way"] = share
        _write_report(run_dir, config, report)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    return broadcast_object_list([report])[0]


def _source_path(config: Config, job: _Job) -> SourcePath | None:
    """The line back to the source, if the result may lie on it.

    Raises:
        UserError: a share of it for a model that has no such line.
    """
    wanted, task = config.transfer.interpolate, job.task
    has_line = type(task) is SpeechTask and can_interpolate(task.stages)
    if isinstance(wanted, float) and not has_line:
        raise UserError(
            "transfer.interpolate is for a Whisper with its decoder, trained whole or with lora "
            "adapters; remove it."
        )
    if wanted == "none" or not has_line:
        return None
    return SourcePath(task.layout.source_parameters())


def _report(
    config: Config,
    job: _Job,
    before: dict[str, Any],
    after: dict[str, Any],
    results: list[TrainResult],
    accelerator: Any,
) -> dict[str, Any]:
    task = job.task
    metric: str = task.metric

    def change(name: str) -> float | None:
        """How much better the set is read than before."""
        old, new = (scores[name] and scores[name][metric] for scores in (before, after))
        if old is None or new is None:
            return None
        return float(new - old if task.higher_is_better else old - new)

    def minus(value: float | None) -> float | None:
        return None if value is None else -value

    report: dict[str, Any] = {
        "task": config.task,
        "metric": metric,
        "higher_is_better": task.higher_is_better,
        "source_model": config.source,
        "form": task.form,
        "loads_with_transformers": job.is_plain(),
        "target": {"before": before["target"], "after": after["target"]},
        "sources": {
            name: {
                "before": before[f"source {name}"],
                "after": after[f"source {name}"],
                "forgetting": minus(change(f"source {name}")),
            }
            for name in job.splits.sources
        },
        "gain": change("target"),
        "rehearsal": _rehearsal_report(config, job.splits),
        "cost": {
            "steps": sum(result.steps for result in results),
            "epochs": round(sum(result.epochs for result in results), 3),
            "best_step": results[-1].best_step,
            "early_stopped": any(result.early_stopped for result in results),
            "train_seconds": round(sum(result.seconds for result in results), 2),
            f"{_UNITS[config.task]}": round(sum(result.units for result in results), 2),
            "trained_parameters": max(result.trained_parameters for result in results),
            "device": _device_name(accelerator.device, accelerator.num_processes),
        },
        "stages": [
            {"frozen": stage.frozen, "adapter": stage.adapter, **asdict(result)}
            for stage, result in zip(task.stages, results, strict=True)
        ],
        "model": job.describe(),
        "data": {split.name: _split_report(split) for split in job.splits.all},
        "versions": _versions(),
    }
    return report | {"forgetting": _judged(config, report)}


def _rehearsal_report(config: Config, splits: Splits[Any]) -> dict[str, Any]:
    if splits.rehearsal is None:
        return {"data": "none", "share": 0.0}
    named = config.data.rehearsal
    return {
        "data": "bundled" if named == "auto" else named,
        "share": rehearsal_share(config),
    }


def _judged(config: Config, report: dict[str, Any]) -> dict[str, Any]:
    """Which source-domain sets lost more than they may, and what helps; see `forgetting_note`."""
    limit = config.transfer.max_forgetting
    lost = {name: found["forgetting"] for name, found in report["sources"].items()}
    over = [name for name, loss in lost.items() if loss is not None and loss > limit]
    share = report["rehearsal"]["share"]
    if not over:
        remedy = None
    elif share:
        remedy = (
            f"raise transfer.rehearsal (now {share:g}), lower train.learning_rate, or rehearse "
            "recordings like these (data.rehearsal)"
        )
    else:
        what = "bundled, or " if config.task == "speech" else ""
        remedy = f"rehearse: set data.rehearsal to {what}data like these"
    return {"limit": limit, "over": over, "remedy": remedy}


def _size(split: ClipSet | TextSet) -> str:
    if isinstance(split, ClipSet):
        return f"{len(split)} clips ({split.seconds:.0f} s)"
    return f"{len(split)} texts"


def _split_report(split: ClipSet | TextSet) -> dict[str, Any]:
    if isinstance(split, ClipSet):
        seconds = round(split.seconds, 2)
        return {"clips": len(split), "seconds": seconds, "skipped": split.skipped}
    counts = Counter(example.label for example in split.examples)
    return {
        "examples": len(split),
        "labels": dict(sorted(counts.items())),
        "skipped": len(split.skipped),
        "first_skipped": split.skipped[:10],
    }


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


def _scores(job: _Job, device: torch.device) -> dict[str, dict[str, Any]]:
    return {name: job.score(examples, device) for name, examples in job.splits.evaluated.items()}


def _scores_before(job: _Job, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Scores of the source model; kept in the run folder so that resuming does not repeat them."""
    path = run_dir / "checkpoints" / "before.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    logger.info("evaluating the source model")
    score = job.score_source or job.score
    scores = {name: score(clips, device) for name, clips in job.splits.evaluated.items()}
    with atomic_path(path) as part:
        part.write_text(json.dumps(scores), encoding="utf-8")
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
        (data, "rehearsal"),
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
    """Score a model on data.

    `model` is a run folder, a checkpoint folder, a Hub id or `bundled:NAME`; `data` any form that
    training takes; `language` goes before that of `config`. Returns the fields of `SpeechScore` or
    `ClassificationScore` with `metric`, `seconds_wall` (recognition or classification alone),
    `skipped`, and for speech `seconds_audio`.

    Raises:
        UserError: a model or data that cannot be used.
    """
    config = config or Config()
    if language is not None:
        values = merge(config.model_dump(), {"data": {"language": language}})
        config = build_config(values, origin="language")
    with use_runtime(config.runtime):
        device = choose_device(config.runtime)
        language, read = config.data.language, None
        checkpoint = resolve(model, config.revision)
        if checkpoint.kind != "sentiment":
            read = read_clips(data, config.data)
            language = language or usual_language(read)
        found = load(checkpoint, language=language)
        score: SpeechScore | ClassificationScore
        if isinstance(found, TextModel):
            texts = read_texts(data, config.data, name="data", split="validation")
            check_labels(texts, found.labels, where=data)
            found.network.to(device)
            started = time.perf_counter()
            score = evaluate_texts(found, texts, config, device)
            extra = {"metric": SentimentTask.metric, "skipped": len(texts.skipped)}
        else:
            known = found.languages if isinstance(found, SpeechModel) else None
            clips = load_clips(
                data,
                config.data,
                name="data",
                max_seconds=found.max_context_s,
                languages=known,
                clips=read,
            )
            found.model.to(device)
            started = time.perf_counter()
            score = evaluate_clips(found, clips, config, device)
            extra = {
                "metric": ClipScoring(clips.clips, found.language, config).metric,
                "skipped": len(clips.skipped),
                "seconds_audio": round(clips.seconds, 3),
            }
        seconds = time.perf_counter() - started
    result: dict[str, Any] = _finite(
        {**score.as_dict(), **extra, "seconds_wall": round(seconds, 3)}
    )
    return result


def _device_name(device: torch.device, count: int) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    return f"{count} x {name}" if count > 1 else name


def _versions() -> dict[str, str]:
    names = ("mmtransfer", "torch", "transformers", "accelerate", "peft")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # running from a source tree without installation
            continue
    return found
