"""Speech recognition with Whisper: clips and transcripts as training batches, WER as the score.

The backbone of a transfer is the encoder. With all of it frozen the decoder is what is tuned, from
cached encoder output.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from mmtransfer.config import Config
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.clip_scores import (
    ClipScoring,
    as_monitored,
    decode_waves,
)
from mmtransfer.speech.clip_task import ClipTask, check_views, skip_long
from mmtransfer.speech.clips import Clip, ClipSet, read_clips, usual_language
from mmtransfer.speech.contexts import (
    SILENCE_S,
    UNADAPTED_CONTEXT_S,
    WINDOW_S,
    taught_context_s,
)
from mmtransfer.speech.recognizers import engine_for
from mmtransfer.speech.scores import ClipScore
from mmtransfer.speech.splits import add_rehearsal, load_clip_splits
from mmtransfer.speech.voice_activity import speech_bounds
from mmtransfer.speech.whisper import SpeechModel, allow_silence, load_speech_model, whisper_layout
from mmtransfer.transfer.encoders import ENCODER_FRAMES_PER_SECOND, WhisperEncoder
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.regularisers import Outputs
from mmtransfer.transfer.splits import training_data
from mmtransfer.transfer.stages import (
    SourcePath,
    Stage,
    can_interpolate,
    frozen_modules,
    resolve_stages,
)

_IGNORED = -100  # target positions without loss
_SAFE_CONTEXTS_S = (10.0, 20.0)  # tried between the full window and the clips' own length
_JOINED_PAUSE_S = 0.3
_PAUSES_S = (0.1, 1.0)  # shortest and longest between clips that are learnt in one window
_SAFE_LOSS = 0.01  # of the metric
SAFE_CLIPS = 64
"""Clips of a set that decide which contexts are safe."""
_STAMPED_S = 12.0  # longer clips hold several sentences, which Whisper stamps one by one

_Example = tuple[np.ndarray, list[int]]
"""Samples of a clip and its target."""


@dataclass
class SpeechBatch:
    """Clips of one context with their target tokens."""

    features: torch.Tensor
    """Log-mel [clip, mel, frame], or cached hidden states [clip, frame, width]."""
    inputs: torch.Tensor
    """Decoder input ids [clip, token]."""
    targets: torch.Tensor
    """Next ids [clip, token]; -100 where there is no loss (prompt, padding)."""
    whole: torch.Tensor | None = None
    """Of rehearsed clips: log-mel [clip, mel, frame] in the full window, for the source."""


class SpeechTask(ClipTask):
    """Fine-tunes a Whisper with its decoder on clips with transcripts.

    Of rehearsed clips it learns what the source, its teacher, makes of them: the distribution at
    each token of the transcript (Li & Hoiem 2016, learning without forgetting; Hinton et al. 2015).
    The teacher has the full window, since the source loops in short contexts.
    """

    _source: Checkpoint

    def __init__(
        self,
        speech: SpeechModel,
        train: ClipSet,
        validation: ClipSet,
        config: Config,
        stages: Sequence[Stage] | None = None,
        rehearsal: ClipSet | None = None,
    ):
        model = speech.model_for(0.0)
        self.speech = speech
        super().__init__(
            speech,
            model,
            whisper_layout(model),
            model,
            stages or resolve_stages(config),
            config,
            train,
            validation,
            rehearsal,
        )
        self._encoder = WhisperEncoder(model.get_encoder())
        clips = self.train.clips
        self._teacher: Any = None
        if len(clips) > self._targets:
            self._teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self._tokens = [speech.spell(clip.text, clip.language) for clip in clips]
        self._bounds: dict[int, tuple[float, float] | None] = {}
        if not all(clip.text for clip in clips):
            allow_silence(model)
        if config.train.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.lengths = [speech.context_s(clip.seconds, shortest=0) for clip in clips]
        longest_s = max(clip.seconds for clip in self.target.clips)
        self._taught_s = taught_context_s(longest_s, speech.max_context_s)
        self._store: FeatureStore | None = None
        self._items: dict[tuple[int, int, bool], int] = {}
        self._views = 1

    @classmethod
    def set_up(cls, config: Config, source: Checkpoint, device: torch.device) -> SpeechTask:
        """The task with a Whisper, its clips and what it rehearses beside them."""
        clips = read_clips(training_data(config), config.data)
        language = config.data.language or usual_language(clips)
        speech = load_speech_model(
            source, language=language, short_contexts=False, can_detect=False
        )
        splits = load_clip_splits(
            config, speech.max_context_s, languages=speech.languages, train_clips=clips
        )
        share = cls.rehearsal_share(config)
        add_rehearsal(splits, speech, speech.language or "en", share, config, device)
        task = cls(speech, splits.train, splits.validation, config, rehearsal=splits.rehearsal)
        splits.train = task.target
        task.splits, task._source = splits, source
        return task

    @classmethod
    def load(cls, checkpoint: Checkpoint, language: str | None) -> SpeechModel:
        """A Whisper."""
        return load_speech_model(checkpoint, language=language)

    def _fitting(self, clips: ClipSet) -> ClipSet:
        return fitting_clips(self.speech, clips)

    def score_monitored(
        self, folder: Path, examples: ClipSet, device: torch.device
    ) -> dict[str, Any] | None:
        """Scores of the saved model on clips, by another engine, with its beams and guards."""
        if engine_for(self._source, "auto", device.type) == "transformers":
            return None
        checkpoint = resolve(str(folder))
        opened, decoding = as_monitored(checkpoint, self.speech, self.config, device)
        score = self._evaluated(self.speech, examples, device, opened=opened, guards=True)
        return {**score.as_dict(), "decoding": decoding}

    # --- training ---------------------------------------------------------------------------

    def _close_stores(self) -> None:
        self._store = None

    def _open_stores(self, frozen: int, device: torch.device) -> None:
        """Encode every training clip with the frozen layers, at its own length; those that serve
        as padded examples also at the full window.
        """
        self._views = check_views(self._augmenter, self.config)
        full = self.speech.max_context_s
        items: list[tuple[int, int, bool]] = []
        contexts: list[float] = []
        for index in range(len(self.train)):
            for view in range(self._views):
                items.append((index, view, False))
                contexts.append(self._context_s(index))
                if self._pads(index):
                    items.append((index, view, True))
                    contexts.append(full)
        encoder = self._encoder
        values = [round(c * ENCODER_FRAMES_PER_SECOND) * encoder.width for c in contexts]
        digests = [self.train.clips[index].identity for index, _, _ in items]
        augmented = self._augmenter.is_active
        key = cache_key(
            weights=weights_digest(frozen_modules(self.layout, frozen), encoder.model.config),
            layers=[frozen],
            features=self.speech.processor.feature_extractor.to_dict(),
            augment=self._augmenter.identity if augmented else None,
            seed=self.config.runtime.seed if augmented else None,
            items=[[d, v, c] for d, (_, v, _), c in zip(digests, items, contexts, strict=True)],
            dtype=self.config.transfer.cache_dtype,
        )

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            budget = self.config.evaluation.batch_seconds
            by_context: dict[float, list[int]] = defaultdict(list)
            for row in rows:
                by_context[contexts[row]].append(row)
            self.model.eval()
            for context, chosen in by_context.items():
                size = max(1, int(budget / context))
                for start in range(0, len(chosen), size):
                    part = chosen[start : start + size]
                    features = torch.cat([self._view(*items[row][:2], context) for row in part])
                    with torch.inference_mode():
                        inputs = {"features": features.to(device)}
                        hidden = encoder.hidden_states([frozen], inputs)[frozen]
                    # [clip, layer, frame, width], which a CTC head on this encoder can read too.
                    yield from zip(part, hidden[:, None].cpu().numpy(), strict=True)

        self._items = {item: row for row, item in enumerate(items)}
        self._store = cached_features(
            "the training clips", key, values, compute, dtype=self.config.transfer.cache_dtype
        )

    def _view(self, index: int, view: int, context_s: float) -> torch.Tensor:
        """Log-mel [1, mel, frame] of an augmented version of a clip."""
        rng = self._view_rng(index, view)
        samples, _ = self._augmenter.waveform(self.train.clips[index].samples(), rng)
        features = self.speech.features([samples], context_s)
        self._augmenter.features(features[0], len(samples) / SAMPLE_RATE, rng)
        return features

    def _pads(self, index: int) -> bool:
        """Whether a clip serves as a padded example when activations are cached."""
        rng = np.random.default_rng([self.config.runtime.seed, 3, index])
        return bool(rng.random() < self.config.train.full_context)

    def _context_s(self, index: int) -> float:
        """The context in which a clip is learnt alone: its own at its slowest; a target's clip has
        none shorter than it will be decoded in.
        """
        seconds = self.train.clips[index].seconds / self._augmenter.slowest
        shortest_s = self._taught_s if index < self._targets else 0.0
        return self.speech.context_s(seconds, shortest=shortest_s)

    def _prepare_stored(self, indices: Sequence[int], epoch: int) -> list[SpeechBatch]:
        """Micro-batches of cached activations, one context each."""
        config, store = self.config.train, self._store
        groups: dict[tuple[int, bool], list[tuple[np.ndarray, list[int], int]]] = defaultdict(list)
        for index in indices:
            rng = np.random.default_rng([self.config.runtime.seed, epoch, index])
            is_padded = self._pads(index) and rng.random() < 0.5
            stamped = rng.random() < config.timestamps
            view = epoch % self._views
            seconds = self.train.clips[index].seconds
            speed = self._augmenter.draw_speed(self._view_rng(index, view), seconds)
            hidden = store[self._items[index, view, is_padded]][0]  # type: ignore[index]
            target = self._target(index, speed, timestamps=stamped)
            groups[len(hidden), index >= self._targets].append((hidden, target, index))
        batches = []
        for (frames, is_rehearsed), examples in sorted(groups.items()):
            size = max(1, int(config.batch_seconds * ENCODER_FRAMES_PER_SECOND / frames + 1e-6))
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                stacked = torch.from_numpy(np.stack([hidden for hidden, _, _ in part])).float()
                batch = self._batch(stacked, [tokens for _, tokens, _ in part])
                if is_rehearsed:
                    clips = [self.train.clips[index].samples() for _, _, index in part]
                    batch.whole = self.speech.features(clips, self.speech.max_context_s)
                batches.append(batch)
        return batches

    @property
    def fingerprint(self) -> str:
        parts = [
            f"{clip.identity} {clip.text}" + (f" {clip.language}" if clip.language else "")
            for clip in self.train.clips
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[SpeechBatch]:
        """Micro-batches: clips at the batch's common short context, windows of several at theirs,
        and a few at the full one.
        """
        if self._store is not None:
            return self._prepare_stored(batch[share], epoch)
        config, full = self.config.train, self.speech.max_context_s
        # From the whole batch, so that neither windows nor contexts depend on who shares the work.
        units = self._units(batch, epoch)
        # One for the target's clips and one for the rehearsal's, which may be much longer.
        shortest: dict[bool, float] = defaultdict(float)
        for first, *others in units:
            if not others:
                own_s, is_rehearsed = self._context_s(first), first >= self._targets
                shortest[is_rehearsed] = max(shortest[is_rehearsed], own_s)
        groups: dict[tuple[float, bool], tuple[list[_Example], list[np.random.Generator]]]
        groups = defaultdict(lambda: ([], []))
        for unit in units[share]:
            is_rehearsed = unit[0] >= self._targets
            rng = np.random.default_rng([self.config.runtime.seed, epoch, unit[0]])
            is_padded = rng.random() < config.full_context
            context = self._window_context_s if len(unit) > 1 else shortest[is_rehearsed]
            examples, rngs = groups[full if is_padded else context, is_rehearsed]
            examples.append(self._example(unit, rng))
            rngs.append(rng)
        found = []
        for context, is_rehearsed in sorted(groups):
            examples, rngs = groups[context, is_rehearsed]
            found += self._batches(examples, rngs, context, is_rehearsed=is_rehearsed)
        return found

    @property
    def _window_context_s(self) -> float:
        """The context of windows."""
        return min(UNADAPTED_CONTEXT_S, self.speech.max_context_s)

    def _units(self, batch: Sequence[int], epoch: int) -> list[list[int]]:
        """The clips of a batch: alone, or several of a language that are joined to a window.

        Silence stays alone, and rehearsed clips are joined among themselves.
        """
        rng = np.random.default_rng([self.config.runtime.seed, epoch, 5, *batch])
        units: list[list[int]] = []
        open_units: dict[tuple[bool, str | None], tuple[list[int], float, int]] = {}
        room_s = self._window_context_s - SILENCE_S
        for index in batch:
            clip = self.train.clips[index]
            seconds = clip.seconds / self._augmenter.slowest + _PAUSES_S[1]
            tokens = len(self._tokens[index])
            kind = (index >= self._targets, clip.language)
            unit, taken_s, taken = open_units.get(kind, ([], 0.0, 0))
            is_joined = rng.random() < self.config.train.joined and tokens > 0
            fits = taken_s + seconds <= room_s and taken + tokens <= decoder_room(self.speech)
            if not (is_joined and unit and fits):
                unit, taken_s, taken = [], 0.0, 0
                units.append(unit)
            unit.append(index)
            if is_joined:
                open_units[kind] = (unit, taken_s + seconds, taken + tokens)
        return units

    def _example(self, unit: Sequence[int], rng: np.random.Generator) -> _Example:
        """Samples of a clip, or of several with pauses between, and the target."""
        stamped = rng.random() < self.config.train.timestamps
        samples, speed = self._augmenter.waveform(self.train.clips[unit[0]].samples(), rng)
        if len(unit) == 1:
            return samples, self._target(unit[0], speed, timestamps=stamped)
        parts, tokens = [samples], list(self._tokens[unit[0]])
        for index in unit[1:]:
            pause = np.zeros(round(rng.uniform(*_PAUSES_S) * SAMPLE_RATE), np.float32)
            parts += [pause, self._augmenter.waveform(self.train.clips[index].samples(), rng)[0]]
            tokens += self._tokens[index]
        prompt = self.speech.prompt(timestamps=False, language=self.train.clips[unit[0]].language)
        return np.concatenate(parts), [*prompt, *tokens, self.model.config.eos_token_id]

    def _target(self, index: int, speed: float, *, timestamps: bool) -> list[int]:
        """Prompt, text and end token. Timestamps mark where speech starts and ends in the clip."""
        language = self.train.clips[index].language
        prompt = self.speech.prompt(timestamps=timestamps, language=language)
        tokens = self._tokens[index]
        end = [self.model.config.eos_token_id]
        if not timestamps or not tokens or self.train.clips[index].seconds > _STAMPED_S:
            return [*self.speech.prompt(timestamps=False, language=language), *tokens, *end]
        if index not in self._bounds:
            self._bounds[index] = speech_bounds(self.train.clips[index].samples())
        bounds = self._bounds[index] or (0.0, self.train.clips[index].seconds)
        first, last = (
            self.speech.timestamp_begin + round(min(b / speed, self.speech.max_context_s) / 0.02)
            for b in bounds
        )
        return [*prompt, first, *tokens, last, *end]

    def _batches(
        self,
        examples: list[_Example],
        rngs: list[np.random.Generator],
        context_s: float,
        *,
        is_rehearsed: bool,
    ) -> list[SpeechBatch]:
        size = max(1, int(self.config.train.batch_seconds / context_s + 1e-6))
        batches = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            features = self.speech.features([samples for samples, _ in part], context_s)
            for row, (samples, _), rng in zip(
                features, part, rngs[start : start + size], strict=True
            ):
                self._augmenter.features(row, len(samples) / 16_000, rng)
            batch = self._batch(features, [tokens for _, tokens in part])
            if is_rehearsed:
                waves = [samples for samples, _ in part]
                batch.whole = self.speech.features(waves, self.speech.max_context_s)
            batches.append(batch)
        return batches

    def _batch(self, features: torch.Tensor, rows: list[list[int]]) -> SpeechBatch:
        length = max(len(tokens) for tokens in rows) - 1
        inputs = torch.full((len(rows), length), int(self.model.config.pad_token_id))
        targets = torch.full((len(rows), length), _IGNORED)
        for row_index, tokens in enumerate(rows):
            row = torch.tensor(tokens)
            inputs[row_index, : len(tokens) - 1] = row[:-1]
            targets[row_index, : len(tokens) - 1] = row[1:]
            prompt = self._prompt_length(tokens)
            targets[row_index, : prompt - 1] = _IGNORED
        return SpeechBatch(features, inputs, targets)

    def _prompt_length(self, tokens: list[int]) -> int:
        # As long in every language; its last token says that there are no timestamps.
        bare = self.speech.prompt(timestamps=False)
        return len(bare) if tokens[len(bare) - 1] == bare[-1] else len(bare) - 1

    def weight(self, micro: SpeechBatch) -> float:
        return float((micro.targets != _IGNORED).sum())

    def split(self, micro: SpeechBatch) -> list[SpeechBatch]:
        half = len(micro.features) // 2
        if not half:
            return [micro]
        return [
            SpeechBatch(
                micro.features[part],
                micro.inputs[part],
                micro.targets[part],
                None if micro.whole is None else micro.whole[part],
            )
            for part in (slice(None, half), slice(half, None))
        ]

    def outputs(self, micro: SpeechBatch, device: torch.device) -> Outputs:
        """Logits [clip, token, class]."""
        hidden = self._encode(micro.features.to(device))
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=micro.inputs.to(device),
            use_cache=False,
        ).logits
        return Outputs(logits, micro.targets.to(device) != _IGNORED)

    def target_loss(self, outputs: Outputs, micro: SpeechBatch) -> torch.Tensor:
        """Cross-entropy of the target tokens, summed; of rehearsed clips the Kullback-Leibler
        divergence from the teacher.
        """
        if micro.whole is not None:
            own = outputs.logits[outputs.counted].float().log_softmax(-1)
            theirs = self._taught(micro, outputs.logits.device)[outputs.counted]
            theirs = theirs.float().log_softmax(-1)
            return functional.kl_div(own, theirs, reduction="sum", log_target=True)
        return functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            micro.targets.to(outputs.logits.device).flatten(),
            ignore_index=_IGNORED,
            reduction="sum",
            label_smoothing=self.config.transfer.label_smoothing,
        )

    @torch.no_grad()
    def _taught(self, micro: SpeechBatch, device: torch.device) -> torch.Tensor:
        """The teacher's logits [clip, token, class]."""
        assert micro.whole is not None
        logits: torch.Tensor = self._teacher.to(device)(
            input_features=micro.whole.to(device),
            decoder_input_ids=micro.inputs.to(device),
            use_cache=False,
        ).logits
        return logits

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        encoder, frozen = self._encoder, self.frozen
        if frozen is None:
            return encoder.hidden_states([encoder.depth], {"features": features})[encoder.depth]
        hidden = features
        if self._store is None:
            with torch.no_grad():
                hidden = encoder.hidden_states([frozen], {"features": features})[frozen]
        above = encoder.hidden_states([encoder.depth], {"hidden": hidden}, start=frozen)
        return above[encoder.depth]

    # --- evaluation -------------------------------------------------------------------------

    def validate(self, indices: Sequence[int], device: torch.device) -> list[ClipScore]:
        """Scores at each clip's own length, at least in the short context that is for use."""
        clips = [self.validation.clips[index] for index in indices]
        return self._score(clips, device, self._taught_s)

    @cached_property
    def _windows(self) -> list[list[Clip]]:
        first = self.validation.clips[:SAFE_CLIPS]
        return [own for own in joined_clips(first) if len(own) > 1]

    @property
    def path_size(self) -> int:
        """Number of validation clips, and of windows that hold the first of them."""
        return self.validation_size + len(self._windows)

    def validate_path(self, indices: Sequence[int], device: torch.device) -> list[ClipScore]:
        """Scores of clips, and of windows behind them: that a model takes in several clips at a
        time is lost further from the source than single clips show.
        """
        size = self.validation_size
        found = self.validate([index for index in indices if index < size], device)
        windows = [self._windows[index - size] for index in indices if index >= size]
        return found + self._score_windows(windows, device, self._taught_s)

    def _score(
        self,
        clips: Sequence[Clip],
        device: torch.device,
        shortest_context_s: float,
        waves: Sequence[np.ndarray] | None = None,
    ) -> list[ClipScore]:
        """Scores of clips, decoded from `waves` or else from their own samples."""
        hypotheses = decode_waves(
            self.speech,
            [clip.samples() for clip in clips] if waves is None else waves,
            clips,
            device,
            self.config.evaluation.batch_seconds,
            shortest_context_s=shortest_context_s,
        )
        scoring = ClipScoring(clips, self.speech.language, self.config)
        return [scoring.score(clip, h.text) for clip, h in zip(clips, hypotheses, strict=True)]

    # --- what a run reports -----------------------------------------------------------------

    def score(self, examples: ClipSet, device: torch.device) -> dict[str, Any]:
        """Scores of clips at the shortest safe context."""
        return self._evaluated(self.speech, examples, device).as_dict()

    def score_source(self, examples: ClipSet, device: torch.device) -> dict[str, Any]:
        """The same with the adapter for short contexts that this package has for the source, as
        `evaluate` and `monitor` use it; training begins without.
        """
        return self._evaluated(self._as_used, examples, device).as_dict()

    @cached_property
    def _as_used(self) -> SpeechModel:
        if self._source.short is None:
            return self.speech
        language = self.config.data.language or self.speech.language
        found = load_speech_model(self._source, language=language)
        return replace(self.speech, short=found.short)

    def finish(self, device: torch.device) -> None:
        """Measure the shortest safe context, and whether the model takes in windows: on the target,
        and on what is not, so that other speech keeps the contexts that it needs.
        """
        sets = [self.validation, *self.splits.source_domain.values()]
        first = [clips.clips[:SAFE_CLIPS] for clips in sets]
        if not self.splits.source_domain:
            rehearsed = self.train.clips[self._targets :]
            first += [rehearsed[:: -(-len(rehearsed) // SAFE_CLIPS)]] if rehearsed else []
        alone = self.measure_shortest_context(device, first)
        self.measure_window(device, first, alone)

    def describe(self) -> dict[str, Any]:
        """Languages and contexts."""
        speech, own = self.speech, self.speech.language or "en"
        spoken = sorted({clip.language or own for clip in self.target.clips})
        return {
            "language": own,
            **({"languages": spoken} if len(spoken) > 1 else {}),
            "shortest_context_s": speech.shortest_context_s,
            "window_s": speech.window_s,
            "max_context_s": speech.max_context_s,
        }

    @property
    def is_plain(self) -> bool:
        """Whether it is saved whole."""
        return self.form == "full"

    def source_path(self) -> SourcePath | None:
        """The line back to the source, where every adapter is a plain LoRA."""
        return SourcePath(self.layout.source_parameters()) if can_interpolate(self.stages) else None

    def measure_shortest_context(
        self, device: torch.device, sets: Sequence[Sequence[Clip]]
    ) -> list[list[ClipScore]]:
        """Set the shortest context at which the model keeps its accuracy, by measuring it on
        validation clips and on those of every source-domain set; see `shortest_safe_context_s`.
        Gives the clips' scores at that context.
        """
        scores: dict[float, list[list[ClipScore]]] = {}

        def rates(context: float) -> list[float]:
            self.speech.shortest_context_s = context  # so that clips beyond it have longer ones
            scores[context] = [self._score(clips, device, context) for clips in sets]
            return [self.rate(found) for found in scores[context]]

        full_s = self.speech.max_context_s
        safe_s = shortest_safe_context_s(full_s, self._taught_s, rates)
        self.speech.shortest_context_s = safe_s
        return scores[safe_s]

    def measure_window(
        self,
        device: torch.device,
        sets: Sequence[Sequence[Clip]],
        alone: Sequence[Sequence[ClipScore]],
    ) -> None:
        """Set how much speech the model takes in at a time, by measuring it.

        Clips of a set, with their scores `alone`, are joined to windows. If the text of the windows
        scores within 0.01 of that of the single clips, recordings are transcribed in windows, else
        segment by segment (0). The first of the sets decides that has clips to join, which is the
        target where it can: joined clips of other sets may be harder for the source as well, and
        real talk, which is not cut into clips, needs windows most.
        """
        self.speech.window_s = 0.0
        for clips, scores in zip(sets, alone, strict=True):
            single = iter(scores)
            windows = [(own, [next(single) for _ in own]) for own in joined_clips(clips)]
            windows = [(own, known) for own, known in windows if len(own) > 1]
            if not windows:
                continue
            together = self._score_windows(
                [own for own, _ in windows], device, self.speech.shortest_context_s
            )
            before = [score for _, known in windows for score in known]
            if self.rate(together) <= self.rate(before) + _SAFE_LOSS:
                self.speech.window_s = WINDOW_S
            return

    def _score_windows(
        self, windows: Sequence[Sequence[Clip]], device: torch.device, shortest_context_s: float
    ) -> list[ClipScore]:
        """Scores of clips that are decoded joined, one for each window."""
        pause = np.zeros(round(_JOINED_PAUSE_S * SAMPLE_RATE), np.float32)
        whole = [replace(own[0], text=" ".join(clip.text for clip in own)) for own in windows]
        waves = [
            np.concatenate([part for clip in own for part in (clip.samples(), pause)])
            for own in windows
        ]
        return self._score(whole, device, shortest_context_s, waves)


def joined_clips(clips: Sequence[Clip]) -> list[list[Clip]]:
    """Clips in their order, as many together as a window holds, of one group and language each."""
    windows: list[list[Clip]] = []
    seconds = 0.0
    for clip in clips:
        seconds += clip.seconds + _JOINED_PAUSE_S
        last = windows[-1][-1] if windows else clip
        is_same = (last.group, last.language) == (clip.group, clip.language)
        if not windows or not is_same or seconds > WINDOW_S:
            windows.append([])
            seconds = clip.seconds + _JOINED_PAUSE_S
        windows[-1].append(clip)
    return windows


def decoder_room(speech: SpeechModel) -> int:
    """Tokens of text that a Whisper's decoder takes, beside prompt, timestamps and end token."""
    room: int = speech.model.config.max_target_positions - 8
    return room


def fitting_clips(speech: SpeechModel, clips: ClipSet) -> ClipSet:
    """The clips whose transcripts a Whisper's decoder can take."""
    room = decoder_room(speech)
    lengths = [len(speech.spell(clip.text, clip.language)) for clip in clips.clips]
    pairs = list(zip(clips.clips, lengths, strict=True))
    long = [(clip, f"{length} tokens") for clip, length in pairs if length > room]
    skipped = skip_long(clips.name, long, f"the model takes {room} tokens")
    kept = [clip for clip, length in pairs if length <= room]
    return replace(clips, clips=kept, skipped=[*clips.skipped, *skipped])


def shortest_safe_context_s(
    full_s: float, shortest_s: float, rates: Callable[[float], Sequence[float]]
) -> float:
    """The shortest context at which a model keeps its accuracy.

    Tried from short to long are `shortest_s`, 10 s and 20 s. A context is safe if `rates` (of sets
    of clips, lower is better, at a context) are within 0.01 of those in the full window.
    """
    reference = rates(full_s)
    for candidate in sorted({shortest_s, *_SAFE_CONTEXTS_S}):
        if shortest_s <= candidate < full_s:
            found = rates(candidate)
            if all(rate <= full + _SAFE_LOSS for rate, full in zip(found, reference, strict=True)):
                return candidate
    return full_s
