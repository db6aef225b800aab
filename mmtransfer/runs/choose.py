"""Structure, freeze depth and learning rate of a transfer, chosen by short runs.

    mmtransfer train CONFIG.yaml --structure auto

The size of the data says what is usual: from some tens of labels on the whole backbone is tuned,
after its new head where it has one (`combined`, Kumar et al. 2022), else at once (`end_to_end`);
with fewer a head is trained on the frozen backbone (`feature`). What else could be is
trained beside it for a small share of its length, the best for a larger share, as far as the budget
goes (successive halving, Jamieson & Talwalkar 2016). It becomes the run only where a paired test
says that it is really better. Every short run leaves its result in the run folder, so a choice that
was killed goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, StageConfig, resolved
from mmtransfer.errors import UserError
from mmtransfer.runs.inputs import contents, refuse_changed
from mmtransfer.runs.relate import KINDS, relate
from mmtransfer.runs.report import metric_name
from mmtransfer.runs.significance import Difference, is_higher_better, paired_difference
from mmtransfer.runs.training import claim, set_up, train_watched
from mmtransfer.runtime import choose_device, make_accelerator, use_runtime
from mmtransfer.transfer.networks import Network
from mmtransfer.transfer.stages import Stage, resolve_stages, stage_configs, with_stages
from mmtransfer.transfer.trainer import NotFiniteError, train_stages

logger = logging.getLogger(__name__)
_SHARES = (1 / 16, 1 / 4)  # of a candidate's length at least, rung by rung
_STEPS = 10  # of a short run at least; after fewer a tuned backbone is hardly better than chance
_KEPT = 3  # one in so many goes on to the next rung
# Times the configured ones; lower rates are for those that a large backbone does not bear.
_RATES = {"feature": (3.0, 10.0, 1.0), "lora": (10.0, 3.0)}  # of LoRA Biderman et al. 2024
_TUNED_RATES = (1.0, 3.0, 0.3)
_FEW = 64  # labels, below which a frozen backbone is usual
_USUAL = ("feature x3", "combined", "end_to_end")
_LORA_COST = 0.7  # of a step of end to end, about
_HELD = (64, 400)  # fewest and most examples to choose on that are held out of the training data
_FEWEST = 8  # examples that a choice needs
_ONCE = {"evaluate_every": 10**9, "patience": 0}  # scored at the end of each stage alone
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
    validation: int
    """Validation examples of the run."""
    labels: int
    """Labelled texts, clips, or frames of characters that layers were judged by."""
    epoch_steps: int
    """Optimiser steps of an epoch, about."""
    depth: int
    best_layer: int
    has_new_head: bool
    """Whether a head stands on the backbone, whose weights are random."""
    has_free_head: bool
    """Whether it may as well stand on another layer."""
    probe: float
    last_probe: float
    chance: float
    seconds: float


def choose(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Choose structure, freeze depth and learning rate, and train that; returns the report, with
    `choice` beside the rest.

    Raises:
        UserError: settings that leave nothing to choose, too few examples, a budget that holds no
            training, a run folder that holds another run, or several processes.
        training.Interrupted: SIGINT or SIGTERM; `resume` continues.
    """
    _check(config)
    choice = _Choice(config)
    facts = choice.facts(resume)
    chosen, found = choice.decide(choice.contest(candidates(config, facts), facts), facts)
    logger.info("%s", " ".join(found["reasons"]))
    train = dict[str, Any]()
    # The best of several scores on a few examples is luck; the end of the schedule is not. A clip
    # of speech has many labels.
    if facts.validation < _HELD[0] and config.task != "speech":
        usual = config.train
        often = usual.checkpoint_every or usual.evaluate_every or facts.epoch_steps
        train = _ONCE | {"checkpoint_every": often}
    final = with_stages(config, chosen.stages, config.run_dir, head=chosen.head, train=train)
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


def candidates(config: Config, facts: Facts) -> list[list[Candidate]]:
    """What is tried: heads on the frozen backbone, and ways to tune it, in the order of what is
    usual for so many labels. The second list is for a budget that holds no training of the first.

    Short runs of the two kinds are no contest: a head learns in a few steps what it will, a
    backbone hardly begins. Heads stand on the last layer or on that which says most of the labels;
    what is tuned lies above that layer (half of the layers, where it is the first or the last), or
    is everything, by adapters, at once or after the head. Gradients of a head that knows nothing
    yet distort the backbone (Kumar et al. 2022), so that a new one is trained before it.
    """
    best, depth = facts.best_layer, facts.depth
    kept = best if 0 < best < depth else depth // 2
    frozen = {"feature": _stages_of(config, "feature")}
    if facts.has_free_head and best < depth:
        frozen[f"feature_{best}"] = frozen["feature"]
    whole = ("combined", "end_to_end") if facts.has_new_head else ("end_to_end", "combined")
    tuned = {
        **{name: _stages_of(config, name) for name in whole},
        **({f"frozen_{kept}": [StageConfig(frozen=kept)]} if kept else {}),
        "lora": _stages_of(config, "lora"),
    }
    kinds = [_at_rates(config, frozen, best), _at_rates(config, tuned, best)]
    return kinds if facts.labels < _FEW else kinds[::-1]


def _at_rates(
    config: Config, structures: dict[str, list[StageConfig]], best: int
) -> list[Candidate]:
    """Every structure at its first rate, then at its second, ..."""
    found = list[tuple[int, Candidate]]()
    for name, stages in structures.items():
        whole = resolve_stages(with_stages(config, stages, config.run_dir))
        is_frozen = [stage.frozen for stage in whole] == ["all"]
        head = {"layers": [best]} if name == f"feature_{best}" else {}
        rates = _RATES.get("feature" if is_frozen else name, _TUNED_RATES)
        for turn, rate in enumerate(rates):
            filled = [_filled(stage, rate, is_frozen=is_frozen) for stage in whole]
            found.append((turn, Candidate(name, rate, filled, head)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


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

    def facts(self, resume: bool) -> Facts:
        """Size of the data, depth of the backbone, and how much its layers say of the labels; kept
        in the run folder with what is chosen for.

        Raises:
            UserError: a run folder that holds something else or a choice on other data, unusable
                data, one class only, or too few examples.
        """
        claim(self.folder, resume)
        path = self.folder / _PLAN
        values = resolved(self.config)
        for name in ("run_dir", "auto", "runtime"):  # another budget may be given
            del values[name]
        plan = {"config": values, "seed": self.config.runtime.seed}
        found = contents(self.config)
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
            refuse_changed(self.folder, known.get("contents"), found)
            facts = Facts(**known["facts"])
        else:
            facts = self._measure()
        _write(path, plan | {"contents": found, "facts": asdict(facts)})
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
        validation = len(task.splits.validation)
        batch = task.batch_budget * plain.train.gradient_accumulation
        epoch_steps = math.ceil(sum(task.lengths) / batch)
        has_new_head = isinstance(model, Network) and model.head is not None
        if plain.data.validation is None:
            examples += validation
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
            validation=validation,
            labels=found.rows,
            epoch_steps=epoch_steps,
            depth=depth,
            best_layer=best.layer,
            has_new_head=has_new_head,
            has_free_head=has_new_head and plain.head.layers == "last",
            probe=best.probe,
            last_probe=last.probe,
            chance=found.chance,
            seconds=seconds,
        )

    # --- short runs ---------------------------------------------------------------------------

    def contest(self, kinds: Sequence[Sequence[Candidate]], facts: Facts) -> list[Tried]:
        """The candidates of the last rung with their trials, the usual one first.

        Raises:
            UserError: a budget in seconds that holds no training, or no short run has a score.
        """
        limit = self.config.auto.budget_seconds
        for candidates in kinds:
            last = [pair for pair in self._rungs(candidates, facts) if pair[1].score is not None]
            if limit is not None:
                last = [pair for pair in last if self._spent + pair[1].full_seconds() <= limit]
            if last:
                return last
        if all(trial.score is None for trial in self.tried):
            raise UserError(
                "transfer.preset: auto: no short run has a score. Lower train.learning_rate, or "
                "look at the data."
            )
        least = min(trial.full_seconds() for trial in self.tried)
        raise UserError(
            f"auto.budget_seconds: {limit:g} s hold no training after the short runs "
            f"({self._spent:.0f} s), the shortest of which takes {least:.0f} s. Raise it, and "
            "--resume."
        )

    def _rungs(self, candidates: Sequence[Candidate], facts: Facts) -> list[Tried]:
        last = list[Tried]()
        alive = list(candidates)
        for least in _SHARES:
            found = list[Tried]()
            for candidate in alive:
                share = _share(candidate, least, facts)
                if found and not self._holds([*last, *found], share):
                    break
                found.append((candidate, self._trial(candidate, share)))
                self.tried.append(found[-1][1])
                self._spent += found[-1][1].seconds
            last = found
            usual, *others = last
            share = _share(usual[0], _SHARES[-1], facts)
            others = sorted(others, key=lambda pair: _rank(pair[1]))[: len(last) // _KEPT]
            alive = [candidate for candidate, _ in (usual, *others)]
            if len(alive) < 2 or share == usual[1].share or not self._holds(last, 2 * share):
                break
        return last

    @property
    def _budget(self) -> float:
        """Seconds for the choice and the training."""
        auto = self.config.auto
        presets = presets_seconds(self.tried)
        if auto.budget_seconds is None and presets is None:  # heads alone, which cost little
            return math.inf
        return auto.budget_seconds or auto.budget_share * (presets or 0)

    def _holds(self, tried: Sequence[Tried], share: float) -> bool:
        """Whether the budget holds that share of a training more and then any of the trainings."""
        trials = [trial for _, trial in tried]
        needed = max(trial.full_seconds() for trial in trials)
        return self._spent + trials[0].full_seconds(share) + needed <= self._budget

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
        train: dict[str, Any] = _ONCE | {"epochs": None, "steps": None, "checkpoint_every": 0}
        train |= {"keep_checkpoints": 0, "report_to": "none"}
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

        The first is the usual one, and remains so unless the best of the others is really better.
        """
        (usual, trial), *others = last
        chosen, found = usual, None
        if others:
            best, other = min(others, key=lambda pair: _rank(pair[1]))
            seed = self.config.runtime.seed
            found = paired_difference(trial.outcomes, other.outcomes, trial.metric, seed=seed)
            if found is not None:  # the best of so many
                found = replace(found, p=min(1.0, found.p * len(others)))
                chosen = best if found.is_real and found.value > 0 else usual
        reasons = [_why(chosen, last, found, facts), self._grounds(facts)]
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
            "presets_seconds": presets_seconds(self.tried),
        }

    def _grounds(self, facts: Facts) -> str:
        """What the choice stands on, in a sentence."""
        presets = presets_seconds(self.tried)
        share = "" if presets is None else f", {self._spent / presets:.0%} of training every preset"
        return (
            f"A linear classifier on the frozen backbone's last layer gets {facts.last_probe:.0%} "
            f"of the labels right, on layer {facts.best_layer} of {facts.depth} "
            f"{facts.probe:.0%}, always the most frequent label {facts.chance:.0%}; "
            f"{len(self.tried)} short runs on {facts.examples} examples took {self._spent:.0f} s"
            f"{share}."
        )


def _rank(trial: Trial) -> float:
    """Lower is better; without a score last."""
    if trial.score is None:
        return math.inf
    return -trial.score if is_higher_better(trial.metric) else trial.score


def _share(candidate: Candidate, least: float, facts: Facts) -> float:
    """Of a candidate's length, for a short run that says something."""
    steps = min(
        stage.steps or (stage.epochs or 1) * facts.epoch_steps for stage in candidate.stages
    )
    return min(0.5, max(least, _STEPS / steps))


def presets_seconds(trials: Sequence[Trial]) -> float | None:
    """What training every preset would take, about; None before the backbone was tuned.

    What was not tried is derived from that: LoRA's steps spare some of the backward pass, and
    `combined` is `end_to_end` and a head, which costs little.
    """
    known = {trial.candidate: trial.full_seconds() for trial in reversed(trials)}
    whole, head = known.get("end_to_end", known.get("combined")), known.get("feature", 0.0)
    if whole is None:
        return None
    lora = known.get(f"lora x{_RATES['lora'][0]:g}", _LORA_COST * whole)
    return whole + head + lora + known.get("combined", whole + head)


def _why(chosen: Candidate, last: Sequence[Tried], found: Difference | None, facts: Facts) -> str:
    """Why this candidate, in a sentence."""
    usual, trial = last[0]
    if chosen is not usual and found is not None:
        return (
            f"{chosen.name} was chosen: after {trial.share:.0%} of its training it is really "
            f"better than {usual.name}, by {found.value:.4f} {metric_name(trial.metric)} "
            f"(p = {found.p:.3f}) on {trial.examples} examples held out for the choice."
        )
    if usual.name not in _USUAL:
        return (
            f"{usual.name} was chosen: what is usual takes longer than auto.budget_seconds, or did "
            "not learn."
        )
    size = f"with {'fewer' if facts.labels < _FEW else 'no fewer'} than {_FEW} labels"
    if len(last) == 1:
        return f"{usual.name} was chosen: it is usual {size}, and the budget held no other."
    return (
        f"{usual.name} was chosen: it is usual {size}, and none of {len(last) - 1} others was "
        f"really better after {trial.share:.0%} of its training, on {trial.examples} examples held "
        "out for the choice."
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(values), encoding="utf-8")
