"""Structure, freeze depth and learning rate of a transfer, chosen by short runs.

    mmtransfer train CONFIG.yaml --structure auto

Candidates are trained for a small share of their length, the best of them for a larger share, as
far as the budget goes (successive halving, Jamieson & Talwalkar 2016). Of candidates that differ
from the best by no more than a standard error (Breiman et al. 1984) the one that leaves most of the
source as it is becomes the run. Every short run leaves its result in the run folder, so a choice
that was killed goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, StageConfig, resolved
from mmtransfer.errors import UserError
from mmtransfer.runs.relate import KINDS, relate
from mmtransfer.runs.report import metric_name
from mmtransfer.runs.significance import Difference, is_higher_better, paired_difference
from mmtransfer.runs.training import claim, set_up, train_watched
from mmtransfer.runtime import choose_device, make_accelerator, use_runtime
from mmtransfer.transfer.networks import Network
from mmtransfer.transfer.stages import Stage, resolve_stages, stage_configs, with_stages
from mmtransfer.transfer.trainer import NotFiniteError, train_stages

logger = logging.getLogger(__name__)
_SHARES = (1 / 16, 1 / 4)  # of a candidate's length, rung by rung
_KEPT = 3  # one in so many goes on to the next rung
_RATES = (1.0, 3.0)  # times the configured ones
_LORA_RATES = (3.0, 10.0)  # adapters need about ten times the rate (Biderman et al. 2024)
_HELD = (64, 400)  # fewest and most examples to choose on that are held out of the training data
_FEWEST = 8  # examples that a choice needs
_STANDARD_ERRORS = 2 * 1.96  # in a 95 % interval
_TRIALS, _PLAN = "trials", "choice.json"
PRESETS = ("feature", "lora", "combined", "end_to_end")
"""What running all of them costs is the measure of the budget."""


@dataclass(frozen=True)
class Candidate:
    """A way to transfer: what is frozen, and at which rate the rest learns."""

    structure: str
    """A preset, `frozen_N` (that many layers), or `feature_N` (the head on that layer)."""
    rate: float
    """Times the configured learning rates."""
    stages: list[StageConfig]
    """At full length."""
    head: dict[str, Any] = field(default_factory=dict)
    """What differs of the head."""

    @property
    def name(self) -> str:
        """As the report has it."""
        return self.structure if self.rate == 1 else f"{self.structure} x{self.rate:g}"


@dataclass(frozen=True)
class Trial:
    """A short run of a candidate."""

    candidate: str
    share: float
    """Of the candidate's length."""
    steps: int
    metric: str
    score: float | None
    """None where training did not stay finite, or the metric is undefined."""
    examples: int
    """That it is scored on."""
    seconds: float
    """All of it."""
    train_seconds: float
    outcomes: dict[str, Any]

    def full_seconds(self, share: float = 1.0) -> float:
        """What that share of the candidate's length would take."""
        return self.seconds + self.train_seconds * (share / self.share - 1)


Tried = tuple[Candidate, Trial]


@dataclass(frozen=True)
class Facts:
    """What is known before anything is trained."""

    examples: int
    """Target examples that training and choice share, without named validation data."""
    depth: int
    best_layer: int
    has_free_head: bool
    """Whether a head stands on the backbone that may as well stand on another layer."""
    probe: float
    last_probe: float
    chance: float
    seconds: float


def choose(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Choose structure, freeze depth and learning rate, and train that; returns the report, with
    `choice` beside the rest.

    Raises:
        UserError: settings that leave nothing to choose, too few examples, a budget that does not
            hold one rung, a run folder that holds another run, or several processes.
        training.Interrupted: SIGINT or SIGTERM; `resume` continues.
    """
    _check(config)
    choice = _Choice(config)
    facts = choice.facts(resume)
    last = choice.rungs(candidates(config, facts))
    chosen, found = choice.decide(last, facts)
    logger.info("%s", " ".join(found["reasons"]))
    final = with_stages(config, chosen.stages, config.run_dir, head=chosen.head)
    return train_watched(final, resume=True, choice=found)


def _check(config: Config) -> None:
    if config.task not in KINDS:
        raise UserError(
            f"transfer.preset: auto chooses for {', '.join(KINDS)}; task: {config.task} has one "
            "structure. Remove it."
        )
    if config.transfer.stages:
        raise UserError(
            "transfer.stages names a structure, transfer.preset: auto is to choose one. Remove "
            "either (--structure does so)."
        )
    if config.transfer.scratch:
        raise UserError(
            "transfer.scratch: random weights have nothing to freeze, so there is nothing for "
            "transfer.preset: auto to choose. Remove either."
        )
    if make_accelerator(config.train, config.runtime).num_processes > 1:
        raise UserError(
            "transfer.preset: auto runs in one process; start it without accelerate launch."
        )


def candidates(config: Config, facts: Facts) -> list[Candidate]:
    """What is tried, ordered by how much of the source stays as it is.

    Backbones are frozen whole, with the head on the last layer or on that which says most of the
    labels; not at all; or up to that layer (half of the layers, where it is the first or the last).
    """
    best, depth = facts.best_layer, facts.depth
    kept = best if 0 < best < depth else depth // 2
    feature, found = _stages_of(config, "feature"), list[Candidate]()
    structures = {
        "feature": feature,
        "lora": _stages_of(config, "lora"),
        **({f"frozen_{kept}": [StageConfig(frozen=kept)]} if kept else {}),
        "combined": _stages_of(config, "combined"),
        "end_to_end": _stages_of(config, "end_to_end"),
    }
    if facts.has_free_head and best < depth:
        structures = {f"feature_{best}": feature} | structures
    for name, stages in structures.items():
        whole = resolve_stages(with_stages(config, stages, config.run_dir))
        head = {"layers": [best]} if name == f"feature_{best}" else {}
        for rate in _LORA_RATES if name == "lora" else _RATES:
            filled = [_filled(stage, rate, is_frozen=stages is feature) for stage in whole]
            found.append(Candidate(name, rate, filled, head))
    return found


def _stages_of(config: Config, preset: str) -> list[StageConfig]:
    transfer = config.transfer.model_copy(update={"preset": preset})
    return stage_configs(config.model_copy(update={"transfer": transfer}))


def _filled(stage: Stage, rate: float, *, is_frozen: bool) -> StageConfig:
    """A stage with every value, at so many times its rates."""
    values = {k: v for k, v in asdict(stage).items() if k in StageConfig.model_fields}
    values["learning_rate"] *= rate
    # New layers learn at a high rate anyhow, but where they are all that does, or have learnt.
    if is_frozen or stage.head_learning_rate == stage.learning_rate:
        values["head_learning_rate"] *= rate
    return StageConfig(**values)


def shortened(stages: Sequence[StageConfig], share: float) -> list[StageConfig]:
    """The same stages for a share of their length."""
    return [
        stage.model_copy(
            update={
                "steps": None if stage.steps is None else max(1, round(stage.steps * share)),
                "epochs": None if stage.epochs is None else stage.epochs * share,
            }
        )
        for stage in stages
    ]


class _Choice:
    """A choice and the folder that keeps what was tried."""

    def __init__(self, config: Config):
        self.config, self.folder = config, Path(config.run_dir)
        data = config.data.model_copy(update={"source_domain": {}})
        self._target = config.model_copy(update={"data": data})
        self.tried: list[Trial] = []
        self._fraction: float | None = None
        """Of the training data that is held out for the choice."""
        self._spent = 0.0
        self._presets_seconds = 0.0

    def facts(self, resume: bool) -> Facts:
        """Size of the data, depth of the backbone, and how much its layers say of the labels; kept
        in the run folder with what is chosen for.

        Raises:
            UserError: a run folder that holds something else, unusable data, one class only, or too
                few examples.
        """
        claim(self.folder, resume)
        path = self.folder / _PLAN
        values = resolved(self.config)
        for name in ("run_dir", "auto", "runtime"):  # another budget may be given
            del values[name]
        plan = {"config": values, "seed": self.config.runtime.seed}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if not resume:
                raise UserError(
                    f"{self.folder}: holds an unfinished choice. Continue it with --resume, choose "
                    "another --run-dir, or remove it."
                )
            if {name: known[name] for name in plan} != plan:
                raise UserError(
                    f"{self.folder}: holds a choice with other settings. Choose another --run-dir, "
                    "or remove it."
                )
            facts = Facts(**known["facts"])
        else:
            facts = self._measure()
            _write(path, plan | {"facts": asdict(facts)})
        if self.config.data.validation is None:
            fewest, most = _HELD
            usual = self.config.data.validation_fraction * facts.examples
            self._fraction = min(max(usual, fewest), most, facts.examples / 2) / facts.examples
        self._spent += facts.seconds
        return facts

    def _measure(self) -> Facts:
        started = time.perf_counter()
        # Any model can be trained end to end, so that what the data lack is refused here.
        plain = with_stages(self._target, [StageConfig()], self.config.run_dir)
        with use_runtime(plain.runtime):
            task = set_up(plain, choose_device(plain.runtime))
        examples, depth, model = len(task.splits.train), task.layout.depth, task.model
        is_headed = isinstance(model, Network) and model.head is not None
        if plain.data.validation is None:
            examples += len(task.splits.validation)
        del task, model
        if examples < _FEWEST:
            raise UserError(
                f"transfer.preset: auto needs {_FEWEST} training examples to choose on, found "
                f"{examples}. Give more, or name a structure: --structure feature."
            )
        found = relate(plain)
        best = found.best()
        last = next(row for row in found.layers if row.layer == row.depth)
        seconds = time.perf_counter() - started
        return Facts(
            examples=examples,
            depth=depth,
            best_layer=best.layer,
            has_free_head=is_headed and plain.head.layers == "last",
            probe=best.probe,
            last_probe=last.probe,
            chance=found.chance,
            seconds=seconds,
        )

    # --- short runs ---------------------------------------------------------------------------

    def rungs(self, tried: Sequence[Candidate]) -> list[Tried]:
        """The candidates of the last rung that the budget held, with their trials.

        Raises:
            UserError: a budget in seconds that does not hold the first rung and a training.
        """
        alive, last = list(tried), list[Tried]()
        for rung, share in enumerate(_SHARES):
            if rung:
                first = self._picked(last)[0]  # may score less, and is as good
                ranked = sorted(last, key=lambda pair: (pair is not first, _rank(pair[1])))
                going_on = self._affordable(ranked[: math.ceil(len(ranked) / _KEPT)], share)
                if len(going_on) < 2:
                    break
                alive = [candidate for candidate in alive if candidate in going_on]
            last = []
            for candidate in alive:
                last.append((candidate, self._trial(candidate, share)))
                self._spend(last[-1][1], len(tried))
            if not rung:
                self._presets_seconds = _presets_seconds(last)
        limit = self.config.auto.budget_seconds
        if limit is None:
            return last
        fitting = [pair for pair in last if self._spent + pair[1].full_seconds() <= limit]
        if not fitting:
            least = min(trial.full_seconds() for _, trial in last)
            raise UserError(
                f"auto.budget_seconds: {limit:g} s hold the short runs ({self._spent:.0f} s), but "
                f"no training, the shortest of which takes {least:.0f} s. Raise it, and --resume."
            )
        return fitting

    def _spend(self, trial: Trial, count: int) -> None:
        self.tried.append(trial)
        self._spent += trial.seconds
        limit = self.config.auto.budget_seconds
        if limit is not None and self._spent > limit and len(self.tried) <= count:
            raise UserError(
                f"auto.budget_seconds: {limit:g} s do not hold one rung of {count} short runs, of "
                f"which {len(self.tried)} took {self._spent:.0f} s. Raise it, and --resume."
            )

    @property
    def _budget(self) -> float:
        """Seconds for the choice and the training; known after the first rung."""
        auto = self.config.auto
        return auto.budget_seconds or auto.budget_share * self._presets_seconds

    def _affordable(self, ranked: Sequence[Tried], share: float) -> list[Candidate]:
        """The best of the candidates, as many as can be tried for that share and leave time to
        train any of them.
        """
        for count in range(len(ranked), 1, -1):
            first = [trial for _, trial in ranked[:count]]
            needed = sum(trial.full_seconds(share) for trial in first)
            needed += max(trial.full_seconds() for trial in first)
            if self._spent + needed <= self._budget:
                return [candidate for candidate, _ in ranked[:count]]
        return []

    def _trial(self, candidate: Candidate, share: float) -> Trial:
        """The result of a short run, which is trained unless it is there."""
        folder = self.folder / _TRIALS / f"{candidate.structure}-{candidate.rate:g}-{share:.4f}"
        path = folder / "trial.json"
        if not path.is_file():
            logger.info("trying %s for %.0f %% of its length", candidate.name, 100 * share)
            _write(path, asdict(self._run(candidate, share, folder)))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return Trial(**json.loads(path.read_text(encoding="utf-8")))

    def _run(self, candidate: Candidate, share: float, folder: Path) -> Trial:
        started = time.perf_counter()
        data = {} if self._fraction is None else {"validation_fraction": self._fraction}
        # Scored once, at the end of each stage.
        train: dict[str, Any] = {
            "epochs": None,
            "steps": None,
            "evaluate_every": 10**9,
            "patience": 0,
        }
        train |= {"checkpoint_every": 0, "keep_checkpoints": 0, "report_to": "none"}
        stages = shortened(candidate.stages, share)
        config = with_stages(
            self._target, stages, str(folder), data=data, train=train, head=candidate.head
        )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with use_runtime(config.runtime):
            accelerator = make_accelerator(config.train, config.runtime)
            device = accelerator.device
            task = set_up(config, device)
            try:
                results = train_stages(task, task.stages, config, accelerator, folder)
            except NotFiniteError as error:
                logger.warning("%s: %s", candidate.name, error)
                seconds = time.perf_counter() - started
                return Trial(candidate.name, share, 0, task.metric, None, 0, seconds, seconds, {})
            records = task.validate(range(task.validation_size), device)
            metric, outcomes = task.outcomes(records)
            score = task.summarize(records)[metric]
        return Trial(
            candidate.name,
            share,
            sum(result.steps for result in results),
            metric,
            score,
            len(records),
            time.perf_counter() - started,
            sum(result.seconds for result in results),
            outcomes,
        )

    # --- the decision -------------------------------------------------------------------------

    def decide(self, last: Sequence[Tried], facts: Facts) -> tuple[Candidate, dict[str, Any]]:
        """The candidate to train, and the report's section on it.

        Raises:
            UserError: no short run has a score.
        """
        if all(trial.score is None for _, trial in last):
            raise UserError(
                "transfer.preset: auto: no short run has a score. Lower train.learning_rate, or "
                "look at the data."
            )
        (chosen, trial), (best, _), behind = self._picked(last)
        reasons = [_why(chosen, trial, best, behind), self._grounds(facts)]
        relatedness = {key: value for key, value in asdict(facts).items() if key != "seconds"}
        return chosen, {
            "chosen": chosen.name,
            "structure": chosen.structure,
            "rate": chosen.rate,
            "reasons": reasons,
            "relatedness": relatedness,
            "tried": [
                {key: value for key, value in asdict(one).items() if key != "outcomes"}
                for one in self.tried
            ],
            "seconds": round(self._spent, 2),
            "presets_seconds": round(self._presets_seconds, 2),
        }

    def _picked(self, trials: Sequence[Tried]) -> tuple[Tried, Tried, Difference | None]:
        """Of candidates in order of what they leave of the source the first that is as good as the
        best; the best; and how far behind it is.
        """
        best = min(trials, key=lambda pair: _rank(pair[1]))
        for one in trials:
            if one is best:
                break
            if one[1].score is None:
                continue
            found = paired_difference(
                one[1].outcomes,
                best[1].outcomes,
                best[1].metric,
                seed=self.config.runtime.seed,
            )
            if found is not None and found.value <= _standard_error(found):
                return one, best, found
        return best, best, None

    def _grounds(self, facts: Facts) -> str:
        """What the choice stands on, in a sentence."""
        share = self._spent / max(self._presets_seconds, 1e-9)
        return (
            f"A linear classifier on the frozen backbone's last layer gets {facts.last_probe:.0%} "
            f"of the labels right, on layer {facts.best_layer} of {facts.depth} "
            f"{facts.probe:.0%}, always the most frequent label {facts.chance:.0%}; "
            f"{len(self.tried)} short runs on {facts.examples} examples took {share:.0%} of the "
            "time of training every preset."
        )


def _rank(trial: Trial) -> float:
    """Lower is better; without a score last."""
    if trial.score is None:
        return math.inf
    return -trial.score if is_higher_better(trial.metric) else trial.score


def _standard_error(found: Difference) -> float:
    return (found.high - found.low) / _STANDARD_ERRORS


def _presets_seconds(trials: Sequence[Tried]) -> float:
    """What training every preset would take, each at the lowest rate that was tried."""
    first: dict[str, float] = {}
    for candidate, trial in trials:
        if candidate.structure in PRESETS:
            first.setdefault(candidate.structure, trial.full_seconds())
    return sum(first.values())


def _why(chosen: Candidate, trial: Trial, best: Candidate, behind: Difference | None) -> str:
    """Why this candidate, in a sentence."""
    name = metric_name(trial.metric)
    text = (
        f"{chosen.name} was chosen: after {trial.share:.0%} of its training it has {name} "
        f"{trial.score:.4f} on {trial.examples} examples held out for the choice, "
    )
    if chosen is best or behind is None:
        return f"{text}the best of what was tried."
    return (
        f"{text}and {best.name}, the best, is {behind.value:.4f} better, no more than a standard "
        f"error ({_standard_error(behind):.4f}), and changes more of the source."
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(values), encoding="utf-8")
