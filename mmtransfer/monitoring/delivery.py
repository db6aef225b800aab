"""Alerts on their way: the journal says which have arrived, and the others are sent again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from mmtransfer.monitoring.events import Delivery, Raised, SourceEnd, Transcript
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.options import MonitorOptions
from mmtransfer.monitoring.outputs.alerts import STOPPED, Channel, Mqtt, Settled, Webhook

logger = logging.getLogger(__name__)
SECRET = "MMTRANSFER_WEBHOOK_SECRET"
"""Environment variable with what a webhook's bodies are signed with."""


def open_channels(
    options: MonitorOptions, journal: Journal | None, opened: ExitStack
) -> dict[str, Channel]:
    """Where alerts go, by name; they close with `opened`.

    Raises:
        UserError: an address that cannot be used, or a library that is missing.
    """
    made: dict[str, Channel] = {}
    if options.webhook is not None:
        made["webhook"] = Webhook(
            options.webhook, secret=os.environ.get(SECRET), settled=_journalled(journal, "webhook")
        )
        opened.callback(made["webhook"].close)
    if options.mqtt is not None:
        made["mqtt"] = Mqtt(options.mqtt, settled=_journalled(journal, "mqtt"))
        opened.callback(made["mqtt"].close)
    if journal is not None:
        journal.channels = list(made)
    return made


def _journalled(journal: Journal | None, channel: str) -> Settled:
    """What writes into the journal that an alert has arrived, or why not."""

    def write(alert: Mapping[str, Any], failure: str) -> None:
        if journal is None:
            return
        segment, keyword = alert.get("segment", alert.get("id", "")), alert.get("keyword", "")
        try:
            journal.write(Delivery(alert["camera"], channel, segment, keyword, failure).line())
        except OSError as error:  # the channel's thread goes on
            logger.warning("the journal cannot be written (%s)", error.strerror)

    return write


def take_up(
    journal: Journal,
    write: Callable[[Transcript | Raised | SourceEnd], None],
    channels: Mapping[str, Channel],
) -> None:
    """Write what earlier sessions found, and where sources ended, and send again the alerts that
    were on their way when one ended.
    """
    waiting: dict[tuple[str, ...], Raised] = {}
    for record, to in journal.records():
        if isinstance(record, Delivery) and record.failure != STOPPED:
            waiting.pop((record.to, record.camera, record.segment, record.keyword), None)
        if isinstance(record, Raised):
            waiting |= {(name, record.camera, *record.key): record for name in to}
        if isinstance(record, Transcript | Raised | SourceEnd):
            write(record)
    for (name, *_), alert in waiting.items():
        if name in channels:
            channels[name].send(asdict(alert))
