"""An index that keeps up with its journal while a server runs, and where it is kept."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from mmtransfer.errors import UserError
from mmtransfer.server.catching_up import JournalIndex
from mmtransfer.server.index import FILE_NAME, Index

logger = logging.getLogger(__name__)
_EVERY_S = 0.5
_AGAIN_S = 10.0  # after a disk was full, or a database not there


def is_address(index: str | Path) -> bool:
    """Whether an index is in a PostgreSQL, not in a file."""
    return str(index).startswith(("postgresql:", "postgres:"))


def open_index(index: str | Path | None, journal: str | Path | None = None) -> JournalIndex:
    """An index in a file or at the address of a PostgreSQL; by default in its journal's folder.

    Raises:
        UserError: it cannot be used, or there is nothing that says where it is.
    """
    if index is None:
        if journal is None:
            raise UserError("index: expected a file, an address or a journal, found none.")
        return Index(Path(journal) / FILE_NAME)
    if not is_address(index):
        return Index(index)
    from mmtransfer.server.postgres import PostgresIndex

    return PostgresIndex(str(index), journal)


class Indexer:
    """Opens an index and, in a thread of its own, takes in what is written into a journal, if there
    is one.
    """

    def __init__(self, journal: Path | None, index: str | Path | None = None):
        self.index = open_index(index, journal)
        self._journal = journal
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, and close the index."""
        self._ended.set()
        self._thread.join()
        self.index.close()

    def _run(self) -> None:
        pause = 0.0
        while self._journal is not None and not self._ended.wait(pause):
            pause = _EVERY_S
            try:
                self.index.catch_up(self._journal, stopped=self._ended.is_set)
            except (OSError, UserError, sqlite3.Error) as error:
                logger.warning("the index is behind the journal (%s)", error)
                pause = _AGAIN_S
