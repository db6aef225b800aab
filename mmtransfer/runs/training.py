"""One transfer from source to run folder, and the evaluation of a finished model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from mmtransfer import __version__
from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, build_config, merge, resolved
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.runs.card import source_record, write_card
from mmtransfer.runs.energy import measured
from mmtransfer.runs.models import TASKS, task_for, task_of
from mmtransfer.runs.report import finite, make_report, without_outcomes, write_report
from mmtransfer.runs.sample import write_sample
from mmtransfer.runtime import choose_device, make_accelerator, tracked, use_runtime
from mmtransfer.transfer.processes import (
    check_run_folder,
    check_same,
    from_main,
    in_turn,
    lost_processes,
)
from mmtransfer.transfer.stages import SourcePath
from mmtransfer.transfer.task import Task
from mmtransfer.transfer.trainer import Watch, go_back, train_stages

logger = logging.getLogger(__name__)
OUTCOMES = "outcomes.json"
"""Of a run folder: for each of its sets what the model made of each example."""


def train(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Run a transfer and write its run folder; returns the report.

    With `resume`, continues from the run folder's checkpoint if there is one. With fields in
    `search.space` it runs a search (see `search`); with the preset `auto` it chooses the structure
    first (see `choose`).

    Raises:
        UserError: unusable configuration or data, or a run folder that holds another run.
        training.Interrupted: SIGINT or SIGTERM; a checkpoint is written.
    """
    if config.search.space and config.transfer.preset == "auto":
        raise UserError(
            "search.space and transfer.preset: auto both choose by trials. Remove either, or set "
            "transfer.preset to a structure."
        )
    if config.search.space:
        from mmtransfer.runs.search import search  # which runs transfers itself

        return search(config, resume=resume)
    if config.transfer.preset == "auto":
        from mmtransfer.runs.choose import choose  # the same

        return choose(config, resume=resume)
    return train_watched(config, resume=resume)


def train_watched(
    config: Config,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    choice: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`train` without a search or a choice; `watch` sees every validation score, and may raise to
    end it, `choice` says in the report how these stages were chosen.
    """
    with use_runtime(config.runtime):
        return _train(config, resume, watch, choice)


def _train(
    config: Config, resume: bool, watch: Watch | None, choice: dict[str, Any] | None
) -> dict[str, Any]:
    run_dir = Path(config.run_dir)
    accelerator = make_accelerator(config.train, config.runtime, run_dir)
    with lost_processes(accelerator):
        return _transfer(config, resume, watch, choice, run_dir, accelerator)


def _transfer(
    config: Config,
    resume: bool,
    watch: Watch | None,
    choice: dict[str, Any] | None,
    run_dir: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    from_main(accelerator, lambda: claim(run_dir, resume))
    check_run_folder(accelerator, run_dir)
    # The others of a node find its first one's decoded clips in the cache.
    task = in_turn(accelerator, lambda: set_up(config, accelerator.device))
    splits = task.splits
    check_same(
        accelerator,
        {
            "mmtransfer": __version__,
            "source_model": task.source.digest,
            "data.train": task.fingerprint,
            "data.validation": splits.validation.size,
        },
    )
    logger.info("train %s, validation %s", splits.train.size, splits.validation.size)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(run_dir / "config.yaml") as part:
            text = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
            part.write_text(text, encoding="utf-8")
    accelerator.wait_for_everyone()

    task.model.to(accelerator.device)
    before: dict[str, Any] = dict.fromkeys(splits.evaluated)
    if task.is_scored_before:
        # Into the dictionary, since the others have no use for it.
        from_main(
            accelerator,
            lambda: before.update(_scores_before(task, run_dir, accelerator.device)),
        )
    if config.transfer.scratch:
        task.forget_source()
    path = source_path(config, task)
    with tracked(accelerator, config), measured() as energy:
        results = train_stages(
            task, task.stages, config, accelerator, run_dir, resume=resume, watch=watch
        )
    share = 1.0
    if path is not None:
        share = go_back(task, path, config.transfer.interpolate, accelerator)

    def finish() -> dict[str, Any]:
        device = accelerator.device
        task.finish(device)
        with atomic_path(run_dir / "model") as folder:
            folder.mkdir(parents=True)
            task.save(folder)
        write_sample(run_dir, task.carrier, splits.validation)
        after = _scores(task, device)
        monitored = task.score_monitored(run_dir / "model", splits.evaluated["target"], device)
        base = source_record(task.source)
        report = make_report(config, task, before, after, results, accelerator, base)
        report["share_of_way"] = share
        report["cost"] |= energy
        if choice is not None:
            report["choice"] = choice
        if monitored is not None:
            report["target"]["monitored"] = without_outcomes(monitored)
        write_outcomes(run_dir, {"before": before, "after": after})
        write_card(run_dir, config, report)
        write_report(run_dir, report)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return report

    return from_main(accelerator, finish)


def set_up(config: Config, device: torch.device) -> Task:
    """The task of a transfer with its model and data; the source is resolved here, once.

    Raises:
        UserError: unusable configuration, data or source.
    """
    TASKS[config.task].check(config)
    source = resolve(config.source_model, config.revision)
    task = task_for(config, source).set_up(config, source, device)
    task.source = source
    return task


def source_path(config: Config, task: Task) -> SourcePath | None:
    """The line back to the source, if the result is to lie on it.

    Raises:
        UserError: a share of it for a model that has no such line.
    """
    wanted = config.transfer.interpolate
    path = task.source_path() if wanted != "none" else None
    if isinstance(wanted, float) and path is None:
        raise UserError(
            "transfer.interpolate needs a Whisper encoder-decoder, trained whole or with lora "
            "adapters; remove it."
        )
    return path


def claim(run_dir: Path, resume: bool) -> None:
    """Refuse a run folder that holds another run.

    Raises:
        UserError: a finished one, or an unfinished one that is not to be resumed.
    """
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


def write_outcomes(run_dir: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Keep what each model made of each example, set by set, so that it can be compared later."""
    found = {
        when: {name: of and of["outcomes"] for name, of in sets.items()}
        for when, sets in scores.items()
    }
    with atomic_path(run_dir / OUTCOMES) as part:
        part.write_text(json.dumps(found), encoding="utf-8")


def _scores(task: Task, device: torch.device) -> dict[str, dict[str, Any]]:
    return {name: task.score(found, device) for name, found in task.splits.evaluated.items()}


def _scores_before(task: Task, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Scores of the source model; kept in the run folder so that resuming does not repeat them."""
    path = run_dir / "checkpoints" / "before.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("metric") == task.metric:  # which former versions did not keep
            return dict(found["scores"])
    logger.info("evaluating the source model")
    sets = task.splits.evaluated.items()
    scores = {name: task.score_source(examples, device) for name, examples in sets}
    with atomic_path(path) as part:
        part.write_text(json.dumps({"metric": task.metric, "scores": scores}), encoding="utf-8")
    return scores


def evaluate(
    model: str,
    data: str,
    *,
    revision: str | None = None,
    config: Config | None = None,
    language: str | None = None,
) -> dict[str, Any]:
    """Score a model on data.

    `model` is a run folder, a checkpoint folder, a Hub id or `bundled:NAME`, `revision` that of a
    Hub model; `data` any form that training takes; `language` goes before that of `config`. Returns
    the fields of `SpeechScore` or `ClassificationScore` with `metric`, `seconds_wall` (recognition
    or classification alone), `skipped`, and for speech `seconds_audio`. The interval is that of the
    main metric.

    Raises:
        UserError: a model or data that cannot be used.
    """
    config = config or Config()
    if language is not None:
        values = merge(config.model_dump(), {"data": {"language": language}})
        config = build_config(values, origin="language")
    with use_runtime(config.runtime):
        checkpoint = resolve(model, revision)
        task, device = task_of(checkpoint), choose_device(config.runtime)
        result: dict[str, Any] = finite(task.evaluate(checkpoint, data, config, device))
    return without_outcomes(result)
