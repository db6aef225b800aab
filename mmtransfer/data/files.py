"""Files from elsewhere, within limits: what is no regular file, too large, or JSON that is nested
without end, is refused in one line before anything is made of it.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError

MOST_JSON_BYTES = 256 << 20
"""Of a JSON file; the largest tokenizers take a tenth of it."""
_DEEPEST = 100  # objects and lists within each other


def check_regular(path: Path, *, most: int | None = None) -> int:
    """Size in bytes of what must be a regular file, or a link to one; `most` is how large it may
    be.

    Raises:
        UserError: something else (a folder, a device, a pipe that nobody may ever write into), or a
            larger one.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # a name with NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}.") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise UserError(f"{path}: expected a regular file, found {kind}.")
    if most is not None and found.st_size > most:
        raise UserError(
            f"{path}: expected at most {most >> 20} MiB, found {found.st_size >> 20} MiB."
        )
    return found.st_size


def read_text(path: Path, *, most: int, regular: bool = True) -> str:
    """A UTF-8 file of at most so many bytes; unless `regular`, it may be a pipe.

    Raises:
        UserError: no such file, a larger one, or another encoding.
    """
    if regular:
        check_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: cannot be read: {reason}.") from None
    if len(data) > most:
        raise UserError(f"{path}: expected at most {most >> 20} MiB, found more.")
    return text


def read_json(path: Path, *, most: int = MOST_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: see `read_text`; no JSON, or nested too deeply.
    """
    text = read_text(path, most=most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({json_problem(error)}).") from None


def read_object(path: Path, *, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds, all its numbers finite.

    Raises:
        UserError: see `read_json`; another value, NaN or infinity in it.
    """
    found = read_json(path, most=most)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(found).__name__}.")
    _check_values(path, found)
    return found


def json_problem(error: Exception) -> str:
    """What is wrong with JSON, without the text itself."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return str(error).split(";")[0]  # a number of thousands of digits


def _check_values(path: Path, found: dict[str, Any]) -> None:
    level: list[tuple[str, Any]] = [*found.items()]
    for _ in range(_DEEPEST):
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                below += [(f"{key}.{name}", part) for name, part in value.items()]
            elif isinstance(value, list):
                below += [(key, part) for part in value if isinstance(part, (dict, list, float))]
            elif isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path}: {key:.80}: expected a finite number, found {value}.")
        if not below:
            return
        level = below
    raise UserError(f"{path}: nested more than {_DEEPEST} levels deep.")
