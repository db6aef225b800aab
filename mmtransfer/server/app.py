"""The application: every door and the page, on one port."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.websockets import WebSocket

from mmtransfer.errors import UserError
from mmtransfer.monitoring.session import Session
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.server import admin, classes, deepgram, openai_rest, page
from mmtransfer.server.access import Access, Guard, require
from mmtransfer.server.cameras import Watch, camera_options
from mmtransfer.server.catching_up import UnreachableError
from mmtransfer.server.home_assistant import HomeAssistant
from mmtransfer.server.indexing import Indexer, is_address
from mmtransfer.server.live import Live
from mmtransfer.server.metrics import Measured, Metrics
from mmtransfer.server.models import Models, open_models
from mmtransfer.server.moments import Moment
from mmtransfer.server.options import ServerOptions
from mmtransfer.server.places import Places
from mmtransfer.server.problems import Problem, answer
from mmtransfer.server.tokens import Role, Tokens, tokens_path
from mmtransfer.server.uploads import Uploads, drain

logger = logging.getLogger(__name__)
_AT_WORK = 8  # requests; that many fill the batches, and more would only take memory


@dataclass
class Server:
    """What doors and page share; `request.app.state.server`."""

    options: ServerOptions
    access: Access
    models: Models
    uploads: Uploads
    places: Places
    """Of requests."""
    streams: Places
    """Of live streams."""
    metrics: Metrics = field(default_factory=Metrics)
    live: Live = field(default_factory=Live)
    """What the cameras' monitor hands out: transcripts, provisional lines, alerts, events."""
    stats: MonitorStats | None = None
    """Of the cameras: who is connected, lag, drops; None without cameras."""
    watch: Watch | None = None
    """Of the cameras; None without any."""
    indexer: Indexer | None = None
    """Of the cameras' journal; None without one."""
    moments: OrderedDict[int, Moment | None] = field(default_factory=OrderedDict)
    """The last that were played, since a player asks for one several times."""


def create_app(options: ServerOptions, failed: Callable[[], None] = lambda: None) -> Starlette:
    """The application for these options, with all models loaded and the cameras' session open;
    uvicorn runs it. `failed` is called when the cameras cannot be watched any more.

    Raises:
        UserError: a model that cannot be used, an address that needs tokens and has none, or an
            index that is not there and has no journal to be made of.
    """
    tokens, watched = open_tokens(options), camera_options(options)
    journal, index = options.journal if watched is None else watched.journal, options.index
    is_file = index is not None and not is_address(index)
    if journal is None and is_file and not Path(str(index)).is_file():
        raise UserError(f"index: expected --journal DIR, or an index at {index}; found neither.")
    is_tls = options.tls_certificate is not None
    with ExitStack() as opened:
        server = Server(
            options,
            Access(tokens, audit=options.audit, is_tls=is_tls),
            open_models(options, watched),
            Uploads(options.max_upload_mb),
            Places(options.requests, _AT_WORK),
            Places(options.streams, options.streams),
        )
        opened.callback(server.access.close)
        opened.callback(server.uploads.close)
        _add_gauges(server)
        watch = home = None
        if watched is not None:
            open_speech = server.models.open_speech
            session = opened.enter_context(
                Session(watched, open_speech=open_speech, stays_open=True)
            )
            watch = server.watch = Watch(session, server.live, options)
            server.stats = session.stats
            if options.home_assistant:
                if watched.mqtt is None:
                    raise UserError(
                        f"home_assistant: expected mqtt: mqtt://HOST/TOPIC in {options.cameras}, "
                        "found none."
                    )
                home = HomeAssistant(watched.mqtt, watch)
                server.live.add(home)
                opened.callback(home.close)
            server.metrics.add_cameras(session.stats)
        if journal is not None or index is not None:
            server.indexer = Indexer(None if journal is None else Path(journal), index)
            opened.callback(server.indexer.close)

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            with closing:
                if watch is not None:
                    watch.start(failed)
                if home is not None:
                    home.start()
                yield
                if watch is not None:
                    await asyncio.to_thread(watch.stop)

        handlers: Any = {
            HTTPException: _problem,
            ClientDisconnect: _left,
            UnreachableError: _unreachable,
            Exception: _bug,
        }
        app = Starlette(
            routes=_routes(server),
            middleware=[
                Middleware(Measured, metrics=server.metrics),
                Middleware(Guard, access=server.access, is_tls=is_tls),
            ],
            exception_handlers=handlers,
            lifespan=lifespan,
        )
        closing = opened.pop_all()
    app.state.server = server
    return app


def open_tokens(options: ServerOptions) -> Tokens | None:
    """Those that are asked for; None where everybody is this machine's own user.

    Raises:
        UserError: an address that others reach, and no tokens.
    """
    if options.is_loopback and options.tokens is None:
        return None
    path = options.tokens or tokens_path()
    tokens = Tokens(path)
    if not tokens.all():
        raise UserError(
            f"{options.host}: others than this machine could connect, and {path} has no tokens. "
            "Make one with `mmtransfer token add NAME --role operator`, or use --host 127.0.0.1."
        )
    return tokens


def _routes(server: Server) -> list[BaseRoute]:
    return [
        Route("/healthz", _healthz),
        Route("/readyz", _readyz),
        Route("/metrics", _metrics),
        *server.access.routes(),
        *openai_rest.routes(server),
        *deepgram.routes(server),
        *classes.routes(server),
        *page.routes(server),
        *admin.routes(server),
    ]


def _add_gauges(server: Server) -> None:
    add, places, streams = server.metrics.gauge, server.places, server.streams
    add("places_taken", "Requests at work and waiting.", lambda: places.taken)
    add("places_refused", "Requests that found no place.", lambda: places.refused)
    add("streams", "Live streams of clients.", lambda: streams.taken)
    add(
        "batches_waiting",
        "Calls of the recognisers that wait.",
        lambda: sum(shared.waiting for shared in server.models.speech.values()),
    )


async def _healthz(request: Request) -> Response:
    """The process answers."""
    return PlainTextResponse("ok\n")


async def _readyz(request: Request) -> Response:
    """There is a place for a request."""
    places: Places = request.app.state.server.places
    if places.taken >= places.most:
        raise Problem(503, "busy", headers={"Retry-After": str(places.retry_s)})
    return PlainTextResponse("ready\n")


async def _metrics(request: Request) -> Response:
    require(request, Role.VIEWER)
    text = request.app.state.server.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _problem(request: HTTPConnection, problem: Exception) -> Response | None:
    assert isinstance(problem, HTTPException)
    made = answer(request.url.path, problem)
    if isinstance(request, WebSocket):
        await request.send_denial_response(made)
        return None
    assert isinstance(request, Request)
    if problem.status_code != 408:  # it would be waited for again
        await drain(request)
    return made


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody gets it; the metrics count it


async def _unreachable(request: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    problem = Problem(503, "the index cannot be reached; come again later.")
    return answer(request.url.path, problem)


async def _bug(request: Request, error: Exception) -> Response:
    """What nobody expected; the log has it."""
    return answer(request.url.path, Problem(500, "something went wrong; the server's log has it."))
