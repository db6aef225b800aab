"""OpenAI's speech-to-text over REST: `/v1/audio/transcriptions` and `/v1/models`.

client = openai.OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
client.audio.transcriptions.create(model="site", file=open("gate.mp4", "rb"))
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from mmtransfer.data.languages import normal_language
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import Transcript
from mmtransfer.monitoring.outputs.sinks import VTT_HEADER, cue
from mmtransfer.server.access import require
from mmtransfer.server.problems import Problem
from mmtransfer.server.shared import Urgency
from mmtransfer.server.tokens import Role
from mmtransfer.server.transcription import FileTranscription
from mmtransfer.server.uploads import Form, Holding, remove, unless_left

if TYPE_CHECKING:
    from mmtransfer.server.app import Server

_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


def routes(server: Server) -> list[Route]:
    """The end points."""

    async def models(request: Request) -> Response:
        require(request, Role.OPERATOR)
        listed = [_model(name, server.models.created) for name in server.models.names]
        return JSONResponse({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        require(request, Role.OPERATOR)
        name = request.path_params["name"]
        if name not in server.models.names:
            raise Problem(404, f"model '{name:.60}' is not served.", code="model_not_found")
        return JSONResponse(_model(name, server.models.created))

    async def transcriptions(request: Request) -> ASGIApp:
        require(request, Role.OPERATOR)
        return await _transcriptions(server, request)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
    ]


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mmtransfer"}


async def _transcriptions(server: Server, request: Request) -> ASGIApp:
    async with AsyncExitStack() as held:
        held.enter_context(server.places.take())
        form = await server.uploads.form(request)
        held.callback(remove, form.file)
        asked = _Asked.of(form)
        if form.file is None or not form.file.stat().st_size:
            raise Problem(400, "file: expected a recording, found none.", code="missing_file")
        shared = server.models.recognizer(asked.model)
        try:
            door = shared.open(Urgency.REQUEST, language=asked.language, prompt=asked.prompt)
        except UserError as error:
            raise Problem(400, f"language: {error}") from None
        held.callback(door.close)
        work = FileTranscription(door, form.file, longest_s=server.options.max_audio_s)
        held.callback(lambda: server.metrics.add_audio("openai", work.seconds))
        await unless_left(request, held.enter_async_context(server.places.work()))
        if asked.stream:
            events = _events(work)
            held.push_async_callback(events.aclose)
            sent = StreamingResponse(events, media_type="text/event-stream")
            return Holding(sent, held.pop_all())
        lines = await unless_left(request, work.all())
        return _answer(lines, asked, work.seconds)


@dataclass(frozen=True)
class _Asked:
    """What a request asks for."""

    model: str
    language: str | None
    prompt: str
    form: str
    words: bool
    stream: bool

    @classmethod
    def of(cls, form: Form) -> _Asked:
        """The fields of a form.

        Raises:
            Problem: a value that cannot be used.
        """
        kind = form.get("response_format") or "json"
        if kind not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise Problem(400, f"response_format: expected one of {known}; found '{kind:.40}'.")
        language = form.get("language") or None
        if language is not None and normal_language(language) is None:
            raise Problem(400, f"language: expected an ISO code, found '{language:.40}'.")
        temperature = form.get("temperature") or "0"
        try:
            is_usable = 0.0 <= float(temperature) <= 1.0
        except ValueError:
            is_usable = False
        if not is_usable:
            raise Problem(400, f"temperature: expected 0 to 1, found '{temperature:.40}'.")
        asked = {
            *form.values.get("timestamp_granularities[]", []),
            *form.values.get("timestamp_granularities", []),
        }
        if asked - {"word", "segment"}:
            raise Problem(400, "timestamp_granularities: expected word or segment.")
        if asked and kind != "verbose_json":
            raise Problem(400, "timestamp_granularities: expected response_format verbose_json.")
        return cls(
            form.get("model"),
            language and normal_language(language),
            whole_text(form.get("prompt").strip()),
            kind,
            "word" in asked,
            form.get("stream").lower() in ("true", "1"),
        )


async def _events(work: FileTranscription) -> AsyncGenerator[str, None]:
    """Server-sent events: each line as it comes, then the whole."""
    texts: list[str] = []
    try:
        async with aclosing(work.lines()) as lines:
            async for line in lines:
                delta = f" {line.text}" if texts else line.text
                texts.append(line.text)
                yield _event({"type": "transcript.text.delta", "delta": delta})
    except Problem as problem:
        error = {"message": problem.detail, "type": "invalid_request_error", "code": problem.code}
        yield _event({"error": error})
        return
    yield _event({"type": "transcript.text.done", "text": " ".join(texts)})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _answer(lines: Sequence[Transcript], asked: _Asked, seconds: float) -> Response:
    text = " ".join(line.text for line in lines)
    if asked.form == "text":
        return PlainTextResponse(f"{text}\n")
    if asked.form in ("srt", "vtt"):
        is_vtt = asked.form == "vtt"
        cues = [cue(line, number, is_vtt=is_vtt) for number, line in enumerate(lines, 1)]
        return PlainTextResponse((VTT_HEADER if is_vtt else "") + "".join(cues))
    usage = {"type": "duration", "seconds": math.ceil(seconds)}
    if asked.form == "json":
        return JSONResponse({"text": text, "usage": usage})
    found = Counter(line.language for line in lines if line.language)
    language = found.most_common(1)[0][0] if found else asked.language or "en"
    content: dict[str, Any] = {
        "task": "transcribe",
        "language": language,
        "duration": round(seconds, 3),
        "text": text,
        "segments": [_segment(number, line) for number, line in enumerate(lines)],
        "usage": usage,
    }
    if asked.words:
        content["words"] = [
            {"word": word["text"], "start": word["start"], "end": word["end"]}
            for line in lines
            for word in line.words or []
        ]
    return JSONResponse(content)


def _segment(number: int, line: Transcript) -> dict[str, Any]:
    return {
        "id": number,
        "seek": round(100 * line.start),
        "start": line.start,
        "end": line.end,
        "text": line.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": line.avg_logprob,
        "compression_ratio": line.compression_ratio,
        "no_speech_prob": line.no_speech_prob,
    }
