"""Speech models: Whisper run on the frames there are.

Whisper's recipe pads every clip to 30 s. Its encoder is a convolution and a transformer with a
table of positions, so it also takes fewer frames: the table is cut to their number. A source that
never saw short inputs reads them badly until it has been trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import SHORT_PREFIX, Checkpoint, resolve
from mmtransfer.hub.files import PROCESSOR
from mmtransfer.hub.loading import load_weights, loading
from mmtransfer.hub.metadata import Base, write_metadata
from mmtransfer.progress import no_library_bars
from mmtransfer.speech.contexts import (
    ADAPTED_CLIP_S,
    SILENCE_S,
    UNADAPTED_CONTEXT_S,
    WINDOW_S,
    clip_context_s,
    own_context_s,
)
from mmtransfer.speech.engine import choose_language
from mmtransfer.speech.generation import check_config, check_generation, complete_generation
from mmtransfer.speech.logmel import log_mel
from mmtransfer.speech.scores import speech_metric
from mmtransfer.transfer.adapters import load_merged, save_adapter
from mmtransfer.transfer.encoders import WhisperEncoder
from mmtransfer.transfer.networks import check_base, encoder_levels
from mmtransfer.transfer.stages import Layout

_CONTEXT_KEY, _WINDOW_KEY = "shortest_context_s", "window_s"  # in the model's config.json


@dataclass
class ShortReader:
    """A model with an adapter for short contexts; its own weights decode the full window."""

    model: Any
    """The source with the adapter in it."""
    shortest_context_s: float
    margin_s: float
    """Context beyond a clip's own length."""
    languages: list[str]
    """Languages that it was taught in; others are decoded in the full window."""
    longest_s: float = ADAPTED_CLIP_S
    """Longest clip that it decodes as well as the source does in the full window."""


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
    short: ShortReader | None = None
    """What decodes shorter contexts than the full window, where the model itself does not."""

    @property
    def max_context_s(self) -> float:
        """The window the model was pretrained on."""
        return float(self.processor.feature_extractor.chunk_length)

    @property
    def languages(self) -> list[str]:
        """Codes of the languages that it has."""
        generation = self.model.generation_config
        if not getattr(generation, "is_multilingual", False):
            return ["en"]
        return sorted(token.strip("<|>") for token in generation.lang_to_id)

    @property
    def shortest_context_s(self) -> float:
        """Shortest context that keeps accuracy; stored with the model by training."""
        stored = getattr(self.model.config, _CONTEXT_KEY, None)
        if self.short is not None:
            stored = self.short.shortest_context_s
        return min(UNADAPTED_CONTEXT_S if stored is None else float(stored), self.max_context_s)

    @shortest_context_s.setter
    def shortest_context_s(self, seconds: float) -> None:
        if self.short is not None:
            self.short.shortest_context_s = float(seconds)
        else:
            setattr(self.model.config, _CONTEXT_KEY, float(seconds))

    @property
    def margin_s(self) -> float:
        """Context beyond a clip's own length."""
        return self.short.margin_s if self.short is not None else 0.0

    @property
    def short_s(self) -> float:
        """Longest clip that is decoded in a context for its length: by a fine-tuned model, what its
        shortest context holds.
        """
        if self.short is not None:
            return self.short.longest_s
        is_trained = getattr(self.model.config, _CONTEXT_KEY, None) is not None
        return max(self.shortest_context_s - SILENCE_S, 0.0) if is_trained else WINDOW_S

    @property
    def window_s(self) -> float:
        """How much speech it takes in at a time, joined over pauses; stored with the model by
        training, and 0 where that has not measured it.
        """
        stored = getattr(self.model.config, _WINDOW_KEY, None)
        is_trained = getattr(self.model.config, _CONTEXT_KEY, None) is not None
        if stored is None and self.short is None and is_trained:
            return 0.0
        return min(WINDOW_S if stored is None else float(stored), self.max_context_s)

    @window_s.setter
    def window_s(self, seconds: float) -> None:
        setattr(self.model.config, _WINDOW_KEY, float(seconds))

    def is_unadapted(self, context_s: float) -> bool:
        """Whether the source's own weights decode contexts of that length."""
        if self.short is None:
            return True
        taught_s = min(self.short.longest_s + self.short.margin_s, self.max_context_s)
        return context_s >= own_context_s(taught_s, self.max_context_s)

    def model_for(self, context_s: float) -> Any:
        """The model that decodes contexts of that length."""
        if self.short is None or self.is_unadapted(context_s):
            return self.model
        return self.short.model

    def untaught(self, languages: Sequence[str | None], context_s: float) -> list[int]:
        """Which of some clips are in a language that short contexts were not taught in."""
        if self.short is None or self.is_unadapted(context_s):
            return []
        taught = (None, *self.short.languages)
        return [index for index, language in enumerate(languages) if language not in taught]

    def context_s(self, seconds: float, *, shortest: float | None = None) -> float:
        """Context in which a clip of that length is decoded: the next step (see `contexts`)."""
        floor = self.shortest_context_s if shortest is None else shortest
        return clip_context_s(
            seconds,
            shortest_s=floor,
            longest_s=self.max_context_s,
            margin_s=self.margin_s,
            short_s=self.short_s if shortest is None else float("inf"),
        )

    def features(self, clips: Sequence[np.ndarray], context_s: float) -> torch.Tensor:
        """Log-mel of 16-kHz clips, each padded with silence to the context: [clip, mel, frame].

        100 frames a second. A clip longer than the context is cut.
        """
        bands = self.model.config.num_mel_bins
        return torch.from_numpy(log_mel(clips, context_s, bands=bands))

    def spell(self, text: str, language: str | None) -> list[int]:
        """Tokens of a transcript. Whisper's own training text starts with a space in languages that
        use them.
        """
        if not text:
            return []
        spaced = speech_metric(language or self.language) == "wer"
        tokenizer = self.processor.tokenizer
        found: list[int] = tokenizer(
            f" {text}" if spaced else text, add_special_tokens=False
        ).input_ids
        return found

    def prompt(self, *, timestamps: bool, language: str | None = None) -> list[int]:
        """Decoder tokens before the text: start, language, task, no-timestamps.

        `language` is that of the model unless given.
        """
        generation = self.model.generation_config
        tokens = [self.model.config.decoder_start_token_id]
        if getattr(generation, "is_multilingual", False):
            tokens.append(generation.lang_to_id[f"<|{language or self.language}|>"])
            tokens.append(generation.task_to_id["transcribe"])
        if not timestamps:
            tokens.append(generation.no_timestamps_token_id)
        return tokens

    @property
    def timestamp_begin(self) -> int:
        """Id of the token <|0.00|>; each next one is 0.02 s later."""
        return self.model.generation_config.no_timestamps_token_id + 1

    def save(self, folder: Path, form: str = "full", adapted: Any = None) -> None:
        """Write a checkpoint that plain transformers loads, or with `adapted` a peft adapter.

        With a `short` reader the adapter is that one's.
        """
        with no_library_bars():
            if form == "adapter":
                save_adapter(adapted, folder)
                self.model.generation_config.save_pretrained(folder)
            else:
                self.model.save_pretrained(folder)
                if self.short is not None:
                    # Under names of its own: libraries would fold it into the model.
                    save_adapter(adapted, folder, prefix=SHORT_PREFIX)
            self.processor.save_pretrained(folder)
        short = {}
        if self.short is not None:
            short = {
                "margin_s": self.short.margin_s,
                "languages": self.short.languages,
                "longest_s": self.short.longest_s,
            }
        write_metadata(
            folder,
            task="speech",
            form=form,
            base=self.base,
            shortest_context_s=self.shortest_context_s,
            window_s=self.window_s,
            **({"short_reader": short} if short else {}),
        )


def load_speech_model(
    source: str | Checkpoint,
    *,
    revision: str | None = None,
    language: str | None = None,
    short_contexts: bool = True,
    can_detect: bool = True,
) -> SpeechModel:
    """Load a Whisper in float32, with tokenizer and feature extractor.

    `language` is an ISO code; a multilingual model needs one unless its checkpoint names it, or
    `auto` to detect it clip by clip. Without `short_contexts` the model comes as its source has
    it, without an adapter that decodes short contexts.

    Raises:
        UserError: not found, not a Whisper, or a language it does not have.
    """
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    found = source if isinstance(source, Checkpoint) else resolve(source, revision)
    if found.architecture != "whisper":
        raise UserError(f"{found.source}: expected a Whisper model, found '{found.architecture}'.")
    folder, metadata = found.holding(*PROCESSOR), found.metadata
    with loading(found.source, "a speech model", folder):

        def weights() -> Any:
            return load_weights(WhisperForConditionalGeneration, found.weights)

        config = WhisperConfig.from_pretrained(found.weights, trust_remote_code=False)
        check_config(config, found.weights)
        model = weights()
        # By its parts: as a whole it may name another model, which it would load.
        processor = WhisperProcessor(
            WhisperFeatureExtractor.from_pretrained(folder, trust_remote_code=False),
            _tokenizer(folder, _marks(folder)),
        )
        if found.recorded is not None:
            check_base(model, found.recorded)
        if found.adapter is not None:
            model = load_merged(model, found.adapter)
            if metadata is not None and metadata.shortest_context_s is not None:
                setattr(model.config, _CONTEXT_KEY, metadata.shortest_context_s)
                setattr(model.config, _WINDOW_KEY, metadata.window_s)
        if folder != found.weights and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        complete_generation(model, processor.tokenizer, folder, found.weights)
        check_generation(model, processor.tokenizer, folder, found.weights)
        language = choose_language(
            found.source, model.generation_config.to_dict(), language, can_detect=can_detect
        )
        short = None
        taught = found.short if short_contexts else None
        if taught is not None and (language or "en") in [*taught.languages, "auto"]:
            adapted = load_merged(weights(), taught.folder, prefix=taught.prefix)
            adapted.generation_config = model.generation_config  # which has been checked
            short = ShortReader(
                adapted,
                taught.shortest_context_s,
                taught.margin_s,
                taught.languages,
                ADAPTED_CLIP_S if taught.longest_s is None else taught.longest_s,
            )
    if language not in (None, "auto"):
        model.generation_config.language = language
        model.generation_config.task = "transcribe"
    base = found.as_base()
    if found.adapter is not None:  # what is made of it stands on no model that has a name
        base = replace(base, model_id=None)
    return SpeechModel(model, processor, found.source, language, base, short)


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, marks: Any) -> Any:
    """The tokenizer in a folder whose files have these marks. Models have it in common, since it
    takes longer to load than a small one's weights; nothing here changes it.
    """
    from transformers import WhisperTokenizer

    return WhisperTokenizer.from_pretrained(folder, trust_remote_code=False)


def _marks(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a file in the folder does."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return tuple((name, x.st_size, x.st_mtime_ns, x.st_ino) for name, x in files)


def allow_silence(model: Any) -> None:
    """Let the end token come first, so that silence can be learnt as an empty text."""
    generation, end = model.generation_config, model.config.eos_token_id
    if generation.begin_suppress_tokens:
        generation.begin_suppress_tokens = [
            token for token in generation.begin_suppress_tokens if token != end
        ]


def whisper_layout(model: Any) -> Layout:
    """The modules of a Whisper from input to output: encoder, then decoder."""
    encoder, decoder = WhisperEncoder(model.get_encoder()), model.get_decoder()
    levels = encoder_levels(encoder)
    levels += [[decoder.embed_tokens, decoder.embed_positions], *([x] for x in decoder.layers)]
    levels[-1] = [*levels[-1], decoder.layer_norm]
    return Layout(levels, encoder.depth, [], encoder.fixed)


def encode_whisper(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on any number of frames up to its window.

    `features` [clip, mel, frame] -> hidden states [clip, frame / 2, width]. With the full window
    this is the model's own encoder.
    """
    encoder = WhisperEncoder(model.get_encoder())
    return encoder.hidden_states([encoder.depth], {"features": features})[encoder.depth]
