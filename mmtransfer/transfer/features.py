"""The cache under the freeze line: what lies below is computed once per example and kept on disk.

Rows are written as Arrow files in shards, so that an interrupted computation goes on where it
stopped and memory stays bounded, and are memory-mapped. The folder's name is a digest of weights,
preprocessing, data and what is kept, so an entry is never stale; it does not depend on batch size
or head. Each shard ends in its own digest: one that is damaged is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmtransfer.cache import atomic_path, cache_path
from mmtransfer.errors import UserError
from mmtransfer.progress import track

logger = logging.getLogger(__name__)
_VERSION = "1"  # raise it when the computation or the layout changes
_SHARD_BYTES = 64 << 20
_BATCH = 256  # examples
_SPARE_BYTES = 256 << 20  # left free on the disk
_DIGEST_BYTES = hashlib.sha256().digest_size  # behind a shard's last row, where Arrow has ended

Compute = Callable[[Sequence[int]], Iterable[tuple[int, np.ndarray]]]


def weights_digest(modules: Iterable[nn.Module], config: Any = None) -> str:
    """Identity of modules by their weights and the configuration that says how they are used."""
    digest = hashlib.blake2b(digest_size=16)
    for number, module in enumerate(modules):
        for name, value in module.state_dict().items():
            digest.update(f"{number} {name} {tuple(value.shape)} {value.dtype}".encode())
            plain = value.detach().cpu().contiguous()
            digest.update(
                plain.view(torch.uint8).numpy() if plain.ndim else plain.numpy().tobytes()
            )
    if config is not None:
        # What a training run adds to a configuration does not change what the layers compute.
        kept = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}
        for name in (
            *("_name_or_path", "name_or_path", "transformers_version"),
            *("shortest_context_s", "window_s"),  # notes that change no activation
        ):
            kept.pop(name, None)
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def cache_key(**parts: Any) -> str:
    """Digest of everything that a cache entry depends on."""
    text = json.dumps({"version": _VERSION, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class FeatureStore:
    """Activations of a set of examples, read from memory-mapped Arrow files."""

    def __init__(self, folder: Path, dtype: str):
        import pyarrow as pa

        self._dtype = np.dtype(dtype)
        self._buffers: list[np.ndarray] = []
        tables = []  # keep the mappings alive
        buffer_of, start_of, index_of, shapes = [], [], [], []
        for path in sorted(folder.glob("*.arrow")):
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            tables.append(table)
            index_of.append(table.column("index").to_numpy())
            shapes.append(np.array(table.column("shape").to_pylist(), np.int64))
            for chunk in table.column("data").chunks:
                _, offsets, data = chunk.buffers()
                starts = np.frombuffer(offsets, np.int64)[chunk.offset :][: len(chunk)]
                buffer_of.append(np.full(len(chunk), len(self._buffers)))
                start_of.append(starts)
                self._buffers.append(np.frombuffer(data, np.uint8))
        self._tables = tables
        order = np.argsort(np.concatenate(index_of))
        self._buffer = np.concatenate(buffer_of)[order]
        self._start = np.concatenate(start_of)[order]
        self._shape = np.concatenate(shapes)[order]

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> np.ndarray:
        """One example's activations, a read-only view of the file."""
        shape = self._shape[index]
        start = self._start[index]
        size = int(shape.prod()) * self._dtype.itemsize
        data = self._buffers[self._buffer[index]][start : start + size]
        return data.view(self._dtype).reshape(shape)


def cached_features(
    name: str, key: str, values: Sequence[int], compute: Compute, *, dtype: str
) -> FeatureStore:
    """The store of that key; what of it is not there yet, or damaged, is computed first.

    `values` is the number of values that each example will have; `compute` yields (index, values)
    for the indices it is given. Two processes that want the same entry: one computes, the other
    waits.

    Raises:
        UserError: the disk would not hold it, or values that `dtype` cannot represent.
    """
    from filelock import FileLock

    folder = cache_path("features", key)
    if folder.is_dir() and not (folder / "complete.json").exists():  # to be gone on with
        folder = cache_path("features", key, "complete.json").parent
    done = folder / "complete.json"
    shards = dict(_shards(folder, values, np.dtype(dtype).itemsize))
    if not done.exists() or not all(map(_is_whole, shards)):
        with FileLock(f"{folder}.lock"):
            todo = {path: rows for path, rows in shards.items() if not _is_whole(path)}
            for path in todo:
                if path.exists():
                    logger.warning("%s: damaged; computed anew", path)
            try:
                _write(name, folder, todo, values, compute, dtype)
            except OSError as error:
                raise UserError(
                    f"The cache of {name} in {folder.parent} cannot be written "
                    f"({error.strerror or error}). What is in it is kept; free space and "
                    "run again, or set MMTRANSFER_CACHE to a folder on a larger disk."
                ) from None
            with atomic_path(done) as part:
                part.write_text(json.dumps({"examples": len(values), "dtype": dtype}))
    return FeatureStore(folder, dtype)


def _is_whole(path: Path) -> bool:
    """Whether a shard is there as it was written."""
    if not path.is_file():
        return False
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        return file.read() == digest.digest()


def _write(
    name: str,
    folder: Path,
    todo: dict[Path, list[int]],
    values: Sequence[int],
    compute: Compute,
    dtype: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = np.dtype(dtype).itemsize
    needed = size * sum(values[index] for rows in todo.values() for index in rows)
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise UserError(
            f"The cache of {name} needs {needed / 2**30:.2f} GiB in {folder.parent}, where "
            f"{free / 2**30:.2f} GiB are free. Free space, set MMTRANSFER_CACHE to a folder on a "
            "larger disk, give the head fewer layers (head.layers), or set "
            "transfer.cache: none."
        )
    logger.info(
        "computing the cache of %s once: %d examples, %.1f MiB",
        name,
        sum(len(rows) for rows in todo.values()),
        needed / 2**20,
    )

    def results() -> Iterator[tuple[int, int, np.ndarray]]:
        for number, rows in enumerate(todo.values()):
            for index, array in compute(rows):
                yield number, index, array

    total = sum(len(rows) for rows in todo.values())
    rows_iterator = iter(track(results(), f"features of {name}", total=total))
    for path, rows in todo.items():
        with atomic_path(path) as part:
            _write_shard(part, rows_iterator, len(rows), dtype)


def _shards(folder: Path, values: Sequence[int], size: int) -> Iterator[tuple[Path, list[int]]]:
    """Files of an entry, each with the examples in it: sorted by length, whatever the batch size
    is.
    """
    shard: list[int] = []
    used = number = 0
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        if shard and used + values[index] * size > _SHARD_BYTES:
            yield folder / f"{number:06}.arrow", shard
            shard, used, number = [], 0, number + 1
        shard.append(index)
        used += values[index] * size
    if shard:
        yield folder / f"{number:06}.arrow", shard


def _write_shard(
    path: Path, rows: Iterator[tuple[int, int, np.ndarray]], count: int, dtype: str
) -> None:
    import pyarrow as pa

    schema = pa.schema(
        {"index": pa.int64(), "shape": pa.list_(pa.int32()), "data": pa.large_binary()}
    )
    with pa.ipc.new_stream(str(path), schema) as writer:
        batch: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            _, index, array = next(rows)
            plain = np.ascontiguousarray(array, np.dtype(dtype))
            if not np.isfinite(plain).all():
                raise UserError(
                    f"Activations of the frozen layers do not fit {dtype}. Set "
                    "transfer.cache_dtype: float32."
                    if dtype == "float16"
                    else "Activations of the frozen layers are not finite; the weights of the "
                    "source model are damaged."
                )
            batch.append({"index": index, "shape": list(plain.shape), "data": plain.tobytes()})
            if len(batch) == _BATCH or number == count:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    with path.open("ab") as file:
        file.write(digest)
