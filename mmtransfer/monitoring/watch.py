"""Watch words: phrases to be told of, found although the recogniser slips."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from mmtransfer.data.words import split_words
from mmtransfer.errors import UserError

THRESHOLD = 0.8
"""Similarity from which a phrase counts as said; 1 is letter for letter."""
_SOUND_WEIGHT = 0.95  # equal sound counts a little less than equal letters
_SPELLING_FLOOR = 0.5  # less alike than this, sound alone is no evidence
_SOUNDS_AT_LEAST = 3  # two consonants alone (fire, fair, four) tell nothing
_EXACT_LETTERS = 3  # shorter words are too like others to be guessed
_SOUNDS = [
    (r"ph", "f"),
    (r"gh(?=[^aeiou]|$)", ""),
    (r"sch|tch|sh|ch|j", "x"),
    (r"th", "t"),
    (r"qu", "kw"),
    (r"c(?=[eiy])", "s"),
    (r"ck|[cqg]", "k"),
    (r"x(?!$)", "ks"),
    (r"z", "s"),
    (r"v", "f"),
    (r"d", "t"),
    (r"b", "p"),
    (r"(?<=.)[aeiouyhw]+", ""),
    (r"^[aeiouy]+", "a"),
    (r"(.)\1+", r"\1"),
]


@dataclass(frozen=True)
class Match:
    """A phrase in a text."""

    phrase: str
    said: str
    """The words that were taken for it."""
    score: float
    """Similarity, from the threshold to 1."""


def sound(word: str) -> str:
    """A rough code of how a word sounds: consonants alone, voiced and unvoiced ones alike.

    In the manner of Metaphone (Philips 1990), simplified: what recognisers mix up gets one letter.
    """
    plain = unicodedata.normalize("NFKD", word.casefold())
    code = "".join(character for character in plain if character.isalnum())
    for pattern, letter in _SOUNDS:
        code = re.sub(pattern, letter, code)
    return code


def similarity(said: str, wanted: str) -> float:
    """How alike two words (or phrases without spaces) are, by letters or by sound: 0 to 1."""
    if said == wanted:
        return 1.0
    if min(len(said), len(wanted)) <= _EXACT_LETTERS:
        return 0.0
    letters = float(Levenshtein.normalized_similarity(said, wanted))
    if letters < _SPELLING_FLOOR:
        return letters
    one, other = sound(said), sound(wanted)
    if min(len(one), len(other)) < _SOUNDS_AT_LEAST:
        return letters
    return max(letters, _SOUND_WEIGHT * float(Levenshtein.normalized_similarity(one, other)))


class WatchList:
    """Phrases to look for.

    Raises:
        UserError: a phrase without a letter.
    """

    def __init__(self, phrases: Iterable[str], *, threshold: float = THRESHOLD):
        self._threshold = threshold
        self._phrases: list[tuple[str, list[str]]] = []
        for phrase in phrases:
            units = split_words(phrase)
            if not units:
                raise UserError(f"watch words: expected words, found {phrase!r}.")
            self._phrases.append((phrase, units))

    def __bool__(self) -> bool:
        return bool(self._phrases)

    def find(self, text: str) -> list[Match]:
        """The phrases that a text holds, each once, at its best place."""
        units = split_words(text)
        found = []
        for phrase, wanted in self._phrases:
            best = Match(phrase, "", 0.0)
            whole = "".join(wanted)
            # A recogniser joins words and splits them, so one more and one less is looked at.
            for size in range(max(1, len(wanted) - 1), len(wanted) + 2):
                for start in range(len(units) - size + 1):
                    said = units[start : start + size]
                    score = similarity("".join(said), whole)
                    if score > best.score:
                        best = Match(phrase, " ".join(said), round(score, 3))
            if best.score >= self._threshold:
                found.append(best)
        return found
