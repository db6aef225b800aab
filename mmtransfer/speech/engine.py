"""What engines of recognition take and give: options; text, scores, words with times."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from mmtransfer.data.languages import read_language
from mmtransfer.errors import UserError

TOKENS_PER_SECOND = 16
"""Above what any language's fastest speech needs."""
_TOKENS_AT_LEAST = 24
_LEAST = 1e-3  # probability of a word, below which it is no more improbable


@dataclass(frozen=True)
class Word:
    """A word with its times."""

    text: str
    start_s: float
    """Seconds into the clip."""
    end_s: float
    probability: float
    """Mean probability of its tokens."""


@dataclass(frozen=True)
class Hypothesis:
    """What a clip was recognised as."""

    text: str
    tokens: tuple[int, ...]
    """Without the prompt and the end token."""
    avg_logprob: float
    """Mean natural-log probability of the tokens, the end token included."""
    no_speech_prob: float
    """Probability of the no-speech token in the first place, without a prompt (0 if the model has
    none)."""
    context_s: float
    """Seconds the encoder saw."""
    finished: bool = True
    """False if the token limit cut it off."""
    language: str | None = None
    """Language that it was read in; None for a model of one language."""
    words: tuple[Word, ...] = ()
    """Its words with times, if asked for."""

    @property
    def compression_ratio(self) -> float:
        """Bytes of the text over its zlib-compressed bytes; loops compress well (Radford et al.
        2022, section 4.5).
        """
        data = self.text.encode()
        return len(data) / len(zlib.compress(data)) if data else 0.0

    @property
    def word_logprob(self) -> float:
        """Mean natural-log probability of its words, or of its tokens where the words are not
        known.
        """
        return word_logprob(self.words) if self.words else self.avg_logprob


def word_logprob(words: Sequence[Word]) -> float:
    """Mean natural-log probability of words; -inf for none."""
    if not words:
        return -math.inf
    return math.fsum(math.log(max(w.probability, _LEAST)) for w in words) / len(words)


@dataclass(frozen=True)
class DecodingOptions:
    """How text is searched for."""

    beam_size: int | None = None
    """Hypotheses kept at each token; 1 is greedy. None leaves it to the engine: CTranslate2 keeps
    some, which costs it little; torch none."""
    words_from_s: float = math.inf
    """Words of clips at least this long get times, from the attention to the audio."""
    prompt: str = ""
    """The prompt, as if it were the text before: names and words to expect, a style."""


class Engine(Protocol):
    """A loaded model that turns clips into text."""

    workers: int
    """Batches that are best decoded at the same time, each from a thread of its own."""

    @property
    def language(self) -> str | None:
        """ISO code; None for a model of one language, `auto` where it is detected."""
        ...

    @property
    def own_language(self) -> str | None:
        """That of its checkpoint, which training has put there; None where there is none."""
        ...

    @property
    def languages(self) -> list[str]:
        """ISO codes of the languages that the model has, as far as they are known."""
        ...

    @property
    def max_context_s(self) -> float:
        """The window the model was pretrained on."""
        ...

    @property
    def shortest_context_s(self) -> float:
        """Shortest context that keeps accuracy."""
        ...

    @property
    def margin_s(self) -> float:
        """Context beyond a clip's own length."""
        ...

    @property
    def short_s(self) -> float:
        """Longest clip that is decoded in a context for its length."""
        ...

    @property
    def window_s(self) -> float:
        """How much speech the model takes in at a time, joined over pauses; 0 where pieces between
        two pauses are better decoded alone.
        """
        ...

    def decode(self, clips: Sequence[np.ndarray], context_s: float) -> list[Hypothesis]:
        """Hypotheses of 16-kHz float32 clips, each padded or cut to the context."""
        ...

    def speaking(self, language: str | None, prompt: str) -> Engine:
        """The same loaded model in another language (None: the one that it was opened with) and
        with another prompt, where it takes one.

        Raises:
            UserError: a language it does not have.
        """
        ...


def token_limit(longest_s: float, room: int) -> int:
    """Tokens that a clip of that length may have, out of those a decoder has room for."""
    return min(room // 2, _TOKENS_AT_LEAST + int(TOKENS_PER_SECOND * longest_s))


def choose_language(
    source: str,
    generation: dict[str, Any],
    language: str | None,
    *,
    can_detect: bool = True,
) -> str | None:
    """The language that a Whisper reads: the one asked for, else that of its checkpoint; None for
    an English-only model, `auto` where it is to be detected, if it `can` be.

    Raises:
        UserError: a language it does not have, or a multilingual model and none named.
    """
    if language not in (None, "auto"):
        language = read_language(str(language), f"{source}: language")
    if language == "auto" and not can_detect:
        raise UserError(f"{source}: training needs the language of the speech, found 'auto'.")
    if not generation.get("is_multilingual"):
        if language not in (None, "en", "auto"):
            raise UserError(f"{source}: English only, but the language is set to '{language}'.")
        return None
    language = language or generation.get("language")
    known = sorted(token.strip("<|>") for token in generation["lang_to_id"])
    if language is None:
        named = (
            "--language en, or auto to detect it"
            if can_detect
            else "data.language: en, or a column 'language'"
        )
        raise UserError(f"{source}: multilingual; name the language ({named}).")
    if language not in [*known, "auto"]:
        raise UserError(f"{source}: no language '{language}'; it has {', '.join(known)}.")
    return language


# --- words ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """The reversible byte alphabet of byte-level BPE (Radford et al. 2019): printable characters
    stand for themselves, the other bytes for characters from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for; none for special tokens."""
    if token.startswith("<|") and token.endswith("|>"):
        return b""
    table = _bytes_of_characters()
    return bytes(table[character] for character in token)


def decode_tokens(tokens: Iterable[str]) -> str:
    """Text of byte-level BPE tokens."""
    return b"".join(map(token_bytes, tokens)).decode("utf-8", "replace")


def align_words(
    tokens: Sequence[str], starts_s: Sequence[float], probabilities: Sequence[float], end_s: float
) -> tuple[Word, ...]:
    """Words of tokens whose start times are known; `end_s` is where the last one ends.

    A word begins with a space, or with every character in languages written without spaces.
    """
    words: list[Word] = []
    pending = b""
    start, first = 0.0, 0
    spaced = any(token_bytes(token).startswith(b" ") for token in tokens[1:])
    bounds = [*starts_s, end_s]

    def finish(stop: int) -> None:
        nonlocal pending
        text = pending.decode("utf-8", "replace")
        pending = b""
        if not text.strip():
            return
        mean = math.fsum(probabilities[first:stop]) / max(1, stop - first)
        if words and not any(character.isalnum() for character in text):
            last = words[-1]  # punctuation belongs to the word before it
            words[-1] = Word(last.text + text.strip(), last.start_s, last.end_s, last.probability)
            return
        words.append(Word(text.strip(), round(start, 2), round(bounds[stop], 2), round(mean, 4)))

    for index, token in enumerate(tokens):
        piece = token_bytes(token)
        complete = "\ufffd" not in pending.decode("utf-8", "replace")
        if pending and complete and (piece.startswith(b" ") or not spaced):
            finish(index)
        if not pending:
            start, first = bounds[index], index
        pending += piece
    finish(len(tokens))
    return tuple(words)
