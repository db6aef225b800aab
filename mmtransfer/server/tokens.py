"""Tokens of a server: a file of names, roles and digests; nothing here needs the extra `server`."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from mmtransfer.cache import atomic_path, make_private, open_private
from mmtransfer.data.printing import printable
from mmtransfer.errors import UserError

_LONGEST_NAME = 60


class Role(IntEnum):
    """What a token may; each what those before it may."""

    VIEWER = 1
    """See and search the text of the cameras."""
    OPERATOR = 2
    """Have recordings, streams and texts processed."""
    ADMIN = 3
    """Forget, and change which cameras are watched."""


@dataclass(frozen=True)
class Token:
    """Who a token is of."""

    name: str
    role: Role
    digest: str
    """SHA-256 of the token, in hexadecimal."""


class Tokens:
    """The tokens in a file; it is read again when it changes.

    Raises:
        UserError: a file that cannot be used.
    """

    def __init__(self, path: Path):
        self._path = path
        self._state: tuple[int, int] | None = None
        self._tokens: list[Token] = []
        self.all()

    def all(self) -> Sequence[Token]:
        """All of them, by the file as it is now."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._state, self._tokens = None, []
            return self._tokens
        state = (found.st_mtime_ns, found.st_size)
        if state != self._state:
            self._tokens = self._load()
            self._state = state
        return self._tokens

    def find(self, token: str) -> Token | None:
        """Whose token that is, if it is one; takes the same time for each."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        found = [one for one in self.all() if hmac.compare_digest(one.digest, digest)]
        return found[0] if found else None

    def add(self, name: str, role: Role) -> str:
        """Make a token; it is shown this once, and not kept.

        Raises:
            UserError: a name that is taken or cannot be used.
        """
        if not name.strip() or printable(name) != name or len(name) > _LONGEST_NAME:
            raise UserError(f"name: expected 1 to {_LONGEST_NAME} characters, found {name!r:.80}.")
        if any(one.name == name for one in self.all()):
            raise UserError(f"the name '{name}' has a token already. Remove it first.")
        token = secrets.token_urlsafe(32)
        digest = hashlib.sha256(token.encode()).hexdigest()
        self._save([*self.all(), Token(name, role, digest)])
        return token

    def remove(self, name: str) -> None:
        """Make a token invalid.

        Raises:
            UserError: nobody has that name.
        """
        left = [one for one in self.all() if one.name != name]
        if len(left) == len(self.all()):
            known = ", ".join(one.name for one in left) or "none"
            raise UserError(f"no token is called '{name}'; there are: {known}.")
        self._save(left)

    def _load(self) -> list[Token]:
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            return [Token(row["name"], Role[row["role"].upper()], row["digest"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or "it holds something else"
            raise UserError(
                f"{self._path}: expected a file that `mmtransfer token` wrote ({reason})."
            ) from None

    def _save(self, tokens: Sequence[Token]) -> None:
        make_private(self._path.parent)
        rows = [
            {"name": one.name, "role": one.role.name.lower(), "digest": one.digest}
            for one in tokens
        ]
        with atomic_path(self._path) as part, open_private(part, "w", encoding="utf-8") as file:
            file.write(json.dumps(rows, indent=1) + "\n")
        self._state = None


def tokens_path() -> Path:
    """The file of this user's tokens."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "mmtransfer" / "tokens.json"
