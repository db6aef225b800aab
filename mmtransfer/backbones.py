"""Source models: where they come from, and Whisper run on the frames there are.

Whisper's recipe pads every clip to 30 s. Its encoder is a convolution and a transformer with a
table of positions, so it also takes fewer frames: the table is cut to their number. A source that
never saw short inputs reads them badly until it has been trained on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from mmtransfer.adapters import load_merged, save_adapter
from mmtransfer.audio import SAMPLE_RATE
from mmtransfer.bundled import PREFIX, get_bundle, materialize
from mmtransfer.encoders import SpeechEncoder
from mmtransfer.errors import UserError
from mmtransfer.networks import (
    METADATA,
    Base,
    check_base,
    read_metadata,
    write_metadata,
)
from mmtransfer.progress import no_library_bars

CONTEXT_GRID_S = 0.5
"""Contexts are multiples of this, so that a clip's result does not depend on its batch."""
UNADAPTED_CONTEXT_S = 20.0
"""Shortest context at which a Whisper that never saw short ones keeps its accuracy."""
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What a model on the Hub consists of; files in folders are other formats of the same."""
_CONTEXT_KEY = "shortest_context_s"  # in the model's config.json


@dataclass
class SpeechModel:
    """A Whisper with its tokenizer and feature extractor."""

    model: Any
    processor: Any
    source: str
    """Name it was loaded by."""
    language: str | None
    """ISO code that prompts carry; None for an English-only model."""
    base: Base
    """What it was loaded from."""

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
        return grid_context_s(max(seconds, floor), self.max_context_s)

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

    def save(self, folder: Path, form: str = "full", adapted: Any = None) -> None:
        """Write a checkpoint that plain transformers loads, or with `adapted` a peft adapter."""
        with no_library_bars():
            if form == "adapter":
                save_adapter(adapted, folder)
                self.model.generation_config.save_pretrained(folder)
            else:
                self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        write_metadata(
            folder,
            task="speech",
            form=form,
            base=self.base,
            shortest_context_s=self.shortest_context_s,
        )


def grid_context_s(seconds: float, longest_s: float) -> float:
    """The next multiple of the grid, at least one and at most the longest context."""
    wanted = min(max(seconds, CONTEXT_GRID_S), longest_s)
    steps = -(-round(wanted * SAMPLE_RATE) // round(CONTEXT_GRID_S * SAMPLE_RATE))
    return min(steps * CONTEXT_GRID_S, longest_s)


def fetch(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """(local folder, commit) of a source; a Hub id is downloaded.

    A run folder stands for the model in it.

    Raises:
        UserError: unknown bundled name, missing package, a folder without a model, or a Hub id
            that cannot be reached.
    """
    if source.startswith(PREFIX):
        if revision is not None:
            raise UserError(f"{source}: a bundled source has no revisions; remove 'revision'.")
        return materialize(source), None
    path = Path(source)
    if path.is_dir():
        for folder in (path / "model", path):
            if (folder / "config.json").is_file() or (folder / METADATA).is_file():
                return folder, None
        raise UserError(
            f"{source}: expected a run folder (with model/) or a checkpoint folder (with "
            "config.json); found neither."
        )
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such model folder.")
    return _download(source, revision)


def _download(source: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        # Everything comes from one commit.
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=["*/*"],
        )
    except (OSError, ValueError, HFValidationError, HTTPError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"{source}: cannot be downloaded from the Hub ({reason}). Expected a run folder, a "
            "checkpoint folder, a Hub id, or a name that `mmtransfer backbones` lists."
        ) from None
    return Path(folder), Path(folder).name


def make_base(source: str, revision: str | None) -> Base:
    """What a transfer from this source records of it."""
    model_id: str | None = source
    if source.startswith(PREFIX):
        model_id = get_bundle(source).base_model
    elif Path(source).is_dir():
        source, model_id = str(Path(source).resolve()), None
    return Base(source, revision, model_id)


@contextmanager
def load_errors(source: str, what: str) -> Iterator[None]:
    """Failures of loading a checkpoint as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: cannot be loaded as {what} ({first_line}). Expected a run folder, "
            "a checkpoint folder, a Hub id, or a name that `mmtransfer backbones` lists."
        ) from None


def model_type(source: str, folder: Path) -> tuple[str, list[str]]:
    """(model type, architectures) of a checkpoint folder.

    Raises:
        UserError: no readable config.json.
    """
    with load_errors(source, "a model"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"]), list(config.get("architectures") or [])


def load_speech_model(
    source: str, *, revision: str | None = None, language: str | None = None
) -> SpeechModel:
    """Load a Whisper in float32, with tokenizer and feature extractor.

    `language` is an ISO code; a multilingual model needs one unless its checkpoint names it.

    Raises:
        UserError: not found, not a Whisper, or a language it does not have.
    """
    from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

    folder, commit = fetch(source, revision)
    metadata = read_metadata(folder)
    if metadata is not None and metadata["form"] == "adapter":
        # The model beneath comes from its own place; the rest stands in this folder.
        base: Base = metadata["base"]
        beneath, _ = fetch(base.source, base.revision)
    else:
        beneath = folder
    kind, _ = model_type(source, beneath)
    if kind != "whisper":
        raise UserError(f"{source}: expected a Whisper model, found '{kind}'.")
    with load_errors(source, "a speech model"), no_library_bars():
        model = WhisperForConditionalGeneration.from_pretrained(
            beneath, dtype=torch.float32, use_safetensors=True
        )
        processor = WhisperProcessor.from_pretrained(folder)
        if beneath != folder:
            check_base(model, base)
            model = load_merged(model, folder)
            model.generation_config = GenerationConfig.from_pretrained(folder)
            setattr(model.config, _CONTEXT_KEY, metadata["shortest_context_s"])  # type: ignore[index]
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
    return SpeechModel(model, processor, source, language, make_base(source, commit))


def encode_whisper(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on any number of frames up to its window.

    `features` [clip, mel, frame] -> hidden states [clip, frame / 2, width]. With the full window
    this is the model's own encoder.
    """
    encoder = SpeechEncoder(model.get_encoder())
    return encoder.hidden_states([encoder.depth], {"features": features})[encoder.depth]
