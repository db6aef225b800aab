"""Decoded frames of any layout, format and rate to one channel of float32 in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.audio.frame import format_dtypes

_LOUDEST = 8.0  # louder than this is no sound: full scale is 1
_SCALES = (2.0**15, 2.0**23, 2.0**31)  # of integers that were written as floats
_HEARD_POWER = 1e-6  # -60 dB of full scale; a channel without any such sound is not connected
_MEMORY_S = 5.0  # over which channels are compared
_OPPOSED, _ALIKE = -0.5, -0.2  # correlation from which a channel is turned over, and back
_PLANES = 8  # that PyAV reaches
# Of samples a second: to or from others, a resampler takes seconds and gigabytes for a few bytes.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 6_144_000
_FULL_SCALES = {"u1": 128.0, "i2": 2.0**15, "i4": 2.0**31}
_QUIET_PEAK = 0.05  # speech below this is brought up to it
_MOST_GAIN = 32.0


def gain_for(peak: Any) -> Any:
    """What very quiet audio of such a peak is multiplied by: 1 for all that is loud enough."""
    return np.clip(_QUIET_PEAK / np.maximum(peak, 1e-9), 1.0, _MOST_GAIN)


def brought_up(samples: np.ndarray) -> np.ndarray:
    """Audio loud enough for models: 30 dB louder at most, and as it is if it is not very quiet."""
    peak = float(np.abs(samples).max(initial=0.0))
    return samples if peak >= _QUIET_PEAK else samples * np.float32(gain_for(peak))


def plain_layout(stream: Any) -> None:
    """Make a stream that is about to be decoded forget what its channels are called.

    PyAV copies a channel map of its file by its address and frees it with every frame; the process
    dies of it. Nothing here needs more than the number of channels.
    """
    if stream.codec_context is None:  # nothing decodes it
        return
    layout = stream.codec_context.layout
    name, count = layout.name, layout.nb_channels
    if count and (" " in name or "@" in name):
        stream.codec_context.layout = f"{count} channels"


class Mixer:
    """The channels of a stream to one.

    The mean of the channels; one that carries another's sound turned over is turned back, since
    they would cancel out, and one that never carried any is left out. With `channel` that one
    alone, counted from 0. Samples that are no sound are taken as silence and counted.
    """

    def __init__(self, channel: int | None = None):
        self.bad = 0
        """Samples that were no sound."""
        self.scale = 1.0
        """What the samples were divided by, where they were integers written as floats."""
        self._channel = channel
        self._packer: Any = None
        self._packed_shape: tuple[Any, ...] = ()
        self._products = np.zeros((0, 0))  # of channels with each other, fading
        self._has_sound = np.zeros(0, bool)
        self._turned = np.zeros(0, bool)
        self._weights = np.zeros(0, np.float32)

    def samples(self, frame: Any) -> np.ndarray:
        """A frame as [channel, sample], in the numbers that it came in."""
        kind, channels = frame.format, frame.layout.nb_channels
        is_out_of_reach = kind.is_planar and channels > _PLANES
        if is_out_of_reach or (kind.bytes > 4 and "dbl" not in kind.name):
            frame = self._packed(frame)
            kind = frame.format
        # Not by `to_ndarray`: of eight planes it takes a ninth, which ends the process, and one is
        # copied for nothing.
        dtype, planes = format_dtypes[kind.name], frame.planes
        if kind.is_planar and channels > 1:
            return np.stack([np.frombuffer(p, dtype, frame.samples) for p in planes[:channels]])
        return np.frombuffer(planes[0], dtype, frame.samples * channels).reshape(-1, channels).T

    def mix(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """[channel, sample] of frames of one form to float32 [samples].

        Raises:
            ValueError: the stream has no such channel.
        """
        channels = len(samples)
        if self._channel is not None or channels == 1:
            number = self._channel or 0
            if number >= channels:
                raise ValueError(f"no channel {number + 1}: it has {channels}")
            return self._as_sound(samples[number])
        samples = self._as_sound(samples)
        self._compare(samples, rate)
        mixed: np.ndarray = self._weights @ samples
        return mixed

    def _packed(self, frame: Any) -> Any:
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self._packed_shape:
            self._packer = av.AudioResampler("flt", frame.layout, frame.sample_rate)
            self._packed_shape = shape
        frame.pts = None
        (packed,) = self._packer.resample(frame)
        return packed

    def _as_sound(self, samples: np.ndarray) -> np.ndarray:
        """Numbers of any type as float32; integers are within full scale as they are."""
        scale = _FULL_SCALES.get(samples.dtype.str[1:])
        if scale is not None:
            if samples.dtype == np.uint8:
                samples = samples.astype(np.int16) - 128
            sound: np.ndarray = samples.astype(np.float32)
            sound *= np.float32(1 / scale)
            return sound
        with np.errstate(over="ignore"):  # a double beyond float32 is no sound either
            return self._clean(samples.astype(np.float32, copy=False))

    def _clean(self, samples: np.ndarray) -> np.ndarray:
        if self.scale != 1.0:
            samples = samples / np.float32(self.scale)
        # One pass where all is well; NaN is greater than nothing, so the question is put this way.
        if samples.size and samples.min() >= -_LOUDEST and samples.max() <= _LOUDEST:
            return samples
        with np.errstate(invalid="ignore"):
            size = np.abs(samples)
            wrong = ~(size <= _LOUDEST)
            finite = size[np.isfinite(size) & (size > 0)]
        if self.scale == 1.0 and finite.size and 2 * (finite > _LOUDEST).sum() > finite.size:
            largest = float(np.percentile(finite, 99))
            self.scale = next((scale for scale in _SCALES if largest <= scale), 1.0)
            if self.scale != 1.0:
                return self._clean(samples)
        self.bad += int(wrong.sum())
        return np.where(wrong, np.float32(0), samples)

    def _compare(self, samples: np.ndarray, rate: int) -> None:
        """Find which channels count, and which way up."""
        channels, length = samples.shape
        if len(self._weights) != channels:
            self._products = np.zeros((channels, channels))
            self._has_sound = np.zeros(channels, bool)
            self._turned = np.zeros(channels, bool)
        products = samples @ samples.T
        self._products *= np.exp(-length / rate / _MEMORY_S)
        self._products += products
        self._has_sound |= products.diagonal() >= _HEARD_POWER * length
        powers = self._products.diagonal()
        first = int(powers.argmax())
        likeness = self._products[first] / (np.sqrt(powers * powers[first]) + 1e-20)
        # Compared with the loudest, which stays as it is: turning it over would click.
        turned = self._turned ^ self._turned[first]
        turned = np.where(turned, likeness < _ALIKE, likeness < _OPPOSED)
        self._turned = turned ^ self._turned[first]
        counted = self._has_sound if self._has_sound.any() else np.ones(channels, bool)
        signs = np.where(self._turned, -1.0, 1.0)
        self._weights = (signs * counted / counted.sum()).astype(np.float32)


class Resampler:
    """Frames to mono float32 blocks, at the stream's own rate or another one.

    A stream may change its rate, format or layout; a new resampler is made when it does. Blocks are
    of `block_s` at least, as small ones cost more time than their decoding; by default they come
    with their frames. See `Mixer` for `channel`.
    """

    def __init__(self, rate: int, channel: int | None = None, *, block_s: float = 0.0):
        self.mixer = Mixer(channel)
        self._rate, self._block_s = rate, block_s
        self._resampler: Any = None
        self._shape: tuple[Any, ...] = ()
        self._waiting: list[np.ndarray] = []
        self._count = 0  # of their samples

    def __call__(self, frame: Any) -> Iterator[np.ndarray]:
        """Blocks of a frame's audio, as far as the resampler gives it.

        Raises:
            ValueError: see `Mixer`; and a rate that no recording has.
        """
        rate = frame.sample_rate
        samples = self.mixer.samples(frame)
        shape = (rate, len(samples), samples.dtype)
        if shape != self._shape:
            if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
                raise ValueError(
                    f"a sample rate of {rate} Hz; expected {_LOWEST_RATE} to {_HIGHEST_RATE} Hz"
                )
            yield from self.flush()
            self._shape = shape
            if self._rate != rate:
                self._resampler = av.AudioResampler("flt", "mono", self._rate)
        self._waiting.append(samples)
        self._count += samples.shape[1]
        if self._count >= self._block_s * rate:
            yield from self._convert()

    def _convert(self) -> Iterator[np.ndarray]:
        if not self._waiting:
            return
        first, *others = self._waiting
        joined = np.concatenate(self._waiting, axis=1) if others else first
        self._waiting, self._count = [], 0
        rate = self._shape[0]
        samples = self.mixer.mix(joined, rate)
        if self._resampler is None:
            yield samples
            return
        mono = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        mono.sample_rate = rate
        for out in self._resampler.resample(mono):
            yield out.to_ndarray()[0]

    def flush(self) -> Iterator[np.ndarray]:
        """What waits, and what the resampler still holds."""
        yield from self._convert()
        if self._resampler is not None:
            for out in self._resampler.resample(None):
                yield out.to_ndarray()[0]
        self._resampler = None
        self._shape = ()
