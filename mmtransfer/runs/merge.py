"""Several models of one source combined into one: soups, task vectors, the way back to the source.

    mmtransfer merge runs/books runs/dvd runs/electronics --to runs/reviews

Weights are combined in files (see `tensors`); a result is chosen, and reported, by its scores on
every domain that the models came from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mmtransfer.cache import atomic_path
from mmtransfer.config import RuntimeConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.hub.metadata import Metadata, read_metadata
from mmtransfer.runs.domains import Domain, Scores, domains_of, further_domains, score
from mmtransfer.runs.ensemble import make_ensemble
from mmtransfer.runs.merge_report import Merged, Point, card_of, make_merged, write_merged
from mmtransfer.runs.parents import (
    bare_model,
    carry_settings,
    check_alike,
    finished,
    snapshots,
    started_from,
)
from mmtransfer.runs.significance import is_higher_better
from mmtransfer.runs.tensors import (
    DENSITY,
    arithmetic,
    check_shapes,
    interpolation,
    mean,
    merge_adapters,
    merge_folders,
)
from mmtransfer.runtime import choose_device, use_runtime
from mmtransfer.text.classifier import renew_stock

logger = logging.getLogger(__name__)
METHODS = (
    "interpolate",
    "uniform",
    "greedy",
    "task_arithmetic",
    "ties",
    "dare",
    "last",
    "ensemble",
)
_ARITHMETIC = ("task_arithmetic", "ties", "dare")
_SHARES = tuple(round(0.1 * step, 1) for step in range(1, 10))
_SCALES = (0.3, 0.5, 0.7, 1.0)
_SPENT = 0.003  # of the target's metric, for keeping more of the source; as in training


def merge(
    models: Sequence[str],
    to: str,
    *,
    method: str = "auto",
    source_model: str | None = None,
    share: float | None = None,
    keep_source: float | None = None,
    scale: float | None = None,
    density: float | None = None,
    data: Mapping[str, str] | None = None,
    source_domain: Mapping[str, str] | None = None,
    runtime: RuntimeConfig | None = None,
) -> Merged:
    """Combine models into one and write its run folder.

    One model is taken part of the way back to its source model (`interpolate`), several are
    averaged (`uniform`), unless `method` is given. `share` of the way, or the most target gain at
    a loss of at most `keep_source` on every source-domain set; `scale` and `density` of `METHODS`
    that add changes to the source. The domains of the models are found in their run folders;
    `data` and `source_domain` (name to path) name further ones.

    Raises:
        UserError: models that cannot be merged, with the reason; settings that the method does not
            have; a run folder that is not empty.
    """
    runtime = runtime or RuntimeConfig()
    with use_runtime(runtime):
        job = _Job(models, to, method, source_model, runtime, data or {}, source_domain or {})
        job.check(share=share, keep_source=keep_source, scale=scale, density=density)
        return job.run(share, keep_source, scale, density)


class _Job:
    """One merge."""

    def __init__(
        self,
        models: Sequence[str],
        to: str,
        method: str,
        source: str | None,
        runtime: RuntimeConfig,
        data: Mapping[str, str],
        source_domain: Mapping[str, str],
    ):
        self.to, self.runtime = Path(to), runtime
        if self.to.exists() and (not self.to.is_dir() or any(self.to.iterdir())):
            raise UserError(f"{to}: is there already. Choose another run folder, or remove it.")
        if method not in ("auto", *METHODS):
            raise UserError(f"method: expected one of {', '.join(METHODS)}, found {method!r}.")
        self._measured: list[Checkpoint] = []
        """Where it is recorded what training measured, if not with the models."""
        if method == "last":
            models, self._measured = snapshots(models), [finished(models[0])]
        given = {name: resolve(name) for name in models}
        if len(given) < len(models):
            raise UserError("expected different models, found one twice.")
        self.source = resolve(source) if source is not None else None
        self.models = dict(given)
        if self.source is None:
            self._find_source(given)
        self.method = method
        if method in ("auto", "last"):
            self.method = "interpolate" if len(self.models) == 1 else "uniform"
        first = next(iter(self.models.values()))
        self.kind, self.form = first.kind, first.form
        self.device = choose_device(runtime)
        self._data, self._source_domain = data, source_domain

    def _find_source(self, given: Mapping[str, Checkpoint]) -> None:
        """One of the models may be what the others started from; else it is the recorded one."""
        for name, found in given.items():
            others = [other for key, other in given.items() if key != name]
            if others and all(started_from(other, found) for other in others):
                self.source = self.models.pop(name)
                return
        first = next(iter(given.values()))
        recorded = first.metadata.base if first.metadata is not None else None
        if first.base is not None:
            self.source = first.base
        elif recorded is not None:
            with suppress(UserError):  # a folder whose place was not recorded; may not be needed
                self.source = resolve(recorded.source, recorded.revision)

    def check(self, **given: float | None) -> None:
        """Refuse what cannot be merged.

        Raises:
            UserError: the reason.
        """
        count, method = len(self.models), self.method
        fits = {
            "share": method == "interpolate",
            "keep_source": method == "interpolate",
            "scale": method in _ARITHMETIC,
            "density": method in DENSITY,
        }
        for name, value in given.items():
            if value is not None and not fits[name]:
                raise UserError(f"--{name.replace('_', '-')} is not for {method}; remove it.")
            low = 0 if name == "keep_source" else 1e-9
            if value is not None and not low <= value <= (2 if name == "scale" else 1):
                raise UserError(f"--{name.replace('_', '-')}: expected a share, found {value:g}.")
        if given["share"] is not None and given["keep_source"] is not None:
            raise UserError("give --share or --keep-source, not both.")
        if method == "interpolate" and count != 1:
            raise UserError(
                f"interpolate takes one tuned model and its source, found {count} models. Choose "
                "uniform, greedy, task_arithmetic, ties, dare or ensemble."
            )
        if method != "interpolate" and count < 2:
            raise UserError(f"{method} takes two models or more, found one.")
        if method in ("interpolate", *_ARITHMETIC) and self.source is None:
            raise UserError(
                f"{method} needs the model that all started from, and its place is not recorded. "
                "Name it: --source-model MODEL"
            )
        check_alike(self.models, method)
        if method != "ensemble" and self.form != "adapter":
            check_shapes(list(self.models), [found.folder for found in self.models.values()])

    # --- ways to combine ----------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        return [found.folder for found in self.models.values()]

    def _blend(self, names: Sequence[str]) -> Callable[[Path], None]:
        """The mean of some of the models."""
        chosen = [self.models[name].folder for name in names]
        if self.form == "adapter":
            weights = [1 / len(chosen)] * len(chosen)
            return lambda target: self._merge_adapters(chosen, target, "sum", weights, 1.0)
        return lambda target: merge_folders(chosen, None, mean, target)

    def _merge_adapters(
        self, adapters: list[Path], target: Path, kind: str, weights: list[float], density: float
    ) -> None:
        base = next(iter(self.models.values())).base
        assert base is not None
        merge_adapters(
            bare_model(base, self.kind),
            adapters,
            target,
            method=kind,
            weights=weights,
            density=density,
            seed=self.runtime.seed,
        )

    def _point(self, value: float, density: float | None) -> Callable[[Path], None]:
        """The result at a share of the way, or with changes at a scale."""
        folders, method = self._folders(), self.method
        if self.form == "adapter":
            kind = method if method in DENSITY else "sum"
            weights = [value] * len(folders)
            return lambda target: self._merge_adapters(
                folders, target, kind, weights, density or 1.0
            )
        assert self.source is not None
        rule = interpolation(value)
        if method != "interpolate":
            rule = arithmetic(method, value, density or 1.0)
        beneath = self.source.folder
        return lambda target: merge_folders(folders, beneath, rule, target, seed=self.runtime.seed)

    # --- the whole ----------------------------------------------------------------------------

    def run(
        self,
        share: float | None,
        keep_source: float | None,
        scale: float | None,
        density: float | None,
    ) -> Merged:
        """Choose, write, score and report."""
        domains = domains_of(self.models, self.device)
        domains |= further_domains(self._data, self._source_domain, self.models)
        if keep_source is not None and not any(domain.is_source for domain in domains.values()):
            raise UserError(
                "--keep-source needs source-domain sets. Name them: --source-domain NAME=PATH"
            )
        parents = {name: self._scored(found, domains) for name, found in self.models.items()}
        before = None if self.source is None else self._source_scores(domains)
        if keep_source is not None and before is None:
            raise UserError(
                "--keep-source: the source has no output for this task, so that what is lost there "
                "is not known. Remove it."
            )
        self.to.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.to.parent, prefix=f".{self.to.name}.") as scratch:
            work = _Scratch(Path(scratch))
            points: list[Point] = []
            chosen: float | list[str] | None = None
            if self.method == "ensemble":
                folder = work.place("ensemble")
                weights = make_ensemble(self.models, domains, folder, self.device)
                chosen = [f"{Path(name).name} {w:.2f}" for name, w in weights.items()]
            elif self.method == "greedy":
                folder, chosen = self._greedy(work, domains, parents)
            elif self.method == "uniform":
                folder = work.place("uniform")
                self._blend(list(self.models))(folder)
            else:
                folder, chosen, points = self._sweep(
                    work, domains, parents, before, share or scale, keep_source, density
                )
            if self.method != "ensemble":
                self._carry(folder, chosen if isinstance(chosen, list) else self.models)
                if self.kind == "sentiment" and self.form == "full":
                    renew_stock(folder)
            after = self._scored(resolve(str(folder)), domains)
            merged = make_merged(
                to=str(self.to),
                kind=self.kind,
                form=self.form,
                method=self.method,
                chosen=chosen,
                domains=domains,
                source=None if self.source is None else self.source.source,
                before=before,
                parents=parents,
                after=after,
                points=points,
                settings={"density": density, "keep_source": keep_source},
                seed=self.runtime.seed,
            )
            recorded = read_metadata(folder)  # None where the models are plain checkpoints
            model = recorded or Metadata(self.kind, self.form, None)
            card = card_of(merged, self.models, model)
            (folder / "README.md").write_text(card, encoding="utf-8")
            with atomic_path(self.to) as part:
                part.mkdir()
                shutil.move(folder, part / "model")
                write_merged(part, merged, after)
        return merged

    def _scored(self, found: Checkpoint, domains: Mapping[str, Domain]) -> Scores:
        return {
            name: score(found, domain, self.runtime, self.device)
            for name, domain in domains.items()
        }

    def _source_scores(self, domains: Mapping[str, Domain]) -> Scores | None:
        """None where the source has no output for the task."""
        assert self.source is not None
        if self.source.kind != self.kind:
            return None
        try:
            return self._scored(self.source, domains)
        except UserError as error:
            logger.info("the source is not scored: %s", error)
            return None

    def _carry(self, folder: Path, names: Iterable[str]) -> None:
        """Settings of a result of these models."""
        carry_settings(folder, [self.models[name] for name in names], self._measured)

    def _greedy(
        self, work: _Scratch, domains: Mapping[str, Domain], parents: Mapping[str, Scores]
    ) -> tuple[Path, list[str]]:
        """Models from the best to the worst, each kept if the mean score does not fall by it
        (Wortsman et al. 2022, recipe 1).
        """
        if not domains:
            raise UserError("greedy needs data to choose by. Name it: --data NAME=PATH")
        order = sorted(self.models, key=lambda name: -quality(parents[name], domains))
        kept, best = [order[0]], quality(parents[order[0]], domains)
        for name in order[1:]:
            folder = work.place(f"with {len(kept)}")
            self._blend([*kept, name])(folder)
            self._carry(folder, [*kept, name])
            found = quality(self._scored(resolve(str(folder)), domains), domains)
            logger.info("%s with %s: %.4f, without %.4f", name, ", ".join(kept), found, best)
            if found >= best:
                kept, best = [*kept, name], found
            shutil.rmtree(folder)
        folder = work.place("greedy")
        self._blend(kept)(folder)
        return folder, kept

    def _sweep(
        self,
        work: _Scratch,
        domains: Mapping[str, Domain],
        parents: Mapping[str, Scores],
        before: Scores | None,
        fixed: float | None,
        keep_source: float | None,
        density: float | None,
    ) -> tuple[Path, float, list[Point]]:
        """Points of a line, and the one that is chosen on it."""
        is_path = self.method == "interpolate"
        density = DENSITY.get(self.method) if density is None else density
        points = []
        if is_path and before is not None:
            points.append(Point(0.0, before))
        values = [fixed] if fixed is not None else list(_SHARES if is_path else _SCALES)
        if not domains:
            values = [fixed or (0.5 if is_path else 1.0)]
        for value in values:
            folder = work.place(f"{value:g}")
            self._point(value, density)(folder)
            self._carry(folder, self.models)
            points.append(Point(value, self._scored(resolve(str(folder)), domains)))
            logger.info("%s at %g: %s", self.method, value, points[-1].describe())
            shutil.rmtree(folder)
        if is_path:
            points.append(Point(1.0, next(iter(parents.values()))))
        chosen = values[0]
        if fixed is None and domains:
            chosen = choose(points, domains, before, keep_source, is_path=is_path)
        folder = work.place("chosen")
        self._point(chosen, density)(folder)
        return folder, chosen, points


class _Scratch:
    """Places for results that are tried."""

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, name: str) -> Path:
        """A path that is free."""
        return self.folder / name.replace(" ", "-")


def quality(scores: Scores, domains: Mapping[str, Domain], *, sources: bool = False) -> float:
    """Mean of the metric over target domains, higher is better; with `sources` over source ones."""
    found = [
        value["value"] if is_higher_better(value["metric"]) else -value["value"]
        for name, value in scores.items()
        if value is not None and domains[name].is_source == sources
    ]
    return float(np.mean(found)) if found else float("-inf")


def losses(scores: Scores, before: Scores, domains: Mapping[str, Domain]) -> list[float]:
    """How much worse the metric is than the source's, on each source-domain set."""
    found = []
    for name, domain in domains.items():
        old, new = before[name], scores[name]
        if domain.is_source and old is not None and new is not None:
            sign = 1 if is_higher_better(old["metric"]) else -1
            found.append(sign * (old["value"] - new["value"]))
    return found


def choose(
    points: Sequence[Point],
    domains: Mapping[str, Domain],
    before: Scores | None,
    keep_source: float | None,
    *,
    is_path: bool,
) -> float:
    """The best point for the target domains: among those that lose at most `keep_source` on every
    source-domain set; without that the one nearest to the source that is as good, as training
    chooses it.

    Raises:
        UserError: every point but the source itself loses more.
    """
    if keep_source is not None:
        assert before is not None
        fitting = [
            point
            for point in points
            if point.value and max(losses(point.scores, before, domains)) <= keep_source + 1e-9
        ]
        if not fitting:
            least = min(max(losses(p.scores, before, domains)) for p in points if p.value)
            raise UserError(
                f"--keep-source {keep_source:g}: every point loses more on a source-domain set, "
                f"{least:.4f} at least. Allow that, or train with rehearsal."
            )
        return max(fitting, key=lambda point: (quality(point.scores, domains), -point.value)).value
    best = max(quality(point.scores, domains) for point in points)
    if not is_path:
        return max(points, key=lambda point: quality(point.scores, domains)).value
    near = [
        point
        for point in points
        if point.value and best - quality(point.scores, domains) <= _SPENT + 1e-9
    ]
    return min(point.value for point in near) if near else 1.0
