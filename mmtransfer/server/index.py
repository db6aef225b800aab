"""What was transcribed, to be searched: an SQLite file that is made of a journal.

Words are found by FTS5, in a table for each month, so that no search has to go through much more
than it shows. Scripts without spaces are indexed letter by letter.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtransfer.cache import make_private, open_private
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import recording_of
from mmtransfer.server.catching_up import JournalIndex
from mmtransfer.server.entries import Plain
from mmtransfer.server.hits import NEAR, Filters, Hit, Name, Page, hit_of
from mmtransfer.server.months import month_begin, month_end, month_of
from mmtransfer.server.rows import SLOTS, SOUND, Row, first_key, key_of
from mmtransfer.server.words import phrases, spaced

logger = logging.getLogger(__name__)
FILE_NAME = "index.sqlite"
"""In the journal's folder, where no other place is named."""
_FORMAT = 1
_HASH_BYTES = 32 << 20  # of words, that FTS5 holds before it writes them
_BUDGET_S = 0.1  # a page is handed out as far as it came by then
_TABLES = """
CREATE TABLE format(number INTEGER);
CREATE TABLE files(name TEXT PRIMARY KEY, offset INTEGER);
CREATE TABLE stale(month TEXT PRIMARY KEY);
CREATE TABLE labels(
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, name TEXT, UNIQUE(kind, name));
CREATE TABLE lines(
    key INTEGER PRIMARY KEY, kind INTEGER, camera INTEGER, id TEXT, start REAL, "end" REAL,
    text TEXT, tags TEXT, alerts TEXT, prob REAL, clip TEXT, source INTEGER);
CREATE INDEX sounds ON lines(camera, key) WHERE kind = 2;
CREATE INDEX clips ON lines(camera, key) WHERE clip IS NOT NULL;
CREATE TABLE recordings(camera INTEGER, name TEXT, began REAL, PRIMARY KEY(camera, name))
"""
# Nothing is held twice: the texts are in `lines`, of which the words can be made again.
_WORDS = """CREATE VIRTUAL TABLE {} USING fts5(text, tags, content='', columnsize=0,
    tokenize="unicode61 remove_diacritics 2 categories 'L* N* M* Co'")"""


class Index(JournalIndex):
    """An index in a file, which is made where there is none. Others may search it, and one thread
    catch up, at the same time.

    Raises:
        UserError: a file that is no index.

    Example:
        with Index("journal/index.sqlite") as index:
            index.catch_up("journal")
            for hit in index.search("open the gate", camera="yard").hits:
                print(hit.at, hit.text)
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self._path = Path(path)
        make_private(self._path.parent)
        self._reading = threading.Lock()
        self._numbers: dict[tuple[str, str], int] = {}
        self._known_tags: dict[tuple[str, int, str | None], tuple[int, str]] = {}
        self._names: dict[int, tuple[str, str]] = {}
        try:
            open_private(self._path, "ab").close()
            self._writer = self._connect()
            with self._transaction():
                if not self._is_current():
                    self._clear()
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(
                f"{path}: cannot be used as an index ({error}). Remove it, or name another file."
            ) from None

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        made = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=60.0
        )
        made.execute("PRAGMA journal_mode = WAL")
        made.execute("PRAGMA synchronous = NORMAL")  # what a failing machine loses is caught up
        made.execute("PRAGMA secure_delete = ON")
        made.execute("PRAGMA wal_autocheckpoint = 16384")  # pages
        made.execute("PRAGMA temp_store = MEMORY")
        made.execute("PRAGMA cache_size = -65536")  # KiB
        return made

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        writer = self._writer
        writer.execute("BEGIN IMMEDIATE")
        try:
            yield writer
            writer.execute("COMMIT")
        except BaseException:
            self._forget_numbers()  # of which some may be undone
            writer.execute("ROLLBACK")
            raise

    def _is_current(self) -> bool:
        tables = {name for (name,) in self._writer.execute("SELECT name FROM sqlite_master")}
        if tables and not {"format", "files", "labels", "lines"} <= tables:
            raise sqlite3.DatabaseError("it holds something else")
        found = self._writer.execute("SELECT number FROM format") if tables else None
        return found is not None and found.fetchone() == (_FORMAT,)

    def _clear(self, prefix: str = "") -> None:
        own = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%\\_%' "
        names = self._writer.execute(f"{own} ESCAPE '\\'").fetchall()
        for name in [*_months(self._writer), *(name for (name,) in names)]:
            self._writer.execute(f"DROP TABLE {name}")
        for statement in _TABLES.split(";\n"):
            self._writer.execute(statement)
        self._writer.execute("INSERT INTO format VALUES (?)", (_FORMAT,))
        self._forget_numbers()

    # --- from the journal ---------------------------------------------------------------------

    def _prefix(self, folder: Path) -> str:
        return ""

    def _offsets(self, prefix: str) -> dict[str, int]:
        found = self._writer.execute("SELECT name, offset FROM files").fetchall()
        start = len(prefix)
        return {name[start:]: offset for name, offset in found if name.startswith(prefix)}

    def _set_offset(self, name: str, offset: int) -> None:
        self._writer.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, offset))

    def _note_recording(self, camera: str, name: str, began: float) -> None:
        known = (self._number("camera", camera), name, began)
        self._writer.execute("INSERT OR REPLACE INTO recordings VALUES (?, ?, ?)", known)

    def _rows(self, keys: list[int]) -> dict[int, Row]:
        (latest,) = self._writer.execute("SELECT max(key) FROM lines").fetchone()
        if latest is None or not keys or min(keys) > latest:
            return {}
        query = "SELECT * FROM lines WHERE key IN (SELECT value FROM json_each(?))"
        found = self._writer.execute(query, (json.dumps(keys),))
        return {values[0]: self._row(values, self._writer) for values in found.fetchall()}

    def _row(self, values: Sequence[Any], connection: sqlite3.Connection) -> Row:
        """A row of the table, with names where that has numbers."""
        key, kind, _, identity, start, end, text, tags, alerts, prob, clip, source = values
        (_, camera), *labels = (self._label(int(tag[1:]), connection) for tag in tags.split())
        raised = tuple(self._label(int(tag[1:]), connection)[1] for tag in alerts.split())
        name = labels[-1][1] if labels else None
        place = None if source is None else self._label(source, connection)[1]
        return Row(key, kind, camera, identity, start, end, text, name, raised, prob, clip, place)

    def _write(self, gone: list[Row], come: list[Plain], origin: str) -> None:
        writer = self._writer
        self._delete(gone)
        rows, words = [], []
        for one in come:
            key, kind, camera, identity, start, end, text, name, alerts, prob, clip, source, w = one
            number, tags = self._tags_of(camera, kind, name)
            raised = "".join(f" {self._tag('alert', alert)}" for alert in alerts) if alerts else ""
            place = source and self._number("source", source)
            rows.append(
                (key, kind, number, identity, start, end, text, tags, raised, prob, clip, place)
            )
            words.append((key, w, tags + raised))
        writer.executemany(f"INSERT INTO lines VALUES ({', '.join('?' * 12)})", rows)
        months, first = set(_months(writer)), 0
        while first < len(words):
            month = month_of(words[first][0])
            last = bisect_left(words, (first_key(month_end(month)),), first)
            if month not in months:
                writer.execute(_WORDS.format(month))
                setting = f"INSERT INTO {month}({month}, rank) VALUES ('hashsize', ?)"
                writer.execute(setting, (_HASH_BYTES,))
            put = f"INSERT INTO {month}(rowid, text, tags) VALUES (?, ?, ?)"
            writer.executemany(put, words[first:last])
            first = last

    def _delete(self, rows: Iterable[Row]) -> set[str]:
        """Take rows out; the tables of words that they were in."""
        by_month: dict[str, list[tuple[int, str, str]]] = {}
        for row in sorted(rows):  # the order that FTS5 takes fastest
            _, tags = self._tags_of(row.camera, row.kind, row.name)
            raised = "".join(f" {self._tag('alert', alert)}" for alert in row.alerts)
            words = (row.key, spaced(row.text), tags + raised)
            by_month.setdefault(month_of(row.key), []).append(words)
        for month, words_of in by_month.items():
            self._writer.executemany(
                f"INSERT INTO {month}({month}, rowid, text, tags) VALUES ('delete', ?, ?, ?)",
                words_of,
            )
            keys = [words[:1] for words in words_of]
            self._writer.executemany("DELETE FROM lines WHERE key = ?", keys)
        return set(by_month)

    def _tags_of(self, camera: str, kind: int, name: str | None) -> tuple[int, str]:
        """The number of a camera, and the tags of its lines of a class."""
        known = self._known_tags.get((camera, kind, name))
        if known is None:
            number, tags = self._number("camera", camera), []
            if kind == SOUND:
                tags = [self._tag("sound", ""), self._tag("sound", name or "")]
            elif name:
                tags = [self._tag("sentiment", name)]
            known = number, " ".join([f"x{number}", *tags])
            self._known_tags[camera, kind, name] = known
        return known

    def _number(self, kind: str, name: str) -> int:
        """What stands for a camera, a keyword, a class or a source."""
        number = self._numbers.get((kind, name))
        if number is None:
            known = "SELECT number FROM labels WHERE kind = ? AND name = ?"
            found = self._writer.execute(known, (kind, name)).fetchone()
            if found is None:
                new = "INSERT INTO labels(kind, name) VALUES (?, ?) RETURNING number"
                found = self._writer.execute(new, (kind, name)).fetchone()
            number = self._numbers[kind, name] = int(found[0])
        return number

    def _forget_numbers(self) -> None:
        self._numbers.clear()
        self._known_tags.clear()
        self._names.clear()

    def _tag(self, kind: str, name: str) -> str:
        return f"x{self._number(kind, name)}"

    # --- forgetting ---------------------------------------------------------------------------

    def _forget_before(self, camera: str, key: int) -> None:
        query = "SELECT * FROM lines WHERE camera = ? AND key < ?"
        found = self._writer.execute(query, (self._number("camera", camera), key)).fetchall()
        self._forget_rows({self._row(values, self._writer) for values in found})

    def _rows_of(self, camera: str, identities: Sequence[str], low: int, high: int) -> list[Row]:
        query = (
            "SELECT * FROM lines WHERE key >= ? AND key < ? AND camera = ? AND "
            "id IN (SELECT value FROM json_each(?))"
        )
        values = (low, high, self._number("camera", camera), json.dumps(identities))
        return [self._row(one, self._writer) for one in self._writer.execute(query, values)]

    def _forget_rows(self, rows: Iterable[Row]) -> None:
        stale = [(month,) for month in self._delete(rows)]
        self._writer.executemany("INSERT OR IGNORE INTO stale VALUES (?)", stale)

    def _purge(self) -> None:
        stale = [month for (month,) in self._writer.execute("SELECT month FROM stale")]
        if not stale:
            return
        for month in stale:
            with self._transaction() as writer:
                span = (first_key(month_begin(month)), first_key(month_end(month)))
                rest = writer.execute(
                    "SELECT 1 FROM lines WHERE key >= ? AND key < ? LIMIT 1", span
                ).fetchone()
                if rest is None:
                    writer.execute(f"DROP TABLE {month}")
                else:  # words that no line has any more go when the parts of the table are merged
                    writer.execute(f"INSERT INTO {month}({month}) VALUES ('optimize')")
        with self._transaction() as writer:
            self._drop_labels()
            writer.execute("DELETE FROM stale")
        # Pages are overwritten when they are freed; what they had in them before they were divided
        # may still lie between the rows of others.
        self._writer.execute("VACUUM")
        self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _drop_labels(self) -> None:
        """Names that nothing has any more go as well."""
        months = _months(self._writer)
        for number, kind in self._writer.execute("SELECT number, kind FROM labels").fetchall():
            if kind == "source":
                query, values = "SELECT 1 FROM lines WHERE source = ? LIMIT 1", (number,)
                uses = self._writer.execute(query, values).fetchone() is not None
            else:
                uses = any(
                    self._writer.execute(
                        f"SELECT 1 FROM {month} WHERE {month} MATCH ? LIMIT 1",
                        (f"tags : x{number}",),
                    ).fetchone()
                    for month in months
                )
            if not uses:
                self._writer.execute("DELETE FROM labels WHERE number = ?", (number,))
        self._forget_numbers()

    # --- searching ----------------------------------------------------------------------------

    def _page(self, query: str, filters: Filters, low: int, high: int, limit: int) -> Page:
        with self._reading, self._snapshot():
            words = _match(query)
            sound = filters.sound
            tags = self._tags(filters.names(with_sound=words == ""))
            near = self._known("sound", sound) if sound is not None and words else None
            if words is None or tags is None or (sound is not None and words and near is None):
                return Page([], None)
            if not words and not tags:
                return self._latest(low, high, limit)
            match = " AND ".join([*([f"text : ({words})"] if words else []), *tags])
            return self._found(match, low, high, limit, near)

    def _found(self, match: str, low: int, high: int, limit: int, near: int | None) -> Page:
        """Hits of a query of FTS5, month by month, as far as there is time."""
        hits: list[Hit] = []
        deadline, reader = time.monotonic() + _BUDGET_S, self._reader
        for month in reversed(_months(reader)):
            first, end = first_key(month_begin(month)), first_key(month_end(month))
            if first >= high or end <= low:
                continue
            if time.monotonic() > deadline:
                return Page(hits, str(min(high, end)))
            rows = reader.execute(
                f"SELECT lines.* FROM {month} CROSS JOIN lines ON lines.key = {month}.rowid "
                f"WHERE {month} MATCH ? AND {month}.rowid >= ? AND {month}.rowid < ? "
                f"ORDER BY {month}.rowid DESC",
                (match, low, high),
            )
            for number, row in enumerate(rows, 1):
                if len(hits) == limit:
                    return Page(hits, str(hits[-1].key))
                if near is None or self._sounds_near(row[2], row[0], near):
                    hits.append(self._hit(row))
                elif number % 64 == 0 and time.monotonic() > deadline:
                    return Page(hits, str(row[0]))
        return Page(hits, None)

    def _latest(self, low: int, high: int, limit: int) -> Page:
        query = "SELECT * FROM lines WHERE key >= ? AND key < ? ORDER BY key DESC LIMIT ?"
        rows = self._reader.execute(query, (low, high, limit + 1)).fetchall()
        hits = [self._hit(row) for row in rows[:limit]]
        return Page(hits, str(hits[-1].key) if len(rows) > limit else None)

    def get(self, key: int) -> Hit | None:
        with self._reading:
            query = "SELECT * FROM lines WHERE key = ?"
            row = self._reader.execute(query, (key,)).fetchone() if 0 <= key < 1 << 62 else None
            return None if row is None else self._hit(row)

    def find(self, camera: str, identity: str, at: float) -> Hit | None:
        with self._reading:
            number, first = self._known("camera", camera), key_of(camera, identity, at)
            query = "SELECT * FROM lines WHERE key >= ? AND key < ? AND camera = ? AND id = ?"
            values = (first, first + (1 << SLOTS), number, whole_text(identity))
            row = self._reader.execute(query, values).fetchone()
            return None if row is None else self._hit(row)

    def with_clips(self, hit: Hit) -> list[Hit]:
        around = 2 * NEAR
        with self._reading:
            rows = self._reader.execute(
                "SELECT * FROM lines WHERE camera = ? AND clip IS NOT NULL AND key BETWEEN ? AND ?",
                (self._known("camera", hit.camera), hit.key - around, hit.key + around),
            ).fetchall()
            hits = [self._hit(row) for row in rows]
        return sorted(hits, key=lambda one: abs(one.at - hit.at))

    def recording_began(self, hit: Hit) -> float:
        with self._reading:
            query = "SELECT began FROM recordings WHERE camera = ? AND name = ?"
            values = (self._known("camera", hit.camera), recording_of(hit.id))
            row = self._reader.execute(query, values).fetchone()
            return 0.0 if row is None else float(row[0])

    def names(self, kind: Name) -> list[str]:
        with self._reading:
            query = "SELECT name FROM labels WHERE kind = ? AND name != '' ORDER BY name"
            return [name for (name,) in self._reader.execute(query, (kind,))]

    def timeline(
        self, after: float, before: float, parts: int
    ) -> dict[str, list[tuple[int, int, int]]]:
        low, high = first_key(after), first_key(before)
        width = max(1, -(-(high - low) // parts))
        found: dict[str, list[tuple[int, int, int]]] = {}
        with self._reading:
            rows = self._reader.execute(
                f"SELECT camera, (key - ?) / ?, sum(kind != {SOUND}), sum(alerts != ''), "
                f"sum(kind = {SOUND}) FROM lines WHERE key >= ? AND key < ? GROUP BY 1, 2",
                (low, width, low, high),
            ).fetchall()
            for camera, part, *counts in rows:
                own = found.setdefault(self._name(camera), [(0, 0, 0)] * parts)
                own[part] = (counts[0], counts[1], counts[2])
        return found

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Between the statements of a search nothing changes."""
        self._reader.execute("BEGIN")
        try:
            yield
        finally:
            self._reader.execute("COMMIT")

    def _tags(self, wanted: Sequence[Sequence[tuple[Name, str]]]) -> list[str] | None:
        """What FTS5 is asked for beside words; None where there is nothing of a name."""
        found = []
        for names in wanted:
            numbers = [self._known(kind, name) for kind, name in names]
            known = [f"x{number}" for number in numbers if number is not None]
            if not known:
                return None
            found.append(f"tags : ({' OR '.join(known)})")
        return found

    def _known(self, kind: str, name: str) -> int | None:
        query = "SELECT number FROM labels WHERE kind = ? AND name = ?"
        row = self._reader.execute(query, (kind, whole_text(name))).fetchone()
        return None if row is None else int(row[0])

    def _sounds_near(self, camera: int, key: int, label: int) -> bool:
        rows = self._reader.execute(
            f"SELECT tags FROM lines WHERE kind = {SOUND} AND camera = ? AND key BETWEEN ? AND ?",
            (camera, key - NEAR, key + NEAR),
        )
        return any(f" x{label} " in f"{tags} " for (tags,) in rows)

    def _name(self, number: int) -> str:
        return self._label(number, self._reader)[1]

    def _label(self, number: int, connection: sqlite3.Connection) -> tuple[str, str]:
        if number not in self._names:
            query = "SELECT kind, name FROM labels WHERE number = ?"
            row = connection.execute(query, (number,)).fetchone()
            self._names[number] = row or ("", "")
        return self._names[number]

    def _hit(self, values: Sequence[Any]) -> Hit:
        return hit_of(self._row(values, self._reader))


def _match(query: str) -> str | None:
    """A query as FTS5 takes it: words in quotes alone, so that nothing in it is an operator. Empty
    for an empty query; None for one that no line can match.
    """
    found = phrases(query)
    if found is None:
        return None
    return " AND ".join(f'"{words}"{" *" if is_open else ""}' for words, is_open in found)


def _months(connection: sqlite3.Connection) -> list[str]:
    """Tables of words, oldest first."""
    query = "SELECT name FROM sqlite_master WHERE name GLOB ? ORDER BY name"
    digits = "[0-9]" * 6
    return [name for (name,) in connection.execute(query, (f"words_{digits}",))]
