"""Texts of others on their way out: to terminals, subtitles, JSON lines and spreadsheets, none of
which they may steer. What writes a text for one of these writes it through here.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

# Controls (also those of eight bits), line and paragraph separators, halves of surrogate pairs; and
# what turns the direction of writing to the end of the line, so that a name looks like another.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HALVES = re.compile(r"[\ud800-\udfff]")
# What spreadsheets take for a formula that calls something: DDE, functions, other sheets.
_FORMULA = re.compile(r"\s*(?:=|[+\-@][^\s(|!]*[(|!])")


def printable(text: str) -> str:
    r"""A text on one line, as files and terminals take it: bytes that are no UTF-8, and characters
    that steer them, are written as in `\x0a` and `\u202e`.
    """
    return _STEERING.sub(_code, text)


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number >= 0xD800:  # a byte that is no UTF-8
        number &= 0xFF
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def whole_text(text: str) -> str:
    """A text with U+FFFD for halves of surrogate pairs (a cut emoji, bytes that are no UTF-8),
    which neither tokenizers nor files take.
    """
    return text if text.isascii() else _HALVES.sub("\ufffd", text)


def json_line(value: Any) -> str:
    """A value as one line of JSON, in which what would steer a terminal is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if text.isascii() and "\x7f" not in text:  # others are escaped in JSON anyway
        return text
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def spreadsheet_cell(value: Any) -> Any:
    """A cell of a CSV file; one that a spreadsheet would run as a formula gets an apostrophe before
    it, which spreadsheets take for the mark of a text (OWASP, CSV injection).
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def shortened(value: Any, most: int = 200) -> str:
    """A value as a message shows it: the beginning of it, however large it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, most, most
    return short.repr(value)
