"""The index of several machines: what was transcribed, in one PostgreSQL.

Every machine takes in its own journal, and searches them all. Lines are in a table for each month,
with their words and what they are filtered by in one GIN index. Words are split here as for SQLite,
letter by letter in scripts without spaces, so that no extension is needed.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import recording_of
from mmtransfer.monitoring.journal.files import journal_id
from mmtransfer.server.catching_up import JournalIndex, UnreachableError
from mmtransfer.server.entries import Plain
from mmtransfer.server.hits import NEAR, Filters, Hit, Name, Page, hit_of
from mmtransfer.server.months import month_begin, month_end, month_of
from mmtransfer.server.rows import SLOTS, SOUND, Row, first_key, key_of
from mmtransfer.server.words import folded_words, phrases
from mmtransfer.speech.addresses import checked_address, public_address, without_secrets

try:
    import psycopg
except ModuleNotFoundError:
    raise UserError(
        "an index in PostgreSQL needs psycopg. pip install 'mmtransfer[ship]'"
    ) from None

logger = logging.getLogger(__name__)
_FORMAT = 1
_LOCK = 0x6D6D7472  # of PostgreSQL's advisory locks: one machine writes at a time
_PURGE_LOCK = _LOCK + 1
_CONNECT_S = 10
_BUDGET_S = 0.1  # a page is handed out as far as it came by then
_LONGEST_TAG = 500
_MOST_WORDS = 10_000  # of a line; of a longer one its beginning is found
_COLUMNS = 'key, kind, camera, id, start, "end", text, name, alerts, prob, clip, source, journal'
_TABLES = """
CREATE TABLE format(number integer);
CREATE TABLE files(name text PRIMARY KEY, "offset" bigint NOT NULL);
CREATE TABLE months(name text PRIMARY KEY, is_stale boolean NOT NULL);
CREATE TABLE labels(kind text, name text, PRIMARY KEY(kind, name));
CREATE TABLE recordings(camera text, name text, began double precision, PRIMARY KEY(camera, name));
CREATE TABLE lines(
    key bigint PRIMARY KEY, kind smallint NOT NULL, camera text NOT NULL, id text NOT NULL,
    start double precision, "end" double precision, text text, name text, alerts text[],
    prob real, clip text, source text, journal text, words tsvector) PARTITION BY RANGE (key);
CREATE INDEX lines_words ON lines USING gin(words) WITH (fastupdate = off);
CREATE INDEX lines_sounds ON lines(camera, key) WHERE kind = 2;
CREATE INDEX lines_clips ON lines(camera, key) WHERE clip IS NOT NULL
"""


class PostgresIndex(JournalIndex):
    """An index in the schema `mmtransfer` of a PostgreSQL database, which is made where it is not.

    Args:
        address: As in postgresql://USER@HOST/DATABASE.
        journal: The journal of this machine: only its files are named by hits.

    Raises:
        UnreachableError: nothing answers at the address, or it lets nobody in.
        UserError: an index of another version.

    Example:
        with PostgresIndex("postgresql://site@db/mmtransfer", "journal") as index:
            index.catch_up("journal")
            print(index.search("open the gate").hits)
    """

    def __init__(self, address: str, journal: str | Path | None = None):
        super().__init__()
        self._address = checked_address(address)
        self._journal = None if journal is None else journal_id(Path(journal))
        self._reading = threading.Lock()
        self._writer: psycopg.Connection[Any] | None = None
        self._reader: psycopg.Connection[Any] | None = None
        with self._transaction():
            self._make()

    def close(self) -> None:
        for connection in (self._writer, self._reader):
            if connection is not None:
                connection.close()

    def _connect(self) -> psycopg.Connection[Any]:
        made = psycopg.connect(
            self._address,
            autocommit=True,
            connect_timeout=_CONNECT_S,
            application_name="mmtransfer",
            client_encoding="UTF8",
        )
        made.execute("SET search_path = mmtransfer")
        made.prepare_threshold = None  # plans depend on how frequent words are
        return made

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """What the database refuses is one line without secrets."""
        try:
            yield
        except psycopg.Error as error:
            is_address = isinstance(error, psycopg.ProgrammingError) and error.sqlstate is None
            why = " ".join(without_secrets(str(error), self._address).split())
            if is_address:  # what the library quotes of it may be a part of a password
                why = "expected postgresql://HOST:PORT/DATABASE"
            raise UnreachableError(
                f"{public_address(self._address)}: cannot be used as an index ({why})."
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Connection[Any]]:
        with self._reachable():
            writer = self._open_writer()
            with writer.transaction():
                writer.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                yield writer

    @contextmanager
    def _snapshot(self) -> Iterator[psycopg.Connection[Any]]:
        with self._reading, self._reachable():
            if self._reader is None or self._reader.closed:
                self._reader = self._connect()
            with self._reader.transaction():
                yield self._reader

    def _open_writer(self) -> psycopg.Connection[Any]:
        if self._writer is None or self._writer.closed:
            self._writer = self._connect()
        return self._writer

    def _do(self, statement: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        with self._reachable():
            return self._open_writer().execute(statement, values)

    def _make(self) -> None:
        known = "SELECT 1 FROM pg_namespace WHERE nspname = 'mmtransfer'"
        if self._do(known).fetchone() is None:
            self._do("CREATE SCHEMA mmtransfer")
        if self._do("SELECT to_regclass('mmtransfer.format')").fetchone() == (None,):
            for statement in _TABLES.split(";\n"):
                self._do(statement)
            self._do("INSERT INTO format VALUES (%s)", (_FORMAT,))
        found = self._do("SELECT number FROM format").fetchone()
        if found != (_FORMAT,):
            raise UserError(
                f"{public_address(self._address)}: expected an index of format {_FORMAT}, found "
                f"{found and found[0]}. Use the same version on every machine, or another database."
            )

    # --- from journals ------------------------------------------------------------------------

    def _prefix(self, folder: Path) -> str:
        return f"{journal_id(folder)}/"

    def _clear(self, prefix: str) -> None:
        origin = prefix.removesuffix("/")
        self._do("DELETE FROM lines WHERE journal = %s", (origin,))
        self._do("DELETE FROM files WHERE starts_with(name, %s)", (prefix,))

    def _offsets(self, prefix: str) -> dict[str, int]:
        query = 'SELECT name, "offset" FROM files WHERE starts_with(name, %s)'
        found = self._do(query, (prefix,)).fetchall()
        return {name.removeprefix(prefix): offset for name, offset in found}

    def _set_offset(self, name: str, offset: int) -> None:
        put = 'INSERT INTO files VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET "offset" = %s'
        self._do(put, (name, offset, offset))

    def _note_recording(self, camera: str, name: str, began: float) -> None:
        put = "INSERT INTO recordings VALUES (%s, %s, %s) ON CONFLICT (camera, name) DO UPDATE "
        self._do(f"{put}SET began = %s", (_whole(camera), _whole(name), began, began))

    def _rows(self, keys: list[int]) -> dict[int, Row]:
        if not keys:
            return {}
        query = f"SELECT {_COLUMNS} FROM lines WHERE key = ANY(%s)"
        return {values[0]: _row(values) for values in self._do(query, (keys,))}

    def _write(self, gone: list[Row], come: list[Plain], origin: str) -> None:
        if gone:
            self._do("DELETE FROM lines WHERE key = ANY(%s)", ([row.key for row in gone],))
        if not come:
            return
        self._add_months([one[0] for one in come])
        labels: set[tuple[str, str]] = set()
        put = f"COPY lines({_COLUMNS}, words) FROM STDIN"
        with self._open_writer().cursor() as cursor, cursor.copy(put) as copy:
            for *values, words in come:
                row = Row(*values)
                tags = _tags(row)
                labels |= tags
                alerts = [_whole(name) for name in row.alerts]
                texts = [_whole(one) if isinstance(one, str) else one for one in row]
                copy.write_row((*texts[:8], alerts, *texts[9:], origin, _vector(words, tags)))
        put = "INSERT INTO labels VALUES (%s, %s) ON CONFLICT DO NOTHING"
        for kind, name in labels:
            self._do(put, (kind, _whole(name)))

    def _add_months(self, keys: list[int]) -> None:
        known, first = set(_months(self._open_writer())), 0
        while first < len(keys):
            month = month_of(keys[first])
            if month not in known:
                span = f"FROM ({first_key(month_begin(month))}) TO ({first_key(month_end(month))})"
                self._do(f"CREATE TABLE {month} PARTITION OF lines FOR VALUES {span}")
                self._do("INSERT INTO months VALUES (%s, false)", (month,))
            first = bisect_left(keys, first_key(month_end(month)), first)

    # --- forgetting ---------------------------------------------------------------------------

    def _forget_before(self, camera: str, key: int) -> None:
        self._forget("camera = %s AND key < %s", (_whole(camera), key))

    def _rows_of(self, camera: str, identities: Sequence[str], low: int, high: int) -> list[Row]:
        query = (
            f"SELECT {_COLUMNS} FROM lines WHERE key >= %s AND key < %s AND camera = %s AND "
            "id = ANY(%s)"
        )
        values = (low, high, _whole(camera), [_whole(identity) for identity in identities])
        return [_row(one) for one in self._do(query, values)]

    def _forget_rows(self, rows: Iterable[Row]) -> None:
        self._forget("key = ANY(%s)", ([row.key for row in rows],))

    def _forget(self, where: str, values: Sequence[Any]) -> None:
        keys = [
            key for (key,) in self._do(f"DELETE FROM lines WHERE {where} RETURNING key", values)
        ]
        stale = sorted({month_of(key) for key in keys})
        self._do("UPDATE months SET is_stale = true WHERE name = ANY(%s)", (stale,))

    def _purge(self) -> None:
        with self._reachable():
            connection = self._open_writer()
            query = "SELECT name FROM months WHERE is_stale AND pg_try_advisory_lock(%s)"
            stale = [name for (name,) in connection.execute(query, (_PURGE_LOCK,))]
            if not stale:
                return
            try:
                for month in stale:
                    self._purge_month(connection, month)
                with self._transaction():
                    self._drop_labels()
            finally:
                if not connection.closed:
                    connection.execute("SELECT pg_advisory_unlock_all()")

    def _purge_month(self, connection: psycopg.Connection[Any], month: str) -> None:
        """Take the bytes of what was forgotten out of a month's files."""
        with self._transaction():
            if self._do(f"SELECT 1 FROM {month} LIMIT 1").fetchone() is None:
                self._do(f"DROP TABLE {month}")
                self._do("DELETE FROM months WHERE name = %s", (month,))
                return
        # GIN never lets go of a word by itself.
        connection.execute(f"VACUUM (FULL, ANALYZE) {month}")
        connection.execute("UPDATE months SET is_stale = false WHERE name = %s", (month,))

    def _drop_labels(self) -> None:
        """Names that nothing has any more go as well."""
        for kind, name in self._do("SELECT kind, name FROM labels").fetchall():
            query = "SELECT 1 FROM lines WHERE words @@ %s::tsquery LIMIT 1"
            if self._do(query, (_quoted(_tag(kind, name)),)).fetchone() is None:
                self._do("DELETE FROM labels WHERE kind = %s AND name = %s", (kind, name))

    # --- searching ----------------------------------------------------------------------------

    def _page(self, query: str, filters: Filters, low: int, high: int, limit: int) -> Page:
        found = phrases(query)
        words = None if found is None else _words(found)
        if words is None:
            return Page([], None)
        near = filters.sound if words else None
        wanted = filters.names(with_sound=near is None)
        if any(not names for names in wanted):
            return Page([], None)
        tags = [" | ".join(_quoted(_tag(*name)) for name in names) for names in wanted]
        asked = " & ".join([*words, *(f"({names})" for names in tags)])
        with self._snapshot() as reader:
            if not asked:
                return self._latest(reader, low, high, limit)
            if " <-> " in asked:  # that words stand side by side is rarer than the planner thinks
                reader.execute("SET LOCAL enable_indexscan = off")
            return self._found(reader, asked, low, high, limit, near)

    def _found(
        self,
        reader: psycopg.Connection[Any],
        asked: str,
        low: int,
        high: int,
        limit: int,
        near: str | None,
    ) -> Page:
        """Hits month by month, as far as there is time."""
        hits: list[Hit] = []
        deadline, is_begun = time.monotonic() + _BUDGET_S, False
        where, values = "words @@ %s::tsquery AND key >= %s AND key < %s", [asked, low, high]
        if near is not None:
            where += (
                f" AND EXISTS (SELECT 1 FROM lines sounds WHERE kind = {SOUND} AND "
                "sounds.camera = found.camera AND sounds.key BETWEEN found.key - %s AND "
                "found.key + %s AND %s IN (sounds.name, ''))"
            )
            values += [NEAR, NEAR, near]
        for month in reversed(_months(reader)):
            first, end = first_key(month_begin(month)), first_key(month_end(month))
            if first >= high or end <= low:
                continue
            if is_begun and time.monotonic() > deadline:
                return Page(hits, str(min(high, end)))
            is_begun = True
            rows = reader.execute(
                f"SELECT {_COLUMNS} FROM {month} found WHERE {where} ORDER BY key DESC LIMIT %s",
                (*values, limit + 1 - len(hits)),
            ).fetchall()
            hits += [self._hit(row) for row in rows]
            if len(hits) > limit:
                return Page(hits[:limit], str(hits[limit - 1].key))
        return Page(hits, None)

    def _latest(self, reader: psycopg.Connection[Any], low: int, high: int, limit: int) -> Page:
        query = (
            f"SELECT {_COLUMNS} FROM lines WHERE key >= %s AND key < %s ORDER BY key DESC LIMIT %s"
        )
        rows = reader.execute(query, (low, high, limit + 1)).fetchall()
        hits = [self._hit(row) for row in rows[:limit]]
        return Page(hits, str(hits[-1].key) if len(rows) > limit else None)

    def _hits(self, where: str, values: Sequence[Any]) -> list[Hit]:
        with self._snapshot() as reader:
            rows = reader.execute(f"SELECT {_COLUMNS} FROM lines WHERE {where}", values).fetchall()
        return [self._hit(row) for row in rows]

    def get(self, key: int) -> Hit | None:
        found = self._hits("key = %s", (key,)) if 0 <= key < 1 << 62 else []
        return found[0] if found else None

    def find(self, camera: str, identity: str, at: float) -> Hit | None:
        first = key_of(camera, identity, at)
        where = "key >= %s AND key < %s AND camera = %s AND id = %s"
        found = self._hits(where, (first, first + (1 << SLOTS), _whole(camera), _whole(identity)))
        return found[0] if found else None

    def with_clips(self, hit: Hit) -> list[Hit]:
        where = "camera = %s AND clip IS NOT NULL AND key BETWEEN %s AND %s AND journal = %s"
        span = (hit.camera, hit.key - 2 * NEAR, hit.key + 2 * NEAR, self._journal)
        return sorted(self._hits(where, span), key=lambda one: abs(one.at - hit.at))

    def recording_began(self, hit: Hit) -> float:
        query = "SELECT began FROM recordings WHERE camera = %s AND name = %s"
        with self._snapshot() as reader:
            row = reader.execute(query, (hit.camera, _whole(recording_of(hit.id)))).fetchone()
        return 0.0 if row is None else float(row[0])

    def names(self, kind: Name) -> list[str]:
        query = "SELECT name FROM labels WHERE kind = %s AND name <> '' ORDER BY name COLLATE \"C\""
        with self._snapshot() as reader:
            return [name for (name,) in reader.execute(query, (kind,))]

    def timeline(
        self, after: float, before: float, parts: int
    ) -> dict[str, list[tuple[int, int, int]]]:
        low, high = first_key(after), first_key(before)
        width = max(1, -(-(high - low) // parts))
        counts = (
            f"count(*) FILTER (WHERE kind <> {SOUND}), count(*) FILTER (WHERE alerts <> '{{}}'), "
        )
        counts += f"count(*) FILTER (WHERE kind = {SOUND})"
        query = f"SELECT camera, (key - %s) / %s, {counts} FROM lines WHERE key >= %s AND key < %s "
        found: dict[str, list[tuple[int, int, int]]] = {}
        with self._snapshot() as reader:
            rows = reader.execute(f"{query}GROUP BY 1, 2", (low, width, low, high)).fetchall()
        for camera, part, *numbers in rows:
            own = found.setdefault(camera, [(0, 0, 0)] * parts)
            own[part] = (numbers[0], numbers[1], numbers[2])
        return found

    def _hit(self, values: Sequence[Any]) -> Hit:
        row = _row(values)
        if values[-1] != self._journal:  # its files are on another machine
            row = row._replace(clip=None, source=None)
        return hit_of(row)


def _row(values: Sequence[Any]) -> Row:
    return Row._make([*values[:8], tuple(values[8]), *values[9:12]])


def _months(connection: psycopg.Connection[Any]) -> list[str]:
    """Tables of lines, oldest first."""
    return [name for (name,) in connection.execute("SELECT name FROM months ORDER BY name")]


# --- words ---------------------------------------------------------------------------------------


def _tags(row: Row) -> set[tuple[str, str]]:
    """What a row is filtered by."""
    found = {("camera", row.camera), *(("alert", name) for name in row.alerts)}
    if row.kind == SOUND:
        found |= {("sound", ""), ("sound", row.name or "")}
    elif row.name:
        found.add(("sentiment", row.name))
    return found


def _tag(kind: str, name: str) -> str:
    """As it stands among the words; no word has such a beginning."""
    return f"={kind}:{_whole(name)}"[:_LONGEST_TAG]


def _vector(words: str, tags: set[tuple[str, str]]) -> str:
    """A tsvector of words, which are no more than letters and digits, and of tags."""
    found = folded_words(words)[:_MOST_WORDS]
    placed = [f"'{word}':{number}" for number, word in enumerate(found, 1)]
    return " ".join([*placed, *(_quoted(_tag(*tag)) for tag in tags)])


def _words(found: list[tuple[str, bool]]) -> list[str] | None:
    """The phrases of a query as a tsquery takes them; None for one that no line can match."""
    pieces = []
    for text, is_open in found:
        words = [f"'{word}'" for word in folded_words(text)]
        if not words:
            return None
        if is_open:
            words[-1] += ":*"
        pieces.append(f"({' <-> '.join(words)})")
    return pieces


def _quoted(lexeme: str) -> str:
    return "'" + lexeme.replace("\\", "\\\\").replace("'", "''") + "'"


def _whole(text: str) -> str:
    """A text as PostgreSQL takes it: without zeros."""
    return whole_text(text).replace("\0", "\ufffd")
