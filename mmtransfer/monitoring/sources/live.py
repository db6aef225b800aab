"""Cameras that never end: audio as it comes, reconnection, gaps; nothing here waits for ever.

FFmpeg is given time limits for opening and for reading, but can hang all the same (in name look-up,
or in a server that sends what is not audio). So each connection is read by a thread of its own; one
that yields no audio for too long is left behind, and a new connection is made.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
import av.error
import numpy as np

from mmtransfer.monitoring.events import Occurrence, SourceEvent
from mmtransfer.monitoring.sources.clips import Recorder
from mmtransfer.monitoring.sources.kinds import is_device
from mmtransfer.speech.addresses import public_address, without_secrets
from mmtransfer.speech.audio import SAMPLE_RATE, audio_track
from mmtransfer.speech.mixing import Resampler, plain_layout
from mmtransfer.speech.remote import open_address

logger = logging.getLogger(__name__)
_GAP_S = 2.0  # less is jitter
_DRIFT_S = 30.0  # how often the sender's clock is compared with ours
_DRIFT_STEP_S = 0.05
_AT_ONCE_S = 0.01  # what comes sooner came without pause
_BURST_S = 0.2  # how long each second may take of what FFmpeg or the server kept
_BACKLOG_S = 60.0  # a server that keeps more plays a recording
_HUNG_CONNECTIONS = 4  # threads that FFmpeg may keep before no more are made
_SAY_LENGTH = ("http", "rtsp", "rtmp")  # beginnings of schemes; what has a length ends
_BLOCKS_AHEAD = 64  # decoded blocks that wait for the segmenter
_OPTIONS = {
    "rtsp_transport": "tcp",  # UDP loses packets silently
    "analyzeduration": "1000000",  # microseconds; FFmpeg's own 5 s delay the first words
}


@dataclass(frozen=True)
class Block:
    """Consecutive audio."""

    samples: np.ndarray
    """Float32 at 16 kHz."""
    at: float
    """Seconds since 1970 of the first sample, by this machine's clock."""
    is_joined: bool
    """Whether it follows the block before without a gap."""


@dataclass(frozen=True)
class LiveSettings:
    """How patient a live source is."""

    open_s: float = 10.0
    """Longest time to connect, until audio comes."""
    read_s: float = 10.0
    """Longest time without audio in a connection."""
    first_retry_s: float = 0.5
    """Pause before the first attempt to reconnect; each next one is twice as long."""
    last_retry_s: float = 30.0
    """Longest pause between attempts."""
    report_again_s: float = 3600.0
    """Time after which repeated failures are reported again."""
    pause_s: float = 0.45
    """A pause this long ends a segment: shorter than in recordings, since somebody waits."""
    learned_end: bool = True
    """Whether, for a model that has learnt it, the head of `end_of_turn.py` decides that instead:
    sooner where the speaker is likely done, later where they are likely to go on."""
    turn_s: float = 12.0
    """Speech of a turn that goes on after which it is decoded as a whole at its next pause."""
    partial_s: float = 0.8
    """Speech after which a provisional text is made, and made again."""


class _OverError(EOFError):
    """A stream of known length has been decoded to its end."""


class SteadyClock:
    """Seconds since 1970 that never jump: the wall clock at the start, then the monotonic one."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


def read_live(
    camera: str,
    source: str,
    stopping: threading.Event,
    *,
    settings: LiveSettings | None = None,
    now: Callable[[], float] | None = None,
    recorder: Recorder | None = None,
    channel: int | None = None,
) -> Iterator[Block | SourceEvent]:
    """Audio and events of a live source, until `stopping` is set; `recorder` gets its packets, and
    with `channel` one channel alone is read, counted from 0 over all tracks.

    Every failure is an event, followed by another attempt after a pause. A gap in the audio is an
    event as well; the block behind it says that it is not joined to the one before.
    """
    settings, now = settings or LiveSettings(), now or SteadyClock()
    pause = settings.first_retry_s
    last = 0.0  # end of all audio so far; time never goes back, also if audio came faster than it
    came = 0.0  # when the last of it came
    hung: list[_Connection] = []
    reported = ("", 0.0)  # why and when it was last reported that there is no connection
    while not stopping.is_set():
        hung = [connection for connection in hung if connection.is_alive]
        if len(hung) >= _HUNG_CONNECTIONS:
            stopping.wait(pause)
            continue
        connection = _Connection(source, settings, recorder, channel)
        line: _TimeLine | None = None
        try:
            while not stopping.is_set():
                limit = settings.open_s if line is None else settings.read_s
                found = connection.next(limit, stopping)
                if found is None:
                    continue
                if isinstance(found, _OverError):
                    yield SourceEvent(
                        camera, Occurrence.LOST, now(), "the recording that it is has ended"
                    )
                    return
                if isinstance(found, Exception):
                    reason = _reason(found)
                    if reason != reported[0] or now() - reported[1] >= settings.report_again_s:
                        reported = (reason, now())
                        yield SourceEvent(camera, Occurrence.LOST, reported[1], reason)
                    break
                if line is None:
                    # FFmpeg hands over at once what it looked at to know the format, and servers
                    # what they kept. The last of it has just been spoken, not the first; what was
                    # spoken before the last connection was lost came there.
                    found, at = connection.with_what_is_there(found, now)
                    again_s = max(0.0, min(last, came) - (at - _seconds(found)))
                    found = _after(found, round(again_s * SAMPLE_RATE))
                    again = f"{again_s:.1f} s that had come before left out"
                    detail = again if again_s >= 0.05 else ""
                    yield SourceEvent(camera, Occurrence.CONNECTED, now(), detail)
                    pause, reported = settings.first_retry_s, ("", 0.0)
                    line, lost_s = _TimeLine(max(at - _seconds(found), last), now()), None
                else:
                    at = now()
                    lost_s = line.place(found, at)
                if lost_s is not None:
                    detail = f"{lost_s:.1f} s without audio"
                    yield SourceEvent(camera, Occurrence.GAP, line.position, detail)
                    line = _TimeLine(line.position + lost_s, at)
                if recorder is not None and found[1] is not None:
                    recorder.align(line.position - found[1])
                for piece in _pieces(found):
                    yield Block(piece[0], line.position, line.is_joined)
                    line.advance(piece)
                last, came = line.position, at
        finally:
            connection.leave()
            hung.append(connection)
        # A little at random, so that many cameras of one failed recorder do not return at once.
        stopping.wait(pause * random.uniform(0.8, 1.2))
        pause = min(2 * pause, settings.last_retry_s)


_Found = tuple[np.ndarray, float | None]
"""Samples, and when they are by the stream's own clock."""


def _seconds(found: _Found) -> float:
    return len(found[0]) / SAMPLE_RATE


def _after(found: _Found, cut: int) -> _Found:
    """Audio without its first samples."""
    return found[0][cut:], None if found[1] is None else found[1] + cut / SAMPLE_RATE


def _pieces(found: _Found) -> Iterator[_Found]:
    """Audio by the second, since what a server kept may be a minute."""
    for start in range(0, len(found[0]), SAMPLE_RATE):
        samples, media = _after(found, start)
        yield samples[:SAMPLE_RATE], media


class _TimeLine:
    """Where the audio of a connection lies in time.

    Samples are counted, since they come late and in bursts. Audio is missing when the stream's own
    time says so, or when for a while everything has come later than it should. The camera's clock
    is not quite as fast as ours; the count follows ours slowly.
    """

    def __init__(self, position: float, now: float):
        self.position = position
        """When the next sample is due."""
        self.is_joined = False
        """Whether audio came before it."""
        self._media: float | None = None  # what the stream's own clock should say next
        self._slack, self._looked = float("inf"), now

    def place(self, found: _Found, now: float) -> float | None:
        """Look at the next audio; returns the seconds that are missing before it, if any are."""
        late = now - _seconds(found) - self.position
        if self._media is not None and found[1] is not None:
            jump = found[1] - self._media
            if _GAP_S < jump < late + _GAP_S / 2:
                return jump
            if abs(jump) > _GAP_S:  # the camera set its clock: this has no time to be missing
                self._media = found[1]
        self._slack = min(self._slack, late)
        if now - self._looked > _DRIFT_S:
            slack, self._slack, self._looked = self._slack, float("inf"), now
            if slack > _GAP_S:
                return slack
            self.position += max(-_DRIFT_STEP_S, min(_DRIFT_STEP_S, slack))
        return None

    def advance(self, found: _Found) -> None:
        """The audio has been handed on."""
        self.position += _seconds(found)
        self.is_joined = True
        if found[1] is not None and self._media is None:
            self._media = found[1]
        if self._media is not None:
            self._media += _seconds(found)


class _Connection:
    """One connection to a source, in a thread that can be abandoned."""

    def __init__(
        self,
        source: str,
        settings: LiveSettings,
        recorder: Recorder | None,
        channel: int | None = None,
    ):
        self._source, self._settings, self._recorder = source, settings, recorder
        self._channel = channel
        self._found: queue.Queue[_Found | Exception] = queue.Queue(_BLOCKS_AHEAD)
        self._ended: Exception | None = None
        self._left = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, name=f"connection {public_address(source)}", daemon=True
        )
        self._thread.start()

    def next(self, limit_s: float, stopping: threading.Event) -> _Found | Exception | None:
        """The next audio and its time in the stream, or why there will be none; None if `stopping`
        was set meanwhile.
        """
        deadline = time.monotonic() + limit_s
        while not stopping.is_set():
            if self._ended is not None:
                return self._ended
            with suppress(queue.Empty):
                return self._found.get(timeout=0.1)
            if time.monotonic() > deadline:
                return TimeoutError(f"no audio for {limit_s:g} s")
        return None

    def with_what_is_there(self, first: _Found, now: Callable[[], float]) -> tuple[_Found, float]:
        """The first audio with all that comes at once behind it, and when the last of that came."""
        samples, seconds, at = [first[0]], _seconds(first), now()
        counted, deadline = seconds, time.monotonic() + _BURST_S
        while seconds < _BACKLOG_S and (left := deadline - time.monotonic()) > 0:
            # More than can have been spoken since it was asked for was kept by the server, and the
            # network may make pauses in that.
            is_kept = seconds > time.monotonic() - self._began
            try:
                found = self._found.get(timeout=left if is_kept else _AT_ONCE_S)
            except queue.Empty:
                break
            if isinstance(found, Exception):
                self._ended = found
                break
            samples.append(found[0])
            seconds, at = seconds + _seconds(found), now()
            if seconds - counted >= 1.0:
                counted, deadline = seconds, time.monotonic() + _BURST_S
        return (np.concatenate(samples), first[1]), at

    def leave(self) -> None:
        """Do not wait for it: a thread that hangs is left to itself."""
        self._left.set()
        self._thread.join(0.5)

    @property
    def is_alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def _put(self, item: _Found | Exception) -> None:
        while not self._left.is_set():
            with suppress(queue.Full):
                self._found.put(item, timeout=0.1)
                return

    def _run(self) -> None:
        try:
            has_length = self._read()
            self._put(_OverError() if has_length else EOFError("the stream ended"))
        except Exception as error:  # whatever a camera sends must not end the others
            self._put(error)

    def _read(self) -> bool:
        """Decode until it ends; returns whether its length was known."""
        name, options = self._source, dict(_OPTIONS)
        format_name: str | None = None
        kind, _, device = self._source.partition(":")
        if is_device(self._source):
            name, format_name, options = device, kind, {}
        limits = (self._settings.open_s, self._settings.read_s)
        opening = open_address if "://" in name else av.open
        with opening(
            name, format=format_name, options=options, timeout=limits, metadata_errors="replace"
        ) as container:
            if not container.streams.audio:
                raise ValueError("the stream has no audio track")
            for stream in container.streams.audio:
                plain_layout(stream)
            track, channel = audio_track(container, self._channel)
            convert = Resampler(SAMPLE_RATE, channel)
            streams: list[Any] = [track]
            if self._recorder is not None:
                streams += container.streams.video[:1]
                self._recorder.begin()
            try:
                for packet in container.demux(streams):
                    if self._left.is_set():
                        return False
                    if self._recorder is not None:
                        self._recorder.keep(packet)
                    if packet.stream.type != "audio":
                        continue
                    for frame in decoded_frames(packet):
                        at = frame.time
                        for block in convert(frame):
                            self._put((block, at))
            finally:
                if self._recorder is not None:
                    self._recorder.leave()
            return bool(container.duration) and self._source.startswith(_SAY_LENGTH)


def decoded_frames(packet: Any) -> list[Any]:
    """The frames of a packet; none of a damaged one."""
    try:
        return [frame for frame in packet.decode() if frame.samples and frame.sample_rate]
    except av.error.FFmpegError:  # the next one may be whole
        return []


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.ExitError):  # "immediate exit requested", by its own time limit
        return "no answer in time"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return without_secrets(" ".join(str(text).split()))[:200]
