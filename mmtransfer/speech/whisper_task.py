"""Speech recognition with Whisper: clips and transcripts as training batches, WER as the score.

The backbone of a transfer is the encoder. With all of it frozen the decoder is what is tuned, from
cached encoder output.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from mmtransfer.cache import atomic_path, cache_path
from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.augmentation import Augmenter
from mmtransfer.speech.clips import Clip, ClipSet
from mmtransfer.speech.contexts import WINDOW_S
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.guards import rejection
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.scores import (
    ClipScore,
    SpeechScore,
    default_normalizer,
    get_normalizer,
    score_clip,
    speech_metric,
    summarize_speech,
)
from mmtransfer.speech.voice_activity import speech_bounds
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.transfer.encoders import FRAMES_PER_SECOND, SpeechEncoder
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.regularisers import Outputs
from mmtransfer.transfer.stages import Stage, frozen_modules, resolve_stages
from mmtransfer.transfer.task import StagedTask, comparable, name_some, whisper_layout

logger = logging.getLogger(__name__)
_IGNORED = -100  # target positions without loss
_SAFE_CONTEXTS_S = (20.0, 10.0)  # tried between the full window and the clips' own length
_JOINED_PAUSE_S = 0.3
_SAFE_LOSS = 0.01  # of the metric
_SAFE_CLIPS = 64  # clips of a set that decide which contexts are safe
_STAMPED_S = 12.0  # longer clips hold several sentences, which Whisper stamps one by one

_Example = tuple[np.ndarray, list[int]]
"""Samples of a clip and its target."""


class ClipScoring:
    """How a set of clips is scored: each by the rules of its language."""

    def __init__(self, clips: Sequence[Clip], language: str | None, config: Config):
        self._own, self._config = language, config
        self._normalizers: dict[str, Any] = {}
        spoken = {clip.language or language for clip in clips}
        metrics = {speech_metric(code) for code in spoken}
        self.metric = "cer" if metrics == {"cer"} else "wer"
        """The metric that counts for the set."""
        self._name = ", ".join(sorted({self._normalizer_name(code) for code in spoken}))

    def _normalizer_name(self, language: str | None) -> str:
        return self._config.evaluation.normalizer or default_normalizer(language)

    def score(self, clip: Clip, text: str) -> ClipScore:
        """Errors of what was recognised in a clip."""
        name = self._normalizer_name(clip.language or self._own)
        if name not in self._normalizers:
            self._normalizers[name] = get_normalizer(name)
        return score_clip(clip.text, text, self._normalizers[name])

    def summary(self, records: Sequence[ClipScore]) -> SpeechScore:
        """Scores of the whole set."""
        return summarize_speech(
            records,
            normalizer=self._name,
            metric=self.metric,
            bootstrap_samples=self._config.evaluation.bootstrap_samples,
            seed=self._config.runtime.seed,
        )

    def by_language(
        self, clips: Sequence[Clip], records: Sequence[ClipScore]
    ) -> dict[str, dict[str, Any]]:
        """Where there are several languages, the rate of each by its own metric."""
        parts: dict[str | None, list[int]] = clips_by_language(clips, self._own)
        if len(parts) < 2:
            return {}
        found = {}
        for language, rows in parts.items():
            metric = speech_metric(language)
            score = summarize_speech(
                [records[row] for row in rows],
                normalizer=self._normalizer_name(language),
                metric=metric,
                bootstrap_samples=100,
            )
            rate = getattr(score, metric)
            found[language or "unknown"] = {"clips": len(rows), "metric": metric, metric: rate}
        return found


def clips_by_language(clips: Sequence[Clip], language: str | None) -> dict[str | None, list[int]]:
    """Indices of clips by language; `language` is that of clips that do not say theirs."""
    rows: dict[str | None, list[int]] = defaultdict(list)
    for row, clip in enumerate(clips):
        rows[clip.language or language].append(row)
    return dict(rows)


def decode_waves(
    speech: SpeechModel | CtcModel,
    waves: Sequence[np.ndarray],
    clips: Sequence[Clip],
    device: torch.device,
    batch_seconds: float,
    *,
    shortest_context_s: float | None = None,
    progress: str | None = None,
) -> list[Hypothesis]:
    """What a model recognises in samples, each in the language of its clip."""
    found: dict[int, Hypothesis] = {}
    for language, rows in clips_by_language(clips, speech.language).items():
        spoken = speech
        # A model of one language has no prompt for it, and one of characters none at all.
        if isinstance(speech, SpeechModel) and speech.language is not None:
            spoken = replace(speech, language=language)
        recognizer = Recognizer(
            spoken,
            device=device,
            batch_seconds=batch_seconds,
            shortest_context_s=shortest_context_s,
        )
        heard = recognizer.transcribe([waves[row] for row in rows], progress=progress)
        found |= zip(rows, heard, strict=True)
    return [found[row] for row in range(len(clips))]


def decode_clips(
    speech: SpeechModel | CtcModel,
    clips: Sequence[Clip],
    device: torch.device,
    batch_seconds: float,
    **options: Any,
) -> list[Hypothesis]:
    """What a model recognises in clips, each in its language; options as for `decode_waves`."""
    waves = [clip.samples() for clip in clips]
    return decode_waves(speech, waves, clips, device, batch_seconds, **options)


def skip_long(name: str, found: Sequence[tuple[Clip, str]], limit: str) -> list[str]:
    """Say which clips are left out since their transcripts are too long, all of them at once; gives
    a line for each.
    """
    lines = [
        f"{clip.where or clip.name}: {clip.name}: the transcript has {length}, {limit}"
        for clip, length in found
    ]
    if found:
        names = [f"{clip.name} ({length})" for clip, length in found]
        logger.warning(
            "skipped: %d of the clips of '%s' have transcripts that are too long (%s): %s. Cut "
            "the clips, or mend the transcripts.",
            len(found),
            name,
            limit,
            name_some(names),
        )
    return lines


@dataclass
class SpeechBatch:
    """Clips of one context with their target tokens."""

    features: torch.Tensor
    """Log-mel [clip, mel, frame], or cached hidden states [clip, frame, width]."""
    inputs: torch.Tensor
    """Decoder input ids [clip, token]."""
    targets: torch.Tensor
    """Next ids [clip, token]; -100 where there is no loss (prompt, padding)."""


class SpeechTask(StagedTask):
    """Fine-tunes a Whisper on clips with transcripts; see `tasks.base.Task` for the methods."""

    higher_is_better = False
    tie_metric = "cer"
    unit = "x"

    def __init__(
        self,
        speech: SpeechModel,
        train: ClipSet,
        validation: ClipSet,
        config: Config,
        stages: Sequence[Stage] | None = None,
        rehearsal: ClipSet | None = None,
    ):
        stages = stages or resolve_stages(config)
        model = speech.model_for(0.0)
        super().__init__(speech, model, whisper_layout(model), model, stages, config)
        self.speech = speech
        self._encoder = SpeechEncoder(model.get_encoder())
        self._config = config
        # The target's clips without those that are too long; rehearsal clips are numbered behind.
        self.target, self._tokens = self._fitting(train)
        if not self.target.clips:
            raise UserError(f"'{train.name}': every transcript is too long for the model.")
        self._targets = len(self.target)
        clips = self.target.clips
        if rehearsal is not None:
            extra, tokens = self._fitting(rehearsal)
            clips, self._tokens = clips + extra.clips, self._tokens + tokens
        self.train, self.validation = ClipSet("train", clips), validation
        self.metric = ClipScoring(validation.clips, speech.language, config).metric
        self._augmenter = Augmenter(config.augment, speech.max_context_s)
        self._bounds: dict[int, tuple[float, float] | None] = {}
        generation = self.model.generation_config
        end = self.model.config.eos_token_id
        if not all(clip.text for clip in clips) and generation.begin_suppress_tokens:
            # Silence is learnt as an empty text, so the end token must be allowed to come first.
            generation.begin_suppress_tokens = [
                token for token in generation.begin_suppress_tokens if token != end
            ]
        if config.train.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.lengths = [speech.context_s(clip.seconds, shortest=0) for clip in clips]
        self._store: FeatureStore | None = None
        self._items: dict[tuple[int, int, bool], int] = {}

    def _fitting(self, clips: ClipSet) -> tuple[ClipSet, list[list[int]]]:
        """The clips whose transcripts the decoder can take, and their tokens."""
        room = self.model.config.max_target_positions - 8  # prompt, timestamps and end token
        tokens = [self._spell(clip) for clip in clips.clips]
        pairs = list(zip(clips.clips, tokens, strict=True))
        long = [(clip, f"{len(own)} tokens") for clip, own in pairs if len(own) > room]
        skipped = skip_long(clips.name, long, f"the model takes {room} tokens")
        kept = [(clip, own) for clip, own in pairs if len(own) <= room]
        fitting = replace(
            clips, clips=[clip for clip, _ in kept], skipped=[*clips.skipped, *skipped]
        )
        return fitting, [own for _, own in kept]

    def _spell(self, clip: Clip) -> list[int]:
        """Tokens of a transcript. Whisper's own training text starts with a space in languages that
        use them.
        """
        if not clip.text:
            return []
        spaced = speech_metric(clip.language or self.speech.language) == "wer"
        tokenizer = self.speech.processor.tokenizer
        text = f" {clip.text}" if spaced else clip.text
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    # --- training ---------------------------------------------------------------------------

    @property
    def batch_budget(self) -> float:
        """Audio seconds per forward pass."""
        return self._config.train.batch_seconds

    def epoch(self, epoch: int) -> Sequence[int]:
        """The target's clips."""
        return range(self._targets)

    def plan(self, budget: float, *, seed: Sequence[int], epoch: int) -> list[list[int]]:
        """Batches of the target's clips and the rehearsal's."""
        return self.plan_with(self._targets, budget, seed=seed, epoch=epoch)

    def _close_stores(self) -> None:
        self._store = None

    def _open_stores(self, frozen: int, device: torch.device) -> None:
        """Encode every training clip with the frozen layers, at its own length; those that serve
        as padded examples also at the full window.
        """
        views = check_views(self._augmenter, self._config)
        full = self.speech.max_context_s
        items: list[tuple[int, int, bool]] = []
        contexts: list[float] = []
        for index in range(len(self.train)):
            for view in range(views):
                items.append((index, view, False))
                contexts.append(self._longest_context_s(index))
                if self._pads(index):
                    items.append((index, view, True))
                    contexts.append(full)
        encoder = self._encoder
        values = [round(c * FRAMES_PER_SECOND) * encoder.width for c in contexts]
        digests = [self.train.clips[index].identity for index, _, _ in items]
        augmented = self._augmenter.is_active
        key = cache_key(
            weights=weights_digest(frozen_modules(self.layout, frozen), encoder.model.config),
            layers=[frozen],
            features=self.speech.processor.feature_extractor.to_dict(),
            augment=self._config.augment.model_dump(mode="json") if augmented else None,
            seed=self._config.runtime.seed if augmented else None,
            items=[[d, v, c] for d, (_, v, _), c in zip(digests, items, contexts, strict=True)],
            dtype=self._config.transfer.cache_dtype,
        )

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            budget = self._config.evaluation.batch_seconds
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
            "the training clips", key, values, compute, dtype=self._config.transfer.cache_dtype
        )

    def _view(self, index: int, view: int, context_s: float) -> torch.Tensor:
        """Log-mel [1, mel, frame] of an augmented version of a clip."""
        rng = self._view_rng(index, view)
        samples, _ = self._augmenter.waveform(self.train.clips[index].samples(), rng)
        features = self.speech.features([samples], context_s)
        self._augmenter.features(features[0], len(samples) / SAMPLE_RATE, rng)
        return features

    def _view_rng(self, index: int, view: int) -> np.random.Generator:
        return np.random.default_rng([self._config.runtime.seed, 2, view, index])

    def _pads(self, index: int) -> bool:
        """Whether a clip serves as a padded example when activations are cached."""
        rng = np.random.default_rng([self._config.runtime.seed, 3, index])
        return bool(rng.random() < self._config.train.full_context)

    def _longest_context_s(self, index: int) -> float:
        seconds = self.train.clips[index].seconds / self._augmenter.slowest
        return self.speech.context_s(seconds, shortest=0)

    def _prepare_stored(self, indices: Sequence[int], epoch: int) -> list[SpeechBatch]:
        """Micro-batches of cached activations, one context each."""
        config, store = self._config.train, self._store
        views = max(1, self._config.transfer.cached_views)
        groups: dict[int, list[tuple[np.ndarray, list[int]]]] = defaultdict(list)
        for index in indices:
            rng = np.random.default_rng([self._config.runtime.seed, epoch, index])
            is_padded = self._pads(index) and rng.random() < 0.5
            stamped = rng.random() < config.timestamps
            view = epoch % views
            seconds = self.train.clips[index].seconds
            speed = self._augmenter.draw_speed(self._view_rng(index, view), seconds)
            hidden = store[self._items[index, view, is_padded]][0]  # type: ignore[index]
            target = self._target(index, speed, timestamps=stamped)
            groups[len(hidden)].append((hidden, target))
        batches = []
        for frames, examples in sorted(groups.items()):
            size = max(1, int(config.batch_seconds * FRAMES_PER_SECOND / frames + 1e-6))
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                stacked = torch.from_numpy(np.stack([hidden for hidden, _ in part])).float()
                batches.append(self._batch(stacked, [tokens for _, tokens in part]))
        return batches

    @property
    def fingerprint(self) -> str:
        parts = [
            f"{clip.identity} {clip.text}" + (f" {clip.language}" if clip.language else "")
            for clip in self.train.clips
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[SpeechBatch]:
        """Micro-batches: clips at the batch's common short context, and a few at the full one."""
        if self._store is not None:
            return self._prepare_stored(batch[share], epoch)
        config, full = self._config.train, self.speech.max_context_s
        # From the whole batch, so that contexts do not depend on who shares the work; one for the
        # target's clips and one for the rehearsal's, which may be much longer.
        shortest: dict[bool, float] = defaultdict(float)
        for index in batch:
            kind = index < self._targets
            shortest[kind] = max(shortest[kind], self._longest_context_s(index))
        groups: dict[float, tuple[list[_Example], list[np.random.Generator]]]
        groups = defaultdict(lambda: ([], []))
        for index in batch[share]:
            rng = np.random.default_rng([self._config.runtime.seed, epoch, index])
            is_padded = rng.random() < config.full_context
            stamped = rng.random() < config.timestamps
            samples, speed = self._augmenter.waveform(self.train.clips[index].samples(), rng)
            examples, rngs = groups[full if is_padded else shortest[index < self._targets]]
            examples.append((samples, self._target(index, speed, timestamps=stamped)))
            rngs.append(rng)
        return [
            batch
            for context, (examples, rngs) in sorted(groups.items(), key=lambda group: group[0])
            for batch in self._batches(examples, rngs, context)
        ]

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
    ) -> list[SpeechBatch]:
        size = max(1, int(self._config.train.batch_seconds / context_s + 1e-6))
        batches = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            features = self.speech.features([samples for samples, _ in part], context_s)
            for row, (samples, _), rng in zip(
                features, part, rngs[start : start + size], strict=True
            ):
                self._augmenter.features(row, len(samples) / 16_000, rng)
            batches.append(self._batch(features, [tokens for _, tokens in part]))
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
            SpeechBatch(micro.features[part], micro.inputs[part], micro.targets[part])
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
        """Cross-entropy of the target tokens, summed."""
        return functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            micro.targets.to(outputs.logits.device).flatten(),
            ignore_index=_IGNORED,
            reduction="sum",
            label_smoothing=self._config.transfer.label_smoothing,
        )

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

    def describe(self, indices: Sequence[int]) -> str:
        names = [self.train.clips[index].name for index in indices]
        return name_some(names)

    # --- evaluation -------------------------------------------------------------------------

    @property
    def validation_size(self) -> int:
        return len(self.validation.clips)

    def validate(self, indices: Sequence[int], device: torch.device) -> list[ClipScore]:
        """Scores at each clip's own length, which training makes readable."""
        return self._score([self.validation.clips[index] for index in indices], device, 0.0)

    def _score(
        self, clips: Sequence[Clip], device: torch.device, shortest_context_s: float
    ) -> list[ClipScore]:
        hypotheses = decode_clips(
            self.speech,
            clips,
            device,
            self._config.evaluation.batch_seconds,
            shortest_context_s=shortest_context_s,
        )
        scoring = ClipScoring(clips, self.speech.language, self._config)
        return [scoring.score(clip, h.text) for clip, h in zip(clips, hypotheses, strict=True)]

    def _reference(self, clips: Sequence[Clip], device: torch.device) -> list[ClipScore]:
        """Scores in the full window."""
        return self._score(clips, device, self.speech.max_context_s)

    def summarize(self, records: Sequence[ClipScore]) -> dict[str, float | None]:
        score = self._summary(records)
        return {"wer": score.wer, "cer": score.cer, "hallucinated_words": score.hallucinated_words}

    def _summary(self, records: Sequence[ClipScore]) -> SpeechScore:
        scoring = ClipScoring(self.validation.clips, self.speech.language, self._config)
        return scoring.summary(records)

    def measure_shortest_context(self, device: torch.device, sources: Sequence[ClipSet]) -> float:
        """Set the shortest context at which the model keeps its accuracy, by measuring it.

        Tried from long to short are 20 s, 10 s and the shortest length trained on. A context is
        safe while validation clips, and those of every source-domain set, score within 0.01 of
        the full window.
        """
        sets = [clips.clips[:_SAFE_CLIPS] for clips in (self.validation, *sources)]

        def rates(scores: Iterable[list[ClipScore]]) -> list[float]:
            return [comparable(self.summarize(found), self.metric) for found in scores]

        shortest = self.speech.max_context_s
        reference = rates(self._reference(clips, device) for clips in sets)
        for candidate in (*_SAFE_CONTEXTS_S, min(self.lengths)):
            if candidate >= shortest:
                continue
            found = rates(self._score(clips, device, candidate) for clips in sets)
            if any(rate > full + _SAFE_LOSS for rate, full in zip(found, reference, strict=True)):
                break
            shortest = candidate
        self.speech.shortest_context_s = shortest
        return shortest

    def measure_window(self, device: torch.device, sources: Sequence[ClipSet]) -> float:
        """Set how much speech the model takes in at a time, by measuring it.

        Validation clips, and those of every source-domain set, are joined to windows. If the text
        of the windows scores within 0.01 of that of the single clips, recordings are transcribed in
        windows, else segment by segment (0).
        """
        is_safe, is_known = True, False
        for clips in (self.validation, *sources):
            windows = [own for own in joined_clips(clips.clips[:_SAFE_CLIPS]) if len(own) > 1]
            if not windows:
                continue
            is_known = True
            pause = np.zeros(round(_JOINED_PAUSE_S * SAMPLE_RATE), np.float32)
            waves = [
                np.concatenate([part for clip in own for part in (clip.samples(), pause)])
                for own in windows
            ]
            heard = decode_waves(
                self.speech,
                waves,
                [own[0] for own in windows],
                device,
                self._config.evaluation.batch_seconds,
                shortest_context_s=self.speech.shortest_context_s,
            )
            scoring = ClipScoring(clips.clips, self.speech.language, self._config)
            together = [
                scoring.score(replace(own[0], text=" ".join(clip.text for clip in own)), found.text)
                for own, found in zip(windows, heard, strict=True)
            ]
            single = [clip for own in windows for clip in own]
            alone = self._score(single, device, self.speech.shortest_context_s)
            rates = [
                comparable(self.summarize(scores), self.metric) for scores in (together, alone)
            ]
            is_safe = is_safe and rates[0] <= rates[1] + _SAFE_LOSS
        self.speech.window_s = WINDOW_S if is_safe and is_known else 0.0
        return self.speech.window_s


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


def transcribe(
    source: SpeechModel | CtcModel, clips: ClipSet, config: Config, device: torch.device
) -> ClipSet:
    """Clips with what the source transcribes as their text: learnt again, it keeps the source as it
    is (Li & Hoiem 2016: learning without forgetting). Kept in the cache folder.

    Raises:
        UserError: the source transcribes none of them without doubt.
    """
    spoken = [clip.language for clip in clips.clips]
    key = cache_key(
        kind="transcripts",
        weights=weights_digest([source.model], source.model.config),
        language=source.language,
        items=[clip.identity for clip in clips.clips],
        **({"languages": spoken} if any(spoken) else {}),
    )
    path = cache_path("transcripts", f"{key}.json")
    if not path.exists():
        found = decode_clips(
            source,
            clips.clips,
            device,
            config.evaluation.batch_seconds,
            progress=f"transcribing {clips.name} clips",
        )
        texts = [
            "" if rejection(hypothesis, clip.seconds) else hypothesis.text
            for clip, hypothesis in zip(clips.clips, found, strict=True)
        ]
        with atomic_path(path) as part:
            part.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    texts = json.loads(path.read_text(encoding="utf-8"))
    usable = [replace(c, text=text) for c, text in zip(clips.clips, texts, strict=True) if text]
    if not usable:
        raise UserError(
            f"{clips.name}: the source transcribes none of the {len(clips)} clips without doubt. "
            "Name speech in its language, or give the clips transcripts."
        )
    doubtful = len(clips) - len(usable)
    if doubtful:
        logger.info("%s: %d clips that the source doubts are left out", clips.name, doubtful)
    return replace(clips, clips=usable)


def check_views(augmenter: Augmenter, config: Config) -> int:
    """Augmented versions of each clip to cache; 1 without augmentation.

    Raises:
        UserError: augmentation over a cached prefix without a number of views.
    """
    views = config.transfer.cached_views
    if augmenter.is_active and not views:
        raise UserError(
            "augment: clips that are changed anew in every epoch cannot pass the frozen layers "
            "just once. Set transfer.cached_views: 4 (so many versions of each clip are cached), "
            "transfer.cache: none, or no augmentation."
        )
    return views if augmenter.is_active else 1


def evaluate_clips(
    speech: SpeechModel | CtcModel, clips: ClipSet, config: Config, device: torch.device
) -> SpeechScore:
    """Score a model on clips as it is used: at its shortest safe context."""
    hypotheses = decode_clips(
        speech,
        clips.clips,
        device,
        config.evaluation.batch_seconds,
        progress=f"evaluating {clips.name}",
    )
    scoring = ClipScoring(clips.clips, speech.language, config)
    records = [
        scoring.score(clip, found.text) for clip, found in zip(clips.clips, hypotheses, strict=True)
    ]
    languages = scoring.by_language(clips.clips, records)
    return replace(scoring.summary(records), languages=languages)
