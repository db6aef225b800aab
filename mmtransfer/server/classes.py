"""Classes of texts and sounds in the form of Hugging Face's inference: `/models/NAME`.

client = huggingface_hub.InferenceClient(model="http://127.0.0.1:8080/models/news")
client.text_classification("The mayor opened the harbour.")
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmtransfer.data.printing import whole_text
from mmtransfer.server.access import require
from mmtransfer.server.problems import Problem
from mmtransfer.server.tokens import Role
from mmtransfer.server.uploads import remove, unless_left
from mmtransfer.speech.audio import MediaError, recording_length_s

if TYPE_CHECKING:
    from mmtransfer.server.app import Server

_TEXTS = 1024  # of a request
_NICE = 10  # of the thread that classifies, against those that transcribe


def routes(server: Server) -> list[Route]:
    """The end point. One thread classifies, and gives way to those that transcribe."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="classes", initializer=_give_way)

    async def classify(request: Request) -> Response:
        require(request, Role.OPERATOR)
        name = request.path_params["name"]
        with server.places.take():
            if name in server.models.sounds:
                return JSONResponse(await _sound(server, request, name, pool))
            if name in server.models.texts:
                return JSONResponse(await _texts(server, request, name, pool))
            known = ", ".join([*server.models.texts, *server.models.sounds]) or "none"
            raise Problem(404, f"no classifier '{name:.60}' is served; known: {known}.")

    return [Route("/models/{name:path}", classify, methods=["POST"])]


async def _texts(
    server: Server, request: Request, name: str, pool: ThreadPoolExecutor
) -> list[list[dict[str, Any]]]:
    asked = await server.uploads.json(request)
    inputs, most = _inputs(asked)
    given = inputs if isinstance(inputs, list) else [inputs]
    if not 1 <= len(given) <= _TEXTS:
        raise Problem(400, f"inputs: expected 1 to {_TEXTS} texts, found {len(given)}.")
    pairs = [_pair(one) for one in given]
    texts, targets = [text for text, _ in pairs], [target for _, target in pairs]
    model = server.models.texts[name]
    work = asyncio.get_running_loop().run_in_executor(pool, model.predict, texts, targets)
    found = await unless_left(request, _result(work))
    return [_ranked(one.probabilities, most) for one in found]


async def _sound(
    server: Server, request: Request, name: str, pool: ThreadPoolExecutor
) -> list[dict[str, Any]]:
    with ExitStack() as held:
        path, most = await server.uploads.file(request), None
        held.callback(remove, path)
        if request.headers.get("content-type", "").partition(";")[0] == "application/json":
            try:
                asked = await asyncio.to_thread(_json, path.read_bytes())
                inputs, most = _inputs(asked)
                path.write_bytes(base64.b64decode(inputs, validate=True))
            except (TypeError, binascii.Error):
                raise Problem(400, "inputs: expected a recording in base64.") from None
        longest_s = server.options.max_audio_s
        try:
            length_s = await asyncio.to_thread(recording_length_s, path)
            if length_s is None or length_s > longest_s:
                raise Problem(413, f"expected {longest_s:g} s of audio at most.")
            model = server.models.sounds[name]
            work = asyncio.get_running_loop().run_in_executor(pool, model.predict, [path])
            [found] = await unless_left(request, _result(work))
        except MediaError as error:
            raise Problem(400, str(error).replace(str(path), "file")) from None
        server.metrics.add_audio("classes", length_s)
    return _ranked(found.probabilities, most)


async def _result(work: asyncio.Future[Any]) -> Any:
    return await work


def _json(body: bytes) -> Any:
    import json

    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(400, "expected JSON, found something else.") from None


def _inputs(asked: Any) -> tuple[Any, int | None]:
    """The inputs of a request, and how many classes it asks for."""
    if not isinstance(asked, dict) or "inputs" not in asked:
        raise Problem(400, 'expected {"inputs": ...}.')
    parameters = asked.get("parameters") or {}
    most = parameters.get("top_k") if isinstance(parameters, dict) else "none"
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise Problem(400, "parameters.top_k: expected a number of 1 or more.")
    return asked["inputs"], most


def _pair(given: Any) -> tuple[str, str | None]:
    """A text, and what it is about where that is given beside it."""
    if isinstance(given, dict):
        text, target = given.get("text"), given.get("text_pair")
    else:
        text, target = given, None
    if not isinstance(text, str) or not isinstance(target, str | None):
        raise Problem(400, 'inputs: expected texts, or {"text": ..., "text_pair": ...}.')
    return whole_text(text), whole_text(target) if target else None


def _ranked(probabilities: dict[str, float], most: int | None) -> list[dict[str, Any]]:
    ranked = sorted(probabilities.items(), key=lambda pair: -pair[1])
    return [{"label": label, "score": score} for label, score in ranked[:most]]


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
