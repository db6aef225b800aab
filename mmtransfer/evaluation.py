"""Scores with confidence intervals: WER and CER after a named, versioned normaliser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmtransfer.errors import UserError

_UNSPACED_LANGUAGES = {"zh", "yue", "ja", "th", "lo", "my", "km"}


def default_normalizer(language: str | None) -> str:
    """`english-v1` for English (and English-only models), else `basic-v1`."""
    return "english-v1" if language in (None, "en") else "basic-v1"


def speech_metric(language: str | None) -> str:
    """The metric that counts: `cer` for languages written without spaces, else `wer`."""
    return "cer" if language in _UNSPACED_LANGUAGES else "wer"


def get_normalizer(name: str) -> Callable[[str], str]:
    """A text normaliser by name.

    - `english-v1`: the English normaliser published with Whisper (Radford et al. 2022, appendix
      C), without its British-to-American spelling list.
    - `basic-v1`: its language-independent one: lower case, no symbols, single spaces.
    - `none-v1`: white space only.

    Raises:
        UserError: no such name.
    """
    from transformers.models.whisper.english_normalizer import (
        BasicTextNormalizer,
        EnglishTextNormalizer,
    )

    if name == "english-v1":
        english = EnglishTextNormalizer({})
        return lambda text: " ".join(english(text).split())
    if name == "basic-v1":
        basic = BasicTextNormalizer()
        return lambda text: " ".join(basic(text).split())
    if name == "none-v1":
        return lambda text: " ".join(text.split())
    raise UserError(f"{name}: no such normaliser; there are english-v1, basic-v1 and none-v1.")


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

    wer: float
    cer: float
    ci_low: float
    """Lower end of the 95 % bootstrap interval of the metric that counts for the language."""
    ci_high: float
    clips: int
    words: int
    silence_clips: int
    """Clips whose transcript is empty."""
    hallucinated_words: int
    """Words emitted on those."""
    normalizer: str
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where clips are in several languages: of each its clips, its metric and the rate by that."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def score_clip(reference: str, hypothesis: str, normalize: Callable[[str], str]) -> ClipScore:
    """Word and character errors of one clip. With an empty reference every word is an error."""
    import jiwer

    reference, hypothesis = normalize(reference), normalize(hypothesis)
    words, emitted = len(reference.split()), len(hypothesis.split())
    if not reference:
        return ClipScore(emitted, 0, len(hypothesis), 0, emitted)
    word = jiwer.process_words(reference, hypothesis)
    char = jiwer.process_characters(reference, hypothesis)
    return ClipScore(
        word_errors=word.substitutions + word.deletions + word.insertions,
        words=words,
        char_errors=char.substitutions + char.deletions + char.insertions,
        chars=len(reference),
        emitted=emitted,
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

    A set whose references are all empty has rate 0 if nothing was emitted, else infinity.

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
    low, high = np.percentile(rates, [2.5, 97.5]) if len(rates) else (0.0, 0.0)
    silence = [s for s in scores if s.words == 0]
    return SpeechScore(
        wer=_rate(sum(s.word_errors for s in scores), sum(s.words for s in scores)),
        cer=_rate(sum(s.char_errors for s in scores), sum(s.chars for s in scores)),
        ci_low=float(low),
        ci_high=float(high),
        clips=len(scores),
        words=sum(s.words for s in scores),
        silence_clips=len(silence),
        hallucinated_words=sum(s.emitted for s in silence),
        normalizer=normalizer,
    )


def _rate(errors: int, total: int) -> float:
    if total:
        return errors / total
    return float("inf") if errors else 0.0
