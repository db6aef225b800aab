"""Scores with confidence intervals: WER and CER after a named, versioned normaliser."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmtransfer.data.words import split_words
from mmtransfer.errors import UserError

NORMALIZERS = ("english-v2", "basic-v2", "unspaced-v2", "none-v1")
_UNSPACED_LANGUAGES = {"zh", "yue", "ja", "th", "lo", "my", "km"}
# Vowel points and reading signs, which are written in some texts and left out in most, and what
# only lengthens a line; not madda and hamza, which make other letters. Variants of a glyph.
_OPTIONAL = re.compile(
    r"[\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4"
    r"\u06e7\u06e8\u06ea-\u06ed\u0897-\u089f\u08ca-\u08e1\u08e3-\u08ff"
    r"\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
# Thai and Lao am is typed as one letter, or as two with the tone on either.
_TONE_FIRST = re.compile(r"([\u0e48-\u0e4b\u0ec8-\u0ecb])([\u0e4d\u0ecd])")
_BRACKETS, _PARENTHESES = re.compile(r"[<\[][^>\]]*[>\]]"), re.compile(r"\(([^)]+?)\)")
_LONG_TEXT = 4000  # characters; a segment has at most a few hundred
_OPEN, _LONG_DIGITS = re.compile(r"[(<\[]"), re.compile(r"\d{100}")
_PRIVATE = 0xF0000  # where characters for private use begin


def default_normalizer(language: str | None) -> str:
    """`english-v2` for English (and English-only models), `unspaced-v2` for languages written
    without spaces, else `basic-v2`.
    """
    if language in _UNSPACED_LANGUAGES:
        return "unspaced-v2"
    return "english-v2" if language in (None, "en") else "basic-v2"


def speech_metric(language: str | None) -> str:
    """The metric that counts: `cer` for languages written without spaces, else `wer`."""
    return "cer" if language in _UNSPACED_LANGUAGES else "wer"


@dataclass(frozen=True)
class Normalizer:
    """What makes texts comparable: one form, and the words and characters that are counted."""

    name: str
    form: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """The text in the one form, with single spaces."""
        return " ".join(self.form(text).split())

    def words(self, normal: str) -> list[str]:
        """Words of a text in that form; without spaces between them, each letter is one."""
        return split_words(normal) if self._is_unspaced else normal.split()

    def characters(self, normal: str) -> str:
        """What the character error rate counts of a text in that form."""
        return normal.replace(" ", "") if self._is_unspaced else normal

    @property
    def _is_unspaced(self) -> bool:
        return self.name.startswith("unspaced")


def get_normalizer(name: str) -> Normalizer:
    """A text normaliser by name.

    - `english-v2`: the English normaliser published with Whisper (Radford et al. 2022, appendix
      C), without its British-to-American spelling list.
    - `basic-v2`: its language-independent one: lower case, no symbols, single spaces.
    - `unspaced-v2`: the same, and white space does not count.
    - `none-v1`: white space only.

    Other than in the published ones (and in our v1), combining marks stay with their letter, as
    the vowels of Hindi, Tamil, Thai, Burmese and Khmer do; English drops those of Latin letters.
    The optional points of Arabic and Hebrew and characters without a shape are dropped.

    Raises:
        UserError: no such name.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    if name == "english-v2":
        english = EnglishTextNormalizer({})
        return Normalizer(name, lambda text: _english(english, text))
    if name in ("basic-v2", "unspaced-v2"):
        return Normalizer(name, _basic)
    if name == "none-v1":
        return Normalizer(name, str)
    raise UserError(f"{name}: no such normaliser; there are {', '.join(NORMALIZERS)}.")


def _english(published: Callable[[str], str], text: str) -> str:
    text = _unbracketed(" ".join(text.split()))
    if len(text) > _LONG_TEXT:  # the published expressions take the square of what is left of them
        text = " ".join(_LONG_DIGITS.sub(r"\g<0> ", _OPEN.sub(" ", text)).split())
    words = _shown(published(_hidden(_essential(text)))).split()
    return " ".join(word for word in words if any(map(str.isalnum, word)))  # "..." is none


def _basic(text: str) -> str:
    text = _unbracketed(text.lower())
    text = unicodedata.normalize("NFKC", _essential(text)).lower().replace("i\u0307", "i")
    text = _TONE_FIRST.sub(r"\2\1", text)
    kept: list[str] = []
    for character in text:
        kind = unicodedata.category(character)[0]
        if kind != "M":
            kept.append(" " if kind in "SP" else character)
        elif kept and not kept[-1].isspace():  # the mark of a symbol goes with it
            kept.append(character)
    return "".join(kept)


def _unbracketed(text: str) -> str:
    """A text without what is in brackets, which is not speech; in time linear in its length."""
    for pattern, ends in ((_BRACKETS, ">]"), (_PARENTHESES, ")")):
        end = 1 + max(text.rfind(mark) for mark in ends)
        text = pattern.sub("", text[:end]) + text[end:]
    return text


def _essential(text: str) -> str:
    """A text without what may be left out: the points of Arabic and Hebrew, and what has no shape
    of its own (joiners, directions, soft hyphens, variants of emoji).
    """
    if text.isascii():
        return text
    # Forms with points in them are letters of their own until they are taken apart.
    parted = "".join(
        unicodedata.normalize("NFKD", character) if "\ufb1d" <= character <= "\ufefc" else character
        for character in text
    )
    kept = [c for c in parted if unicodedata.category(c) not in ("Cf", "Me")]
    return _OPTIONAL.sub("", "".join(kept))


def _hidden(text: str) -> str:
    """Marks on letters that are not Latin as characters for private use, which the published
    English normaliser leaves alone.
    """
    kept: list[str] = []
    is_latin = True
    for character in text:
        parts = unicodedata.normalize("NFD", character)
        letter, marks = parts[:1], parts[1:]
        if unicodedata.category(letter)[0] == "M":
            letter, marks = "", parts
        elif letter.isalpha():
            is_latin = "LATIN" in unicodedata.name(letter, "")
        else:
            is_latin = True
        if is_latin or any(unicodedata.category(mark)[0] != "M" for mark in marks):
            kept.append(character)
        else:
            kept += [letter, *(chr(ord(mark) + _PRIVATE) for mark in marks)]
    return "".join(kept)


def _shown(text: str) -> str:
    """The text with the marks that `_hidden` put away."""
    if text.isascii():
        return text
    marks = [chr(ord(c) - _PRIVATE) if ord(c) >= _PRIVATE else c for c in text]
    return unicodedata.normalize("NFC", "".join(marks))


@dataclass(frozen=True)
class ClipScore:
    """Edit counts of one clip."""

    word_errors: int
    words: int
    char_errors: int
    chars: int
    emitted: int
    """Words in the hypothesis."""


@dataclass(frozen=True)
class SpeechScore:
    """Scores of a set of clips."""

    wer: float | None
    """None where it is undefined: no words in any transcript."""
    cer: float | None
    ci_low: float | None
    """Lower end of the 95 % bootstrap interval of the metric that counts for the language."""
    ci_high: float | None
    clips: int
    words: int
    silence_clips: int
    """Clips whose transcript is empty."""
    hallucinated_words: int
    """Words emitted on those."""
    normalizer: str
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where clips are in several languages: of each its clips, its metric and the rate by that."""
    outcomes: dict[str, list[int]] = field(default_factory=dict, repr=False)
    """`errors` and `units` of each clip, by the metric that counts."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def score_clip(reference: str, hypothesis: str, normalize: Normalizer) -> ClipScore:
    """Word and character errors of one clip. With an empty reference every word is an error."""
    import jiwer

    reference, hypothesis = normalize(reference), normalize(hypothesis)
    words, emitted = normalize.words(reference), normalize.words(hypothesis)
    reference, hypothesis = normalize.characters(reference), normalize.characters(hypothesis)
    if not reference:
        return ClipScore(len(emitted), 0, len(hypothesis), 0, len(emitted))
    word = jiwer.process_words(" ".join(words), " ".join(emitted))
    char = jiwer.process_characters(reference, hypothesis)
    return ClipScore(
        word_errors=word.substitutions + word.deletions + word.insertions,
        words=len(words),
        char_errors=char.substitutions + char.deletions + char.insertions,
        chars=len(reference),
        emitted=len(emitted),
    )


def summarize_speech(
    scores: Sequence[ClipScore],
    *,
    normalizer: str,
    metric: str = "wer",
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> SpeechScore:
    """Corpus-level rates (all errors over all reference units), with an interval from resampling
    clips (Bisani & Ney 2004).

    Rates of a set whose references are all empty are undefined: None, with their interval.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no clips to score")
    units = ("word_errors", "words") if metric == "wer" else ("char_errors", "chars")
    errors, totals = (np.array([getattr(s, unit) for s in scores], float) for unit in units)
    counts = np.random.default_rng(seed).multinomial(
        len(scores), np.full(len(scores), 1 / len(scores)), size=bootstrap_samples
    )
    sampled_totals = counts @ totals
    rates = (counts @ errors)[sampled_totals > 0] / sampled_totals[sampled_totals > 0]
    low, high = map(float, np.percentile(rates, [2.5, 97.5])) if len(rates) else (None, None)
    silence = [s for s in scores if s.words == 0]
    return SpeechScore(
        wer=_rate(sum(s.word_errors for s in scores), sum(s.words for s in scores)),
        cer=_rate(sum(s.char_errors for s in scores), sum(s.chars for s in scores)),
        ci_low=low,
        ci_high=high,
        clips=len(scores),
        words=sum(s.words for s in scores),
        silence_clips=len(silence),
        hallucinated_words=sum(s.emitted for s in silence),
        normalizer=normalizer,
        outcomes={
            "errors": [getattr(s, units[0]) for s in scores],
            "units": [getattr(s, units[1]) for s in scores],
        },
    )


def _rate(errors: int, total: int) -> float | None:
    return errors / total if total else None
