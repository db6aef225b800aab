"""Whisper learns to decode short contexts by self-distillation; no labels needed.

The teacher is the source model in its full window: its greedy tokens and its most probable tokens
at each place are kept for every clip. The student, an adapter in a copy of it, learns to give the
same from a context that ends where the clip does (Hinton et al. 2015). The teacher gets the clip as
it was recorded, the student gets it augmented and anew in every epoch, so that it learns to
transcribe in noise what the teacher transcribes without (Xie et al. 2020: noisy student). A clip
with a transcript has that as its target, so that errors of the teacher are not learnt. Full
windows are decoded by the source model's own weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.clip_scores import ClipScoring
from mmtransfer.speech.clip_task import ClipTask
from mmtransfer.speech.clips import Clip, ClipSet, read_clips, usual_language
from mmtransfer.speech.contexts import UNADAPTED_CONTEXT_S, longer_context_s
from mmtransfer.speech.engine import DecodingOptions, Hypothesis
from mmtransfer.speech.engines_transformers import TransformersWhisper
from mmtransfer.speech.guards import rejection
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.scores import ClipScore
from mmtransfer.speech.splits import load_clip_splits
from mmtransfer.speech.whisper import (
    ShortReader,
    SpeechModel,
    allow_silence,
    encode_whisper,
    load_speech_model,
    whisper_layout,
)
from mmtransfer.speech.whisper_task import SAFE_CLIPS, fitting_clips, shortest_safe_context_s
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.regularisers import Outputs
from mmtransfer.transfer.splits import training_data
from mmtransfer.transfer.stages import Stage, resolve_stages

_KEPT = 64  # most probable tokens of each place
_CROSS_ENTROPY = 0.5  # weight of the greedy tokens beside the distribution
_LONGER = 0.15  # share of clips read in the longer context that doubtful ones are given
_MARGINS_S = (0.0, 0.5, 1.0)  # context beyond the clip that is tried
_MARGIN_GAIN = 0.002  # of the metric, for which a longer margin is worth its time
_SPOKEN_LOGPROB = -3.0  # of a transcript's tokens; below, it is inaudible, or another clip's
_DELAY_S = 0.3  # of silence, with which the source's agreement with itself is measured
_TOKENS_PER_SECOND = 8  # estimate, for the size of what is stored


@dataclass
class ShortBatch:
    """Clips of one context, and what the source reads in them."""

    features: torch.Tensor
    """Log-mel [clip, mel, frame]."""
    inputs: torch.Tensor
    """Decoder input ids [clip, token]."""
    first: int
    """Position of the first token that is learnt; before it is the prompt."""
    ids: torch.Tensor
    """Most probable tokens of the source [clip, token, kept], the greedy one first; -1 behind the
    end."""
    logprobs: torch.Tensor
    """Their log-probabilities [clip, token, kept]."""


class ShortContextTask(ClipTask):
    """Teaches a Whisper short contexts."""

    usual_rehearsal: ClassVar[float] = 0.0
    bundled_rehearsal: ClassVar[bool] = False

    def __init__(
        self,
        speech: SpeechModel,
        train: ClipSet,
        validation: ClipSet,
        config: Config,
        stages: Sequence[Stage] | None = None,
    ):
        stages = stages or resolve_stages(config)
        if len(stages) != 1 or stages[0].adapter is None or stages[0].frozen != "none":
            raise UserError(
                "transfer.stages: task: short_context takes one stage with frozen: none and an "
                "adapter, e.g. {type: lora, r: 8}: the source model itself decodes full windows."
            )
        own = speech.language or "en"
        self.languages = sorted({clip.language or own for clip in train.clips})
        model = copy.deepcopy(speech.model)
        longest_s = max(clip.seconds for clip in train.clips)
        speech.short = ShortReader(model, UNADAPTED_CONTEXT_S, 0.0, self.languages, longest_s)
        self.speech = speech
        super().__init__(
            speech, model, whisper_layout(model), model, stages, config, train, validation
        )
        clips = self.train.clips
        if not all(clip.text for clip in clips):
            allow_silence(model)
        if config.train.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.lengths = [speech.context_s(clip.seconds, shortest=0) for clip in clips]
        self._teacher_targets: FeatureStore | None = None
        self._unlabelled: set[str] = set()  # clips whose text is that of the teacher
        self._usable = list(range(len(self.train)))

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what cannot be, before anything is loaded."""
        if config.data.rehearsal not in ("auto", "none"):
            raise UserError(
                "data.rehearsal: task: short_context has the source model as teacher and "
                "forgets nothing; remove it, or put those recordings into data.train."
            )
        super().check(config)
        if config.head.type == "ctc":
            raise UserError("head.type: task: short_context needs a Whisper encoder-decoder.")

    @classmethod
    def set_up(cls, config: Config, source: Checkpoint, device: torch.device) -> ShortContextTask:
        """The task with a Whisper and its clips, which need no transcripts."""
        clips = read_clips(training_data(config), config.data, labelled=False)
        language = config.data.language or usual_language(clips)
        speech = load_speech_model(
            source, language=language, short_contexts=False, can_detect=False
        )
        splits = load_clip_splits(
            config,
            speech.max_context_s,
            labelled=False,
            languages=speech.languages,
            train_clips=clips,
        )
        task = cls(speech, splits.train, splits.validation, config)
        splits.train = task.target
        task.splits = splits
        return task

    @classmethod
    def load(cls, checkpoint: Checkpoint, language: str | None) -> SpeechModel:
        """A Whisper."""
        return load_speech_model(checkpoint, language=language)

    def _fitting(self, clips: ClipSet) -> ClipSet:
        return fitting_clips(self.speech, clips)

    # --- what the source reads ----------------------------------------------------------------

    def _engine(self, clip: Clip) -> TransformersWhisper:
        """The decoder for a clip's language."""
        speech = replace(self.speech, language=clip.language or self.speech.language)
        device = next(self.speech.model.parameters()).device
        return TransformersWhisper(speech, device, DecodingOptions(), None)

    def begin(self, stage: Stage, device: torch.device) -> None:
        """Let the teacher decode all clips, or find that in the cache."""
        self.speech.model.to(device).requires_grad_(False)
        texts = [clip.text.strip() for clip in self.train.clips]
        read = self._transcribed_by_teacher(self.train, "the training clips", texts)
        self._teacher_targets = read
        self._usable = [index for index in range(len(self.train)) if not read[index][2, 0, 0] > 0]
        if not self._usable:
            raise UserError(
                "The source model is not confident on any training clip. Check "
                "data.language and the audio, or add transcripts."
            )
        empty = [""] * len(self.validation)
        taught = self._transcribed_by_teacher(self.validation, "the validation clips", empty)
        end = self.model.config.eos_token_id
        clips = []
        for row, clip in enumerate(self.validation.clips):
            tokens = [int(t) for t in taught[row][0, :, 0] if int(t) != end]
            text = self.speech.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            if not clip.text:
                self._unlabelled.add(clip.identity)
            clips.append(clip if clip.text else replace(clip, text=text.strip()))
        self.validation = replace(self.validation, clips=clips)
        super().begin(stage, device)

    def _transcribed_by_teacher(self, clips: ClipSet, name: str, texts: list[str]) -> FeatureStore:
        """[3, token, kept] of each clip: ids, log-probabilities, whether in doubt."""
        estimates = [
            3 * _KEPT * (8 + round(_TOKENS_PER_SECOND * clip.seconds)) for clip in clips.clips
        ]
        key = cache_key(
            kind="short_context",
            kept=_KEPT,
            weights=weights_digest([self.speech.model], self.speech.model.config),
            generation=json.loads(self.speech.model.generation_config.to_json_string()),
            items=[
                [clip.identity, clip.language, text]
                for clip, text in zip(clips.clips, texts, strict=True)
            ],
        )

        def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            full = self.speech.max_context_s
            size = max(1, int(self.config.evaluation.batch_seconds / full))
            by_language: dict[str | None, list[int]] = defaultdict(list)
            for row in rows:
                by_language[clips.clips[row].language].append(row)
            for chosen in by_language.values():
                engine = self._engine(clips.clips[chosen[0]])
                for start in range(0, len(chosen), size):
                    part = chosen[start : start + size]
                    waves = [clips.clips[row].samples() for row in part]
                    said = [texts[row] for row in part]
                    yield from zip(part, self._source_output(engine, waves, said), strict=True)

        return cached_features(name, key, estimates, compute, dtype="float32")

    @torch.inference_mode()
    def _source_output(
        self, engine: TransformersWhisper, waves: list[np.ndarray], texts: list[str]
    ) -> Iterator[np.ndarray]:
        speech, full = engine.speech, self.speech.max_context_s
        empty = [wave for wave, text in zip(waves, texts, strict=True) if not text]
        found = iter(engine.decode(empty, full) if empty else [])
        read = [speech.spell(text, speech.language) if text else next(found) for text in texts]
        tokens = [[*(r if isinstance(r, list) else r.tokens)] for r in read]
        prompt, end = speech.prompt(timestamps=False), self.model.config.eos_token_id
        features = speech.features(waves, full).to(engine.device)
        length = max(map(len, tokens)) + 1
        inputs = torch.full((len(tokens), len(prompt) + length - 1), end)
        for row, own in enumerate(tokens):
            inputs[row, : len(prompt) + len(own)] = torch.tensor([*prompt, *own])
        states = speech.model.model.decoder(
            input_ids=inputs.to(engine.device),
            encoder_hidden_states=encode_whisper(speech.model, features),
        ).last_hidden_state[:, len(prompt) - 1 :]
        scores = speech.model.proj_out(states).float().log_softmax(-1)
        best, ids = scores.topk(_KEPT)
        for row, own in enumerate(tokens):
            places = len(own) + 1
            target = torch.tensor([*own, end], device=ids.device)[:, None]
            row_ids, row_best = ids[row, :places], best[row, :places]
            # What is said first: it need not be the most probable token, nor one of those kept.
            others = row_ids != target
            order = others.to(torch.int8).argsort(dim=-1, stable=True)
            row_ids, row_best = row_ids.gather(1, order), row_best.gather(1, order)
            row_ids[:, :1] = target
            chosen = scores[row, :places].gather(1, target)
            row_best[:, :1] = chosen
            said = read[row]
            in_doubt = (
                float(chosen.mean()) < _SPOKEN_LOGPROB
                if isinstance(said, list)
                else self._is_doubtful(said, waves[row])
            )
            doubt = torch.full_like(row_best, float(in_doubt))
            yield torch.stack([row_ids.float(), row_best.clamp(min=-100), doubt]).cpu().numpy()

    def _is_doubtful(self, hypothesis: Hypothesis, wave: np.ndarray) -> bool:
        reason = rejection(hypothesis, len(wave) / SAMPLE_RATE)
        return reason not in (None, "empty")  # silence can be learnt

    # --- training -----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        parts = [f"{clip.identity} {clip.language}" for clip in self.train.clips]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def epoch(self, epoch: int) -> Sequence[int]:
        """The clips that the source reads without doubt."""
        return self._usable

    def prepare(self, batch: Sequence[int], share: slice, epoch: int) -> list[ShortBatch]:
        """Micro-batches of one context and language each."""
        assert self._teacher_targets is not None
        groups: dict[tuple[float, str | None], list[tuple[torch.Tensor, np.ndarray]]]
        groups = defaultdict(list)
        for index in batch[share]:
            clip, heard = self.train.clips[index], self._view_rng(index, epoch)
            wave, _ = self._augmenter.waveform(clip.samples(), heard)
            context = self.speech.context_s(len(wave) / SAMPLE_RATE, shortest=0)
            rng = np.random.default_rng([self.config.runtime.seed, epoch, index])
            full = self.speech.max_context_s
            wider = longer_context_s(context, full) or full
            if rng.random() < _LONGER and wider < full:
                context = wider
            features = self.speech.features([wave], context)
            self._augmenter.features(features[0], len(wave) / SAMPLE_RATE, heard)
            groups[context, clip.language].append((features, self._teacher_targets[index]))
        batches = []
        for (context, language), examples in sorted(groups.items(), key=lambda g: str(g[0])):
            prompt = self.speech.prompt(timestamps=False, language=language)
            size = max(1, int(self.config.train.batch_seconds / context + 1e-6))
            for start in range(0, len(examples), size):
                batches.append(self._short_batch(examples[start : start + size], prompt))
        return batches

    def _short_batch(
        self, examples: list[tuple[torch.Tensor, np.ndarray]], prompt: list[int]
    ) -> ShortBatch:
        length = max(taught.shape[1] for _, taught in examples)
        shape = (len(examples), length, _KEPT)
        ids, logprobs = torch.full(shape, -1), torch.zeros(shape)
        end = int(self.model.config.eos_token_id)
        inputs = torch.full((len(examples), len(prompt) + length - 1), end)
        inputs[:, : len(prompt)] = torch.tensor(prompt)
        for row, (_, taught) in enumerate(examples):
            places = taught.shape[1]
            ids[row, :places] = torch.from_numpy(taught[0].astype(np.int64))
            logprobs[row, :places] = torch.from_numpy(taught[1].copy())
            inputs[row, len(prompt) : len(prompt) + places - 1] = ids[row, : places - 1, 0]
        features = torch.cat([features for features, _ in examples])
        return ShortBatch(features, inputs, len(prompt) - 1, ids, logprobs)

    def weight(self, micro: ShortBatch) -> float:
        """Number of tokens."""
        return float((micro.ids[..., 0] >= 0).sum())

    def split(self, micro: ShortBatch) -> list[ShortBatch]:
        """Two halves of the clips."""
        half = len(micro.features) // 2
        if not half:
            return [micro]
        return [
            ShortBatch(
                micro.features[part],
                micro.inputs[part],
                micro.first,
                micro.ids[part],
                micro.logprobs[part],
            )
            for part in (slice(None, half), slice(half, None))
        ]

    def outputs(self, micro: ShortBatch, device: torch.device) -> Outputs:
        """Logits [clip, token, class]."""
        hidden = encode_whisper(self.model, micro.features.to(device))
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=micro.inputs.to(device),
            use_cache=False,
        ).logits[:, micro.first :]
        return Outputs(logits, micro.ids[..., 0].to(device) >= 0)

    def target_loss(self, outputs: Outputs, micro: ShortBatch) -> torch.Tensor:
        """KL divergence from the source's distribution and cross-entropy of its tokens, summed."""
        logits, shown = outputs.logits, outputs.counted
        ids, taught = micro.ids.to(logits.device)[shown], micro.logprobs.to(logits.device)[shown]
        scores = logits[shown].float().log_softmax(-1)
        own = scores.gather(1, ids)
        divergence = functional.kl_div(
            own, taught.log_softmax(-1), reduction="sum", log_target=True
        )
        return divergence - _CROSS_ENTROPY * own[:, 0].sum()

    def save(self, folder: Path) -> None:
        """Write the adapter, beside the source's weights where those have no public place."""
        self.speech.save(folder, self.form, self.adapted)

    # --- evaluation ---------------------------------------------------------------------------

    def validate(self, indices: Sequence[int], device: torch.device) -> list[ClipScore]:
        """Scores at each clip's own length, which training makes readable."""
        return self._score([self.validation.clips[index] for index in indices], device, 0.0)

    def _reference(self, clips: Sequence[Clip], device: torch.device) -> list[ClipScore]:
        """Scores in the full window. Where only the teacher has a transcript, the clip begins a
        moment later: it does not always agree with itself, and a short context need not either.
        """
        full = self.speech.max_context_s
        scores: dict[int, ClipScore] = {}
        for delay_s, is_own in ((0.0, False), (_DELAY_S, True)):
            rows = [i for i, c in enumerate(clips) if (c.identity in self._unlabelled) == is_own]
            found = self._score([clips[row] for row in rows], device, full, delay_s)
            scores |= dict(zip(rows, found, strict=True))
        return [scores[index] for index in range(len(clips))]

    def _score(
        self,
        clips: Sequence[Clip],
        device: torch.device,
        shortest_context_s: float,
        delay_s: float = 0.0,
    ) -> list[ClipScore]:
        by_language: dict[str | None, list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            by_language[clip.language].append(index)
        scores: dict[int, ClipScore] = {}
        scoring = ClipScoring(clips, self.speech.language, self.config)
        for indices in by_language.values():
            recognizer = Recognizer(
                self._engine(clips[indices[0]]),
                batch_seconds=self.config.evaluation.batch_seconds,
                shortest_context_s=shortest_context_s,
            )
            before = round(delay_s * SAMPLE_RATE)
            waves = [np.pad(clips[index].samples(), (before, 0)) for index in indices]
            found = recognizer.transcribe(waves, guarded=True)  # as it is used
            for index, hypothesis in zip(indices, found, strict=True):
                scores[index] = scoring.score(clips[index], hypothesis.text)
        return [scores[index] for index in range(len(clips))]

    def measure_shortest_context(self, device: torch.device, sources: Sequence[ClipSet]) -> float:
        """Set the shortest context at which the model keeps its accuracy, by measuring it on
        validation clips and on those of every source-domain set; see `shortest_safe_context_s`.
        """
        sets = [clips.clips[:SAFE_CLIPS] for clips in (self.validation, *sources)]
        full = self.speech.max_context_s

        def score(clips: Sequence[Clip], context: float) -> list[ClipScore]:
            if context == full:
                return self._reference(clips, device)
            return self._score(clips, device, context)

        self.speech.shortest_context_s = shortest_safe_context_s(
            full,
            min(self.lengths),
            lambda context: [self.rate(score(clips, context)) for clips in sets],
        )
        return self.speech.shortest_context_s

    def measure_margin(self, device: torch.device) -> float:
        """Set the smallest context beyond the clip that reads as well as larger ones."""
        assert self.speech.short is not None
        rates = []
        for margin in _MARGINS_S:
            self.speech.short.margin_s = margin
            records = self._score(self.validation.clips, device, 0.0)
            rates.append(self.rate(records))
        best = min(rates)
        chosen = next(i for i, rate in enumerate(rates) if rate <= best + _MARGIN_GAIN)
        self.speech.short.margin_s = _MARGINS_S[chosen]
        return _MARGINS_S[chosen]

    # --- what a run reports -----------------------------------------------------------------

    def score(self, examples: ClipSet, device: torch.device) -> dict[str, Any]:
        """Scores of clips as they are decoded after training; of validation clips without a
        transcript what the source decodes in full takes its place.
        """
        clips = self.validation if examples is self.splits.validation else examples
        records = self._score(clips.clips, device, self.speech.shortest_context_s)
        return self.summary(records).as_dict()

    @property
    def is_scored_before(self) -> bool:
        """Whether all clips that are scored have transcripts."""
        return all(c.text for split in self.splits.evaluated.values() for c in split.clips)

    def finish(self, device: torch.device) -> None:
        """Measure the context beyond a clip, and the shortest safe context."""
        self.measure_margin(device)
        self.measure_shortest_context(device, list(self.splits.source_domain.values()))

    def describe(self) -> dict[str, Any]:
        """Languages and contexts."""
        return {
            "languages": self.languages,
            "shortest_context_s": self.speech.shortest_context_s,
            "margin_s": self.speech.margin_s,
            "max_context_s": self.speech.max_context_s,
        }

    @property
    def is_plain(self) -> bool:
        """Plain pipelines know no short contexts."""
        return False
