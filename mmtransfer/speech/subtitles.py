"""Subtitles as people have them: SRT and WebVTT into cues of what is said.

A cue's text is everything up to the next time line, whatever blank lines lie between. What cannot
be understood is refused with its line; what is left out is counted and said.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from html.entities import html5
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from mmtransfer.data.encodings import decode_text
from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
_SHORTEST_S = 0.05  # nothing is said in less
_ADJOINING_S = 0.1  # between cues that follow each other on the screen
_ROLLING = 0.3  # of cues that repeat what stood on the screen
_OVERLAPPING = 0.5  # of cues that end behind the next one's start
_MOSTLY = 0.8  # of cues that have a number or name, where all have one
_ALL_EMPTY = 0.9  # of cues without text
_WORDS, _MOST_SHARED = 3, 100  # words that are no chance when two cues share them

_CLOCK = r"(?:(\d{1,4})\s?:\s?)?(\d{1,3})\s?:\s?(\d{1,2})(?:\s?[.,:]\s?(\d{1,9}))?"
_FULL = r"\d{1,4}\s?:\s?\d{1,2}\s?:\s?\d{1,2}\s?[.,:]\s?\d{1,9}"
_TIMES = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?![\w:])")
_USUAL = r"(\d\d):(\d\d):(\d\d)[.,](\d{3})"
_USUAL_TIMES = re.compile(rf"{_USUAL} --> {_USUAL}(?!\S)")
# Other arrows, and none, where nothing else stands on the line than two whole times.
_OTHER_TIMES = re.compile(rf"\s*{_CLOCK}\s{{0,3}}[-–—=>→,;|~]{{1,4}}\s?>?\s{{0,3}}{_CLOCK}\s*")
_TWO_FULL = re.compile(rf"\s*{_FULL}\s{{0,3}}[-–—=>→,;|~]{{1,4}}\s?>?\s{{0,3}}{_FULL}\s*")
_LIKE_TIME = re.compile(r"(?=[^\d]*\d)(?=[^:;.,]*[:;.,])[\dOoIlSB\s:;.,]{3,30}")
_NUMBER = re.compile(r"\s*(\d{1,9})\s*")
_BLOCK = re.compile(r"(NOTE|STYLE|REGION)(\s|$)")  # of WebVTT, up to a blank line

_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>|<[\d:.]+>|\{\\[^{}\n]*\}")
_BREAK = re.compile(r"<br\s*/?>|\\[Nn]|</?(?:p|div)\b[^<>\n]*>", re.IGNORECASE)
_HAS_BREAK = re.compile(r"<[/bBpPdD]")
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Marks of direction, byte order and possible breaks, which nobody says.
_UNSEEN = dict.fromkeys([0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
_UNSEEN |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])


class Cue(NamedTuple):
    """A stretch of a recording and what is said in it."""

    start: float
    """Seconds into the recording."""
    end: float
    lines: tuple[str, ...]
    """As they are shown, without tags."""
    line: int
    """Where its time stands in the file."""

    @property
    def text(self) -> str:
        """What is said; empty for silence."""
        return " ".join(self.lines)


def read_subtitles(path: Path, *, language: str | None = None) -> list[Cue]:
    """Cues of an SRT or WebVTT file with what is new in each; `language` helps to find out the
    encoding of a file that is not UTF-8.

    Raises:
        UserError: an encoding that is not known, a time that cannot be read, no cues, or hardly
            any with text.
    """
    decoded = decode_text(path.read_bytes(), language)
    if decoded is None:
        raise UserError(
            f"{path}: not UTF-8, and no other encoding fits what is in it. Save it as UTF-8."
        )
    text, encoding = decoded
    if not encoding.startswith(("utf-8", "utf-16", "utf-32")):
        logger.warning(
            "%s: not UTF-8, taken to be %s; save it as UTF-8 to be sure", path.name, encoding
        )
    cues = parse_subtitles(text, path, is_vtt=path.suffix.lower() == ".vtt")
    if not cues:
        raise UserError(f"{path}: no subtitle cues found; expected SRT or WebVTT.")
    empty = sum(not cue.lines for cue in cues)
    if empty >= _ALL_EMPTY * len(cues):
        raise UserError(
            f"{path}: {empty} of {len(cues)} cues have no text; expected text below each time. "
            "Export the file again."
        )
    if empty:
        logger.info("%s: %d of %d cues have no text: silence", path.name, empty, len(cues))
    return _spoken(cues, path)


def parse_subtitles(text: str, path: Path | str = "", *, is_vtt: bool = False) -> list[Cue]:
    """Cues of an SRT or WebVTT text as they are shown, one for each time; `path` is for messages.

    Raises:
        UserError: a time that cannot be read.
    """
    # Line ends are converted twice by some programs: CR CR LF is one.
    text = text.lstrip("\ufeff")
    lines = (re.sub(r"\r*\n|\r", "\n", text) if "\r" in text else text).split("\n")
    is_vtt = is_vtt or lines[0].startswith("WEBVTT")
    spans = _spans(lines, path)
    if not spans:
        return []
    header = -1
    if is_vtt:
        _leave_out_blocks(lines, {number for number, _, _ in spans})
        if lines[0].startswith("WEBVTT"):
            first = spans[0][0]
            header = next((n for n in range(first) if not lines[n].strip()), first) - 1
    names = _cue_names(lines, [number for number, _, _ in spans], header, is_vtt)
    ends = [number for number, _, _ in spans[1:]] + [len(lines)]
    cues = []
    for (number, start, end), stop in zip(spans, ends, strict=True):
        shown: list[str] = []
        for index in range(number + 1, stop):
            line = lines[index]
            if line and index not in names:
                shown += _clean(line)
        cues.append(Cue(start, end, tuple(shown), number + 1))
    return cues


def _spans(lines: Sequence[str], path: Path | str) -> list[tuple[int, float, float]]:
    """(index of the line, start, end) of every time line."""
    found = []
    unreadable = []
    for number, line in enumerate(lines):
        if ":" not in line:
            continue
        span = _span(line)
        if span is not None:
            found.append((number, *span))
        elif _is_like_times(line):
            unreadable.append(number)
    if unreadable:
        first = unreadable[0]
        more = f" {len(unreadable) - 1} more like it." if len(unreadable) > 1 else ""
        raise UserError(
            f"{path}:{first + 1}: expected times such as 00:00:03,250 --> 00:00:05,000, found "
            f"{lines[first].strip()[:60]!r}.{more}"
        )
    return found


def _span(line: str) -> tuple[float, float] | None:
    """Start and end in seconds that a line names; None if it is no time line."""
    if usual := _USUAL_TIMES.match(line):  # nearly all, in a third of the time
        a, b, c, d, e, f, g, h = map(int, usual.groups())
        if max(b, c, f, g) < 60:
            return a * 3600 + b * 60 + c + d / 1000, e * 3600 + f * 60 + g + h / 1000
    match = _TIMES.match(line) if "-->" in line else None
    if match is None and _TWO_FULL.fullmatch(line):
        match = _OTHER_TIMES.fullmatch(line)
    if match is None:
        return None
    times = [_seconds(*match.groups()[:4]), _seconds(*match.groups()[4:])]
    if times[0] is None or times[1] is None:
        return None
    return times[0], times[1]


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float | None:
    """The time in seconds; None for 61 minutes of an hour or seconds of a minute, and for a time of
    two numbers, which anything may be.
    """
    if int(seconds) > 59 or (hours is not None and int(minutes) > 59):
        return None
    if hours is None and fraction is None:
        return None
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    if fraction is None:
        return float(whole)
    return whole + int(fraction if len(fraction) == 3 else fraction[:3].ljust(3, "0")) / 1000


def _is_like_times(line: str) -> bool:
    """Whether a line is meant to be a time line."""
    left, arrow, right = line.partition("-->")
    if not arrow:
        return False
    tail = right.strip()[:30]
    return bool(
        _LIKE_TIME.fullmatch(left.strip())
        or (not left.strip() and re.match(_FULL, tail))
        or re.fullmatch(_FULL, tail)
    )


def _leave_out_blocks(lines: list[str], times: set[int]) -> None:
    """Empty the lines of comments, styles and regions."""
    inside = False
    for number, line in enumerate(lines):
        if number in times or not line.strip():
            inside = False
        elif inside or (_BLOCK.match(line) and (not number or not lines[number - 1].strip())):
            inside = True
            lines[number] = ""


def _cue_names(lines: Sequence[str], times: list[int], header: int, is_vtt: bool) -> set[int]:
    """Lines above times that number or name the cues."""
    # The last line with text above each time, that is not a time or the header.
    above: list[int | None] = []
    for before, number in pairwise([header, *times]):
        last = number - 1
        while last > before and not lines[last].strip():
            last -= 1
        above.append(last if last > before else None)
    numbers = [_NUMBER.fullmatch(lines[n]) if n is not None else None for n in above]
    counted = [int(match.group(1)) if match else None for match in numbers]
    at_times = set(times)
    if _are_numbers(counted, [n is not None and n - 1 in at_times for n in above]):
        return {n for n, match in zip(above, numbers, strict=True) if n is not None and match}
    if not is_vtt:
        return set()
    # A name stands directly above the time, with a blank line before it.
    names = {
        n
        for n, number in zip(above, times, strict=True)
        if n is not None and n == number - 1 and (n == header + 1 or not lines[n - 1].strip())
    }
    return names if _is_regular(lines, at_times, header) or _mostly(names, times) else set()


def _are_numbers(counted: Sequence[int | None], is_first_line: Sequence[bool]) -> bool:
    """Whether what stands above times are their numbers: above nearly all, the first one included;
    or, where that was cut off, numbers that go up by one and are not all there is of a cue.
    """
    there = [value for value in counted if value is not None]
    if counted[0] is not None:
        return len(there) >= _MOSTLY * len(counted)
    if not there or len(there) < _MOSTLY * (len(counted) - 1) or any(is_first_line):
        return False
    return there[0] == 2 if len(there) == 1 else all(b == a + 1 for a, b in pairwise(there))


def _mostly(names: set[int], times: list[int]) -> bool:
    return times[0] - 1 in names and len(names) >= _MOSTLY * len(times)


def _is_regular(lines: Sequence[str], times: set[int], header: int) -> bool:
    """Whether blank lines stand between cues alone: each block begins with a time, or has it on its
    second line.
    """
    starts = (
        n
        for n in range(header + 1, len(lines))
        if lines[n].strip() and (n == header + 1 or not lines[n - 1].strip())
    )
    return all(n in times or n + 1 in times for n in starts)


def _clean(line: str) -> list[str]:
    """What of a line is shown, with single spaces; several lines where it is broken by a tag."""
    if line.isascii() and not ("<" in line or "&" in line or "\\" in line):  # most lines
        clean = " ".join(line.split())
        return [clean] if clean else []
    parts = [line]
    if "<" in line or "\\" in line:
        if "\\" in line or _HAS_BREAK.search(line):
            line = _BREAK.sub("\n", line)
        parts = _TAG.sub("", line).split("\n")
    if "&" in line:
        parts = [_ENTITY.sub(_character, part) for part in parts]  # what it gives is no tag
    parts = [part if part.isascii() else part.translate(_UNSEEN) for part in parts]
    return [clean for part in parts if (clean := " ".join(part.split()))]


def _character(match: re.Match[str]) -> str:
    name = match.group(1)
    if name[0] != "#":
        return html5.get(f"{name};", match.group())
    code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
    is_character = 0 < code < 0x110000 and not 0xD800 <= code < 0xE000
    return chr(code) if is_character else match.group()


def escape_subtitle(text: str, *, is_vtt: bool) -> str:
    """A text as a cue of WebVTT or SRT holds it, so that reading it gives the text.

    In WebVTT all marks of tags and entities are escaped; players show SRT as it is, so there only
    what would be taken for one.
    """
    if is_vtt:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
    else:
        text = _ENTITY.sub(lambda match: f"&amp;{match.group(1)};", text)
    for pattern in (_TAG, _BREAK):
        text = pattern.sub(lambda match: _escaped(match.group()), text)
    return text.replace("-->", "--&gt;")


def _escaped(tag: str) -> str:
    return f"&#{ord(tag[0])};{tag[1:]}"


# --- what is said --------------------------------------------------------------------------------


def _spoken(cues: list[Cue], path: Path) -> list[Cue]:
    """Cues that are long enough to be said, with what is new in each."""
    is_rolling = _is_rolling(cues)
    kept = list(_new_text(cues)) if is_rolling else cues
    repeated = len(cues) - len(kept)
    if is_rolling:
        logger.info(
            "%s: rolling captions; %d cues that only repeat are left out, of the others what is "
            "new is kept",
            path.name,
            repeated,
        )
    short = [cue.line for cue in kept if cue.end - cue.start < _SHORTEST_S]
    if short:
        logger.warning(
            "skipped: %s: %d cues that do not last, first at line %d",
            path.name,
            len(short),
            short[0],
        )
        kept = [cue for cue in kept if cue.end - cue.start >= _SHORTEST_S]
    late = [b.start < a.end - _SHORTEST_S and b.start > a.start for a, b in pairwise(kept)]
    if len(late) > 2 and sum(late) >= _OVERLAPPING * len(late):
        # They stand on the screen longer than they are said.
        logger.info("%s: %d cues end where the next one begins", path.name, sum(late))
        kept = [
            cue._replace(end=following.start) if is_late else cue
            for cue, following, is_late in zip(
                kept, [*kept[1:], kept[-1]], [*late, False], strict=True
            )
        ]
        kept = [cue for cue in kept if cue.end - cue.start >= _SHORTEST_S]
    if not kept:
        raise UserError(f"{path}: none of its {len(cues)} cues lasts long enough to be said.")
    return kept


def _is_rolling(cues: Sequence[Cue]) -> bool:
    """Whether cues begin with what stands on the screen already, as live and automatic captions do.

    Somebody may say a thing twice; then the second cue has nothing else in it, and lasts.
    """
    repeating = 0
    for before, cue in pairwise(cues):
        shared = _shared(before, cue)
        if shared:
            is_brief = cue.end - cue.start < _SHORTEST_S
            repeating += is_brief or len(cue.text.split()) > shared
    return repeating > 1 and repeating >= _ROLLING * (len(cues) - 1)


def _shared(before: Cue, cue: Cue) -> int:
    """Words with which a cue begins and the one before it ends, if they follow each other: whole
    lines, all of what was shown, or more words than chance would have it.
    """
    if not before.lines or cue.start - before.end > _ADJOINING_S or cue.start < before.start:
        return 0
    shown, words = before.text.split(), cue.text.split()
    whole_lines = set(accumulate(len(line.split()) for line in reversed(before.lines)))
    for count in range(min(len(shown), len(words), _MOST_SHARED), 0, -1):
        if shown[-count:] == words[:count] and (count in whole_lines or count >= _WORDS):
            return count
    return 0


def _new_text(cues: Sequence[Cue]) -> Iterator[Cue]:
    """Cues without the words that stood on the screen before; none for those that add nothing."""
    before = None
    for cue in cues:
        shared = _shared(before, cue) if before is not None else 0
        before = cue
        if not shared:
            yield cue
        elif new := cue.text.split()[shared:]:
            yield cue._replace(lines=(" ".join(new),))
