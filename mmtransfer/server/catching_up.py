"""An index that is made of journals: what every one of them is, wherever it is kept.

The journal stays the truth: the index can be made again of it at any time, and takes in whatever
was written since.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from mmtransfer.errors import UserError
from mmtransfer.monitoring.journal.files import EPOCH_S, journal_files
from mmtransfer.server.entries import Block, Plain, parsed_blocks
from mmtransfer.server.hits import MOST_HITS, Filters, Hit, Name, Page, keys_between
from mmtransfer.server.rows import RECORDING, SLOTS, Batch, Row, first_key
from mmtransfer.server.words import spaced

_BLOCKS_AT_ONCE = 4  # in a transaction: what is written together needs not be merged later
_ZONES = first_key(26 * 3600.0)  # how much later a day begins in one time zone than in another


class UnreachableError(UserError):
    """An index on another machine cannot be reached now."""


@dataclass
class Caught:
    """What was taken in."""

    lines: int = 0
    """Lines of the journal, of whatever kind."""
    damaged: int = 0
    """Of these, the ones left out because they cannot be understood."""


class JournalIndex(ABC):
    """What was transcribed, to be searched. Others may search it, and one thread catch up, at the
    same time.
    """

    def __init__(self) -> None:
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""

    # --- from the journal ---------------------------------------------------------------------

    def rebuild(self, journal: str | Path, progress: Callable[[int], None] | None = None) -> Caught:
        """Make it again of the whole journal. Where that is broken off, catching up goes on."""
        with self._writing, self._transaction():
            self._clear(self._prefix(Path(journal)))
        return self.catch_up(journal, progress)

    def catch_up(
        self,
        journal: str | Path,
        progress: Callable[[int], None] | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
        site: str = "",
    ) -> Caught:
        """Take in what was written into a journal since, each line once, whenever the process is
        killed; and let go of what was forgotten there.

        A journal with a file that is shorter than it was is another one: the index is made again.

        Args:
            journal: Its folder.
            progress: Gets the number of lines so far.
            stopped: Says when to end early.
            site: What stands before the names of its cameras, and a slash.

        Raises:
            UserError: no such folder, or an index that cannot be reached.
        """
        folder, caught = Path(journal), Caught()
        if not folder.is_dir():
            raise UserError(f"{journal}: expected the folder of a journal, found none.")
        with self._writing:
            prefix = self._prefix(folder)
            if self._is_of_another(folder, prefix):
                with self._transaction():
                    self._clear(prefix)
            while self._take_in(folder, prefix, caught, progress, stopped, site):
                pass
            self._purge()
        return caught

    def mark(self, name: str) -> int:
        """The number that was last noted under a name; 0 where there is none."""
        with self._writing:
            return self._offsets(name).get("", 0)

    def take(self, blocks: Iterable[tuple[str, Block]], marks: Mapping[str, int]) -> None:
        """Take in blocks of journals that lie elsewhere, each once, with what tells its journal
        from the others; and note numbers. Files of those places are not named in the index.

        Raises:
            UserError: an index that cannot be reached; nothing was taken in then.
        """
        with self._writing:
            with self._transaction():
                for origin, block in blocks:
                    prefix = f"{origin}/"
                    if self._offsets(prefix).get(block.name, 0) < block.end:
                        self._take(_without_files(block), origin)
                        self._set_offset(f"{prefix}{block.name}", block.end)
                for name, number in marks.items():
                    self._set_offset(name, number)
            self._purge()

    def _is_of_another(self, folder: Path, prefix: str) -> bool:
        sizes = {path.name: path.stat().st_size for path in journal_files(folder)}
        # A file that is gone was forgotten, and a line of a later one says so.
        offsets = self._offsets(prefix)
        return any(sizes.get(name, offset) < offset for name, offset in offsets.items())

    def _take_in(
        self,
        folder: Path,
        prefix: str,
        caught: Caught,
        progress: Callable[[int], None] | None,
        stopped: Callable[[], bool],
        site: str,
    ) -> bool:
        """Take in what there is; False if that was nothing, or it was stopped."""
        before = caught.lines
        with closing(parsed_blocks(folder, self._offsets(prefix), site)) as blocks:
            while some := self._take_some(islice(blocks, _BLOCKS_AT_ONCE), prefix):
                caught.lines += sum(block.lines for block in some)
                caught.damaged += sum(block.damaged for block in some)
                if progress is not None:
                    progress(caught.lines)
                if stopped():
                    return False
        return caught.lines > before

    def _take_some(self, blocks: Iterable[Block], prefix: str) -> list[Block]:
        """Take in these in one transaction, up to the first that another process has taken in."""
        done = []
        with self._transaction():
            offsets = self._offsets(prefix)
            for block in blocks:
                if offsets.get(block.name, 0) != block.begin:
                    break
                self._take(block, prefix.removesuffix("/"))
                self._set_offset(f"{prefix}{block.name}", block.end)
                offsets[block.name] = block.end
                block.plain, block.others = [], []
                done.append(block)
        return done

    def _take(self, block: Block, origin: str) -> None:
        rows: list[Row] = []
        for entry in block.others:
            if isinstance(entry, Row):
                if entry.kind == RECORDING:
                    self._note_recording(entry.camera, entry.id, entry.start)
                else:
                    rows.append(entry)
            else:
                self._merge(rows, [], origin)  # what comes behind it is not meant
                rows = []
                self._forget_line(entry)
        self._merge(rows, block.plain, origin)

    def _merge(self, rows: list[Row], plain: list[Plain], origin: str) -> None:
        """Take in rows that may be about what is there, and others that are about each other."""
        there = self._rows([one[0] for one in plain])
        if there:  # most come for the first time
            rows = [*rows, *(Row(*one[:-1]) for one in plain if one[0] in there)]
            plain = [one for one in plain if one[0] not in there]
        if not rows:
            self._write([], plain, origin)
            return
        batch = Batch(self._rows, {one[0] for one in plain})
        batch.take(rows)
        gone, come = batch.changes()
        plain = [*plain, *((*row, spaced(row.text)) for row in come)]
        plain.sort(key=lambda one: one[0])
        self._write(gone, plain, origin)

    def _forget_line(self, line: dict[str, Any]) -> None:
        """Let go of what a line of the journal says was forgotten."""
        if line["before"] is not None:
            self._forget_before(line["camera"], line["before"])
        if line["lines"]:
            self._forget_lines(line["camera"], line["lines"])

    def _forget_lines(self, camera: str, lines: list[tuple[str, int]]) -> None:
        """Forget lines by their ids and the first keys of their times. Those of recordings count
        from a day that may have begun at another time where they were taken in.
        """
        found, others = list[Row](), list[tuple[str, int]]()
        for identity, first in lines:
            there = self._rows_of(camera, [identity], first, first + (2 << SLOTS))
            found += there
            if not there or any(row.start < EPOCH_S for row in there):
                others.append((identity, first))
        if others:
            names, firsts = zip(*others, strict=True)
            near = self._rows_of(camera, names, min(firsts) - _ZONES, max(firsts) + _ZONES)
            found += [
                row
                for row in near
                if row.start < EPOCH_S and any(abs(row.key - first) < _ZONES for first in firsts)
            ]
        self._forget_rows({row.key: row for row in found}.values())

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[Any]:
        """All changes within it, or none; others write before it or after."""

    @abstractmethod
    def _prefix(self, folder: Path) -> str:
        """What stands before the names of a journal's files."""

    @abstractmethod
    def _clear(self, prefix: str) -> None:
        """Begin anew with the journal of this prefix."""

    @abstractmethod
    def _offsets(self, prefix: str) -> dict[str, int]:
        """How far the files of a journal, named without the prefix, were taken in."""

    @abstractmethod
    def _set_offset(self, name: str, offset: int) -> None: ...

    @abstractmethod
    def _rows(self, keys: list[int]) -> dict[int, Row]:
        """What is there under these keys."""

    @abstractmethod
    def _write(self, gone: list[Row], come: list[Plain], origin: str) -> None:
        """Take these out, and then put these in, which are in the order of their keys and of the
        journal that is called so.
        """

    @abstractmethod
    def _note_recording(self, camera: str, name: str, began: float) -> None: ...

    @abstractmethod
    def _forget_before(self, camera: str, key: int) -> None: ...

    @abstractmethod
    def _rows_of(self, camera: str, identities: Sequence[str], low: int, high: int) -> list[Row]:
        """Lines of a camera by their ids, with keys from `low` up to `high`."""

    @abstractmethod
    def _forget_rows(self, rows: Iterable[Row]) -> None: ...

    @abstractmethod
    def _purge(self) -> None:
        """What was forgotten leaves the files' bytes as well."""

    # --- searching ----------------------------------------------------------------------------

    def search(
        self,
        query: str = "",
        *,
        camera: str | Sequence[str] | None = None,
        after: float | None = None,
        before: float | None = None,
        alert: str | bool = False,
        sentiment: str | None = None,
        sound: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        """A page of lines with all words of a query, newest first; without one, of all lines.

        Words in double quotes stand side by side; the last word may be the beginning of one. Case
        and accents make no difference, and nothing in a query is an operator.

        Args:
            query: Words; one of more than 4,096 characters finds nothing.
            camera: Names of cameras.
            after: Seconds since 1970; and so `before`.
            before: As `after`, excluded.
            alert: Lines that raised an alert; with a text, by that keyword.
            sentiment: Lines of that class.
            sound: Sounds of that class, `loud` for those without; with a query, lines within ten
                seconds of one; "" for any sound.
            limit: Hits of a page, up to 500.
            cursor: Of the page before.

        Raises:
            UserError: a cursor that none of these pages gave.
        """
        low, high = keys_between(after, before, cursor)
        limit = max(1, min(limit, MOST_HITS))
        return self._page(query, Filters(camera, alert, sentiment, sound), low, high, limit)

    @abstractmethod
    def _page(self, query: str, filters: Filters, low: int, high: int, limit: int) -> Page:
        """Lines with keys from `low` up to `high`, newest first."""

    @abstractmethod
    def get(self, key: int) -> Hit | None:
        """The line of a key, if it is there."""

    @abstractmethod
    def find(self, camera: str, identity: str, at: float) -> Hit | None:
        """The line of a camera by its id and its time (seconds since 1970), if it is there."""

    @abstractmethod
    def with_clips(self, hit: Hit) -> list[Hit]:
        """What clips were kept of a line's camera around its time, those of the line first."""

    @abstractmethod
    def recording_began(self, hit: Hit) -> float:
        """When the file of a folder began that a line is of, so that times in it are known; 0 for
        other sources, whose times are such.
        """

    @abstractmethod
    def names(self, kind: Name) -> list[str]:
        """Cameras, keywords or classes that there are in it."""

    @abstractmethod
    def timeline(
        self, after: float, before: float, parts: int
    ) -> dict[str, list[tuple[int, int, int]]]:
        """How much there is in each of so many equal parts of a time, by camera: lines, alerts,
        sounds.
        """


def _without_files(block: Block) -> Block:
    """A block whose rows name no clip and no source."""
    others = [
        one._replace(clip=None, source=None) if isinstance(one, Row) else one
        for one in block.others
    ]
    plain = [(*one[:10], None, None, *one[12:]) for one in block.plain]
    return replace(block, plain=plain, others=others)
