"""Live audio over a WebSocket in the form of Deepgram's `/v1/listen`.

    client = deepgram.DeepgramClient(api_key=TOKEN, environment=...)
    with client.listen.v1.connect(model="site", encoding="linear16", sample_rate="16000") as socket:
        socket.send_media(samples)

Of its parameters `model`, `language`, `encoding`, `sample_rate`, `channels` and `interim_results`
count; `keywords` and `keyterm` become the decoder's prompt.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.datastructures import QueryParams
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from mmtransfer.data.languages import normal_language
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import Occurrence, Partial, SourceEvent, Transcript
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.server.access import Access, require
from mmtransfer.server.problems import Problem
from mmtransfer.server.shared import Urgency
from mmtransfer.server.streams import ENCODINGS, PushedAudio, Raw
from mmtransfer.server.tokens import Role
from mmtransfer.server.transcription import Transcription

if TYPE_CHECKING:
    from mmtransfer.server.app import Server

logger = logging.getLogger(__name__)
_NAME = "stream"
_SILENT_S = 12.0  # without a message of the client; Deepgram's own limit
_FINALIZED_S = 0.05  # how often it is looked whether everything has its text
_VALID_S = 2.0  # how often it is looked whether the token still is
_RATES = (8_000, 192_000)
_MOST_CHANNELS = 8


def routes(server: Server) -> list[WebSocketRoute]:
    """The end point."""

    async def listen(socket: WebSocket) -> None:
        require(socket, Role.OPERATOR)
        asked = _Asked.of(socket.query_params)
        shared = server.models.recognizer(asked.model)
        with server.streams.take():
            try:
                door = shared.open(Urgency.STREAM, language=asked.language, prompt=asked.prompt)
            except UserError as error:
                raise Problem(400, f"language: {error}") from None
            try:
                audio = PushedAudio(_NAME, asked.raw, longest_s=server.options.max_audio_s)
                live = LiveSettings(partial_s=LiveSettings.partial_s if asked.interim else math.inf)
                camera = Camera(_NAME, "websocket://client", live=True)
                work = Transcription(door, camera, live=live, audio=audio)
                await _Stream(socket, work, audio, asked.model, server.access).run()
            finally:
                door.close()
                server.metrics.add_audio("deepgram", audio.seconds)

    return [WebSocketRoute("/v1/listen", listen)]


@dataclass(frozen=True)
class _Asked:
    """What a client asks for."""

    model: str
    language: str | None
    prompt: str
    raw: Raw | None
    interim: bool

    @classmethod
    def of(cls, given: QueryParams) -> _Asked:
        """The parameters of a request.

        Raises:
            Problem: a value that cannot be used.
        """
        encoding, raw = given.get("encoding", ""), None
        if encoding in ENCODINGS:
            rate = _number(given, "sample_rate", 0, *_RATES)
            raw = Raw(encoding, rate, _number(given, "channels", 1, 1, _MOST_CHANNELS))
        elif encoding and "sample_rate" in given and encoding in ("amr-nb", "amr-wb", "g729"):
            raise Problem(
                400,
                f"encoding: expected one of {', '.join(ENCODINGS)}, or a container and no "
                f"encoding; found '{encoding}'.",
            )
        language = given.get("language")
        if language == "multi":
            language = "auto"
        elif language:
            language = normal_language(language)
            if language is None:
                raise Problem(
                    400, f"language: expected an ISO code, found '{given['language']:.40}'."
                )
        words = [*given.getlist("keywords"), *given.getlist("keyterm")]
        prompt = ", ".join(word.rpartition(":")[0] or word for word in words)
        is_interim = given.get("interim_results", "false").lower() == "true"
        return cls(given.get("model", ""), language, whole_text(prompt)[:1000], raw, is_interim)


def _number(given: QueryParams, name: str, default: int, least: int, most: int) -> int:
    text = given.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise Problem(400, f"{name}: expected {least} to {most}, found '{text:.40}'.")
    return int(text)


class _Stream:
    """One client: what it sends goes to the monitor, what that finds goes to it."""

    def __init__(
        self,
        socket: WebSocket,
        work: Transcription,
        audio: PushedAudio,
        model: str,
        access: Access,
    ):
        self._socket, self._work, self._audio, self._model = socket, work, audio, model
        self._access = access
        self._id = str(uuid.uuid4())
        self._finalized: asyncio.Task[None] | None = None
        self._close: tuple[int, str] = (1000, "")

    async def run(self) -> None:
        """Until the client closes the stream, or leaves."""
        await self._socket.accept(headers=[(b"dg-request-id", self._id.encode())])
        receiving = asyncio.create_task(self._follow())
        watching = asyncio.create_task(self._watch())
        try:
            async with aclosing(self._work.items()) as items:
                async for item in items:
                    if isinstance(item, Partial | Transcript):
                        await self._send(self._results(item))
                    elif isinstance(item, SourceEvent) and item.event == Occurrence.LOST:
                        self._finalized = asyncio.create_task(self._finalize(self._finalized))
            if self._audio.error is not None and not watching.done():
                self._close = 1008, "DATA-0000: the audio could not be decoded"
                logger.info("stream: the audio could not be decoded (%s)", self._audio.error)
            if self._finalized is not None:
                await self._finalized
            await self._send(self._metadata())
            await self._socket.close(*self._close)
        except (WebSocketDisconnect, RuntimeError):  # it has left while something was sent
            pass
        finally:
            for task in (receiving, watching, self._finalized):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task

    async def _follow(self) -> None:
        """Take what the client sends until it has left; then nobody waits for the rest."""
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._receive()
        self._work.leave()

    async def _watch(self) -> None:
        """End it when the token is not valid any more."""
        while self._access.is_valid(self._socket):
            await asyncio.sleep(_VALID_S)
        self._close = 1008, "the token is not valid any more"
        self._work.leave()

    async def _receive(self) -> None:
        while True:
            try:
                message = await asyncio.wait_for(self._socket.receive(), _SILENT_S)
            except TimeoutError:
                self._close = 1011, f"NET-0001: no audio or KeepAlive for {_SILENT_S:g} s"
                break
            if message["type"] == "websocket.disconnect":
                return
            data, text = message.get("bytes"), message.get("text")
            if data is not None:
                if not data:  # the old way to say so
                    break
                await self._audio.put(data)
                continue
            kind = _kind(text or "")
            if kind == "CloseStream":
                break
            if kind == "Finalize":
                self._audio.flush()
            elif kind != "KeepAlive":
                await self._send(
                    {
                        "type": "Error",
                        "variant": "SchemaError",
                        "description": "expected KeepAlive, Finalize, CloseStream or audio.",
                        "message": (text or "")[:200],
                    }
                )
        self._audio.end()
        while (await self._socket.receive())["type"] != "websocket.disconnect":
            pass  # what comes behind the end

    async def _finalize(self, before: asyncio.Task[None] | None) -> None:
        """Say when all that has been cut has its text, in the order in which it was asked for."""
        if before is not None:
            await before
        done = 0
        while done < 2:  # a text may still be on its way to here
            await asyncio.sleep(_FINALIZED_S)
            done = 0 if self._work.waiting else done + 1
        await self._send(
            self._message(self._audio.seconds, self._audio.seconds, "", [])
            | {
                "is_final": True,
                "speech_final": True,
                "from_finalize": True,
            }
        )

    async def _send(self, content: dict[str, Any]) -> None:
        await self._socket.send_text(json.dumps(content, ensure_ascii=False))

    def _results(self, item: Partial | Transcript) -> dict[str, Any]:
        is_final = isinstance(item, Transcript)
        words: list[dict[str, Any]] = []
        confidence = 0.0
        if isinstance(item, Transcript):
            words = [_word(word) for word in item.words or []]
            confidence = round(math.exp(min(0.0, item.avg_logprob)), 4)
        message = self._message(item.start, item.end, item.text, words, confidence)
        return message | {"is_final": is_final, "speech_final": is_final, "from_finalize": False}

    def _message(
        self, start: float, end: float, text: str, words: list[Any], confidence: float = 0.0
    ) -> dict[str, Any]:
        best = {"transcript": text, "confidence": confidence, "words": words}
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "start": round(start, 3),
            "duration": round(end - start, 3),
            "channel": {"alternatives": [best]},
            "metadata": {
                "request_id": self._id,
                "model_uuid": self._id,
                "model_info": {"name": self._model, "version": "1", "arch": "mmtransfer"},
            },
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": self._id,
            "sha256": "",
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "duration": round(self._audio.seconds, 3),
            "channels": 1,
        }


def _word(word: dict[str, Any]) -> dict[str, Any]:
    plain = "".join(c for c in word["text"].casefold() if c.isalnum() or c in "'’-")
    return {
        "word": plain or word["text"],
        "punctuated_word": word["text"],
        "start": word["start"],
        "end": word["end"],
        "confidence": word["probability"],
    }


def _kind(text: str) -> str:
    """The type of a message; none if it is no message."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return str(content.get("type", "")) if isinstance(content, dict) else ""
