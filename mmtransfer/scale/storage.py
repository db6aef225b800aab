"""Paths and fsspec addresses alike: what lies there, fetched and written, nothing of it secret."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mmtransfer.cache import atomic_path
from mmtransfer.errors import UserError
from mmtransfer.speech.addresses import public_address, without_secrets
from mmtransfer.speech.audio import UPLOAD

_ATTEMPTS = 3
_WAIT_S = 1.0  # after the first attempt; twice as long after each other one


def is_remote(address: str) -> bool:
    """Whether something has to be fetched before FFmpeg may open it."""
    return "://" in address and not address.startswith(("file://", "local://"))


def open_storage(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Credentials come from where its library
    looks for them, or stand in the address.

    Raises:
        UserError: a kind of address that nothing here opens.
    """
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(os.path.expanduser(address))
    except Exception as error:  # whatever its library raises is this address's alone
        why = problem(error, address)
        raise UserError(f"{public_address(address)}: cannot be opened: {why}.") from None
    return found


def problem(error: BaseException, *addresses: str) -> str:
    """What went wrong, on one line and without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    return without_secrets(text, *addresses)[:300]


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """A recording as a file: where it lies, or a copy for as long as the block lasts, which may
    open nothing else.

    Raises:
        OSError: it cannot be fetched.
    """
    if not is_remote(address):
        yield Path(address.partition("://")[2] if "://" in address else address)
        return
    storage, path = open_storage(address)
    with TemporaryDirectory(prefix="mmtransfer-") as folder:
        copy = Path(folder) / f"recording{UPLOAD}"
        for attempt in range(_ATTEMPTS):
            try:
                storage.get_file(path, str(copy))
                break
            except Exception as error:  # of whatever library
                is_final = isinstance(error, FileNotFoundError | PermissionError)
                if is_final or attempt + 1 == _ATTEMPTS:
                    raise OSError(problem(error, address)) from None
                time.sleep(_WAIT_S * 2**attempt)
        yield copy


class Storage:
    """A folder to write into. A file is there as a whole or not at all.

    Raises:
        UserError: a folder that cannot be made or written.
    """

    def __init__(self, address: str):
        self._address, self.name = address, public_address(address)
        self.is_remote = is_remote(address)
        self._files, self._root = open_storage(address)
        try:
            if self._files.isfile(self._root):
                raise UserError(f"{self.name}: expected a folder to write, found a file.")
            self._files.makedirs(self._root, exist_ok=True)
            self.write(".writable", b"")
            self.remove(".writable")
        except UserError:
            raise
        except Exception as error:
            why = problem(error, address)
            raise UserError(f"{self.name}: cannot be written: {why}.") from None

    def path(self, name: str) -> str:
        """Where a file of that name lies."""
        return str(PurePosixPath(self._root) / name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the place of an older one."""
        if self.is_remote:  # where an object is put as a whole
            self._files.pipe_file(self.path(name), data)
            return
        with atomic_path(Path(self.path(name))) as part:
            part.write_bytes(data)

    def read(self, name: str) -> bytes | None:
        """A file; None if it is not there."""
        try:
            data: bytes = self._files.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        return data

    def names(self, folder: str) -> list[str]:
        """The files right in a folder, sorted, by their names alone."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        if self._files.exists(self.path(name)):
            self._files.rm(self.path(name), recursive=True)
