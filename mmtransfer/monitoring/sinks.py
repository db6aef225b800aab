"""Where transcripts go: standard output, JSON Lines, SRT, WebVTT, plain text.

Every sink writes a segment as it comes and flushes it, so that what was transcribed is on disk
when a run is interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

from mmtransfer.errors import UserError
from mmtransfer.monitoring.transcripts import Transcript

SUFFIXES = (".jsonl", ".srt", ".vtt", ".txt")
_SUBTITLES = (".srt", ".vtt")
_EPOCH_S = 1e9  # times from here on are those of live sources, since 1970


def clock(seconds: float, *, decimals: int, separator: str = ".") -> str:
    """Seconds as HH:MM:SS with decimals, e.g. 00:00:03.25 with two."""
    units = round(seconds * 10**decimals)
    whole, fraction = divmod(units, 10**decimals)
    minutes, second = divmod(whole, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}{separator}{fraction:0{decimals}d}"


def line(transcript: Transcript) -> str:
    """The line a person reads: [00:00:14.6 → 00:00:21.9] text; of a live source with the date and
    the local time of day.
    """
    start, end = (clock(t, decimals=1) for t in (transcript.start, transcript.end))
    if transcript.start > _EPOCH_S:
        began = datetime.fromtimestamp(transcript.start)
        ended = datetime.fromtimestamp(transcript.end)
        start, end = f"{began:%Y-%m-%d %H:%M:%S}", f"{ended:%H:%M:%S}"
    return f"[{start} → {end}] {transcript.text}"


class Sink(Protocol):
    """Takes transcripts in order."""

    def write(self, transcript: Transcript) -> None:
        """Put one transcript out, at once."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class StandardOutput:
    """Prints lines; names the source where there are several."""

    def __init__(self, *, name_source: bool = False):
        self._name_source = name_source

    def write(self, transcript: Transcript) -> None:
        """Print the line."""
        name = f"{transcript.camera} " if self._name_source else ""
        print(name + line(transcript), flush=True)

    def close(self) -> None:
        """Nothing to do."""


class FileSink:
    """Writes one file, in the form its ending names."""

    def __init__(self, path: Path):
        self._path = path
        self._count = 0
        self._file: IO[str] = path.open("w", encoding="utf-8")
        if path.suffix == ".vtt":
            self._file.write("WEBVTT\n\n")
            self._file.flush()

    def write(self, transcript: Transcript) -> None:
        """Write and flush one transcript."""
        self._count += 1
        suffix = self._path.suffix
        if suffix == ".jsonl":
            text = json.dumps(asdict(transcript), ensure_ascii=False) + "\n"
        elif suffix == ".txt":
            text = line(transcript) + "\n"
        else:
            separator = "," if suffix == ".srt" else "."
            start, end = (
                clock(t, decimals=3, separator=separator)
                for t in (transcript.start, transcript.end)
            )
            # "-->" inside a cue's text would end the cue.
            body = transcript.text.replace("-->", "→")
            number = f"{self._count}\n" if suffix == ".srt" else ""
            if suffix == ".vtt":
                body = body.replace("&", "&amp;").replace("<", "&lt;")
            text = f"{number}{start} --> {end}\n{body}\n\n"
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_outputs(paths: list[Path], live: Sequence[str] = ()) -> None:
    """Refuse outputs that cannot be written, before any work is done; `live` names sources that
    have no end.

    Raises:
        UserError: an unknown ending, a folder that does not exist, or subtitles of a live source.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: unknown output format '{path.suffix}'; use {', '.join(SUFFIXES)}."
            )
        if path.suffix in _SUBTITLES and live:
            raise UserError(
                f"{path}: subtitles belong to a recording, but {live[0]} is live; use .jsonl or "
                ".txt."
            )
        if path.is_dir():
            raise UserError(f"{path}: expected a file to write, found a folder.")
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist.")


def output_path(path: Path, camera: str, cameras: list[str]) -> Path:
    """The file for one source. Subtitles belong to one recording, so with several sources each
    gets a file of its own: out.srt becomes out.CAMERA.srt.
    """
    if len(cameras) == 1 or path.suffix not in _SUBTITLES:
        return path
    plain = camera.replace("/", "-")  # a stream's name holds its path
    return path.with_name(f"{path.stem}.{plain}{path.suffix}")
