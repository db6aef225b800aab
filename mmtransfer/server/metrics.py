"""The numbers of a server for Prometheus, beside those of its cameras."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmtransfer.monitoring.outputs.dashboard import Numbers
from mmtransfer.monitoring.stats import MonitorStats

_DOORS = {
    "/v1/audio/": "openai",
    "/v1/models": "openai",
    "/v1/listen": "deepgram",
    "/models/": "classes",
}
_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """What the doors did, counted."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "mmtransfer_requests",
            "Answers, by door and status.",
            ["door", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mmtransfer_request_seconds",
            "From a request to the end of its answer.",
            ["door"],
            buckets=_BOUNDS_S,
            registry=self._registry,
        )
        self._audio = Counter(
            "mmtransfer_request_audio_seconds",
            "Audio of clients decoded.",
            ["door"],
            registry=self._registry,
        )

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A number that is asked for when it is wanted."""
        Gauge(f"mmtransfer_{name}", help_text, registry=self._registry).set_function(value)

    def add_cameras(self, stats: MonitorStats) -> None:
        """Those of a monitor as well."""
        self._registry.register(Numbers(stats))

    def add_audio(self, door: str, seconds: float) -> None:
        """Count audio."""
        self._audio.labels(door).inc(seconds)

    def add(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        door = next((name for start, name in _DOORS.items() if path.startswith(start)), "page")
        self._answers.labels(door, str(status)).inc()
        self._seconds.labels(door).observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """Middleware that counts answers."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.add(scope["path"], status, time.monotonic() - started)
