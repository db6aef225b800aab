"""Short recordings around an alert, with the picture if there is one, as they came: not encoded
again.
"""

from __future__ import annotations

import io
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error

from mmtransfer.cache import make_private, open_private
from mmtransfer.monitoring.silence import Silences
from mmtransfer.monitoring.sources.cameras import file_name
from mmtransfer.speech.addresses import without_secrets
from mmtransfer.speech.audio import media_file, reach
from mmtransfer.speech.remote import open_address

logger = logging.getLogger(__name__)
AROUND_S = 5.0
"""Seconds before and after the alert."""
_RING_S = 60.0  # an alert comes after its segment (15 s at most) was cut, waited and was read
_RING_BYTES = 64 << 20
_KINDS = ("audio", "video")
_TEXT_S = 8.0  # after which what was spoken has its text, by and large


def clip_path(folder: Path, camera: str, moment: str) -> Path:
    """Where the clip of an alert goes; Matroska holds whatever a camera sends."""
    return folder / file_name(camera) / f"{file_name(moment)}.mkv"


def cut_recording(
    source: str,
    start: float,
    end: float,
    path: Path,
    silences: Silences | None = None,
    begun: float = 0.0,
) -> None:
    """Copy a stretch of a recording (seconds) into a file, from the picture before it on; silent
    where `silences` say so, in whose time the recording began at `begun`.

    Raises:
        OSError: the file cannot be read or written.
    """
    try:
        _cut_recording(source, start, end, path, silences, begun)
    except Exception as error:  # PyAV's quote the address
        raise OSError(without_secrets(str(error), source) or type(error).__name__) from None


def _cut_recording(
    source: str, start: float, end: float, path: Path, silences: Silences | None, begun: float
) -> None:
    opening = open_address if "://" in source else av.open
    name = media_file(source)
    with opening(name, options=reach(source), metadata_errors="replace") as container:
        streams = [s for s in container.streams if s.type in _KINDS]
        origin = (container.start_time or 0) / 1e6
        container.seek(int((max(0.0, start) + origin) * 1e6), backward=True)
        packets, passed = [], set()
        for packet in container.demux(streams):
            if packet.pts is None or packet.time_base is None:
                continue
            at = float(packet.pts * packet.time_base) - origin
            if at > end + 1.0:  # pictures may come out of order, and streams one after the other
                passed.add(packet.stream.index)
                if len(passed) == len(streams):
                    break
            elif at <= end:
                packets.append((at, packet))
        first = start
        for at, packet in packets:  # audio before the first picture would play against nothing
            if packet.stream.type == "video" and packet.is_keyframe:
                first = min(start, at)
                break
        chosen = [packet for at, packet in packets if at >= first - 0.05]
        _copy(path, chosen, silences, begun - origin)


def _copy(path: Path, packets: list[Any], silences: Silences | None, offset: float) -> None:
    """Packets of an open container, in their order, times counted from the first; with `offset`
    added, they are those of `silences`.
    """
    if not packets:
        raise OSError("nothing to write")
    make_private(path.parent)
    part = path.with_name(path.name + ".part")
    open_private(part, "wb").close()
    # RTP and Matroska leave out when pictures that come out of order are to be decoded.
    origin = min(float((p.pts if p.dts is None else p.dts) * p.time_base) for p in packets)
    copied: Any = str(part) if silences is None else io.BytesIO()
    try:
        with av.open(copied, "w", format="matroska") as out:
            made: dict[int, Any] = {}
            for packet in packets:
                stream = packet.stream
                if stream.index not in made:
                    made[stream.index] = out.add_stream_from_template(stream)
            for packet in packets:
                copy = av.Packet(bytes(packet))
                shift = round(origin / packet.time_base)
                copy.time_base = packet.time_base
                copy.pts = packet.pts - shift
                if packet.dts is not None:  # Matroska may leave it to the muxer
                    copy.dts = packet.dts - shift
                if packet.duration:
                    copy.duration = packet.duration
                copy.is_keyframe = packet.is_keyframe
                copy.stream = made[packet.stream.index]
                out.mux(copy)
        if silences is None:
            os.replace(part, path)
        else:
            first = origin + offset
            last = first + max(float(p.pts * p.time_base) for p in packets) - origin + 1.0
            spans = silences.spans(first, last)
            _silence(copied, part, [(a - first, b - first) for a, b in spans])
            os.replace(part, path)
            silences.note_clip(first, last, spans, lambda more: silence_clip(path, first, more))
    finally:
        part.unlink(missing_ok=True)


def silence_clip(path: Path, first: float, spans: Sequence[tuple[float, float]]) -> None:
    """Silence more of a clip that begins at `first`, if it is still there; where that cannot be
    done, it goes.
    """
    if not path.is_file():
        return
    part = path.with_name(path.name + ".part")
    try:
        open_private(part, "wb").close()
        _silence(io.BytesIO(path.read_bytes()), part, [(a - first, b - first) for a, b in spans])
        os.replace(part, path)
    except (OSError, ValueError) as error:  # PyAV's errors are such
        logger.warning("%s: removed, since it could not be silenced (%s)", path, error)
        path.unlink(missing_ok=True)
    finally:
        part.unlink(missing_ok=True)


def _silence(clip: Any, path: Path, spans: Sequence[tuple[float, float]]) -> None:
    """A clip with its sound encoded again (FLAC), silent in these spans (seconds into it)."""
    clip.seek(0)
    with av.open(clip) as container, av.open(str(path), "w", format="matroska") as out:
        made: dict[int, Any] = {}
        for stream in container.streams:
            if stream.type == "audio":
                made[stream.index] = out.add_stream("flac", rate=stream.rate, layout=stream.layout)
            else:
                made[stream.index] = out.add_stream_from_template(stream)
        convert = {
            stream.index: av.AudioResampler("s16", stream.layout, stream.rate)
            for stream in container.streams.audio
        }
        for packet in container.demux():
            stream = made[packet.stream.index]
            if packet.stream.type != "audio":
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
                continue
            frames: list[Any] = []
            with suppress(av.error.FFmpegError):  # a damaged packet; the next one may be whole
                frames = packet.decode()
            for frame in (*frames, *([None] if packet.dts is None else ())):
                for plain in convert[packet.stream.index].resample(frame):
                    out.mux(stream.encode(_silent(plain, spans)))
        for stream in made.values():
            if stream.type == "audio":
                out.mux(stream.encode(None))


def _silent(frame: Any, spans: Sequence[tuple[float, float]]) -> Any:
    """A frame of interleaved samples, silent in these spans."""
    samples, channels = frame.to_ndarray(), frame.layout.nb_channels
    for start, end in spans:
        first = max(0, math.floor((start - frame.time) * frame.sample_rate))
        last = min(frame.samples, math.ceil(min(end - frame.time, 1e6) * frame.sample_rate))
        if first < last:
            samples[:, first * channels : last * channels] = 0
    made = av.AudioFrame.from_ndarray(samples, format="s16", layout=frame.layout.name)
    made.sample_rate, made.pts, made.time_base = frame.sample_rate, frame.pts, frame.time_base
    return made


@dataclass
class _Wanted:
    path: Path
    start: float
    end: float
    done: Callable[[Path, str], None]
    silences: Silences | None

    @property
    def due(self) -> float:
        """When it is written: with silences, once the text of what was spoken last is there."""
        return self.end + (_TEXT_S if self.silences is not None else 0.0)


class Recorder:
    """Keeps the last minute of a live source as it came, and writes what is asked for.

    Packets come from the connection's thread, which writes the files as well: packets belong to
    a container that only that thread may use. What is asked for between two connections is written
    at once, of what the last one left. `want`, `align` and `close` may be called from any thread.
    """

    def __init__(self) -> None:
        self._ring: deque[tuple[float, Any]] = deque()  # with the stream's own time
        self._bytes = 0
        self._offset = 0.0
        self._wanted: list[_Wanted] = []
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None  # while there is a connection

    def begin(self) -> None:
        """A new connection, read by the calling thread."""
        with self._lock:
            self._reader = threading.current_thread()
            self._ring, self._bytes = deque(), 0

    def align(self, offset: float) -> None:
        """What is to be added to the stream's own time to get the caller's."""
        self._offset = offset

    def want(
        self,
        path: Path,
        start: float,
        end: float,
        done: Callable[[Path, str], None],
        silences: Silences | None = None,
    ) -> None:
        """Write the stretch once it has come, silent where `silences` say so; `done` gets the path,
        and why there is no file.
        """
        wanted = _Wanted(path, start, end, done, silences)
        with self._lock:
            if self._reader is not None:
                self._wanted.append(wanted)
                return
            ring, offset = self._ring, self._offset
        _write([wanted], ring, offset)

    def keep(self, packet: Any) -> None:
        """Take the next packet of the connection."""
        if packet.pts is None or not packet.size:
            return
        now, ring = float(packet.pts * packet.time_base), self._ring
        ring.append((now, packet))
        self._bytes += packet.size
        while self._bytes > _RING_BYTES or ring[0][0] < now - _RING_S:
            self._bytes -= ring.popleft()[1].size
        with self._lock:
            due = [wanted for wanted in self._wanted if wanted.due <= now + self._offset]
            self._wanted = [wanted for wanted in self._wanted if wanted not in due]
        _write(due, ring, self._offset)

    def leave(self) -> None:
        """The connection ends: write what is asked for as far as it came."""
        if self._reader is not threading.current_thread():
            return  # it hung, and another has taken its place since
        _detach(self._ring)
        with self._lock:
            due, self._wanted, self._reader = self._wanted, [], None
            ring, offset = self._ring, self._offset
        _write(due, ring, offset)

    def close(self) -> None:
        """The source has ended: what a connection that hangs has not written never will be."""
        with self._lock:
            left, self._wanted, self._reader = self._wanted, [], None
            self._ring = deque()
        for wanted in left:
            wanted.done(wanted.path, "the source ended")


def _detach(ring: deque[tuple[float, Any]]) -> None:
    """Have packets outlive their container: they get streams of one that is never written."""
    made: dict[int, Any] = {}
    try:
        never = av.open(io.BytesIO(), "w", format="matroska")
        for _, packet in ring:
            if packet.stream.index not in made:
                made[packet.stream.index] = never.add_stream_from_template(packet.stream)
            packet.stream = made[packet.stream.index]
    except (OSError, ValueError):  # of what Matroska does not hold there is no clip anyway
        ring.clear()


def _write(due: Sequence[_Wanted], ring: Iterable[tuple[float, Any]], offset: float) -> None:
    for wanted in due:
        why = ""
        try:
            stretch = _between(ring, wanted.start - offset, wanted.end - offset)
            _copy(wanted.path, stretch, wanted.silences, offset)
        except (OSError, ValueError) as error:  # PyAV's errors are such
            why = str(error) or type(error).__name__
        wanted.done(wanted.path, why)


def _between(ring: Iterable[tuple[float, Any]], start: float, end: float) -> list[Any]:
    """Packets of a stretch; its picture begins at the key frame before it."""
    first = start
    for at, packet in ring:
        if at > start:
            break
        if packet.stream.type == "video" and packet.is_keyframe:
            first = at
    chosen = [packet for at, packet in ring if first <= at <= end]
    keys = (i for i, p in enumerate(chosen) if p.stream.type == "video" and p.is_keyframe)
    key = next(keys, len(chosen))  # without a whole picture, the sound alone
    return [p for i, p in enumerate(chosen) if p.stream.type != "video" or i >= key]
