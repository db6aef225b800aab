"""Weights from before safetensors, `pytorch_model.bin`: opened in a process of its own, by the part
of pickle that makes tensors alone, with a limit to its memory; written as safetensors, once.

    python -m mmtransfer.hub.pickled TARGET SOURCE...
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mmtransfer.cache import cache_path, is_whole, put, seal
from mmtransfer.errors import UserError
from mmtransfer.hub.files import files_digest, pickled_files

logger = logging.getLogger(__name__)
_TOO_LARGE = "it needs more memory than tensors of its size"
_SPARE_BYTES = 1 << 30  # beside the weights, for what the libraries need
_COPIES = 3  # of the weights: as they are opened, made contiguous, written
_SLOWEST_BYTES_S = 2 << 20
_PATIENCE_S = 120.0
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SETTINGS = ("config.json", "generation_config.json")
_WEIGHTS = "model.safetensors"


@contextmanager
def safe_weights(folder: Path, kind: str = "model") -> Iterator[Path]:
    """A folder with the weights of a checkpoint as safetensors: that folder itself, where they are.

    `kind` is `model` or `adapter`.

    Raises:
        UserError: pickled weights that are damaged, too large, or more than tensors.
    """
    sources = pickled_files(folder, kind)
    if not sources:
        yield folder
        return
    weights = _converted(sources)
    with TemporaryDirectory() as plain:
        for name in _ADAPTER[:1] if kind == "adapter" else _SETTINGS:
            if (folder / name).is_file():
                Path(plain, name).write_bytes((folder / name).read_bytes())
        name = _ADAPTER[1] if kind == "adapter" else _WEIGHTS
        Path(plain, name).symlink_to(weights.resolve())
        yield Path(plain)


def _converted(sources: Sequence[Path]) -> Path:
    from filelock import FileLock

    folder = cache_path("safetensors", files_digest(sources)[:32])
    if not is_whole(folder):
        with FileLock(f"{folder}.lock"):
            if not is_whole(folder):
                logger.info("converting %s to safetensors, once", sources[0])
                folder = put(folder, partial(_convert_and_seal, sources))
    return folder / _WEIGHTS


def _convert_and_seal(sources: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    _convert_apart(sources, folder / _WEIGHTS)
    seal(folder)


def _convert_apart(sources: Sequence[Path], target: Path) -> None:
    size = sum(source.stat().st_size for source in sources)
    command = [sys.executable, "-m", "mmtransfer.hub.pickled", str(target), *map(str, sources)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE_S + size / _SLOWEST_BYTES_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = "it takes too long"
    else:
        if done.returncode == 0:
            return
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        was_killed = done.returncode < 0 or not lines
        reason = _TOO_LARGE if was_killed else lines[-1][:200]
    raise UserError(
        f"{sources[0]}: cannot be loaded as weights ({reason}). Expected a dictionary of tensors "
        "by name and nothing else; take a checkpoint with safetensors."
    )


# --- the process of its own ----------------------------------------------------------------------


def _convert(target: Path, sources: Sequence[Path]) -> None:
    """Write what the sources hold.

    Raises:
        ValueError: something that is not a tensor.
    """
    import torch
    from safetensors.torch import save_file

    _limit_memory(_COPIES * sum(source.stat().st_size for source in sources) + _SPARE_BYTES)
    found: dict[str, torch.Tensor] = {}
    for source in sources:
        part = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(part, dict):
            raise ValueError(f"{source.name} holds a {type(part).__name__}")
        for name, value in part.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise ValueError(f"{name!r:.60} in {source.name} is a {type(value).__name__}")
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(f"{name!r:.60} in {source.name} is not a plain tensor")
            # A copy each: tensors that share their memory would be refused, and a view of little
            # memory can be as large as it says.
            found[name] = value.detach().contiguous().clone()
    save_file(found, target, metadata={"format": "pt"})


def _limit_memory(more: int) -> None:
    """End this process when it takes so much more than now."""
    try:
        import resource
    except ImportError:  # no POSIX
        return
    status = Path("/proc/self/status")
    used = 0
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmData:"))
        used = int(line.split()[1]) * 1024
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + more
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: Sequence[str]) -> str | None:
    """Convert, or say in one line why not."""
    try:
        _convert(Path(arguments[0]), [Path(name) for name in arguments[1:]])
    except MemoryError:
        return _TOO_LARGE
    except Exception as error:  # whatever a damaged file brings about
        text = " ".join(str(error).split())
        if "memory" in text and "alloc" in text:
            return _TOO_LARGE
        if "weights_only" in text:
            return "it holds more than tensors, which is never run, or is damaged"
        return text[:200] or type(error).__name__
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
