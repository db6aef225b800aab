"""Files of a model: in packages, in folders, on the Hub; and which of them it is loaded from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mmtransfer.cache import cache_path, put
from mmtransfer.data.files import MOST_JSON_BYTES, check_regular, read_object
from mmtransfer.errors import UserError
from mmtransfer.hub.bundled import PREFIX, materialize
from mmtransfer.hub.panics import without_panics

METADATA = "mmtransfer.json"
CARD = "README.md"
SIGNATURE = "model.sig"
ADAPTER = "adapter_config.json"
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What a model on the Hub consists of; files in folders are other formats of the same."""
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin")
"""Weights from before safetensors, fetched and opened where there are no others."""
_MOST_INDEX = 64 << 20
_SHOWN = 400  # characters of what a library says


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
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        # Everything comes from one commit.
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=[*MODEL_FILES, CARD, SIGNATURE],
            ignore_patterns=["*/*"],
        )
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(
                source,
                revision=Path(folder).name,
                allow_patterns=[*MODEL_FILES, *PICKLED_FILES],
                ignore_patterns=["*/*"],
            )
        if not any(any(Path(folder).glob(p)) for p in ("*.safetensors", *PICKLED_FILES)):
            folder = snapshot_download(  # an ensemble's members
                source,
                revision=Path(folder).name,
                allow_patterns=[f"member-*/{pattern}" for pattern in MODEL_FILES],
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
    return _indexed_files(index)


def _indexed_files(index: Path) -> list[Path]:
    """The files of weights that an index names, which lie beside it.

    Raises:
        UserError: it names none, or others.
    """
    named = read_object(index, most=_MOST_INDEX).get("weight_map")
    names = set(map(str, named.values())) if isinstance(named, dict) else set()
    paths = sorted(index.parent / name for name in names if Path(name).name == name)
    if not paths or len(paths) < len(names) or not all(path.is_file() for path in paths):
        raise UserError(
            f"{index}: expected the names of the files beside it that hold the weights, found "
            "others. Save or download the model again."
        )
    return paths


def check_files(folder: Path) -> None:
    """Make sure that a model's files can be opened: regular ones, of a size that settings have, and
    no weights elsewhere.

    Raises:
        UserError: the first that is not so.
    """
    for path in model_files(folder):
        check_regular(path, most=MOST_JSON_BYTES if path.suffix == ".json" else None)
        if path.name.endswith(".safetensors.index.json"):
            for named in _indexed_files(path):
                if named.suffix != ".safetensors":
                    raise UserError(f"{path}: expected weights as safetensors, found {named.name}.")


def model_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from."""
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return sorted({*found, *pickled_files(folder), *pickled_files(folder, "adapter")})


def is_plain_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as peft writes it, and no whole model."""
    weights = ("model.safetensors", "pytorch_model.bin")
    whole = (*weights, *(f"{name}.index.json" for name in weights), METADATA)
    return (folder / ADAPTER).is_file() and not any((folder / name).is_file() for name in whole)


def files_digest(paths: Iterable[Path]) -> str:
    """Identity of files by their content; a file that has not changed is read once."""
    total = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        # By the time of its last change as well, which nobody can set.
        mark = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        known = cache_path("digests", hashlib.sha256(mark.encode()).hexdigest()[:32])
        digest = known.read_text() if known.exists() else ""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            put(known, partial(_write_text, text=digest))
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def is_failure(error: BaseException) -> bool:
    """Whether an exception is an error, also one of a library in Rust (the tokenizers): those are
    no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def load_errors(source: str, what: str) -> Iterator[None]:
    """Failures of loading a checkpoint as one line."""
    try:
        with without_panics():
            yield
    except BaseException as error:  # libraries raise whatever a wrong value brings about
        if isinstance(error, UserError) or not is_failure(error):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:_SHOWN]
        raise UserError(
            f"{source}: cannot be loaded as {what} ({first_line}). Expected a run folder, "
            "a checkpoint folder, a Hub id, or a name that `mmtransfer backbones` lists."
        ) from None
