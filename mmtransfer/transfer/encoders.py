"""Backbones cut at a layer: the hidden states below it, and what lies above run from them.

Layers are counted from the input. Layer 0 stands for what lies below the first transformer layer:
embeddings, or the convolutional front of a speech encoder. `depth` is the number of transformer
layers, and the hidden states of layer `depth` are the encoder's output, its final norm included.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mmtransfer.data.files import read_object
from mmtransfer.errors import UserError
from mmtransfer.hub.loading import load_weights
from mmtransfer.transfer.filterbank import FRAME, HOP, filterbank, frame_count
from mmtransfer.transfer.stages import rest_of

ENCODER_FRAMES_PER_SECOND = 50
"""Hidden states of a Whisper's encoder."""
_RATE = 16_000
_SHORTEST = 480  # samples; of fewer than two frames there is no variance


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


class _OneAtATime:
    """A lock that is not copied with what it guards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_OneAtATime], tuple[()]]:
        return _OneAtATime, ()


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
    the given hidden states and the layers below are left out. Meanwhile other threads wait: they
    would take each other's states for their own.

    `model` is the bare encoder, or a sequence-classification model around one.

    Raises:
        UserError: an architecture that cannot be cut at its layers.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.fixed: list[nn.Module] = []
        self._forward_pass = _OneAtATime()
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

    @property
    def own_head(self) -> list[nn.Module]:
        """The model's own classification head."""
        return rest_of(self.model, [self.base])

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
        with self._forward_pass, ExitStack() as stack:
            layers = self.layers
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
        with self._forward_pass, ExitStack() as stack:
            return self.model(**self._cut(stack, inputs, start, self.depth)).logits

    def last_before_norm(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """States of the last layer as `logits` takes them."""
        states: dict[int, torch.Tensor] = {}
        with self._forward_pass, _captured(self.layers[-1], states, self.depth):
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


class SpeechEncoder(nn.Module, ABC):
    """A speech encoder, one subclass for each family; see `ENCODERS`.

    What it takes is what its own `inputs` makes of clips; hidden states are [clip, frame, width].
    Clips of a batch have one length.
    """

    width: int
    depth: int
    has_library_ctc: ClassVar[bool] = False
    """Whether transformers has a CTC model around it with a vocabulary of symbols, so that a plain
    output layer is saved as that.
    """
    fixed: list[nn.Module]
    """Modules that are never trained."""
    input_samples: int | None = None
    """Samples that its input holds, where that has one length; what is shorter is padded."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.fixed = []

    @property
    def base(self) -> Any:
        """The model itself."""
        return self.model

    @property
    def own_head(self) -> list[nn.Module]:
        """None: heads are new."""
        return []

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""

    @property
    @abstractmethod
    def front(self) -> list[nn.Module]:
        """What lies below the first layer."""

    @abstractmethod
    def inputs(
        self, extractor: Any, clips: Sequence[np.ndarray], samples: int
    ) -> dict[str, torch.Tensor]:
        """What it takes, of 16-kHz clips padded with silence or cut to so many samples; log-mels
        are called `features` [clip, mel, frame].
        """

    @abstractmethod
    def enter(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What enters the first layer [clip, frame, width]."""

    @abstractmethod
    def run(
        self, hidden: torch.Tensor, start: int, stop: int, inputs: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """States of the layers above `start` up to `stop`, those of the last one with the final
        norm.
        """

    @abstractmethod
    def frames(self, samples: int) -> int:
        """Output frames of a clip of that many 16-kHz samples."""

    def hidden_states(
        self, keep: Sequence[int], inputs: dict[str, torch.Tensor], *, start: int | None = None
    ) -> dict[int, torch.Tensor]:
        """Hidden states of the layers in `keep`.

        With `start`, `inputs` is `{"hidden": states of that layer}` instead of the clips. No layer
        above the highest kept one is run.
        """
        hidden = self.enter(inputs) if start is None else inputs["hidden"]
        first, stop = start or 0, max(keep)
        states = {first: hidden} if first in keep else {}
        for index, state in enumerate(self.run(hidden, first, stop, inputs), first + 1):
            if index in keep:
                states[index] = state
        return states

    # --- as transformers keeps it ------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, classes: Sequence[str]) -> Any:
        """The bare encoder of a checkpoint folder; `classes` are what it was saved from."""
        from transformers import AutoModel

        return load_weights(AutoModel, folder)

    @classmethod
    def take_apart(cls, model: Any) -> tuple[Any, dict[str, torch.Tensor], float]:
        """A CTC model of transformers as (encoder, weight and bias of its output layer, dropout
        before that).
        """
        return model.base_model, model.lm_head.state_dict(), float(model.config.final_dropout)

    @classmethod
    def symbols(cls, folder: Path) -> list[str]:
        """Output symbols of a CTC model of transformers, by number; `|` stands between words."""
        vocabulary = read_object(folder / "vocab.json")
        numbers = list(vocabulary.values())
        if not all(type(n) is int for n in numbers) or len(set(numbers)) < len(numbers):
            raise UserError(f"{folder / 'vocab.json'}: expected symbols, each with its number.")
        return sorted(vocabulary, key=lambda symbol: vocabulary[symbol])

    def put_together(self, output: nn.Linear, blank: int, dropout: float) -> Any:
        """The CTC model of transformers of this encoder and an output layer."""
        from transformers import AutoModelForCTC

        config = self.model.config
        config.vocab_size, config.pad_token_id = output.out_features, blank
        config.final_dropout = dropout
        model = AutoModelForCTC.from_config(config, trust_remote_code=False)
        model.base_model.load_state_dict(self.model.state_dict())
        model.lm_head.load_state_dict(output.state_dict())
        return model


class WhisperEncoder(SpeechEncoder):
    """Whisper's encoder (Radford et al. 2022). Input is `{"features": log-mel}`; the table of
    positions is cut to the frames there are. 50 states a second.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.width, self.depth = int(model.config.d_model), int(model.config.encoder_layers)
        self.fixed = [model.embed_positions]

    @classmethod
    def load(cls, folder: Path, classes: Sequence[str]) -> Any:
        """The encoder of a whole Whisper, or one that was saved alone."""
        from transformers import AutoModel
        from transformers.models.whisper import modeling_whisper

        if list(classes) == ["WhisperEncoder"]:
            return load_weights(modeling_whisper.WhisperEncoder, folder)
        return load_weights(AutoModel, folder).get_encoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        found: nn.ModuleList = self.model.layers
        return found

    @property
    def front(self) -> list[nn.Module]:
        """Convolutions and positions."""
        return [self.model.conv1, self.model.conv2, self.model.embed_positions]

    def inputs(
        self, extractor: Any, clips: Sequence[np.ndarray], samples: int
    ) -> dict[str, torch.Tensor]:
        """Log-mels of padded clips."""
        features = extractor(
            list(clips),
            sampling_rate=_RATE,
            max_length=samples,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_features
        return {"features": features}

    def enter(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[clip, mel, frame] -> [clip, frame / 2, width], for any number of frames up to the
        window.
        """
        model = self.model
        hidden = functional.gelu(model.conv1(inputs["features"]))
        hidden = functional.gelu(model.conv2(hidden)).transpose(1, 2)
        hidden = hidden + model.embed_positions.weight[: hidden.shape[1]]
        # The mode of the front itself: it can be frozen while layers above it are trained.
        return functional.dropout(hidden, p=model.dropout, training=model.conv1.training)

    def run(
        self, hidden: torch.Tensor, start: int, stop: int, inputs: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """States layer by layer."""
        for index in range(start, stop):
            hidden = self.layers[index](hidden, None)
            yield self.model.layer_norm(hidden) if index + 1 == self.depth else hidden

    def frames(self, samples: int) -> int:
        """One for each 320 samples."""
        return -(-samples // 320)


class WaveEncoder(SpeechEncoder):
    """wav2vec 2.0 (Baevski et al. 2020) and HuBERT (Hsu et al. 2021). Input is `{"values": waveform
    [clip, sample]}`.

    Raises:
        UserError: one with an adapter of its own above the layers.
    """

    has_library_ctc = True

    def __init__(self, model: Any):
        super().__init__(model)
        config = model.config
        if getattr(model, "adapter", None) is not None:
            raise UserError(
                f"{config.model_type}: expected a speech encoder without layers of its own above "
                "the transformer (add_adapter), found one with them."
            )
        self.width, self.depth = int(config.hidden_size), int(config.num_hidden_layers)
        self._ends_in_norm = bool(config.do_stable_layer_norm)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        found: nn.ModuleList = self.model.encoder.layers
        return found

    @property
    def front(self) -> list[nn.Module]:
        """Convolutions, projection, positions."""
        stack = self.model.encoder
        modules = [self.model.feature_extractor, self.model.feature_projection]
        modules += [stack.pos_conv_embed, stack.dropout]
        return modules if self._ends_in_norm else [*modules, stack.layer_norm]

    def inputs(
        self, extractor: Any, clips: Sequence[np.ndarray], samples: int
    ) -> dict[str, torch.Tensor]:
        """Waveforms, normalised before padding, so that the result does not depend on it."""
        rows = np.zeros((len(clips), samples), np.float32)
        for row, clip in zip(rows, clips, strict=True):
            values = extractor(clip[:samples], sampling_rate=_RATE).input_values[0]
            row[: len(values)] = values
        return {"values": torch.from_numpy(rows)}

    def enter(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[clip, sample] -> [clip, frame, width]."""
        stack = self.model.encoder
        frames = self.model.feature_extractor(inputs["values"]).transpose(1, 2)
        projected = self.model.feature_projection(frames)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        hidden = hidden + stack.pos_conv_embed(hidden)
        if not self._ends_in_norm:
            hidden = stack.layer_norm(hidden)
        return stack.dropout(hidden)

    def run(
        self, hidden: torch.Tensor, start: int, stop: int, inputs: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """States layer by layer."""
        for index in range(start, stop):
            hidden = self.layers[index](hidden, None)
            yield self._finished(hidden, index)

    def _finished(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        is_last = index + 1 == self.depth and self._ends_in_norm
        return self.model.encoder.layer_norm(hidden) if is_last else hidden

    def frames(self, samples: int) -> int:
        """As the convolutions give."""
        return max(1, int(self.model._get_feat_extract_output_lengths(samples)))


class WavLmEncoder(WaveEncoder):
    """WavLM (Chen et al. 2022), whose first layer computes a position bias and hands it on."""

    def run(
        self, hidden: torch.Tensor, start: int, stop: int, inputs: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """States layer by layer."""
        frames = hidden.shape[1]
        first: Any = self.layers[0]
        bias = first.attention.compute_bias(frames, frames)
        bias = bias.unsqueeze(0).repeat(len(hidden), 1, 1, 1).view(-1, frames, frames)
        for index in range(start, stop):
            hidden, bias = self.layers[index](hidden, position_bias=bias, index=index)
            yield self._finished(hidden, index)


class FastConformerEncoder(SpeechEncoder):
    """Parakeet's FastConformer (Rekesh et al. 2023). Input is `{"features": log-mel, "shown": which
    frames hold the clip [clip, frame]}`; eight frames become one state, 12.5 a second. What pads a
    clip is masked on the way.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.width = int(model.config.hidden_size)
        self.depth = int(model.config.num_hidden_layers)

    @classmethod
    def take_apart(cls, model: Any) -> tuple[Any, dict[str, torch.Tensor], float]:
        """Its output layer is a convolution over single states."""
        head = model.ctc_head
        output = {"weight": head.weight.detach()[:, :, 0], "bias": head.bias.detach()}
        return model.encoder, output, 0.0

    @classmethod
    def symbols(cls, folder: Path) -> list[str]:
        """Pieces of words; SentencePiece's mark of a word's beginning is the space before it."""
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        return [piece.replace("▁", "|") for piece in sorted(vocabulary, key=vocabulary.__getitem__)]

    @property
    def layers(self) -> nn.ModuleList:
        """The conformer blocks."""
        found: nn.ModuleList = self.model.layers
        return found

    @property
    def front(self) -> list[nn.Module]:
        """Subsampling and positions."""
        return [self.model.subsampling, self.model.encode_positions]

    def inputs(
        self, extractor: Any, clips: Sequence[np.ndarray], samples: int
    ) -> dict[str, torch.Tensor]:
        """Log-mels, normalised over the clip alone."""
        long_enough = [np.pad(c[:samples], (0, max(0, _SHORTEST - len(c)))) for c in clips]
        found = extractor(
            long_enough,
            sampling_rate=_RATE,
            max_length=samples,
            padding="max_length",
            return_tensors="pt",
        )
        frames = samples // 160  # beyond, there is one that holds no clip
        return {
            "features": found.input_features[:, :frames].transpose(1, 2),
            "shown": found.attention_mask[:, :frames],
        }

    def enter(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[clip, mel, frame] -> [clip, frame / 8, width]."""
        model = self.model
        hidden = model.subsampling(inputs["features"].transpose(1, 2), inputs["shown"])
        training = model.subsampling.training
        return functional.dropout(hidden * model.input_scale, model.dropout, training=training)

    def run(
        self, hidden: torch.Tensor, start: int, stop: int, inputs: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """States block by block."""
        model, frames = self.model, hidden.shape[1]
        positions = model.encode_positions(hidden)
        positions = functional.dropout(positions, model.dropout_positions, training=model.training)
        if "shown" in inputs:
            shown = model._get_output_attention_mask(inputs["shown"], target_length=frames)
        else:
            shown = inputs["mask"].bool()
        rows = shown[:, None].expand(-1, frames, -1)
        mask = (rows & rows.transpose(1, 2))[:, None]
        for index in range(start, stop):
            hidden = self.layers[index](hidden, attention_mask=mask, position_embeddings=positions)
            yield hidden

    def frames(self, samples: int) -> int:
        """As the subsampling gives."""
        mels = torch.tensor(max(samples, _SHORTEST) // 160)
        return int(self.model._get_subsampling_output_length(mels))


class SpectrogramEncoder(SpeechEncoder):
    """Audio Spectrogram Transformer (Gong et al. 2021). Input is `{"features": log-mel}` of one
    length, whatever a clip's: 1024 frames of 10 ms in those of AudioSet.

    A spectrogram is cut into patches; states are those of the two tokens that stand for the whole
    and of the patches, which come in the order of time here, all bands of a moment together: the
    patches of a clip that is shorter than the input come first.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        config = model.config
        self.width, self.depth = int(config.hidden_size), int(config.num_hidden_layers)
        self._bands, self._moments = model.embeddings.get_shape(config)
        self._mels, self._frames = int(config.num_mel_bins), int(config.max_length)
        self.input_samples = FRAME + (self._frames - 1) * HOP

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        found: nn.ModuleList = self.model.layers
        return found

    @property
    def front(self) -> list[nn.Module]:
        """Patches, positions and the two tokens."""
        return [self.model.embeddings]

    def inputs(
        self, extractor: Any, clips: Sequence[np.ndarray], samples: int
    ) -> dict[str, torch.Tensor]:
        """Log-mels, padded with zeros before they are scaled, as the model's own extractor does."""
        rows = torch.zeros(len(clips), self._frames, self._mels)
        for row, clip in zip(rows, clips, strict=True):
            found = filterbank(clip[: self.input_samples], self._mels)
            row[: len(found)] = found
        if extractor.do_normalize:
            rows = (rows - extractor.mean) / (2 * extractor.std)
        return {"features": rows.transpose(1, 2)}

    def enter(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[clip, mel, frame] -> [clip, 2 + patch, width]."""
        hidden = self.model.embeddings(inputs["features"].transpose(1, 2))
        patches = hidden[:, 2:].unflatten(1, (self._bands, self._moments))
        return torch.cat([hidden[:, :2], patches.transpose(1, 2).flatten(1, 2)], 1)

    def run(
        self, hidden: torch.Tensor, start: int, stop: int, inputs: dict[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """States layer by layer."""
        for index in range(start, stop):
            hidden = self.layers[index](hidden, None)
            yield self.model.layernorm(hidden) if index + 1 == self.depth else hidden

    def frames(self, samples: int) -> int:
        """The two tokens, and the patches of the moments that begin within the clip."""
        config = self.model.config
        found = min(frame_count(samples), self._frames) - config.patch_size
        return 2 + self._bands * max(1, found // config.time_stride + 1)


ENCODERS: dict[str, type[SpeechEncoder]] = {
    "whisper": WhisperEncoder,
    "wav2vec2": WaveEncoder,
    "hubert": WaveEncoder,
    "wavlm": WavLmEncoder,
    "parakeet": FastConformerEncoder,
    "audio-spectrogram-transformer": SpectrogramEncoder,
}
"""By model type, or by its first word where a family has several (`_` between words)."""


def encoder_family(model_type: str) -> type[SpeechEncoder]:
    """The family of speech encoders that a model type belongs to.

    Raises:
        UserError: none that is known.
    """
    found = ENCODERS.get(model_type) or ENCODERS.get(model_type.split("_")[0])
    if found is None:
        raise UserError(f"{model_type}: expected a speech encoder ({', '.join(ENCODERS)}).")
    return found


def speech_encoder(model: Any) -> SpeechEncoder:
    """A bare encoder of transformers, cut at its layers.

    Raises:
        UserError: another architecture.
    """
    return encoder_family(model.config.model_type)(model)
