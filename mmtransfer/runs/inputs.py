"""What a transfer is made from, by its content: results that lie in a folder stand for others to
come only while that stays as it was.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtransfer.config import Config
from mmtransfer.data.files import check_regular
from mmtransfer.data.tables import SUFFIXES, as_file, numbered_rows
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.files import files_digest
from mmtransfer.speech.clips import read_clips
from mmtransfer.speech.recordings import is_recording, may_be_recording, visible_files

logger = logging.getLogger(__name__)
_SUBTITLES = (".srt", ".vtt", ".ass", ".ssa")


def contents(config: Config) -> dict[str, str]:
    """Digests of the source model and of all local data that a transfer reads, by the fields that
    name them. Recordings count by size and time of change; a set on the Hub has its name alone.

    Raises:
        UserError: no such source model, or a table that is none or cannot be read.
    """
    data = config.data
    named = {
        "data.train": data.train,
        "data.validation": data.validation,
        "data.rehearsal": data.rehearsal,
        **{f"data.source_domain.{name}": path for name, path in data.source_domain.items()},
    }
    found = {"source_model": resolve(config.source_model, config.revision).digest}
    for name, source in named.items():
        path = as_file(source) if source else None
        if path is not None and path.exists():
            found[name] = _digest(*_files(path.resolve(), config))
    for name in ("noise_dir", "reverb_dir"):
        folder = getattr(config.augment, name)
        if folder:
            recordings = filter(is_recording, visible_files(Path(folder).resolve()))
            found[f"augment.{name}"] = _digest([], recordings)
    return found


def _digest(texts: Sequence[Path], recordings: Iterable[Path]) -> str:
    for path in texts:
        check_regular(path)
    try:
        parts = [files_digest(texts)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}.") from None
    for path in sorted(set(recordings)):
        try:
            stat = path.stat()
            parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
        except (OSError, ValueError):  # no such file, or a name with NUL
            parts.append(str(path))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _files(path: Path, config: Config) -> tuple[list[Path], Iterable[Path]]:
    """The tables and subtitles of a set, and the recordings that it means."""
    tables = [path]
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in SUFFIXES]
        tables = [table for table in tables if table.is_file()]
        if not tables:
            files = visible_files(path)
            subtitles = [file for file in files if file.suffix.lower() in _SUBTITLES]
            return subtitles, filter(is_recording if subtitles else may_be_recording, files)
    if config.task == "sentiment":
        return tables, []
    if path.suffix.lower() in _SUBTITLES:
        return tables, [clip.path for clip in read_clips(path, config.data)]
    names = {str(row.get(config.data.file_column)) for _, row in numbered_rows(str(tables[0]))}
    return tables, [tables[0].parent / name.strip() for name in names]


def refuse_changed(folder: Path, known: Mapping[str, Any] | None, found: Mapping[str, Any]) -> None:
    """Refuse a folder whose results were made from other contents than those `found`; one of a
    former version, which kept none, is taken as it is.

    Raises:
        UserError: other contents.
    """
    if known is None:
        logger.warning(
            "%s: begun by a former version, which kept no digests of data and source model; they "
            "are taken as unchanged",
            folder,
        )
        return
    changed = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
    if changed:
        raise UserError(
            f"{folder}: holds results from before {', '.join(changed)} changed. Put back what "
            "was there, choose another folder, or remove this one."
        )
