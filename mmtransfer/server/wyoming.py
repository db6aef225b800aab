"""The Wyoming protocol of voice assistants over TCP: describe, transcribe, audio, transcript.

An event is a line of JSON, followed by as many bytes of more JSON and of payload as it says. The
protocol knows no tokens, so it is spoken on loopback alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmtransfer import __version__
from mmtransfer.data.languages import normal_language
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import Transcript
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.server.problems import Problem
from mmtransfer.server.shared import Door, Urgency
from mmtransfer.server.streams import PushedAudio, Raw
from mmtransfer.server.transcription import Transcription

if TYPE_CHECKING:
    from mmtransfer.server.app import Server

logger = logging.getLogger(__name__)
_NAME = "stream"
_LINE_BYTES, _PAYLOAD_BYTES = 64 << 10, 1 << 20
_IDLE_S = 300.0  # an assistant keeps its connection
_AUDIO_S = 12.0  # between two pieces of audio
_SKIP_S = 60.0  # of audio for which there is no text
_WIDTHS = {2: "linear16", 4: "linear32"}
_RATES, _MOST_CHANNELS = range(8_000, 192_001), 8
_CONNECTIONS = 64
_ENDS = (
    *(OSError, TimeoutError, asyncio.IncompleteReadError),
    *(ValueError, RecursionError, asyncio.LimitOverrunError),  # no event
)
"""What ends a connection."""


@dataclass
class _Event:
    type: str
    data: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""


class Wyoming:
    """The door for assistants; each connection is served by `serve`."""

    def __init__(self, server: Server):
        self._server = server
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the events of a connection until it is closed or idle, or sends something else."""
        self._open += 1
        try:
            if self._open <= _CONNECTIONS:
                await self._converse(reader, writer)
        except _ENDS as error:
            logger.debug("wyoming: a connection ended (%s)", error)
        finally:
            self._open -= 1
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked: dict[str, Any] = {}
        while True:
            event = await _next(reader, _IDLE_S)
            if event.type == "describe":
                await _send(writer, _Event("info", self._info()))
            elif event.type == "ping":
                await _send(writer, _Event("pong", {"text": event.data.get("text")}))
            elif event.type == "transcribe":
                asked = event.data
            elif event.type == "audio-start":
                try:
                    found, is_whole = await self._transcribe(asked, event.data, reader)
                    await _send(writer, _Event("transcript", found))
                    if not is_whole:
                        await _skip(reader)
                except Problem as problem:
                    code = problem.code or str(problem.status_code)
                    await _send(writer, _Event("error", {"text": problem.detail, "code": code}))
                    await _skip(reader)
                asked = {}

    async def _transcribe(
        self, asked: dict[str, Any], form: dict[str, Any], reader: asyncio.StreamReader
    ) -> tuple[dict[str, Any], bool]:
        """The text of the audio that follows with its language, and whether that is all of it; not
        where it is longer than may be.

        Raises:
            Problem: a form, a model or a language that cannot be used, or no place.
        """
        raw, server = _raw(form), self._server
        with server.streams.take():
            door = self._door(asked)
            audio = PushedAudio(_NAME, raw, longest_s=server.options.max_audio_s)
            live = LiveSettings(partial_s=math.inf)
            camera = Camera(_NAME, "wyoming://client", live=True)
            work = Transcription(door, camera, live=live, audio=audio)
            lines: list[Transcript] = []
            feeding = asyncio.create_task(_feed(reader, audio))
            try:
                async with aclosing(_lines(work)) as found:
                    async for line in found:
                        lines.append(line)
                is_whole = await feeding
            finally:
                work.leave()
                feeding.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await feeding
                server.metrics.add_audio("wyoming", audio.seconds)
        languages = [line.language for line in lines if line.language]
        text = {"text": " ".join(line.text for line in lines)}
        return text | ({"language": languages[0]} if languages else {}), is_whole

    def _door(self, asked: dict[str, Any]) -> Door:
        shared = self._server.models.recognizer(str(asked.get("name") or ""))
        language = asked.get("language")
        if language is not None:
            language = normal_language(str(language))
            if language is None:
                raise Problem(400, "language: expected an ISO code.")
        try:
            return shared.open(Urgency.STREAM, language=language)
        except UserError as error:
            raise Problem(400, f"language: {error}") from None

    def _info(self) -> dict[str, Any]:
        ours = {"name": "mmtransfer", "url": "https://pypi.org/project/mmtransfer/"}
        common = {"attribution": ours, "installed": True, "version": __version__}
        models = [
            {"name": name, "description": name, "languages": shared.languages, **common}
            for name, shared in self._server.models.speech.items()
        ]
        program = {"name": "mmtransfer", "description": "mmtransfer serve", "models": models}
        return {"asr": [program | common | {"requires_external_vad": True}]}


async def _lines(work: Transcription) -> AsyncGenerator[Transcript, None]:
    async with aclosing(work.items()) as items:
        async for item in items:
            if isinstance(item, Transcript):
                yield item


async def _skip(reader: asyncio.StreamReader) -> None:
    """Take the audio that belongs to nothing, within reason."""
    async with asyncio.timeout(_SKIP_S):
        while (await _next(reader, _AUDIO_S)).type != "audio-stop":
            pass


async def _feed(reader: asyncio.StreamReader, audio: PushedAudio) -> bool:
    """Hand on audio until it stops, or no more is taken; returns whether it has stopped."""
    try:
        while not audio.has_ended:
            event = await _next(reader, _AUDIO_S)
            if event.type == "audio-stop":
                return True
            if event.type == "audio-chunk":
                await audio.put(event.payload)
        return False
    finally:
        audio.end()


def _raw(form: dict[str, Any]) -> Raw:
    rate, width, channels = (form.get(name) for name in ("rate", "width", "channels"))
    is_usable = (
        rate in _RATES and width in list(_WIDTHS) and channels in range(1, _MOST_CHANNELS + 1)
    )
    if not is_usable:
        raise Problem(400, "expected audio of 8000 to 192000 Hz, width 2 or 4, 1 to 8 channels.")
    return Raw(_WIDTHS[width], int(rate), int(channels))  # type: ignore[index, arg-type]


async def _next(reader: asyncio.StreamReader, limit_s: float) -> _Event:
    """The next event.

    Raises:
        ValueError: no event, or one that is too large.
        RecursionError: one that is too deep.
        LimitOverrunError: a line that is too long.
        IncompleteReadError: the connection was closed.
        TimeoutError: nothing came.
    """
    async with asyncio.timeout(limit_s):
        line = await reader.readuntil(b"\n")
        event = json.loads(line)
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise ValueError("no event")
        data = event.get("data") or {}
        parts = []
        for name, most in (("data_length", _LINE_BYTES), ("payload_length", _PAYLOAD_BYTES)):
            length = event.get(name) or 0
            if not isinstance(length, int) or not 0 <= length <= most:
                raise ValueError(f"{name} of {length!r:.20}")
            parts.append(await reader.readexactly(length))
        more = json.loads(parts[0]) if parts[0] else {}
        if not isinstance(data, dict) or not isinstance(more, dict):
            raise ValueError("no event")
        return _Event(event["type"], data | more, parts[1])


async def _send(writer: asyncio.StreamWriter, event: _Event) -> None:
    data = json.dumps(event.data, ensure_ascii=False).encode()
    head = {"type": event.type, "version": __version__, "data_length": len(data)}
    writer.write(json.dumps(head).encode() + b"\n" + data)
    async with asyncio.timeout(_AUDIO_S):
        await writer.drain()
