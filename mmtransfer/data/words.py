"""Words of any script: letters with their marks, and how long they take to say."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
    r"\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Characters of scripts that are written without spaces between words."""
_SYLLABIC = re.compile(r"[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_LETTERS_PER_SYLLABLE = 2.5
_VOWELS = re.compile(r"[aeiouyаеёиоуыэюяіїєαεηιουω]+")


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """Words with the places where they begin and end; in scripts that are written without spaces
    each letter is one. A word has one form whatever its case and its code points.
    """
    found: list[list[int]] = []
    is_open = False  # whether the last word goes on
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if category == "Cf":  # joins letters, or says how they are shown
            continue
        if category[0] == "M":
            if found and is_open:
                found[-1][1] = place + 1
            continue
        if category[0] not in "LN":
            is_open = False
            continue
        is_alone = bool(UNSPACED.match(character))
        if is_open and not is_alone and not UNSPACED.match(text[found[-1][0]]):
            found[-1][1] = place + 1
        else:
            found.append([place, place + 1])
        is_open = True
    return [
        (unicodedata.normalize("NFKC", text[start:end]).casefold(), start, end)
        for start, end in found
    ]


def split_words(text: str) -> list[str]:
    """The words of `word_spans` alone."""
    return [word for word, _, _ in word_spans(text)]


def syllables(word: str) -> int:
    """About how many syllables a word has, at least one."""
    plain = unicodedata.normalize("NFKD", word)
    if _SYLLABIC.search(word):  # a character is one
        return len(_SYLLABIC.findall(word))
    count = len(_VOWELS.findall(plain))
    if count > 1 and plain.endswith("e") and not plain.endswith("le"):
        count -= 1  # mute in English and French, and one too few elsewhere
    letters = sum(character.isalpha() for character in plain)
    digits = sum(character.isdigit() for character in plain)
    return max(1, count or letters // 2) + max(0, digits - 1)


def spoken_syllables(words: Sequence[str]) -> float:
    """About how many syllables words of `split_words` have, together."""
    # Thai, Lao, Khmer and Burmese are taken letter by letter; several make a syllable.
    letters = [word for word in words if UNSPACED.match(word) and not _SYLLABIC.match(word)]
    return sum(map(syllables, words)) - len(letters) * (1 - 1 / _LETTERS_PER_SYLLABLE)
