"""Audio out of any container: clips for training, streams for monitoring.

PyAV demuxes and decodes (its wheel carries FFmpeg), torchaudio resamples clips. Streams are
resampled by FFmpeg's resampler, because it keeps its state from block to block.
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
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from mmtransfer.errors import UserError

SAMPLE_RATE = 16_000
_PCM = "pcm:"
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".aac")
"""Files that hold sound and no picture."""
logger = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 12
_URL_TIMEOUT_S = 30.0  # to open an address, and for every read
_GAP_S = 0.1  # smaller jumps in the timestamps are rounding, not missing audio


class MediaError(UserError):
    """A recording that cannot be opened or holds no audio."""


class TruncatedMediaError(MediaError):
    """A recording that ends before its container says it does."""


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
    path = Path(source)
    is_stdin, is_once = is_standard_input(str(source)), is_piped(str(source))
    is_url = "://" in str(source) or is_stdin
    if not is_url:
        if not path.exists():
            rate = f" Raw audio is {_PCM}RATE, such as {_PCM}16000." if _is_pcm(source) else ""
            raise MediaError(f"{source}: no such file.{rate}")
        if path.is_dir():
            raise MediaError(f"{source}: expected a video or audio file, found a folder.")
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{source}: the file is empty (0 bytes).")
    reason: Any = "it holds no streams"
    container = None
    try:
        opened = _piped(source, stopped) if is_once else media_file(source)
        options: dict[str, Any] = {"metadata_errors": "replace"}
        if "://" in str(source):
            options["timeout"] = _URL_TIMEOUT_S
        if is_stdin and _is_pcm(source):
            raw = {"sample_rate": str(source).removeprefix(_PCM), "ch_layout": "mono"}
            options |= {"format": "s16le", "options": raw}
        container = av.open(opened, **options)
    except av.error.ExitError:
        reason = f"no answer in {_URL_TIMEOUT_S:g} s"
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    if container is None or not container.streams:
        if not is_url and not is_once and _is_mp4(path):
            raise MediaError(
                f"{source}: an mp4 file without its index, so nothing in it can be found: it is "
                "cut, or still being written. Finish or repair the recording."
            )
        raw_hint = f" Raw 16-bit mono samples are {_PCM}RATE." if is_stdin else ""
        raise MediaError(
            f"{source}: not a readable video or audio file ({reason}). Expected a container FFmpeg "
            f"knows, such as mp4, mkv, avi, wav, flac or ogg.{raw_hint}"
        )
    if not container.streams.audio:
        kinds = ", ".join(stream.type for stream in container.streams)
        container.close()
        raise MediaError(
            f"{source}: has no audio track (found: {kinds}). There is no speech in it."
        )
    return container


def media_file(source: str | Path) -> Any:
    """What PyAV opens a recording by: an address as it is, a file by a path that cannot be taken
    for an address (`12:30.wav`), or opened if its name is not UTF-8.
    """
    if "://" in str(source):
        return str(source)
    path = os.path.abspath(source)
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
    """How long a container says it is, in seconds; None if it does not."""
    if not container.duration:
        return None
    length = container.duration / 1e6
    # What Matroska says is the last time in it, which is no length where times do not begin at 0.
    begins = max(0.0, (container.start_time or 0) / 1e6)
    return length - begins if _is_matroska(container) else length


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


def is_piped(source: str) -> bool:
    """Whether a source can be read once only: standard input, a named pipe, a device file."""
    if is_standard_input(source):
        return True
    path = Path(source)
    return "://" not in source and path.exists() and not (path.is_file() or path.is_dir())


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _decoded_frames(container: Any, source: str | Path) -> Iterator[Any]:
    """Audio frames in order; damaged packets are skipped, the end of a cut file is reported."""
    damaged = 0
    end_s = picture_s = 0.0
    stream = container.streams.audio[0]
    origin_s = (container.start_time or 0) / 1e6
    # Matroska says how long the whole is, not the sound in it: what shows a cut is that the picture
    # ends early as well.
    is_matroska = stream.duration is None and _is_matroska(container)
    watched = [stream, *(container.streams.video[:1] if is_matroska else [])]
    packets = container.demux(watched)
    cut = None
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except (av.error.FFmpegError, OSError) as error:
            cut = getattr(error, "strerror", None) or str(error)
            break
        if packet.stream is not stream:
            if packet.pts is not None:
                picture_s = max(picture_s, float(packet.pts * packet.time_base) - origin_s)
            continue
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damaged += 1
            continue
        for frame in frames:
            if frame.samples and frame.sample_rate:
                if frame.time is not None:
                    end_s = frame.time - origin_s + frame.samples / frame.sample_rate
                yield frame
    if damaged:
        logger.warning("%s: %d damaged packets skipped", source, damaged)
    expected_s = None
    if stream.duration is not None and stream.time_base is not None:
        expected_s = float(stream.duration * stream.time_base)
    elif is_matroska:
        expected_s = length_s(container)
    read_s = max(end_s, picture_s)
    if cut is not None or (expected_s is not None and read_s < expected_s - 1.0):
        if not end_s and "mp4" in container.format.name and is_piped(str(source)):
            raise MediaError(
                f"{source}: an mp4 whose index lies at its end cannot be piped. Name the file, or "
                "pipe another container, such as mkv."
            )
        wanted = f" of {expected_s:.1f} s" if expected_s is not None else ""
        raise TruncatedMediaError(
            f"{source}: the audio ends early, at {end_s:.1f} s{wanted}; it is cut or damaged. "
            "Everything before that was used."
        )


class Resampler:
    """Frames to mono float32 blocks, at the stream's own rate or another one.

    A stream may change its rate, format or layout; a new resampler is made when it does.
    """

    def __init__(self, rate: int | None):
        self._rate = rate
        self._resampler: Any = None
        self._shape: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> Iterator[np.ndarray]:
        """Blocks of a frame's audio, as far as the resampler gives it."""
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self._shape:
            yield from self.flush()
            self._resampler = av.AudioResampler(
                "flt", frame.layout, self._rate or frame.sample_rate
            )
            self._shape = shape
        frame.pts = None  # the resampler would otherwise refuse jumps in time; we handle those
        for out in self._resampler.resample(frame):
            yield _mono(out)

    def flush(self) -> Iterator[np.ndarray]:
        """What the resampler still holds."""
        if self._resampler is not None:
            for out in self._resampler.resample(None):
                yield _mono(out)
            self._resampler = None
            self._shape = ()


def _mono(frame: Any) -> np.ndarray:
    # The mean of the channels; FFmpeg's own mix of float audio would be louder than its input.
    # Packed, since PyAV does not reach the planes of eight channels and more.
    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


@lru_cache(maxsize=16)
def _torch_resampler(rate: int) -> Any:
    import torchaudio

    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def decode_clip(source: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """A recording, or the part from `start` to `end` seconds, as float32 [samples] at 16 kHz.

    Raises:
        MediaError: unreadable, without audio, or nothing between `start` and `end`.
    """
    import torch

    blocks: list[np.ndarray] = []
    with open_media(source) as container:
        origin_s = (container.start_time or 0) / 1e6
        if start > 1.0:  # a second early: lossy codecs need frames before the first wanted one
            container.seek(int((start - 1.0 + origin_s) * 1e6))
        rate = 0
        first_s = None
        convert = Resampler(None)
        try:
            for frame in _decoded_frames(container, source):
                if rate not in (0, frame.sample_rate):
                    raise MediaError(
                        f"{source}: the sample rate changes from {rate} to {frame.sample_rate} Hz "
                        "within the file; re-encode it to one rate."
                    )
                rate = frame.sample_rate
                time_s = frame.time - origin_s if frame.time is not None else 0.0
                if first_s is None:
                    first_s = time_s
                blocks.extend(convert(frame))
                if end is not None and time_s > end:
                    break
        except TruncatedMediaError:
            # A cue's end may lie past a cut; what the clip itself needs must be there.
            if end is None or not blocks:
                raise
        blocks.extend(convert.flush())
    if not blocks or first_s is None:
        raise MediaError(f"{source}: no audio could be decoded from {start:g} s on.")
    samples = np.concatenate(blocks)
    begin = max(0, round((start - first_s) * rate))
    stop = len(samples) if end is None else round((end - first_s) * rate)
    samples = samples[begin:stop]
    wanted_s = None if end is None else end - start
    if len(samples) < 0.05 * rate or (wanted_s and len(samples) < 0.5 * wanted_s * rate):
        asked = (
            f" between {start:g} s and {end:g} s" if end is not None else f" from {start:g} s on"
        )
        raise MediaError(f"{source}: only {len(samples) / rate:.2f} s of audio{asked}.")
    if rate != SAMPLE_RATE:
        samples = _torch_resampler(rate)(torch.from_numpy(np.ascontiguousarray(samples))).numpy()
    return np.ascontiguousarray(samples, dtype=np.float32)


def stream_audio(
    source: str | Path, stopped: Callable[[], bool] = lambda: False
) -> Iterator[np.ndarray]:
    """A recording as consecutive float32 blocks at 16 kHz, in bounded memory. What is piped in ends
    when `stopped`.

    Sample k of the stream lies at k / 16000 s of the recording's own timeline: audio that starts
    late or has gaps is filled with silence, so that times stay those a player shows.

    Raises:
        MediaError: at the start, if the recording cannot be used.
        TruncatedMediaError: at the end, after all there is, if it was cut.
    """
    with open_media(source, stopped) as container:
        origin_s = (container.start_time or 0) / 1e6
        total_s = length_s(container)
        convert = Resampler(SAMPLE_RATE)
        position_s = 0.0  # time of the next input sample, gaps included
        shift_s = 0.0  # what a clock that jumped must be corrected by
        for frame in _decoded_frames(container, source):
            if frame.time is not None:
                gap_s = frame.time - origin_s - shift_s - position_s
                if gap_s > _GAP_S and (total_s is None or frame.time - origin_s <= total_s):
                    yield from convert.flush()
                    yield from _silence(gap_s)
                    position_s += gap_s
                elif abs(gap_s) > _GAP_S:
                    shift_s += gap_s
            position_s += frame.samples / frame.sample_rate
            yield from convert(frame)
        yield from convert.flush()


def _silence(seconds: float) -> Iterator[np.ndarray]:
    left = round(seconds * SAMPLE_RATE)
    while left > 0:
        size = min(left, SAMPLE_RATE)
        yield np.zeros(size, np.float32)
        left -= size
