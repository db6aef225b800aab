"""What goes wrong, in the form that the clients of each door know; never a path of this machine."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OF_OPENAI = ("/v1/audio", "/v1/models")
_OF_DEEPGRAM = "/v1/listen"


class Problem(HTTPException):
    """A request that cannot be answered, with a word for programs beside the line for people."""

    def __init__(
        self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None
    ):
        super().__init__(status, message, dict(headers or {}))
        self.code = code


def answer(path: str, problem: HTTPException) -> JSONResponse:
    """A problem as an answer of the door at that path."""
    status, message = problem.status_code, problem.detail
    code = getattr(problem, "code", "") or None
    content: dict[str, object]
    if path.startswith(_OF_OPENAI):
        kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    elif path.startswith(_OF_DEEPGRAM):
        content = {"err_code": (code or "BAD_REQUEST").upper(), "err_msg": message}
    else:
        content = {"error": message}
    return JSONResponse(content, status, problem.headers)
