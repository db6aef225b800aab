"""Source models: where they come from, and Whisper run on the frames there are.

Whisper's recipe pads every clip to 30 s. Its encoder is a convolution and a transformer with a
table of positions, so it also takes fewer frames: the table is cut to their number. A source that
never saw short inputs reads them badly until it has been trained on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.audio import SAMPLE_RATE
from mmtransfer.bundled import PREFIX, materialize
from mmtransfer.errors import UserError
from mmtransfer.progress import no_library_bars

CONTEXT_GRID_S = 0.5
"""Contexts are multiples of this, so that a clip's result does not depend on its batch."""
UNADAPTED_CONTEXT_S = 20.0
"""Shortest context at which a Whisper that never saw short ones keeps its accuracy."""
_CONTEXT_KEY = "shortest_context_s"  # in the model's config.json


@dataclass
class SpeechModel:
    """A Whisper with its tokenizer and feature extractor."""

    model: Any
    processor: Any
    source: str
    """Name it was loaded by."""
    language: str | None = None
    """ISO code that prompts carry; None for an English-only model."""

    @property
    def max_context_s(self) -> float:
        """The window the model was pretrained on."""
        return float(self.processor.feature_extractor.chunk_length)

    @property
    def shortest_context_s(self) -> float:
        """Shortest context that keeps accuracy; stored with the model by training."""
        stored = getattr(self.model.config, _CONTEXT_KEY, None)
        return min(UNADAPTED_CONTEXT_S if stored is None else float(stored), self.max_context_s)

    @shortest_context_s.setter
    def shortest_context_s(self, seconds: float) -> None:
        setattr(self.model.config, _CONTEXT_KEY, float(seconds))

    def context_s(self, seconds: float, *, shortest: float | None = None) -> float:
        """Context in which a clip of that length is read: the next multiple of the grid."""
        floor = self.shortest_context_s if shortest is None else shortest
        wanted = min(max(seconds, floor, CONTEXT_GRID_S), self.max_context_s)
        steps = -(-round(wanted * SAMPLE_RATE) // round(CONTEXT_GRID_S * SAMPLE_RATE))
        return min(steps * CONTEXT_GRID_S, self.max_context_s)

    def features(self, clips: Sequence[np.ndarray], context_s: float) -> torch.Tensor:
        """Log-mel of 16-kHz clips, each padded with silence to the context: [clip, mel, frame].

        100 frames a second. A clip longer than the context is cut.
        """
        return self.processor.feature_extractor(
            list(clips),
            sampling_rate=SAMPLE_RATE,
            max_length=round(context_s * SAMPLE_RATE),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_features

    def prompt(self, *, timestamps: bool) -> list[int]:
        """Decoder tokens before the text: start, language, task, no-timestamps."""
        generation = self.model.generation_config
        tokens = [self.model.config.decoder_start_token_id]
        if getattr(generation, "is_multilingual", False):
            tokens.append(generation.lang_to_id[f"<|{self.language}|>"])
            tokens.append(generation.task_to_id["transcribe"])
        if not timestamps:
            tokens.append(generation.no_timestamps_token_id)
        return tokens

    @property
    def timestamp_begin(self) -> int:
        """Id of the token <|0.00|>; each next one is 0.02 s later."""
        return self.model.generation_config.no_timestamps_token_id + 1

    def save(self, folder: Path) -> None:
        """Write a checkpoint that plain transformers loads."""
        with no_library_bars():
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def resolve_source(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """(folder or Hub id, revision) that `from_pretrained` takes.

    A run folder stands for the model in it.

    Raises:
        UserError: unknown bundled name, missing package, or a folder without a model.
    """
    if source.startswith(PREFIX):
        if revision is not None:
            raise UserError(f"{source}: a bundled source has no revisions; remove 'revision'.")
        return str(materialize(source)), None
    path = Path(source)
    if path.is_dir():
        for folder in (path / "model", path):
            if (folder / "config.json").is_file():
                return str(folder), None
        raise UserError(
            f"{source}: expected a run folder (with model/) or a checkpoint folder (with "
            "config.json); found neither."
        )
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such model folder.")
    return source, revision


def load_speech_model(
    source: str, *, revision: str | None = None, language: str | None = None
) -> SpeechModel:
    """Load a Whisper in float32, with tokenizer and feature extractor.

    `language` is an ISO code; a multilingual model needs one unless its checkpoint names it.

    Raises:
        UserError: not found, not a Whisper, or a language it does not have.
    """
    from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor

    location, revision = resolve_source(source, revision)
    try:
        kind = AutoConfig.from_pretrained(location, revision=revision).model_type
        if kind != "whisper":
            raise UserError(f"{source}: expected a Whisper model, found '{kind}'.")
        with no_library_bars():
            model = WhisperForConditionalGeneration.from_pretrained(
                location, revision=revision, dtype=torch.float32, use_safetensors=True
            )
        processor = WhisperProcessor.from_pretrained(location, revision=revision)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: cannot be loaded as a speech model ({first_line}). Expected a run folder, "
            "a checkpoint folder, a Hub id, or a name that `mmtransfer backbones` lists."
        ) from None
    generation = model.generation_config
    if getattr(generation, "is_multilingual", False):
        language = language or getattr(generation, "language", None)
        known = sorted(token.strip("<|>") for token in generation.lang_to_id)
        if language is None:
            raise UserError(f"{source}: multilingual; name the language (data.language: en).")
        if language not in known:
            raise UserError(f"{source}: no language '{language}'; it has {', '.join(known)}.")
        generation.language = language
        generation.task = "transcribe"
    elif language not in (None, "en"):
        raise UserError(f"{source}: English only, but the language is set to '{language}'.")
    else:
        language = None
    return SpeechModel(model, processor, source, language)


def encode_whisper(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on any number of frames up to its window.

    `features` [clip, mel, frame] -> hidden states [clip, frame / 2, width]. With the full window
    this is the model's own encoder.
    """
    encoder = model.get_encoder()
    hidden = functional.gelu(encoder.conv1(features))
    hidden = functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)
