"""The cameras of a site: from a YAML file, or sources that get names."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Lt, MinLen

from mmtransfer.data.former_names import MONITOR, with_new_names
from mmtransfer.data.printing import printable, shortened
from mmtransfer.errors import UserError
from mmtransfer.monitoring.keywords import Keywords
from mmtransfer.speech.addresses import checked_address, public_address, without_secrets

_LONGEST_NAME = 180  # bytes of a file's name, which may have 255 with all that is put to it
_SHOWN = 80  # characters of what was found in place of a camera


Days = Annotated[float, Gt(0), Lt(100_000)]


@dataclass(frozen=True)
class Retention:
    """For how many days something is kept; None for ever."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    text: Days | None = None
    """What is in the journal: text, alerts, sounds."""
    clips: Days | None = None
    """Recordings around alerts."""
    audio: Days | None = None
    """Audio that waits to be recognised."""


@dataclass(frozen=True)
class Camera:
    """A source with a name and settings of its own."""

    # Checked by pydantic when it is read from a file; without one, pydantic is not loaded.
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Annotated[str, MinLen(1)]
    """Short and unique; it stands in every line, so it holds no control characters."""
    url: Annotated[str, MinLen(1)]
    """Address of a stream, an audio device, or the path (relative to this file) of a recording or
    of a folder that receives recordings."""
    priority: int = 0
    """When the queue is full, segments of lower priority are dropped first."""
    keywords: Sequence[str] = ()
    """Words and phrases that raise an alert."""
    language: str | None = None
    """Language of the speech (ISO code, or auto); by default that of the monitor."""
    model: str | None = None
    """Speech model for this camera; by default that of the monitor."""
    loud_db: Annotated[float, Gt(0), Lt(100)] | None = None
    """Alert on sounds this many dB above the background level (median of the last minute)."""
    channels: Literal["mix", "split"] | Annotated[int, Ge(1)] = "mix"
    """mix: average all channels; split: transcribe each separately, as NAME-1, NAME-2 and so on (a
    call with one speaker on each); or one of them by its number."""
    live: bool | None = None
    """Whether it is a live stream or a recording; by default detected."""
    redact: Sequence[str | Mapping[str, str]] = ()
    """What is taken out of its texts before they are written or sent: phone, email, card,
    `names: FILE` (one on each line, relative to this file), `pattern: REGEX`."""
    redact_clips: bool = False
    """Whether what is redacted is silenced in clips, too."""
    retention: Retention | None = None
    """How long what it gives is kept; by default as the monitor's option says."""


def cameras_of(content: Mapping[str, Any], path: Path) -> list[Camera]:
    """Cameras listed under `cameras` in the content of a YAML file.

    Raises:
        UserError: no cameras, an unknown key, a value that cannot be used, or a name that occurs
            twice.
    """
    from pydantic import TypeAdapter, ValidationError

    reader, rows = TypeAdapter(Camera), content.get("cameras")
    if not isinstance(rows, list) or not rows:
        kind = "an empty list" if rows == [] else type(rows).__name__
        raise UserError(
            f"{path}: expected a list under 'cameras', each with name and url; found "
            f"{'none' if rows is None else kind}."
        )
    cameras: list[Camera] = []
    known = ", ".join(field.name for field in fields(Camera))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}: camera {number}: expected keys with values ({known}), found "
                f"{without_secrets(shortened(row)[:_SHOWN])}."
            )
        where = f"{path}: camera {number}"
        try:
            camera = reader.validate_python(with_new_names(row, MONITOR, where))
            checked_address(camera.url)
            Keywords(camera.keywords)
            if camera.redact:
                camera = replace(camera, redact=rules_beside(path, camera.redact))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}: {key}: {first['msg']}. Keys are {known}.") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if public_address(camera.name) != camera.name:
            raise UserError(f"{where}: name: it holds a password or token; give another name.")
        if printable(camera.name) != camera.name:
            raise UserError(
                f"{where}: name: expected no control characters, found {camera.name!r}."
            )
        if same_form(camera.name) in {same_form(other.name) for other in cameras}:
            raise UserError(f"{where}: the name '{camera.name}' occurs twice.")
        beside = path.parent / camera.url
        if "://" not in camera.url and beside.exists():
            camera = replace(camera, url=str(beside))
        cameras.append(camera)
    return cameras


def rules_beside(
    path: Path, rules: Sequence[str | Mapping[str, str]]
) -> list[str | Mapping[str, str]]:
    """Rules of redaction as they stand in a file, with names of files relative to it."""
    return [
        {"names": str(path.parent / str(rule["names"]))}
        if isinstance(rule, Mapping) and list(rule) == ["names"]
        else rule
        for rule in rules
    ]


def named_cameras(sources: Iterable[str | Path | Camera]) -> list[Camera]:
    """Sources with names: of a file, its own without the ending; of a stream, its host and path
    without user and password; numbered where a name is taken.

    Raises:
        UserError: an address that is none, or a name that two cameras have.
    """
    listed = [s if isinstance(s, Camera) else str(s) for s in sources]
    given = [source.name for source in listed if isinstance(source, Camera)]
    taken = set(given)
    if len(taken) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        raise UserError(f"the camera's name '{twice}' occurs twice. Give each its own.")
    cameras = []
    for source in listed:
        checked_address(source if isinstance(source, str) else source.url)
        if isinstance(source, str):
            name = stem = printable(_short_name(source))
            number = 1
            while name in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name)
            source = Camera(name=name, url=source)
        cameras.append(source)
    return cameras


def _short_name(source: str) -> str:
    if "://" not in source:
        return Path(public_address(source)).stem or source
    address = urlsplit(public_address(source))
    return f"{address.netloc}{address.path}".rstrip("/") or "stream"


def file_name(name: str) -> str:
    """A camera's or segment's name as part of a file's: names that differ never become the same,
    and none is too long for a file.
    """
    plain = re.sub(r"[^\w.@-]+", "-", name)
    if plain == name and not name.startswith(".") and len(name.encode()) <= _LONGEST_NAME:
        return name
    short = plain.lstrip(".").encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{short}-{digest[: 6 if short == plain.lstrip('.') else 16]}"


def same_form(name: str) -> str:
    """A name in the one Unicode form that names are compared in: what looks the same is the same,
    whichever system wrote it.
    """
    return unicodedata.normalize("NFC", name)
