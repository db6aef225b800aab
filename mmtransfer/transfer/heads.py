"""What stands on a backbone: layer weighting, convolutions, pooling, classifier, CTC output.

Input is either a stack of hidden states [example, layer, position, width] with a mask [example,
position], or the same already pooled, [example, layer, width] with no mask.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mmtransfer.config import HeadConfig


def level(states: torch.Tensor) -> torch.Tensor:
    """Hidden states of several layers on one scale: each position to mean 0 and variance 1.

    Layers of one model differ in scale by orders of magnitude, and the largest would drown the
    others whatever their weights are (Peters et al. 2018, section 3.2).
    """
    return functional.layer_norm(states, states.shape[-1:])


class LayerMix(nn.Module):
    """A learned convex combination of layers (Peters et al. 2018, eq. 1; as in SUPERB)."""

    def __init__(self, layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[example, layer, ...] -> [example, ...]."""
        shares = self.weights.softmax(0).view(1, -1, *[1] * (states.ndim - 2))
        return (states * shares.to(states.dtype)).sum(1)


class ConvStack(nn.Module):
    """1-D convolutions over positions, each with ReLU and dropout; padding stays zero, so that it
    does not reach the positions beside it.
    """

    def __init__(self, width: int, config: HeadConfig):
        super().__init__()
        self.width = config.conv_width or width if config.conv_layers else width
        sizes = [width] + [self.width] * config.conv_layers
        self.layers = nn.ModuleList(
            nn.Conv1d(size, self.width, config.conv_kernel, padding=config.conv_kernel // 2)
            for size in sizes[:-1]
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[example, position, width] -> [example, position, self.width]."""
        shown = mask[:, :, None].to(states.dtype)
        for layer in self.layers:
            convolved = layer((states * shown).transpose(1, 2)).transpose(1, 2)
            states = self.dropout(functional.relu(convolved))
        return states


class Pooling(nn.Module):
    """Positions to one vector: mean, max, attention (Yang et al. 2016) or the first one."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.kind = kind
        self.query = nn.Linear(width, 1) if kind == "attention" else None

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[..., position, width], [..., position] -> [..., width]."""
        if self.query is not None:
            scores = self.query(states).squeeze(-1).float()
            shares = scores.masked_fill(~mask.bool(), -torch.inf).softmax(-1)
            return (states * shares[..., None].to(states.dtype)).sum(-2)
        return pool(states, mask, self.kind)


def pool(states: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    """The poolings without weights: [..., position, width], [..., position] -> [..., width]."""
    if kind == "first":
        return states[..., 0, :]
    shown = mask.bool()[..., None]
    if kind == "max":
        return states.masked_fill(~shown, -torch.inf).amax(-2)
    total = states.masked_fill(~shown, 0.0).sum(-2)
    return total / shown.sum(-2).clamp(min=1).to(states.dtype)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a batch of one, by the running statistics."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and len(features) == 1:
            return functional.batch_norm(
                features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(features)


def pools_before_cache(config: HeadConfig, layers: int) -> bool:
    """Whether pooled vectors carry all that the head needs of the backbone's states.

    Pooling commutes with the weighting of layers if it is linear, or if there is one layer.
    """
    linear = config.pooling in ("mean", "first")
    return not config.conv_layers and (linear or (config.pooling == "max" and layers == 1))


class ClassifierHead(nn.Module):
    """Pooled features to class logits.

    With `feature_norm: l2`, `batch_norm` and `relu` this is the regularised classifier:
    L2-normalised features, batch norm, ReLU, dropout, linear.
    """

    def __init__(self, width: int, layers: int, classes: int, config: HeadConfig):
        super().__init__()
        self.mix = LayerMix(layers) if layers > 1 else None
        self.conv = ConvStack(width, config)
        self.pooling = Pooling(self.conv.width, config.pooling)
        self.l2 = config.feature_norm == "l2"
        self.norm = _BatchNorm(self.conv.width) if config.batch_norm else None
        self.relu = config.relu
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(self.conv.width, classes)

    def features(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Pooled features [example, width], before any normalisation."""
        if mask is None:  # pooled, and on one scale before that
            return self.mix(states) if self.mix is not None else states[:, 0]
        mixed = self.mix(level(states)) if self.mix is not None else states[:, 0]
        return self.pooling(self.conv(mixed, mask), mask)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits [example, class]."""
        features = self.features(states, mask)
        if self.l2:
            features = functional.normalize(features.float(), dim=-1)
        if self.norm is not None:
            features = self.norm(features)
        if self.relu:
            features = functional.relu(features)
        return self.output(self.dropout(features))


class CtcHead(nn.Module):
    """Frames to symbol logits for connectionist temporal classification (Graves et al. 2006)."""

    def __init__(self, width: int, layers: int, symbols: int, config: HeadConfig):
        super().__init__()
        self.mix = LayerMix(layers) if layers > 1 else None
        self.conv = ConvStack(width, config)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(self.conv.width, symbols)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [example, frame, symbol]."""
        mixed = self.mix(level(states)) if self.mix is not None else states[:, 0]
        return self.output(self.dropout(self.conv(mixed, mask)))
