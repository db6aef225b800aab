"""Alerts to another system, without keeping the monitor waiting: a webhook with a signed body, or a
topic of an MQTT broker.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
SIGNATURE = "X-Mmtransfer-Signature"
"""Header with `sha256=` and the HMAC of the body, where there is a secret."""
_WAITING = 1000  # alerts kept while the other side is down; then the oldest is given up
_TIMEOUT_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S, _GIVE_UP_S = 1.0, 60.0, 600.0

Failed = Callable[[Mapping[str, Any], str], None]
"""Called with an alert that was not delivered, and why."""


class Channel(Protocol):
    """Where alerts go."""

    def send(self, alert: Mapping[str, Any]) -> None:
        """Put an alert in line; returns at once."""
        ...

    def close(self) -> None:
        """Give what waits a last chance; the rest has failed."""
        ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without the alert, and count as delivered."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


class Webhook:
    """Posts alerts as JSON, one after the other, from a thread of its own.

    What cannot be delivered within `give_up_s` is handed to `failed`, with the reason.

    Raises:
        UserError: an address that is not http or https.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | None = None,
        failed: Failed | None = None,
        timeout_s: float = _TIMEOUT_S,
        first_retry_s: float = _FIRST_RETRY_S,
        give_up_s: float = _GIVE_UP_S,
    ):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"webhook: expected an http:// or https:// address, found '{url}'.")
        self._url, self._secret, self._failed = url, secret, failed or (lambda alert, why: None)
        self._timeout_s, self._first_retry_s = timeout_s, first_retry_s
        self._give_up_s = give_up_s
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._waiting: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def send(self, alert: Mapping[str, Any]) -> None:
        """Put an alert in line; returns at once."""
        self._waiting.put(alert)
        while self._waiting.qsize() > _WAITING:
            self._failed(self._waiting.get_nowait(), "too many alerts wait")

    def close(self, wait_s: float = 2.0) -> None:
        """Give what waits a last chance; the rest has failed."""
        deadline = time.monotonic() + wait_s
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)
        self._closing.set()
        self._thread.join(self._timeout_s + 1)
        while not self._waiting.empty():
            self._failed(self._waiting.get_nowait(), "the monitor stopped")

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                alert = self._waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            self._deliver(alert)
            self._waiting.task_done()

    def _deliver(self, alert: Mapping[str, Any]) -> None:
        body = json.dumps(alert, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json; charset=utf-8"}
        if self._secret:
            signature = hmac.new(self._secret.encode(), body, hashlib.sha256).hexdigest()
            headers[SIGNATURE] = f"sha256={signature}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        deadline, pause = time.monotonic() + self._give_up_s, self._first_retry_s
        while True:
            try:
                with self._opener.open(request, timeout=self._timeout_s):
                    return
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                error.close()
                if error.code < 500 and error.code not in (408, 429):
                    break  # the other side understood and refuses; again would be no better
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", None) or error)
            if time.monotonic() + pause > deadline or self._closing.wait(pause):
                break
            pause = min(2 * pause, _LAST_RETRY_S)
        logger.warning("webhook: an alert was not delivered (%s)", reason)
        self._failed(alert, reason)


class Mqtt:
    """Publishes alerts as JSON to the topic in an address `mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC`
    (`mqtts` for TLS), at least once each (quality of service 1).

    Needs paho-mqtt (`pip install 'mmtransfer[mqtt]'`), which connects by itself, and again after a
    failure. Alerts wait while the broker is away, a thousand of them at most.

    Raises:
        UserError: paho-mqtt is missing, or an address of another form.
    """

    def __init__(self, url: str, *, failed: Failed | None = None):
        parts = urlsplit(url)
        self._topic = parts.path.strip("/")
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or not self._topic:
            raise UserError(f"mqtt: expected mqtt://HOST/TOPIC, found '{url}'.")
        try:
            from paho.mqtt import client as paho
        except ImportError:
            raise UserError("mqtt: needs paho-mqtt. pip install 'mmtransfer[mqtt]'") from None
        self._failed = failed or (lambda alert, why: None)
        self._open: dict[int, Mapping[str, Any]] = {}  # by message, until the broker has it
        self._lock = threading.Lock()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        if parts.username:
            password = unquote(parts.password) if parts.password else None
            self._client.username_pw_set(unquote(parts.username), password)
        if parts.scheme == "mqtts":
            self._client.tls_set()
        self._client.max_queued_messages_set(_WAITING)
        self._client.reconnect_delay_set(1, int(_LAST_RETRY_S))
        self._client.on_publish = self._published
        port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        self._client.connect_async(parts.hostname, port)
        self._client.loop_start()

    def send(self, alert: Mapping[str, Any]) -> None:
        """Put an alert in line; returns at once."""
        with self._lock:  # the broker may answer before the message has been noted
            info = self._client.publish(self._topic, json.dumps(alert, ensure_ascii=False), qos=1)
            if info.rc in (0, 4):  # sent, or to be sent once connected
                self._open[info.mid] = alert
                return
        self._failed(alert, "too many alerts wait")

    def _published(self, client: Any, data: Any, message: int, *rest: Any) -> None:
        with self._lock:
            self._open.pop(message, None)

    def close(self, wait_s: float = 2.0) -> None:
        """Give what waits a last chance; the rest has failed."""
        deadline = time.monotonic() + wait_s
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(OSError):
            self._client.disconnect()
        self._client.loop_stop()
        for alert in self._open.values():
            self._failed(alert, "the broker did not take it before the monitor stopped")
