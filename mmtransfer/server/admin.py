"""What admins change on a running server: forget, load the cameras again, turn one off and on."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmtransfer.errors import UserError
from mmtransfer.monitoring.journal.forgetting import EVER, Forgotten, Rule
from mmtransfer.server.access import require
from mmtransfer.server.cameras import Watch, changes
from mmtransfer.server.forget import forget_everywhere
from mmtransfer.server.problems import Problem
from mmtransfer.server.tokens import Role

if TYPE_CHECKING:
    from mmtransfer.server.app import Server

_FIELDS = {"before", "camera", "text", "dry_run"}
_BODY_BYTES = 16 << 10


def routes(server: Server) -> list[Route]:
    """The end points; each leaves a line in the audit."""

    async def forget(request: Request) -> Response:
        """`{"before": SECONDS, "camera": NAME, "text": PHRASE, "dry_run": true}`, any of them."""
        require(request, Role.ADMIN)
        rule, is_dry = _asked(await server.uploads.json(request, _BODY_BYTES))
        try:
            found = await run_in_threadpool(lambda: _forget(server, rule, is_dry=is_dry))
        except UserError as error:
            raise _refused(server, error) from None
        server.moments.clear()
        known: dict[str, Any] = {} if rule.before == EVER else {"before": rule.before}
        if rule.camera is not None:
            known["camera"] = rule.camera
        if rule.phrase is not None:
            known["phrase"] = True  # but not which: it is to be found nowhere
        server.access.audit(request, "forget", **known, dry_run=is_dry, found=asdict(found))
        return JSONResponse(asdict(found))

    async def reload(request: Request) -> Response:
        require(request, Role.ADMIN)
        watch = _watch(server)
        try:
            gone, fresh = await run_in_threadpool(watch.reload)
        except UserError as error:
            raise _refused(server, error) from None
        server.access.audit(request, "reload", gone=gone, fresh=fresh)
        return JSONResponse({"changes": changes(gone, fresh)})

    async def turn(request: Request) -> Response:
        """`{"camera": NAME, "on": true}`."""
        require(request, Role.ADMIN)
        watch, asked = _watch(server), await server.uploads.json(request, _BODY_BYTES)
        name, is_on = (asked.get("camera"), asked.get("on")) if isinstance(asked, dict) else ("", 0)
        if not isinstance(name, str) or not isinstance(is_on, bool):
            raise Problem(400, 'expected {"camera": NAME, "on": true or false}.')
        try:
            await run_in_threadpool(lambda: watch.turn(name, is_on=is_on))
        except UserError as error:
            raise _refused(server, error) from None
        server.access.audit(request, "turn on" if is_on else "turn off", camera=name)
        return JSONResponse({"camera": name, "on": is_on})

    return [
        Route("/api/forget", forget, methods=["POST"]),
        Route("/api/reload", reload, methods=["POST"]),
        Route("/api/turn", turn, methods=["POST"]),
    ]


def _asked(given: Any) -> tuple[Rule, bool]:
    """What is to be forgotten, and whether it is only counted."""
    if not isinstance(given, dict) or set(given) - _FIELDS:
        raise Problem(400, f"expected an object with any of {', '.join(sorted(_FIELDS))}.")
    before, camera, text = given.get("before"), given.get("camera"), given.get("text")
    is_dry = given.get("dry_run", False)
    is_number = isinstance(before, int | float) and not isinstance(before, bool)
    if before is not None and not (is_number and 0 < before < EVER):
        raise Problem(400, "before: expected seconds since 1970.")
    if not isinstance(camera, str | None) or not isinstance(text, str | None):
        raise Problem(400, "camera and text: expected texts.")
    if not isinstance(is_dry, bool):
        raise Problem(400, "dry_run: expected true or false.")
    try:
        return Rule(EVER if before is None else before, camera or None, text or None), is_dry
    except UserError as error:
        raise Problem(400, str(error)) from None


def _forget(server: Server, rule: Rule, *, is_dry: bool) -> Forgotten:
    """In the journal that this server writes, or in that of a monitor that does not run."""
    if server.watch is not None:
        return server.watch.session.forget(rule, dry_run=is_dry)
    journal = server.options.journal
    if journal is None:
        raise UserError("there is no journal to forget in: give --journal DIR.")
    return forget_everywhere(journal, rule, index=server.options.index, dry_run=is_dry)


def _watch(server: Server) -> Watch:
    if server.watch is None:
        raise Problem(404, "there are no cameras: give --cameras FILE.yaml.")
    return server.watch


def _refused(server: Server, error: UserError) -> Problem:
    """Why something cannot be done now, without where files lie."""
    message = str(error)
    for path in (server.options.cameras, server.options.journal):
        for folder in (path.parent, path.parent.resolve()) if path is not None else ():
            message = message.replace(f"{folder}/", "")
    return Problem(409, message)
