"""An index that keeps up with its journal while a server runs."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from mmtransfer.errors import UserError
from mmtransfer.server.index import FILE_NAME, Index

logger = logging.getLogger(__name__)
_EVERY_S = 0.5
_AGAIN_S = 10.0  # after a disk was full


class Indexer:
    """Opens the index of a journal and takes in what is written, in a thread of its own."""

    def __init__(self, journal: Path, path: str | Path | None = None):
        self.index = Index(path or journal / FILE_NAME)
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
        while not self._ended.wait(pause):
            pause = _EVERY_S
            try:
                self.index.catch_up(self._journal, stopped=self._ended.is_set)
            except (OSError, UserError, sqlite3.Error) as error:
                logger.warning("the index is behind the journal (%s)", error)
                pause = _AGAIN_S
