"""How near source backbones and source domains are to target data, before anything is trained."""

from __future__ import annotations

import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.runtime import choose_device, use_runtime
from mmtransfer.sound.relatedness import SoundInputs
from mmtransfer.speech.relatedness import SpeechInputs
from mmtransfer.text.relatedness import TextInputs
from mmtransfer.transfer.features import FeatureStore
from mmtransfer.transfer.relatedness import (
    FIGURES,
    Figure,
    frechet_distance,
    h_score,
    log_me,
    mmd,
    neighbour_accuracy,
    probe_accuracy,
    proxy_a_distance,
    transport_cost,
)

logger = logging.getLogger(__name__)
ROWS = 2000
"""Most labelled rows (texts, clips, or frames of characters) that layers are judged by."""
_FEWEST = 2  # examples of a class


class Inputs(Protocol):
    """The target's and the source domains' inputs of one kind."""

    figures: dict[str, Figure]
    rows_are_labelled: bool

    @property
    def samples(self) -> dict[str, str]:
        """How much of each set is looked at."""
        ...

    @property
    def labelled_by(self) -> str:
        """What the labels are."""
        ...

    def labels(self) -> tuple[list[str], list[str]]:
        """Labels of the target, and what belongs together; an empty label is left out."""
        ...

    def open(self, checkpoint: Checkpoint) -> Any:
        """A backbone."""
        ...

    def features(self, model: Any, name: str) -> FeatureStore:
        """Features [row, layer, width] of a set's examples; the first row is the whole example."""
        ...

    def describe(self, model: Any, name: str) -> dict[str, float | None]:
        """Figures of one set."""
        ...

    def describe_pair(self, name: str) -> dict[str, float | None]:
        """Figures of the target and another set."""
        ...


KINDS: dict[str, Callable[[Config, Checkpoint, torch.device], Inputs]] = {
    "sentiment": TextInputs,
    "speech": SpeechInputs,
    "sound": SoundInputs,
}
"""By `task` of a configuration."""


@dataclass(frozen=True)
class LayerScore:
    """How much a frozen layer of a backbone says of the target's labels."""

    model: str
    layer: int
    """0: below the first transformer layer."""
    depth: int
    """Layers of the backbone."""
    probe: float
    log_me: float
    h_score: float
    neighbours: float


@dataclass(frozen=True)
class Relatedness:
    """What `relate` found. It prints as tables."""

    task: str
    source: str
    labelled_by: str
    """What the labels are."""
    rows: int
    """Labelled rows that layers are judged by."""
    chance: float
    """Accuracy of always the most frequent label."""
    samples: dict[str, str]
    """How much of each set is looked at."""
    layers: list[LayerScore]
    """Every layer of every candidate, best probe first."""
    distances: dict[str, dict[str, float | None]]
    """Of the target and each source-domain set, by figure, on the source's last layer."""
    inputs: dict[str, dict[str, float | None]]
    """Of each set, by figure."""
    explanations: dict[str, Figure]
    """Of every figure above."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def best(self, model: str | None = None) -> LayerScore:
        """The layer with the best probe, of one model or of all."""
        return next(row for row in self.layers if model in (None, row.model))

    def __str__(self) -> str:
        from rich.console import Console

        screen = Console(file=io.StringIO(), width=100)
        screen.print(self)
        return str(screen.file.getvalue()).rstrip()  # type: ignore[attr-defined]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from _tables(self)


def relate(config: Config, candidates: Sequence[str] = ()) -> Relatedness:
    """Judge backbones and their layers by the target's labels, and measure how far the target's
    inputs are from those of the source-domain sets (`data.source_domain`). Nothing is trained.

    `candidates` are further models beside `config.source_model`: Hub ids, folders, `bundled:NAME`.
    What is looked at is drawn at random with `runtime.seed` and of fixed size; see `samples`.

    Raises:
        UserError: data or a model that cannot be used, one class only, or a task without labels.
    """
    if config.task not in KINDS:
        raise UserError(
            f"task: {config.task} has no labels to relate; expected one of {', '.join(KINDS)}."
        )
    if "target" in config.data.source_domain:
        raise UserError("data.source_domain: 'target' is the training data's name; rename the set.")
    with use_runtime(config.runtime):
        return _relate(config, candidates)


def _relate(config: Config, candidates: Sequence[str]) -> Relatedness:
    started = time.perf_counter()
    device, seed = choose_device(config.runtime), config.runtime.seed
    source = resolve(config.source_model, config.revision)
    named = dict.fromkeys([config.source_model, *candidates])
    found = {name: source if name == config.source_model else resolve(name) for name in named}
    inputs = KINDS[config.task](config, source, device)
    labels, groups, notes = _usable(inputs, seed)
    others = list(config.data.source_domain)
    layers, described, distances = [], dict[str, Any](), dict[str, dict[str, float | None]]()
    for name, checkpoint in found.items():
        logger.info("relating %s", name)
        model = inputs.open(checkpoint)
        layers += _layer_scores(name, _labelled(inputs, model), labels, groups, seed)
        if name == config.source_model:
            described = {each: inputs.describe(model, each) for each in ("target", *others)}
            target = _whole(inputs, model, "target")
            for other in others:
                distances[other] = inputs.describe_pair(other) | _distances(
                    target, _whole(inputs, model, other), seed
                )
    if not others:
        notes.append(
            "no source-domain sets: name some in data.source_domain to measure how far the target "
            "is from them"
        )
    if len(found) == 1:
        notes.append("one backbone: its layers alone are ranked; name others with --candidates")
    if distances and find_spec("ot") is None:
        notes.append("transport cost needs POT: pip install 'mmtransfer[transport]'")
    layers.sort(key=lambda row: (-row.probe, -row.log_me))
    used = {"probe", "log_me", "h_score", "neighbours"}
    for row in distances.values():
        if row["transport"] is None:
            del row["transport"]
    used |= {key for rows in (distances, described) for row in rows.values() for key in row}
    explained = {k: v for k, v in (FIGURES | inputs.figures).items() if k in used}
    kept = labels[labels >= 0]
    return Relatedness(
        config.task,
        config.source_model,
        inputs.labelled_by,
        len(kept),
        float(np.bincount(kept).max() / len(kept)),
        inputs.samples,
        layers,
        distances,
        described,
        explained,
        notes,
        round(time.perf_counter() - started, 2),
    )


def _usable(inputs: Inputs, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(label, group) of each labelled row, by number, -1 for a label that is left out; notes."""
    names, together = inputs.labels()
    owners = {group: number for number, group in enumerate(dict.fromkeys(together))}
    groups = np.array([owners[group] for group in together])
    spread = Counter(name for name, _ in set(zip(names, together, strict=True)) if name)
    rare = sorted(name for name in spread if spread[name] < _FEWEST)
    known = sorted(set(spread) - set(rare))
    if len(known) < 2:
        raise UserError(
            f"target: expected at least two classes, each with {_FEWEST} examples of different "
            f"groups, found {len(known)}. Give more examples."
        )
    number = {name: index for index, name in enumerate(known)}
    labels = np.array([number.get(name, -1) for name in names])
    usable = np.flatnonzero(labels >= 0)
    if len(usable) > ROWS:
        chosen = np.random.default_rng(seed).choice(usable, ROWS, replace=False)
        dropped = np.setdiff1d(usable, chosen)
        labels[dropped] = -1
    notes = [f"left out, too rare: {', '.join(rare)}"] if rare else []
    return labels, groups, notes


def _labelled(inputs: Inputs, model: Any) -> np.ndarray:
    """Features [labelled row, layer, width] of the target."""
    store = inputs.features(model, "target")
    first = 1 if inputs.rows_are_labelled else 0
    return np.concatenate([store[index][first:] for index in range(len(store))])


def _whole(inputs: Inputs, model: Any, name: str) -> np.ndarray:
    """Features [example, width] of a set on the last layer."""
    store = inputs.features(model, name)
    return np.stack([store[index][0, -1] for index in range(len(store))])


def _layer_scores(
    name: str, features: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> list[LayerScore]:
    used = labels >= 0
    features, labels, groups = features[used], labels[used], groups[used]
    depth = features.shape[1] - 1
    found = []
    for layer in range(depth + 1):
        own = features[:, layer].astype(float)
        found.append(
            LayerScore(
                name,
                layer,
                depth,
                probe_accuracy(own, labels, groups, seed=seed),
                log_me(own, labels),
                h_score(own, labels),
                neighbour_accuracy(own, labels, groups),
            )
        )
    return found


def _distances(target: np.ndarray, other: np.ndarray, seed: int) -> dict[str, float | None]:
    squared, p = mmd(target, other, seed=seed)
    return {
        "mmd": squared,
        "mmd_p": p,
        "proxy_a": proxy_a_distance(target, other, seed=seed),
        "frechet": frechet_distance(target, other, seed=seed),
        "transport": transport_cost(target, other, seed=seed),
    }


# --- for people ----------------------------------------------------------------------------------


def _tables(found: Relatedness) -> Any:
    from rich.table import Table
    from rich.text import Text

    columns = ("probe", "log_me", "h_score", "neighbours")
    table = Table(title=f"backbones and layers by {found.labelled_by}", title_justify="left")
    for title in ("rank", "backbone", "layer"):
        table.add_column(title, justify="left" if title == "backbone" else "right")
    for name in columns:
        table.add_column(found.explanations[name].title, justify="right")
    for rank, row in enumerate(found.layers, 1):
        figures = [f"{getattr(row, name):.3f}" for name in columns]
        table.add_row(str(rank), row.model, f"{row.layer} of {row.depth}", *figures)
    yield table
    yield Text(
        f"{found.rows} rows; always the most frequent label scores {found.chance:.3f}. "
        + "; ".join(f"{name}: {size}" for name, size in found.samples.items())
    )
    if found.distances:
        yield _by_figure(
            f"target against source domains, on the last layer of {found.source}",
            found.distances,
            found.explanations,
        )
    yield _by_figure("inputs", found.inputs, found.explanations)
    for one in found.explanations.values():
        yield Text.assemble(
            (one.title, "bold"), f": {one.meaning}. Limit: {one.limit}. ({one.paper})"
        )
    for note in found.notes:
        yield Text(f"note: {note}")
    yield Text(f"{found.seconds:.1f} s")


def _by_figure(
    title: str, rows: dict[str, dict[str, float | None]], explained: dict[str, Figure]
) -> Any:
    """A line for each figure, a column for each set."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for name in rows:
        table.add_column(name, justify="right")
    for key in next(iter(rows.values())):
        values = [row[key] for row in rows.values()]
        table.add_row(explained[key].title, *("–" if v is None else f"{v:.3f}" for v in values))
    return table
