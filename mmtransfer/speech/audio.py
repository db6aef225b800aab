"""Audio out of any container: clips for training, streams for monitoring.

PyAV demuxes and decodes (its wheel carries FFmpeg). A clip is a stretch of the stream: both are
mixed, resampled and put in their place in time by the same code.
Everything downstream is mono float32 at 16 kHz in [-1, 1].
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.stream import Disposition

from mmtransfer.errors import UserError
from mmtransfer.speech.addresses import public_address, without_secrets
from mmtransfer.speech.mixing import Resampler, brought_up, plain_layout
from mmtransfer.speech.remote import open_address
from mmtransfer.speech.timeline import Timeline

SAMPLE_RATE = 16_000
UPLOAD = ".upload"
"""Ending of a file that a stranger sent: it may open nothing else, whatever it says."""
_PCM = "pcm:"
logger = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 12
_URL_TIMEOUT_S = 30.0  # to open an address, and for every read
_SAY_LENGTH = {"mov", "wav", "w64", "flac", "avi", "asf", "caf", "aiff", "au", "flv", "ogg", "wv"}
"""Containers that hold their length, and do not leave it to be guessed."""
_LEAST_BYTES = 2.0  # a second; FLAC takes 4 for digital silence
_LONGEST_GAP_S = 1800.0  # that is believed although no picture shows that time went by
_SEEK_EARLY_S = 1.0  # lossy codecs need frames before the first wanted one
_BLOCK_S = 0.25
_SETTLE_S = 2.0  # of audio, after which the earliest stamp is that of a packet that was in time


class MediaError(UserError):
    """A recording that cannot be opened or holds no audio."""


class MissingChannelError(MediaError):
    """A recording that has no such channel."""


class LongMediaError(MediaError):
    """A recording that is longer than was asked for."""


class TruncatedMediaError(MediaError):
    """A recording that ends before the duration in its container."""


class _Piped:
    """Standard input, a named pipe or a device file, which `stopped` ends.

    Something else may never be written into it, and who waits inside the interpreter's own reader
    when the process exits takes it down.
    """

    def __init__(self, file: Any, stopped: Callable[[], bool]):
        self._file, self._stopped = file, stopped

    def read(self, size: int) -> bytes:
        """Bytes as they come; none at the end."""
        number = self._file.fileno()
        while not self._stopped():
            with suppress(BlockingIOError):
                if select.select([number], [], [], 0.1)[0]:
                    return os.read(number, size)
        return b""


def open_media(source: str | Path, stopped: Callable[[], bool] = lambda: False) -> Any:
    """Open a recording with PyAV; `-` is standard input, `pcm:RATE` is raw audio there (16-bit
    little-endian, one channel, so many samples a second). What is piped in ends when `stopped`.

    Raises:
        MediaError: no such file, empty, no media FFmpeg knows, or no audio track.
    """
    path, shown = Path(source), shown_name(source)
    is_stdin, is_once = is_standard_input(str(source)), is_piped(str(source))
    is_url = "://" in str(source) or is_stdin
    if not is_url:
        if not path.exists():
            rate = f" Raw audio is {_PCM}RATE, such as {_PCM}16000." if _is_pcm(source) else ""
            raise MediaError(f"{shown}: no such file.{rate}")
        if path.is_dir():
            raise MediaError(f"{shown}: expected a video or audio file, found a folder.")
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{shown}: the file is empty (0 bytes).")
    reason: Any = "it holds no streams"
    container = None
    try:
        opened = _piped(source, stopped) if is_once else media_file(source)
        options: dict[str, Any] = {"metadata_errors": "replace", "options": reach(source)}
        if is_stdin and _is_pcm(source):
            raw = {"sample_rate": str(source).removeprefix(_PCM), "ch_layout": "mono"}
            options |= {"format": "s16le", "options": raw}
        if "://" in str(source):
            container = open_address(str(source), timeout=_URL_TIMEOUT_S, metadata_errors="replace")
        else:
            container = av.open(opened, **options)
    except av.error.ExitError:
        reason = f"no answer in {_URL_TIMEOUT_S:g} s"
    except MediaError:
        raise
    except UserError as error:
        raise MediaError(str(error)) from None
    except Exception as error:  # whatever a demuxer raises is this file's alone
        reason = getattr(error, "strerror", None) or without_secrets(str(error), str(source))
    if container is None or not container.streams:
        if not is_url and not is_once and _is_mp4(path):
            raise MediaError(
                f"{shown}: an mp4 file without its index, so nothing in it can be found: it is "
                "cut, or still being written. Finish or repair the recording."
            )
        raw_hint = f" Raw 16-bit mono samples are {_PCM}RATE." if is_stdin else ""
        raise MediaError(
            f"{shown}: not a readable video or audio file ({reason}). Expected a container FFmpeg "
            f"knows, such as mp4, mkv, avi, wav, flac or ogg.{raw_hint}"
        )
    if not container.streams.audio:
        kinds = ", ".join(stream.type for stream in container.streams)
        container.close()
        raise MediaError(f"{shown}: has no audio track (found: {kinds}). There is no speech in it.")
    tracks = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not tracks:
        container.close()
        raise MediaError(f"{shown}: its audio is in a form that FFmpeg cannot decode.")
    for track in tracks:
        plain_layout(track)
    return container


def reach(source: str | Path) -> dict[str, str]:
    """FFmpeg's options for what else a recording may open: a file (a playlist, a session's
    description) no address, and what is piped in or was uploaded nothing at all.
    """
    if "://" in str(source):
        return {}
    is_alone = is_piped(str(source)) or Path(source).suffix == UPLOAD
    return {"protocol_whitelist": "crypto,data" if is_alone else "file,crypto,data"}


def shown_name(source: str | Path) -> str:
    """What messages call a recording: its path, its address without a password, and nothing of
    where an upload lies.
    """
    return "file" if Path(source).suffix == UPLOAD else public_address(str(source))


def media_file(source: str | Path) -> Any:
    """What PyAV opens a recording by: an address as it is, a file by a path that cannot be taken
    for an address (`12:30.wav`), or opened if its name is not UTF-8 or it may open no file.
    """
    if "://" in str(source):
        return str(source)
    path = os.path.abspath(source)
    if Path(path).suffix == UPLOAD:
        return open(path, "rb")
    try:
        path.encode()
    except UnicodeEncodeError:
        return open(path, "rb")
    return path


def _piped(source: str | Path, stopped: Callable[[], bool]) -> Any:
    if not is_standard_input(str(source)):
        # Without waiting for who writes into it.
        return _Piped(open(source, "rb", 0, opener=_open_at_once), stopped)
    if sys.stdin is None:
        raise MediaError("standard input is closed.")
    file = sys.stdin.buffer
    # A file in its place never keeps anybody waiting, and may have to be searched.
    return file if file.seekable() else _Piped(file, stopped)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _is_pcm(source: str | Path) -> bool:
    return str(source).startswith(_PCM)


def length_s(container: Any) -> float | None:
    """Duration by the container, in seconds; None if it has none, or if its bytes cannot
    hold so much.
    """
    if not container.duration:
        return None
    length = container.duration / 1e6
    # What Matroska says is the last time in it, which is no length where times do not begin at 0.
    begins = max(0.0, (container.start_time or 0) / 1e6)
    length = length - begins if _is_matroska(container) else length
    if 0 < container.size < _LEAST_BYTES * length:  # its clock has jumped
        lengths = [
            float(stream.duration * stream.time_base)
            for stream in container.streams
            if stream.duration and stream.time_base
        ]
        length = max(lengths, default=0.0)
        if container.size < _LEAST_BYTES * length or not length:
            return None
    return length


def recording_length_s(path: Path) -> float | None:
    """How long a file is, in seconds; where its container would only guess, its packets are
    counted. None if it cannot be known.

    Raises:
        MediaError: the file cannot be read.
    """
    with open_media(path) as container:
        stream, _ = audio_track(container)
        if not _is_guessed(container, stream):
            return length_s(container)
        seconds = 0.0
        with suppress(av.error.FFmpegError):
            for packet in container.demux(stream):
                seconds += float((packet.duration or 0) * packet.time_base)
        return seconds or None


def _is_guessed(container: Any, stream: Any) -> bool:
    """Whether the length of a stream is no word of its container but FFmpeg's guess: the file's
    bytes over the bit rate of its beginning.
    """
    if set(container.format.name.split(",")) & _SAY_LENGTH or _is_matroska(container):
        return False
    if stream.duration is None or stream.time_base is None:
        return True
    # An mp3 may say how long it is. If it is cut, it has fewer bytes than that takes.
    bits, rate = 8 * max(0, container.size), stream.codec_context.bit_rate
    return not rate or not bits or bits / rate > 0.98 * float(stream.duration * stream.time_base)


def _is_matroska(container: Any) -> bool:
    return "matroska" in container.format.name


def beginning_digest(path: str | Path, most: int, size: int | None = None) -> str:
    """Digest of a recording's first bytes behind its header, which is written again when it is
    closed: `most` at most, and none behind the first `size` of the file.
    """
    end = _HEADER_BYTES + most if size is None else min(size, _HEADER_BYTES + most)
    with open(path, "rb") as file:
        file.seek(_HEADER_BYTES)
        return hashlib.sha256(file.read(max(0, end - _HEADER_BYTES))).hexdigest()[:16]


def is_standard_input(source: str) -> bool:
    """Whether a source is what is piped in: `-` or `pcm:RATE`."""
    rate = source.removeprefix(_PCM)
    return source == "-" or (_is_pcm(source) and rate.isdecimal() and int(rate) > 0)


def check_file(path: Path) -> None:
    """Make sure that a recording which a table names is a file: nobody may ever write into a pipe.

    Raises:
        MediaError: a pipe or a device.
    """
    if is_piped(str(path)):
        raise MediaError(f"{path}: expected a file, found a pipe or a device.")


def is_piped(source: str) -> bool:
    """Whether a source can be decoded once only: standard input, a named pipe, a device file."""
    if is_standard_input(source):
        return True
    path = Path(source)
    return "://" not in source and path.exists() and not (path.is_file() or path.is_dir())


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def audio_track(container: Any, channel: int | None = None) -> tuple[Any, int | None]:
    """The track that is used, and which of its channels: that of `channel`, counted from 0 over
    all tracks; without one the track that the container prefers, and all its channels.

    Raises:
        ValueError: no such channel.
    """
    tracks = [s for s in container.streams.audio if s.codec_context is not None]
    if channel is None:
        preferred = [track for track in tracks if Disposition.default in track.disposition]
        return (preferred or tracks)[0], None
    count = 0
    for track in tracks:
        own = channel - count
        count += max(1, track.codec_context.channels)
        if own < count - (channel - own):
            return track, own
    raise ValueError(f"no channel {channel + 1}: it has {count}")


def channel_count(source: str | Path) -> int:
    """Channels of all audio tracks of a recording.

    Raises:
        MediaError: the recording cannot be used.
    """
    with open_media(source) as container:
        tracks = [s for s in container.streams.audio if s.codec_context is not None]
        return sum(max(1, track.codec_context.channels) for track in tracks)


@lru_cache(maxsize=1024)
def _log_tracks(source: str, tracks: int, number: int) -> None:
    """Once for each source."""
    which = "the first" if number == 1 else f"the one it prefers, number {number},"
    logger.warning(
        "%s: has %d audio tracks; using %s (monitor --channels split takes all)",
        shown_name(source),
        tracks,
        which,
    )


def _decoded_frames(container: Any, source: str | Path, stream: Any) -> Iterator[Any]:
    """Audio frames in order; damaged packets are skipped, the end of a cut file is reported.

    Raises:
        TruncatedMediaError: at the end.
        MediaError: at the end, if nothing could be decoded.
    """
    shown = shown_name(source)
    damaged = frames = 0
    end_s = picture_s = 0.0
    origin_s = (container.start_time or 0) / 1e6
    # Matroska says how long the whole is, not the sound in it: what shows a cut is that the picture
    # ends early as well.
    is_matroska = stream.duration is None and _is_matroska(container)
    expected_s = None
    if is_matroska:
        expected_s = length_s(container)
    elif stream.duration is not None and not _is_guessed(container, stream):
        expected_s = float(stream.duration * stream.time_base)
        if stream.start_time is not None:  # that length counts from there
            origin_s = float(stream.start_time * stream.time_base)
    watched = [stream, *(container.streams.video[:1] if is_matroska else [])]
    packets = container.demux(watched)
    cut = None
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except Exception as error:  # whatever a demuxer raises is this file's alone
            cut = getattr(error, "strerror", None) or str(error)
            break
        if packet.stream is not stream:
            if packet.pts is not None:
                picture_s = max(picture_s, float(packet.pts * packet.time_base) - origin_s)
            continue
        try:
            decoded = packet.decode()
        except Exception:  # and what a decoder raises is this packet's
            damaged += 1
            continue
        for frame in decoded:
            if frame.samples and frame.sample_rate:
                frames += 1
                if frame.time is not None:
                    end_s = frame.time - origin_s + frame.samples / frame.sample_rate
                yield frame
    if damaged and not frames:
        raise MediaError(f"{shown}: none of its {damaged} packets of audio could be decoded.")
    if damaged:
        logger.warning("%s: %d damaged packets skipped", shown, damaged)
    read_s = max(end_s, picture_s)
    if cut is not None or (expected_s is not None and read_s < expected_s - 1.0):
        if not end_s and "mp4" in container.format.name and is_piped(str(source)):
            raise MediaError(
                f"{shown}: an mp4 whose index lies at its end cannot be piped. Name the file, or "
                "pipe another container, such as mkv."
            )
        wanted = f" of {expected_s:.1f} s" if expected_s is not None else ""
        raise TruncatedMediaError(
            f"{shown}: the audio ends early, at {end_s:.1f} s{wanted}; it is cut or damaged. "
            "Everything before that was used."
        )


class _Reading:
    """The audio of an open recording in its place: one clock for clips and for streams."""

    def __init__(self, container: Any, source: str | Path, channel: int | None = None):
        self._container, self._source = container, source
        self._shown = shown_name(source)
        try:
            self._stream, own = audio_track(container, channel)
        except ValueError as error:
            raise MissingChannelError(f"{self._shown}: {error}.") from None
        if channel is None and len(container.streams.audio) > 1:
            number = 1 + container.streams.audio.index(self._stream)
            _log_tracks(str(source), len(container.streams.audio), number)
        self._convert = Resampler(SAMPLE_RATE, own, block_s=_BLOCK_S)
        self._origin_s = (container.start_time or 0) / 1e6
        self._total_s = length_s(container)
        self._has_jumped = False
        self._frames = _decoded_frames(container, source, self._stream)
        self._ahead: list[Any] = []  # frames that were looked at
        self._ended: MediaError | None = None  # behind them

    def begins(self) -> float | None:
        """Where the first frame lies after a seek; None if that cannot be known.

        The packet that was found may be stamped late: the earliest of those behind it tells.
        """
        first: float | None = None
        late = seconds = 0.0
        try:
            for frame in self._frames:
                self._ahead.append(frame)
                stamp = self._stamp(frame)
                if stamp is None:
                    return None
                first = stamp if first is None else first
                late = max(late, first + seconds - stamp)
                seconds += frame.samples / frame.sample_rate
                if seconds >= _SETTLE_S:
                    break
        except MediaError as error:
            self._ended = error
        return None if first is None else first - late

    def blocks(self, timeline: Timeline | None = None) -> Iterator[tuple[np.ndarray, bool]]:
        """(float32 block at 16 kHz, whether it was recorded rather than put in for a gap), in order
        and without gaps; the first lies at the timeline's position.

        Raises:
            MediaError: at the start, if the audio cannot be used.
            TruncatedMediaError: at the end, after all there is, if it was cut.
        """
        timeline = timeline or self.timeline(0.0)
        cut: TruncatedMediaError | None = None
        try:
            for frame in self._all_frames():
                seconds = frame.samples / frame.sample_rate
                for gap_s, placed in timeline.place(frame, self._stamp(frame), seconds):
                    yield from self._converted(gap_s, placed)
        except TruncatedMediaError as error:
            cut = error
        for gap_s, placed in timeline.finish():
            yield from self._converted(gap_s, placed)
        for block in self._tried(self._convert.flush()):
            yield block, True
        mixer = self._convert.mixer
        if mixer.bad:
            logger.warning(
                "%s: %d samples are invalid (not a number, or far beyond full scale); replaced by "
                "silence",
                self._shown,
                mixer.bad,
            )
        if mixer.scale != 1.0:
            logger.warning(
                "%s: its samples are integers written as floats; they are divided by %.0f",
                self._shown,
                mixer.scale,
            )
        if cut is not None:
            raise cut

    def _all_frames(self) -> Iterator[Any]:
        yield from self._ahead
        if self._ended is not None:
            raise self._ended
        yield from self._frames

    def _stamp(self, frame: Any) -> float | None:
        """When a frame is by its file, in seconds from where the file begins."""
        return None if frame.time is None else frame.time - self._origin_s

    def timeline(self, position: float | None) -> Timeline:
        """A clock that begins at that position."""
        return Timeline(self._can_be_missing, position)

    def _converted(self, gap_s: float, frame: Any) -> Iterator[tuple[np.ndarray, bool]]:
        if gap_s:
            for block in self._tried(self._convert.flush()):
                yield block, True
            for block in _silence(gap_s):
                yield block, False
        for block in self._tried(self._convert(frame)):
            yield block, True

    def _tried(self, blocks: Iterator[np.ndarray]) -> list[np.ndarray]:
        try:
            return list(blocks)
        except Exception as error:  # whatever a conversion raises is this file's alone
            why = getattr(error, "strerror", None) or error
            raise MediaError(f"{self._shown}: its audio cannot be converted ({why}).") from None

    def _can_be_missing(self, at: float, gap_s: float) -> bool:
        is_within = self._total_s is None or at + gap_s <= self._total_s + 1.0
        if is_within and gap_s <= _LONGEST_GAP_S:
            return True
        start = self._origin_s + at
        if is_within and _picture_goes_on(self._source, start, start + gap_s):
            return True
        if not self._has_jumped:
            self._has_jumped = True
            logger.warning(
                "%s: its timestamps jump by %.0f s at %.1f s without audio; the jump is ignored, "
                "times follow the samples",
                self._shown,
                gap_s,
                at,
            )
        return False


def _picture_goes_on(source: str | Path, start: float, end: float) -> bool:
    """Whether a file's picture shows that time went by: one in each of its minutes at least."""
    if "://" in str(source) or is_piped(str(source)):
        return False
    minutes, seen = ceil((end - start) / 60), set()
    with suppress(MediaError, av.error.FFmpegError, OSError), open_media(source) as container:
        for packet in container.demux(container.streams.video[:1]):
            if packet.pts is not None:
                minute = int((float(packet.pts * packet.time_base) - start) // 60)
                if 0 <= minute < minutes:
                    seen.add(minute)
                if len(seen) == minutes:
                    return True
    return False


def decode_clip(
    source: str | Path,
    start: float = 0.0,
    end: float | None = None,
    *,
    longest_s: float | None = None,
) -> np.ndarray:
    """A recording, or the part from `start` to `end` seconds of what `stream_audio` gives, as
    float32 [samples] at 16 kHz. What is very quiet is brought up.

    Raises:
        MediaError: unreadable, without audio, or nothing between `start` and `end`.
        LongMediaError: longer than `longest_s`; no more of it is decoded.
    """
    samples, decoded = _stretch(source, start, end, longest_s)
    wanted = 0 if end is None else round((end - start) * SAMPLE_RATE)
    if decoded < max(0.05 * SAMPLE_RATE, 0.5 * wanted):
        asked = (
            f" between {start:g} s and {end:g} s" if end is not None else f" from {start:g} s on"
        )
        shown = shown_name(source)
        raise MediaError(f"{shown}: only {decoded / SAMPLE_RATE:.2f} s of audio{asked}.")
    return brought_up(samples)


def _stretch(
    source: str | Path,
    start: float,
    end: float | None,
    longest_s: float | None,
    *,
    seek: bool = True,
) -> tuple[np.ndarray, int]:
    """The samples from `start` to `end`, and how many of them were recorded."""
    first, stop = round(start * SAMPLE_RATE), None if end is None else round(end * SAMPLE_RATE)
    kept: list[np.ndarray] = []
    decoded = count = 0
    with open_media(source) as container:
        reading = _Reading(container, source)
        timeline, at = reading.timeline(0.0), 0
        if seek and start > _SEEK_EARLY_S:
            container.seek(int((start - _SEEK_EARLY_S) * 1e6) + (container.start_time or 0))
            begins = reading.begins()
            if begins is None or begins > start:
                # Stamps lead nowhere: silence comes first, or a clock that jumped.
                return _stretch(source, start, end, longest_s, seek=False)
            timeline, at = reading.timeline(begins), round(begins * SAMPLE_RATE)
        try:
            for block, is_recorded in reading.blocks(timeline):
                part = block[max(0, first - at) : None if stop is None else max(0, stop - at)]
                at += len(block)
                if len(part):
                    kept.append(part)
                    decoded += len(part) * is_recorded
                    count += len(part)
                    if longest_s is not None and count > longest_s * SAMPLE_RATE:
                        raise LongMediaError(
                            f"{shown_name(source)}: is longer than {longest_s:g} s."
                        )
                if stop is not None and at >= stop:
                    break
        except TruncatedMediaError:
            # A cue's end may lie past a cut; what the clip itself needs must be there.
            if end is None or not kept:
                raise
    if not kept:
        raise MediaError(f"{shown_name(source)}: no audio could be decoded from {start:g} s on.")
    return np.ascontiguousarray(np.concatenate(kept), dtype=np.float32), decoded


def stream_audio(
    source: str | Path,
    stopped: Callable[[], bool] = lambda: False,
    *,
    channel: int | None = None,
) -> Iterator[np.ndarray]:
    """A recording as consecutive float32 blocks at 16 kHz, in bounded memory; with `channel` one
    channel alone, counted from 0 over all tracks. What is piped in ends when `stopped`.

    Sample k of the stream lies at k / 16000 s of the recording's own timeline: audio that starts
    late or has gaps is filled with silence, so that times stay those a player shows. See `Timeline`
    for what a gap is.

    Raises:
        MediaError: at the start, if the recording cannot be used.
        TruncatedMediaError: at the end, after all there is, if it was cut.
    """
    with open_media(source, stopped) as container:
        for block, _ in _Reading(container, source, channel).blocks():
            yield block


def _silence(seconds: float) -> Iterator[np.ndarray]:
    left = round(seconds * SAMPLE_RATE)
    while left > 0:
        size = min(left, SAMPLE_RATE)
        yield np.zeros(size, np.float32)
        left -= size
