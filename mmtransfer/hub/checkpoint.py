"""What a model is and where it lies, decided once: `resolve`. Whatever loads takes its answer.

Nothing here needs torch, so that a camera can be monitored without loading it.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.hub.bundled import BUNDLES, PREFIX, get_bundle, is_installed
from mmtransfer.hub.files import (
    ADAPTER,
    PROCESSOR,
    check_files,
    fetch,
    files_digest,
    is_plain_adapter,
    load_errors,
    model_files,
)
from mmtransfer.hub.metadata import Base, Metadata, damaged, read_metadata
from mmtransfer.hub.settings import read_settings

SHORT_PREFIX = "short_"
"""Of the files of an adapter that decodes short contexts, beside the weights it stands on."""
_SHIPPED = Path(__file__).parent.parent / "speech" / "short_context"
_SHIPPED_FOR = {"openai/whisper-tiny.en": "whisper-tiny.en", "openai/whisper-base": "whisper-base"}
"""Adapters in this package that teach a model to decode short contexts."""


@dataclass(frozen=True)
class ShortAdapter:
    """The adapter with which a Whisper decodes short contexts."""

    folder: Path
    prefix: str
    """Of its files' names."""
    shortest_context_s: float
    margin_s: float
    """Context beyond a clip's own length."""
    languages: list[str]
    """Languages that it has learnt."""
    longest_s: float | None
    """Longest clip that it decodes; None where that was not noted."""


@dataclass(frozen=True)
class Checkpoint:
    """A model, found: what it is, and where each part of it lies. All parts stay what they were
    when it was resolved: those from the Hub are of one commit.
    """

    source: str
    """Name that it was asked for by."""
    folder: Path
    """Its own files."""
    commit: str | None
    """Of its own files on the Hub."""
    kind: str
    """What it is loaded as: `speech` (a Whisper), `ctc`, `sentiment` or `sound`."""
    architecture: str
    """Model type of its weights: whisper, wav2vec2, bert, ..."""
    classes: tuple[str, ...]
    """Classes of transformers that its weights were saved from."""
    metadata: Metadata | None
    """What is recorded of it; None for a checkpoint from elsewhere."""
    base: Checkpoint | None = None
    """The whole model beneath an adapter or a head; None for a whole model."""
    is_plain_adapter: bool = False
    """Whether it is an adapter as peft writes it."""
    asks_for_code: bool = False
    """Whether its settings name code that comes with it, which is never run."""
    short: ShortAdapter | None = None

    @property
    def form(self) -> str:
        """full, adapter or head."""
        return "full" if self.metadata is None else self.metadata.form

    @property
    def weights(self) -> Path:
        """Folder of whole weights: its own, or those beneath it."""
        return self.folder if self.base is None else self.base.folder

    @property
    def adapter(self) -> Path | None:
        """Folder of an adapter that belongs into these weights."""
        is_short = self.short is not None and self.short.folder == self.folder
        return self.folder if self.form == "adapter" and not is_short else None

    @property
    def recorded(self) -> Base | None:
        """What the weights beneath it must be; None for a whole model."""
        return None if self.base is None or self.metadata is None else self.metadata.base

    def holding(self, *patterns: str) -> Path:
        """Its own folder if such a file lies there, else that of the model beneath it."""
        has_own = any(any(self.folder.glob(pattern)) for pattern in patterns)
        return self.folder if has_own else self.weights

    def as_base(self) -> Base:
        """What a transfer that starts from it records of it."""
        if self.source.startswith(PREFIX):
            return Base(self.source, None, get_bundle(self.source).base_model)
        if Path(self.source).is_dir():
            return Base(str(Path(self.source).resolve()), None, None)
        return Base(self.source, self.commit, self.source)

    @cached_property
    def digest(self) -> str:
        """Identity by the content of every file that it is loaded from."""
        folders = {self.folder, self.weights}
        if self.short is not None:
            folders.add(self.short.folder)
        own = files_digest({path for folder in folders for path in model_files(folder)})
        members = sorted(self.folder.glob("member-*"))  # of an ensemble
        if not members:
            return own
        parts = [own, *(resolve(str(member)).digest for member in members)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def resolve(source: str, revision: str | None = None) -> Checkpoint:
    """Find a model: a run folder, a checkpoint folder, a Hub id or `bundled:NAME`; and the model
    that it stands on, if it is part of one.

    A Hub model is downloaded, at `revision` (a branch, a tag or a commit), which may as well stand
    behind its id: `USER/NAME@REVISION`.

    Raises:
        UserError: not found, or no model; a damaged record; a base that is none; a revision of
            what has none.
    """
    source, revision = _split_revision(source, revision)
    if revision is not None and Path(source).is_dir():
        raise UserError(f"{source}: a folder has no revisions; remove the revision.")
    return _resolve(source, revision, is_base=False)


def _split_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    name, mark, own = source.partition("@")
    if not mark or Path(source).exists() or source.startswith((".", "/", "~")):
        return source, revision
    if not own or revision is not None:
        raise UserError(f"{source}: expected one revision behind the @, and none beside it.")
    return name, own


def _resolve(source: str, revision: str | None, *, is_base: bool) -> Checkpoint:
    folder, commit = fetch(source, revision)
    check_files(folder)
    metadata, base = read_metadata(folder), None
    is_plain = metadata is None and is_plain_adapter(folder)
    if is_base and (is_plain or (metadata is not None and metadata.form != "full")):
        raise UserError(f"{source}: expected a whole model as base, found an adapter or a head.")
    if is_plain:
        metadata, base = _plain_adapter(folder)
    elif metadata is not None and metadata.form != "full" and metadata.base is not None:
        base = _resolve(metadata.base.source, metadata.base.revision, is_base=True)
    with load_errors(source, "a model"):
        beneath = folder if base is None else base.folder
        config = read_settings(beneath / "config.json")
        architecture = _text(beneath, config, "model_type")
        named = config.get("architectures") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise _wrong(beneath, "architectures", "names of classes", named)
        classes = tuple(named)
    kind = _kind(folder, architecture, classes) if metadata is None else metadata.task
    found = Checkpoint(
        source,
        folder,
        commit,
        kind,
        architecture,
        classes,
        metadata,
        base,
        is_plain,
        asks_for_code="auto_map" in config,
    )
    short = _short_adapter(found) if architecture == "whisper" else None
    return found if short is None else replace(found, short=short)


def _text(folder: Path, config: dict[str, Any], key: str) -> str:
    found = config.get(key)
    if not isinstance(found, str):
        raise _wrong(folder, key, "a name", found)
    return found


def _wrong(folder: Path, key: str, expected: str, found: Any) -> UserError:
    return UserError(
        f"{folder / 'config.json'}: {key}: expected {expected}, found {reprlib.repr(found)}. "
        "Correct it, or save or download the model again."
    )


def _kind(folder: Path, architecture: str, classes: tuple[str, ...]) -> str:
    """What a checkpoint from elsewhere is loaded as."""
    if any(name.endswith("ForCTC") for name in classes):
        return "ctc"
    if architecture == "whisper":
        return "speech"
    return "ctc" if _takes_sound(folder) else "sentiment"


def _takes_sound(folder: Path) -> bool:
    for path in (folder / name for name in PROCESSOR):
        if path.is_file():
            settings = read_settings(path)
            parts = [settings, settings.get("feature_extractor")]
            if any(isinstance(part, dict) and "sampling_rate" in part for part in parts):
                return True
    return False


def _short_adapter(found: Checkpoint) -> ShortAdapter | None:
    """The adapter for short contexts that a Whisper comes with, or that this package has for it."""
    shipped = _SHIPPED_FOR.get(found.as_base().model_id or "")
    folder = _SHIPPED / shipped if shipped is not None else None
    metadata = found.metadata
    if metadata is not None and metadata.short_reader is not None:
        folder = found.folder
    taught = read_metadata(folder) if folder is not None else None
    if folder is None or taught is None or taught.short_reader is None:
        return None
    try:
        return ShortAdapter(
            folder,
            SHORT_PREFIX if taught.form == "full" else "",
            float(taught.shortest_context_s or 0),
            float(taught.short_reader["margin_s"]),
            list(taught.short_reader["languages"]),
            taught.short_reader.get("longest_s"),
        )
    except (KeyError, TypeError, ValueError):
        raise damaged(folder) from None


_KINDS = {"sentiment": "a text classifier", "sound": "a sound classifier"}


def other_kind(found: Checkpoint, expected: str) -> UserError:
    """That a model is of another kind than is expected."""
    if found.asks_for_code:
        return UserError(
            f"{found.folder}: it asks for code of its own (auto_map), which is never run. Expected "
            f"{expected} of an architecture of transformers."
        )
    what = _KINDS.get(found.kind, "a speech recogniser")
    return UserError(f"{found.source}: expected {expected}, found {what} ({found.architecture}).")


# --- adapters as peft writes them ----------------------------------------------------------------


def _plain_adapter(folder: Path) -> tuple[Metadata, Checkpoint]:
    """What a plain adapter says of itself, and the model that it names as its base."""
    path = folder / ADAPTER
    settings = read_settings(path)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    where = f"{path}: base_model_name_or_path"
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise UserError(f"{where}: expected the model it was made for, found {name!r:.60}.")
    if "://" in name:
        shown = re.sub(r"//[^/]*@|[?#].*", "//", name)[:100]
        raise UserError(
            f"{where}: expected a Hub id or a model folder, found an address ({shown}). Download "
            "that model and name its folder there."
        )
    bundled = [b for b in BUNDLES.values() if b.base_model == name and is_installed(b)]
    source = name
    if bundled and revision is None:
        source = f"{PREFIX}{bundled[0].name}"
    elif (folder / name).is_dir():
        source = str(folder / name)
    elif Path(name).expanduser().is_dir():
        source = str(Path(name).expanduser())
    try:
        base = _resolve(source, revision, is_base=True)
    except UserError as error:
        raise UserError(f"{where}: the base {name} is not available: {error}") from None
    model_id = None if Path(source).is_dir() else name
    recorded = Base(source, base.commit or revision, model_id)
    return Metadata(base.kind, "adapter", recorded), base
