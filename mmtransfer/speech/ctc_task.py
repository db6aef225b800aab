"""Speech recognition by CTC: characters from the frames of a frozen or tuned encoder."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.config import Config
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.clip_task import ClipTask, check_views, skip_long
from mmtransfer.speech.clips import Clip, ClipSet, read_clips, usual_language
from mmtransfer.speech.ctc import LONGEST_S, CtcModel, load_ctc_model, new_ctc_model
from mmtransfer.speech.scores import ClipScore
from mmtransfer.speech.splits import add_rehearsal, load_clip_splits
from mmtransfer.transfer.encoders import SpeechEncoder
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.regularisers import Outputs
from mmtransfer.transfer.splits import training_data
from mmtransfer.transfer.stages import Stage, frozen_modules, resolve_stages


@dataclass
class CtcBatch:
    """Clips of one context with their symbols."""

    inputs: dict[str, torch.Tensor]
    """Encoder inputs, or `stored` activations [clip, layer, frame, width]."""
    mask: torch.Tensor
    """Frames that hold the clip [clip, frame]."""
    targets: torch.Tensor
    """Symbols [clip, symbol], padded with the blank."""
    target_lengths: torch.Tensor


class CtcTask(ClipTask):
    """Trains a CTC recogniser."""

    def __init__(
        self,
        speech: CtcModel,
        train: ClipSet,
        validation: ClipSet,
        config: Config,
        stages: Sequence[Stage] | None = None,
        rehearsal: ClipSet | None = None,
    ):
        network = speech.network
        encoder = network.encoder
        if not isinstance(encoder, SpeechEncoder):
            raise TypeError("a CTC task stands on a speech encoder")
        self.speech, self._network, self._encoder = speech, network, encoder
        super().__init__(
            speech,
            network,
            network.layout(),
            encoder.model,
            stages or resolve_stages(config),
            config,
            train,
            validation,
            rehearsal,
        )
        self._symbols = [speech.spell(clip.text) for clip in self.train.clips]
        self.lengths = [speech.context_s(clip.seconds) for clip in self.train.clips]
        self._stores: tuple[FeatureStore, FeatureStore] | None = None
        self._views = 1

    @classmethod
    def set_up(cls, config: Config, source: Checkpoint, device: torch.device) -> CtcTask:
        """The task with an encoder, an output layer over its clips' characters, and the clips."""
        clips = read_clips(training_data(config), config.data)
        language = config.data.language or usual_language(clips)
        splits = load_clip_splits(config, LONGEST_S, train_clips=clips)
        speech = new_ctc_model(
            source,
            [clip.text for clip in splits.train.clips],
            language=language,
            head=config.head,
            seed=config.runtime.seed,
        )
        spoken = (speech.language or "unknown") if speech.is_source_head else None
        add_rehearsal(splits, speech, spoken, cls.rehearsal_share(config), config, device)
        task = cls(speech, splits.train, splits.validation, config, rehearsal=splits.rehearsal)
        splits.train = task.target
        task.splits = splits
        return task

    @classmethod
    def load(cls, checkpoint: Checkpoint, language: str | None) -> CtcModel:
        """A CTC recogniser."""
        return load_ctc_model(checkpoint, language=language)

    def _fitting(self, clips: ClipSet) -> ClipSet:
        """The clips with frames for their symbols: one each, and a blank between doubles."""
        fastest = max(1.0, *(self.config.augment.speed or (1.0,)))
        kept, short = [], []
        for clip in clips.clips:
            symbols = self.speech.spell(clip.text)
            doubles = sum(a == b for a, b in pairwise(symbols))
            if len(symbols) + doubles <= self.speech.frames(clip.seconds / fastest):
                kept.append(clip)
            else:
                short.append((clip, f"{len(symbols)} characters"))
        skipped = skip_long(clips.name, short, "more characters than the clip has frames")
        return replace(clips, clips=kept, skipped=[*clips.skipped, *skipped])

    # --- training ---------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Identity of the training clips."""
        parts = [f"{clip.identity} {clip.text}" for clip in self.train.clips]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _close_stores(self) -> None:
        self._stores = None

    def _open_stores(self, frozen: int, device: torch.device) -> None:
        self._views = check_views(self._augmenter, self.config)
        clips = self.train.clips
        items = [(index, view) for index in range(len(clips)) for view in range(self._views)]
        train = self._open_store(
            "the training clips", clips, items, frozen, device, augmented=self._augmenter.is_active
        )
        clips = self.validation.clips
        items = [(index, 0) for index in range(len(clips))]
        validation = self._open_store(
            "the validation clips", clips, items, frozen, device, augmented=False
        )
        self._stores = (train, validation)

    def _open_store(
        self,
        name: str,
        clips: list[Clip],
        items: list[tuple[int, int]],
        frozen: int,
        device: torch.device,
        *,
        augmented: bool,
    ) -> FeatureStore:
        speech, network, config = self.speech, self._network, self.config
        layers = network.stored_layers(frozen)
        slowest = self._augmenter.slowest if augmented else 1.0
        contexts = [speech.context_s(clips[index].seconds / slowest) for index, _ in items]
        width = network.encoder.width
        values = [len(layers) * speech.frames(context) * width for context in contexts]
        key = cache_key(
            weights=weights_digest(frozen_modules(self.layout, frozen), self.host.config),
            layers=layers,
            features=speech.extractor.to_dict(),
            augment=self._augmenter.identity if augmented else None,
            seed=config.runtime.seed if augmented else None,
            items=[
                [clips[index].identity, view, context]
                for (index, view), context in zip(items, contexts, strict=True)
            ],
            dtype=config.transfer.cache_dtype,
        )

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            network.eval()
            by_context: dict[float, list[int]] = defaultdict(list)
            for row in rows:
                by_context[contexts[row]].append(row)
            for context, chosen in by_context.items():
                size = max(1, int(config.evaluation.batch_seconds / context))
                for start in range(0, len(chosen), size):
                    part = chosen[start : start + size]
                    if augmented:
                        views = [self._view(*items[row], context) for row in part]
                        inputs = {n: torch.cat([view[n] for view in views]) for n in views[0]}
                    else:
                        samples = [clips[items[row][0]].samples() for row in part]
                        inputs = speech.inputs(samples, context)
                    mask = speech.mask([context] * len(part), context)
                    with torch.inference_mode():
                        moved = {n: value.to(device) for n, value in inputs.items()}
                        stored = network.prefix(moved, mask.to(device), frozen)
                    yield from zip(part, stored.cpu().numpy(), strict=True)

        return cached_features(name, key, values, compute, dtype=config.transfer.cache_dtype)

    def _view(self, index: int, view: int, context_s: float) -> dict[str, torch.Tensor]:
        """Encoder inputs of an augmented version of a training clip."""
        rng = self._view_rng(index, view)
        samples, _ = self._augmenter.waveform(self.train.clips[index].samples(), rng)
        inputs = self.speech.inputs([samples], context_s)
        if "features" in inputs:
            self._augmenter.features(inputs["features"][0], len(samples) / SAMPLE_RATE, rng)
        return inputs

    def _seconds(self, index: int, view: int) -> float:
        """Length of an augmented version of a training clip."""
        seconds = self.train.clips[index].seconds
        return seconds / self._augmenter.draw_speed(self._view_rng(index, view), seconds)

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[CtcBatch]:
        """Micro-batches of this process's share, one context each."""
        # Without a cache every epoch is a view of its own.
        view = epoch % self._views if self._stores else epoch
        slowest = self._augmenter.slowest
        groups: dict[float, list[int]] = defaultdict(list)
        for index in batch[share]:
            seconds = self.train.clips[index].seconds / slowest
            groups[self.speech.context_s(seconds)].append(index)
        micros = []
        for context, indices in sorted(groups.items()):
            size = max(1, int(self.config.train.batch_seconds / context + 1e-6))
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                if self._stores:
                    arrays = [self._stores[0][index * self._views + view] for index in part]
                    inputs = {"stored": torch.from_numpy(np.stack(arrays)).float()}
                else:
                    clips = [self._view(index, view, context) for index in part]
                    inputs = {n: torch.cat([clip[n] for clip in clips]) for n in clips[0]}
                lengths = [self._seconds(index, view) for index in part]
                rows = [torch.tensor(self._symbols[index], dtype=torch.long) for index in part]
                micros.append(
                    CtcBatch(
                        inputs,
                        self.speech.mask(lengths, context),
                        torch.nn.utils.rnn.pad_sequence(
                            rows, batch_first=True, padding_value=self.speech.blank
                        ),
                        torch.tensor([len(row) for row in rows]),
                    )
                )
        return micros

    def weight(self, micro: CtcBatch) -> float:
        """Symbols, and one for each clip, so that silence counts as well."""
        return float(micro.target_lengths.sum() + len(micro.target_lengths))

    def split(self, micro: CtcBatch) -> list[CtcBatch]:
        """Two halves of the clips."""
        half = len(micro.mask) // 2
        if not half:
            return [micro]
        return [
            CtcBatch(
                {name: value[part] for name, value in micro.inputs.items()},
                micro.mask[part],
                micro.targets[part],
                micro.target_lengths[part],
            )
            for part in (slice(None, half), slice(half, None))
        ]

    def outputs(self, micro: CtcBatch, device: torch.device) -> Outputs:
        """Logits [clip, frame, symbol]."""
        return Outputs(self._logits(micro, device), micro.mask.to(device))

    def target_loss(self, outputs: Outputs, micro: CtcBatch) -> torch.Tensor:
        """CTC loss (Graves et al. 2006), summed over clips."""
        device = outputs.logits.device
        # [frame, clip, symbol], in full precision.
        scores = outputs.logits.float().log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(
            scores,
            micro.targets.to(device),
            micro.mask.sum(1).to(device),
            micro.target_lengths.to(device),
            blank=self.speech.blank,
            reduction="sum",
        )

    def _logits(self, micro: CtcBatch, device: torch.device) -> torch.Tensor:
        inputs = {name: value.to(device) for name, value in micro.inputs.items()}
        mask = micro.mask.to(device)
        if self.frozen is None:
            return self._network(inputs, mask)
        if "stored" in inputs:
            stored = inputs["stored"]
        else:
            with torch.no_grad():
                stored = self._network.prefix(inputs, mask, self.frozen)
        return self._network.forward_stored(stored, mask, self.frozen)

    # --- evaluation -------------------------------------------------------------------------

    def validate(self, indices: Sequence[int], device: torch.device) -> list[ClipScore]:
        """Scores of best paths."""
        self._network.eval()
        speech, clips = self.speech, self.validation.clips
        groups: dict[float, list[int]] = defaultdict(list)
        for position, index in enumerate(indices):
            groups[speech.context_s(clips[index].seconds)].append(position)
        scores: dict[int, ClipScore] = {}
        for context, positions in sorted(groups.items()):
            size = max(1, int(self.config.evaluation.batch_seconds / context))
            for start in range(0, len(positions), size):
                part = positions[start : start + size]
                chosen = [clips[indices[position]] for position in part]
                if self._stores:
                    arrays = [self._stores[1][indices[position]] for position in part]
                    inputs = {"stored": torch.from_numpy(np.stack(arrays)).float()}
                else:
                    inputs = speech.inputs([clip.samples() for clip in chosen], context)
                mask = speech.mask([clip.seconds for clip in chosen], context)
                empty = torch.zeros(len(part), 0, dtype=torch.long)
                with torch.inference_mode():
                    logits = self._logits(CtcBatch(inputs, mask, empty, empty.sum(1)), device)
                best = logits.argmax(-1).cpu()
                for position, clip, row, shown in zip(part, chosen, best, mask, strict=True):
                    text, _ = speech.read(row[shown].tolist())
                    scores[position] = self._scoring.score(clip, text)
        return [scores[position] for position in range(len(indices))]

    # --- what a run reports -----------------------------------------------------------------

    def score(self, examples: ClipSet, device: torch.device) -> dict[str, Any]:
        """Scores of best paths."""
        return self._evaluated(self.speech, examples, device).as_dict()

    @property
    def is_scored_before(self) -> bool:
        """Whether the output layer came with the source."""
        return self.speech.is_source_head

    def describe(self) -> dict[str, Any]:
        """Language and longest clip."""
        return {"language": self.speech.language, "max_context_s": self.speech.max_context_s}

    @property
    def is_plain(self) -> bool:
        """Whether it is saved as the library's own CTC model."""
        return self.form == "full" and self.speech.is_plain
