"""A backbone with a head, run whole or from cached activations, and how it is kept on disk.

A finished transfer is saved in the smallest form that holds it: `full` (all weights), `adapter` (a
peft adapter and the head) or `head` (the head alone); the last two name the base they stand on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmtransfer.config import HeadConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.loading import check_finite
from mmtransfer.hub.metadata import Base
from mmtransfer.transfer.encoders import SpeechEncoder, TextEncoder
from mmtransfer.transfer.features import weights_digest
from mmtransfer.transfer.heads import ClassifierHead, CtcHead, level, pool, pools_before_cache
from mmtransfer.transfer.stages import Layout, rest_of

_HEAD = "head.safetensors"


class Network(nn.Module):
    """An encoder and what stands on it.

    `head` is None where the encoder's model carries its own classification head. `layers` are the
    layers that the head reads.
    """

    def __init__(
        self,
        encoder: TextEncoder | SpeechEncoder,
        head: ClassifierHead | CtcHead | None,
        config: HeadConfig,
    ):
        super().__init__()
        self.encoder, self.head, self.config = encoder, head, config
        self.layers = head_layers(config, encoder.depth)

    def forward(self, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Logits, from the encoder's inputs and a mask [example, position] of its states."""
        if self.head is None:
            return self._text_encoder.logits(inputs)
        states = self.encoder.hidden_states(self.layers, inputs)
        return self.head(torch.stack([states[layer] for layer in self.layers], 1), mask)

    def layout(self) -> Layout:
        """Its modules from input to output."""
        encoder = self.encoder
        new: list[nn.Module] = encoder.own_head if self.head is None else [self.head]
        return Layout(encoder_levels(encoder), encoder.depth, new, encoder.fixed)

    @property
    def _text_encoder(self) -> TextEncoder:
        if not isinstance(self.encoder, TextEncoder):
            raise TypeError("only text encoders carry a head of their own")
        return self.encoder

    # --- cached activations -----------------------------------------------------------------

    def stored_layers(self, frozen: int) -> list[int]:
        """Layers to keep of examples that passed the first `frozen` layers, highest last."""
        if frozen == self.encoder.depth:
            return [frozen] if self.head is None else self.layers
        if self.head is None:
            return [frozen]
        return [*(layer for layer in self.layers if layer < frozen), frozen]

    def stores_pooled(self, frozen: int) -> bool:
        """Whether pooled vectors are all that is needed."""
        return (
            frozen == self.encoder.depth
            and isinstance(self.head, ClassifierHead)
            and pools_before_cache(self.config, len(self.layers))
        )

    def prefix(
        self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, frozen: int
    ) -> torch.Tensor:
        """What is to be stored: [example, layer, position, width], or [example, layer, width]."""
        if self.head is None and frozen == self.encoder.depth:
            return self._text_encoder.last_before_norm(inputs)[:, None]
        kept = self.stored_layers(frozen)
        states = self.encoder.hidden_states(kept, inputs)
        stacked = torch.stack([states[layer] for layer in kept], 1)
        if self.stores_pooled(frozen):
            if len(kept) > 1:
                stacked = level(stacked)
            return pool(stacked, mask[:, None].expand(-1, len(kept), -1), self.config.pooling)
        return stacked

    def forward_stored(
        self, stored: torch.Tensor, mask: torch.Tensor | None, frozen: int
    ) -> torch.Tensor:
        """Logits, from what `prefix` gave; equal to `forward`."""
        if self.head is None:
            return self._text_encoder.logits({"hidden": stored[:, -1], "mask": mask}, start=frozen)  # type: ignore[dict-item]
        return self.head(self._stack(stored, mask, frozen), mask)

    def _stack(self, stored: torch.Tensor, mask: torch.Tensor | None, frozen: int) -> torch.Tensor:
        if frozen == self.encoder.depth:
            return stored
        kept = self.stored_layers(frozen)
        states = dict(zip(kept, stored.unbind(1), strict=True))
        above = [layer for layer in self.layers if layer > frozen]
        if above:
            inputs = {"hidden": stored[:, -1], "mask": mask}
            states |= self.encoder.hidden_states(above, inputs, start=frozen)  # type: ignore[arg-type]
        return torch.stack([states[layer] for layer in self.layers], 1)

    def pooled(
        self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, *, frozen: int | None = None
    ) -> torch.Tensor:
        """Pooled features [example, width], the classifier's input; with `frozen`, from
        `inputs["stored"]`.
        """
        if not isinstance(self.head, ClassifierHead):
            raise UserError("A contrastive stage needs pooled features: set head.type: classifier.")
        if frozen is not None:
            return self.head.features(self._stack(inputs["stored"], mask, frozen), mask)
        states = self.encoder.hidden_states(self.layers, inputs)
        return self.head.features(torch.stack([states[n] for n in self.layers], 1), mask)


def encoder_levels(encoder: TextEncoder | SpeechEncoder) -> list[list[nn.Module]]:
    """What lies below the first layer, then the layers; final norm and pooler belong with the last
    one.
    """
    levels = [encoder.front, *([layer] for layer in encoder.layers)]
    levels[-1] = [*levels[-1], *rest_of(encoder.base, [m for level in levels for m in level])]
    return levels


def head_layers(config: HeadConfig, depth: int) -> list[int]:
    """Numbers of the layers that a head reads, in order.

    Raises:
        UserError: a layer that the backbone does not have.
    """
    if config.layers == "last":
        return [depth]
    if config.layers == "all":
        return list(range(depth + 1))
    wrong = [layer for layer in config.layers if not 0 <= layer <= depth]
    if wrong:
        raise UserError(f"head.layers: the backbone has layers 0 to {depth}, found {wrong[0]}.")
    return sorted(config.layers)


# --- on disk -------------------------------------------------------------------------------------


def encoder_digest(model: nn.Module) -> str:
    """Identity of a model by its weights."""
    return weights_digest([model])


def write_head(folder: Path, head: nn.Module) -> None:
    """Write a head's weights and buffers."""
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(state, folder / _HEAD)


def read_head(folder: Path, head: nn.Module) -> None:
    """Put the weights that `write_head` wrote into a head of the same shape.

    Raises:
        UserError: missing, damaged or not finite.
    """
    path = folder / _HEAD
    try:
        head.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be loaded as the model's head ({reason}).") from None
    check_finite(head, path)


def check_base(model: nn.Module, base: Base) -> None:
    """Make sure that the loaded base is the one that the transfer started from.

    Raises:
        UserError: other weights.
    """
    if base.digest and encoder_digest(model) != base.digest:
        raise UserError(
            f"{base.source}: its weights are not those this model was trained on. Load the "
            f"revision it names ({base.revision or 'of that time'})."
        )


def build_head(
    kind: str, width: int, depth: int, outputs: int, config: HeadConfig, seed: int
) -> ClassifierHead | CtcHead:
    """A new head with weights that depend on the seed only."""
    layers: Sequence[int] = head_layers(config, depth)
    factory = CtcHead if kind == "ctc" else ClassifierHead
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(width, len(layers), outputs, config)
