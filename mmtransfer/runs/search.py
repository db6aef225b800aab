"""A search over fields of the configuration: trials of a transfer, pruned and resumable (Optuna,
Akiba et al. 2019).

A trial's values depend on the seed, its number and the results of the trials before, so a search
that was killed goes on as if it had not been: the trial that ran continues from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, SearchRange, build_config, merge, resolved
from mmtransfer.errors import UserError
from mmtransfer.runs.inputs import contents, refuse_changed
from mmtransfer.runs.models import TASKS
from mmtransfer.runs.report import finite
from mmtransfer.runs.training import train_watched
from mmtransfer.runtime import make_accelerator
from mmtransfer.transfer.trainer import NotFiniteError

logger = logging.getLogger(__name__)
_STARTUP = 5  # trials at random before values are chosen, and before any is pruned
_STORAGE, _TRIALS = "search.db", "trials"
_INPUTS = (
    *("source_model", "revision", "data.train", "data.validation", "data.rehearsal"),
    "data.source_domain",
)


class _PrunedError(Exception):
    """The trial is ended, since it falls behind."""


def search(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Run the trials of `config.search`, each a transfer in `trials/NUMBER` of the run folder, and
    put the best into the run folder; returns its report, with `search` beside the rest.

    Raises:
        UserError: Optuna is not installed, values that a field does not take, a run folder that
            holds another run or trials on other data, several processes, or no trial that came to
            its end.
        training.Interrupted: SIGINT or SIGTERM; `resume` continues.
    """
    if find_spec("optuna") is None:
        raise UserError("search needs Optuna: pip install 'mmtransfer[search]'")
    import optuna

    run_dir = Path(config.run_dir)
    storage = run_dir / _STORAGE
    _check_values(config)
    if make_accelerator(config.train, config.runtime).num_processes > 1:
        raise UserError("search runs in one process; start it without accelerate launch.")
    if (run_dir / "report.json").exists():
        raise UserError(
            f"{run_dir}: holds a finished run. Choose another with --run-dir, or remove it."
        )
    if storage.exists() and not resume:
        raise UserError(
            f"{run_dir}: holds an unfinished search. Continue it with --resume, choose another "
            "--run-dir, or remove it."
        )
    found = _contents(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{storage.resolve()}",
        study_name="search",
        load_if_exists=True,
        direction="maximize" if TASKS[config.task].higher_is_better else "minimize",
        pruner=optuna.pruners.MedianPruner(_STARTUP) if config.search.prune else None,
    )
    _refuse_other_search(study, config, found)
    while True:
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if not trial.state.is_finished()]
        if not running and len(trials) >= config.search.trials:
            break
        number = running[0].number if running else len(trials)
        seed = (config.runtime.seed * 1009 + number) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)
        # One that was killed has the values that it had.
        trial = optuna.trial.Trial(study, running[0]._trial_id) if running else study.ask()
        _run_trial(study, trial, config)
    return _keep_best(study, config)


def _contents(config: Config) -> dict[str, list[str | None]]:
    """Of all sources and sets that the trials may have, by field."""
    space = config.search.space
    names = [name for name in _INPUTS if name in space]
    each = [
        contents(_with_values(config, dict(zip(names, values, strict=True)), config.run_dir))
        for values in product(*(space[name] for name in names))
    ]
    return {name: [one.get(name) for one in each] for name in {n for one in each for n in one}}


def _refuse_other_search(study: Any, config: Config, found: dict[str, Any]) -> None:
    values = resolved(config)
    values["search"].pop("trials")  # more may be asked for
    given = json.dumps(values, sort_keys=True)
    known = study.user_attrs
    if known.setdefault("config", given) != given:
        raise UserError(
            f"{config.run_dir}: holds a search with other settings. Choose another --run-dir, or "
            "remove it."
        )
    if study.get_trials(deepcopy=False):
        refuse_changed(Path(config.run_dir), known.get("contents"), found)
    study.set_user_attr("config", given)
    study.set_user_attr("contents", found)


def _check_values(config: Config) -> None:
    """Refuse values that a field does not take before anything is trained."""
    for name, values in config.search.space.items():
        ends = [values.low, values.high] if isinstance(values, SearchRange) else values
        for value in ends:
            _with_values(config, {name: value}, config.run_dir)


def _with_values(config: Config, values: dict[str, Any], run_dir: str) -> Config:
    """The configuration of a trial."""
    found = config.model_dump(mode="json", exclude_unset=True)
    found.pop("search", None)
    for name, value in values.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        found = merge(found, nested)
    return build_config(merge(found, {"run_dir": run_dir}), origin="search.space")


def _suggest(trial: Any, config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Values are drawn in turn, so they must not depend on how a file orders its fields.
    for name, values in sorted(config.search.space.items()):
        if not isinstance(values, SearchRange):
            # As JSON, since stages and the like are lists.
            choices = [json.dumps(value, sort_keys=True) for value in values]
            found[name] = json.loads(trial.suggest_categorical(name, choices))
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[name] = trial.suggest_int(name, values.low, values.high, log=values.log)
        else:
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return found


def _run_trial(study: Any, trial: Any, config: Config) -> None:
    import optuna

    folder = Path(config.run_dir) / _TRIALS / f"{trial.number:04}"
    values = _suggest(trial, config)
    logger.info("trial %d of %d: %s", trial.number + 1, config.search.trials, json.dumps(values))
    own = _with_values(config, values, str(folder))

    def watch(step: int, value: float) -> None:
        trial.report(value, step)
        if trial.should_prune():
            raise _PrunedError

    try:
        finished = folder / "report.json"  # killed between its end and the note of it
        if finished.exists():
            report = json.loads(finished.read_text(encoding="utf-8"))
        else:
            report = train_watched(own, resume=True, watch=watch)
    except _PrunedError:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        shutil.rmtree(folder, ignore_errors=True)
        return
    except NotFiniteError as error:
        logger.warning("trial %d: %s", trial.number + 1, error)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        shutil.rmtree(folder, ignore_errors=True)
        return
    score = report["target"]["after"][report["metric"]]
    if score is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, score)
        _drop_models(study, config)


def _drop_models(study: Any, config: Config) -> None:
    """Only the best trial keeps its model."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number != study.best_trial.number:
            folder = Path(config.run_dir) / _TRIALS / f"{trial.number:04}"
            shutil.rmtree(folder / "model", ignore_errors=True)


def _keep_best(study: Any, config: Config) -> dict[str, Any]:
    """Copy the best trial into the run folder; its report says what was tried."""
    trials = study.get_trials(deepcopy=False)
    if not any(trial.value is not None for trial in trials if trial.state.name == "COMPLETE"):
        raise UserError(f"search: none of {len(trials)} trials came to its end. Narrow the space.")
    run_dir, best = Path(config.run_dir), study.best_trial
    folder = run_dir / _TRIALS / f"{best.number:04}"
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, run_dir / path.name, dirs_exist_ok=True)
        elif path.name != "report.json":  # which says that the run is finished
            shutil.copyfile(path, run_dir / path.name)
    tried = [
        {
            "trial": trial.number + 1,
            "state": trial.state.name.lower(),
            "score": trial.value,
            "values": _values_of(trial, config),
            "steps": max(trial.intermediate_values, default=0),
        }
        for trial in trials
    ]
    own = _with_values(config, _values_of(best, config), config.run_dir)
    with atomic_path(run_dir / "config.yaml") as part:
        text = yaml.safe_dump(resolved(own), sort_keys=False, allow_unicode=True)
        part.write_text(text, encoding="utf-8")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["search"] = {"best": best.number + 1, "trials": tried}
    with atomic_path(run_dir / "report.json") as part:
        part.write_text(json.dumps(finite(report), indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(folder / "model", ignore_errors=True)
    return report


def _values_of(trial: Any, config: Config) -> dict[str, Any]:
    space = config.search.space
    return {
        name: value if isinstance(space[name], SearchRange) else json.loads(value)
        for name, value in trial.params.items()
    }
