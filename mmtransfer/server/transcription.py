"""A recording or a live stream of a client on its way through a monitor of its own, which shares
the recogniser with all others.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path

from mmtransfer.monitoring.events import Item, SourceEnd, Transcript
from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS
from mmtransfer.monitoring.memory import give_back
from mmtransfer.monitoring.monitor import Monitor
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.server.problems import Problem
from mmtransfer.server.shared import Door, LeftError, Urgency
from mmtransfer.server.streams import PushedAudio
from mmtransfer.speech.audio import LongMediaError, MediaError, recording_length_s

_NAME = "upload"
_NICE = 10  # a tenth of the share of a core that others have


class Transcription:
    """What a monitor makes of one source, in a thread; closes the door at its end.

    Example:
        async for item in Transcription(door, Camera("call", "call.wav")).items():
            print(item)
    """

    def __init__(
        self,
        door: Door,
        camera: Camera,
        *,
        live: LiveSettings | None = None,
        audio: PushedAudio | None = None,
        longest_s: float = math.inf,
    ):
        self._door, self._camera = door, camera
        self._audio = {} if audio is None else {camera.name: audio}
        if audio is not None:
            audio.is_behind = lambda: self.waiting >= BATCH_SEGMENTS
        self._monitor = Monitor(
            door, live=live, with_words=True, waiting=BATCH_SEGMENTS, longest_s=longest_s
        )
        self._loop = asyncio.get_running_loop()
        self._found: asyncio.Queue[Item | Exception | None] = asyncio.Queue()
        self._thread = threading.Thread(target=self._run, name="transcription", daemon=True)

    @property
    def seconds(self) -> float:
        """Audio that was decoded so far."""
        return self._monitor.stats.audio_s

    @property
    def waiting(self) -> int:
        """Segments that are cut and have no text yet."""
        return sum(camera.waiting for camera in self._monitor.stats.cameras.values())

    async def items(self) -> AsyncGenerator[Item, None]:
        """Everything as it comes. Who stops before the end waits for what is being decoded, and
        for nothing else.

        Raises:
            MediaError: a recording that cannot be used.
        """
        self._thread.start()
        is_over = False
        try:
            while not is_over:
                item = await self._found.get()
                is_over = item is None
                if isinstance(item, Exception):
                    raise item
                if item is not None:
                    yield item
        finally:
            self.leave()
            while not is_over:
                is_over = await self._found.get() is None

    def leave(self) -> None:
        """Nobody waits for the rest."""
        self._door.close()
        self._monitor.stop()

    def _run(self) -> None:
        if self._door.urgency == Urgency.REQUEST:
            _let_others_go_first()
        try:
            for item in self._monitor.watch([self._camera], audio=self._audio):
                self._put(item)
        except LeftError:
            pass
        except Exception as error:
            self._put(error)
        finally:
            self._put(None)
            give_back()

    def _put(self, item: Item | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._found.put_nowait, item)


def _let_others_go_first() -> None:
    """What this thread and those that it starts compute gives way to what is live: a recording is
    cut into segments as fast as a core can. On Linux alone, where threads have priorities.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class FileTranscription:
    """A recording that a client sent."""

    def __init__(self, door: Door, path: Path, *, longest_s: float):
        self._door, self._path, self._longest_s = door, path, longest_s
        self._work = Transcription(door, Camera(_NAME, str(path), live=False), longest_s=longest_s)

    @property
    def seconds(self) -> float:
        """Audio that was decoded so far."""
        return self._work.seconds

    async def lines(self) -> AsyncGenerator[Transcript, None]:
        """Its lines, each as soon as it is recognised.

        Raises:
            Problem: a recording that cannot be used, or is too long.
        """
        try:
            length_s = await asyncio.to_thread(recording_length_s, self._path)
            if length_s is not None and length_s > self._longest_s:
                raise LongMediaError("")
            async with aclosing(self._work.items()) as items:
                async for item in items:
                    if isinstance(item, Transcript):
                        yield item
                    elif isinstance(item, SourceEnd) and item.error is not None:
                        raise item.error
        except LongMediaError:
            longest = f"expected {self._longest_s:g} s of audio at most."
            raise Problem(413, longest, code="too_long") from None
        except MediaError as error:
            reason = str(error).replace(str(self._path), "file")
            raise Problem(400, reason, code="invalid_audio") from None

    async def all(self) -> list[Transcript]:
        """All its lines, as `lines`."""
        async with aclosing(self.lines()) as lines:
            return [line async for line in lines]
