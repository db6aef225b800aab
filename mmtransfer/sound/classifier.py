"""Sound classifiers: audio of any length in, class probabilities out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.config import DataConfig, HeadConfig, checked
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, other_kind
from mmtransfer.hub.files import METADATA, load_errors
from mmtransfer.hub.metadata import Base, damaged, write_metadata
from mmtransfer.hub.settings import check_labels
from mmtransfer.progress import no_library_bars
from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    LongMediaError,
    decode_clip,
    is_piped,
    stream_audio,
)
from mmtransfer.speech.contexts import context_step_s
from mmtransfer.speech.ctc import load_encoder, load_extractor
from mmtransfer.speech.mixing import brought_up
from mmtransfer.transfer.adapters import load_merged, save_adapter
from mmtransfer.transfer.encoders import SpeechEncoder, speech_encoder
from mmtransfer.transfer.networks import Network, build_head, check_base, read_head, write_head

logger = logging.getLogger(__name__)
LONGEST_S = 30.0
"""Longest window."""
BATCH_SECONDS = 120.0
"""Audio per forward pass where nothing else is asked for."""
LONGEST_CLIP_S = 4 * 3600.0
"""Longest clip of a data set, which is held as a whole."""
NONE = "none"
"""What a clip is called that holds no sound of any class."""
_PART_S = 3600.0  # of a recording, held at a time
_THRESHOLD = 0.5  # of a class, where a clip can have several
_LEAST = 1e-7  # probability; keeps logarithms finite

Piece = Callable[[int, int, int], np.ndarray]
"""Samples of a clip, by its number, from one sample to another."""


@dataclass(frozen=True)
class SoundPrediction:
    """What a clip holds."""

    label: str
    """Its class; where clips can have several, those over 0.5, separated by `;`."""
    probabilities: dict[str, float]
    """Of every class, after temperature scaling."""


@dataclass
class SoundModel:
    """A speech encoder with a classification head over sounds."""

    network: Network
    extractor: Any
    labels: list[str]
    window_s: float
    """Longer clips are classified in windows of this length, whose probabilities are averaged."""
    is_multi: bool
    """Whether a clip can have several classes, or none."""
    base: Base
    temperature: float = 1.0
    """Divides the logits; fitted on validation data (Guo et al. 2017)."""
    source: str = ""
    """Name it was loaded by."""
    is_source_head: bool = False
    """Whether the head came with the source, so that the source can be scored."""

    @property
    def encoder(self) -> SpeechEncoder:
        """What the head stands on."""
        encoder = self.network.encoder
        if not isinstance(encoder, SpeechEncoder):
            raise TypeError("a sound classifier stands on a speech encoder")
        return encoder

    # --- windows ----------------------------------------------------------------------------

    def windows(self, samples: int) -> list[tuple[int, int]]:
        """(start, end) of the windows of a clip of so many samples. They overlap by half, and the
        last one ends with the clip.
        """
        size = round(self.window_s * SAMPLE_RATE)
        starts = range(0, max(1, samples - size), size // 2)
        last = max(0, samples - size)
        found = [*starts] if samples <= size else [*starts, last]
        return [(start, min(start + size, samples)) for start in found]

    def context_s(self, seconds: float) -> float:
        """Context of a window: its length on the grid of steps, or that of the encoder's input."""
        if self.encoder.input_samples is not None:
            return self.encoder.input_samples / SAMPLE_RATE
        return context_step_s(min(seconds, self.window_s), LONGEST_S)

    def inputs(self, pieces: Sequence[np.ndarray], context_s: float) -> dict[str, torch.Tensor]:
        """Encoder inputs of windows of 16-kHz samples, each padded with silence to the context."""
        return self.encoder.inputs(self.extractor, pieces, round(context_s * SAMPLE_RATE))

    def frames(self, seconds: float) -> int:
        """Hidden states of a window of that length."""
        return self.encoder.frames(round(seconds * SAMPLE_RATE))

    def mask(self, seconds: Sequence[float], context_s: float) -> torch.Tensor:
        """Which frames [window, frame] of a context hold the windows."""
        total = self.frames(context_s)
        lengths = torch.tensor([min(self.frames(s), total) for s in seconds])
        return torch.arange(total)[None] < lengths[:, None]

    def average(self, logits: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
        """Logits of clips [clip, class], of the mean probabilities of their windows.

        `logits` are [window, class], `owner` the clip of each window.
        """
        shares = (logits.sigmoid() if self.is_multi else logits.softmax(-1)).double()
        total = shares.new_zeros(count, shares.shape[1]).index_add_(0, owner, shares)
        mean = total / torch.bincount(owner, minlength=count)[:, None]
        mean = mean.clamp(_LEAST, 1 - _LEAST)
        return (mean.logit() if self.is_multi else mean.log()).float()

    # --- classes ----------------------------------------------------------------------------

    def logits(
        self,
        lengths: Sequence[int],
        piece: Piece,
        *,
        device: torch.device | str,
        batch_seconds: float = BATCH_SECONDS,
    ) -> np.ndarray:
        """Logits [clip, class] of clips of so many samples, before temperature scaling."""
        was_training = self.network.training
        self.network.eval()
        groups: dict[float, list[tuple[int, int, int]]] = defaultdict(list)
        for clip, samples in enumerate(lengths):
            for start, end in self.windows(samples):
                groups[self.context_s((end - start) / SAMPLE_RATE)].append((clip, start, end))
        logits, owner = [], []
        for context, windows in sorted(groups.items()):
            size = max(1, int(batch_seconds / context))
            for first in range(0, len(windows), size):
                part = windows[first : first + size]
                inputs = self.inputs([piece(*window) for window in part], context)
                mask = self.mask([(end - start) / SAMPLE_RATE for _, start, end in part], context)
                with torch.inference_mode():
                    moved = {name: value.to(device) for name, value in inputs.items()}
                    logits.append(self.network(moved, mask.to(device)).float().cpu())
                owner += [clip for clip, _, _ in part]
        self.network.train(was_training)
        return self.average(torch.cat(logits), torch.tensor(owner), len(lengths)).numpy()

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities [clip, class]."""
        scaled = torch.from_numpy(logits).double() / self.temperature
        return (scaled.sigmoid() if self.is_multi else functional.softmax(scaled, -1)).numpy()

    def predict(
        self,
        sounds: Sequence[str | Path | np.ndarray],
        *,
        device: torch.device | str | None = None,
    ) -> list[SoundPrediction]:
        """Classes of recordings (paths, or float32 samples at 16 kHz), in their order.

        Raises:
            MediaError: a recording that cannot be decoded.
        """
        where = device or next(self.network.parameters()).device
        found = []
        for sound in sounds:
            parts = [sound] if isinstance(sound, np.ndarray) else _parts(sound)
            found.append(self._predict(parts, where))
        return found

    def _predict(self, parts: Iterable[np.ndarray], device: torch.device | str) -> SoundPrediction:
        """The prediction for a recording in parts, each as much as memory should hold."""
        rows, windows = [], []
        for samples in parts:

            def piece(_: int, start: int, end: int, samples: np.ndarray = samples) -> np.ndarray:
                return samples[start:end]

            rows.append(self.logits([len(samples)], piece, device=device)[0])
            windows.append(len(self.windows(len(samples))))
        logits = torch.from_numpy(np.stack(rows))
        if len(rows) > 1:
            each = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(windows))
            logits = self.average(logits[each], torch.zeros_like(each), 1)
        [row] = self.probabilities(logits.numpy())
        if self.is_multi:
            over = [x for x, p in zip(self.labels, row, strict=True) if p > _THRESHOLD]
            label = ";".join(over) or NONE
        else:
            label = self.labels[int(row.argmax())]
        return SoundPrediction(
            label, {name: float(p) for name, p in zip(self.labels, row, strict=True)}
        )

    # --- on disk ----------------------------------------------------------------------------

    def save(self, folder: Path, form: str, adapted: Any = None) -> None:
        """Write the model in a form of `networks`; `adapted` is the peft model of an adapter."""
        with no_library_bars():
            if form == "full":
                self.encoder.model.save_pretrained(folder)
            elif form == "adapter":
                save_adapter(adapted, folder)
            self.extractor.save_pretrained(folder)
        if self.network.head is not None:
            write_head(folder, self.network.head)
        write_metadata(
            folder,
            task="sound",
            form=form,
            base=self.base,
            labels=self.labels,
            head=self.network.config.model_dump(mode="json"),
            temperature=self.temperature,
            window_s=self.window_s,
            is_multi=self.is_multi,
        )


def _parts(path: str | Path) -> Iterator[np.ndarray]:
    """A recording's samples; of one that is longer than an hour, hour by hour."""
    try:
        if not is_piped(str(path)):  # which can be decoded once only
            yield decode_clip(path, longest_s=_PART_S)
            return
    except LongMediaError:
        pass
    blocks: list[np.ndarray] = []
    waiting = 0
    for block in stream_audio(path):
        blocks.append(block)
        waiting += len(block)
        if waiting >= _PART_S * SAMPLE_RATE:
            yield brought_up(np.concatenate(blocks))
            blocks, waiting = [], 0
    if blocks:
        yield brought_up(np.concatenate(blocks))


def new_sound_model(
    checkpoint: Checkpoint,
    labels: list[str],
    *,
    is_multi: bool,
    data: DataConfig,
    head: HeadConfig,
    seed: int = 0,
) -> SoundModel:
    """A source's encoder with a new head for these labels; or a source classifier of the same ones
    with its own head.

    Raises:
        UserError: not a speech encoder.
    """
    source = checkpoint.source
    if checkpoint.kind == "sentiment":
        raise other_kind(checkpoint, "a speech encoder")
    if checkpoint.kind == "sound":
        found = load_sound_model(checkpoint)
        # Its weights are in no public place, so what comes of it is saved whole.
        found.base, found.window_s = Base(source), window_length_s(found.encoder, data)
        wanted = head.model_dump(exclude={"dropout", "type"})
        same_head = wanted == found.network.config.model_dump(exclude={"dropout", "type"})
        if same_head and found.labels == labels and found.is_multi == is_multi:
            found.is_source_head = True
            return found
        encoder, extractor, base = found.encoder, found.extractor, found.base
    elif checkpoint.form != "full":
        raise UserError(
            f"{source}: expected a whole model, found an adapter or a head. Train it with "
            "transfer.merge_adapter: true, or name the model that it stands on."
        )
    else:
        encoder = speech_encoder(load_encoder(checkpoint))
        extractor = load_extractor(source, checkpoint.folder)
        base = checkpoint.as_base()
    module = build_head("classifier", encoder.width, encoder.depth, len(labels), head, seed)
    network = Network(encoder, module, head)
    window_s = window_length_s(encoder, data)
    return SoundModel(network, extractor, labels, window_s, is_multi, base, 1.0, source)


def window_length_s(encoder: SpeechEncoder, data: DataConfig) -> float:
    """Length of the windows of clips: as configured, and no more than the encoder takes."""
    most = encoder.input_samples
    if most is None or data.window_seconds * SAMPLE_RATE <= most:
        return data.window_seconds
    logger.warning(
        "data.window_seconds: %g s is more than the encoder takes; clips are cut into windows of "
        "%.2f s, whose probabilities are averaged",
        *(data.window_seconds, most / SAMPLE_RATE),
    )
    return most / SAMPLE_RATE


def load_sound_model(checkpoint: Checkpoint) -> SoundModel:
    """Load a sound classifier: a finished transfer in any form.

    Raises:
        UserError: no sound classifier.
    """
    source, metadata = checkpoint.source, checkpoint.metadata
    if metadata is None or metadata.task != "sound":
        raise other_kind(checkpoint, "a sound classifier")
    base, labels, window_s = metadata.base, metadata.labels, metadata.window_s
    temperature, is_multi = metadata.temperature, metadata.own.get("is_multi")
    if base is None or metadata.head is None or not labels or not isinstance(is_multi, bool):
        raise damaged(checkpoint.folder / METADATA)
    check_labels(labels, checkpoint.folder / METADATA)
    if not window_s or not isinstance(temperature, int | float) or not temperature > 0:
        raise damaged(checkpoint.folder / METADATA)
    model = load_encoder(checkpoint)
    if checkpoint.recorded is not None:
        check_base(model, checkpoint.recorded)
    if checkpoint.adapter is not None:
        model = load_merged(model, checkpoint.adapter)
    encoder = speech_encoder(model)
    head = checked(HeadConfig, metadata.head, f"{checkpoint.folder / METADATA}: head")
    module = build_head("classifier", encoder.width, encoder.depth, len(labels), head, 0)
    read_head(checkpoint.folder, module)
    network = Network(encoder, module, head).eval()
    extractor = load_extractor(source, checkpoint.folder)
    found = SoundModel(
        network, extractor, labels, window_s, is_multi, base, float(temperature), source
    )
    with load_errors(source, "a sound classifier"):  # of settings that only show when it computes
        found.predict([np.zeros(SAMPLE_RATE, np.float32)], device="cpu")
    return found
