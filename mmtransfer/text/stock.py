"""Heads of this package as those that sequence classifiers of transformers have, so that plain
pipelines take the model: the same logits, up to rounding.

Theirs are a dense layer on the first position, an activation, and the output layer. What they can
express so is decided here, by the head's settings and the architecture alone.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtransfer.config import HeadConfig
from mmtransfer.transfer.heads import ClassifierHead

_HEADS = {
    "bert": ("bert.pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "camembert": ("classifier.dense", "classifier.out_proj", "tanh"),
    "mpnet": ("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu"),
    "roformer": ("classifier.dense", "classifier.out_proj", "hidden_act"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}
"""By architecture: names of the two layers of its classifier, and what is between them. The last
operation of each encoder is a LayerNorm, which bounds what the head gets."""
_STEEP = 2.0**-10  # of a tanh: below, it is the identity to a share of 3e-7
_FLAT = 8.0  # of a GELU: above, it is the identity in float32


def is_stock(config: HeadConfig, encoder: Any) -> bool:
    """Whether a sequence classifier of transformers can have a head with these settings, on that
    encoder of the library.
    """
    between = _activation(encoder.config)
    is_plain = config.layers == "last" and config.pooling == "first"
    if between is None or not is_plain or config.feature_norm != "none":
        return False
    if not config.conv_layers:
        return between == "relu" or not config.relu
    # A convolution over one position is a dense layer with ReLU, of which there is one.
    is_dense = config.conv_layers == config.conv_kernel == 1
    is_wide = config.conv_width in (None, encoder.config.hidden_size)
    return is_dense and is_wide and between == "relu" and not (config.relu and config.batch_norm)


def write_stock(
    folder: Path, encoder: Any, head: ClassifierHead, labels: list[str], temperature: float
) -> None:
    """Write an encoder with a head that `is_stock` as a sequence classifier of transformers, which
    gives calibrated probabilities.
    """
    from transformers import AutoModelForSequenceClassification

    config = deepcopy(encoder.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}
    with torch.device("meta"):  # every weight is given
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    wanted, prefix = model.state_dict(), model.base_model_prefix
    state = {f"{prefix}.{name}": value for name, value in encoder.state_dict().items()}
    state = {name: value for name, value in state.items() if name in wanted}
    dense, output, _ = _HEADS[config.model_type]
    for name, (weight, bias) in zip((dense, output), _layers(encoder, head), strict=True):
        share = temperature if name == output else 1.0
        state |= {f"{name}.weight": weight / share, f"{name}.bias": bias / share}
    state = {name: value.detach().cpu().float().contiguous() for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)


def _activation(config: Any) -> str | None:
    """What is between the two layers of an architecture's classifier, if that is known."""
    between = _HEADS.get(config.model_type, ("", "", None))[2]
    found = config.hidden_act if between == "hidden_act" else between
    return found if found in ("tanh", "gelu", "relu") else None


_Layer = tuple[torch.Tensor, torch.Tensor]


def _layers(encoder: Any, head: ClassifierHead) -> tuple[_Layer, _Layer]:
    """(weight, bias) of the dense and of the output layer, in float64."""
    weight, bias = _parameters(head.output)
    share, shift = _affine(head.norm, weight.shape[1])
    if len(head.conv.layers):
        kernel, first = _parameters(head.conv.layers[0])
        return (kernel[:, :, 0], first), (weight * share, bias + weight @ shift)
    if head.relu:
        return (share.diag(), shift), (weight, bias)
    # Without an activation of our own: where theirs is the identity.
    bound = share.abs() * _bound(encoder) + shift.abs()
    if _activation(encoder.config) == "tanh":
        small = 2.0 ** (_STEEP / bound.clamp(min=1e-6)).log2().floor()
        return ((share * small).diag(), shift * small), (weight / small, bias)
    high = bound + _FLAT
    return (share.diag(), shift + high), (weight, bias - weight @ high)


def _parameters(part: Any) -> _Layer:
    return part.weight.detach().double().cpu(), part.bias.detach().double().cpu()


def _affine(norm: nn.BatchNorm1d | None, width: int) -> _Layer:
    """Factor and summand of a batch normalisation by its running statistics."""
    if norm is None:
        return torch.ones(width, dtype=torch.double), torch.zeros(width, dtype=torch.double)
    weight, bias = _parameters(norm)
    statistics: list[Any] = [norm.running_mean, norm.running_var]
    mean, variance = (value.double().cpu() for value in statistics)
    share = weight / (variance + norm.eps).sqrt()
    return share, bias - mean * share


def _bound(encoder: Any) -> torch.Tensor:
    """The largest value that an encoder's last LayerNorm can give, by unit."""
    weight, bias = _parameters([x for x in encoder.modules() if isinstance(x, nn.LayerNorm)][-1])
    return weight.abs() * (len(weight) - 1) ** 0.5 + bias.abs()
