"""What a monitor has recognised, on disk before it is handed out: append-only JSON Lines.

A line is either a segment (`camera`, `id`, `start`, `end`, `text`, scores) or an `event` (a segment
without text, the end of a recording). Each is on the disk before the next thing happens, so that a
monitor that was killed goes on where it stopped and hands nothing out twice.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mmtransfer.cache import atomic_path, make_private, open_private
from mmtransfer.data.files import read_object
from mmtransfer.data.printing import json_line, printable
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import LineKind
from mmtransfer.monitoring.journal.files import (
    LONGEST_LINE,
    journal_files,
    locked,
    mend,
    parsed,
)
from mmtransfer.monitoring.journal.known import Known
from mmtransfer.monitoring.journal.records import Record, record_of
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import beginning_digest

logger = logging.getLogger(__name__)
_HEADER = "journal.json"
_FORMAT = 2
_ROTATE_BYTES = 64 << 20
_SENT = (LineKind.ALERT, LineKind.SOUND, LineKind.SOUND_CLASS)
_SAMPLE_BYTES = 1 << 16  # of a recording, that tell it from another of the same name


class Journal:
    """The journal of one set of sources, transcribed by one model.

    Raises:
        UserError: a folder that cannot be used, a journal of another model or of other sources, or
            one that another process is writing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str,
        model_digest: str,
        sources: Mapping[str, str],
        rotate_bytes: int = _ROTATE_BYTES,
    ):
        self._folder, self._rotate_bytes = Path(folder), rotate_bytes
        self.channels: list[str] = []
        """Where alerts are sent; each alert's line lists them, for redelivery."""
        self._damaged: dict[tuple[Path, int], str] = {}  # lines, and what is wrong with them
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{folder}: expected a folder for the journal, found a file.")
        make_private(self._folder)
        self._file: Any = None
        self._writing = threading.Lock()  # alerts that were not delivered come from a thread
        self._day = ""
        with ExitStack() as opened:
            opened.enter_context(locked(self._folder))
            self._check_header(model, model_digest, sources)
            for path in self.files[-1:]:
                mend(path)
            self._lock = opened.pop_all()

    # --- identity -----------------------------------------------------------------------------

    def _check_header(self, model: str, digest: str, sources: Mapping[str, str]) -> None:
        own = _header(model, digest, sources)
        path = self._folder / _HEADER
        if not path.exists():
            if any(self._folder.glob("*.jsonl")):
                raise UserError(
                    f"{self._folder}: holds .jsonl files, but no journal. Give --journal an empty "
                    "folder."
                )
            self._write_header(own)
            return
        try:
            found = read_object(path)
            other, known = dict(found["model"]), dict(found["sources"])
            other["name"], other["digest"], found["format"]
        except (UserError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: damaged. Give --journal another folder, and keep this one's .jsonl files."
            ) from None
        again = "Go on with the same, or give --journal another folder."
        if found["format"] != _FORMAT:
            raise UserError(
                f"{self._folder}: this journal was written by another version (format "
                f"{found['format']}, now {_FORMAT}). Give --journal another folder."
            )
        if other["digest"] != digest:
            raise UserError(
                f"{self._folder}: this journal was written with another model ({other['name']}, "
                f"now {model}). {again}"
            )
        if known != own["sources"]:
            changed = sorted(
                name
                for name in known.keys() | own["sources"].keys()
                if known.get(name) != own["sources"].get(name)
            )
            raise UserError(
                f"{self._folder}: this journal was written with other sources (different: "
                f"{', '.join(changed)}). {again}"
            )

    def renew(self, *, model: str, model_digest: str, sources: Mapping[str, str]) -> None:
        """From now on it is that of these sources."""
        self._write_header(_header(model, model_digest, sources))

    def _write_header(self, header: Mapping[str, Any]) -> None:
        path = self._folder / _HEADER
        with atomic_path(path) as part, open_private(part, "w", encoding="utf-8") as file:
            file.write(json.dumps(header, indent=2))

    # --- what is there ------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._folder

    @property
    def files(self) -> list[Path]:
        """The journal's files, oldest first."""
        return journal_files(self._folder)

    @property
    def damaged(self) -> int:
        """Lines that were left out because they cannot be understood."""
        return len(self._damaged)

    def records(self) -> Iterator[tuple[Record, Sequence[str]]]:
        """What the lines are about, oldest first, each with the channels that it was to be sent to;
        damaged lines are left out, counted and reported.
        """
        known = self.damaged
        for path in self.files:
            for number, line in self._lines(path):
                try:
                    record = record_of(line)
                except ValueError as error:
                    self._damaged[path, number] = str(error)
                    continue
                to = line.get("to")
                if record is not None:
                    yield record, to if isinstance(to, list) else []
        self._report_damage(known)

    def _lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The numbered lines of a file."""
        with path.open("rb") as file:
            lines = iter(partial(file.readline, LONGEST_LINE), b"")
            for number, line in enumerate(lines, 1):
                found = parsed(line)
                if found is not None:
                    yield number, found
                else:
                    self._damaged[path, number] = (
                        f"expected an object with a camera, found {line[:40]!r}"
                    )

    def _report_damage(self, known: int) -> None:
        if self.damaged == known:
            return
        (path, number), why = list(self._damaged.items())[known]
        logger.warning(
            "%s: corrupt lines skipped: %d; the first is line %d of %s: %s",
            *(self._folder, self.damaged - known, number, path.name, why),
        )

    def known(self, recordings: Collection[str], waiting: Collection[str]) -> Known:
        """What was dealt with: all segments of these recordings, and of live sources those that
        are still in the spool, where a kill between journal and spool can leave them. Damaged lines
        are left out, counted and reported; what they were about is recognised again.
        """
        found, damaged = Known(recordings, waiting), self.damaged
        # What a live source left in the spool was journalled last; months of it need not be read.
        for path in self.files if recordings else self.files[-2:]:
            for number, line in self._lines(path):
                try:
                    found.add(line)
                except ValueError as error:
                    self._damaged[path, number] = str(error)
        self._report_damage(damaged)
        return found

    def spool(self) -> Spool:
        """Where the audio of live sources waits."""
        return Spool(self._folder / "spool")

    # --- writing ------------------------------------------------------------------------------

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Append lines, all or none; when this returns they are on the disk.

        Raises:
            OSError: the disk is full or gone; the journal still ends with a whole line.
        """
        with self._writing:
            self._append(lines)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = "".join(self._text(line) for line in lines).encode()
        file = self._current(len(data))
        size = _size(file)  # not its position, which a write that failed has moved
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise

    def _text(self, line: Mapping[str, Any]) -> str:
        if self.channels and line.get("event") in _SENT:
            line = {**line, "to": self.channels}
        return json_line(line) + "\n"

    def _current(self, more: int) -> Any:
        day = time.strftime("%Y-%m-%d")
        if self._file is None or day != self._day or _size(self._file) + more > self._rotate_bytes:
            last = [path.name for path in self.files if path.name.startswith(day)]
            number = int(last[-1].split(".")[1]) if last else 0
            if last and (self._folder / last[-1]).stat().st_size + more > self._rotate_bytes:
                number += 1
            path, before = self._folder / f"{day}.{number:04d}.jsonl", self._file
            self._file, self._day = open_private(path, "ab", buffering=0), day
            if before is not None:  # not sooner: where no file can be made, this is tried again
                before.close()
        return self._file

    def close(self) -> None:
        """Close the file and let others write."""
        if self._file is not None:
            self._file.close()
        self._lock.close()


def _size(file: Any) -> int:
    return os.fstat(file.fileno()).st_size


def _header(model: str, digest: str, sources: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "model": {"name": model, "digest": digest},
        "sources": {name: source_identity(source) for name, source in sources.items()},
    }


def source_identity(source: str) -> str:
    """What distinguishes a source: its address, and for a recording how it begins."""
    path = Path(source)
    if "://" in source:
        return public_address(source)
    if not path.is_file():
        return printable(str(path.resolve()) if path.is_dir() else source)
    return f"{printable(str(path.resolve()))} {beginning_digest(path, _SAMPLE_BYTES)}"
