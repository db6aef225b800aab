"""The output of a run: Parquet files in partitions, each written once and as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from mmtransfer.data.printing import json_line, whole_text
from mmtransfer.monitoring.events import ClassifiedSound, NoText, Transcript
from mmtransfer.monitoring.outputs.sinks import VTT_HEADER, cue
from mmtransfer.scale.folder import RunFolder
from mmtransfer.scale.pieces import FileEnd
from mmtransfer.scale.sources import Group, group_of

FORMATS = ("srt", "vtt", "jsonl")
Line = Transcript | NoText

_WORD = pa.struct(
    [
        ("text", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("probability", pa.float64()),
    ]
)
LINES = pa.schema(
    [
        ("file", pa.string()),
        ("id", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("text", pa.string()),
        ("words", pa.list_(_WORD)),
        ("avg_logprob", pa.float64()),
        ("no_speech_prob", pa.float64()),
        ("compression_ratio", pa.float64()),
        ("context_s", pa.float64()),
        ("language", pa.string()),
        ("sentiment", pa.string()),
        ("sentiment_prob", pa.float64()),
        ("model", pa.string()),
    ]
)
"""A line of text; times in seconds into the file."""
SOUNDS = pa.schema(
    [
        ("file", pa.string()),
        ("id", pa.string()),
        ("label", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("probability", pa.float64()),
        ("model", pa.string()),
    ]
)
"""A classified sound."""
FILES = pa.schema(
    [
        ("file", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("version", pa.string()),
        ("seconds", pa.float64()),
        ("lines", pa.int64()),
        ("rejected", pa.int64()),
        ("error", pa.string()),
    ]
)
"""A finished file; without an error, an empty text."""

_PLAN, _PIECES = "_run/plan.jsonl", "_run/pieces"
_ERRORS = "errors.parquet"
_LONGEST = 255  # bytes of a name
_ENDING = 21  # bytes of `.jsonl`, and of what a file is called until it is whole
_KEPT = 180  # bytes of a name that is cut


class Output(RunFolder):
    """What a run has written, and where it goes on. `settings` are what the texts depend on.

    Raises:
        UserError: the output of another model or of other settings.
    """

    def __init__(
        self,
        address: str,
        settings: Mapping[str, Any],
        *,
        partition: str,
        formats: Sequence[str] = (),
    ):
        own = {**settings, "partition": partition, "formats": sorted(formats)}
        super().__init__(address, own)
        self._settings, self._partition, self._formats = dict(settings), partition, formats
        self.done = {name.removesuffix(".parquet") for name in self.storage.names("files")}
        """Groups that are finished."""
        data = self.storage.read(_ERRORS)
        rows = pq.read_table(BytesIO(data)).to_pylist() if data else []
        self.errors: dict[str, dict[str, Any]] = {row["file"]: row for row in rows}
        """The rows of `errors.parquet`, by file."""

    def plan(self) -> list[Group]:
        """The groups that earlier runs planned."""
        lines = (self.storage.read(_PLAN) or b"").decode().splitlines()
        return [group_of(line) for line in lines]

    def write_plan(self, groups: Iterable[Group]) -> None:
        """Note the groups, before any of them is begun."""
        self.storage.write(_PLAN, "".join(f"{group.line()}\n" for group in groups).encode())

    def reopen(self, group: Group) -> bool:
        """Whether a group was transcribed before; it is to be once more then."""
        if group.id not in self.done:
            return False
        self.storage.remove(_files(group))
        self.done.remove(group.id)
        return True

    # --- pieces of a group that is not finished ---------------------------------------------------

    def pieces(self, group: Group) -> set[str]:
        """Names of the pieces that are transcribed."""
        names = self.storage.names(f"{_PIECES}/{group.id}")
        return {name.removesuffix(".json") for name in names}

    def write_piece(self, group: Group, name: str, lines: Sequence[tuple[int, Line]]) -> None:
        """Keep what became of a piece until its group is finished: (number of a file, line)."""
        rows = [[file, isinstance(line, NoText), asdict(line)] for file, line in lines]
        self.storage.write(_piece(group, name), json.dumps(rows).encode())

    def _piece(self, group: Group, name: str) -> list[tuple[int, Line]]:
        rows = json.loads(self.storage.read(_piece(group, name)) or b"")
        return [
            (file, NoText(**row) if no_text else Transcript(**row)) for file, no_text, row in rows
        ]

    # --- a whole group ----------------------------------------------------------------------------

    def finish(
        self, group: Group, pieces: Sequence[str], ends: Mapping[int, FileEnd]
    ) -> list[dict[str, Any]]:
        """Write the rows of a group of these pieces; returns those of its files. That of the files
        is written last, and says that all is there.
        """
        lines: dict[int, list[Line]] = {place: [] for place in range(len(group.files))}
        for name in pieces:
            for place, line in self._piece(group, name):
                lines[place].append(line)
        files, rows, sounds = [], [], []
        for place, file in enumerate(group.files):
            texts = [line for line in lines[place] if isinstance(line, Transcript)]
            rows += [self._line_row(file.shown, line) for line in texts]
            end = ends[place]
            sounds += [self._sound_row(file.shown, sound) for sound in end.sounds]
            files.append(
                {
                    "file": file.shown,
                    "sha256": end.digest,
                    "bytes": file.size,
                    "version": file.version,
                    "seconds": end.seconds,
                    "lines": len(texts),
                    "rejected": len(lines[place]) - len(texts),
                    "error": end.error,
                }
            )
            if texts or not end.error:
                self._write_texts(file.name, texts)
        self._note_errors(files)
        part = f"{_folder(self._partition, group.partition)}/{group.id}.parquet"
        if rows:
            self._write_rows(f"lines/{part}", rows, LINES)
        if sounds:
            self._write_rows(f"sounds/{part}", sounds, SOUNDS)
        self._write_rows(_files(group), files, FILES)
        self.storage.remove(f"{_PIECES}/{group.id}")
        self.done.add(group.id)
        return files

    def _note_errors(self, files: Sequence[Mapping[str, Any]]) -> None:
        """Keep in `errors.parquet` files that could not be used, or not to their ends."""
        named = {file["file"] for file in files}
        kept = {name: row for name, row in self.errors.items() if name not in named}
        kept |= {file["file"]: dict(file) for file in files if file["error"]}
        if kept != self.errors:
            self.errors = kept
            self._write_rows(_ERRORS, [kept[name] for name in sorted(kept)], FILES)

    def _line_row(self, shown: str, line: Transcript) -> dict[str, Any]:
        row = asdict(line)
        own = {name: row[name] for name in LINES.names if name in row}
        text = whole_text(line.text)
        return {**own, "file": shown, "text": text, "model": self._settings["model"]}

    def _sound_row(self, shown: str, sound: ClassifiedSound) -> dict[str, Any]:
        row = asdict(sound)
        own = {name: row[name] for name in SOUNDS.names if name in row}
        return {**own, "file": shown, "model": self._settings["sounds"]}

    def _write_texts(self, name: str, lines: Sequence[Transcript]) -> None:
        *above, last = name.split("/")
        parts = [*(_fitting(part, _LONGEST) for part in above), _fitting(last, _LONGEST - _ENDING)]
        path = "/".join(parts)
        for kind in self._formats:
            if kind == "jsonl":
                text = "".join(json_line(asdict(line)) + "\n" for line in lines)
            else:
                is_vtt = kind == "vtt"
                cues = (cue(line, n, is_vtt=is_vtt) for n, line in enumerate(lines, 1))
                text = (VTT_HEADER if is_vtt else "") + "".join(cues)
            self.storage.write(f"texts/{path}.{kind}", text.encode("utf-8", "backslashreplace"))

    def _write_rows(self, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
        self.write_table(name, pa.Table.from_pylist(list(rows), schema))


def _folder(partition: str, value: str) -> str:
    quoted = f"{partition}={quote(value, safe='', errors='backslashreplace')}"
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{partition}={quote(_cut(value, _KEPT // 3), safe='')}"  # a byte takes up to three


def _fitting(name: str, most: int) -> str:
    """A name that is not too long for a file."""
    return name if len(name.encode("utf-8", "surrogatepass")) <= most else _cut(name, _KEPT)


def _cut(name: str, most: int) -> str:
    data = name.encode("utf-8", "surrogatepass")
    return f"{data[:most].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


def _piece(group: Group, name: str) -> str:
    return f"{_PIECES}/{group.id}/{name}.json"


def _files(group: Group) -> str:
    return f"files/{group.id}.parquet"
