"""The application: every door and the page, on one port."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.server.live import Live
from mmtransfer.server.options import ServerOptions


@dataclass
class Server:
    """What doors and page share; `request.app.state.server`."""

    options: ServerOptions
    live: Live = field(default_factory=Live)
    """What the cameras' monitor hands out: transcripts, provisional lines, alerts, events."""
    stats: MonitorStats | None = None
    """Of the cameras: who is connected, lag, drops; None without cameras."""


def create_app(options: ServerOptions) -> Starlette:
    """The application for these options; uvicorn runs it, tests call it."""
    server = Server(options)
    routes: list[BaseRoute] = [Route("/healthz", _healthz)]
    if find_spec("mmtransfer.server.page"):
        from mmtransfer.server import page

        routes += page.routes(server)
    app = Starlette(routes=routes)
    app.state.server = server
    return app


async def _healthz(request: Request) -> Response:
    return PlainTextResponse("ok\n")
