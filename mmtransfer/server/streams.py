"""Live audio that a client sends piece by piece, as raw samples or as a container."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from mmtransfer.monitoring.events import Occurrence, SourceEvent
from mmtransfer.monitoring.sources.live import Block, decoded_frames
from mmtransfer.speech.audio import SAMPLE_RATE, audio_track
from mmtransfer.speech.mixing import Resampler, plain_layout

_WAITING_BYTES = 256 << 10  # that have come and are not decoded yet; then the client waits
_OPTIONS = {
    "protocol_whitelist": "crypto,data",  # what it says to open is somebody else's
    "probesize": "32768",
    "analyzeduration": "500000",  # microseconds
}
_BLOCK_S = 0.1  # at least so often raw samples are handed on
ENCODINGS = {"linear16": 2, "linear32": 4, "mulaw": 1, "alaw": 1}
"""Raw samples by the names that clients have for them, and their bytes."""


@dataclass(frozen=True)
class Raw:
    """The form of raw samples, little-endian."""

    encoding: str
    """One of `ENCODINGS`."""
    rate: int
    channels: int = 1

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of each channel."""
        return self.channels * ENCODINGS[self.encoding]

    def frame(self, data: bytes) -> Any:
        """Whole samples as a frame."""
        layout = "mono" if self.channels == 1 else f"{self.channels} channels"
        samples, kind = _linear(data, self.encoding)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), kind, layout)
        frame.sample_rate = self.rate
        return frame


def _linear(data: bytes, encoding: str) -> tuple[np.ndarray, Any]:
    """Raw bytes as integers, and PyAV's name for these; G.711 by its formulas."""
    if encoding == "linear16":
        return np.frombuffer(data, "<i2"), "s16"
    if encoding == "linear32":
        return np.frombuffer(data, "<i4"), "s32"
    codes = np.frombuffer(data, np.uint8).astype(np.int32)
    if encoding == "mulaw":
        codes = ~codes & 0xFF
        size = (((codes & 0x0F) << 3) + 0x84 << ((codes >> 4) & 7)) - 0x84
        return np.where(codes & 0x80, -size, size).astype(np.int16), "s16"
    codes ^= 0x55
    exponent, size = (codes >> 4) & 7, ((codes & 0x0F) << 4) + 8
    size = np.where(exponent > 0, (size + 0x100) << np.maximum(exponent - 1, 0), size)
    return np.where(codes & 0x80, size, -size).astype(np.int16), "s16"


class PushedAudio:
    """Takes audio from the event loop and gives it to a monitor's reader, at the monitor's pace;
    the samples' times count from 0. With `raw` the bytes are samples, else those of a container.

    It ends when the client says so or after `longest_s`.
    """

    def __init__(self, name: str, raw: Raw | None, *, longest_s: float):
        self._name, self._raw, self._longest_s = name, raw, longest_s
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._data: deque[bytes] = deque()
        self._size = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._has_ended = self._is_flushed = False
        self._stopping = threading.Event()
        self.is_behind: Callable[[], bool] = lambda: False
        """Whether the recogniser has enough to do."""
        self.seconds = 0.0
        """Audio that was decoded."""
        self.error: Exception | None = None
        """Why it could not be decoded."""

    async def put(self, data: bytes) -> None:
        """Hand on bytes; waits while too much waits. Behind the end nobody takes them."""
        with self._changed:
            if self._has_ended:
                return
            self._data.append(data)
            self._size += len(data)
            if self._size > _WAITING_BYTES:
                self._has_room.clear()
            self._changed.notify_all()
        await self._has_room.wait()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is taken."""
        return self._has_ended

    def flush(self) -> None:
        """What is being spoken is over, as far as it has been sent; the monitor hands out an event
        (`LOST`) when it has cut there. A container is cut at its next packet.
        """
        with self._changed:
            self._is_flushed = True
            self._changed.notify_all()

    def end(self) -> None:
        """No more will come."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        self._loop.call_soon_threadsafe(self._has_room.set)

    def __call__(self, stopping: threading.Event) -> Iterator[Block | SourceEvent]:
        """As a monitor takes it, in a reader's thread."""
        self._stopping = stopping
        is_joined = False
        try:
            for samples in self._blocks():
                if samples is None:  # flushed: the reader cuts here
                    yield SourceEvent(self._name, Occurrence.LOST, self.seconds)
                    is_joined = False
                    continue
                while self.is_behind() and not stopping.wait(0.02):
                    pass
                yield Block(samples, self.seconds, is_joined)
                is_joined = True
                self.seconds += len(samples) / SAMPLE_RATE
                if self.seconds > self._longest_s:
                    break
        except Exception as error:  # whatever a client sends
            self.error = error
        finally:
            self.end()

    def _blocks(self) -> Iterator[np.ndarray | None]:
        if self._raw is None:
            yield from self._container_blocks()
            return
        raw, convert, left = self._raw, Resampler(SAMPLE_RATE, None), b""
        most = max(1, round(_BLOCK_S * raw.rate)) * raw.frame_bytes
        while True:
            found = self._take(most)
            data = left + found
            whole = len(data) - len(data) % raw.frame_bytes
            left = data[whole:]
            if whole:
                yield from convert(raw.frame(data[:whole]))
            elif self._take_flush():
                yield from convert.flush()
                yield None
            elif not found:
                break
        yield from convert.flush()

    def _container_blocks(self) -> Iterator[np.ndarray | None]:
        opened: Any = av.open(self, options=_OPTIONS, metadata_errors="replace")
        with opened as container:
            if not container.streams.audio:
                raise ValueError("it has no audio track")
            for stream in container.streams.audio:
                plain_layout(stream)
            track, _ = audio_track(container)
            convert = Resampler(SAMPLE_RATE, None)
            for packet in container.demux(track):
                for frame in decoded_frames(packet):
                    yield from convert(frame)
                if self._take_flush():
                    yield None
            yield from convert.flush()

    def read(self, size: int) -> bytes:
        """Bytes of the container as they come; none at the end. As PyAV calls it."""
        return self._take(size, through_flush=True)

    def _take(self, size: int, *, through_flush: bool = False) -> bytes:
        """Bytes as they come; none at the end, or once what came before a flush is taken."""
        with self._changed:
            while not self._data:
                is_over = self._has_ended or self._stopping.is_set()
                if is_over or (self._is_flushed and not through_flush):
                    return b""
                self._changed.wait(0.2)
            data = self._data.popleft()
            if len(data) > size:
                self._data.appendleft(data[size:])
                data = data[:size]
            self._size -= len(data)
            has_room = self._size <= _WAITING_BYTES
        if has_room:
            self._loop.call_soon_threadsafe(self._has_room.set)
        return data

    def _take_flush(self) -> bool:
        with self._changed:
            is_flushed, self._is_flushed = self._is_flushed, False
            return is_flushed
