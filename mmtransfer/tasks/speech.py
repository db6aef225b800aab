"""Speech recognition with Whisper: clips and transcripts as training batches, WER as the score."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from mmtransfer.augmentation import Augmenter
from mmtransfer.backbones import SpeechModel, encode_whisper
from mmtransfer.config import Config
from mmtransfer.data import ClipSet
from mmtransfer.errors import UserError
from mmtransfer.evaluation import (
    ClipScore,
    SpeechScore,
    default_normalizer,
    get_normalizer,
    score_clip,
    speech_metric,
    summarize_speech,
)
from mmtransfer.recognition import Recognizer
from mmtransfer.voice_activity import speech_bounds

_IGNORED = -100  # target positions without loss
_SAFE_CONTEXTS_S = (20.0, 10.0)  # tried between the full window and the clips' own length
_SAFE_LOSS = 0.01  # of the metric
_SAFE_CLIPS = 64  # validation clips that decide which contexts are safe


@dataclass
class SpeechBatch:
    """Clips of one context with their target tokens."""

    features: torch.Tensor
    """Log-mel [clip, mel, frame]."""
    inputs: torch.Tensor
    """Decoder input ids [clip, token]."""
    targets: torch.Tensor
    """Next ids [clip, token]; -100 where there is no loss (prompt, padding)."""


class SpeechTask:
    """Fine-tunes a Whisper on clips with transcripts; see `tasks.base.Task` for the methods."""

    def __init__(self, speech: SpeechModel, train: ClipSet, validation: ClipSet, config: Config):
        self.speech = speech
        self.model = speech.model
        self.train, self.validation = train, validation
        self.metric = speech_metric(speech.language)
        self._config = config
        self._normalizer_name = config.evaluation.normalizer or default_normalizer(speech.language)
        self._normalize = get_normalizer(self._normalizer_name)
        self._augmenter = Augmenter(config.augment)
        self._bounds: dict[int, tuple[float, float] | None] = {}
        tokenizer = speech.processor.tokenizer
        spaced = self.metric == "wer"
        # Whisper's own training text starts with a space in languages that use them.
        self._tokens = [
            tokenizer(f" {clip.text}" if spaced else clip.text, add_special_tokens=False).input_ids
            if clip.text
            else []
            for clip in train.clips
        ]
        room = self.model.config.max_target_positions - 8  # prompt, timestamps and end token
        for clip, tokens in zip(train.clips, self._tokens, strict=True):
            if len(tokens) > room:
                raise UserError(
                    f"{clip.name}: the transcript has {len(tokens)} tokens, the model takes at "
                    f"most {room}. Cut the clip or mend the transcript."
                )
        generation = self.model.generation_config
        end = self.model.config.eos_token_id
        if not all(clip.text for clip in train.clips) and generation.begin_suppress_tokens:
            # Silence is learnt as an empty text, so the end token must be allowed to come first.
            generation.begin_suppress_tokens = [
                token for token in generation.begin_suppress_tokens if token != end
            ]
        # The encoder's position table is a constant (sinusoids), which loading marks as a weight.
        self.model.get_encoder().embed_positions.requires_grad_(False)
        if config.train.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.lengths = [speech.context_s(clip.seconds, shortest=0) for clip in train.clips]

    # --- training ---------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        parts = [f"{clip.digest} {clip.seconds} {clip.text}" for clip in self.train.clips]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[SpeechBatch]:
        """Micro-batches: clips at the batch's common short context, and a few at the full one."""
        config, full = self._config.train, self.speech.max_context_s
        short: list[tuple[np.ndarray, list[int]]] = []
        padded: list[tuple[np.ndarray, list[int]]] = []
        rngs: list[np.random.Generator] = []
        padded_rngs: list[np.random.Generator] = []
        for index in batch[share]:
            rng = np.random.default_rng([self._config.runtime.seed, epoch, index])
            is_padded = rng.random() < config.full_context
            stamped = rng.random() < config.timestamps
            samples, speed = self._augmenter.waveform(self.train.clips[index].samples(), rng)
            example = (samples, self._target(index, speed, timestamps=stamped))
            (padded if is_padded else short).append(example)
            (padded_rngs if is_padded else rngs).append(rng)
        batches = []
        if short:
            # From the whole batch, so that the context does not depend on who shares the work.
            slowest = min(1.0, *(self._config.augment.speed or (1.0,)))
            longest = max(self.train.clips[index].seconds for index in batch) / slowest
            context = self.speech.context_s(longest, shortest=0)
            batches += self._batches(short, rngs, context)
        if padded:
            batches += self._batches(padded, padded_rngs, full)
        return batches

    def _target(self, index: int, speed: float, *, timestamps: bool) -> list[int]:
        """Prompt, text and end token. Timestamps mark where speech starts and ends in the clip."""
        prompt = self.speech.prompt(timestamps=timestamps)
        tokens = self._tokens[index]
        end = [self.model.config.eos_token_id]
        if not timestamps or not tokens:
            return self.speech.prompt(timestamps=False) + tokens + end
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
        examples: list[tuple[np.ndarray, list[int]]],
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
            length = max(len(tokens) for _, tokens in part) - 1
            inputs = torch.full((len(part), length), int(self.model.config.pad_token_id))
            targets = torch.full((len(part), length), _IGNORED)
            for row_index, (_, tokens) in enumerate(part):
                row = torch.tensor(tokens)
                inputs[row_index, : len(tokens) - 1] = row[:-1]
                targets[row_index, : len(tokens) - 1] = row[1:]
                prompt = self._prompt_length(tokens)
                targets[row_index, : prompt - 1] = _IGNORED
            batches.append(SpeechBatch(features, inputs, targets))
        return batches

    def _prompt_length(self, tokens: list[int]) -> int:
        bare = self.speech.prompt(timestamps=False)
        return len(bare) if tokens[: len(bare)] == bare else len(bare) - 1

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

    def loss(self, micro: SpeechBatch, device: torch.device) -> torch.Tensor:
        """Cross-entropy of the target tokens, summed."""
        hidden = encode_whisper(self.model, micro.features.to(device))
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=micro.inputs.to(device),
            use_cache=False,
        ).logits
        return functional.cross_entropy(
            logits.float().flatten(0, 1),
            micro.targets.to(device).flatten(),
            ignore_index=_IGNORED,
            reduction="sum",
        )

    def describe(self, indices: Sequence[int]) -> str:
        names = [self.train.clips[index].name for index in indices]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    # --- evaluation -------------------------------------------------------------------------

    @property
    def validation_size(self) -> int:
        return len(self.validation.clips)

    def validate(
        self, indices: Sequence[int], device: torch.device, *, shortest_context_s: float = 0.0
    ) -> list[ClipScore]:
        """Scores at each clip's own length, which training makes readable, or a longer context."""
        clips = [self.validation.clips[index] for index in indices]
        recognizer = Recognizer(
            self.speech,
            device=device,
            batch_seconds=self._config.evaluation.batch_seconds,
            shortest_context_s=shortest_context_s,
        )
        hypotheses = recognizer.transcribe([clip.samples() for clip in clips])
        return [
            score_clip(clip.text, hypothesis.text, self._normalize)
            for clip, hypothesis in zip(clips, hypotheses, strict=True)
        ]

    def summarize(self, records: Sequence[ClipScore]) -> dict[str, float]:
        score = self._summary(records)
        return {"wer": score.wer, "cer": score.cer, "hallucinated_words": score.hallucinated_words}

    def _summary(self, records: Sequence[ClipScore]) -> SpeechScore:
        return summarize_speech(
            records,
            normalizer=self._normalizer_name,
            metric=self.metric,
            bootstrap_samples=self._config.evaluation.bootstrap_samples,
            seed=self._config.runtime.seed,
        )

    def measure_shortest_context(self, device: torch.device) -> float:
        """Set the shortest context at which the model keeps its accuracy, by measuring it.

        Tried from long to short are 20 s, 10 s and the shortest length trained on. A context is
        safe while validation clips score within 0.01 of the full window.
        """
        indices = range(min(_SAFE_CLIPS, self.validation_size))
        full = self.speech.max_context_s

        def rate(shortest_s: float) -> float:
            records = self.validate(indices, device, shortest_context_s=shortest_s)
            return self.summarize(records)[self.metric]

        reference = rate(full)
        shortest = full
        for candidate in (*_SAFE_CONTEXTS_S, min(self.lengths)):
            if candidate >= shortest:
                continue
            if rate(candidate) > reference + _SAFE_LOSS:
                break
            shortest = candidate
        self.speech.shortest_context_s = shortest
        return shortest

    def save(self, folder: Path) -> None:
        self.speech.save(folder)


def evaluate_clips(
    speech: SpeechModel, clips: ClipSet, config: Config, device: torch.device
) -> SpeechScore:
    """Score a model on clips as it is used: at its shortest safe context."""
    name = config.evaluation.normalizer or default_normalizer(speech.language)
    normalize = get_normalizer(name)
    recognizer = Recognizer(speech, device=device, batch_seconds=config.evaluation.batch_seconds)
    hypotheses = recognizer.transcribe(
        [clip.samples() for clip in clips.clips], progress=f"evaluating {clips.name}"
    )
    pairs = zip(clips.clips, hypotheses, strict=True)
    return summarize_speech(
        [score_clip(clip.text, found.text, normalize) for clip, found in pairs],
        normalizer=name,
        metric=speech_metric(speech.language),
        bootstrap_samples=config.evaluation.bootstrap_samples,
        seed=config.runtime.seed,
    )
