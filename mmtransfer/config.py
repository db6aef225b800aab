"""The configuration: YAML files and command-line overrides into one typed model.

A configuration holds values only. Unknown keys are refused with the nearest valid name; every
field can be overridden on the command line by its dotted name (`--train.learning_rate 1e-4`).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmtransfer.data import MOST_THREADS, USUAL_COLUMNS, WIDEST_BEAM
from mmtransfer.data.files import read_text
from mmtransfer.data.former_names import CONFIGURATION, DATA, with_new_names
from mmtransfer.data.languages import normal_language
from mmtransfer.data.printing import shortened
from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
_MOST_YAML_BYTES, _MOST_NODES = 16 << 20, 1_000_000
_LONGEST_NAME = 200  # of a key in a message
_MOST_PROBLEMS = 10  # that one message names
Checked = TypeVar("Checked", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )


class DataConfig(_Section):
    """Target data, and the source-domain sets that measure forgetting."""

    train: str | None = None
    """Training data. Speech: a folder with metadata.csv, a manifest (CSV, TSV, JSONL, Parquet), or
    a folder of recordings with .srt, .vtt or .ass files beside them. Text: a CSV, TSV, JSONL or
    Parquet file, or a Hub dataset as NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT. Sounds: as for
    speech with a column of labels, or a folder of recordings for each class."""
    validation: str | None = None
    """Validation data, in the same forms. Without it a tenth of the training data is held out."""
    source_domain: dict[str, str] = Field(default_factory=dict)
    """Source-domain sets, name to path: scored before and after training, to measure forgetting."""
    rehearsal: str = "auto"
    """Source-domain data for rehearsal, against forgetting (see `transfer.rehearsal`): a path, in
    the same forms as `train`; `bundled`, English speech in this package; or `none`. Speech without
    any transcript is transcribed by the source model. auto: `bundled` where a source model that
    transcribes English is adapted, else `none`."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training clips held out when no validation data is named."""
    train_share: float = Field(1.0, gt=0, le=1)
    """Share of the training examples that is used; that of a smaller share is part of it. For
    learning curves (see `mmtransfer compare`)."""
    file_column: str = "file_name"
    """Column with the path of the recording, relative to the manifest."""
    text_column: str | None = None
    """Column with the transcript (by default `transcription`; an empty cell means that the
    clip has no speech) or the text to classify (by default `text`)."""
    label_column: str = "label"
    """Column with the class of a text or a clip. If any clip has several, separated by `;`, the
    task is multi-label, and an empty cell means none of the classes."""
    label_texts: dict[str, list[str]] = Field(default_factory=dict)
    """Texts that describe a label, e.g. {positive: [This sentence is positive.]}: trained on as
    examples of it, never validated on. They gain most with a handful of examples per class."""
    target_column: str | None = USUAL_COLUMNS["target_column"]
    """Column with the entity or aspect that the sentiment is about; without it, or with `none`, the
    whole text is classified."""
    group_column: str | None = USUAL_COLUMNS["group_column"]
    """Column that keeps examples together when validation data is held out (speaker, camera, file,
    article); `none` for none."""
    language_column: str | None = USUAL_COLUMNS["language_column"]
    """Column with the language of each clip, by code or name; where it is empty `language` holds.
    `none` for none."""
    allow_leaks: list[Literal["same-recording", "same-audio", "same-text"]] = Field(
        default_factory=list
    )
    """Overlaps between splits that are accepted instead of refused."""
    max_undecodable: float = Field(0.05, ge=0, le=1)
    """Largest share of files that may fail to decode before the run stops."""
    language: str | None = None
    """Language of the speech, by code or name (en, zh, English, ...); multilingual models need it
    where clips do not name theirs. Of several subtitles beside a recording it chooses one."""
    max_tokens: int | None = Field(None, ge=16)
    """Longest piece of text in tokens; by default what the backbone takes, at most 512."""
    long_texts: Literal["truncate", "windows"] = "truncate"
    """Texts over `max_tokens`: truncate, or average the logits of overlapping windows."""
    window_overlap: int = Field(64, ge=0)
    """Tokens that neighbouring windows share."""
    max_windows: int = Field(16, ge=1)
    """Most windows of one text; the rest of it is ignored."""
    window_seconds: float = Field(5.0, ge=0.5, le=30)
    """Sounds: longer clips are classified in windows of this length, which overlap by half and
    whose probabilities are averaged."""

    @field_validator("target_column", "group_column", "language_column", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("language", mode="before")
    @classmethod
    def _norwegian(cls, value: Any) -> Any:
        """YAML reads the code of Norwegian as a truth value."""
        return "no" if value is False else value

    @field_validator("language")
    @classmethod
    def _one_code(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return value
        code = normal_language(value)
        if code is None:
            raise ValueError("expected a language such as en, en-US or English")
        return code

    @field_validator("label_texts", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        """YAML reads the labels 0 and true as a number and a truth value; see `read_texts`."""
        if not isinstance(value, dict):
            return value
        return {
            str(label).lower() if isinstance(label, bool) else str(label): texts
            for label, texts in value.items()
        }

    @field_validator("label_texts")
    @classmethod
    def _texts_say_something(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for label, texts in value.items():
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"expected texts for the label '{label}', found {texts}")
        return value


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
    narrow_band_probability: float = Field(0.0, ge=0, le=1)
    """Share of clips that pass through an 8-kHz mu-law line (ITU-T G.711), as telephones and the
    sound of many cameras do."""
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


Frozen = Literal["all", "none"] | Annotated[int, Field(ge=0)]


class StageConfig(_Section):
    """One stage of a transfer. What is not set is taken from the `train` section."""

    frozen: Frozen = "none"
    """Backbone layers that stay as they are, counted from the input: all, none, or a number; 0
    freezes only what lies below the first layer (embeddings, convolutional front)."""
    adapter: dict[str, Any] | None = None
    """Train an adapter instead of the unfrozen layers: {type: lora, r: 8, ...}, with the type and
    arguments of a peft method; `dora` is lora with use_dora."""
    objective: Literal["target", "contrastive"] = "target"
    """target: the task's loss. contrastive: supervised contrastive loss on pooled features (Khosla
    et al. 2020), which shapes a backbone from few labels before a head is trained on it."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data."""
    steps: int | None = Field(None, gt=0)
    """Optimiser steps, instead of epochs."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of pretrained weights (and of adapters)."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of new layers."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer learns at this times the rate of the layer above it (Howard & Ruder 2018)."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up from zero."""

    @field_validator("objective", mode="before")
    @classmethod
    def _own_task(cls, value: Any) -> Any:
        if value == "short_context":
            raise ValueError("it is a task now; set task: short_context and remove the objective")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.adapter is not None and "type" not in self.adapter:
            raise ValueError("the adapter needs a type, e.g. {type: lora, r: 8}")
        if self.adapter is not None and self.frozen == "all":
            raise ValueError("an adapter needs unfrozen layers to sit in; set frozen: none")
        if self.objective == "contrastive" and self.frozen == "all":
            raise ValueError(
                "a contrastive stage trains the backbone; set frozen: none or a number"
            )
        return self


class TransferConfig(_Section):
    """How the source model is adapted: stages and regularisers."""

    preset: Literal["end_to_end", "feature", "combined", "lora", "auto"] = "end_to_end"
    """end_to_end: fine-tune everything. feature: freeze the backbone, train what stands on it.
    combined: feature, then end to end. lora: a low-rank adapter. auto: `train` chooses by short
    runs. Used where no stages are given."""
    stages: list[StageConfig] = Field(default_factory=list)
    """The stages, in order."""
    scratch: bool = False
    """Start from random weights in the source's place, to see what the source is worth."""
    cache: Literal["disk", "none"] = "disk"
    """disk: each example passes the frozen layers once, and their output is kept in the cache
    folder. none: it passes them every time."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """Precision of cached activations."""
    cached_views: int = Field(0, ge=0)
    """Augmented versions of each clip to cache; needed when augmentation meets a cached prefix."""
    l2sp: float = Field(0.0, ge=0)
    """Strength of L2-SP, the pull of pretrained weights to their start values (Li et al. 2018)."""
    l2sp_new: float = Field(0.0, ge=0)
    """Strength of the L2 pull of new layers towards zero, beside `l2sp`."""
    r_drop: float = Field(0.0, ge=0)
    """Strength with which two passes with different dropout are to give the same distribution
    (R-Drop, Liang et al. 2021). It takes dropout: a Whisper has none unless `dropout` sets it."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout in the unfrozen part of the backbone, instead of the source model's."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target spread evenly over all classes."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weights against imbalance: inverse frequency, or effective number (Cui et al. 2019)."""
    effective_beta: float = Field(0.999, gt=0, lt=1)
    """Beta of the effective number."""
    rehearsal: float | None = Field(None, ge=0, lt=1)
    """Share of `data.rehearsal` in each batch of speech (by seconds; by default 0.4), or in each
    epoch of texts (by number)."""
    interpolate: Literal["auto", "none"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """Interpolation between the source model's weights (0) and the tuned ones (1) (WiSE-FT,
    Wortsman et al. 2022), for a Whisper trained whole or with LoRA. auto: the smallest from 1
    down to 0.4 up to which the validation score is as good, of clips and of windows that hold
    several; none: the tuned weights."""
    max_forgetting: float = Field(0.02, ge=0)
    """How much worse the metric may get on a source-domain set before the run reports forgetting
    and a remedy."""
    merge_adapter: bool = False
    """Save the backbone with the adapter merged into it, instead of the adapter alone."""


class HeadConfig(_Section):
    """The layers on top of the backbone."""

    type: Literal["auto", "classifier", "native", "ctc", "decoder"] = "auto"
    """classifier: pooled features to classes. native: the backbone's own classification head, for
    plain `transformers` pipelines. ctc: characters from frames. decoder: Whisper's own. auto:
    classifier for text and sounds, decoder for Whisper, ctc for other speech encoders."""
    layers: Literal["last", "all"] | list[int] = "last"
    """Backbone layers that feed the head (0: the input of the first layer). Several are summed
    with learned weights (Peters et al. 2018)."""
    conv_layers: int = Field(0, ge=0, le=64)
    """1-D convolutions between the features and the pooling or the output."""
    conv_width: int | None = Field(None, ge=1, le=65_536)
    """Channels of the convolutions; by default the backbone's width."""
    conv_kernel: int = Field(3, ge=1, le=1023)
    """Width of the convolutions in positions; odd."""
    pooling: Literal["mean", "max", "attention", "first"] = "mean"
    """How positions become one vector."""
    feature_norm: Literal["none", "l2"] = "none"
    """l2: pooled features are divided by their L2 norm."""
    batch_norm: bool = False
    """Batch normalisation of the pooled features."""
    relu: bool = False
    """ReLU before dropout and the output layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout before the output layer and behind each convolution."""

    @field_validator("conv_kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("expected an odd number, so that every position stays in its place")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        # The command line turns whatever could be a list into one.
        return value[0] if value in (["all"], ["last"]) else value

    @field_validator("layers")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if value == [] or (isinstance(value, list) and len(set(value)) < len(value)):
            raise ValueError("expected at least one layer, each named once")
        return value


class TrainConfig(_Section):
    """The training loop."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; give this or `steps`."""
    steps: int | None = Field(None, gt=0)
    """Optimiser steps; give this or `epochs`."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of pretrained weights (and of adapters)."""
    head_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of new layers."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer learns at this times the rate of the layer above it (Howard & Ruder 2018)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up from zero."""
    batch_seconds: float = Field(48.0, gt=0)
    """Audio seconds, padding included, that one device processes per forward pass."""
    batch_tokens: int = Field(1024, ge=1)
    """Text tokens, padding included, that one device processes per forward pass."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes per optimiser step."""
    weight_decay: float = Field(0.01, ge=0)
    """L2 towards zero on weight matrices; biases and norms are excluded."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    full_context: float = Field(0.03, ge=0, le=1)
    """Share of clips padded to the model's full window, so that 30-s pipelines still work."""
    joined: float = Field(0.5, ge=0, le=1)
    """Share of a Whisper's clips that are joined to windows of up to 19 s, as recordings are
    transcribed: learnt one by one, clips of a sentence teach it to end after a sentence."""
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
    keep_checkpoints: int = Field(0, ge=0)
    """Models of the last evaluations to keep in `snapshots` of the run folder, for
    `mmtransfer merge RUN --method last`."""
    workers: int = Field(0, ge=0)
    """Threads of the training process that prepare batches ahead; 0 takes one."""
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = "none"
    """Tracker that gets what `metrics.jsonl` does, as its own package does it; tensorboard's files
    lie in `trackers` of the run folder."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give train.epochs or train.steps, not both")
        return self


class EvaluationConfig(_Section):
    """How results are scored."""

    normalizer: Literal["english-v2", "basic-v2", "unspaced-v2", "none-v1"] | None = None
    """Text normaliser applied before WER and CER; by default chosen from the language."""
    bootstrap_samples: int = Field(1000, ge=100)
    """Resamples of the 95 % bootstrap interval."""
    batch_seconds: float = Field(120.0, gt=0)
    """Audio seconds, padding included, per forward pass."""
    batch_tokens: int = Field(8192, ge=1)
    """Text tokens, padding included, per forward pass."""
    engine: Literal["auto", "ctranslate2", "transformers"] | None = None
    """Engine that decodes speech in `evaluate`, as for `monitor`; without it as in training:
    transformers in float32, greedy, without guards."""
    compute_type: Literal["int8", "float16", "float32"] | None = None
    """Precision of ctranslate2, as for `monitor`."""
    beam_size: int | None = Field(None, ge=1, le=WIDEST_BEAM)
    """Beam size, as for `monitor`; needs `engine`."""
    guards: bool = True
    """Whether flagged texts are decoded again and rejected, as `monitor` does; needs `engine`."""
    prompt: str = ""
    """Names and words to expect, as for `monitor`; needs `engine`."""


class RuntimeConfig(_Section):
    """What would otherwise be global state."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of data order, splits, augmentation, dropout and bootstrap."""
    threads: int = Field(0, ge=0, le=MOST_THREADS)
    """CPU threads; 0 uses every core this process may run on."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto lets Accelerate choose."""


class SearchRange(_Section):
    """Values of a field that are tried: from `low` to `high`, whole numbers if both are."""

    low: int | float
    """Lowest value."""
    high: int | float
    """Highest value."""
    log: bool = False
    """Whether orders of magnitude are equally likely, as for learning rates."""

    @model_validator(mode="after")
    def _ordered(self) -> SearchRange:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, found {self.low}")
        return self


class SearchConfig(_Section):
    """A search over fields of the configuration (extra `search`)."""

    space: dict[str, SearchRange | list[Any]] = Field(default_factory=dict)
    """Fields by their dotted names, each with a range {low: 1e-5, high: 1e-3, log: true} or a list
    of values. With any, `train` runs a transfer for each trial and keeps the best."""
    trials: int = Field(20, ge=1)
    """Transfers that are tried."""
    prune: bool = True
    """End a trial whose validation score is below the median of earlier ones at its step."""

    @field_validator("space")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, values in value.items():
            if name.startswith(("search", "run_dir")) or name not in field_names():
                raise ValueError(f"unknown field '{name}'.{nearest_field(name)}")
            if isinstance(values, list) and len(values) < 2:
                raise ValueError(f"{name}: expected a range or at least two values, found {values}")
        return value


class AutoConfig(_Section):
    """How `transfer.preset: auto` chooses structure, freeze depth and learning rate."""

    budget_share: float = Field(0.5, gt=0, le=1)
    """Time of the choice and the training, as a share of what training every preset would take."""
    budget_seconds: float | None = Field(None, gt=0)
    """The same in seconds, instead of a share."""


class Config(_Section):
    """One transfer, from source model to run folder."""

    task: Literal["speech", "short_context", "sentiment", "sound"] = "speech"
    """What is transferred: speech (speech recognition), short_context (a Whisper learns to decode
    clips without padding, by self-distillation from its full window; needs no transcripts),
    sentiment (text classification) or sound (classes of sounds on a speech encoder)."""
    source_model: str = "bundled:whisper-tiny.en"
    """Source model: a Hub id, a local folder, or bundled:NAME (see `mmtransfer backbones`)."""
    revision: str | None = None
    """Revision of a Hub model, for every part of it."""
    run_dir: str = "runs/latest"
    """Run folder to write."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    transfer: TransferConfig = TransferConfig()
    head: HeadConfig = HeadConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    auto: AutoConfig = AutoConfig()
    search: SearchConfig = SearchConfig()
    runtime: RuntimeConfig = RuntimeConfig()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads `2e-5` as text because YAML 1.1 wants a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        UserError: no such file, not UTF-8 or YAML, not a mapping at the top, or one that grows
            without end by its aliases.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such configuration file. See configs/ for examples.")
    text = read_text(path, most=_MOST_YAML_BYTES, regular=False)  # also `<(...)` of a shell
    try:
        loader = _Loader(text)  # a SafeLoader
        try:
            node = loader.get_single_node()
            if node is not None and _size(node, {}) > _MOST_NODES:
                raise UserError(f"{path}: expected at most {_MOST_NODES} values, aliases counted.")
            values = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        # Without the line itself, which may hold the password of a camera.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: not valid YAML: {' '.join(problem.split())}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply.") from None
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError):
        # Of values that look like dates and numbers, and are none.
        raise UserError(
            f"{path}: not valid YAML: a value is no date or number although it looks like one, or "
            "is marked as one (!!int). Put it in quotes."
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, found a {type(values).__name__}.")
    return values


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a document has when its aliases are written out."""
    if id(node) not in known:
        known[id(node)] = 1  # of what refers to itself
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in below)
    return known[id(node)]


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


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with every default filled in and local paths made absolute."""
    values = config.model_dump(mode="json")

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    data, augment = values["data"], values["augment"]
    for section, key in (
        (data, "train"),
        (data, "validation"),
        (data, "rehearsal"),
        (augment, "noise_dir"),
        (augment, "reverb_dir"),
    ):
        section[key] = absolute(section[key])
    sets = data["source_domain"].items()
    data["source_domain"] = {name: absolute(path) for name, path in sets}
    return values


def build_config(values: Mapping[str, Any], *, origin: str = "configuration") -> Config:
    """Check values and build the configuration.

    Raises:
        UserError: an unknown key (with the nearest valid one) or a value of the wrong kind.
    """
    values = _with_new_names(values, origin)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])[:_LONGEST_NAME]
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{name}'.{nearest_field(name)}")
            else:
                message = item["msg"].removeprefix("Value error, ")
                where = f"{name}: " if name else ""
                problems.append(f"{where}{message}{_found(item['input'])}.")
        more = f" And {len(problems) - _MOST_PROBLEMS} more." if problems[_MOST_PROBLEMS:] else ""
        raise UserError(f"{origin}: " + " ".join(problems[:_MOST_PROBLEMS]) + more) from None


def _found(value: Any) -> str:
    """A wrong value, short; nothing for a whole section."""
    if isinstance(value, (dict, BaseModel)) or value == "":
        return ""
    return f", found {shortened(value)}"


def checked(model: type[Checked], values: Any, where: str) -> Checked:
    """Values of a file as what they should be.

    Raises:
        UserError: the first that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])[:_LONGEST_NAME]
        raise UserError(f"{where}: {name}: {first['msg']}{_found(first['input'])}.") from None


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load a YAML configuration and put overrides (nested as in the file) on top."""
    values = _with_new_names(read_yaml(path), str(path))
    return build_config(merge(values, overrides or {}), origin=str(path))


def _with_new_names(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    renamed = with_new_names(values, CONFIGURATION, origin)
    if isinstance(renamed.get("data"), Mapping):
        renamed["data"] = with_new_names(renamed["data"], DATA, f"{origin}: data")
    return renamed


# --- columns of tables ---------------------------------------------------------------------------


def text_columns(config: DataConfig, *, labelled: bool = True) -> dict[str, str | None]:
    """The column of each role for texts: text, label, target, group; None for one that is not used.

    A column has one role: a default name gives way to a name that was chosen, which is logged.

    Raises:
        UserError: one column in two roles.
    """
    roles = {"text_column": config.text_column or "text"}
    if labelled:
        roles["label_column"] = config.label_column
    return _distinct(roles, config, ("target_column", "group_column"))


def speech_columns(config: DataConfig) -> dict[str, str | None]:
    """The column of each role for clips: file, text, group, language, start, end; see
    `text_columns`.
    """
    roles = {
        "file_column": config.file_column,
        "text_column": config.text_column or "transcription",
    }
    return _distinct(roles, config, ("group_column", "language_column", "start", "end"))


def _distinct(
    needed: dict[str, str], config: DataConfig, optional: Sequence[str]
) -> dict[str, str | None]:
    roles: dict[str, str | None] = {}
    chosen: dict[str, str] = {}
    defaults: dict[str, str] = {}
    for setting in (*needed, *optional):
        column = needed.get(setting) or getattr(config, setting, setting)
        if column is None:
            roles[setting] = None
        elif setting in optional and column == USUAL_COLUMNS[setting]:
            defaults[setting] = column
        else:
            other = chosen.setdefault(column, setting)
            if other != setting:
                raise UserError(
                    f"data.{other} and data.{setting} are the same column, '{column}'. Name a "
                    f"different one for each{_or_none(setting, optional)}."
                )
            roles[setting] = column
    for setting, column in defaults.items():
        taken = chosen.get(column)
        if taken is not None:
            kind = setting.removesuffix("_column")
            logger.info("column '%s' is data.%s; no %s column is used", column, taken, kind)
        roles[setting] = None if taken is not None else column
    return {setting: roles[setting] for setting in (*needed, *optional)}


def _or_none(setting: str, optional: Sequence[str]) -> str:
    return f", or set data.{setting}: none" if setting in optional else ""
