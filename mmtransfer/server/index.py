"""What was transcribed, to be searched: an SQLite file that is made of a journal.

The journal stays the truth: the index can be made again of it at any time, and takes in whatever
was written since. Words are found by FTS5, in a table for each month, so that no search has to go
through much more than it shows. Scripts without spaces are indexed letter by letter.
"""

from __future__ import annotations

import calendar
import functools
import logging
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import regex

from mmtransfer.cache import make_private, open_private
from mmtransfer.data.printing import whole_text
from mmtransfer.data.words import UNSPACED
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import recording_of
from mmtransfer.monitoring.journal.files import journal_files
from mmtransfer.server.entries import (
    KINDS,
    LATEST_S,
    SLOTS,
    Entry,
    first_key,
    key_of,
    parsed_blocks,
)

logger = logging.getLogger(__name__)
FILE_NAME = "index.sqlite"
"""In the journal's folder, where no other place is named."""
_FORMAT = 1
_HASH_BYTES = 32 << 20  # of words, that FTS5 holds before it writes them
_BUDGET_S = 0.1  # a page is handed out as far as it came by then
Name = Literal["camera", "alert", "sentiment", "sound"]
NAMES: tuple[Name, ...] = get_args(Name)
"""What lines are filtered by."""
_NEAR_S = 10.0  # between a sound and what was spoken around it
_LONGEST_QUERY = 4096  # characters; no line has as many
_MOST_HITS = 500
_PREFIX_FROM = 3  # letters; with fewer, too many words begin
_LINE, _ALERT, _SOUND, _RECORDING = range(4)
_OTHERS = regex.compile(r"[^\p{L}\p{N}\p{M}]")
_PIECES = re.compile(r'"([^"]*)"|([^\s"]+)')
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


@dataclass(frozen=True)
class Hit:
    """A line of text or a sound that a search has found."""

    key: int
    """Its name in the index; those of later lines are larger."""
    kind: str
    """line, sound, or alert: one whose line was rejected or revised away."""
    camera: str
    id: str
    """As in the journal."""
    at: float
    """Seconds since 1970; of a recording, counted from the day on which it was transcribed."""
    start: float
    """As in the journal: of a recording, seconds into it."""
    end: float
    text: str
    """Of a sound, its class."""
    sentiment: str | None
    sentiment_prob: float | None
    alerts: tuple[str, ...]
    """Keywords that raised an alert."""
    clip: str | None
    """File that holds the moment, if clips are kept; not to be shown."""
    source: str
    """The source's address or file; not to be shown."""


@dataclass(frozen=True)
class Page:
    """Hits, newest first."""

    hits: list[Hit]
    cursor: str | None
    """Where the next page begins; None at the end. With one, there may be fewer hits than were
    asked for, even none: the page was handed out in time."""


@dataclass
class Caught:
    """What was taken in."""

    lines: int = 0
    """Lines of the journal, of whatever kind."""
    damaged: int = 0
    """Of these, the ones left out because they cannot be understood."""


class _Row(NamedTuple):
    key: int
    kind: int
    camera: int
    id: str
    start: float
    end: float
    text: str
    tags: str
    alerts: str
    prob: float | None
    clip: str | None
    source: int | None

    @property
    def words(self) -> tuple[int, str, str]:
        """As FTS5 has it."""
        return self.key, spaced(self.text), f"{self.tags}{self.alerts}"


@dataclass
class _Batch:
    """Changes that are not in the index yet."""

    latest: int
    """Behind this key there is nothing yet."""
    rows: dict[int, _Row | None] = field(default_factory=dict)
    """By key; None for one that goes."""
    before: dict[int, tuple[int, str, str]] = field(default_factory=dict)
    """What FTS5 has of these."""


class Index:
    """An index; a file is made where there is none. Others may search it, and one thread catch up,
    at the same time.

    Raises:
        UserError: a file that is no index.

    Example:
        with Index("journal/index.sqlite") as index:
            index.catch_up("journal")
            for hit in index.search("open the gate", camera="yard").hits:
                print(hit.at, hit.text)
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        make_private(self._path.parent)
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._numbers: dict[tuple[str, str], int] = {}
        self._known_tags: dict[tuple[str, int, str | None], tuple[int, str]] = {}
        self._names: dict[int, tuple[str, str]] = {}
        try:
            open_private(self._path, "ab").close()
            self._writer = self._connect()
            with self._transaction():
                if not self._is_current():
                    self._make()
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = ON")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(
                f"{path}: cannot be used as an index ({error}). Remove it, or name another file."
            ) from None

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
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

    def _make(self) -> None:
        """Begin with nothing in it."""
        own = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%\\_%' "
        names = self._writer.execute(f"{own} ESCAPE '\\'").fetchall()
        for name in [*_months(self._writer), *(name for (name,) in names)]:
            self._writer.execute(f"DROP TABLE {name}")
        for statement in _TABLES.split(";\n"):
            self._writer.execute(statement)
        self._writer.execute("INSERT INTO format VALUES (?)", (_FORMAT,))
        self._forget_numbers()

    # --- from the journal ---------------------------------------------------------------------

    def rebuild(self, journal: str | Path, progress: Callable[[int], None] | None = None) -> Caught:
        """Make it again of the whole journal. Where that is broken off, catching up goes on."""
        with self._writing, self._transaction():
            self._make()
        return self.catch_up(journal, progress)

    def catch_up(
        self,
        journal: str | Path,
        progress: Callable[[int], None] | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Caught:
        """Take in what was written into a journal since, each line once, whenever the process is
        killed; and let go of what was forgotten there. `progress` gets the number of lines so
        far; when `stopped`, it ends early.

        A journal with a file that is shorter than it was is another one: the index is made again.

        Raises:
            UserError: no such folder.
        """
        folder, caught = Path(journal), Caught()
        if not folder.is_dir():
            raise UserError(f"{journal}: expected the folder of a journal, found none.")
        with self._writing:
            if self._is_of_another(folder):
                with self._transaction():
                    self._make()
            while self._take_in(folder, caught, progress, stopped):
                pass
            self._purge()
        return caught

    def _offsets(self) -> dict[str, int]:
        return dict(self._writer.execute("SELECT name, offset FROM files"))

    def _is_of_another(self, folder: Path) -> bool:
        sizes = {path.name: path.stat().st_size for path in journal_files(folder)}
        # A file that is gone was forgotten, and a line of a later one says so.
        return any(sizes.get(name, offset) < offset for name, offset in self._offsets().items())

    def _take_in(
        self,
        folder: Path,
        caught: Caught,
        progress: Callable[[int], None] | None,
        stopped: Callable[[], bool],
    ) -> bool:
        """Take in what there is; False if that was nothing, or it was stopped."""
        offsets, before = self._offsets(), caught.lines
        with closing(parsed_blocks(folder, offsets)) as blocks:
            for name, offset, end, entries in blocks:
                with self._transaction() as writer:
                    if self._offsets().get(name, 0) != offset:  # another process was faster
                        return True
                    batch = self._batch()
                    for entry in entries:
                        if isinstance(entry, dict):
                            self._write(batch)  # what comes behind it is not meant
                            self._forget(entry)
                            batch = self._batch()
                        elif entry is None:
                            caught.damaged += 1
                        else:
                            self._take(batch, entry)
                    self._write(batch)
                    writer.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, end))
                caught.lines += len(entries)
                if progress is not None:
                    progress(caught.lines)
                if stopped():
                    return False
        return caught.lines > before

    def _batch(self) -> _Batch:
        (latest,) = self._writer.execute("SELECT max(key) FROM lines").fetchone()
        return _Batch(latest or 0)

    def _take(self, batch: _Batch, entry: Entry) -> None:
        """Take in a line of the journal."""
        if not entry:
            return
        kind, key, camera, identity, start, end, text, name, prob, clip, source = entry
        if kind == _RECORDING:
            known = (self._number("camera", camera), identity, key)
            self._writer.execute("INSERT OR REPLACE INTO recordings VALUES (?, ?, ?)", known)
            return
        number, tags = self._tags_of(camera, kind, name)
        place = source and self._number("source", source)
        row = _Row(key, kind, number, identity, start, end, text, tags, "", prob, clip, place)
        row, old = self._placed(batch, row)
        if kind == _ALERT:
            old = old or row
            more = (self._tag("alert", ""), self._tag("alert", name or ""))
            new = [tag for tag in more if f" {tag} " not in f"{old.alerts} "]
            alerts = old.alerts + "".join(f" {tag}" for tag in new)
            row = old._replace(alerts=alerts, clip=clip or old.clip)
        elif kind == _LINE and old is not None:  # it is revised; that there was an alert stays
            row = row._replace(alerts=old.alerts, clip=old.clip)
            if not text and old.alerts:
                row = old._replace(kind=_ALERT)
        batch.rows[row.key] = row if row.text or row.kind == _ALERT else None

    def _tags_of(self, camera: str, kind: int, name: str | None) -> tuple[int, str]:
        """The number of a camera, and the tags of its lines of a class."""
        known = self._known_tags.get((camera, kind, name))
        if known is None:
            number, tags = self._number("camera", camera), []
            if kind == _LINE and name:
                tags = [self._tag("sentiment", name)]
            elif kind == _SOUND:
                tags = [self._tag("sound", ""), self._tag("sound", name or "")]
            known = number, " ".join([f"x{number}", *tags])
            if kind != _ALERT:
                self._known_tags[camera, kind, name] = known
        return known

    def _placed(self, batch: _Batch, row: _Row) -> tuple[_Row, _Row | None]:
        """The row with the key that it has in the index, or gets: that of its time, or the next
        that is free; and what is there of it, which is in the batch then.
        """
        key = row.key
        while True:
            if key not in batch.rows and key <= batch.latest:
                found = self._writer.execute("SELECT * FROM lines WHERE key = ?", (key,))
                if (values := found.fetchone()) is not None:
                    there = batch.rows[key] = _Row(*values)
                    batch.before[key] = there.words
            old = batch.rows.get(key)
            if old is None or (old.camera == row.camera and old.id == row.id):
                return row if key == row.key else row._replace(key=key), old
            key += 1

    def _number(self, kind: str, name: str) -> int:
        """What stands for a camera, a keyword, a class or a source."""
        number = self._numbers.get((kind, name))
        if number is None:
            values = (kind, whole_text(name))
            known = "SELECT number FROM labels WHERE kind = ? AND name = ?"
            found = self._writer.execute(known, values).fetchone()
            if found is None:
                new = "INSERT INTO labels(kind, name) VALUES (?, ?) RETURNING number"
                found = self._writer.execute(new, values).fetchone()
            number = self._numbers[kind, name] = int(found[0])
        return number

    def _forget_numbers(self) -> None:
        self._numbers.clear()
        self._known_tags.clear()

    def _tag(self, kind: str, name: str) -> str:
        return f"x{self._number(kind, name)}"

    def _write(self, batch: _Batch) -> None:
        """Put changes into the tables, in the order of their keys, as FTS5 takes them fastest."""
        writer, months = self._writer, set(_months(self._writer))
        rows = [row for _, row in sorted(batch.rows.items()) if row is not None]
        for key, known_words in sorted(batch.before.items()):
            self._delete_words(_month(key), [known_words])
        gone = [(key,) for key, row in batch.rows.items() if row is None]
        writer.executemany("DELETE FROM lines WHERE key = ?", gone)
        put = f"INSERT OR REPLACE INTO lines VALUES ({', '.join('?' * 12)})"
        writer.executemany(put, rows)
        by_month: dict[str, list[tuple[int, str, str]]] = {}
        for row in rows:
            by_month.setdefault(_month(row.key), []).append(row.words)
        for month, words in by_month.items():
            if month not in months:
                writer.execute(_WORDS.format(month))
                setting = f"INSERT INTO {month}({month}, rank) VALUES ('hashsize', ?)"
                writer.execute(setting, (_HASH_BYTES,))
            writer.executemany(f"INSERT INTO {month}(rowid, text, tags) VALUES (?, ?, ?)", words)

    def _delete_words(self, month: str, words: Iterable[tuple[int, str, str]]) -> None:
        self._writer.executemany(
            f"INSERT INTO {month}({month}, rowid, text, tags) VALUES ('delete', ?, ?, ?)", words
        )

    # --- forgetting ---------------------------------------------------------------------------

    def _forget(self, line: dict[str, Any]) -> None:
        """Let go of what a line of the journal says was forgotten."""
        if not line["camera"]:
            return  # it was itself
        camera, columns = self._number("camera", line["camera"]), "SELECT * FROM lines WHERE"
        before, rows = line.get("before"), list[_Row]()
        if isinstance(before, int | float):
            limit = (camera, first_key(before))
            found = self._writer.execute(f"{columns} camera = ? AND key < ?", limit)
            rows = [_Row(*values) for values in found]
        for identity, at in line.get("lines", ()):
            first = first_key(at)
            one = (first, first + (2 << SLOTS), camera, whole_text(identity))
            where = "key >= ? AND key < ? AND camera = ? AND id = ?"
            rows += [_Row(*v) for v in self._writer.execute(f"{columns} {where}", one)]
        by_month: dict[str, list[tuple[int, str, str]]] = {}
        for row in rows:
            by_month.setdefault(_month(row.key), []).append(row.words)
        for month, words in by_month.items():
            self._delete_words(month, words)
            self._writer.execute("INSERT OR IGNORE INTO stale VALUES (?)", (month,))
        self._writer.executemany("DELETE FROM lines WHERE key = ?", ((row.key,) for row in rows))

    def _purge(self) -> None:
        """What was forgotten leaves the file's bytes as well."""
        stale = [month for (month,) in self._writer.execute("SELECT month FROM stale")]
        if not stale:
            return
        for month in stale:
            with self._transaction() as writer:
                span = (first_key(_begin(month)), first_key(_end(month)))
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
        low = 0 if after is None else first_key(after)
        high = first_key(LATEST_S if before is None else before)
        if cursor is not None:
            if not re.fullmatch(r"[0-9]{1,19}", cursor):
                raise UserError(f"cursor: expected that of a page, found {cursor!r:.40}.")
            high = min(high, int(cursor))
        limit = max(1, min(limit, _MOST_HITS))
        with self._reading, self._snapshot():
            words = _match(query)
            tags = self._tags(camera, alert, sentiment, sound if words == "" else None)
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
            first, end = first_key(_begin(month)), first_key(_end(month))
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
        """The line of a key, if it is there."""
        with self._reading:
            query = "SELECT * FROM lines WHERE key = ?"
            row = self._reader.execute(query, (key,)).fetchone() if 0 <= key < 1 << 62 else None
            return None if row is None else self._hit(row)

    def find(self, camera: str, identity: str, at: float) -> Hit | None:
        """The line of a camera by its id and its time (seconds since 1970), if it is there."""
        with self._reading:
            number, first = self._known("camera", camera), key_of(camera, identity, at)
            query = "SELECT * FROM lines WHERE key >= ? AND key < ? AND camera = ? AND id = ?"
            values = (first, first + (1 << SLOTS), number, whole_text(identity))
            row = self._reader.execute(query, values).fetchone()
            return None if row is None else self._hit(row)

    def with_clips(self, hit: Hit) -> list[Hit]:
        """What clips were kept of a line's camera around its time, those of the line first."""
        around = int(2 * _NEAR_S * 100) << SLOTS
        with self._reading:
            rows = self._reader.execute(
                "SELECT * FROM lines WHERE camera = ? AND clip IS NOT NULL AND key BETWEEN ? AND ?",
                (self._known("camera", hit.camera), hit.key - around, hit.key + around),
            ).fetchall()
            hits = [self._hit(row) for row in rows]
        return sorted(hits, key=lambda one: abs(one.at - hit.at))

    def recording_began(self, hit: Hit) -> float:
        """When the file of a folder began that a line is of, so that times in it are known; 0 for
        other sources, whose times are such.
        """
        with self._reading:
            query = "SELECT began FROM recordings WHERE camera = ? AND name = ?"
            values = (self._known("camera", hit.camera), recording_of(hit.id))
            row = self._reader.execute(query, values).fetchone()
            return 0.0 if row is None else float(row[0])

    def names(self, kind: Name) -> list[str]:
        """Cameras, keywords or classes that there are in it."""
        with self._reading:
            query = "SELECT name FROM labels WHERE kind = ? AND name != '' ORDER BY name"
            return [name for (name,) in self._reader.execute(query, (kind,))]

    def timeline(
        self, after: float, before: float, parts: int
    ) -> dict[str, list[tuple[int, int, int]]]:
        """How much there is in each of so many equal parts of a time, by camera: lines, alerts,
        sounds.
        """
        low, high = first_key(after), first_key(before)
        width = max(1, -(-(high - low) // parts))
        found: dict[str, list[tuple[int, int, int]]] = {}
        with self._reading:
            rows = self._reader.execute(
                f"SELECT camera, (key - ?) / ?, sum(kind != {_SOUND}), sum(alerts != ''), "
                f"sum(kind = {_SOUND}) FROM lines WHERE key >= ? AND key < ? GROUP BY 1, 2",
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

    def _tags(
        self,
        camera: str | Sequence[str] | None,
        alert: str | bool,
        sentiment: str | None,
        sound: str | None,
    ) -> list[str] | None:
        """What FTS5 is asked for beside words; None where there is nothing of a name."""
        cameras = [camera] if isinstance(camera, str) else list(camera or ())
        wanted = [
            *([[("camera", name) for name in cameras]] if camera is not None else []),
            *([[("alert", "" if alert is True else alert)]] if alert is not False else []),
            *([[("sentiment", sentiment)]] if sentiment is not None else []),
            *([[("sound", sound)]] if sound is not None else []),
        ]
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
        around = int(_NEAR_S * 100) << SLOTS
        rows = self._reader.execute(
            f"SELECT tags FROM lines WHERE kind = {_SOUND} AND camera = ? AND key BETWEEN ? AND ?",
            (camera, key - around, key + around),
        )
        return any(f" x{label} " in f"{tags} " for (tags,) in rows)

    def _name(self, number: int) -> str:
        return self._label(number)[1]

    def _label(self, number: int) -> tuple[str, str]:
        if number not in self._names:
            query = "SELECT kind, name FROM labels WHERE number = ?"
            row = self._reader.execute(query, (number,)).fetchone()
            self._names[number] = row or ("", "")
        return self._names[number]

    def _hit(self, values: Sequence[Any]) -> Hit:
        row = _Row(*values)
        tags = [self._label(int(tag[1:])) for tag in f"{row.tags}{row.alerts}".split()]
        return Hit(
            key=row.key,
            kind=KINDS[row.kind],
            camera=self._name(row.camera),
            id=row.id,
            at=(row.key >> SLOTS) / 100,
            start=row.start,
            end=row.end,
            text=row.text,
            sentiment=next((name for kind, name in tags if kind == "sentiment"), None),
            sentiment_prob=row.prob,
            alerts=tuple(name for kind, name in tags if kind == "alert" and name),
            clip=row.clip,
            source="" if row.source is None else self._name(row.source),
        )


def spaced(text: str) -> str:
    """The words of a text, of scripts without spaces each letter, with spaces between them."""
    if text.isascii():  # FTS5 and Unicode agree
        return text
    return UNSPACED.sub(r" \g<0> ", _OTHERS.sub(" ", unicodedata.normalize("NFKC", text)))


def _match(query: str) -> str | None:
    """A query as FTS5 takes it: words in quotes alone, so that nothing in it is an operator. Empty
    for an empty query; None for one that no line can match.
    """
    if len(query) > _LONGEST_QUERY:
        return None
    pieces = []
    for found in _PIECES.finditer(whole_text(query)):
        words = _OTHERS.sub(" ", spaced(found[1] or found[2] or "")).split()
        if words:
            is_open = found[2] is not None and found.end() == len(query)
            is_open = is_open and len(words[-1]) >= _PREFIX_FROM
            pieces.append(f'"{" ".join(words)}"{" *" if is_open else ""}')
    return " AND ".join(pieces) if pieces or not query.strip() else None


# --- months --------------------------------------------------------------------------------------


def _month(key: int) -> str:
    """The table that has the words of a key; months are of UTC."""
    return _month_of_day(key // (8_640_000 << SLOTS))


@functools.cache
def _month_of_day(day: int) -> str:
    return time.strftime("words_%Y%m", time.gmtime(day * 86400))


def _begin(month: str) -> float:
    return calendar.timegm((int(month[6:10]), int(month[10:]), 1, 0, 0, 0))


def _end(month: str) -> float:
    year, number = divmod(int(month[6:10]) * 12 + int(month[10:]), 12)
    return calendar.timegm((year, number + 1, 1, 0, 0, 0))


def _months(connection: sqlite3.Connection) -> list[str]:
    """Tables of words, oldest first."""
    query = "SELECT name FROM sqlite_master WHERE name GLOB ? ORDER BY name"
    digits = "[0-9]" * 6
    return [name for (name,) in connection.execute(query, (f"words_{digits}",))]
