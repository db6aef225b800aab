"""Recordings in bulk: what folders, patterns, manifests and addresses name, in groups."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mmtransfer.data.printing import printable
from mmtransfer.data.tables import SUFFIXES, numbered_rows
from mmtransfer.errors import UserError
from mmtransfer.scale.storage import is_remote, open_storage, problem
from mmtransfer.speech.addresses import HIDDEN, public_address
from mmtransfer.speech.recordings import is_recording, is_visible

logger = logging.getLogger(__name__)
Partition = Literal["folder", "day"]
_COLUMNS = ("file_name", "file", "path")
_GROUP_FILES, _GROUP_BYTES = 64, 32 << 20
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "generation")
_OBJECTS = ("gcs", "gs", "memory", "s3", "s3a")  # in these a path is a name, with any # and = in it
_UNNAMED = "recording"  # what is a folder, or the root of a site
_USER = re.compile(r"^[^/]*:.*@", re.DOTALL)
_QUERY = re.compile(r"\?[^?]*=.*", re.DOTALL)


@dataclass(frozen=True)
class BulkFile:
    """A recording to transcribe."""

    address: str
    """Path or address, as it is opened."""
    name: str
    """Its path in what was named, by which files beside its rows are called."""
    partition: str
    """The part of the output that its rows are in."""
    size: int
    """Bytes."""
    version: str
    """What changes with its content: a time, or the digest that its server has."""

    @property
    def shown(self) -> str:
        """Its address without secrets; where there are some, with a digest, since addresses may
        differ in nothing else.
        """
        shown = _public(self.address)
        return printable(shown if shown == self.address else f"{shown}~{_digest(self.address)}")


@dataclass(frozen=True)
class Group:
    """Files of one partition whose rows become one file: short ones together, a long one alone."""

    files: tuple[BulkFile, ...]

    @property
    def id(self) -> str:
        """Its name: the same for the same files, wherever the output lies."""
        parts = [(file.address, file.size, file.version) for file in self.files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def partition(self) -> str:
        """Of all its files."""
        return self.files[0].partition

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    def line(self) -> str:
        """As a line of the plan."""
        return json.dumps([asdict(file) for file in self.files])


def group_of(line: str) -> Group:
    """A group by its line of the plan."""
    return Group(tuple(BulkFile(**file) for file in json.loads(line)))


def grouped(files: Iterable[BulkFile]) -> list[Group]:
    """Files in groups, partition by partition."""
    groups: list[list[BulkFile]] = []
    size = 0
    for file in sorted(files, key=lambda file: (file.partition, file.address)):
        last = groups[-1] if groups else []
        is_full = len(last) == _GROUP_FILES or size + file.size > _GROUP_BYTES
        if not last or is_full or last[0].partition != file.partition:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [Group(tuple(group)) for group in groups]


def list_files(sources: Sequence[str], by: Partition = "folder") -> list[BulkFile]:
    """The recordings that sources name, each once, by their addresses: of a folder those with the
    ending of a recording, of a pattern or a manifest all. A manifest is a table with a column
    `file_name`, `file` or `path`; paths in it are relative to it.

    Raises:
        UserError: a source that is not there or may not be listed, or no recording at all.
    """
    found: dict[str, BulkFile] = {}
    skipped: Counter[str] = Counter()
    for source in sources:
        for file in _listed(source, by, skipped):
            found.setdefault(file.address, file)
    if skipped:
        counts = ", ".join(f"{n} {ending or 'without an ending'}" for ending, n in skipped.items())
        logger.warning("not recordings by their names, and skipped: %s", printable(counts))
    if not found:
        shown = ", ".join(map(public_address, sources))
        raise UserError(f"{shown}: expected recordings, found none.")
    files = sorted(found.values(), key=lambda file: file.address)
    names = Counter(file.name for file in files)
    return [file if names[file.name] == 1 else distinct(file) for file in files]


def distinct(file: BulkFile) -> BulkFile:
    """With a name of its own, where files of several sources have the same."""
    path, digest = PurePosixPath(file.name), _digest(file.address)
    return replace(file, name=str(path.with_name(f"{path.stem}-{digest}{path.suffix}")))


def _digest(address: str) -> str:
    return hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _public(address: str) -> str:
    scheme, _, rest = address.partition("://")
    if scheme not in _OBJECTS:
        return public_address(address)
    return f"{scheme}://{_USER.sub('', _QUERY.sub(f'?{HIDDEN}', rest))}"


def _path(name: str, source: str) -> PurePosixPath:
    """A path as a listing has it, without what may be a secret in a remote one."""
    if "://" in name:
        name = public_address(name).partition("?")[0]
    elif is_remote(source):
        name = _QUERY.sub("", name)
    return PurePosixPath(name)


def _listed(source: str, by: Partition, skipped: Counter[str]) -> Iterator[BulkFile]:
    shown = public_address(source)
    if not is_remote(source) and source.lower().endswith(SUFFIXES) and os.path.isfile(source):
        yield from _of_manifest(source, by)
        return
    storage, path = open_storage(source)
    try:
        if any(mark in path for mark in "*?[") and not storage.exists(path):
            entries = storage.glob(path, detail=True)
            folders = [str(PurePosixPath(name).parent) for name in entries]
            root = os.path.commonpath(folders) if folders else ""
            yield from (_file(storage, entries[name], source, root, by) for name in sorted(entries))
            return
        if storage.isfile(path):
            entry = storage.info(path)
            yield _file(storage, entry, source, None, by)
            return
        if not storage.isdir(path):
            raise UserError(f"{shown}: no such file or folder.")
        entries = storage.find(path, detail=True)
    except UserError:
        raise
    except Exception as error:  # of whatever library
        raise UserError(f"{shown}: cannot be listed: {problem(error, source)}.") from None
    for name in sorted(entries):
        inside = PurePosixPath(name)
        if not is_visible(inside, PurePosixPath(path)):
            continue
        if is_recording(inside):
            yield _file(storage, entries[name], source, path, by)
        else:
            skipped[inside.suffix.lower()] += 1


def _of_manifest(source: str, by: Partition) -> Iterator[BulkFile]:
    beside = Path(source).resolve().parent
    for number, row in numbered_rows(source):
        column = next((name for name in _COLUMNS if row.get(name)), None)
        if column is None:
            raise UserError(
                f"{source}, row {number}: expected a recording in a column {', '.join(_COLUMNS)}, "
                f"found columns {', '.join(map(str, row))}."
            )
        named = str(row[column])
        address = named if "://" in named else str(beside / named)
        storage, path = open_storage(address)
        try:
            entry = storage.info(path)
        except Exception:  # it is among the errors, when it is its turn
            entry = {"name": path, "size": 0}
        yield _file(storage, entry, address, None, by, name=named)


def _file(
    storage: Any,
    entry: dict[str, Any],
    source: str,
    root: str | None,
    by: Partition,
    *,
    name: str = "",
) -> BulkFile:
    """A file of a listing, under a root; or, without one, the source itself."""
    path = _path(entry["name"], source)
    above = path.parent if root is None else _path(root, source)
    inside = path.relative_to(above) if path.is_relative_to(above) else PurePosixPath(path.name)
    if name and "://" not in name:
        inside = PurePosixPath(os.path.normpath(name).lstrip("./"))
    inside = inside if inside.name else PurePosixPath(_UNNAMED)
    address = str(PurePosixPath(entry["name"]))
    if is_remote(source):
        address = source if root is None else _address(storage, source, entry["name"])
    when = next((entry[name] for name in _TIMES if entry.get(name)), None)
    version = next((str(entry[name]) for name in _VERSIONS if entry.get(name)), str(when or ""))
    partition = _day(when) if by == "day" else str(inside.parent)
    return BulkFile(address, str(inside), partition, int(entry.get("size") or 0), version)


def _address(storage: Any, source: str, name: str) -> str:
    """The address of a file of a listing, with what opens it."""
    scheme, _, rest = source.partition("://")
    host = rest.split("/", 1)[0]
    has_host = "://" not in name and name.startswith("/") and scheme != "memory"
    return f"{scheme}://{host}{name}" if has_host else str(storage.unstrip_protocol(name))


def _day(when: Any) -> str:
    """The UTC day of a time as file systems give it."""
    if isinstance(when, int | float):
        when = datetime.fromtimestamp(when, UTC)
    if isinstance(when, datetime):
        return (when.astimezone(UTC) if when.tzinfo else when).date().isoformat()
    return str(when)[:10] if when else "unknown"
