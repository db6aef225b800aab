"""The folder of a run: made with one model and one set of options, written by one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from mmtransfer.errors import UserError
from mmtransfer.scale.storage import Storage

_SETTINGS = "_run/settings.json"


class RunFolder:
    """A folder that belongs to `settings`: what its rows depend on.

    Raises:
        UserError: the output of another model or of other settings, or one whose settings are
            damaged.
    """

    def __init__(self, address: str, settings: Mapping[str, Any]):
        self.storage = Storage(address)
        found = self.storage.read(_SETTINGS)
        if found is None:
            if self.storage.names(""):
                raise UserError(
                    f"{self.storage.name}: expected an empty folder or one of an earlier run, "
                    "found other files. Choose another --output."
                )
            self.storage.write(_SETTINGS, json.dumps(dict(settings), indent=1).encode())
            return
        before = self._before(found)
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.storage.name}: was made with {name} {_shown(before.get(name))}, and "
                    f"{_shown(value)} was asked for. Choose another --output."
                )

    def _before(self, found: bytes) -> dict[str, Any]:
        with suppress(ValueError):
            before = json.loads(found)
            if isinstance(before, dict):
                return before
        raise UserError(
            f"{self.storage.name}/{_SETTINGS}: expected the settings of an earlier run, found a "
            "damaged file. Put it back, or choose another --output."
        )

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file, as a whole."""
        buffer = BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.storage.write(name, buffer.getvalue())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder: no other run writes into it meanwhile, where a lock can tell.

        Raises:
            UserError: another run does.
        """
        if self.storage.is_remote:
            yield
            return
        lock = FileLock(self.storage.path("_run/lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.storage.name}: another run writes into it. Wait for it, or choose another "
                "--output."
            ) from None
        try:
            yield
        finally:
            lock.release()


def _shown(value: Any) -> str:
    return json.dumps(value)[:100]
