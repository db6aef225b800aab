"""Where speech is: Silero VAD probabilities for many frames at once, and hysteresis over them.

The network and its weights are Silero VAD 6 (MIT, https://github.com/snakers4/silero-vad), read
from the `silero-vad` package. Only its LSTM is sequential; everything before it runs over all
frames of a block in one batch, which is several times faster than frame by frame and gives the
same probabilities.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mmtransfer.audio import SAMPLE_RATE

FRAME = 512
"""Samples per probability (32 ms)."""
_CONTEXT = 64  # samples of the frame before that the network sees


class _SileroNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(
        self, frames: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Frames [frame, context + 512] in order -> probabilities [frame], LSTM state."""
        x = functional.pad(frames, (0, 64), mode="reflect").unsqueeze(1)
        real, imaginary = self.stft_conv(x).chunk(2, dim=1)
        x = (real**2 + imaginary**2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        hidden, state = self.lstm(x.squeeze(-1), state)
        return self.final_conv(hidden.relu().unsqueeze(-1)).sigmoid().flatten(), state


@lru_cache(maxsize=1)
def _network() -> _SileroNetwork:
    # The scripted model carries the current weights (the package's safetensors file holds others).
    scripted = torch.jit.load(str(files("silero_vad") / "data" / "silero_vad.jit"))
    weights = {}
    for name, value in scripted.state_dict().items():
        if not name.startswith("_model."):  # a second network, for 8 kHz
            continue
        name = name.removeprefix("_model.").replace("stft.forward_basis_buffer", "stft_conv.weight")
        name = re.sub(r"encoder\.(\d)\.reparam_conv", lambda m: f"conv{int(m[1]) + 1}", name)
        name = name.replace("decoder.decoder.2", "final_conv")
        # nn.LSTM names its only layer `_l0`, where an LSTM cell has no suffix.
        name = re.sub(r"decoder\.rnn\.(\w+)", r"lstm.\1_l0", name)
        weights[name] = value
    network = _SileroNetwork()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


class SpeechProbability:
    """Speech probabilities of one stream, block by block; keeps its state between calls."""

    def __init__(self) -> None:
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tail = torch.zeros(_CONTEXT)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Float32 samples, a multiple of 512, at 16 kHz -> one probability per 512 samples.

        Raises:
            ValueError: the number of samples is not a multiple of 512.
        """
        if len(samples) % FRAME:
            raise ValueError(f"expected a multiple of {FRAME} samples, found {len(samples)}")
        if not len(samples):
            return np.zeros(0, np.float32)
        joined = torch.cat([self._tail, torch.from_numpy(np.ascontiguousarray(samples))])
        self._tail = joined[-_CONTEXT:].clone()
        frames = joined.unfold(0, _CONTEXT + FRAME, FRAME)
        with torch.inference_mode():
            probabilities, self._state = _network()(frames, self._state)
        return probabilities.numpy()


def speech_bounds(samples: np.ndarray, *, threshold: float = 0.5) -> tuple[float, float] | None:
    """First and last moment of speech in a clip, in seconds; None if there is none."""
    padding = -len(samples) % FRAME
    probabilities = SpeechProbability()(np.pad(samples, (0, padding)))
    speech = np.flatnonzero(probabilities >= threshold)
    if not len(speech):
        return None
    end = min((speech[-1] + 1) * FRAME, len(samples))
    return float(speech[0] * FRAME / SAMPLE_RATE), float(end / SAMPLE_RATE)
