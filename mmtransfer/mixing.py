"""Decoded frames of any layout, format and rate to one channel of float32 in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np

_LOUDEST = 8.0  # louder than this is no sound: full scale is 1
_SCALES = (2.0**15, 2.0**23, 2.0**31)  # of integers that were written as floats
_HEARD_POWER = 1e-6  # -60 dB of full scale; a channel without any such sound is not connected
_MEMORY_S = 5.0  # over which channels are compared
_OPPOSED, _ALIKE = -0.5, -0.2  # correlation from which a channel is turned over, and back
_PLANES = 8  # that PyAV reaches
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
    """Frames to one channel at the stream's own rate.

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

    def __call__(self, frame: Any) -> np.ndarray:
        """A frame as float32 [samples].

        Raises:
            ValueError: the stream has no such channel, or a frame that PyAV cannot convert.
        """
        samples = self._samples(frame)  # [channel, sample] or [sample, channel]
        if samples.shape[0] == 1:
            if self._channel:
                raise ValueError(f"no channel {self._channel + 1}: it has one")
            return self._clean(samples[0])
        if self._channel is not None:
            if self._channel >= len(samples):
                raise ValueError(f"no channel {self._channel + 1}: it has {len(samples)}")
            return self._clean(np.ascontiguousarray(samples[self._channel]))
        samples = self._clean(samples)
        self._compare(samples, frame.sample_rate)
        return self._weights @ samples

    def _samples(self, frame: Any) -> np.ndarray:
        """Float32 [channel, sample]."""
        kind, channels = frame.format, frame.layout.nb_channels
        is_out_of_reach = kind.is_planar and channels > _PLANES
        if is_out_of_reach or (kind.bytes > 4 and "dbl" not in kind.name):
            frame = self._packed(frame)
            kind = frame.format
        array = frame.to_ndarray()
        if not kind.is_planar:
            array = array.reshape(-1, channels).T
        scale = _FULL_SCALES.get(array.dtype.str[1:])
        if scale is None:
            with np.errstate(over="ignore"):  # a double beyond float32 is no sound either
                return array.astype(np.float32, copy=False)
        if array.dtype == np.uint8:
            array = array.astype(np.int16) - 128
        return array.astype(np.float32) * np.float32(1 / scale)

    def _packed(self, frame: Any) -> Any:
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape != self._packed_shape:
            self._packer = av.AudioResampler("flt", frame.layout, frame.sample_rate)
            self._packed_shape = shape
        frame.pts = None
        (packed,) = self._packer.resample(frame)
        return packed

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

    A stream may change its rate, format or layout; a new resampler is made when it does. See
    `Mixer` for `channel`.
    """

    def __init__(self, rate: int | None, channel: int | None = None):
        self.mixer = Mixer(channel)
        self._rate = rate
        self._resampler: Any = None
        self._from = 0

    def __call__(self, frame: Any) -> Iterator[np.ndarray]:
        """Blocks of a frame's audio, as far as the resampler gives it.

        Raises:
            ValueError: see `Mixer`.
        """
        rate = frame.sample_rate
        if rate != self._from:
            yield from self.flush()
            self._from = rate
            if self._rate not in (None, rate):
                self._resampler = av.AudioResampler("flt", "mono", self._rate)
        samples = self.mixer(frame)
        if self._resampler is None:
            yield samples
            return
        mono = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        mono.sample_rate = rate
        for out in self._resampler.resample(mono):
            yield out.to_ndarray()[0]

    def flush(self) -> Iterator[np.ndarray]:
        """What the resampler still holds."""
        if self._resampler is not None:
            for out in self._resampler.resample(None):
                yield out.to_ndarray()[0]
        self._resampler = None
        self._from = 0
