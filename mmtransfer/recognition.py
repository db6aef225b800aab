"""Speech to text with scores: greedy decoding of clips in batches of equal context."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmtransfer.audio import SAMPLE_RATE
from mmtransfer.backbones import SpeechModel, encode_whisper
from mmtransfer.ctc_models import CtcModel
from mmtransfer.progress import track
from mmtransfer.runtime import is_out_of_memory

_TOKENS_PER_SECOND = 16  # above what any language's fastest speech needs
_TOKENS_AT_LEAST = 24


@dataclass(frozen=True)
class Hypothesis:
    """What a clip was recognised as."""

    text: str
    tokens: tuple[int, ...]
    """Without the prompt and the end token."""
    avg_logprob: float
    """Mean natural-log probability of the tokens, the end token included."""
    no_speech_prob: float
    """Probability of the no-speech token in the first place (0 if the model has none)."""
    context_s: float
    """Seconds the encoder saw."""
    finished: bool = True
    """False if the token limit cut it off."""

    @property
    def compression_ratio(self) -> float:
        """Bytes of the text over its zlib-compressed bytes; loops compress well (Radford et al.
        2022, section 4.5).
        """
        data = self.text.encode()
        return len(data) / len(zlib.compress(data)) if data else 0.0


class Recognizer:
    """Batched greedy recognition on one device, with a Whisper or a CTC model.

    `shortest_context_s` overrides the shortest context stored with the model.
    """

    def __init__(
        self,
        speech: SpeechModel | CtcModel,
        *,
        device: torch.device | str = "cpu",
        batch_seconds: float = 120.0,
        shortest_context_s: float | None = None,
    ):
        self.speech = speech
        self.device = torch.device(device)
        self.batch_seconds = batch_seconds
        self.shortest_context_s = shortest_context_s
        self._suppressed = self._suppressed_first = torch.zeros(0, dtype=torch.bool)
        if isinstance(speech, SpeechModel):
            self._prepare_decoder(speech)

    def _prepare_decoder(self, speech: SpeechModel) -> None:
        generation = speech.model.generation_config
        vocabulary = speech.model.config.vocab_size
        tokenizer = speech.processor.tokenizer
        self._end = int(speech.model.config.eos_token_id)
        suppressed = torch.zeros(vocabulary, dtype=torch.bool)
        suppressed[[t for t in generation.suppress_tokens or [] if 0 <= t < vocabulary]] = True
        begin = suppressed.clone()
        begin[[t for t in generation.begin_suppress_tokens or [] if t < vocabulary]] = True
        # At the first step the end token may win: a clip of silence has the transcript "".
        begin[self._end] = False
        self._suppressed, self._suppressed_first = suppressed, begin
        name = "<|nospeech|>" if "<|nospeech|>" in tokenizer.get_vocab() else "<|nocaptions|>"
        self._no_speech = tokenizer.get_vocab().get(name)

    def transcribe(
        self,
        clips: Sequence[np.ndarray],
        *,
        context_s: float | None = None,
        progress: str | None = None,
    ) -> list[Hypothesis]:
        """Hypotheses of 16-kHz float32 clips, in their order; `progress` labels a bar.

        A clip's context depends on its own length only (or is `context_s` for all), and a batch
        holds clips of one context, so results do not depend on what else is in the batch.
        """
        by_context: dict[float, list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            wanted = context_s or self.speech.context_s(
                len(clip) / SAMPLE_RATE, shortest=self.shortest_context_s
            )
            by_context[wanted].append(index)
        batches: list[tuple[float, list[int]]] = []
        for context, indices in sorted(by_context.items()):
            size = max(1, int(self.batch_seconds / context))
            starts = range(0, len(indices), size)
            batches += [(context, indices[start : start + size]) for start in starts]
        results: dict[int, Hypothesis] = {}
        for context, chosen in track(batches, progress) if progress else batches:
            found = self._decode_halving([clips[index] for index in chosen], context)
            results.update(zip(chosen, found, strict=True))
        return [results[index] for index in range(len(clips))]

    def _decode_halving(self, clips: list[np.ndarray], context_s: float) -> list[Hypothesis]:
        """Decode a batch; if memory does not hold it, as two halves."""
        try:
            return self._decode(clips, context_s)
        except (RuntimeError, MemoryError) as error:
            if len(clips) == 1 or not is_out_of_memory(error):
                raise
        half = len(clips) // 2
        self.batch_seconds = half * context_s  # later calls start with what fits
        parts = (clips[:half], clips[half:])
        return [found for part in parts for found in self._decode_halving(part, context_s)]

    def _decode(self, clips: list[np.ndarray], context_s: float) -> list[Hypothesis]:
        if isinstance(self.speech, CtcModel):
            return self._best_paths(self.speech, clips, context_s)
        return self._decode_greedily(self.speech, clips, context_s)

    @torch.inference_mode()
    def _best_paths(
        self, speech: CtcModel, clips: list[np.ndarray], context_s: float
    ) -> list[Hypothesis]:
        """CTC: the most probable symbol of every frame."""
        network = speech.network
        was_training = network.training
        network.eval()
        inputs = {n: value.to(self.device) for n, value in speech.inputs(clips, context_s).items()}
        mask = speech.mask([len(clip) / SAMPLE_RATE for clip in clips], context_s)
        scores = network(inputs, mask.to(self.device)).float().log_softmax(-1)
        network.train(was_training)
        hypotheses = []
        for row, shown in zip(scores.cpu(), mask, strict=True):
            best, chosen = row[shown].max(-1)
            text, tokens = speech.read(chosen.tolist())
            # Blanks are near certain almost everywhere; the symbols are what can be doubted.
            spoken = best[chosen != speech.blank]
            logprob = float(spoken.mean()) if len(spoken) else float(best.mean())
            hypotheses.append(Hypothesis(text, tokens, logprob, 0.0, context_s))
        return hypotheses

    @torch.inference_mode()
    def _decode_greedily(
        self, speech: SpeechModel, clips: list[np.ndarray], context_s: float
    ) -> list[Hypothesis]:
        """Whisper: the most probable token after each other."""
        model = speech.model
        was_training = model.training
        model.eval()
        features = speech.features(clips, context_s).to(self.device, model.dtype)
        hidden = encode_whisper(model, features)
        count = len(clips)
        longest_s = max(len(clip) for clip in clips) / SAMPLE_RATE
        prompt = speech.prompt(timestamps=False)
        room = model.config.max_target_positions - len(prompt)
        limit = min(room // 2, _TOKENS_AT_LEAST + int(_TOKENS_PER_SECOND * longest_s))
        first, later = (m.to(self.device) for m in (self._suppressed_first, self._suppressed))
        step_input = torch.tensor([prompt] * count, device=self.device)
        cache = None
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        logprob = torch.zeros(count, device=self.device)
        no_speech = torch.zeros(count, device=self.device)
        tokens = []
        for step in range(limit):
            output = model.model.decoder(
                input_ids=step_input,
                encoder_hidden_states=hidden,
                cache=cache,
                use_cache=True,
            )
            cache = output.cache
            if step == 0 and self._no_speech is not None:
                start = model.proj_out(output.last_hidden_state[:, 0]).float().softmax(-1)
                no_speech = start[:, self._no_speech]
            logits = model.proj_out(output.last_hidden_state[:, -1]).float()
            logits = logits.masked_fill(first if step == 0 else later, -torch.inf)
            best, chosen = logits.log_softmax(-1).max(-1)
            logprob += torch.where(done, 0.0, best)
            chosen = torch.where(done, self._end, chosen)
            tokens.append(chosen)
            done |= chosen == self._end
            if bool(done.all()):
                break
            step_input = chosen[:, None]
        if was_training:
            model.train()
        rows = torch.stack(tokens, 1).tolist()
        finished, scores, silent = done.tolist(), logprob.tolist(), no_speech.tolist()
        hypotheses = []
        for index, row in enumerate(rows):
            text_tokens = tuple(row[: row.index(self._end)] if self._end in row else row)
            text = speech.processor.tokenizer.decode(text_tokens, skip_special_tokens=True)
            hypotheses.append(
                Hypothesis(
                    text=text.strip(),
                    tokens=text_tokens,
                    avg_logprob=scores[index] / (len(text_tokens) + finished[index]),
                    no_speech_prob=silent[index],
                    context_s=context_s,
                    finished=finished[index],
                )
            )
        return hypotheses
