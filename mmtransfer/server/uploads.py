"""Bodies of requests, in bounded time, memory and disk: forms with a file, files alone, JSON."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmtransfer.server.problems import Problem
from mmtransfer.speech.audio import UPLOAD

_CHUNK_S = 15.0  # longest wait for the next part of a body
_PATIENCE_S, _LEAST_RATE = 30.0, 16_000  # after the first, at least so many bytes a second
_FIELD_BYTES, _FIELDS = 64 << 10, 64
_DRAINED_BYTES, _DRAIN_S = 32 << 20, 10.0
_FOLDER, _LOCK = "mmtransfer-uploads-", ".lock"
T = TypeVar("T")


@dataclass
class Form:
    """What a form holds."""

    values: dict[str, list[str]] = field(default_factory=dict)
    file: Path | None = None
    file_name: str = ""
    """As the client calls it."""

    def get(self, name: str, default: str = "") -> str:
        """The last value of a field."""
        return self.values.get(name, [default])[-1]


class Uploads:
    """A folder for what clients send, for this user alone, as long as the server runs; those of
    servers that were killed are removed.
    """

    def __init__(self, most_mb: float):
        self._most = int(most_mb * 1e6)
        _remove_left()
        self._temporary = Path(tempfile.mkdtemp(prefix=_FOLDER))
        self._lock = FileLock(self._temporary / _LOCK)
        self._lock.acquire()
        self.folder = self._temporary / "files"
        self.folder.mkdir()
        self._numbers = itertools.count()

    def close(self) -> None:
        """Remove it with all that is in it."""
        self._lock.release()
        shutil.rmtree(self._temporary, ignore_errors=True)

    async def form(self, request: Request) -> Form:
        """The form in a request; the caller removes its file.

        Raises:
            Problem: another content type, too large, too slow, or no form.
        """
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise Problem(415, "expected a form (multipart/form-data) with a file.")
        form = Form()
        writer = _FormWriter(form, self._path())
        try:
            try:
                parser = MultipartParser(boundary, writer.callbacks)
                async for chunk in self.chunks(request):
                    parser.write(chunk)
            except FormParserError:
                raise Problem(400, "expected a form, found something else.") from None
            if not writer.is_whole:
                raise Problem(400, "the form is cut: its end is missing.")
        except BaseException as error:
            remove(form.file)
            raise _no_room(error) or error from None
        finally:
            writer.close()
        return form

    async def file(self, request: Request) -> Path:
        """A body as a file, which the caller removes.

        Raises:
            Problem: too large or too slow.
        """
        path = self._path()
        try:
            with path.open("xb") as file:
                async for chunk in self.chunks(request):
                    file.write(chunk)
        except BaseException as error:
            remove(path)
            raise _no_room(error) or error from None
        return path

    async def json(self, request: Request, most: int = 16 << 20) -> Any:
        """A body of JSON.

        Raises:
            Problem: too large, too slow, or no JSON.
        """
        body = bytearray()
        async for chunk in self.chunks(request, most):
            body += chunk
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Problem(400, "expected JSON, found something else.") from None

    async def chunks(self, request: Request, most: int | None = None) -> AsyncIterator[bytes]:
        """The parts of a body as they come.

        Raises:
            Problem: too large or too slow.
            ClientDisconnect: the client has left.
        """
        most = min(self._most, most or self._most)
        too_large = Problem(413, f"expected {most / 1e6:g} MB at most.", code="too_large")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        started, size = time.monotonic(), 0
        stream = request.stream()
        while True:
            try:
                chunk = await asyncio.wait_for(anext(stream), _CHUNK_S)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Problem(408, "the request came too slowly.") from None
            size += len(chunk)
            if size > most:
                raise too_large
            if size < _LEAST_RATE * (time.monotonic() - started - _PATIENCE_S):
                raise Problem(408, "the request came too slowly.")
            if chunk:
                yield chunk

    def _path(self) -> Path:
        return self.folder / f"{next(self._numbers)}{UPLOAD}"


class _FormWriter:
    """Takes the parts of a form: the first file goes to disk, other fields to memory."""

    def __init__(self, form: Form, path: Path):
        self._form, self._path = form, path
        self._file: IO[bytes] | None = None
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[str, str] = {}
        self._name = ""
        self._is_file = False
        self._count = 0
        self.is_whole = False

    @property
    def callbacks(self) -> Any:
        """As the parser wants them."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, a, b: self._header.extend(data[a:b]),
            "on_header_value": lambda data, a, b: self._value.extend(data[a:b]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._headers.clear()
        self._count += 1
        if self._count > _FIELDS:
            raise Problem(400, f"expected {_FIELDS} fields at most.")

    def _end_header(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = b"filename" in options
        if self._is_file and self._form.file is not None:
            raise Problem(400, "expected one file, found several.")
        if self._is_file:
            self._form.file_name = options[b"filename"].decode("utf-8", "replace")
            self._file = self._path.open("xb")
            self._form.file = self._path

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file and self._file is not None:
            self._file.write(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > _FIELD_BYTES:
            raise Problem(400, f"field {self._name:.40}: expected {_FIELD_BYTES} bytes at most.")

    def _end(self) -> None:
        if not self._is_file:
            text = self._value.decode("utf-8", "replace")
            self._form.values.setdefault(self._name, []).append(text)
            self._value.clear()

    def _finish(self) -> None:
        self.is_whole = True


def _remove_left() -> None:
    """Remove the folders of this user's servers that run no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError, Timeout):
            is_own = not hasattr(os, "geteuid") or folder.lstat().st_uid == os.geteuid()
            if is_own and (folder / _LOCK).is_file():  # not one that is being made
                with FileLock(folder / _LOCK, timeout=0):
                    shutil.rmtree(folder / "files", ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)


def _no_room(error: BaseException) -> Problem | None:
    """A disk that takes no more, as the client's problem; None for what is another one."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(503, "there is no room for uploads.", headers={"Retry-After": "60"})
    return None


def remove(path: Path | None) -> None:
    """Remove a file that was sent, if there is one."""
    if path is not None:
        path.unlink(missing_ok=True)


async def drain(request: Request) -> None:
    """Take the rest of a request that is refused, within reason: a client that is cut off while it
    sends may never see why.
    """
    size, deadline = 0, time.monotonic() + _DRAIN_S
    if "100-continue" in request.headers.get("expect", ""):
        return  # it sends nothing before it is asked to
    with suppress(ClientDisconnect, TimeoutError, StopAsyncIteration, RuntimeError):
        stream = request.stream()
        while size < _DRAINED_BYTES and (left_s := deadline - time.monotonic()) > 0:
            size += len(await asyncio.wait_for(anext(stream), left_s))


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work on a request whose body has been taken; the work is cancelled when the
    client leaves.

    Raises:
        ClientDisconnect: it has left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


class Holding:
    """An answer that holds what it needs until it has been sent, or cannot be."""

    def __init__(self, response: Response, held: AsyncExitStack):
        self._response, self._held = response, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._held:
            await self._response(scope, receive, send)
