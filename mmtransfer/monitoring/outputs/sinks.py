"""Where transcripts go: standard output, JSON Lines, SRT, WebVTT, ASS, plain text, an HTML report.

Every sink but the report writes a segment as it comes and flushes it, so that what was transcribed
is on disk when a run is interrupted. pysubs2 writes whole files, and SRT and WebVTT without
escaping what would be a tag; so it forms the lines of ASS alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

from mmtransfer.cache import atomic_path, open_private
from mmtransfer.data.printing import json_line, printable
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import (
    Alert,
    ClassifiedSound,
    Partial,
    Raised,
    Shown,
    Sound,
    Transcript,
)
from mmtransfer.monitoring.lines import rows
from mmtransfer.monitoring.outputs.report import report
from mmtransfer.monitoring.sources.cameras import file_name
from mmtransfer.speech.subtitles import escape_ass, escape_subtitle

logger = logging.getLogger(__name__)
VTT_HEADER = "WEBVTT\n\n"
SUFFIXES = (".jsonl", ".srt", ".vtt", ".ass", ".txt", ".html")
OF_ONE_RECORDING = (".srt", ".vtt", ".ass", ".html")
"""Of these forms each recording has a file of its own."""
_EPOCH_S = 1e9  # times from here on are those of live sources, since 1970


def clock(seconds: float, *, decimals: int, separator: str = ".") -> str:
    """Seconds as HH:MM:SS with decimals, e.g. 00:00:03.25 with two."""
    units = round(seconds * 10**decimals)
    whole, fraction = divmod(units, 10**decimals)
    minutes, second = divmod(whole, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}{separator}{fraction:0{decimals}d}"


def line(item: Transcript | Partial) -> str:
    """The line for people: [00:00:14.6 → 00:00:21.9] text; of a live source with the date and
    the local time of day; with the sentiment, if it was classified.
    """
    label = f" ({item.sentiment})" if isinstance(item, Transcript) and item.sentiment else ""
    return printable(f"{_span(item)} {item.text}{label}")


def _span(item: Transcript | Partial | Sound | ClassifiedSound) -> str:
    start, end = (clock(t, decimals=1) for t in (item.start, item.end))
    if item.start > _EPOCH_S:
        began, ended = datetime.fromtimestamp(item.start), datetime.fromtimestamp(item.end)
        start, end = f"{began:%Y-%m-%d %H:%M:%S}", f"{ended:%H:%M:%S}"
    return f"[{start} → {end}]"


class Sink(Protocol):
    """Takes transcripts and alerts of a monitor, in order."""

    def write(self, item: Shown) -> None:
        """Write one item at once."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class StandardOutput:
    """Prints lines; names the source where there are several.

    A line that replaces an earlier one begins with a tilde. With `partial`, provisional text is
    printed as well: on a terminal as a line that is written over until it is final, elsewhere as
    lines that begin with a tilde, too.
    """

    def __init__(self, *, name_source: bool = False, partial: bool = False, quiet: bool = False):
        self._name_source, self._partial, self._quiet = name_source, partial, quiet

    def write(self, item: Shown) -> None:
        """Print the line."""
        is_terminal = sys.stdout.isatty()
        clear = "\r\033[K" if self._partial and is_terminal else ""
        name = f"{printable(item.camera)} " if self._name_source else ""
        if isinstance(item, Partial):
            if self._partial and not is_terminal:
                print(f"~ {name}{line(item)}", flush=True)
            elif self._partial:
                width = shutil.get_terminal_size().columns - 1
                print(clear + printable(f"{name}{item.text}")[-width:], end="", flush=True)
        elif isinstance(item, Alert):
            doubt = f"; text rejected: {item.rejected}" if item.rejected else ""
            alert = f"ALERT {item.camera}: {item.keyword} ({item.matched}{doubt})"
            print(clear + printable(alert), flush=True)
        elif isinstance(item, Sound):
            louder = f"{item.level_db:.0f} dB, background {item.background_db:.0f} dB"
            print(clear + printable(f"SOUND {item.camera} {_span(item)}: {louder}"), flush=True)
        elif isinstance(item, ClassifiedSound):
            found = f"{item.label} ({item.probability:.2f})"
            print(clear + printable(f"SOUND {item.camera} {_span(item)}: {found}"), flush=True)
        elif not self._quiet:
            mark = "~ " if item.revision else ""
            print(clear + mark + name + line(item), flush=True)

    def close(self) -> None:
        """Nothing to do."""


class ReportSink:
    """Collects the items of a recording and writes a report at the end."""

    def __init__(self, path: Path, source: str):
        self._path, self._source = path, source
        self._items: list[Transcript | Raised] = []

    def write(self, item: Shown) -> None:
        """Note it."""
        if not isinstance(item, Partial):
            self._items.append(item)

    def close(self) -> None:
        """Write the report."""
        text = report(self._source, self._items, folder=self._path.parent)
        data = text.encode("utf-8", "backslashreplace")  # in the JSON that the page holds
        with atomic_path(self._path) as part, open_private(part, "wb") as file:
            file.write(data)


class FileSink:
    """Writes one file, in the form its ending names; plain text names the source where there are
    several.

    With `waits`, what a full disk does not take is held, and written before the next item or at
    the end, since what live sources and standard input say comes once; else it is an error.
    """

    def __init__(self, path: Path, *, name_source: bool = False, waits: bool = False):
        self._path, self._name_source, self._waits = path, name_source, waits
        self._count = 0
        self._held = b""  # lines of text, so little that memory is no matter
        self._is_blocked = False
        self._file: IO[bytes] = open_private(path, "wb", follow=True, buffering=0)
        if path.suffix == ".vtt":
            self._put(VTT_HEADER)
        elif path.suffix == ".ass":
            self._put(_ass([]))

    def write(self, item: Shown) -> None:
        """Write one transcript at once; in JSON Lines also the class of a sound, an `event`.

        Raises:
            OSError: the disk does not take it, and nothing here can wait.
        """
        self._put(self._text(item))

    def _text(self, item: Shown) -> str:
        suffix = self._path.suffix
        if isinstance(item, ClassifiedSound) and suffix == ".jsonl":
            return json_line(asdict(item)) + "\n"
        if not isinstance(item, Transcript):
            return ""
        self._count += 1
        if suffix == ".jsonl":
            return json_line(asdict(item)) + "\n"
        if suffix == ".ass":
            body = "\n".join(map(escape_ass, rows(printable(item.text))))
            return _ass([(item.start, item.end, body)]).rstrip("\n").rpartition("\n")[2] + "\n"
        if suffix == ".txt":
            name = f"{printable(item.camera)} " if self._name_source else ""
            return f"{'~ ' if item.revision else ''}{name}{line(item)}\n"
        return cue(item, self._count, is_vtt=suffix == ".vtt")

    def _put(self, text: str) -> None:
        self._held += text.encode()
        try:
            self._write_held()
        except OSError as error:
            if not self._waits:
                raise
            if not self._is_blocked:
                logger.warning(
                    "%s: cannot be written (%s); its lines are held until the disk accepts writes",
                    *(self._path, error.strerror),
                )
            self._is_blocked = True
        else:
            self._is_blocked = False

    def _write_held(self) -> None:
        while self._held:  # of which a disk that is nearly full takes a part
            try:
                self._held = self._held[self._file.write(self._held) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: the disk does not take what is held.
        """
        with self._file:
            self._write_held()


def cue(item: Transcript, number: int, *, is_vtt: bool) -> str:
    """A line as a cue of SRT, where it has a number, or of WebVTT."""
    separator = "." if is_vtt else ","
    start, end = (clock(t, decimals=3, separator=separator) for t in (item.start, item.end))
    body = "\n".join(escape_subtitle(row, is_vtt=is_vtt) for row in rows(printable(item.text)))
    first = "" if is_vtt else f"{number}\n"
    return f"{first}{start} --> {end}\n{body}\n\n"


def _ass(events: Sequence[tuple[float, float, str]]) -> str:
    """A file with these (start, end, text), the last of which is its last line."""
    import pysubs2

    made = pysubs2.SSAFile()
    for start, end, text in events:
        start_ms, end_ms = round(1000 * start), round(1000 * end)
        made.append(pysubs2.SSAEvent(start_ms, end_ms, text.replace("\n", r"\N")))
    return made.to_string("ass")


def check_outputs(paths: list[Path], live: Sequence[str] = ()) -> None:
    """Refuse outputs that cannot be written, before any work is done; `live` names sources that
    have no end.

    Raises:
        UserError: an unknown ending, a folder that does not exist, or subtitles or a report of a
            live source.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: unknown output format '{path.suffix}'; use {', '.join(SUFFIXES)}."
            )
        if path.suffix in OF_ONE_RECORDING and live:
            raise UserError(
                f"{path}: {path.suffix} files belong to a recording, but {live[0]} is live; use "
                ".jsonl or .txt."
            )
        if path.is_dir():
            raise UserError(f"{path}: expected a file to write, found a folder.")
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist.")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written; its permissions forbid it.")


def output_path(path: Path, camera: str, cameras: list[str]) -> Path:
    """The file for one source. Subtitles and reports belong to one recording, so with several
    sources each gets a file of its own: out.srt becomes out.CAMERA.srt.
    """
    if len(cameras) == 1 or path.suffix not in OF_ONE_RECORDING:
        return path
    return path.with_name(f"{path.stem}.{file_name(camera)}{path.suffix}")
