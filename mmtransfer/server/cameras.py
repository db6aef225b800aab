"""The monitor of a site's cameras in the process of the server, on the same recognisers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from mmtransfer.config import read_yaml
from mmtransfer.data.printing import printable
from mmtransfer.monitoring.events import SourceEnd, SourceEvent
from mmtransfer.monitoring.options import MonitorOptions, load_options
from mmtransfer.monitoring.session import Session
from mmtransfer.server.live import Live
from mmtransfer.server.options import ServerOptions

logger = logging.getLogger(__name__)


def camera_options(options: ServerOptions) -> MonitorOptions | None:
    """What the file of cameras says, with a model that is served where it names none; None without
    one.

    Raises:
        UserError: a file that cannot be used.
    """
    if options.cameras is None:
        return None
    given: dict[str, object] = {"partial": True}
    if options.journal is not None:
        given["journal"] = options.journal
    if options.models and "model" not in read_yaml(Path(options.cameras)):
        given["model"] = next(iter(options.models.values()))
    return load_options(options.cameras, **given)


class Watch:
    """An open session at work in a thread; what it hands out goes to all who follow."""

    def __init__(self, session: Session, live: Live):
        self._session, self._live = session, live
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        """Why it ended, if it could not go on."""

    def start(self, failed: Callable[[], None]) -> None:
        """Begin; `failed` is called when it cannot go on."""

        def run() -> None:
            try:
                for item in self._session.items():
                    self._live.put(item)
                    if isinstance(item, SourceEvent):
                        line = f"{item.camera}: {item.event} {item.detail}".strip()
                        logger.info("%s", printable(line))
                    elif isinstance(item, SourceEnd) and item.error is not None:
                        logger.error("%s", printable(str(item.error)))
            except Exception as error:
                logger.error("the cameras are watched no more (%s)", printable(str(error)))
                self.failure = error
                failed()

        self._thread = threading.Thread(target=run, name="cameras", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End soon: what has been cut is decoded within a few seconds, or stays in the spool."""
        if self._thread is not None:
            self._session.stop()
            self._thread.join()
