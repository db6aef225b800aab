"""Structures of transfer side by side: each trained with several seeds on shares of the data.

    mmtransfer compare configs/news_sentiment/combined.yaml --data.train news.csv
        --data.validation more_news.csv --steps 200 --to runs/compared

Every cell is an ordinary run folder. Started again, a comparison goes on where it was stopped:
finished cells are not run again, the one that was interrupted resumes from its checkpoint. What a
frozen backbone gives is cached once for all cells.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config, StageConfig, build_config, load_config, resolved
from mmtransfer.errors import UserError
from mmtransfer.runs.comparison import Cell, Comparison, summarize, write_comparison
from mmtransfer.runs.inputs import contents, refuse_changed
from mmtransfer.runs.memory import peak_bytes, reset_peak
from mmtransfer.runs.training import OUTCOMES, evaluate, train
from mmtransfer.transfer.stages import stage_configs, with_stages

logger = logging.getLogger(__name__)
STRUCTURES = ("source", "scratch", "feature", "combined", "end_to_end", "lora")
_PILOT_STEPS = 6
_EVALUATIONS = 4  # of a stage, so that its best weights are found
_PLAN = "plan.json"


def compare(
    config: Config,
    *,
    structures: Mapping[str, list[dict[str, Any]] | None] | Sequence[str] | None = None,
    seeds: int = 3,
    steps: int | None = None,
    seconds: float | None = None,
    shares: Sequence[float] = (1.0,),
    to: str | None = None,
) -> Comparison:
    """Train every structure with every seed on every share of the data, and compare.

    `structures` are names of `STRUCTURES`, or a mapping from names to lists of stages (None for a
    known name). The budget of each run is a number of `steps`, shared evenly by its stages, or of
    `seconds` of training, from which its steps follow by a short trial: they cover the steps and
    the evaluations between them, not what comes before and after. Cells lie in `to`, by default the
    configuration's run folder.

    Raises:
        UserError: no validation data, no budget or two or one without end, one seed, an unknown
            structure, stages or shares that are none, a name that is none of a folder, or a folder
            with another comparison or one of other data.
    """
    chosen = _structures(structures)
    _check(config, chosen, seeds, steps, seconds, shares)
    folder = Path(to or config.run_dir)
    plan = _Plan(config, folder, chosen, seeds, steps, seconds, sorted({*shares, 1.0}))
    described = plan.describe()  # which refuses stages that are none
    plan.claim()
    cells = [plan.run(cell) for cell in plan.cells()]
    _refuse_other_examples(folder, cells)
    found = summarize(described, cells, seed=config.runtime.seed)
    write_comparison(folder, found)
    return found


def _structures(
    given: Mapping[str, list[dict[str, Any]] | None] | Sequence[str] | None,
) -> dict[str, list[dict[str, Any]] | None]:
    if given is None:
        given = STRUCTURES
    found = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given)
    for name, stages in found.items():
        if not re.fullmatch(r"\w[\w.-]*", name):  # it names folders
            raise UserError(
                f"structures: expected a name of letters, digits, _, . and -, found {name!r}."
            )
        if stages is not None and (not isinstance(stages, list) or not stages):
            raise UserError(
                f"structures: {name}: expected a list of one stage or more, found {stages!r:.80}."
            )
        if stages is None and name not in STRUCTURES:
            raise UserError(
                f"structures: expected some of {', '.join(STRUCTURES)}, or NAME=STAGES with a list "
                f"of stages, found {name!r}."
            )
    return found


def _check(
    config: Config,
    structures: Mapping[str, Any],
    seeds: int,
    steps: int | None,
    seconds: float | None,
    shares: Sequence[float],
) -> None:
    if (steps is None) == (seconds is None):
        raise UserError("compare needs one budget for every run: --steps N or --seconds S.")
    budget = steps if seconds is None else seconds
    if budget is None or not 0 < budget < math.inf:  # nor NaN
        raise UserError(f"the budget: expected a finite number above 0, found {budget}.")
    if seeds < 2:
        raise UserError(
            f"seeds: expected 2 or more, found {seeds}. One run says nothing of what another seed "
            "would have given."
        )
    if len([name for name in structures if name != "source"]) < 1:
        raise UserError("structures: expected one that is trained beside the source.")
    if config.data.validation is None:
        raise UserError(
            "data.validation is not set. A comparison needs one set for all runs: name it."
        )
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise UserError(f"shares: expected numbers above 0 and up to 1, found {wrong[0]:g}.")
    longest = max(_stage_count(config, name, stages) for name, stages in structures.items())
    if steps is not None and steps < longest:
        raise UserError(
            f"the budget: {steps} steps do not hold one run of {longest} stages. Raise --steps."
        )


def _stage_count(config: Config, name: str, stages: list[dict[str, Any]] | None) -> int:
    if stages is not None:
        return len(stages)
    return 2 if name == "combined" else 1


@dataclass(frozen=True)
class _Key:
    """A cell: what is trained, on how much, from which seed."""

    structure: str
    share: float
    seed: int

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.structure}-{self.share:g}-{self.seed}"


class _Plan:
    """All cells of a comparison and where they lie."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        structures: dict[str, list[dict[str, Any]] | None],
        seeds: int,
        steps: int | None,
        seconds: float | None,
        shares: Sequence[float],
    ):
        self.config, self.folder, self.structures = config, folder, structures
        self.seeds = [config.runtime.seed + number for number in range(seeds)]
        self.steps, self.seconds, self.shares = steps, seconds, shares
        self._steps_of: dict[str, int] = {}

    def claim(self) -> None:
        """Keep what is compared in the folder.

        Raises:
            UserError: it holds something else, or results from data, a source model or stages
                that have changed.
        """
        path = self.folder / _PLAN
        plan, found = json.loads(json.dumps(self._identity())), contents(self.config)
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key in plan if old.get(key) != plan[key])
            differing += self._other_stages()
            if differing:
                raise UserError(
                    f"{self.folder}: holds a comparison with other settings "
                    f"({', '.join(differing)}). Choose another folder with --to, or remove it."
                )
            refuse_changed(self.folder, old.get("contents"), found)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"{self.folder}: is there already. Choose another folder with --to, or remove it."
            )
        with atomic_path(path) as part:
            part.write_text(json.dumps(plan | {"contents": found}, indent=2), encoding="utf-8")

    def _other_stages(self) -> list[str]:
        """Structures of which the folder holds runs by other stages; lengths follow the budget."""
        found = []
        for name in self.structures:
            own = [_without_length(stage) for stage in self._stages(name)]
            places = [f"cells/{key.folder}" for key in self.cells() if key.structure == name]
            paths = [self.folder / place / "config.yaml" for place in (f"trials/{name}", *places)]
            runs = [load_config(path).transfer.stages for path in paths if path.is_file()]
            if any([_without_length(stage) for stage in stages] != own for stages in runs):
                found.append(f"stages of {name}")
        return found

    def _identity(self) -> dict[str, Any]:
        """What may not change between two starts; more structures, shares and seeds may come."""
        values = resolved(self.config)
        for name in ("run_dir", "runtime"):
            del values[name]
        return {
            "config": values,
            "steps": self.steps,
            "seconds": self.seconds,
            "seed": self.seeds[0],
        }

    def describe(self) -> dict[str, Any]:
        """What was compared, for the report."""
        return {
            "task": self.config.task,
            "source_model": Path(self.config.source_model).name,
            "structures": {
                name: [
                    stage.model_dump(mode="json", exclude_defaults=True)
                    for stage in self._stages(name)
                ]
                for name in self.structures
                if name != "source"
            },
            "seeds": self.seeds,
            "shares": list(self.shares),
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def cells(self) -> list[_Key]:
        """Seed by seed, so that an early stop leaves whole comparisons; smaller shares first."""
        return [
            _Key(name, share, seed)
            for seed in self.seeds
            for share in self.shares
            for name in self.structures
            if name != "source"
        ]

    def run(self, key: _Key) -> Cell:
        """The cell's results; it is trained unless it is finished."""
        folder = self.folder / "cells" / key.folder
        report = folder / "report.json"
        if not report.is_file():
            logger.info("%s: seed %d, share %g", key.structure, key.seed, key.share)
            config = self._config(key, folder)
            reset_peak()
            train(config, resume=True)
            with atomic_path(folder / "memory.json") as part:
                part.write_text(json.dumps({"peak_bytes": peak_bytes()}), encoding="utf-8")
        if not (folder / "use.json").is_file():
            with atomic_path(folder / "use.json") as part:
                part.write_text(json.dumps(self._use(key, folder)), encoding="utf-8")
        return Cell(
            structure=key.structure,
            share=key.share,
            seed=key.seed,
            report=json.loads(report.read_text(encoding="utf-8")),
            outcomes=json.loads((folder / OUTCOMES).read_text(encoding="utf-8")),
            measured={
                **_read(folder / "memory.json"),
                **_read(folder / "use.json"),
            },
        )

    def _use(self, key: _Key, folder: Path) -> dict[str, Any]:
        """Size on the disk; and how fast it is used, measured once for a structure."""
        files = [path for path in (folder / "model").rglob("*") if path.is_file()]
        found: dict[str, Any] = {"stored_bytes": sum(path.stat().st_size for path in files)}
        if (key.share, key.seed) == (1.0, self.seeds[0]):
            data = self.config.data.validation
            assert data is not None
            scores = evaluate(str(folder), data, config=self.config)
            count = scores.get("clips", scores.get("examples"))
            found["examples_per_second"] = count / max(scores["seconds_wall"], 1e-6)
        return found

    # --- configurations -----------------------------------------------------------------------

    def _stages(self, name: str) -> list[StageConfig]:
        given = self.structures[name]
        preset = name if name not in ("scratch", "source") else "end_to_end"
        values = self.config.model_dump()
        transfer = {**values["transfer"], "preset": preset, "stages": given or []}
        if given is not None:
            transfer["preset"] = "end_to_end"
        return stage_configs(build_config({**values, "transfer": transfer}, origin=name))

    def _config(
        self, key: _Key, folder: Path, steps: int | None = None, evaluations: int = _EVALUATIONS
    ) -> Config:
        stages = self._stages(key.structure)
        filled = [
            stage.model_copy(update={"epochs": None, "steps": own})
            for stage, own in zip(
                stages, _shared(steps or self._budget(key), len(stages)), strict=True
            )
        ]
        is_new = key.structure == "scratch"
        transfer: dict[str, Any] = {"scratch": is_new}
        data: dict[str, Any] = {"train_share": key.share}
        if is_new:
            transfer |= {"interpolate": "none", "rehearsal": None, "l2sp": 0.0}
            data["rehearsal"] = "none"
        every = _evaluate_every(filled[-1].steps, evaluations)
        return with_stages(
            self.config,
            filled,
            str(folder),
            data=data,
            transfer=transfer,
            train={"epochs": None, "steps": None, "evaluate_every": every},
            runtime={"seed": key.seed},
        )

    def _budget(self, key: _Key) -> int:
        """Steps of a run; for a budget in seconds as many as a short trial says."""
        if self.steps is not None:
            return self.steps
        name = key.structure
        if name not in self._steps_of:
            self._steps_of[name] = self._steps_begun(name) or self._steps_within_budget(key)
        return self._steps_of[name]

    def _steps_begun(self, name: str) -> int | None:
        """The steps of a structure's cells that are there: all of them get as many."""
        for key in self.cells():
            path = self.folder / "cells" / key.folder / "config.yaml"
            if key.structure == name and path.is_file():
                return sum(stage.steps or 0 for stage in load_config(path).transfer.stages)
        return None

    def _steps_within_budget(self, key: _Key) -> int:
        folder = self.folder / "trials" / key.structure
        stages = self._stages(key.structure)
        if not (folder / "report.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            whole = _Key(key.structure, 1.0, key.seed)
            train(self._config(whole, folder, _PILOT_STEPS * len(stages), evaluations=2))
        each, pause = _seconds_of(folder / "metrics.jsonl")
        assert self.seconds is not None
        steps = int(self.seconds / each)
        while steps >= len(stages):
            left = self.seconds - pause * _evaluations(steps, stages)
            if steps * each <= left:
                return steps
            steps = min(steps - 1, int(left / each))
        raise UserError(
            f"the budget: {self.seconds:g} s do not hold one run of {key.structure}, whose steps "
            f"take {each:.2f} s and evaluations {pause:.2f} s. Raise --seconds."
        )


def _shared(steps: int, stages: int) -> list[int]:
    """The steps of each stage; the first get those that are left over."""
    each, more = divmod(steps, stages)
    return [each + (number < more) for number in range(stages)]


def _evaluate_every(steps: int | None, evaluations: int = _EVALUATIONS) -> int:
    return max(1, (steps or 0) // evaluations)


def _evaluations(steps: int, stages: Sequence[StageConfig]) -> int:
    """How many a run of so many steps makes; contrastive stages make none."""
    lengths = _shared(steps, len(stages))
    every = _evaluate_every(lengths[-1])
    pairs = zip(lengths, stages, strict=True)
    return sum(math.ceil(own / every) for own, stage in pairs if stage.objective == "target")


def _refuse_other_examples(folder: Path, cells: Sequence[Cell]) -> None:
    """As folders of former versions may hold them, which kept no digests."""
    targets = [cell.outcomes["after"]["target"] for cell in cells if cell.share == 1]
    if len({str(target.get("targets", target.get("units"))) for target in targets}) > 1:
        raise UserError(
            f"{folder}: its cells were scored on different validation data. Choose another folder "
            "with --to, or remove it."
        )


def _without_length(stage: StageConfig) -> StageConfig:
    return stage.model_copy(update={"epochs": None, "steps": None})


def _seconds_of(metrics: Path) -> tuple[float, float]:
    """Of a step, and of an evaluation with its checkpoint, which the first step behind it shows."""
    steps, behind = list[float](), list[float]()
    last, stage, is_behind = 0.0, None, False
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["stage"] != stage:
            last, stage, is_behind = 0.0, row["stage"], False
        if "loss" in row:
            (behind if is_behind else steps).append(row["seconds"] - last)
            last = row["seconds"]
        is_behind = "loss" not in row
    each = max(1e-4, median(steps))
    return each, max(0.0, median(behind) - each) if behind else 0.0


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
