"""The configuration: YAML files and command-line overrides into one typed model.

A configuration holds values only. Unknown keys are refused with the nearest valid name; every
field can be overridden on the command line by its dotted name (`--train.learning_rate 1e-4`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmtransfer.errors import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class DataConfig(_Section):
    """Target data, and the source-domain sets on which forgetting is measured."""

    train: str | None = None
    """Training data: a folder with metadata.csv, a CSV/JSONL manifest, or a folder of recordings
    with .srt/.vtt files beside them."""
    validation: str | None = None
    """Validation data, in the same forms. Without it a tenth of the training data is held out."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Source-domain sets, name to path: evaluated before and after, to measure forgetting."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training clips held out when no validation data is named."""
    file_column: str = "file_name"
    """Column with the path of the recording, relative to the manifest."""
    text_column: str = "transcription"
    """Column with the transcript; an empty cell means that nothing is said."""
    group_column: str = "group"
    """Column that keeps clips together when validation data is held out (speaker, camera, file)."""
    allow_leaks: list[Literal["same-recording", "same-audio"]] = Field(default_factory=list)
    """Overlaps between splits that are accepted instead of refused."""
    max_undecodable: float = Field(0.05, ge=0, le=1)
    """Largest share of files that may fail to decode before the run stops."""
    language: str | None = None
    """Language of the speech as an ISO code (en, zh, ...); needed by multilingual sources."""


class AugmentConfig(_Section):
    """Changes made to training clips only; everything is off unless named."""

    speed: tuple[float, float] | None = None
    """Lowest and highest playback speed, e.g. [0.9, 1.1] (Ko et al. 2015)."""
    noise_dir: str | None = None
    """Folder of noise recordings (any depth) to mix in."""
    noise_probability: float = Field(0.5, ge=0, le=1)
    """Share of clips that get noise."""
    noise_snr_db: tuple[float, float] = (0.0, 25.0)
    """Signal-to-noise ratio range in dB."""
    reverb_dir: str | None = None
    """Folder of room impulse responses to convolve with."""
    reverb_probability: float = Field(0.3, ge=0, le=1)
    """Share of clips that get reverberation."""
    spec_time_masks: int = Field(0, ge=0)
    """SpecAugment: number of time masks (Park et al. 2019)."""
    spec_time_width_s: float = Field(0.3, gt=0)
    """SpecAugment: widest time mask, in seconds."""
    spec_frequency_masks: int = Field(0, ge=0)
    """SpecAugment: number of frequency masks."""
    spec_frequency_width: int = Field(15, ge=1)
    """SpecAugment: widest frequency mask, in mel bands."""

    @field_validator("speed", "noise_snr_db")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"expected [low, high], found [{value[0]}, {value[1]}]")
        return value

    @field_validator("speed")
    @classmethod
    def _speed_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (value[0] >= 0.5 and value[1] <= 2.0):
            raise ValueError("speeds must lie between 0.5 and 2.0")
        return value


class TrainConfig(_Section):
    """The training loop."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; give this or `steps`."""
    steps: int | None = Field(None, gt=0)
    """Optimiser steps; give this or `epochs`."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up from zero."""
    batch_seconds: float = Field(48.0, gt=0)
    """Audio seconds, padding included, that one device processes per forward pass."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes per optimiser step."""
    weight_decay: float = Field(0.01, ge=0)
    """L2 towards zero on weight matrices; biases and norms are excluded."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    full_context: float = Field(0.03, ge=0, le=1)
    """Share of clips padded to the model's full window, so that 30-s pipelines still work."""
    timestamps: float = Field(0.5, ge=0, le=1)
    """Share of clips whose targets carry timestamps, so that the ability to emit them is kept."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: what `accelerate` is configured for, else bf16 on a GPU that has it, else none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations on the validation data; 0 evaluates once an epoch."""
    patience: int = Field(0, ge=0)
    """Stop after this many evaluations without improvement; 0 never stops early."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints for --resume; 0 writes one at every evaluation."""
    workers: int = Field(0, ge=0)
    """Processes that prepare batches; 0 prepares them in a thread of the training process."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give train.epochs or train.steps, not both")
        return self


class EvaluationConfig(_Section):
    """How results are scored."""

    normalizer: Literal["english-v1", "basic-v1", "none-v1"] | None = None
    """Text normaliser applied before WER and CER; by default chosen from the language."""
    bootstrap_samples: int = Field(1000, ge=100)
    """Resamples of the 95 % bootstrap interval."""
    batch_seconds: float = Field(120.0, gt=0)
    """Audio seconds, padding included, per forward pass."""


class RuntimeConfig(_Section):
    """What would otherwise be global state."""

    seed: int = 0
    """Seed of data order, splits, augmentation, dropout and bootstrap."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 uses every core this process may run on."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto lets Accelerate choose."""


class Config(_Section):
    """One transfer, from source to run folder."""

    task: Literal["speech"] = "speech"
    """What is transferred: speech (speech recognition)."""
    source: str = "bundled:whisper-tiny.en"
    """Source model: a Hub id, a local folder, or bundled:NAME (see `mmtransfer backbones`)."""
    revision: str | None = None
    """Revision of a Hub source, for every part of it."""
    run_dir: str = "runs/latest"
    """Run folder to write."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads `2e-5` as text because YAML 1.1 wants a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        UserError: no such file, not UTF-8 or YAML, or not a mapping at the top.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file. See configs/ for examples.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 YAML file: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, found a {type(values).__name__}.")
    return values


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of every field of a configuration model."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def nearest_field(name: str) -> str:
    """The valid field name nearest to an unknown one, as a hint; empty if none is near."""
    close = difflib.get_close_matches(name, field_names(), n=1, cutoff=0.5)
    if not close:  # right name under the wrong section
        leaf = name.rsplit(".", 1)[-1]
        by_leaf = {known.rsplit(".", 1)[-1]: known for known in field_names()}
        close = [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    return f" Did you mean '{close[0]}'?" if close else ""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` on top, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def build_config(values: Mapping[str, Any], *, origin: str = "configuration") -> Config:
    """Check values and build the configuration.

    Raises:
        UserError: an unknown key (with the nearest valid one) or a value of the wrong kind.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{name}'.{nearest_field(name)}")
            else:
                message = item["msg"].removeprefix("Value error, ")
                found = "" if isinstance(item["input"], (dict, _Section)) else item["input"]
                where = f"{name}: " if name else ""
                shown = f", found {found!r}" if found != "" else ""
                problems.append(f"{where}{message}{shown}.")
        raise UserError(f"{origin}: " + " ".join(problems)) from None


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML configuration and put overrides (nested as in the file) on top."""
    return build_config(merge(read_yaml(path), overrides or {}), origin=str(path))
