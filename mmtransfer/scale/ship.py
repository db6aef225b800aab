"""Journals of many sites in one place: their lines are sent to a broker, and taken in from there.

A site sends each line of its journal to NATS JetStream, remembers how far it came, and goes on
there after a kill or after days without a network. Where the lines are taken in, the index or the
folder of Parquet files holds for each journal how far that came; so every line is in it once,
whatever is sent or delivered twice. Audio stays where it is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmtransfer.cache import atomic_path, open_private
from mmtransfer.data.files import read_object
from mmtransfer.errors import UserError
from mmtransfer.monitoring.journal.files import ID_NAME, journal_files, journal_id, whole_lines
from mmtransfer.server.catching_up import UnreachableError
from mmtransfer.server.indexing import open_index
from mmtransfer.speech.addresses import checked_address, public_address, without_secrets

try:
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig
    from nats.js.errors import NotFoundError
except ModuleNotFoundError:
    raise UserError("ship needs nats-py. pip install 'mmtransfer[ship]'") from None

logger = logging.getLogger(__name__)
STREAM = "mmtransfer"
"""JetStream's stream of all lines; a subject for each journal."""
STATE_NAME = "shipped.json"
"""In the journal's folder: how far it has been sent, by address."""
_KEPT_S = 14 * 86400.0  # lines in a stream that is made here
_AT_ONCE = 500  # lines that are sent before their arrival is awaited
_ANSWER_S = 10.0
_EVERY_S = 0.5
_IDLE_S = 3600.0  # after which the broker forgets who took nothing
_AGAIN_S = (1.0, 30.0)  # while nothing answers, longer and longer
_HEADER_BYTES = 4096
_SITE, _FILE, _PLACE = "Mmtransfer-Site", "Mmtransfer-File", "Mmtransfer-Place"
_SITE_NAME = r"[\w.-]*"


@dataclass(frozen=True)
class Line:
    """A line of a journal on its way."""

    journal: str
    """Its `journal_id`."""
    site: str
    file: str
    begin: int
    """Where it begins in the file."""
    data: bytes

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.begin + len(self.data)


@dataclass
class Shipped:
    """What was sent or taken in."""

    lines: int = 0
    left_out: int = 0
    """Lines longer than the broker takes."""


class Sink(Protocol):
    """Where lines are taken in."""

    most: int
    """Lines that are taken in together."""
    within_s: float
    """How long the first of them waits for others."""

    def mark(self, name: str) -> int:
        """How far a stream is in it: the number of its last message, or 0."""

    def take(self, lines: Iterable[Line], marks: Mapping[str, int]) -> None:
        """Take in lines, each once, and how far streams are in it then; when this returns both are
        on the disk, and before neither.
        """

    def close(self) -> None:
        """Let go of it."""


def ship(journal: str | Path, address: str, *, site: str = "", once: bool = False) -> Shipped:
    """Send what stands in a journal, and what is written into it, until it is interrupted.

    Args:
        journal: Its folder; a monitor may be writing it.
        address: nats:// or tls:// of a broker with JetStream, or postgresql:// of an index.
        site: What stands before the names of its cameras at the other end, and a slash.
        once: End when everything has been sent.

    Raises:
        UserError: no such folder, an address that cannot be used; and with `once`, one at which
            nothing answers.
    """
    folder, done = Path(journal), Shipped()
    if not journal_files(folder) and not (folder / "journal.json").is_file():
        raise UserError(f"{journal}: expected the folder of a journal, found none.")
    if not re.fullmatch(_SITE_NAME, site):
        raise UserError(f"site: expected letters, digits, '.', '_' and '-', found {site!r:.40}.")
    if is_broker(address):
        checked_address(address)
        return _again(
            lambda: asyncio.run(_send(folder, address, site, done, once=once)), done, once
        )

    def catch_up() -> None:
        with open_index(address, folder) as index:
            while True:
                done.lines += index.catch_up(folder, site=site).lines
                if once:
                    return
                time.sleep(_EVERY_S)

    return _again(catch_up, done, once)


def collect(address: str, sink: Sink, *, once: bool = False) -> Shipped:
    """Take in what sites send to a broker, until it is interrupted.

    Args:
        address: nats:// or tls:// of the broker.
        sink: Where it goes.
        once: End when everything has been taken in.

    Raises:
        UserError: an address that cannot be used; and with `once`, one at which nothing answers.
    """
    checked_address(address)
    done = Shipped()
    return _again(lambda: asyncio.run(_collect(address, sink, done, once=once)), done, once)


def is_broker(address: str) -> bool:
    """Whether an address is that of NATS."""
    return address.startswith(("nats://", "tls://"))


def _again(work: Callable[[], None], done: Shipped, once: bool) -> Shipped:
    """Do it, and while nothing answers, do it again."""
    pause, before = _AGAIN_S[0], -1
    while True:
        try:
            work()
            return done
        except UnreachableError as error:
            if once:
                raise
            if done.lines != before:  # of one outage once
                logger.warning("%s It is tried again.", error)
                pause, before = _AGAIN_S[0], done.lines
        time.sleep(pause)
        pause = min(_AGAIN_S[1], 2 * pause)


# --- sending -------------------------------------------------------------------------------------


class _Sent:
    """How far a journal has been sent to an address, remembered beside it."""

    def __init__(self, folder: Path, address: str):
        self._path, self._key = folder / STATE_NAME, public_address(address)
        self._all: dict[str, Any] = {}
        with suppress(UserError, ValueError):  # what is not known is sent again
            self._all = read_object(self._path)
        known = self._all.get(self._key)
        self.offsets: dict[str, int] = known if isinstance(known, dict) else {}

    def remember(self, **offsets: int) -> None:
        self.offsets |= offsets
        self._all[self._key] = self.offsets
        with atomic_path(self._path) as part, open_private(part, "w", encoding="utf-8") as file:
            json.dump(self._all, file)


async def _send(folder: Path, address: str, site: str, done: Shipped, *, once: bool) -> None:
    sent = _Sent(folder, address)
    sizes = {path.name: path.stat().st_size for path in journal_files(folder)}
    if any(sizes.get(name, offset) < offset for name, offset in sent.offsets.items()):
        (folder / ID_NAME).unlink(missing_ok=True)  # another journal lies there now
        sent.offsets.clear()
    journal = journal_id(folder)
    async with _connected(address) as (client, stream):
        while True:
            for name, lines in _unsent(folder, journal, site, sent.offsets):
                await _publish(client, stream, lines, done)
                sent.remember(**{name: lines[-1].end})
                done.lines += len(lines)
            if once:
                return
            await asyncio.sleep(_EVERY_S)


def _unsent(
    folder: Path, journal: str, site: str, offsets: dict[str, int]
) -> Iterator[tuple[str, list[Line]]]:
    for path in journal_files(folder):
        name, begin, lines = path.name, offsets.get(path.name, 0), list[Line]()
        for data in whole_lines(path, begin):
            lines.append(Line(journal, site, name, begin, data))
            begin += len(data)
            if len(lines) == _AT_ONCE:
                yield name, lines
                lines = []
        if lines:
            yield name, lines


async def _publish(client: Any, stream: Any, lines: list[Line], done: Shipped) -> None:
    """Send lines in their order, and wait until the broker has them on its disk."""
    arriving = []
    for line in lines:
        if len(line.data) + _HEADER_BYTES > client.max_payload:
            done.left_out += 1
            logger.warning(
                "%s: a line of %d bytes left out: the broker takes %d",
                *(line.file, len(line.data), client.max_payload),
            )
            continue
        # The broker drops what comes twice within its window of duplicates.
        headers = {
            "Nats-Msg-Id": f"{line.journal}/{line.file}/{line.begin}",
            **{_SITE: line.site, _FILE: line.file, _PLACE: str(line.begin)},
        }
        subject = f"{STREAM}.{line.journal}"
        arriving.append(await stream.publish_async(subject, line.data, headers=headers))
    await asyncio.wait_for(asyncio.gather(*arriving), _ANSWER_S)


# --- taking in -----------------------------------------------------------------------------------


async def _collect(address: str, sink: Sink, done: Shipped, *, once: bool) -> None:
    async with _connected(address) as (_, stream):
        created = (await stream.stream_info(STREAM)).created
        mark = f"{STREAM}@{created.isoformat()}"  # another stream counts from 1 again
        # In its order, from what the sink holds on: what was delivered and not taken in comes again
        # before anything else.
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=sink.mark(mark) + 1,
            ack_policy=AckPolicy.NONE,
            inactive_threshold=_IDLE_S,
        )
        waiting = await stream.pull_subscribe(f"{STREAM}.>", stream=STREAM, config=config)
        delivered = 0
        while True:
            messages = await _fetched(waiting, sink.most, 1.0 if once else sink.within_s)
            for message in messages:
                delivered += 1
                if message.metadata.sequence.consumer != delivered:
                    raise nats.errors.ProtocolError("a message is missing")
            if messages:
                lines = [line for message in messages if (line := _line(message)) is not None]
                await _taken(sink, lines, {mark: messages[-1].metadata.sequence.stream})
                done.lines += len(lines)
            elif once:
                return


async def _fetched(waiting: Any, most: int, within_s: float) -> list[Any]:
    found, end = list[Any](), time.monotonic() + within_s
    while len(found) < most and (left := end - time.monotonic()) > 0:
        with suppress(TimeoutError):
            found += await waiting.fetch(min(_AT_ONCE, most - len(found)), timeout=left)
    return found


async def _taken(sink: Sink, lines: list[Line], marks: dict[str, int]) -> None:
    """Give lines to a sink, as long as it takes until that is there again."""
    while True:
        try:
            await asyncio.to_thread(sink.take, lines, marks)
            return
        except UnreachableError as error:
            logger.warning("%s It is tried again.", error)
            await asyncio.sleep(_AGAIN_S[1])


def _line(message: Any) -> Line | None:
    """The line in a message; None for what others have sent."""
    headers, journal = message.headers or {}, message.subject.partition(".")[2]
    name, place, site = (headers.get(key, "") for key in (_FILE, _PLACE, _SITE))
    expected = (
        (r"[\w.-]{1,100}", journal),
        (_SITE_NAME, site),
        (r"\d{4}-\d\d-\d\d\.\d{1,9}\.jsonl", name),
        (r"\d{1,18}", place),  # sinks have 63 bits for it
    )
    fits = all(re.fullmatch(pattern, found) for pattern, found in expected)
    if not fits or not message.data.endswith(b"\n"):
        logger.warning("%s: a message that is no line of a journal was left out", STREAM)
        return None
    return Line(journal, site, name, int(place), message.data)


# --- the broker ----------------------------------------------------------------------------------


@asynccontextmanager
async def _connected(address: str) -> AsyncIterator[tuple[Any, Any]]:
    """A connection, and JetStream with a stream for lines.

    Raises:
        UnreachableError: what goes wrong with it, now or later.
    """
    failures: list[Exception] = []

    async def note(error: Exception) -> None:
        failures.append(error)

    try:
        client = await nats.connect(
            address,
            allow_reconnect=False,
            connect_timeout=5,
            reconnect_time_wait=1,
            max_reconnect_attempts=1,
            error_cb=note,
            name=STREAM,
        )
    except (nats.errors.Error, OSError) as error:
        raise _unreachable(address, failures[-1] if failures else error) from None
    try:
        stream = client.jetstream(timeout=_ANSWER_S)
        try:
            await stream.stream_info(STREAM)
        except NotFoundError:
            config = StreamConfig(STREAM, subjects=[f"{STREAM}.>"], max_age=_KEPT_S)
            await stream.add_stream(config)
        yield client, stream
    except (nats.errors.Error, ConnectionError, TimeoutError) as error:
        raise _unreachable(address, error) from None
    finally:
        await client.close()


def _unreachable(address: str, error: Exception) -> UnreachableError:
    why = " ".join(without_secrets(str(error), address).split()) or type(error).__name__
    return UnreachableError(f"{public_address(address)}: cannot be used as a broker ({why}).")
