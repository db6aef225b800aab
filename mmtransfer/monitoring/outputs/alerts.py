"""Alerts to another system, without keeping the monitor waiting: a webhook with a signed body, or a
topic of an MQTT broker.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import queue
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from mmtransfer.data.printing import json_line
from mmtransfer.errors import UserError
from mmtransfer.speech.addresses import checked_address, host_of, public_address, without_secrets

logger = logging.getLogger(__name__)
SIGNATURE = "X-Mmtransfer-Signature"
"""Header with `sha256=` and the HMAC of the body, where there is a secret."""
_WAITING = 1000  # alerts kept while the other side is down; then the oldest is given up
_TIMEOUT_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S, _GIVE_UP_S = 1.0, 60.0, 600.0

STOPPED = "the monitor stopped first"
"""Why an alert was not delivered that can be sent again when the monitor runs again."""
Settled = Callable[[Mapping[str, Any], str], None]
"""Called with an alert that was delivered, or why it was not."""


class Channel(Protocol):
    """Where alerts go."""

    def send(self, alert: Mapping[str, Any]) -> None:
        """Put an alert in line; returns at once."""
        ...

    def close(self) -> None:
        """Give what waits a last chance; the rest has failed."""
        ...


def _check_address(url: str) -> None:
    """Refuse what is no http or https address.

    Raises:
        UserError: likewise.
    """
    import httpx2

    try:
        parts = httpx2.URL(checked_address(url))
        is_address = parts.scheme in ("http", "https") and parts.host
        if not is_address or re.search(r"\s", urlsplit(url).netloc):
            raise ValueError("no http address")
    except (ValueError, UserError, httpx2.InvalidURL):
        raise UserError(
            f"webhook: expected an address http[s]://HOST[:PORT]/PATH, found '{host_of(url)}'. "
            "Write # / ? [ in a user or password as %23 %2F %3F %5B."
        ) from None


class _Queued(ABC):
    """Alerts that wait in line for `_deliver`, which is called in a thread of its own."""

    def __init__(self, settled: Settled | None, timeout_s: float = _TIMEOUT_S):
        self._timeout_s = timeout_s
        self._settled = settled or (lambda alert, why: None)
        self._waiting: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def send(self, alert: Mapping[str, Any]) -> None:
        """Put an alert in line; returns at once."""
        self._waiting.put(alert)
        while self._waiting.qsize() > _WAITING:
            self._settled(self._waiting.get_nowait(), "the queue of alerts is full")
            self._waiting.task_done()

    def close(self, wait_s: float = 2.0) -> None:
        """Give what waits a last chance; the rest has failed."""
        deadline = time.monotonic() + wait_s
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)
        self._closing.set()
        self._thread.join(self._timeout_s + 1)
        while not self._waiting.empty():
            self._settled(self._waiting.get_nowait(), STOPPED)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                alert = self._waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            self._deliver(alert)
            self._waiting.task_done()

    @abstractmethod
    def _deliver(self, alert: Mapping[str, Any]) -> None:
        """Deliver an alert, or find that it cannot be; calls `_settled`."""


class Webhook(_Queued):
    """Posts alerts as JSON, one after the other, from a thread of its own.

    What was delivered is handed to `settled`, and what could not be within `give_up_s`, with the
    reason. A user and password in the address are sent as basic authentication.

    Raises:
        UserError: an address that is not http or https, or no address.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str | None = None,
        settled: Settled | None = None,
        timeout_s: float = _TIMEOUT_S,
        first_retry_s: float = _FIRST_RETRY_S,
        give_up_s: float = _GIVE_UP_S,
    ):
        super().__init__(settled, timeout_s)
        import httpx2

        _check_address(url)
        self._url, self._secret = url, secret
        self._first_retry_s, self._give_up_s = first_retry_s, give_up_s
        # It would log the address with every request, and what is secret in it.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        # It follows no redirects: the alert would arrive as a GET without its body.
        self._client = httpx2.Client(timeout=timeout_s)
        self._failures = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)
        self._thread.start()

    def _deliver(self, alert: Mapping[str, Any]) -> None:
        body = json_line(alert).encode()
        headers = {"Content-Type": "application/json; charset=utf-8"}
        if self._secret:
            signature = hmac.new(self._secret.encode(), body, hashlib.sha256).hexdigest()
            headers[SIGNATURE] = f"sha256={signature}"
        deadline, pause = time.monotonic() + self._give_up_s, self._first_retry_s
        while True:
            try:
                # What the other side says beside its code is not waited for.
                with self._client.stream(
                    "POST", self._url, content=body, headers=headers
                ) as answer:
                    code = answer.status_code
                if answer.is_success:
                    self._settled(alert, "")
                    return
                reason = f"HTTP {code}"
                if code < 500 and code not in (408, 429):
                    break  # the other side understood and refuses; again would be no better
            except self._failures as error:
                reason = without_secrets(str(error) or type(error).__name__, self._url)
            if time.monotonic() + pause > deadline:
                break
            if self._closing.wait(pause):
                reason = STOPPED
                break
            pause = min(2 * pause, _LAST_RETRY_S)
        logger.warning("webhook: an alert was not delivered (%s)", reason)
        self._settled(alert, reason)

    def close(self, wait_s: float = 2.0) -> None:
        """Give what waits a last chance; the rest has failed."""
        super().close(wait_s)
        self._client.close()


def mqtt_client(url: str) -> tuple[Any, str, Callable[[], None]]:
    """A client for the broker in an address, the topic there, and what makes the client connect, in
    a thread of its own and again after each failure.

    Raises:
        UserError: paho-mqtt is missing, or an address of another form.
    """
    try:
        parts = urlsplit(checked_address(url))
        port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        topic = unquote(url.partition("://")[2].partition("/")[2]).strip("/")
        host = parts.hostname or ""
        is_address = parts.scheme in ("mqtt", "mqtts") and host and topic
        if not is_address or re.search(r"\s", parts.netloc):
            raise ValueError("no address")
    except (ValueError, UserError):
        raise UserError(
            f"mqtt: expected mqtt[s]://[USER:PASSWORD@]HOST[:PORT]/TOPIC, found "
            f"'{public_address(url)}'. Write # / ? [ in a user or password as %23 %2F %3F %5B."
        ) from None
    if re.search("[+#\0]", topic):
        raise UserError(
            f"mqtt: expected a topic to publish to, found '{public_address(url)}': "
            "+ and # are wildcards."
        )
    try:
        from paho.mqtt import client as paho
        from paho.mqtt.enums import CallbackAPIVersion
    except ImportError:
        raise UserError("mqtt: needs paho-mqtt. pip install 'mmtransfer[mqtt]'") from None
    client = paho.Client(CallbackAPIVersion.VERSION2)
    if parts.username:
        password = unquote(parts.password) if parts.password else None
        client.username_pw_set(unquote(parts.username), password)
    if parts.scheme == "mqtts":
        client.tls_set()
    client.reconnect_delay_set(1, int(_LAST_RETRY_S))

    def connect() -> None:
        client.connect_async(host, port)
        client.loop_start()

    return client, topic, connect


class Mqtt(_Queued):
    """Publishes alerts as JSON to the topic in an address `mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC`
    (`mqtts` for TLS), one after the other, at least once each (quality of service 1).

    Needs paho-mqtt (`pip install 'mmtransfer[mqtt]'`), which connects by itself, and again after a
    failure. Alerts wait while the broker is away, a thousand of them at most.

    Raises:
        UserError: paho-mqtt is missing, or an address of another form.
    """

    def __init__(self, url: str, *, settled: Settled | None = None):
        self._client, self._topic, connect = mqtt_client(url)
        super().__init__(settled)
        self._answered = threading.Event()  # the broker has the one alert that is on its way
        self._client.on_publish = lambda *_: self._answered.set()
        connect()
        self._thread.start()

    def _deliver(self, alert: Mapping[str, Any]) -> None:
        # Not before the broker has taken the connection: paho would send the alert ahead of its own
        # greeting, and some brokers then neither answer nor hang up.
        while not self._client.is_connected():
            if self._closing.wait(0.05):
                self._settled(alert, STOPPED)
                return
        self._answered.clear()
        self._client.publish(self._topic, json_line(alert), qos=1)
        while not self._answered.wait(0.05):  # paho sends it again on every new connection
            if self._closing.is_set():
                self._settled(alert, STOPPED)
                return
        self._settled(alert, "")

    def close(self, wait_s: float = 2.0) -> None:
        """Give what waits a last chance; the rest has failed."""
        super().close(wait_s)
        with suppress(OSError):
            self._client.disconnect()
        self._client.loop_stop()
