"""Who may: tokens and their roles, sessions of the page, and what every answer says to browsers.

On loopback nobody needs a token unless a file of tokens is named. A token is 256 random bits, so
its SHA-256 digest is kept and nothing slower; failed tries of an address come one a second.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmtransfer.data.printing import json_line
from mmtransfer.errors import UserError
from mmtransfer.server.problems import Problem, answer
from mmtransfer.server.tokens import Role, Token, Tokens
from mmtransfer.server.uploads import drain

audit_log = logging.getLogger("mmtransfer.audit")
COOKIE = "mmtransfer_session"
"""Over TLS with `__Host-` before it, which no other host and no page without TLS can set."""
CSRF = "X-CSRF-Token"
"""Header with which a session's changes come."""
_SESSION_S = 12 * 3600.0
_SESSIONS = 1000
_TRY_S = 1.0  # a failed try of an address
_TRIES = 8  # of an address that wait; nothing more from it is looked at
_OPEN, _STATIC = {"/login", "/healthz", "/readyz"}, "/static/"
"""What is served to everybody; `/` leads them to the first."""
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self' blob:; connect-src 'self'; font-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}


@dataclass(frozen=True)
class Who:
    """Who makes a request."""

    name: str
    role: Role
    csrf: str = ""
    """Of a session of the page."""


@dataclass(frozen=True)
class _Session:
    """A browser that has shown a token."""

    token: Token
    csrf: str
    until: float

    @property
    def who(self) -> Who:
        return Who(self.token.name, self.token.role, self.csrf)


def require(connection: HTTPConnection, role: Role) -> Who:
    """Who makes a request, if they have that role or a higher one.

    Raises:
        Problem: they do not (403).
    """
    who: Who = connection.state.who
    if who.role < role:
        raise Problem(403, f"expected the role {role.name.lower()}.", code="forbidden")
    return who


class Access:
    """Decides who makes a request, and may.

    `tokens` are those that are valid, None where everybody is this machine's own user.
    """

    def __init__(self, tokens: Tokens | None, *, audit: Path | None = None, is_tls: bool = False):
        self._tokens, self._is_tls = tokens, is_tls
        self._cookie = f"__Host-{COOKIE}" if is_tls else COOKIE
        self._sessions: dict[str, _Session] = {}
        self._failing: Counter[str] = Counter()
        self._locks: dict[str, asyncio.Lock] = {}
        self._audit = None
        if audit is not None:
            number = os.open(audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self._audit = os.fdopen(number, "a", encoding="utf-8")

    def close(self) -> None:
        """Close the audit file."""
        if self._audit is not None:
            self._audit.close()

    def audit(self, connection: HTTPConnection, action: str, **details: Any) -> None:
        """Note who did what: a line of JSON."""
        who: Who | None = getattr(connection.state, "who", None)
        line = json_line(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "who": who.name if who else None,
                "from": connection.client.host if connection.client else None,
                "action": action,
                **details,
            }
        )
        if self._audit is None:
            audit_log.info("%s", line)
        else:
            self._audit.write(line + "\n")
            self._audit.flush()

    async def who(self, connection: HTTPConnection) -> Who | None:
        """Who makes a request; None without a token.

        Raises:
            Problem: a token that is not valid (401), too many of these from that address (429), or
                what a browser sends for another site (403).
        """
        self._check_origin(connection)
        if self._tokens is None:
            return Who("local", Role.ADMIN)
        host = connection.client.host if connection.client else ""
        if self._failing[host] >= _TRIES:
            raise Problem(
                429,
                "too many tries with invalid tokens; come again later.",
                code="too_many_tries",
                headers={"Retry-After": str(_TRIES)},
            )
        given = _bearer(connection)
        if given is not None:
            token = await self._by_token(host, given)
            return Who(token.name, token.role)
        return self._by_session(connection)

    def is_valid(self, connection: HTTPConnection) -> bool:
        """Whether the token or session that a stream was opened with still is, and its role."""
        if self._tokens is None:
            return True
        given = _bearer(connection)
        try:
            if given is not None:
                token = self._tokens.find(given)
            else:
                session = self._session(connection)
                token = session.token if session is not None else None
        except UserError:  # a file of tokens that cannot be used
            return False
        return token is not None and token.role == connection.state.who.role

    async def log_in(self, request: Request) -> Response:
        """Give a browser a session for a token (JSON `{"token": ...}`)."""
        server = request.app.state.server
        body = await server.uploads.json(request, 4096)
        given = body.get("token") if isinstance(body, dict) else None
        if self._tokens is None:
            return JSONResponse(_shown(request.state.who))
        host = request.client.host if request.client else ""
        token = await self._by_token(host, given if isinstance(given, str) else "")
        self._sessions.pop(request.cookies.get(self._cookie, ""), None)  # a new one takes its place
        name, until = secrets.token_urlsafe(32), time.monotonic() + _SESSION_S
        session = self._sessions[name] = _Session(token, secrets.token_urlsafe(32), until)
        if len(self._sessions) > _SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        request.state.who = session.who
        self.audit(request, "log in")
        made = JSONResponse(_shown(session.who))
        made.set_cookie(
            self._cookie,
            name,
            max_age=int(_SESSION_S),
            httponly=True,
            samesite="strict",
            secure=self._is_tls,
        )
        return made

    async def log_out(self, request: Request) -> Response:
        """End a browser's session, and have the browser forget what it showed."""
        self._sessions.pop(request.cookies.get(self._cookie, ""), None)
        self.audit(request, "log out")
        made = JSONResponse({}, headers={"Clear-Site-Data": '"cache", "storage"'})
        made.delete_cookie(self._cookie, httponly=True, samesite="strict", secure=self._is_tls)
        return made

    async def session(self, request: Request) -> Response:
        """Who the page's user is, and the token that their changes carry."""
        return JSONResponse(_shown(request.state.who))

    def routes(self) -> list[Route]:
        """The end points of sessions."""
        return [
            Route("/login", self.log_in, methods=["POST"]),
            Route("/logout", self.log_out, methods=["POST"]),
            Route("/session", self.session),
        ]

    async def _by_token(self, host: str, given: str) -> Token:
        assert self._tokens is not None
        found = self._tokens.find(given)
        if found is not None:
            return found
        self._failing[host] += 1
        try:
            async with self._locks.setdefault(host, asyncio.Lock()):
                await asyncio.sleep(_TRY_S)
        finally:
            self._failing[host] -= 1
            if not self._failing[host]:
                del self._failing[host]
                self._locks.pop(host, None)
        raise Problem(
            401,
            "the token is not valid.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _by_session(self, connection: HTTPConnection) -> Who | None:
        found = self._session(connection)
        if found is None:
            return None
        is_change = connection.scope.get("method", "GET") not in ("GET", "HEAD")
        given = connection.headers.get(CSRF, "")
        if is_change and not hmac.compare_digest(given.encode(), found.csrf.encode()):
            raise Problem(403, f"expected the session's {CSRF}.", code="csrf")
        return found.who

    def _session(self, connection: HTTPConnection) -> _Session | None:
        """The session of a browser, unless it has ended."""
        found = self._sessions.get(connection.cookies.get(self._cookie, ""))
        if self._tokens is None or found is None or found.until < time.monotonic():
            return None
        return found if found.token in self._tokens.all() else None  # it was removed

    def _check_origin(self, connection: HTTPConnection) -> None:
        """Refuse what a browser sends from another site's page, also one whose name was made to
        point here.
        """
        host, origin = connection.headers.get("host", ""), connection.headers.get("origin")
        if origin is not None and _parts(origin).netloc.lower() != host.lower():
            raise Problem(403, "expected a request of this site's own pages.", code="cross_site")
        if connection.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            is_visit = connection.headers.get("sec-fetch-mode") == "navigate"
            if not is_visit or connection.scope.get("method") != "GET":
                raise Problem(
                    403, "expected a request of this site's own pages.", code="cross_site"
                )
        if self._tokens is None:
            name = _parts(f"//{host}").hostname
            if name not in _LOCAL_NAMES:
                raise Problem(403, f"expected the host localhost, found '{host:.80}'.", code="host")


def _shown(who: Who) -> dict[str, Any]:
    return {"name": who.name, "role": who.role.name.lower(), "csrf": who.csrf}


def _parts(address: str) -> SplitResult:
    """The parts of an address; none of what is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _bearer(connection: HTTPConnection) -> str | None:
    """The token in a request; `Token` is how Deepgram's clients call it."""
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() in ("bearer", "token") else None


class Guard:
    """Middleware: nothing is answered before it is clear who asks, and every answer has the headers
    that keep browsers from doing more than the page needs.
    """

    def __init__(self, app: ASGIApp, access: Access, *, is_tls: bool = False):
        self._app, self._access = app, access
        self._headers = dict(_HEADERS)
        if is_tls:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope, receive)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            who = await self._access.who(connection)
            is_open = scope["path"] in _OPEN or scope["path"].startswith(_STATIC)
            if who is None and scope["path"] == "/" and scope["type"] == "http":
                await RedirectResponse("/login", 303)(scope, receive, with_headers)
                return
            if who is None and not is_open:
                raise Problem(
                    401,
                    "expected a token; see mmtransfer token.",
                    code="missing_token",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            connection.state.who = who
            await self._app(scope, receive, with_headers)
        except HTTPException as problem:  # of who asks; those of answers are handled further in
            await refuse(scope, receive, with_headers, problem)


async def refuse(scope: Scope, receive: Receive, send: Send, problem: HTTPException) -> None:
    """Answer with a problem, or do not accept the WebSocket."""
    if scope["type"] == "http":
        await drain(Request(scope, receive))
    made = answer(scope["path"], problem)
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get(
        "extensions", {}
    ):
        await send({"type": "websocket.close", "code": 1008, "reason": problem.detail[:100]})
        return
    await made(scope, receive, send)
