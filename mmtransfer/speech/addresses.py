"""Addresses of streams as they may be shown: the one place that takes users, passwords and tokens
out of them. Whatever prints, names or writes down an address goes through here.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from mmtransfer.errors import UserError

HIDDEN = "***"
"""What stands in an address where a secret was."""
_ADDRESS = re.compile(r"""[a-zA-Z][a-zA-Z0-9+.-]*://\S+|[^\s'"]*:[^\s'"]+@[^\s'"]+""")
_SECRET = (
    r"(?:pass(?:word|wd|phrase)?|pwd|psw|pw|user(?:name)?|usr|login|account|token|auth\w*|secret|"
    r"(?:api|access|private|stream)?_?-?key(?:[_-]?id)?|sig(?:nature)?|credentials?|session(?:id)?|"
    r"sid|jwt|bearer|code|pin)"
)
# Some recorders want user and password in the path: /user=admin_password=x_channel=1_stream=0.sdp
_IN_PATH = re.compile(rf"(?i)(?<![a-z0-9])({_SECRET})[=:]([^&;/]*?)(?=[&;/]|_[a-z]+=|$)")
# Without a scheme, or with half of one: admin:pw@host, rtsp:/admin:pw@host
_LOOSE_USER = re.compile(r"^(?:[a-zA-Z][a-zA-Z0-9+.-]*:/*)?[^\s]*:[^\s]*@(?=[^\s@]*$)")
_PLAIN = {"channel", "subtype", "stream", "profile", "unicast", "proto", "camera", "track"}
"""Parameters that distinguish the streams of a camera."""


def public_address(source: str) -> str:
    """An address without user, password and the values of its parameters, whatever is wrong with
    it; a path as it is.
    """
    scheme, mark, rest = source.partition("://")
    if not mark:
        if _LOOSE_USER.match(source) and not os.path.lexists(source):
            return _LOOSE_USER.sub("", source)
        return source
    rest = rest[_user_end(rest) :]
    place, _, _ = rest.partition("#")
    place, query_mark, query = place.partition("?")
    host, slash, path = place.partition("/")
    shown = f"{scheme}://{host}{slash}{_without_secrets(path)}"
    if query_mark and query:
        shown += "?" + "&".join(_parameter(part) for part in re.split("[&;]", query))
    return shown


def without_secrets(text: str, *secrets: str) -> str:
    """A message in which every address is a public one; `secrets` are addresses that it may quote
    in part.
    """
    for address in secrets:
        shown = public_address(address)
        if shown != address:
            text = text.replace(address, shown)
            for secret in _secrets(address):
                text = text.replace(secret, HIDDEN)
    return _ADDRESS.sub(lambda found: public_address(found[0]), text)


def host_of(url: str) -> str:
    """Scheme and host of an address; what comes behind them may be a secret, as in a webhook's."""
    scheme, _, rest = public_address(url).partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0]}"


def checked_address(source: str) -> str:
    """The source, if it is a path, or an address with a host and a port that can be one.

    Raises:
        UserError: an address that is none.
    """
    _, mark, rest = source.partition("://")
    if not mark:
        return source
    if problem := _misplaced(rest):
        raise UserError(
            f"{public_address(source)}: not an address as it was given: a user or password in it "
            f"holds {problem}; write # / ? [ ] @ there as %23 %2F %3F %5B %5D %40."
        )
    try:
        urlsplit(source).port  # noqa: B018 - raises for what is no port
    except ValueError as error:
        # What the library quotes of it may be a part of a password.
        why = str(error) if "@" not in rest else "host and port cannot be read"
        raise UserError(f"{public_address(source)}: not an address: {why}.") from None
    return source


def _authority(rest: str) -> str:
    return re.split("[/?#]", rest, maxsplit=1)[0]


def _user_end(rest: str) -> int:
    """Where the host begins in what stands behind `://`.

    Who writes # / ? or [ into a password ends the host for every parser; what stands before the
    last @ is taken for the password then, rather too much than too little.
    """
    last = rest.rfind("@") + 1
    authority = _authority(rest)
    if not last or last <= len(authority) or _misplaced(rest):
        return last
    is_in_query = "?" in rest[:last]
    return last if ":" in authority and not is_in_query else authority.rfind("@") + 1


def _misplaced(rest: str) -> str:
    """The characters, in words, that end the host of an address before its user has ended."""
    authority = _authority(rest)
    behind = rest[len(authority) :]
    user = rest[: rest.rfind("@") + 1]
    if "@" not in behind and not re.search(r"[\[\]]", user):
        return ""
    host = authority.rpartition("@")[2]
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    name = name or host
    is_host = "." in name or name == "localhost" or name.startswith("[")
    is_port = not port or name == host or port.isdecimal()
    if "@" in behind and is_host and is_port and behind[0] == "/":
        return ""  # an @ in a path
    return " and ".join(f"'{mark}'" for mark in "#/?[]" if mark in user)


def _without_secrets(path: str) -> str:
    return _IN_PATH.sub(rf"\1={HIDDEN}", path)


def _parameter(part: str) -> str:
    name, mark, value = part.partition("=")
    if not mark:
        return HIDDEN if part else part
    is_plain = name.lower() in _PLAIN and re.fullmatch(r"[\w.]{0,16}", value)
    return f"{name}={value if is_plain else HIDDEN}"


def _secrets(address: str) -> list[str]:
    """What an address hides, longest first; nothing so short that it would be in any message."""
    rest = address.partition("://")[2]
    user = rest[: max(0, _user_end(rest) - 1)]
    found = [user, *user.split(":", 1)]
    found += [value for _, value in _IN_PATH.findall(rest)]
    found += re.findall(r"=([^&;#]*)", rest.partition("?")[2])
    return sorted({secret for secret in found if len(secret) > 3}, key=len, reverse=True)
