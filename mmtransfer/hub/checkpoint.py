"""Where models come from: bundled packages, folders, the Hub; and what their checkpoints record.

Nothing here needs torch, so that a camera can be watched without loading it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmtransfer.cache import atomic_path, cache_path
from mmtransfer.data.languages import read_language
from mmtransfer.errors import UserError
from mmtransfer.hub.bundled import BUNDLES, PREFIX, get_bundle, is_installed, materialize

METADATA = "mmtransfer.json"
ADAPTER = "adapter_config.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What a model on the Hub consists of; files in folders are other formats of the same."""
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin")
"""Weights from before safetensors, fetched and opened where there are no others."""
SHORT_PREFIX = "short_"
"""Of the files of an adapter that reads short contexts, beside the weights it stands on."""
_FORMAT = 1
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_SHIPPED = Path(__file__).parent.parent / "speech" / "short_context"
_SPEECH_TYPES = ("whisper", "wav2vec2", "hubert", "wavlm")
_SHIPPED_FOR = {"openai/whisper-tiny.en": "whisper-tiny.en", "openai/whisper-base": "whisper-base"}
"""Adapters in this package that teach a model to read short contexts."""


def fetch(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """(local folder, commit) of a source; a Hub id is downloaded.

    A run folder stands for the model in it.

    Raises:
        UserError: unknown bundled name, missing package, a folder without a model, or a Hub id
            that cannot be reached.
    """
    if source.startswith(PREFIX):
        if revision is not None:
            raise UserError(f"{source}: a bundled source has no revisions; remove 'revision'.")
        return materialize(source), None
    path = Path(source)
    if path.is_dir():
        for folder in (path / "model", path):
            if any((folder / name).is_file() for name in ("config.json", METADATA, ADAPTER)):
                return folder, None
        raise UserError(
            f"{source}: expected a run folder (with model/), a checkpoint folder (with "
            f"config.json) or an adapter's (with {ADAPTER}); found none."
        )
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such model folder.")
    return _download(source, revision)


def _download(source: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        # Everything comes from one commit.
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=["*/*"],
        )
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(
                source,
                revision=Path(folder).name,
                allow_patterns=[*MODEL_FILES, *PICKLED_FILES],
                ignore_patterns=["*/*"],
            )
    except (OSError, ValueError, HFValidationError, HTTPError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"{source}: cannot be downloaded from the Hub ({reason}). Expected a run folder, a "
            "checkpoint folder, a Hub id, or a name that `mmtransfer backbones` lists."
        ) from None
    return Path(folder), Path(folder).name


def pickled_files(folder: Path, kind: str = "model") -> list[Path]:
    """The weights from before safetensors that a checkpoint has in their place, of a `model` or an
    `adapter`; none where it has safetensors.

    Raises:
        UserError: an index of such weights that names none.
    """
    safe, pickled = f"{kind}.safetensors", "pytorch_model.bin"
    if kind == "adapter":
        safe, pickled = "adapter_model.safetensors", "adapter_model.bin"
    if (folder / safe).is_file() or (folder / f"{safe}.index.json").is_file():
        return []
    if (folder / pickled).is_file():
        return [folder / pickled]
    index = folder / f"{pickled}.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = sorted(folder / name for name in names if Path(name).name == name)
    except (ValueError, KeyError, TypeError, AttributeError):
        names, paths = set(), []
    if not paths or len(paths) < len(names) or not all(path.is_file() for path in paths):
        raise UserError(
            f"{index}: expected the names of the files beside it that hold the weights, found "
            "others. Save or download the model again."
        )
    return paths


def model_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from."""
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return sorted({*found, *pickled_files(folder), *pickled_files(folder, "adapter")})


def make_base(source: str, revision: str | None) -> Base:
    """What a transfer from this source records of it."""
    model_id: str | None = source
    if source.startswith(PREFIX):
        model_id = get_bundle(source).base_model
    elif Path(source).is_dir():
        source, model_id = str(Path(source).resolve()), None
    return Base(source, revision, model_id)


@contextmanager
def load_errors(source: str, what: str) -> Iterator[None]:
    """Failures of loading a checkpoint as one line."""
    try:
        yield
    except Exception as error:
        known = (OSError, ValueError, KeyError, RuntimeError)
        is_known = isinstance(error, known) or type(error).__name__ == "SafetensorError"
        if isinstance(error, UserError) or not is_known:
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: cannot be loaded as {what} ({first_line}). Expected a run folder, "
            "a checkpoint folder, a Hub id, or a name that `mmtransfer backbones` lists."
        ) from None


def model_type(source: str, folder: Path) -> tuple[str, list[str]]:
    """(model type, architectures) of a checkpoint folder.

    Raises:
        UserError: no readable config.json.
    """
    with load_errors(source, "a model"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"]), list(config.get("architectures") or [])


# --- speech recognisers --------------------------------------------------------------------------


def is_ctc(source: str, folder: Path) -> bool:
    """Whether a folder holds a CTC model."""
    metadata = read_metadata(folder)
    if metadata is not None:
        return metadata.get("task") == "ctc"
    return any(name.endswith("ForCTC") for name in model_type(source, folder)[1])


def kind_of(source: str, *, revision: str | None = None) -> str:
    """What a model is for: `speech` (a Whisper), `ctc` or `sentiment`.

    Raises:
        UserError: not found.
    """
    folder, _ = fetch(source, revision)
    metadata = read_metadata(folder)
    if metadata is not None:
        return str(metadata["task"])
    if is_ctc(source, folder):
        return "ctc"
    return "speech" if model_type(source, folder)[0] in _SPEECH_TYPES else "sentiment"


@dataclass(frozen=True)
class SpeechParts:
    """Where the parts of a Whisper lie."""

    weights: Path
    """Folder of the weights."""
    folder: Path
    """Folder of tokenizer, feature extractor and generation settings."""
    adapter: Path | None
    """Folder of an adapter that belongs into the weights."""
    short: dict[str, Any] | None
    """The adapter that reads short contexts: `folder`, `prefix` of its files,
    `shortest_context_s`, `margin_s`, `languages`."""
    recorded: Base | None
    """What the weights must be, where an adapter says so."""
    commit: str | None
    metadata: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """Every file that the result depends on."""
        folders = {self.weights, self.folder, self.adapter, self.short and self.short["folder"]}
        return sorted({path for folder in folders if folder for path in model_files(folder)})


def speech_parts(source: str, revision: str | None = None) -> SpeechParts:
    """Find the parts of a Whisper without loading any.

    Raises:
        UserError: not found, or no Whisper.
    """
    folder, commit = fetch(source, revision)
    metadata = read_metadata(folder) or {}
    weights, adapter, recorded = folder, None, None
    is_plain = is_plain_adapter(folder)
    model_id = make_base(source, commit).model_id
    short = _SHIPPED / _SHIPPED_FOR[model_id] if model_id in _SHIPPED_FOR else None
    if metadata.get("form") == "adapter":
        # The model beneath comes from its own place; the rest stands in this folder.
        recorded = metadata["base"]
        weights, _ = fetch(recorded.source, recorded.revision)
        if "short_reader" not in metadata:
            adapter = folder
    if is_plain and not any((folder / name).is_file() for name in _PROCESSOR):
        folder = weights
    if "short_reader" in metadata:
        short = folder
    kind, _ = model_type(source, weights)
    if kind != "whisper":
        raise UserError(f"{source}: expected a Whisper model, found '{kind}'.")
    taught = read_metadata(short) if short is not None else None
    return SpeechParts(
        weights,
        folder,
        adapter,
        None
        if taught is None
        else {
            "folder": short,
            "prefix": SHORT_PREFIX if taught["form"] == "full" else "",
            "shortest_context_s": taught["shortest_context_s"],
            **taught["short_reader"],
        },
        recorded,
        commit,
        metadata,
    )


def choose_language(
    source: str,
    generation: dict[str, Any],
    language: str | None,
    *,
    can_detect: bool = True,
) -> str | None:
    """The language that a Whisper reads: the one asked for, else that of its checkpoint; None for
    an English-only model, `auto` where it is to be detected, if it `can` be.

    Raises:
        UserError: a language it does not have, or a multilingual model and none named.
    """
    if language not in (None, "auto"):
        language = read_language(str(language), f"{source}: language")
    if language == "auto" and not can_detect:
        raise UserError(f"{source}: training needs the language of the speech, found 'auto'.")
    if not generation.get("is_multilingual"):
        if language not in (None, "en", "auto"):
            raise UserError(f"{source}: English only, but the language is set to '{language}'.")
        return None
    language = language or generation.get("language")
    known = sorted(token.strip("<|>") for token in generation["lang_to_id"])
    if language is None:
        named = (
            "--language en, or auto to detect it"
            if can_detect
            else "data.language: en, or a column 'language'"
        )
        raise UserError(f"{source}: multilingual; name the language ({named}).")
    if language not in [*known, "auto"]:
        raise UserError(f"{source}: no language '{language}'; it has {', '.join(known)}.")
    return language


def files_digest(paths: Iterable[Path]) -> str:
    """Identity of files by their content; a file that has not changed is read once."""
    total = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        mark = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        known = cache_path("digests", hashlib.sha256(mark.encode()).hexdigest()[:32])
        if not known.exists():
            with path.open("rb") as file, atomic_path(known) as part:
                part.write_text(hashlib.file_digest(file, "sha256").hexdigest())
        total.update(f"{path.name} {known.read_text()}\n".encode())
    return total.hexdigest()


def model_digest(source: str, revision: str | None = None) -> str:
    """Identity of a model by the files that it is loaded from.

    Raises:
        UserError: not found.
    """
    folder, _ = fetch(source, revision)
    metadata = read_metadata(folder)
    kind = metadata["task"] if metadata else model_type(source, folder)[0]
    if kind in ("speech", "whisper"):
        return files_digest(speech_parts(source, revision).files)
    folders = {folder}
    if metadata and metadata["form"] != "full":
        folders.add(fetch(metadata["base"].source, metadata["base"].revision)[0])
    return files_digest(path for folder in folders for path in model_files(folder))


# --- what a checkpoint records -------------------------------------------------------------------


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


def write_metadata(folder: Path, **values: Any) -> None:
    """Write what a checkpoint's own files do not say."""
    base = values.get("base")
    if isinstance(base, Base):
        # Where a base has no public place, only its name is told, not where it lay.
        named = base if base.is_portable else replace(base, source=Path(base.source).name)
        values["base"] = asdict(named)
    text = json.dumps({"format": _FORMAT, **values}, indent=2, ensure_ascii=False)
    (folder / METADATA).write_text(text + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """What `write_metadata` wrote, or what follows from a plain peft adapter; None for another
    checkpoint.

    Raises:
        UserError: a file that is damaged or of a later version, or an adapter without its base.
    """
    path = folder / METADATA
    if not path.is_file():
        return _adapter_metadata(folder) if is_plain_adapter(folder) else None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        number = int(values["format"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise _damaged(path) from None
    if number > _FORMAT:
        raise UserError(
            f"{path}: format {number} is newer than this version reads ({_FORMAT}). Upgrade "
            "mmtransfer."
        )
    if not {"task", "form", "base"} <= values.keys():
        raise _damaged(path)
    try:
        if values["base"] or values["form"] != "full":  # other forms stand on one
            values["base"] = Base(**values["base"])
    except TypeError:
        raise _damaged(path) from None
    return values


def is_plain_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as peft writes it, and no whole model."""
    weights = ("model.safetensors", "pytorch_model.bin")
    whole = (*weights, *(f"{name}.index.json" for name in weights), METADATA)
    return (folder / ADAPTER).is_file() and not any((folder / name).is_file() for name in whole)


def _adapter_metadata(folder: Path) -> dict[str, Any]:
    """What `write_metadata` would have written for a plain adapter: it names its base itself."""
    path = folder / ADAPTER
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        name, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path) from None
    where = f"{path}: base_model_name_or_path"
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise UserError(f"{where}: expected the model it was made for, found {name!r:.60}.")
    if "://" in name:
        shown = re.sub(r"//[^/]*@|[?#].*", "//", name)[:100]
        raise UserError(
            f"{where}: expected a Hub id or a model folder, found an address ({shown}). Download "
            "that model and name its folder there."
        )
    kind, base = _base_of_adapter(folder, name, revision, where)
    return {"task": kind, "form": "adapter", "base": base}


def _base_of_adapter(folder: Path, name: str, revision: str | None, where: str) -> tuple[str, Base]:
    """(task, base) of a plain adapter."""
    bundled = [b for b in BUNDLES.values() if b.base_model == name and is_installed(b)]
    source = name
    if bundled and revision is None:
        source = f"{PREFIX}{bundled[0].name}"
    elif (folder / name).is_dir():
        source = str(folder / name)
    elif Path(name).expanduser().is_dir():
        source = str(Path(name).expanduser())
    try:
        beneath, commit = fetch(source, revision)
        if (
            is_plain_adapter(beneath)
            or (read_metadata(beneath) or {"form": "full"})["form"] != "full"
        ):
            raise UserError(f"expected a whole model, found {name}, an adapter or a head.")
        kind, architectures = model_type(source, beneath)
    except UserError as error:
        raise UserError(f"{where}: the base {name} is not available: {error}") from None
    task = "speech" if kind == "whisper" else "sentiment"
    if any(architecture.endswith("ForCTC") for architecture in architectures):
        task = "ctc"
    model_id = None if Path(source).is_dir() else name
    return task, Base(source, commit or revision, model_id)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; save or download the model again.")
