"""Backbones cut at a layer: the hidden states below it, and what lies above run from them.

Layers are counted from the input. Layer 0 stands for what lies below the first transformer layer:
embeddings, or the convolutional front of a speech encoder. `depth` is the number of transformer
layers, and the hidden states of layer `depth` are the encoder's output, its final norm included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmtransfer.errors import UserError

FRAMES_PER_SECOND = 50
"""Hidden states of a speech encoder."""
WAVE_ENCODERS = ("wav2vec2", "hubert", "wavlm")
"""Model types that read the waveform."""


class _Given(nn.Module):
    """Stands where a module was and returns what that would have computed."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self._value = value

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._value


class _Skipped(nn.Module):
    """Stands for no layer at all in DeBERTa, whose loop needs one."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return hidden, None


@contextmanager
def _replaced(owner: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


class TextEncoder(nn.Module):
    """A bidirectional text encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, ModernBERT, ...).

    The model's own forward pass is used on every path, so that masks, relative positions, pooler
    and classification head are the library's: to start at a layer, the embeddings are replaced by
    the given hidden states and the layers below are left out.

    `model` is the bare encoder, or a sequence-classification model around one.

    Raises:
        UserError: an architecture that cannot be cut at its layers.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        config = model.config
        self.width = int(config.hidden_size)
        self.depth = int(config.num_hidden_layers)
        self._owner, self._name = self._find_layers()
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
            raise UserError(
                f"{config.model_type}: expected a bidirectional text encoder (bert, roberta, "
                "distilbert, electra, mpnet, modernbert, ...), found a model that generates."
            )

    @property
    def base(self) -> Any:
        """The bare encoder."""
        return self.model.base_model

    def _find_layers(self) -> tuple[nn.Module, str]:
        base = self.base
        for path in ("encoder.layer", "transformer.layer", "layers", "encoder.layers"):
            *owners, name = path.split(".")
            owner: Any = base
            for part in owners:
                owner = getattr(owner, part, None)
            found = getattr(owner, name, None)
            # DeBERTa v2's convolution is tied to the position of the first layer.
            whole = hasattr(base, "embeddings") and getattr(owner, "conv", None) is None
            if whole and isinstance(found, nn.ModuleList) and len(found) == self.depth:
                return owner, name
        raise UserError(
            f"{base.config.model_type}: this architecture cannot be cut at its layers; expected a "
            "text encoder such as bert, roberta, distilbert, electra, mpnet or modernbert."
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        found: nn.ModuleList = getattr(self._owner, self._name)
        return found

    @property
    def front(self) -> list[nn.Module]:
        """What lies below the first layer."""
        names = ("embeddings", "embeddings_project", "rotary_emb")
        own = [getattr(self.base, name) for name in names if hasattr(self.base, name)]
        # Relative position tables are read by every layer, so they lie below the first.
        shared = ("relative_attention_bias", "rel_embeddings", "LayerNorm")
        return own + [getattr(self._owner, name) for name in shared if hasattr(self._owner, name)]

    def hidden_states(
        self, keep: Sequence[int], inputs: dict[str, torch.Tensor], *, start: int | None = None
    ) -> dict[int, torch.Tensor]:
        """Hidden states [text, position, width] of the layers in `keep`.

        `inputs` is what the tokenizer gives. With `start` it is `{"hidden": states of that layer,
        "mask": [text, position]}` instead. No layer above the highest kept one is run.
        """
        states: dict[int, torch.Tensor] = {}
        stop = max(keep)
        if start is not None and start in keep:
            states[start] = inputs["hidden"]
        if start is not None and stop <= start:
            return states
        layers = self.layers
        with ExitStack() as stack:
            for index in keep:
                if index == 0 and start is None:
                    entry = getattr(self.base, "embeddings_project", self.base.embeddings)
                    stack.enter_context(_captured(entry, states, 0))
                elif (start or 0) < index < self.depth:
                    stack.enter_context(_captured(layers[index - 1], states, index))
            arguments = self._cut(stack, inputs, start, stop)
            output = self.base(**arguments).last_hidden_state
        if stop == self.depth:
            states[stop] = output
        return states

    def logits(self, inputs: dict[str, torch.Tensor], *, start: int | None = None) -> torch.Tensor:
        """Logits [text, class] of the model's own classification head.

        `inputs` as for `hidden_states`; the last layer's states are those before a final norm, as
        `last_before_norm` gives them.
        """
        with ExitStack() as stack:
            return self.model(**self._cut(stack, inputs, start, self.depth)).logits

    def last_before_norm(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """States of the last layer as `logits` takes them."""
        states: dict[int, torch.Tensor] = {}
        with _captured(self.layers[-1], states, self.depth):
            self.base(**inputs)
        return states[self.depth]

    def _cut(
        self, stack: ExitStack, inputs: dict[str, torch.Tensor], start: int | None, stop: int
    ) -> dict[str, torch.Tensor]:
        """Leave layers out for as long as `stack` lives; returns the model's arguments."""
        first = start or 0
        if first > 0 or stop < self.depth:
            part = nn.ModuleList(self.layers[first:stop])
            if not len(part) and self.base.config.model_type.startswith("deberta"):
                part.append(_Skipped())
            stack.enter_context(_replaced(self._owner, self._name, part))
        if start is None:
            return inputs
        given = _Given(inputs["hidden"])
        stack.enter_context(_replaced(self.base, "embeddings", given))
        if hasattr(self.base, "embeddings_project"):
            stack.enter_context(_replaced(self.base, "embeddings_project", nn.Identity()))
        return {"inputs_embeds": inputs["hidden"], "attention_mask": inputs["mask"]}


@contextmanager
def _captured(module: nn.Module, states: dict[int, torch.Tensor], index: int) -> Iterator[None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states[index] = output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


class SpeechEncoder(nn.Module):
    """Whisper's encoder, or a wav2vec 2.0, HuBERT or WavLM model.

    Input is `{"features": log-mel [clip, mel, frame]}` for Whisper and `{"values": waveform [clip,
    sample]}` for the others; hidden states are [clip, frame, width], 50 frames a second. Clips of
    a batch have one length, so there are no masks.

    Raises:
        UserError: another architecture.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        config = model.config
        self.kind = config.model_type
        if self.kind == "whisper":
            self.width, self.depth = int(config.d_model), int(config.encoder_layers)
        elif self.kind in WAVE_ENCODERS and getattr(model, "adapter", None) is None:
            self.width, self.depth = int(config.hidden_size), int(config.num_hidden_layers)
        else:
            raise UserError(
                f"{self.kind}: expected a speech encoder (whisper, {', '.join(WAVE_ENCODERS)})."
            )
        self._ends_in_norm = self.kind == "whisper" or config.do_stable_layer_norm

    @property
    def _stack(self) -> Any:
        return self.model if self.kind == "whisper" else self.model.encoder

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        found: nn.ModuleList = self._stack.layers
        return found

    @property
    def front(self) -> list[nn.Module]:
        """What lies below the first layer."""
        if self.kind == "whisper":
            return [self.model.conv1, self.model.conv2, self.model.embed_positions]
        stack = self._stack
        modules = [self.model.feature_extractor, self.model.feature_projection]
        modules += [stack.pos_conv_embed, stack.dropout]
        return modules if self._ends_in_norm else [*modules, stack.layer_norm]

    def _front(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.kind == "whisper":
            return whisper_front(self.model, inputs["features"])
        stack = self._stack
        frames = self.model.feature_extractor(inputs["values"]).transpose(1, 2)
        projected = self.model.feature_projection(frames)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        hidden = hidden + stack.pos_conv_embed(hidden)
        if not self._ends_in_norm:
            hidden = stack.layer_norm(hidden)
        return stack.dropout(hidden)

    def hidden_states(
        self, keep: Sequence[int], inputs: dict[str, torch.Tensor], *, start: int | None = None
    ) -> dict[int, torch.Tensor]:
        """Hidden states of the layers in `keep`.

        With `start`, `inputs` is `{"hidden": states of that layer}` instead of the clips. No layer
        above the highest kept one is run.
        """
        hidden = self._front(inputs) if start is None else inputs["hidden"]
        start = start or 0
        states = {start: hidden} if start in keep else {}
        stop = max(keep)
        # WavLM computes its position bias in the first layer and hands it on.
        bias = None
        if self.kind == "wavlm":
            frames = hidden.shape[1]
            first: Any = self.layers[0]
            bias = first.attention.compute_bias(frames, frames)
            bias = bias.unsqueeze(0).repeat(len(hidden), 1, 1, 1).view(-1, frames, frames)
        for index in range(start + 1, stop + 1):
            layer = self.layers[index - 1]
            if self.kind == "wavlm":
                hidden, bias = layer(hidden, position_bias=bias, index=index - 1)
            else:
                hidden = layer(hidden, None)
            if index == self.depth and self._ends_in_norm:
                hidden = self._stack.layer_norm(hidden)
            if index in keep:
                states[index] = hidden
        return states

    def frames(self, samples: int) -> int:
        """Output frames of a clip of that many 16-kHz samples."""
        if self.kind == "whisper":
            return -(-samples // 320)
        return max(1, int(self.model._get_feat_extract_output_lengths(samples)))


def whisper_front(encoder: Any, features: torch.Tensor) -> torch.Tensor:
    """What enters the first layer of a Whisper encoder: [clip, mel, frame] -> [clip, frame / 2,
    width], for any number of frames up to its window.
    """
    hidden = functional.gelu(encoder.conv1(features))
    hidden = functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    # The mode of the front itself: it can be frozen while layers above it are trained.
    return functional.dropout(hidden, p=encoder.dropout, training=encoder.conv1.training)
