"""The application on a port, until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import h11
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from mmtransfer.errors import UserError
from mmtransfer.monitoring.memory import keep_steady
from mmtransfer.server.app import create_app, open_tokens
from mmtransfer.server.options import ServerOptions
from mmtransfer.server.wyoming import Wyoming

logger = logging.getLogger(__name__)
_HEADERS_S = 10.0  # from a connection, or an answer, to the end of the next request's headers
_IDLE_S = 15  # of a connection that is kept
_STOP_S = 5  # after which answers that are still being given are broken off
_CONNECTIONS, _AGAIN_S = 500, 10
_MESSAGE_BYTES = 1 << 20
_READ_BYTES = 1 << 14  # at a time from a WebSocket
_FRAGMENTS = 1 << 12  # of one message
_PONG_S = 120.0  # it comes behind the audio that a fast client has sent
_STALLED_S = 30.0  # a client that takes nothing more


class _Protocol(H11Protocol):
    """HTTP in bounded time: a client that does not say what it wants, or does not take the answer,
    is let go, and one for whom there is no more room is asked to come again.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            self.app = _full
        self._stalled: asyncio.TimerHandle | None = None
        self._waiting = self.loop.call_later(_HEADERS_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:  # the headers are there
            self._waiting.cancel()

    def on_response_complete(self) -> None:
        self._waiting = self.loop.call_later(_HEADERS_S + _IDLE_S, self.transport.close)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(_STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()


class _WebSockets(WebSocketsSansIOProtocol):
    """WebSockets beside which others are served: parts of messages cost time, not bytes alone."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = _READ_BYTES  # asyncio takes 256 KiB, in which 40,000 frames have room

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > _FRAGMENTS and not self.close_sent:
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, f"more than {_FRAGMENTS} fragments")
            self.handle_parser_exception()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """More connections than there may be; uvicorn's own answer does not say when to come again."""
    headers = {"Retry-After": str(_AGAIN_S), "Connection": "close"}
    await PlainTextResponse("too many connections\n", 503, headers)(scope, receive, send)


class Program(uvicorn.Server):
    """A server that stops at the first signal, with the cameras' text kept, and at the second at
    once.
    """

    signal: int = 0
    """The one that stopped it."""

    def __init__(self, config: uvicorn.Config, assistants: tuple[Wyoming, socket.socket] | None):
        super().__init__(config)
        self.assistants = assistants

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.assistants is not None:
            door, bound = self.assistants
            self.servers.append(await asyncio.start_server(door.serve, sock=bound))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        app.state.server.live.end()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals of the main thread alone; in another one `should_exit` stops it."""
        loop = asyncio.get_running_loop()
        actions = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop}
        if hasattr(signal, "SIGHUP"):
            actions[signal.SIGHUP] = self._reload
        with suppress(ValueError, RuntimeError, NotImplementedError):
            for number, act in actions.items():
                loop.add_signal_handler(number, act, number)
        try:
            yield
        finally:
            with suppress(ValueError, RuntimeError, NotImplementedError):
                for number in actions:
                    loop.remove_signal_handler(number)

    def _reload(self, number: int) -> None:
        """Load the file of cameras again, beside everything else."""
        app: Any = self.config.app
        watch = app.state.server.watch

        def load() -> None:
            try:
                if watch is not None:
                    watch.reload()
            except UserError as error:
                logger.error("the cameras go on as they were: %s", error)

        asyncio.get_running_loop().run_in_executor(None, load)

    def _stop(self, number: int) -> None:
        self.force_exit = bool(self.signal)
        self.should_exit, self.signal = True, self.signal or number


def program(options: ServerOptions) -> tuple[Program, socket.socket]:
    """A server with all that it needs, and the socket that it will listen on.

    Raises:
        UserError: a port that is taken, a certificate that cannot be used, a model likewise.
    """
    keep_steady()
    open_tokens(options)  # all that takes no time is checked first
    check_certificate(options)
    with ExitStack() as opened:
        bound = opened.enter_context(_bound(options.host, options.port))
        loopback = None
        if options.wyoming is not None:
            loopback = opened.enter_context(_bound("127.0.0.1", options.wyoming))
        app = create_app(options, failed=lambda: setattr(made, "should_exit", True))
        opened.pop_all()
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws=_WebSockets,
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_STOP_S,
        ws_max_size=_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws_ping_timeout=_PONG_S,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
    )
    assistants = (Wyoming(app.state.server), loopback) if loopback is not None else None
    made = Program(config, assistants)
    return made, bound


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn should log it: not that a WebSocket was refused, which it takes for a bug."""
    return record.msg != "ASGI callable returned without completing handshake."


def serve(options: ServerOptions) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        UserError: something that cannot be used.
    """
    made, bound = program(options)
    host, port = bound.getsockname()[:2]
    scheme = "https" if options.tls_certificate else "http"
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving at %s://%s:%d", scheme, shown, port)
    if not options.is_loopback and options.tls_certificate is None:
        logger.warning(
            "tokens, text and audio cross the network in the clear: give --tls-certificate and "
            "--tls-key, or put a proxy with TLS before a loopback address"
        )
    with bound:
        asyncio.run(made.serve(sockets=[bound]))
    return 128 + made.signal if made.signal else 1


def check_certificate(options: ServerOptions) -> None:
    """Load the certificate once, so that what is wrong with it is one line.

    Raises:
        UserError: it cannot be used.
    """
    if options.tls_certificate is None:
        return
    assert options.tls_key is not None
    for path in (options.tls_certificate, options.tls_key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}.") from None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.tls_certificate, options.tls_key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{options.tls_certificate}, {options.tls_key}: expected a certificate and its key in "
            f"PEM, without a password ({reason})."
        ) from None


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before models are loaded, which takes seconds."""
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, number, _, address = found[0]
        made = socket.socket(family, kind, number)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen()
        except BaseException:
            made.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {where}: {reason}.") from None
    return made
