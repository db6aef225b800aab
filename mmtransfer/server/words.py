"""Words as an index has them, and those of a query."""

from __future__ import annotations

import re
import unicodedata

import regex

from mmtransfer.data.printing import whole_text
from mmtransfer.data.words import UNSPACED

_LONGEST_QUERY = 4096  # characters; no line has as many
_PREFIX_FROM = 3  # letters; with fewer, too many words begin
_OTHERS = regex.compile(r"[^\p{L}\p{N}\p{M}]")
_PIECES = re.compile(r'"([^"]*)"|([^\s"]+)')
_ASCII_WORD = re.compile("[a-z0-9]+")
_ACCENTS = re.compile("[\u0300-\u036f]")  # in other scripts marks are vowels
_LONGEST_WORD = 500  # characters; of a longer one they are its beginning


def spaced(text: str) -> str:
    """The words of a text, of scripts without spaces each letter, with spaces between them."""
    if text.isascii():  # the parsers of databases and Unicode agree
        return text
    return UNSPACED.sub(r" \g<0> ", _OTHERS.sub(" ", unicodedata.normalize("NFKC", text)))


def phrases(query: str) -> list[tuple[str, bool]] | None:
    """The words of a query that stand side by side, separated by spaces, and whether the last of
    them may go on. Empty for an empty query; None for one that no line can match.
    """
    if len(query) > _LONGEST_QUERY:
        return None
    found = []
    for piece in _PIECES.finditer(whole_text(query)):
        words = _OTHERS.sub(" ", spaced(piece[1] or piece[2] or "")).split()
        if words:
            is_open = piece[2] is not None and piece.end() == len(query)
            found.append((" ".join(words), is_open and len(words[-1]) >= _PREFIX_FROM))
    return found if found or not query.strip() else None


def folded_words(text: str) -> list[str]:
    """The words of a text that `spaced` gave, whatever their case and accents."""
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())
    else:
        plain = _ACCENTS.sub("", unicodedata.normalize("NFD", text.casefold()))
        found = unicodedata.normalize("NFC", plain).split()
    return [word[:_LONGEST_WORD] for word in found] if len(text) > _LONGEST_WORD else found
