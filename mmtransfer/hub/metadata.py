"""What a checkpoint records beside its own files, in `mmtransfer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mmtransfer.data.files import read_object
from mmtransfer.errors import UserError
from mmtransfer.hub.files import METADATA

_FORMAT = 1


@dataclass(frozen=True)
class Base:
    """The pretrained model that a transfer started from."""

    source: str
    """Where it is loaded from: bundled:NAME, a Hub id, or a local folder."""
    revision: str | None = None
    """Commit on the Hub."""
    model_id: str | None = None
    """Id on the Hub, where it has one."""
    digest: str = ""
    """Identity of its weights; set where only a part is saved that stands on them."""

    @property
    def is_portable(self) -> bool:
        """Whether others can load it by name."""
        return self.model_id is not None


@dataclass(frozen=True)
class Metadata:
    """What a finished transfer says of itself."""

    task: str
    """What it is loaded as: speech, ctc, sentiment, sound."""
    form: str
    """full, adapter or head; see `networks`."""
    base: Base | None
    """What it started from."""
    language: str | None = None
    labels: list[str] | None = None
    """Names of its classes."""
    symbols: list[str] | None = None
    """Output symbols of a CTC head."""
    head: dict[str, Any] | None = None
    """Settings of its head."""
    text: dict[str, Any] | None = None
    """How texts become windows."""
    temperature: Any = 1.0
    """Divides the logits of classes."""
    shortest_context_s: float | None = None
    window_s: float | None = None
    """Longest stretch of audio taken in at a time."""
    short_reader: dict[str, Any] | None = None
    """Of an adapter that decodes short contexts: `margin_s`, `languages`, `longest_s`."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What a task records beside these."""


def write_metadata(folder: Path, **values: Any) -> None:
    """Write what a checkpoint's own files do not say."""
    base = values.get("base")
    if isinstance(base, Base):
        # Where a base has no public place, only its name is written, not where it lay.
        named = base if base.is_portable else replace(base, source=Path(base.source).name)
        values["base"] = asdict(named)
    text = json.dumps({"format": _FORMAT, **values}, indent=2, ensure_ascii=False)
    (folder / METADATA).write_text(text + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> Metadata | None:
    """What `write_metadata` wrote; None for another checkpoint.

    Raises:
        UserError: a file that is damaged or of a later version.
    """
    path = folder / METADATA
    if not path.is_file():
        return None
    values = read_object(path)
    number = values.pop("format", None)
    if type(number) is not int:
        raise damaged(path)
    if number > _FORMAT:
        raise UserError(
            f"{path}: format {number} is newer than this version reads ({_FORMAT}). Upgrade "
            "mmtransfer."
        )
    known = {each.name for each in fields(Metadata)} - {"own"}
    own = {name: values.pop(name) for name in list(values) if name not in known}
    try:
        if values["base"] or values["form"] != "full":  # other forms stand on one
            values["base"] = Base(**values["base"])
        found = Metadata(**values, own=own)
    except (KeyError, TypeError):
        raise damaged(path) from None
    if not _is_sound(found):
        raise damaged(path)
    return found


def _is_sound(found: Metadata) -> bool:
    """Whether its values are of the kinds that loaders expect."""
    lists = (found.labels, found.symbols)
    return (
        isinstance(found.task, str)
        and isinstance(found.form, str)
        and (found.base is None or _is_sound_base(found.base))
        and isinstance(found.language, str | None)
        and all(isinstance(names, list | None) for names in lists)
        and all(isinstance(name, str) for names in lists for name in names or [])
        and all(isinstance(x, dict | None) for x in (found.head, found.text, found.short_reader))
        and all(
            isinstance(x, int | float | None) for x in (found.shortest_context_s, found.window_s)
        )
    )


def _is_sound_base(base: Any) -> bool:
    return (
        isinstance(base, Base)
        and isinstance(base.source, str)
        and isinstance(base.revision, str | None)
        and isinstance(base.model_id, str | None)
        and isinstance(base.digest, str)
    )


def damaged(path: Path) -> UserError:
    """That a file of a model cannot be used."""
    return UserError(f"{path}: damaged; save or download the model again.")
