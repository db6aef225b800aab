"""Recognition in torch, on any device: Whisper by greedy or beam search, CTC by best paths."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmtransfer.errors import UserError
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.engine import (
    DecodingOptions,
    Engine,
    Hypothesis,
    Word,
    align_words,
    choose_language,
    token_limit,
)
from mmtransfer.speech.generation import token_number
from mmtransfer.speech.whisper import SpeechModel, encode_whisper

_FRAME_S = 0.02  # of an encoder state
_Row = tuple[tuple[int, ...], float, bool]
"""Tokens, mean log-probability, and whether the end was reached."""


def transformers_engine(
    speech: SpeechModel | CtcModel,
    device: torch.device | str = "cpu",
    options: DecodingOptions | None = None,
    *,
    threads: int | None = None,
) -> Engine:
    """The engine of a loaded model, which is moved to the device.

    `threads` are those of the thread that decodes; by default they are left as they are.
    """
    options = options or DecodingOptions()
    if isinstance(speech, SpeechModel):
        return TransformersWhisper(speech, torch.device(device), options, threads)
    if (options.beam_size or 1) > 1 or options.words_from_s <= 0 or options.prompt:
        raise UserError(
            f"{speech.source}: beams, word timestamps and prompts need a Whisper model; this one "
            "outputs characters frame by frame (CTC)."
        )
    return TransformersCtc(speech, torch.device(device), threads)


class _TransformersEngine(ABC):
    """Contexts as the model has them; they can change while it is trained."""

    workers = 1  # torch uses all cores for one batch

    def __init__(self, speech: Any, device: torch.device, threads: int | None):
        self.speech, self.device, self._threads = speech, device, threads
        # Segments and turns come from two threads, and word times are taken from within layers.
        self._one_at_a_time = threading.RLock()
        speech.model.to(device)

    def decode(self, clips: Sequence[np.ndarray], context_s: float) -> list[Hypothesis]:
        """Hypotheses of clips, each padded or cut to the context."""
        if self._threads is not None and self._threads != torch.get_num_threads():
            torch.set_num_threads(self._threads)  # of the calling thread, which is ours
        with self._one_at_a_time:
            return self._decode(clips, context_s)

    @abstractmethod
    def _decode(self, clips: Sequence[np.ndarray], context_s: float) -> list[Hypothesis]:
        """The same, in whatever number of threads is set."""

    @property
    def language(self) -> str | None:
        return self.speech.language

    @property
    def max_context_s(self) -> float:
        return self.speech.max_context_s

    @property
    def shortest_context_s(self) -> float:
        return self.speech.shortest_context_s

    @property
    def margin_s(self) -> float:
        return self.speech.margin_s

    @property
    def short_s(self) -> float:
        return self.speech.short_s

    @property
    def window_s(self) -> float:
        return self.speech.window_s


class TransformersCtc(_TransformersEngine):
    """CTC: the most probable symbol of every frame."""

    @property
    def languages(self) -> list[str]:
        return [self.language] if self.language else []

    @property
    def own_language(self) -> str | None:
        return self.language

    def speaking(self, language: str | None, prompt: str) -> TransformersCtc:
        """Itself: CTC has one language and takes no prompt."""
        if language is not None and self.language not in (None, language):
            raise UserError(
                f"{self.speech.source}: its language is '{self.language}', not '{language}'."
            )
        return self

    @torch.inference_mode()
    def _decode(self, clips: Sequence[np.ndarray], context_s: float) -> list[Hypothesis]:
        speech, network = self.speech, self.speech.network
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


class TransformersWhisper(_TransformersEngine):
    """Whisper by greedy search, or by beam search with length-normalised scores."""

    def __init__(
        self,
        speech: SpeechModel,
        device: torch.device,
        options: DecodingOptions,
        threads: int | None,
    ):
        super().__init__(speech, device, threads)
        if speech.short is not None:
            speech.short.model.to(device)
        self.options = options
        model, tokenizer = speech.model, speech.processor.tokenizer
        generation, vocabulary = model.generation_config, model.config.vocab_size
        self._end = int(model.config.eos_token_id)
        suppressed = torch.zeros(vocabulary, dtype=torch.bool)
        suppressed[generation.suppress_tokens] = True
        begin = suppressed.clone()
        begin[generation.begin_suppress_tokens] = True
        # At the first step the end token may win: a clip of silence has the transcript "".
        begin[self._end] = False
        self._suppressed, self._suppressed_first = suppressed.to(device), begin.to(device)
        self._no_speech = token_number(tokenizer, "nospeech")
        if self._no_speech is None:
            self._no_speech = token_number(tokenizer, "nocaptions")
        self._before = self._tokens_before(options.prompt)

    @property
    def languages(self) -> list[str]:
        return list(self.speech.languages)

    @property
    def own_language(self) -> str | None:
        return getattr(self.speech.model.generation_config, "language", None)

    def speaking(self, language: str | None, prompt: str) -> TransformersWhisper:
        """The same model in another language (None: this one) and with another prompt."""
        speech, other = self.speech, copy(self)
        generation = speech.model.generation_config.to_dict()
        spoken = choose_language(speech.source, generation, language or speech.language)
        other.speech = replace(speech, language=spoken)
        other._before = self._tokens_before(prompt or self.options.prompt)
        return other

    def _tokens_before(self, prompt: str) -> list[int]:
        """The prompt as the decoder takes it, before its own first tokens."""
        if not prompt:
            return []
        model, tokenizer = self.speech.model, self.speech.processor.tokenizer
        before = tokenizer(f" {prompt.strip()}", add_special_tokens=False).input_ids
        room = model.config.max_target_positions // 2 - 1
        return [tokenizer.convert_tokens_to_ids("<|startofprev|>"), *before[-room:]]

    @torch.inference_mode()
    def _decode(self, clips: Sequence[np.ndarray], context_s: float) -> list[Hypothesis]:
        speech = self.speech
        model = speech.model_for(context_s)
        was_training = model.training
        model.eval()
        features = speech.features(clips, context_s).to(self.device, model.dtype)
        hidden = encode_whisper(model, features)
        languages = [speech.language] * len(clips)
        alone = speech.language == "auto" or bool(self._before)
        if alone:
            start = torch.full((len(clips), 1), model.config.decoder_start_token_id)
            states, _ = self._advance(model, start.to(self.device), hidden, None)
            # Behind a prompt, silence looks like speech.
            silent = self._silence(model, states)
            if speech.language == "auto":
                languages = self._detect(model, states)
        prompts = torch.tensor(
            [self._before + speech.prompt(timestamps=False, language=x) for x in languages],
            device=self.device,
        )
        room = model.config.max_target_positions - prompts.shape[1]
        limit = token_limit(max(len(clip) for clip in clips) / SAMPLE_RATE, room)
        first, cache = self._advance(model, prompts, hidden, None)
        if not alone:
            silent = self._silence(model, first)
        beams = self.options.beam_size or 1
        if beams == 1:
            rows = self._greedy(model, hidden, first, cache, limit)
        else:
            rows = self._beams(model, hidden, first, cache, limit, beams)
        hypotheses = []
        for index, (tokens, logprob, finished) in enumerate(rows):
            words: tuple[Word, ...] = ()
            seconds = min(len(clips[index]) / SAMPLE_RATE, context_s)
            if seconds >= self.options.words_from_s and tokens:
                words, _ = timed_words(
                    model,
                    self.speech.processor.tokenizer,
                    hidden[index],
                    prompts[index],
                    tokens,
                    seconds,
                )
            text = speech.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            language = languages[index]
            hypotheses.append(
                Hypothesis(
                    *(text.strip(), tokens, logprob, silent[index], context_s),
                    *(finished, language, words),
                )
            )
        if was_training:
            model.train()
        untaught = speech.untaught(languages, context_s)
        for index in untaught:  # the adapter has not learnt these
            hypotheses[index] = self.decode([clips[index]], speech.max_context_s)[0]
        return hypotheses

    def _silence(self, model: Any, states: torch.Tensor) -> list[float]:
        """The probability of no speech of each clip, by the states [clip, token, width] of tokens
        of which the first is the start token.
        """
        if self._no_speech is None:
            return [0.0] * len(states)
        shares = model.proj_out(states[:, 0]).float().softmax(-1)
        found: list[float] = shares[:, self._no_speech].tolist()
        return found

    def _detect(self, model: Any, states: torch.Tensor) -> list[str]:
        """The most probable language of each clip, by the states behind the start token."""
        generation = model.generation_config
        names = sorted(generation.lang_to_id)
        logits = model.proj_out(states[:, 0])
        best = logits[:, [generation.lang_to_id[name] for name in names]].argmax(-1)
        return [names[index].strip("<|>") for index in best.tolist()]

    def _advance(
        self, model: Any, inputs: torch.Tensor, hidden: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """(states of the tokens [row, token, width], cache)."""
        output = model.model.decoder(
            input_ids=inputs, encoder_hidden_states=hidden, cache=cache, use_cache=True
        )
        return output.last_hidden_state, output.cache

    def _scores(self, model: Any, states: torch.Tensor, first: bool) -> torch.Tensor:
        """Log-probabilities of the token that follows [row, token]."""
        suppressed = self._suppressed_first if first else self._suppressed
        logits = model.proj_out(states[:, -1]).float().masked_fill(suppressed, -torch.inf)
        return logits.log_softmax(-1)

    def _greedy(
        self, model: Any, hidden: torch.Tensor, states: torch.Tensor, cache: Any, limit: int
    ) -> list[_Row]:
        """The most probable token after each other, from the prompt's states and cache."""
        count = len(hidden)
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        logprob = torch.zeros(count, device=self.device)
        tokens: list[torch.Tensor] = []
        for step in range(limit):
            if tokens:
                states, cache = self._advance(model, tokens[-1][:, None], hidden, cache)
            best, chosen = self._scores(model, states, step == 0).max(-1)
            logprob += torch.where(done, 0.0, best)
            chosen = torch.where(done, self._end, chosen)
            tokens.append(chosen)
            done |= chosen == self._end
            if bool(done.all()):
                break
        rows = torch.stack(tokens, 1).tolist()
        found = []
        for row, score, finished in zip(rows, logprob.tolist(), done.tolist(), strict=True):
            kept = tuple(row[: row.index(self._end)] if self._end in row else row)
            found.append((kept, score / (len(kept) + finished), finished))
        return found

    def _beams(
        self,
        model: Any,
        hidden: torch.Tensor,
        states: torch.Tensor,
        cache: Any,
        limit: int,
        width: int,
    ) -> list[_Row]:
        """Beam search from the prompt's states and cache; a finished hypothesis counts by its mean
        log-probability, as greedy ones.
        """
        count, end = len(hidden), self._end
        rows_of = torch.arange(count, device=self.device).repeat_interleave(width)
        hidden, states = hidden[rows_of], states[rows_of]
        cache.reorder_cache(rows_of)
        step_input = None
        total = torch.full((count, width), -torch.inf, device=self.device)
        total[:, 0] = 0.0  # all beams start the same
        texts: list[list[tuple[int, ...]]] = [[()] * width for _ in range(count)]
        finished: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(count)]
        for step in range(limit):
            if step_input is not None:
                states, cache = self._advance(model, step_input, hidden, cache)
            scores = self._scores(model, states, step == 0)
            sums = (total[..., None] + scores.view(count, width, -1)).flatten(1)
            # Twice as many, so that enough go on even if every beam wants to end.
            best, places = sums.topk(2 * width)
            vocabulary = scores.shape[-1]
            chosen: list[list[tuple[int, int, float]]] = []
            for row in range(count):
                kept: list[tuple[int, int, float]] = []
                ranked = zip(best[row].tolist(), places[row].tolist(), strict=True)
                for rank, (score, place) in enumerate(ranked):
                    beam, token = divmod(place, vocabulary)
                    if token == end:
                        if rank < width:  # an end less likely than all that go on is none
                            text = texts[row][beam]
                            finished[row].append((score / (len(text) + 1), text))
                    elif len(kept) < width:
                        kept.append((beam, token, score))
                chosen.append(kept)
            texts = [
                [(*texts[row][beam], token) for beam, token, _ in kept]
                for row, kept in enumerate(chosen)
            ]
            # What goes on hardly gets better than it is, once there are enough to choose from.
            if all(
                len(found) >= width and max(found)[0] >= kept[0][2] / (step + 1)
                for found, kept in zip(finished, chosen, strict=True)
            ):
                break
            order = [row * width + beam for row, kept in enumerate(chosen) for beam, _, _ in kept]
            cache.reorder_cache(torch.tensor(order, device=self.device))
            total = torch.tensor(
                [[score for _, _, score in kept] for kept in chosen], device=self.device
            )
            step_input = torch.tensor(
                [[token] for kept in chosen for _, token, _ in kept], device=self.device
            )
        rows: list[_Row] = []
        for row in range(count):
            if finished[row]:
                score, text = max(finished[row])
                rows.append((text, score, True))
            else:
                text = texts[row][0]
                rows.append((text, float(total[row, 0]) / len(text), False))
        return rows


def timed_words(
    model: Any,
    tokenizer: Any,
    hidden: torch.Tensor,
    prompt: torch.Tensor,
    tokens: Sequence[int],
    seconds: float,
) -> tuple[tuple[Word, ...], torch.Tensor]:
    """Words with times of a clip's text, by dynamic time warping over the attention of the
    alignment heads (as in Whisper's released code, whisper/timing.py); and the log probability of
    each token and of the end [token + 1].

    `hidden` are the encoder's states [frame, width], `prompt` the decoder's first tokens [token].
    """
    text = torch.tensor([*tokens, model.config.eos_token_id], device=hidden.device)
    inputs = torch.cat([prompt, text[:-1]])[None]
    frames = max(1, round(seconds / _FRAME_S))
    weights, states = _cross_attention(model, inputs, hidden[None])
    attention = weights[:, len(prompt) - 1 :, :frames]  # rows that predict text and the end
    attention = (attention - attention.mean(-2, keepdim=True)) / (
        attention.std(-2, keepdim=True, unbiased=False) + 1e-8
    )
    cost = -attention.mean(0).cpu().numpy().astype(np.float64)
    starts = dynamic_time_warping(cost) * _FRAME_S
    logits = model.proj_out(states[0, len(prompt) - 1 :]).float()
    shares = logits.log_softmax(-1).gather(1, text[:, None])[:, 0]
    names = tokenizer.convert_ids_to_tokens(list(tokens))
    own = shares[:-1].exp().tolist()
    return align_words(names, starts[:-1].tolist(), own, float(starts[-1])), shares


def _cross_attention(
    model: Any, inputs: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the audio of the alignment heads [head, token, frame] for one clip, and the
    decoder's states [1, token, width].
    """
    heads = getattr(model.generation_config, "alignment_heads", None)
    layers = model.model.decoder.layers
    if not heads:  # by default the upper half of the layers
        number = model.config.decoder_attention_heads
        heads = [[i, j] for i in range(len(layers) // 2, len(layers)) for j in range(number)]
    queries: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            queries[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [
        layer.encoder_attn.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        output = model.model.decoder(input_ids=inputs, encoder_hidden_states=hidden)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for layer, head in heads:
        attention = layers[layer].encoder_attn
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        query = attention.q_proj(queries[layer])[0, :, part] * attention.scaling
        found.append((query @ attention.k_proj(hidden)[0, :, part].T).float().softmax(-1))
    return torch.stack(found), output.last_hidden_state


def dynamic_time_warping(cost: np.ndarray) -> np.ndarray:
    """The first column of each row on the cheapest monotonic path through [row, column]."""
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for row in range(rows):
        for column in range(columns):
            before = total[row : row + 2, column : column + 2]
            total[row + 1, column + 1] = cost[row, column] + min(
                before[0, 0], before[0, 1], before[1, 0]
            )
    row, column = rows, columns
    starts = np.zeros(rows, int)
    while row > 0:
        starts[row - 1] = column - 1
        steps = (total[row - 1, column - 1], total[row - 1, column], total[row, column - 1])
        best = int(np.argmin(steps))
        row -= best != 2
        column -= best != 1
    return starts
