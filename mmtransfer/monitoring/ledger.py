"""What must not be lost while a monitor runs: its journal, the audio that waits, and what is held
back while the disk takes no more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.journal.known import Known
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.speech.segments import Segment

logger = logging.getLogger(__name__)
SPOOL_BYTES = 2 << 30
"""Audio that may wait on disk."""
_RETRY_S = 1.0


class Ledger:
    """Journal and spool of one run; without a journal it takes everything and keeps nothing.

    With `spools`, audio of live sources waits on disk. With `waits`, a disk that is full is waited
    for, since what live sources and standard input say comes once; else it is an error.
    """

    def __init__(
        self,
        journal: Journal | None,
        *,
        spools: bool,
        waits: bool,
        spool_bytes: int = SPOOL_BYTES,
        now: Callable[[], float] = time.monotonic,
    ):
        self._journal, self._waits, self._now = journal, waits, now
        self._spool: Spool | None = journal.spool() if journal is not None and spools else None
        self._spool_bytes = spool_bytes
        self._retry = 0.0
        self.failure: OSError | None = None
        """Why the last lines could not be written."""

    @property
    def is_blocked(self) -> bool:
        """Whether the disk took nothing a moment ago."""
        return self.failure is not None and self._now() < self._retry

    @property
    def is_full(self) -> bool:
        """Whether more audio waits on disk than may."""
        return self._spool is not None and self._spool.bytes > self._spool_bytes

    def take_up(self, recordings: Collection[str]) -> tuple[Known, list[tuple[str, str, Segment]]]:
        """What earlier sessions dealt with, of these recordings all of it; and (camera, id,
        segment) of what they left in the spool.
        """
        if self._journal is None:
            return Known((), ()), []
        left = list(self._spool.waiting()) if self._spool is not None else []
        return self._journal.known(recordings, {identity for _, identity, _ in left}), left

    def known(self, recording: str) -> Known:
        """What earlier sessions dealt with of a recording."""
        return self._journal.known({recording}, ()) if self._journal is not None else Known((), ())

    def write(self, *lines: Any) -> bool:
        """Put events or lines into the journal, all or none; False if the disk does not take them
        now, but may later.

        Raises:
            OSError: the disk does not take them, and nothing here can wait.
        """
        if self._journal is None or not lines:
            return True
        try:
            self._journal.write(
                *(line if isinstance(line, dict) else asdict(line) for line in lines)
            )
        except OSError as error:
            if not self._waits:
                raise
            if self.failure is None:
                logger.warning(
                    "the journal cannot be written (%s); output is buffered until the disk "
                    "accepts writes",
                    error.strerror,
                )
            self.failure, self._retry = error, self._now() + _RETRY_S
            return False
        self.failure = None
        return True

    # --- audio that waits ---------------------------------------------------------------------

    def keep(self, camera: str, identity: str, segment: Segment) -> None:
        """Put a segment's audio on disk, if there is a spool; if there is no room, it is still in
        memory.
        """
        if self._spool is None:
            return
        try:
            self._spool.add(camera, identity, segment)
        except OSError as error:
            logger.warning("%s: a segment is held in memory alone (%s)", camera, error)

    def holds(self, identity: str) -> bool:
        """Whether a segment's audio is on disk."""
        return self._spool is not None and self._spool.holds(identity)

    def load(self, identity: str) -> Segment:
        """A segment that is on disk, with its audio."""
        assert self._spool is not None
        return self._spool.load(identity)

    def forget(self, identity: str) -> None:
        """A segment has been dealt with; its audio goes."""
        if self._spool is not None:
            self._spool.remove(identity)
