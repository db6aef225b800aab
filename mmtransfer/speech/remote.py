"""Recordings and streams at addresses. FFmpeg opens what an address itself holds; where that leads
on, by a redirect or a playlist, each place is looked at before anything connects to it: a
playlist of a stranger must not reach the hosts that only this machine can.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import os
import socket
import ssl
from base64 import b64encode
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import av
import av.error

from mmtransfer.errors import UserError
from mmtransfer.speech.addresses import public_address

ALLOWED = "MMTRANSFER_ALLOW_HOSTS"
"""Variable of the environment with hosts and networks that recordings elsewhere may lead to."""
_LEADING = {"hls", "dash", "concat", "sdp", "imf"}  # formats that say what else to open
_LED = (errno.EIO, errno.EINVAL)  # with which FFmpeg ends where it may not be led on
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 8
_PATIENCE_S = 30.0
_PLAYLIST = b"#EXTM3U"


def open_address(source: str, *, options: Mapping[str, str] | None = None, **more: Any) -> Any:
    """A container of PyAV on what lies at an address; `options` are FFmpeg's, `more` is for
    `av.open`.

    Redirects and playlists of segments (HLS) are followed to hosts that anybody can reach, to the
    source's own, and to those that `MMTRANSFER_ALLOW_HOSTS` names; by HTTP and HTTPS alone.

    Raises:
        UserError: it leads elsewhere.
        av.error.FFmpegError: it cannot be opened.
    """
    own = {**(options or {}), "format_whitelist": _formats(), "max_redirects": "0"}
    try:
        return av.open(source, options=own, **more)
    except av.error.FFmpegError as error:
        if error.errno not in _LED or not source.startswith(("http://", "https://")):
            raise
        follow = _Follow(source, more.get("timeout"))
        with follow.open(source) as found:
            is_playlist = found.begins_with(_PLAYLIST)
        if is_playlist:
            # Connections that it kept to itself would be none of those that `follow` opens.
            own = {**own, "format_whitelist": f"hls,{_formats()}", "http_persistent": "0"}
            return av.open(found.url, options=own, io_open=follow, **more)
        if found.url == source:
            raise
        own = {**own, "headers": f"Host: {found.host}\r\n"}
        return av.open(found.pinned, options=own, **more)


@lru_cache(maxsize=1)
def _formats() -> str:
    """The formats of FFmpeg that open nothing else."""
    return ",".join(sorted(av.formats_available - _LEADING))


class _Follow:
    """Opens what a source leads to, as `io_open` of PyAV."""

    def __init__(self, source: str, timeout: Any):
        self._source = source
        limits = timeout if isinstance(timeout, tuple) else (timeout,)
        self._timeout_s = float(limits[-1] or _PATIENCE_S)
        parts = urlsplit(source)
        try:
            self._own = set(_addresses(parts.hostname or "", parts.port or 80))
        except ValueError:  # which quotes it
            raise self._refused("not an address: host and port cannot be read") from None
        user, mark, password = parts.netloc.rpartition("@")[0].partition(":")
        given = f"{unquote(user)}:{unquote(password)}".encode()
        self._login = (parts.hostname, b64encode(given).decode()) if mark else None

    def __call__(self, url: str, flags: int, options: Mapping[str, str]) -> _Body:
        start, end = int(options.get("offset", 0)), int(options.get("end_offset", 0))
        return self.open(url, f"bytes={start}-{end - 1 if end else ''}" if start or end else "")

    def open(self, url: str, stretch: str = "") -> _Body:
        """What lies at an address, or where that leads; a stretch of it, as HTTP names those.

        Raises:
            UserError: a host or a protocol that it must not reach, or another answer than a file.
        """
        for _ in range(_MOST_REDIRECTS):
            found = self._asked(url, stretch)
            status, place = found.answer.status, found.answer.headers.get("Location")
            if status == (206 if stretch else 200):
                return found
            found.close()
            if status not in _REDIRECTS or not place:
                raise self._refused(f"{public_address(url)} answers {status}")
            url = urljoin(url, place)
        raise self._refused(f"more than {_MOST_REDIRECTS} redirects")

    def _asked(self, url: str, stretch: str) -> _Body:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or parts.scheme not in ("http", "https"):
            raise self._refused(f"leads to {public_address(url)[:200]}, expected http or https")
        is_plain = parts.scheme == "http"
        port = port or (80 if is_plain else 443)
        address = self._reachable(host, port)
        reached = socket.create_connection((str(address), port), self._timeout_s)
        if is_plain:
            connection: Any = http.client.HTTPConnection(host, port)
        else:
            connection = http.client.HTTPSConnection(host, port)
            # Certificates are taken as FFmpeg takes them: cameras sign their own.
            context = ssl._create_unverified_context()
            reached = context.wrap_socket(reached, server_hostname=host)
        connection.sock = reached
        headers = {"User-Agent": "mmtransfer", **({"Range": stretch} if stretch else {})}
        if self._login is not None and self._login[0] == host:
            headers["Authorization"] = f"Basic {self._login[1]}"
        place = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", place, headers=headers)
        return _Body(url, address, connection)

    def _reachable(self, host: str, port: int) -> Any:
        """An address of a host that may be connected to."""
        found = _addresses(host, port)
        allowed = os.environ.get(ALLOWED, "").replace(",", " ").split()
        for address in found:
            is_own = address in self._own or host in allowed or _is_in(address, allowed)
            if not is_own and (not address.is_global or address.is_multicast):
                raise self._refused(
                    f"leads to {host} ({address}), a host of this machine or its network; "
                    f"{ALLOWED}={host} allows it"
                )
        return found[0]

    def _refused(self, why: str) -> UserError:
        return UserError(f"{public_address(self._source)}: {why}.")


class _Body:
    """The bytes of an answer, as a file; `url` is where they came from."""

    def __init__(self, url: str, address: Any, connection: Any):
        self.url = url
        self._address, self._connection = address, connection
        self.answer = connection.getresponse()
        self._ahead = b""

    @property
    def host(self) -> str:
        """Host and port as HTTP names them."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def pinned(self) -> str:
        """Its address with the host that was looked at, whatever its name stands for next time;
        with its name where a certificate is for that.
        """
        parts = urlsplit(self.url)
        if parts.scheme == "https":
            return self.url
        user = "".join(parts.netloc.rpartition("@")[:2])
        number = f"[{self._address}]" if self._address.version == 6 else str(self._address)
        port = "" if parts.port is None else f":{parts.port}"
        return parts._replace(netloc=f"{user}{number}{port}").geturl()

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begins_with(self, mark: bytes) -> bool:
        """Whether its first bytes are these."""
        while len(self._ahead) < len(mark) and (more := self.answer.read1(1 << 12)):
            self._ahead += more
        return self._ahead.startswith(mark)

    def read(self, size: int) -> bytes:
        """So many bytes at most, as they come; none at the end."""
        found: bytes = self._ahead[:size] or self.answer.read1(size)
        self._ahead = self._ahead[size:]
        return found

    def close(self) -> None:
        """Let the connection go."""
        self.answer.close()
        self._connection.close()


def _addresses(host: str, port: int) -> list[Any]:
    """IP addresses of a host.

    Raises:
        OSError: it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    plain = [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
    return [getattr(address, "ipv4_mapped", None) or address for address in plain]


def _is_in(address: Any, networks: list[str]) -> bool:
    for network in networks:
        try:
            if address in ipaddress.ip_network(network, strict=False):
                return True
        except ValueError:  # the name of a host
            continue
    return False
