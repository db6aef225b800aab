"""Where speech is: Silero VAD probabilities for many frames at once, and hysteresis over them.

The network and its weights are Silero VAD 6 (MIT, https://github.com/snakers4/silero-vad), read
from the `silero-vad` package once and kept in the cache folder. It runs in NumPy, so that watching
a camera needs no torch. Only its LSTM is sequential; everything before it runs over all frames of
a block in one batch, which is several times faster than frame by frame and gives the same
probabilities.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from threadpoolctl import ThreadpoolController

from mmtransfer.cache import cache_path, put
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.mixing import gain_for

FRAME = 512
"""Samples per probability (32 ms)."""
_FADING = np.log(10) / 20 * 0.5 * FRAME / SAMPLE_RATE
"""Half a decibel a second, as a logarithm a frame."""
_CONTEXT = 64  # samples of the frame before that the network sees
_STFT, _HOP = 256, 128
_WIDTH = 128


class _SileroNetwork:
    """Convolutions are matrix products over the positions that their kernels cover."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self._stft = weights["stft_conv.weight"][:, 0].T.copy()  # [sample, real and imaginary]
        self._convs = []
        for index, stride in ((1, 1), (2, 2), (3, 2), (4, 1)):
            kernel = weights[f"conv{index}.weight"]  # [out, in, 3]
            matrix = kernel.transpose(2, 1, 0).reshape(-1, len(kernel)).copy()
            self._convs.append((matrix, weights[f"conv{index}.bias"], stride))
        # sigmoid(x) = (1 + tanh(x / 2)) / 2: with three gates halved, one tanh serves all four.
        # In turn: input, forget, cell, output.
        halves = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), _WIDTH)
        self._input = (weights["lstm.weight_ih_l0"] * halves[:, None]).T.copy()
        self._hidden = (weights["lstm.weight_hh_l0"] * halves[:, None]).T.copy()
        self._bias = (weights["lstm.bias_ih_l0"] + weights["lstm.bias_hh_l0"]) * halves
        self._output = weights["final_conv.weight"].reshape(-1)
        self._output_bias = float(weights["final_conv.bias"][0])

    def __call__(
        self, frames: np.ndarray, state: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Frames [frame, context + 512] in order -> probabilities [frame], LSTM state."""
        padded = np.pad(frames, ((0, 0), (0, _CONTEXT)), mode="reflect")
        pieces = np.lib.stride_tricks.sliding_window_view(padded, _STFT, axis=1)[:, ::_HOP]
        spectrum = _rows_times(pieces, self._stft)
        half = spectrum.shape[-1] // 2
        x = np.sqrt(spectrum[..., :half] ** 2 + spectrum[..., half:] ** 2)
        for matrix, bias, stride in self._convs:
            padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
            places = range(0, x.shape[1], stride)
            covered = np.stack([padded[:, p : p + 3].reshape(len(x), -1) for p in places], 1)
            x = np.maximum(_rows_times(covered, matrix) + bias, 0)
        gates = x[:, 0] @ self._input + self._bias
        hidden, cell = state
        outputs = np.empty((len(frames), _WIDTH), np.float32)
        hidden_weights = self._hidden
        for index, given in enumerate(gates):
            gate = np.tanh(given + hidden @ hidden_weights)
            opened = gate * 0.5 + 0.5
            cell = opened[_WIDTH : 2 * _WIDTH] * cell
            cell += opened[:_WIDTH] * gate[2 * _WIDTH : 3 * _WIDTH]
            hidden = opened[3 * _WIDTH :] * np.tanh(cell)
            outputs[index] = hidden
        logits = np.maximum(outputs, 0) @ self._output + self._output_bias
        return (1 / (1 + np.exp(-logits))).astype(np.float32), (hidden, cell)


def _rows_times(stacked: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`stacked @ matrix` as one product instead of one for each frame."""
    rows = stacked.reshape(-1, stacked.shape[-1])
    return (rows @ matrix).reshape(*stacked.shape[:-1], -1)


@lru_cache(maxsize=1)
def _network() -> _SileroNetwork:
    path = cache_path("voice_activity", f"silero-{version('silero-vad')}.npz")
    weights = _cached_weights(path)
    if weights is None:
        weights = made = _package_weights()
        put(path, lambda part: _save(part, made))
    # Threads of products as small as these wait for each other ten times as long as they multiply.
    # NumPy has one setting for the whole process, and nothing here gains from more than one.
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    return _SileroNetwork(weights)


def _cached_weights(path: Path) -> dict[str, np.ndarray] | None:
    """Weights in the cache; None if they are not there, or damaged."""
    try:
        with np.load(path) as weights:
            return dict(weights)
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


def _save(path: Path, weights: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **weights)


def _package_weights() -> dict[str, np.ndarray]:
    import re

    import torch

    # The scripted model carries the current weights (the package's safetensors file holds others).
    path = files("silero_vad") / "data" / "silero_vad.jit"
    scripted = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    weights = {}
    for name, value in scripted.state_dict().items():
        if not name.startswith("_model."):  # a second network, for 8 kHz
            continue
        name = name.removeprefix("_model.").replace("stft.forward_basis_buffer", "stft_conv.weight")
        name = re.sub(r"encoder\.(\d)\.reparam_conv", lambda m: f"conv{int(m[1]) + 1}", name)
        name = name.replace("decoder.decoder.2", "final_conv")
        name = re.sub(r"decoder\.rnn\.(\w+)", r"lstm.\1_l0", name)
        weights[name] = value.numpy()
    return weights


class SpeechProbability:
    """Speech probabilities of one stream, block by block; keeps its state between calls.

    What is very quiet is brought up first, since the network takes speech below -40 dB for silence;
    noise it takes for noise at any level. Where somebody has spoken up, quiet voices behind that
    stay quiet for a minute.
    """

    def __init__(self) -> None:
        self._state = (np.zeros(_WIDTH, np.float32), np.zeros(_WIDTH, np.float32))
        self._tail = np.zeros(_CONTEXT, np.float32)
        self._peak = 0.0  # of what came before, fading

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Float32 samples, a multiple of 512, at 16 kHz -> one probability per 512 samples.

        Raises:
            ValueError: the number of samples is not a multiple of 512.
        """
        if len(samples) % FRAME:
            raise ValueError(f"expected a multiple of {FRAME} samples, found {len(samples)}")
        if not len(samples):
            return np.zeros(0, np.float32)
        joined = np.concatenate([self._tail, samples])
        self._tail = joined[-_CONTEXT:].copy()
        pieces = np.lib.stride_tricks.sliding_window_view(joined, _CONTEXT + FRAME)[::FRAME]
        gains = self._gains(samples)
        if (gains > 1).any():
            pieces = pieces * gains[:, None]
        probabilities, self._state = _network()(pieces, self._state)
        return probabilities

    def _gains(self, samples: np.ndarray) -> np.ndarray:
        """What each frame is multiplied by, float32 [frame]."""
        peaks = np.abs(samples).reshape(-1, FRAME).max(axis=1)
        # The highest peak so far, each fading with time: as a running maximum of logarithms.
        fading = np.arange(len(peaks) + 1) * _FADING
        highest = np.log(np.maximum(np.concatenate([[self._peak], peaks]), 1e-9)) + fading
        highest = np.exp(np.maximum.accumulate(highest) - fading)
        self._peak = float(highest[-1])
        gains: np.ndarray = gain_for(highest[1:]).astype(np.float32)
        return gains


def speech_bounds(samples: np.ndarray, *, threshold: float = 0.5) -> tuple[float, float] | None:
    """First and last moment of speech in a clip, in seconds; None if there is none."""
    padding = -len(samples) % FRAME
    probabilities = SpeechProbability()(np.pad(samples, (0, padding)))
    speech = np.flatnonzero(probabilities >= threshold)
    if not len(speech):
        return None
    end = min((speech[-1] + 1) * FRAME, len(samples))
    return float(speech[0] * FRAME / SAMPLE_RATE), float(end / SAMPLE_RATE)
