"""The page: live text of the cameras, and search in their journal."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import (
    Alert,
    ClassifiedSound,
    Item,
    Occurrence,
    Partial,
    Sound,
    SourceEnd,
    SourceEvent,
    Transcript,
)
from mmtransfer.monitoring.journal.files import EPOCH_S, time_of
from mmtransfer.server.access import require
from mmtransfer.server.catching_up import JournalIndex, UnreachableError
from mmtransfer.server.entries import LOUD
from mmtransfer.server.hits import NAMES, Hit
from mmtransfer.server.moments import Moment, moment
from mmtransfer.server.problems import Problem
from mmtransfer.server.tokens import Role

if TYPE_CHECKING:
    from mmtransfer.server.app import Server

_ASSETS = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "login.js": "text/javascript",
    "microphone.js": "text/javascript",
}
_EVERY_S = 2.0  # the state of cameras
_FOLLOWERS = 64
_MOMENTS = 8  # kept
_DETAILED = (Occurrence.GAP, Occurrence.SILENT, Occurrence.UNCLASSIFIED)
"""Events whose details name no file and no address."""


def routes(server: Server) -> list[Route]:
    """The page, and what it asks for."""
    return _Page(server).routes()


class _Page:
    def __init__(self, server: Server):
        self._server = server
        self._followers = 0

    def routes(self) -> list[Route]:
        """All of it."""
        return [
            Route("/", self._page),
            Route("/login", self._login_page),
            Route("/static/{name}", self._asset),
            Route("/api/live", self._live),
            Route("/api/search", self._search),
            Route("/api/names", self._names),
            Route("/api/timeline", self._timeline),
            Route("/api/moment", self._moment),
            Route("/api/audio", self._audio),
        ]

    @property
    def _index(self) -> JournalIndex:
        if self._server.indexer is None:
            raise Problem(404, "there is nothing to search: give --journal DIR or --index.")
        return self._server.indexer.index

    async def _page(self, request: Request) -> Response:
        require(request, Role.VIEWER)
        return Response(_asset("index.html"), media_type="text/html")

    async def _login_page(self, request: Request) -> Response:
        return Response(_asset("login.html"), media_type="text/html")

    async def _asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise Problem(404, "there is nothing of that name.")
        return Response(_asset(name), media_type=_ASSETS[name])

    # --- live ---------------------------------------------------------------------------------

    async def _live(self, request: Request) -> Response:
        """Server-sent events: every item, and every other second the state of the cameras."""
        require(request, Role.VIEWER)
        if self._followers >= _FOLLOWERS:
            raise Problem(503, "too many follow; come again later.", headers={"Retry-After": "10"})
        return StreamingResponse(self._events(request), media_type="text/event-stream")

    async def _events(self, request: Request) -> AsyncGenerator[str, None]:
        """Until the server stops, or the token or the session is not valid any more."""
        self._followers += 1
        try:
            with self._server.live.follow() as follower:
                missed, due = 0, 0.0
                while True:
                    left = due - time.monotonic()
                    shown = None
                    with suppress(TimeoutError):
                        item = await asyncio.wait_for(follower.next(), max(0.01, left))
                        if item is None:
                            return
                        shown = _shown(item)
                    if not self._server.access.is_valid(request):
                        return
                    if shown is not None:
                        yield _event(shown)
                    if time.monotonic() >= due:
                        due = time.monotonic() + _EVERY_S
                        yield _event({"type": "cameras", "cameras": self._cameras()})
                    if follower.missed != missed:
                        missed = follower.missed
                        yield _event({"type": "missed", "count": missed})
        finally:
            self._followers -= 1

    def _cameras(self) -> list[dict[str, Any]]:
        stats, watch = self._server.stats, self._server.watch
        gone: set[str] = set()
        if stats is not None and watch is not None:
            gone = set(stats.cameras) - {camera.name for camera in watch.session.cameras}
        return [
            {
                "name": name,
                "live": bool(one.events),
                "connected": one.is_connected,
                "off": watch is not None and name in watch.off,
                "failure": bool(one.failure),
                "lines": one.lines,
                "waiting": one.waiting,
                "dropped": one.dropped,
                "delay": round(one.delay_s(0.5), 2),
            }
            for name, one in (list(stats.cameras.items()) if stats is not None else ())
            if name not in gone
        ]

    # --- search -------------------------------------------------------------------------------

    async def _search(self, request: Request) -> Response:
        require(request, Role.VIEWER)
        asked, alert = request.query_params, request.query_params.get("alert")
        query = asked.get("q", "")
        filters: dict[str, Any] = {
            "camera": asked.getlist("camera") or None,
            "after": _number(request, "after"),
            "before": _number(request, "before"),
            "alert": True if alert == "*" else alert or False,
            "sentiment": asked.get("sentiment"),
            "sound": asked.get("sound"),
        }
        limit = int(_number(request, "limit") or 50)
        cursor, index = asked.get("cursor"), self._index
        try:
            page = await run_in_threadpool(
                lambda: index.search(query, **filters, limit=limit, cursor=cursor)
            )
        except UnreachableError:
            raise
        except UserError as error:
            raise Problem(400, str(error)) from None
        if query or any(filters.values()):
            given = {name: value for name, value in filters.items() if value}
            self._server.access.audit(request, "search", query=query, **given)
        hits = [_shown_hit(hit) for hit in page.hits]
        return JSONResponse({"hits": hits, "cursor": page.cursor})

    async def _names(self, request: Request) -> Response:
        """What there is to filter by."""
        require(request, Role.VIEWER)
        index = self._index
        names = await run_in_threadpool(lambda: {kind: index.names(kind) for kind in NAMES})
        return JSONResponse(names)

    async def _timeline(self, request: Request) -> Response:
        require(request, Role.VIEWER)
        after, before = _number(request, "after"), _number(request, "before")
        parts = int(_number(request, "parts") or 48)
        if after is None or before is None or not 0 < before - after < 400 * 86400:
            raise Problem(400, "after and before: expected a time of up to 400 days.")
        if not 1 <= parts <= 1440:
            raise Problem(400, "parts: expected 1 to 1440.")
        index = self._index
        cameras = await run_in_threadpool(lambda: index.timeline(after, before, parts))
        return JSONResponse({"cameras": cameras})

    # --- sound --------------------------------------------------------------------------------

    async def _moment(self, request: Request) -> Response:
        """What a player needs to know of the sound around a line."""
        require(request, Role.VIEWER)
        found = await self._sound(request)
        return JSONResponse({"start": found.start, "end": found.end, "peaks": found.peaks})

    async def _audio(self, request: Request) -> Response:
        """That sound, or a part of it that a player asks for."""
        require(request, Role.VIEWER)
        found = await self._sound(request)
        return _part(request, await run_in_threadpool(lambda: found.wav))

    async def _sound(self, request: Request) -> Moment:
        asked, index = request.query_params, self._index
        camera, identity = asked.get("camera", ""), asked.get("id", "")
        at = _number(request, "at") or 0.0
        hit = await run_in_threadpool(lambda: index.find(camera, identity, at))
        if hit is None:
            raise Problem(404, "there is no such line.")
        moments = self._server.moments
        if hit.key not in moments:
            moments[hit.key] = await run_in_threadpool(lambda: moment(index, hit))
            self._server.access.audit(request, "play", camera=camera, id=identity)
            while len(moments) > _MOMENTS:
                moments.popitem(last=False)
        found = moments.get(hit.key)
        if found is None:
            raise Problem(404, "no sound of this moment was kept.")
        return found


def _asset(name: str) -> bytes:
    return files("mmtransfer.server").joinpath("assets", name).read_bytes()


def _number(request: Request, name: str) -> float | None:
    """A number of the query."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Problem(400, f"{name}: expected a number, found '{text:.40}'.")
    return number


def _part(request: Request, data: bytes) -> Response:
    """A file, or the range of it that is asked for (RFC 9110, one range)."""
    headers = {"Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d{0,12})-(\d{0,12})", request.headers.get("range", ""))
    if asked is None or not (asked[1] or asked[2]):
        return Response(data, media_type="audio/wav", headers=headers)
    if asked[1]:
        first, last = int(asked[1]), int(asked[2]) if asked[2] else len(data) - 1
    else:
        first, last = max(0, len(data) - int(asked[2])), len(data) - 1
    last = min(last, len(data) - 1)
    if first > last:
        headers["Content-Range"] = f"bytes */{len(data)}"
        return Response(status_code=416, headers=headers)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    part = data[first : last + 1]
    return Response(part, 206, media_type="audio/wav", headers=headers)


# --- as the page takes it ------------------------------------------------------------------------


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _shown(item: Item) -> dict[str, Any] | None:
    """An item without files and addresses; None for one that is not shown."""
    if isinstance(item, Partial):
        return {"type": "partial", "camera": item.camera, "text": item.text}
    if isinstance(item, Transcript):
        more: dict[str, Any] = {"sentiment": item.sentiment, "alerts": []}
        return {"type": "line", "kind": "line", **_place(item, item.id, item.text), **more}
    if isinstance(item, Alert):
        more = {"sentiment": None, "alerts": [item.keyword]}
        return {"type": "alert", "kind": "alert", **_place(item, item.segment, item.text), **more}
    if isinstance(item, Sound | ClassifiedSound):
        label = item.label if isinstance(item, ClassifiedSound) else LOUD
        return {"type": "sound", "kind": "sound", **_place(item, item.id, label), "alerts": []}
    if isinstance(item, SourceEvent):
        detail = item.detail if item.event in _DETAILED else ""
        known = {"camera": item.camera, "at": item.at, "event": item.event}
        return {"type": "event", **known, "detail": detail}
    if isinstance(item, SourceEnd):
        event = "ended" if item.error is None else "broke off"
        return {"type": "event", "camera": item.camera, "at": time.time(), "event": event}
    return None


def _place(item: Any, identity: str, text: str) -> dict[str, Any]:
    today = time.mktime(time.strptime(time.strftime("%Y-%m-%d"), "%Y-%m-%d"))
    at = time_of(asdict(item), today if item.start < EPOCH_S else 0.0)
    return {"camera": item.camera, "id": identity, "at": at, "text": text}


def _shown_hit(hit: Hit) -> dict[str, Any]:
    return {
        "kind": hit.kind,
        "camera": hit.camera,
        "id": hit.id,
        "at": hit.at,
        "text": hit.text,
        "sentiment": hit.sentiment,
        "alerts": hit.alerts,
    }
