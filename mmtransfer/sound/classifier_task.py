"""Sound classification: clips with labels, macro-F1 or mean average precision as the score."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.sound.classifier import SoundModel, load_sound_model, new_sound_model
from mmtransfer.sound.examples import (
    SoundSet,
    clip_labels,
    drop_unlabelled,
    load_sound_splits,
    read_sounds,
    refuse_labels,
)
from mmtransfer.sound.scores import mean_average_precision, multi_macro_f1, score_multi_label
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.augmentation import Augmenter
from mmtransfer.speech.clip_task import check_views
from mmtransfer.speech.clips import Clip
from mmtransfer.transfer.classification import (
    confusion_matrix,
    fit_temperature,
    macro_f1_accuracy,
    score_classification,
)
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.regularisers import Outputs
from mmtransfer.transfer.splits import Splits
from mmtransfer.transfer.stages import Stage, class_weights, frozen_modules, resolve_stages
from mmtransfer.transfer.task import Task, name_some


@dataclass(frozen=True)
class Window:
    """A stretch of a clip that passes the encoder at once."""

    clip: Clip
    number: int
    """Of its clip in the set."""
    start: int
    """In samples of the clip."""
    end: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end - self.start) / SAMPLE_RATE

    def samples(self) -> np.ndarray:
        """Float32 [samples] at 16 kHz."""
        return piece_of(self.clip, self.start, self.end)


@dataclass
class SoundBatch:
    """Windows of one context."""

    inputs: dict[str, torch.Tensor]
    """Encoder inputs, or `stored` activations [window, layer, (frame,) width]."""
    mask: torch.Tensor
    """Frames that hold the window [window, frame]."""
    targets: torch.Tensor
    """Which classes the window has [window, class], 0 or 1."""


class SoundTask(Task):
    """Trains a sound classifier. Each window is an example with the labels of its clip; validation
    is by clip.
    """

    higher_is_better = True
    tie_metric = "loss"
    unit: ClassVar[str] = "audio_seconds"
    speed_unit: ClassVar[str] = "x"
    pipeline: ClassVar[str] = "audio-classification"
    pipeline_call: ClassVar[str] = 'run("recording.wav")'
    usage: ClassVar[str] = (
        'model = mmtransfer.load("path/or/id/of/this/model")\n'
        'print(model.predict(["recording.wav"]))'
    )

    splits: Splits[SoundSet]

    def __init__(
        self,
        sound: SoundModel,
        train: SoundSet,
        validation: SoundSet,
        config: Config,
        stages: Sequence[Stage] | None = None,
    ):
        network, stages = sound.network, stages or resolve_stages(config)
        super().__init__(sound, network, network.layout(), sound.encoder.model, stages, config)
        if any(stage.objective == "contrastive" for stage in stages):
            raise UserError("transfer.stages: objective: contrastive is for classes of texts.")
        self.sound, self._network = sound, network
        self.metric = "map" if sound.is_multi else "macro_f1"
        self.validation = validation
        self._windows = cut_windows(sound, train)
        self._validation_windows = cut_windows(sound, validation)
        self._targets = label_matrix(train, sound.labels)
        self._validation_targets = label_matrix(validation, sound.labels)
        self._augmenter = Augmenter(config.augment)
        self._views = 1
        self.lengths = [self._context(window) for window in self._windows]
        counts = self._targets[[window.number for window in self._windows]].sum(0)
        weights = class_weights(
            [max(1, int(count)) for count in counts],
            config.transfer.class_weights,
            config.transfer.effective_beta,
        )
        self._weights = torch.tensor(weights or [1.0] * len(sound.labels))
        self._stores: tuple[FeatureStore, FeatureStore] | None = None

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what cannot be, before anything is loaded."""
        super().check(config)
        if config.head.type not in ("auto", "classifier"):
            raise UserError(
                f"head.type: {config.head.type} is not for sounds; use classifier or auto."
            )
        if cls.rehearsal_share(config):
            raise UserError("transfer.rehearsal is for speech and texts; remove it.")

    @classmethod
    def set_up(cls, config: Config, source: Checkpoint, device: torch.device) -> SoundTask:
        """The task with an encoder, a head for its classes, and its clips."""
        resolve_stages(config)  # refuses what cannot be before the clips are decoded
        splits, labels, is_multi = load_sound_splits(config)
        sound = new_sound_model(
            source,
            labels,
            is_multi=is_multi,
            data=config.data,
            head=config.head,
            seed=config.runtime.seed,
        )
        task = cls(sound, splits.train, splits.validation, config)
        task.splits = splits
        return task

    @classmethod
    def load(cls, checkpoint: Checkpoint, language: str | None) -> SoundModel:
        """A sound classifier."""
        return load_sound_model(checkpoint)

    # --- training ---------------------------------------------------------------------------

    @property
    def batch_budget(self) -> float:
        """Audio seconds per forward pass."""
        return self.config.train.batch_seconds

    @property
    def fingerprint(self) -> str:
        """Identity of the training windows."""
        parts = [f"{w.clip.identity} {w.clip.text} {w.start} {w.end}" for w in self._windows]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def epoch(self, epoch: int) -> Sequence[int]:
        """Every window."""
        return range(len(self._windows))

    def _context(self, window: Window, *, augmented: bool = True) -> float:
        slowest = self._augmenter.slowest if augmented else 1.0
        return self.sound.context_s(window.seconds / slowest)

    def _view_rng(self, index: int, view: int) -> np.random.Generator:
        return np.random.default_rng([self.config.runtime.seed, 2, view, index])

    def _view(self, index: int, view: int, context_s: float) -> dict[str, torch.Tensor]:
        """Encoder inputs of an augmented version of a training window."""
        rng = self._view_rng(index, view)
        samples, _ = self._augmenter.waveform(self._windows[index].samples(), rng)
        inputs = self.sound.inputs([samples], context_s)
        if "features" in inputs:
            self._augmenter.features(inputs["features"][0], len(samples) / SAMPLE_RATE, rng)
        return inputs

    def _seconds(self, index: int, view: int) -> float:
        """Length of an augmented version of a training window."""
        seconds = self._windows[index].seconds
        return seconds / self._augmenter.draw_speed(self._view_rng(index, view), seconds)

    def _close_stores(self) -> None:
        self._stores = None

    def _open_stores(self, frozen: int, device: torch.device) -> None:
        self._views = check_views(self._augmenter, self.config)
        windows, active = self._windows, self._augmenter.is_active
        items = [(index, view) for index in range(len(windows)) for view in range(self._views)]
        train = self._open_store(
            "the training clips", windows, items, frozen, device, augmented=active
        )
        windows = self._validation_windows
        items = [(index, 0) for index in range(len(windows))]
        validation = self._open_store(
            "the validation clips", windows, items, frozen, device, augmented=False
        )
        self._stores = (train, validation)

    def _open_store(
        self,
        name: str,
        windows: list[Window],
        items: list[tuple[int, int]],
        frozen: int,
        device: torch.device,
        *,
        augmented: bool,
    ) -> FeatureStore:
        sound, network, config = self.sound, self._network, self.config
        layers, pooled = network.stored_layers(frozen), network.stores_pooled(frozen)
        contexts = [self._context(windows[index], augmented=augmented) for index, _ in items]
        lengths = [
            self._seconds(index, view) if augmented else windows[index].seconds
            for index, view in items
        ]
        size = len(layers) * network.encoder.width
        values = [size * (1 if pooled else sound.frames(context)) for context in contexts]
        key = cache_key(
            weights=weights_digest(frozen_modules(self.layout, frozen), self.host.config),
            layers=layers,
            pooled=network.config.pooling if pooled else None,
            features=sound.extractor.to_dict(),
            augment=self._augmenter.identity if augmented else None,
            seed=config.runtime.seed if augmented else None,
            items=[
                [w.clip.identity, w.start, w.end, view, context]
                for (w, view), context in zip(
                    ((windows[index], view) for index, view in items), contexts, strict=True
                )
            ],
            dtype=config.transfer.cache_dtype,
        )

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            network.eval()
            by_context: dict[float, list[int]] = defaultdict(list)
            for row in rows:
                by_context[contexts[row]].append(row)
            for context, chosen in by_context.items():
                batch = max(1, int(config.evaluation.batch_seconds / context))
                for start in range(0, len(chosen), batch):
                    part = chosen[start : start + batch]
                    if augmented:
                        inputs = stacked([self._view(*items[row], context) for row in part])
                    else:
                        pieces = [windows[items[row][0]].samples() for row in part]
                        inputs = sound.inputs(pieces, context)
                    mask = sound.mask([lengths[row] for row in part], context)
                    with torch.inference_mode():
                        moved = {n: value.to(device) for n, value in inputs.items()}
                        stored = network.prefix(moved, mask.to(device), frozen)
                    yield from zip(part, stored.cpu().numpy(), strict=True)

        return cached_features(name, key, values, compute, dtype=config.transfer.cache_dtype)

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[SoundBatch]:
        """Micro-batches of this process's share, one context each."""
        # Without a cache every epoch is a view of its own.
        view = epoch % self._views if self._stores else epoch
        groups: dict[float, list[int]] = defaultdict(list)
        for index in batch[share]:
            groups[self.lengths[index]].append(index)
        micros = []
        for context, indices in sorted(groups.items()):
            size = max(1, int(self.config.train.batch_seconds / context + 1e-6))
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                if self._stores:
                    rows = [index * self._views + view for index in part]
                    inputs = _from_store(self._stores[0], rows)
                else:
                    inputs = stacked([self._view(index, view, context) for index in part])
                mask = self.sound.mask([self._seconds(index, view) for index in part], context)
                numbers = [self._windows[index].number for index in part]
                micros.append(SoundBatch(inputs, mask, torch.from_numpy(self._targets[numbers])))
        return micros

    def weight(self, micro: SoundBatch) -> float:
        """Sum of the class weights."""
        if self.sound.is_multi:
            return float(len(micro.targets) * self._weights.sum())
        return float((micro.targets * self._weights).sum())

    def split(self, micro: SoundBatch) -> list[SoundBatch]:
        """Two halves of the windows."""
        half = len(micro.targets) // 2
        if not half:
            return [micro]
        return [
            SoundBatch(
                {name: value[part] for name, value in micro.inputs.items()},
                micro.mask[part],
                micro.targets[part],
            )
            for part in (slice(None, half), slice(half, None))
        ]

    def outputs(self, micro: SoundBatch, device: torch.device) -> Outputs:
        """Logits [window, class]; where windows can have several classes, of its absence and its
        presence for each class: [window, class, 2].
        """
        logits = self._logits(micro, device)
        if self.sound.is_multi:
            logits = torch.stack([torch.zeros_like(logits), logits], -1)
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=device)
        return Outputs(logits, counted)

    def target_loss(self, outputs: Outputs, micro: SoundBatch) -> torch.Tensor:
        """Cross-entropy, weighted by class and summed."""
        logits, targets = outputs.logits.float(), micro.targets.to(outputs.logits.device)
        weights, smoothing = self._weights.to(logits.device), self.config.transfer.label_smoothing
        if not self.sound.is_multi:
            return functional.cross_entropy(
                logits,
                targets.argmax(-1),
                weight=weights,
                reduction="sum",
                label_smoothing=smoothing,
            )
        each = functional.cross_entropy(
            logits.transpose(1, 2), targets.long(), reduction="none", label_smoothing=smoothing
        )
        return (each * weights).sum()

    def _logits(self, micro: SoundBatch, device: torch.device) -> torch.Tensor:
        inputs = {name: value.to(device) for name, value in micro.inputs.items()}
        mask = micro.mask.to(device)
        if self.frozen is None:
            return self._network(inputs, mask)
        if "stored" in inputs:
            stored = inputs["stored"]
        else:
            with torch.no_grad():
                stored = self._network.prefix(inputs, mask, self.frozen)
        pooled = self._network.stores_pooled(self.frozen)
        return self._network.forward_stored(stored, None if pooled else mask, self.frozen)

    def names(self, indices: Sequence[int]) -> str:
        """Names of the clips of training windows."""
        return name_some([self._windows[index].clip.name for index in indices])

    # --- evaluation -------------------------------------------------------------------------

    @property
    def validation_size(self) -> int:
        """Number of validation clips."""
        return len(self.validation.clips)

    def validate(self, indices: Sequence[int], device: torch.device) -> list[list[float]]:
        """Logits of validation clips."""
        self._network.eval()
        place = {number: position for position, number in enumerate(indices)}
        groups: dict[float, list[int]] = defaultdict(list)
        for row, window in enumerate(self._validation_windows):
            if window.number in place:
                groups[self._context(window, augmented=False)].append(row)
        logits, owner = [], []
        for context, rows in sorted(groups.items()):
            size = max(1, int(self.config.evaluation.batch_seconds / context))
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                windows = [self._validation_windows[row] for row in part]
                if self._stores:
                    inputs = _from_store(self._stores[1], part)
                else:
                    inputs = self.sound.inputs([window.samples() for window in windows], context)
                mask = self.sound.mask([window.seconds for window in windows], context)
                targets = torch.zeros(len(part), len(self.sound.labels))
                with torch.inference_mode():
                    found = self._logits(SoundBatch(inputs, mask, targets), device)
                logits.append(found.float().cpu())
                owner += [place[window.number] for window in windows]
        averaged = self.sound.average(torch.cat(logits), torch.tensor(owner), len(indices))
        found_rows: list[list[float]] = averaged.tolist()
        return found_rows

    def summarize(self, records: Sequence[list[float]]) -> dict[str, float | None]:
        """Macro-F1 and mean cross-entropy; accuracy, or mean average precision."""
        logits, targets = np.array(records), self._validation_targets[: len(records)]
        rows = torch.from_numpy(logits)
        if self.sound.is_multi:
            wanted = torch.from_numpy(targets).double()
            loss = functional.binary_cross_entropy_with_logits(rows, wanted)
            return {
                "map": mean_average_precision(logits, targets),
                "macro_f1": multi_macro_f1((logits > 0).astype(np.int64), targets),
                "loss": float(loss),
            }
        classes = targets.argmax(-1)
        confusion = confusion_matrix(classes, logits.argmax(-1), len(self.sound.labels))
        macro_f1, accuracy = macro_f1_accuracy(confusion)
        loss = functional.cross_entropy(rows, torch.from_numpy(classes))
        return {"macro_f1": macro_f1, "accuracy": accuracy, "loss": float(loss)}

    def outcomes(self, records: Sequence[list[float]]) -> tuple[str, dict[str, Any]]:
        """Class and predicted class of each clip, or classes and probabilities."""
        logits, targets = np.array(records), self._validation_targets[: len(records)]
        if self.sound.is_multi:
            rows = self.sound.probabilities(logits).tolist()
            return self.metric, {"targets": targets.tolist(), "probabilities": rows}
        found = logits.argmax(-1).tolist()
        return self.metric, {"targets": targets.argmax(-1).tolist(), "predictions": found}

    # --- what a run reports -----------------------------------------------------------------

    def score(self, examples: SoundSet, device: torch.device) -> dict[str, Any]:
        """Scores of labelled clips."""
        return score_sounds(self.sound, examples, self.config, device)

    @property
    def is_scored_before(self) -> bool:
        """Whether the head came with the source."""
        return self.sound.is_source_head

    def finish(self, device: torch.device) -> None:
        """Calibrate the probabilities (Guo et al. 2017)."""
        if self.sound.is_multi:
            return
        self._close_stores()
        records = np.array(self.validate(range(self.validation_size), device))
        self.sound.temperature = fit_temperature(records, self._validation_targets.argmax(-1))

    def describe(self) -> dict[str, Any]:
        """Classes, temperature, length of windows."""
        return {
            "labels": self.sound.labels,
            "temperature": self.sound.temperature,
            "window_s": self.sound.window_s,
        }

    @property
    def is_plain(self) -> bool:
        """False: transformers has no such head."""
        return False

    @classmethod
    def evaluate(
        cls, checkpoint: Checkpoint, data: str | SoundSet, config: Config, device: torch.device
    ) -> dict[str, Any]:
        """Scores of a classifier on labelled clips."""
        sound = cls.load(checkpoint, None)
        where = data if isinstance(data, str) else data.name
        sounds = read_sounds(data, config.data, name="data") if isinstance(data, str) else data
        if not sound.is_multi:
            sounds = drop_unlabelled(sounds)
        refuse_labels(sounds, sound.labels, is_multi=sound.is_multi, where=where)
        sound.network.to(device)
        started = time.perf_counter()
        return {
            **score_sounds(sound, sounds, config, device),
            "metric": "map" if sound.is_multi else "macro_f1",
            "skipped": len(sounds.skipped),
            "seconds_audio": round(sounds.seconds, 3),
            "seconds_wall": round(time.perf_counter() - started, 3),
        }


def cut_windows(sound: SoundModel, sounds: SoundSet) -> list[Window]:
    """The windows of all clips."""
    return [
        Window(clip, number, start, end)
        for number, clip in enumerate(sounds.clips)
        for start, end in sound.windows(_samples(clip))
    ]


def _samples(clip: Clip) -> int:
    return round(clip.seconds * SAMPLE_RATE)


def piece_of(clip: Clip, start: int, end: int) -> np.ndarray:
    """Float32 samples of a stretch of a decoded clip, without the rest of it."""
    if clip.cached is None:
        return clip.samples()[start:end]
    part = np.load(clip.cached, mmap_mode="r")[start:end]
    return part.astype(np.float32)


def label_matrix(sounds: SoundSet, labels: Sequence[str]) -> np.ndarray:
    """Which labels each clip has: float32 [clip, class] of 0 and 1."""
    number = {label: index for index, label in enumerate(labels)}
    found = np.zeros((len(sounds), len(labels)), np.float32)
    for row, clip in zip(found, sounds.clips, strict=True):
        row[[number[label] for label in clip_labels(clip)]] = 1
    return found


def stacked(views: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Encoder inputs of single windows as those of a batch."""
    return {name: torch.cat([view[name] for view in views]) for name in views[0]}


def _from_store(store: FeatureStore, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"stored": torch.from_numpy(np.stack([store[row] for row in rows])).float()}


def score_sounds(
    sound: SoundModel, sounds: SoundSet, config: Config, device: torch.device
) -> dict[str, Any]:
    """Scores of labelled clips: the fields of `ClassificationScore`, or of `MultiLabelScore` where
    clips can have several classes.
    """
    logits = sound.logits(
        [_samples(clip) for clip in sounds.clips],
        lambda number, start, end: piece_of(sounds.clips[number], start, end),
        device=device,
        batch_seconds=config.evaluation.batch_seconds,
    )
    targets = label_matrix(sounds, sound.labels)
    samples, seed = config.evaluation.bootstrap_samples, config.runtime.seed
    if sound.is_multi:
        shares = sound.probabilities(logits)
        return score_multi_label(
            shares, targets, sound.labels, bootstrap_samples=samples, seed=seed
        ).as_dict()
    return score_classification(
        logits,
        targets.argmax(-1),
        sound.labels,
        temperature=sound.temperature,
        bootstrap_samples=samples,
        seed=seed,
    ).as_dict()
