"""The monitor of a site's cameras in the process of the server, on the same recognisers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from mmtransfer.config import read_yaml
from mmtransfer.data.printing import printable
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import SourceEnd, SourceEvent
from mmtransfer.monitoring.options import MonitorOptions, load_options
from mmtransfer.monitoring.session import Session
from mmtransfer.server.live import Live
from mmtransfer.server.options import ServerOptions
from mmtransfer.speech.audio import MediaError

logger = logging.getLogger(__name__)


def camera_options(options: ServerOptions) -> MonitorOptions | None:
    """What the file of cameras says. Where it names no model, it is one that is served; where it
    says nothing of how a model computes and searches, that is as for requests. None without one.

    Raises:
        UserError: a file that cannot be used.
    """
    if options.cameras is None:
        return None
    content = read_yaml(Path(options.cameras))
    shared = {name: value for name, value in options.recognizing.items() if name not in content}
    given: dict[str, object] = {"partial": True, **shared}
    if options.journal is not None:
        given["journal"] = options.journal
    if options.models and "model" not in content:
        given["model"] = next(iter(options.models.values()))
    return load_options(options.cameras, **given)


def changes(gone: Sequence[str], fresh: Sequence[str]) -> str:
    """What a reload did, in words."""
    again = [name for name in fresh if name in gone]
    new = [name for name in fresh if name not in gone]
    left = [name for name in gone if name not in fresh]
    parts = (("new", new), ("opened again", again), ("gone", left))
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
    return found or "nothing has changed"


class Watch:
    """An open session at work in a thread; what it hands out goes to all who follow. Its cameras
    can be turned off and on, and the file of cameras loaded again.
    """

    def __init__(self, session: Session, live: Live, options: ServerOptions):
        self.session, self._live, self._options = session, live, options
        self.off: set[str] = set()
        """Cameras that are not watched, by name, until they are turned on."""
        self._turning = threading.Lock()
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        """Why it ended, if it could not go on."""

    def start(self, failed: Callable[[], None]) -> None:
        """Begin; `failed` is called when it cannot go on."""

        def run() -> None:
            try:
                for item in self.session.items():
                    self._live.put(item)
                    if isinstance(item, SourceEvent):
                        line = f"{item.camera}: {item.event} {item.detail}".strip()
                        logger.info("%s", printable(line))
                    elif isinstance(item, SourceEnd) and isinstance(item.error, MediaError):
                        logger.error("%s", printable(str(item.error)))
            except Exception as error:
                logger.error("the cameras are watched no more (%s)", printable(str(error)))
                self.failure = error
                failed()

        self._thread = threading.Thread(target=run, name="cameras", daemon=True)
        self._thread.start()

    def reload(self) -> tuple[list[str], list[str]]:
        """Load the file of cameras again; returns the names of those that go and that come.

        Raises:
            UserError: it cannot be used; then all goes on as it was.
        """
        with self._turning:
            options = camera_options(self._options)
            assert options is not None
            gone, fresh = self.session.reload(options, self.off)
            logger.info("cameras reloaded: %s", changes(gone, fresh))
        return gone, fresh

    def turn(self, name: str, *, is_on: bool) -> None:
        """Watch a camera, or do so no more until it is turned on or the server is started again.

        Raises:
            UserError: there is no such camera.
        """
        with self._turning:
            names = [camera.name for camera in self.session.cameras]
            if name not in names:
                raise UserError(f"no camera is called '{name:.60}'; there are: {', '.join(names)}.")
            off = self.off - {name} if is_on else self.off | {name}
            self.session.reload(self.session.options, off)
            self.off = off

    def stop(self) -> None:
        """End soon: what has been cut is decoded within a few seconds, or stays in the spool."""
        if self._thread is not None:
            self.session.stop()
            self._thread.join()
