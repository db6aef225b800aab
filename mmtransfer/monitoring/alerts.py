"""Alerts to another system, without keeping the monitor waiting: a webhook with a signed body."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
SIGNATURE = "X-Mmtransfer-Signature"
"""Header with `sha256=` and the HMAC of the body, where there is a secret."""
_WAITING = 1000  # alerts kept while the other side is down; then the oldest is given up
_TIMEOUT_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S, _GIVE_UP_S = 1.0, 60.0, 600.0


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
        failed: Callable[[Mapping[str, Any], str], None] | None = None,
        timeout_s: float = _TIMEOUT_S,
        first_retry_s: float = _FIRST_RETRY_S,
        give_up_s: float = _GIVE_UP_S,
    ):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"webhook: expected an http:// or https:// address, found '{url}'.")
        self._url, self._secret, self._failed = url, secret, failed or (lambda alert, why: None)
        self._timeout_s, self._first_retry_s = timeout_s, first_retry_s
        self._give_up_s = give_up_s
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
                with urllib.request.urlopen(request, timeout=self._timeout_s):
                    return
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                error.close()
                if error.code < 500 and error.code not in (408, 429):
                    break  # the other side understood and refuses; again would be no better
            except OSError as error:
                reason = str(getattr(error, "reason", None) or error)
            if time.monotonic() + pause > deadline or self._closing.wait(pause):
                break
            pause = min(2 * pause, _LAST_RETRY_S)
        logger.warning("webhook: an alert was not delivered (%s)", reason)
        self._failed(alert, reason)
