"""Keywords: words and phrases that raise an alert, also if they are transcribed with errors."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from mmtransfer.data.words import split_words
from mmtransfer.errors import UserError

THRESHOLD = 0.8
"""Similarity from which a keyword counts as spoken; 1 is letter for letter."""
_SOUND_WEIGHT = 0.95  # equal sound counts a little less than equal letters
_SPELLING_FLOOR = 0.5  # less alike than this, sound alone is no evidence
_SOUNDS_AT_LEAST = 3  # two consonants alone (fire, fair, four) distinguish nothing
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
    """A keyword in a text."""

    keyword: str
    matched: str
    """The words of the text that matched."""
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


def similarity(words: str, keyword: str) -> float:
    """How alike two words (or phrases without spaces) are, by letters or by sound: 0 to 1."""
    if words == keyword:
        return 1.0
    if min(len(words), len(keyword)) <= _EXACT_LETTERS:
        return 0.0
    letters = float(Levenshtein.normalized_similarity(words, keyword))
    if letters < _SPELLING_FLOOR:
        return letters
    one, other = sound(words), sound(keyword)
    if min(len(one), len(other)) < _SOUNDS_AT_LEAST:
        return letters
    return max(letters, _SOUND_WEIGHT * float(Levenshtein.normalized_similarity(one, other)))


class Keywords:
    """Words and phrases to find in transcripts; those of the same words are one.

    Raises:
        UserError: a keyword without a letter.
    """

    def __init__(self, keywords: Iterable[str], *, threshold: float = THRESHOLD):
        self._threshold = threshold
        self._keywords: dict[tuple[str, ...], str] = {}  # by their words
        for keyword in keywords:
            units = tuple(split_words(keyword))
            if not units:
                raise UserError(f"keywords: expected words, found {keyword!r}.")
            self._keywords.setdefault(units, keyword)

    def __bool__(self) -> bool:
        return bool(self._keywords)

    def find(self, text: str) -> list[Match]:
        """The keywords in a text, each once, at its best match."""
        units = split_words(text)
        found = []
        for wanted, keyword in self._keywords.items():
            best = Match(keyword, "", 0.0)
            whole = "".join(wanted)
            # A recogniser joins words and splits them, so one more and one less is looked at.
            for size in range(max(1, len(wanted) - 1), len(wanted) + 2):
                for start in range(len(units) - size + 1):
                    words = units[start : start + size]
                    score = similarity("".join(words), whole)
                    if score > best.score:
                        best = Match(keyword, " ".join(words), round(score, 3))
            if best.score >= self._threshold:
                found.append(best)
        return found
