"""What nobody may find later is taken out of texts before anything is written or sent."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from mmtransfer.data.files import read_text
from mmtransfer.data.words import split_words, word_spans
from mmtransfer.errors import UserError
from mmtransfer.monitoring.keywords import THRESHOLD, similarity, sound
from mmtransfer.speech.engine import Hypothesis, Word

logger = logging.getLogger(__name__)
KINDS = ("phone", "email", "card")
Redaction = str | Mapping[str, str]
"""One of KINDS, `{"names": FILE}` with a name on each line, or `{"pattern": REGEX}`."""
HIDDEN = "redacted"
"""What is put in the place of what a pattern matches; in that of others, their kind."""
_PATTERN_S = 0.05  # for one pattern and one text
_NAMES_BYTES = 16 << 20
_PHONE_DIGITS, _CARD_DIGITS = 7, 13  # at least
_BEGUN_DIGITS = 3  # at the end of a text that may go on
_SOUND_LETTERS = 3  # of a name's code, to be found by its sound
_DIGIT = (
    r"\d|[零〇一二三四五六七八九]|"
    r"\b(?:zero|oh|one|two|three|four|five|six|seven|eight|nine|double|triple)\b"
)
_BETWEEN = r"(?:[\s().+/-]|,\s)*"  # 1,000,000 is no number to call
_DIGITS = re.compile(rf"[+(]*(?:{_DIGIT})(?:{_BETWEEN}(?:{_DIGIT}))*", re.IGNORECASE)
_ONE = re.compile(_DIGIT, re.IGNORECASE)
_EMAIL = re.compile(
    r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"
    # As it is spoken: jo dot smith at example dot com.
    r"|\b[\w.+-]{1,64}(?:\s(?:dot|underscore|dash)\s[\w-]{1,64}){0,4}\sat\s[\w-]{1,63}"
    r"(?:(?:\s(?:dot|dash)\s|[.-])[\w-]{1,63}){0,4}(?:\sdot\s|\.)[a-z]{2,24}\b",
    re.IGNORECASE,
)
Span = tuple[int, int, str]


class Redactor:
    """Takes phone numbers, addresses of mail, card numbers, names and what patterns match out of
    texts, and puts `[phone]`, `[email]`, `[card]`, `[name]` and `[redacted]` in their place.

    Digits count also where they are spelled out, in English and Chinese. A name is found whatever
    its case, and also where another one is written that sounds the same.

    Raises:
        UserError: a rule that there is none of, a file of names that cannot be used, or a pattern
            that is none.
    """

    def __init__(self, rules: Sequence[Redaction]):
        self._kinds: set[str] = set()
        self._patterns: list[Any] = []
        self._names: dict[int, set[str]] = {}  # by their number of words
        self._sounds: dict[str, list[str]] = {}
        for rule in rules:
            if isinstance(rule, str) and rule in KINDS:
                self._kinds.add(rule)
            elif isinstance(rule, Mapping) and list(rule) == ["names"]:
                self._add_names(Path(rule["names"]))
            elif isinstance(rule, Mapping) and list(rule) == ["pattern"]:
                self._patterns.append(_compiled(rule["pattern"]))
            else:
                raise UserError(
                    f"redact: expected {', '.join(KINDS)}, names: FILE or pattern: REGEX, found "
                    f"{rule!r:.80}."
                )

    def _add_names(self, path: Path) -> None:
        found = [split_words(line) for line in read_text(path, most=_NAMES_BYTES).splitlines()]
        if not any(found):
            raise UserError(f"{path}: expected a name on each line, found none.")
        for words in filter(None, found):
            self._names.setdefault(len(words), set()).add(" ".join(words))
            if len(words) == 1 and len(sound(words[0])) >= _SOUND_LETTERS:
                self._sounds.setdefault(sound(words[0]), []).append(words[0])

    @cached_property
    def _longest_name(self) -> int:
        return max(self._names, default=0)

    def text(self, text: str, *, is_open: bool = False) -> str:
        """A text without what is to be taken out; one that `is_open` may go on, so digits at its
        end count already when they are few.
        """
        for start, end, kind in reversed(self.spans(text, is_open=is_open)):
            text = f"{text[:start]}[{kind}]{text[end:]}"
        return text

    def hypothesis(self, found: Hypothesis) -> Hypothesis:
        """A hypothesis without it. Other words keep their times, and what stands for several words
        has the time of them all.
        """
        spans = self.spans(found.text)
        if not spans:
            return found
        return replace(found, text=self.text(found.text), words=_words_without(found, spans))

    def times(self, found: Hypothesis) -> list[tuple[float, float]]:
        """From when to when, in seconds, what is taken out of a hypothesis is spoken; all of it,
        where its words have no times or are not those of its text.
        """
        spans = self.spans(found.text)
        if not spans:
            return []
        times, at = [], 0
        for word in found.words:
            start = found.text.find(word.text, at)
            if start < 0:
                return [(0.0, math.inf)]
            at = start + len(word.text)
            if any(begin < at and start < end for begin, end, _ in spans):
                times.append((word.start_s, word.end_s))
        return times or [(0.0, math.inf)]

    def spans(self, text: str, *, is_open: bool = False) -> list[Span]:
        """Begin, end and kind of what is taken out, in order, none within another."""
        found = [*self._matches(text), *self._numbers(text, is_open=is_open), *self._named(text)]
        chosen: list[Span] = []
        for start, end, kind in sorted(found, key=lambda span: (span[0], -span[1])):
            if chosen and start < chosen[-1][1]:  # one goes with what it overlaps
                first, last, own = chosen[-1]
                chosen[-1] = (first, max(last, end), own)
            else:
                chosen.append((start, end, kind))
        return chosen

    def _matches(self, text: str) -> Iterator[Span]:
        if "email" in self._kinds:
            yield from ((*match.span(), "email") for match in _EMAIL.finditer(text))
        for pattern in self._patterns:
            try:
                matches = list(pattern.finditer(text, timeout=_PATTERN_S))
            except TimeoutError:  # better all of it than what it was to find
                logger.warning("redact: a pattern took too long; the whole text is taken out")
                matches = []
                yield (0, len(text), HIDDEN)
            yield from ((*m.span(), HIDDEN) for m in matches if m.end() > m.start())

    def _numbers(self, text: str, *, is_open: bool) -> Iterator[Span]:
        if not self._kinds & {"phone", "card"}:
            return
        for match in _DIGITS.finditer(text):
            count = len(_ONE.findall(match[0]))
            if is_open and count >= _BEGUN_DIGITS and not text[match.end() :].strip(" .,-()"):
                count = max(count, _PHONE_DIGITS if "phone" in self._kinds else _CARD_DIGITS)
            if "card" in self._kinds and count >= _CARD_DIGITS:
                yield (*match.span(), "card")
            elif "phone" in self._kinds and count >= _PHONE_DIGITS:
                yield (*match.span(), "phone")

    def _named(self, text: str) -> Iterator[Span]:
        if not self._names:
            return
        words = word_spans(text)
        for place, (word, start, _) in enumerate(words):
            for size in range(min(self._longest_name, len(words) - place), 0, -1):
                part = words[place : place + size]
                if " ".join(w for w, _, _ in part) in self._names.get(size, ()):
                    yield (start, part[-1][2], "name")
                    break
            else:
                alike = self._sounds.get(sound(word), ()) if self._sounds else ()
                if any(similarity(word, name) >= THRESHOLD for name in alike):
                    yield (start, words[place][2], "name")


def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern, regex.IGNORECASE)
    except (regex.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"redact: expected a regular expression, found one with {error}.") from None


def _words_without(found: Hypothesis, spans: Sequence[Span]) -> tuple[Word, ...]:
    """The words with those of each span as one; none where they are not those of the text."""
    words: list[Word] = []
    at, last = 0, -1  # the last span that a word is of
    for word in found.words:
        start = found.text.find(word.text, at)
        if start < 0:
            return ()
        at = start + len(word.text)
        own = [n for n, (begin, end, _) in enumerate(spans) if begin < at and start < end]
        if not own:
            words.append(word)
            continue
        text = word.text
        for number in reversed(own):
            begin, end, kind = spans[number]
            put = f"[{kind}]" if number > last else ""
            text = text[: max(0, begin - start)] + put + text[max(0, end - start) :]
        if own[0] == last:  # it goes on; what stands behind it in this word stays
            words[-1] = Word(
                *(words[-1].text + text.lstrip(), words[-1].start_s, word.end_s),
                min(words[-1].probability, word.probability),
            )
        else:
            words.append(Word(text, word.start_s, word.end_s, word.probability))
        last = own[-1]
    return tuple(words)
