"""Subtitles as people have them: SRT, WebVTT and ASS into cues of what is spoken.

SRT and WebVTT are parsed here: pysubs2, which parses ASS, loses cues without a blank line between
them, and times that it cannot parse. A cue's text is everything up to the next time line, whatever
blank lines lie between. What cannot be understood is refused with its line; what is left out is
counted and reported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from html.entities import html5
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple

from mmtransfer.data.encodings import decode_text
from mmtransfer.data.files import check_regular
from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
_MOST_BYTES = 64 << 20  # weeks of speech
_SHORTEST_S = 0.05  # nothing is spoken in less
_ADJOINING_S = 0.1  # between cues that follow each other on the screen
_ROLLING = 0.3  # of cues that repeat what stood on the screen
_OVERLAPPING = 0.5  # of cues that end behind the next one's start
_MOSTLY = 0.8  # of cues that have a number or name, where all have one
_ALL_EMPTY = 0.9  # of cues without text
_WORDS, _MOST_SHARED = 3, 100  # words that are no chance when two cues share them

_CLOCK = r"(?:(\d{1,4})\s?:\s?)?(\d{1,3})\s?:\s?(\d{1,2})(?:\s?[.,:]\s?(\d{1,9}))?"
_FULL = r"\d{1,4}\s?:\s?\d{1,2}\s?:\s?\d{1,2}\s?[.,:]\s?\d{1,9}"
_TIMES = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?![\w:])")
_USUAL = r"(\d\d:[0-5]\d):([0-5]\d)[.,](\d{3})"
_USUAL_TIMES = re.compile(rf"^{_USUAL} --> {_USUAL}(?!\S)[^\n]*", re.ASCII | re.M)
# Looking digits up takes a third of the time of converting them.
_SECONDS = {f"{number:02}": number for number in range(60)}
_MILLISECONDS = {f"{number:03}": number / 1000 for number in range(1000)}
# Other arrows, and none, where nothing else stands on the line than two whole times.
_OTHER_TIMES = re.compile(rf"\s*{_CLOCK}\s{{0,3}}[-–—=>→,;|~]{{1,4}}\s?>?\s{{0,3}}{_CLOCK}\s*")
_TWO_FULL = re.compile(rf"\s*{_FULL}\s{{0,3}}[-–—=>→,;|~]{{1,4}}\s?>?\s{{0,3}}{_FULL}\s*")
_LIKE_TIME = re.compile(r"(?=[^\d]*\d)(?=[^:;.,]*[:;.,])[\dOoIlSB\s:;.,]{3,30}")
_BLOCKS = ("NOTE", "STYLE", "REGION")  # of WebVTT, up to a blank line
_BLANK = r"\n[^\S\n]*\n"
_BLOCK = re.compile(rf"({_BLANK})(?:{'|'.join(_BLOCKS)})(?!\S)[^\n]*(?:\n[^\S\n]*\S[^\n]*)*")
_NEW_BLOCK = re.compile(rf"{_BLANK}\s*\S")
_NAME = re.compile(rf"{_BLANK}[^\S\n]*\S[^\n]*\n\Z")
_DIGITS = 9  # of the number of a cue

_ASS_EVENT = re.compile(r"\s*(Dialogue|Comment)\s*:(.*)")
_ASS_TIME = r"\s*(\d{1,3}):(\d{1,2}):(\d{1,2})[.:](\d{1,3})\s*"
_ASS_TIMES = re.compile(rf"([^,]*),{_ASS_TIME},{_ASS_TIME},(.*)")

_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>|<[\d:.]+>|\{\\[^{}\n]*\}")
_BREAK = re.compile(r"<br\s*/?>|\\[Nn]|</?(?:p|div)\b[^<>\n]*>", re.IGNORECASE)
_HAS_BREAK = re.compile(r"<[/bBpPdD]")
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Marks of direction, byte order and possible breaks, which nobody says.
_UNSEEN = dict.fromkeys([0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
_UNSEEN |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_MARKS = ("<", "&", "\\", *map(chr, _UNSEEN))  # without them a line is shown as it is


class Cue(NamedTuple):
    """A stretch of a recording and what is spoken in it."""

    start: float
    """Seconds into the recording."""
    end: float
    shown: str
    """Its lines, without tags; empty for silence."""
    line: int
    """Where its time stands in the file."""

    @property
    def text(self) -> str:
        """What is spoken, on one line."""
        return self.shown.replace("\n", " ")


def read_subtitles(path: Path, *, language: str | None = None) -> list[Cue]:
    """Cues of an SRT, WebVTT, ASS or SSA file with what is new in each; `language` helps to find
    out the encoding of a file that is not UTF-8.

    Raises:
        UserError: an encoding that is not known, a time that cannot be read, no cues, or hardly
            any with text.
    """
    check_regular(path, most=_MOST_BYTES)
    decoded = decode_text(path.read_bytes(), language)
    if decoded is None:
        raise UserError(
            f"{path}: not UTF-8, and no other encoding fits what is in it. Save it as UTF-8."
        )
    text, encoding = decoded
    if not encoding.startswith(("utf-8", "utf-16", "utf-32")):
        logger.warning(
            "%s: not UTF-8, decoded as %s; save it as UTF-8 to be sure", path.name, encoding
        )
    suffix = path.suffix.lower()
    if suffix in (".ass", ".ssa"):
        cues = parse_ass(text, path)
    else:
        cues = parse_subtitles(text, path, is_vtt=suffix == ".vtt")
    if not cues:
        raise UserError(f"{path}: no subtitle cues found; expected SRT, WebVTT or ASS.")
    empty = [cue.shown for cue in cues].count("")
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
    text = _with_line_feeds(text)
    times, starts, ends, parts = _split(text, path)
    if not times:
        return []
    is_vtt = is_vtt or text.startswith("WEBVTT")
    if text.startswith("WEBVTT"):
        rows = parts[0].split("\n")  # the header goes up to a blank line
        first = next((n for n, row in enumerate(rows) if not row.strip()), len(rows))
        parts[0] = "\n".join(rows[first:])
    parts[0] = f"\n\n{parts[0]}"  # what a file begins with is as good as below a blank line
    if is_vtt and any(block in text for block in _BLOCKS):
        parts = [_BLOCK.sub(r"\1", part) for part in parts]
    parts = _without_names(parts, is_vtt)
    marks = [mark for mark in _MARKS if mark in text]
    cues = []
    for line, start, end, part in zip(times, starts, ends, parts[1:], strict=True):
        part = part.strip()
        if marks and any(mark in part for mark in marks):
            part = "\n".join(clean for row in part.split("\n") for clean in _clean(row))
        elif "\n" in part:
            rows = [" ".join(row.split()) for row in part.split("\n")]
            part = "\n".join(filter(None, rows))
        else:
            part = " ".join(part.split())
        cues.append(Cue(start, end, part, line))
    return cues


def _with_line_feeds(text: str) -> str:
    # Line ends are converted twice by some programs: CR CR LF is one.
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    return re.sub(r"\r*\n|\r", "\n", text) if "\r" in text else text


def parse_ass(text: str, path: Path | str = "") -> list[Cue]:
    """Cues of a (Advanced) SubStation Alpha text in order of time, each once; comments and drawings
    are none. `path` is for messages.

    Raises:
        UserError: a time that cannot be read.
    """
    import pysubs2

    text = _with_line_feeds(text)
    times, rows = list[tuple[int, float, float]](), ["[Events]"]
    for number, row in enumerate(text.split("\n"), 1):
        kind = _ASS_EVENT.match(row)
        if kind is None:
            continue
        found = _ASS_TIMES.match(kind[2])
        start = _seconds(*found.groups()[1:5]) if found else None
        end = _seconds(*found.groups()[5:9]) if found else None
        if found is None or start is None or end is None:
            raise UserError(
                f"{path}:{number}: expected times such as 0:00:03.25,0:00:05.00, found "
                f"{row.strip()[:60]!r}."
            )
        times.append((number, start, end))
        # The library knows fewer forms of times, and no fraction behind a colon.
        rows.append(f"{kind[1]}:{found[1]},0:00:00.00,0:00:00.00,{found[10]}")
    events = pysubs2.SSAFile.from_string("\n".join(rows), format_="ass").events
    cues = dict[tuple[float, float, str], Cue]()
    for (number, start, end), event in zip(times, events, strict=True):
        event.text = event.text.replace(r"\{", "\0").replace(r"\}", "\1")
        # Each brace behind the last closing one would be followed to the end of the line.
        closed, mark, rest = event.text.rpartition("}")
        event.text = closed + mark + rest.replace("{", "\0")
        if event.is_comment or event.is_drawing:
            continue
        shown = event.plaintext.replace("\0", "{").replace("\1", "}").translate(_UNSEEN)
        lines = (" ".join(line.split()) for line in shown.split("\n"))
        cue = Cue(start, end, "\n".join(filter(None, lines)), number)
        cues.setdefault(
            (cue.start, cue.end, cue.shown), cue
        )  # borders and shadows are events of the same text
    return sorted(cues.values(), key=lambda cue: cue.start)


def _split(text: str, path: Path | str) -> tuple[list[int], list[float], list[float], list[str]]:
    """Line, start and end of every time, and what stands before, between and behind them."""
    times, starts, ends, parts = list[int](), list[float](), list[float](), list[str]()
    unreadable = list[tuple[int, str]]()
    minutes: dict[str, int] = {}  # in seconds, by hours and minutes
    at, line = 0, 1
    # Nearly all times have one form, which is found faster than line by line.
    for usual in chain(_USUAL_TIMES.finditer(text), [None]):
        part = text[at : usual.start() if usual else len(text)]
        if ":" in part:
            rows, begin = part.split("\n"), 0
            for number, row in enumerate(rows):
                if ":" not in row:
                    continue
                if span := _span(row):
                    parts.append("\n".join([*rows[begin:number], ""]))
                    times.append(line + number)
                    starts.append(span[0])
                    ends.append(span[1])
                    rows[number], begin = "", number
                elif _is_like_times(row):
                    unreadable.append((line + number, row))
            part = "\n".join(rows[begin:])
            line += begin
        parts.append(part)
        line += part.count("\n")
        if usual:
            a, b, c, d, e, f = usual.groups()
            if a not in minutes or d not in minutes:
                minutes |= {clock: 3600 * int(clock[:2]) + 60 * int(clock[3:]) for clock in (a, d)}
            times.append(line)
            starts.append(minutes[a] + _SECONDS[b] + _MILLISECONDS[c])
            ends.append(minutes[d] + _SECONDS[e] + _MILLISECONDS[f])
            at = usual.end()
    if unreadable:
        first, row = unreadable[0]
        more = f" {len(unreadable) - 1} more like it." if len(unreadable) > 1 else ""
        raise UserError(
            f"{path}:{first}: expected times such as 00:00:03,250 --> 00:00:05,000, found "
            f"{row.strip()[:60]!r}.{more}"
        )
    return times, starts, ends, parts


def _span(line: str) -> tuple[float, float] | None:
    """Start and end in seconds that a line names; None if it is no time line."""
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


def _without_names(parts: list[str], is_vtt: bool) -> list[str]:
    """What stands before, between and behind times, without the lines above times that number or
    name the cues.
    """
    # The last line with text above each time, and what stands before it.
    last = [part.rstrip().rpartition("\n") for part in parts[:-1]]
    is_number = [row.strip().isdecimal() for _, _, row in last]
    if _are_numbers(last, is_number):
        named = is_number
    elif is_vtt:
        # A name stands directly above the time, with a blank line before it.
        named = [bool(_NAME.search(part)) for part in parts[:-1]]
    else:
        return parts
    bodies = [
        body if is_named else part
        for part, (body, _, _), is_named in zip(parts, last, named, strict=False)
    ]
    bodies.append(parts[-1])
    if named is is_number or (named[0] and sum(named) >= _MOSTLY * len(named)):
        return bodies
    # Or else blank lines stand between cues alone.
    is_regular = not bodies[0].strip() and not any(map(_NEW_BLOCK.search, bodies))
    return bodies if is_regular else parts


def _are_numbers(last: Sequence[tuple[str, str, str]], is_number: Sequence[bool]) -> bool:
    """Whether the lines above times are their numbers: above nearly all, the first one included;
    or, where that was cut off, numbers that go up by one and are not all there is of a cue.
    """
    count = sum(is_number)
    if is_number[0]:
        return count >= _MOSTLY * len(last)
    if not count or count < _MOSTLY * (len(last) - 1):
        return False
    if any(row and newline and not body for body, newline, row in last[1:]):
        return False
    counted = [row.strip() for (_, _, row), is_one in zip(last, is_number, strict=True) if is_one]
    first = int(counted[0][:_DIGITS])
    expected = [str(number) for number in range(first, first + count)]
    return counted == (["2"] if count == 1 else expected)


def _clean(line: str) -> list[str]:
    """What of a line is shown, with single spaces; several lines where it is broken by a tag."""
    parts = [line]
    if "<" in line or "\\" in line:
        if "\\" in line or _HAS_BREAK.search(line):
            line = _BREAK.sub("\n", line)
        parts = _TAG.sub("", line).split("\n")
    if "&" in line:
        parts = [_ENTITY.sub(_character, part) for part in parts]  # what it gives is no tag
    return [clean for part in parts if (clean := " ".join(part.translate(_UNSEEN).split()))]


def _character(match: re.Match[str]) -> str:
    name = match.group(1)
    if name[0] != "#":
        return html5.get(f"{name};", match.group())
    code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
    is_character = 0 < code < 0x110000 and not 0xD800 <= code < 0xE000
    return chr(code) if is_character else match.group()


def escape_ass(text: str) -> str:
    """A text as an event of ASS holds it, so that reading it gives the text."""
    return text.replace("\\", "\\\u2060").replace("{", r"\{").replace("}", r"\}")


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


# --- what is new ---------------------------------------------------------------------------------


def _spoken(cues: list[Cue], path: Path) -> list[Cue]:
    """Cues that are long enough for speech, with what is new in each."""
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
            "skipped: %s: %d cues without duration, first at line %d",
            path.name,
            len(short),
            short[0],
        )
        kept = [cue for cue in kept if cue.end - cue.start >= _SHORTEST_S]
    late = [_is_late(before, cue) for before, cue in pairwise(kept)]
    if len(late) > 2 and sum(late) >= _OVERLAPPING * len(late):
        # They stand on the screen longer than they are spoken.
        apart = _one_after_another(kept)
        joined = len(kept) - len(apart)
        if joined:
            logger.info("%s: %d cues are joined to one that begins with them", path.name, joined)
        if sum(late) > joined:
            logger.info("%s: %d cues end where the next one begins", path.name, sum(late) - joined)
        kept = apart
    if not kept:
        raise UserError(f"{path}: none of its {len(cues)} cues lasts long enough for speech.")
    return kept


def _is_late(before: Cue, cue: Cue) -> bool:
    """Whether a cue ends behind the start of the one that follows."""
    return before.start < cue.start < before.end - _SHORTEST_S


def _one_after_another(cues: Sequence[Cue]) -> list[Cue]:
    """Cues that end where the next one begins; those that would be too short then are one with it,
    since both are spoken in the same stretch.
    """
    found: list[Cue] = []
    for cue in cues:
        if found and _is_late(found[-1], cue):
            before = found.pop()
            if cue.start - before.start < _SHORTEST_S:
                shown = "\n".join(filter(None, (before.shown, cue.shown)))
                cue = Cue(before.start, max(before.end, cue.end), shown, before.line)
            else:
                found.append(before._replace(end=cue.start))
        found.append(cue)
    return found


def _is_rolling(cues: Sequence[Cue]) -> bool:
    """Whether cues begin with what stands on the screen already, as live and automatic captions do.

    Somebody may say a thing twice; then the second cue has nothing else in it, and lasts.
    """
    repeating = 0
    for before, cue in pairwise(cues):
        if cue.start - before.end > _ADJOINING_S:  # most, or none
            continue
        shared = _shared(before, cue)
        if shared:
            is_brief = cue.end - cue.start < _SHORTEST_S
            repeating += is_brief or len(cue.text.split()) > shared
    return repeating > 1 and repeating >= _ROLLING * (len(cues) - 1)


def _shared(before: Cue, cue: Cue) -> int:
    """Words with which a cue begins and the one before it ends, if they follow each other: whole
    lines, all of what was shown, or more words than chance would have it.
    """
    if not before.shown or cue.start - before.end > _ADJOINING_S or cue.start < before.start:
        return 0
    shown, words = before.text.split(), cue.text.split()
    if not words or words[0] not in shown:
        return 0
    whole_lines = set(accumulate(len(line.split()) for line in reversed(before.shown.split("\n"))))
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
            yield cue._replace(shown=" ".join(new))
