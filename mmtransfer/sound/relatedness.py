"""What clips of sounds of a target and of source domains are like, and their features."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.sound.classifier import SoundModel, new_sound_model
from mmtransfer.sound.examples import clip_labels, read_sounds, sound_labels
from mmtransfer.speech.clips import Clip
from mmtransfer.speech.relatedness import CLIPS, bandwidth_hz, clip_features, snr_db
from mmtransfer.speech.relatedness import FIGURES as SPEECH_FIGURES
from mmtransfer.text.relatedness import FIGURES as TEXT_FIGURES
from mmtransfer.transfer.features import FeatureStore
from mmtransfer.transfer.relatedness import draw, evenness
from mmtransfer.transfer.splits import training_data

FIGURES = {name: SPEECH_FIGURES[name] for name in ("bandwidth_khz", "snr_db")}
FIGURES["balance"] = TEXT_FIGURES["balance"]


class SoundInputs:
    """Clips of a target and of source-domain sets, up to `CLIPS` of each set drawn at random, of
    each clip the first `data.window_seconds`.

    Raises:
        UserError: unusable data, one class only, or clips with several classes.
    """

    figures = FIGURES
    rows_are_labelled = False
    """Labels belong to whole clips."""

    def __init__(self, config: Config, source: Checkpoint, device: torch.device):
        self._config, self._device = config, device
        self._sets: dict[str, list[Clip]] = {}
        self._totals: dict[str, int] = {}
        target = read_sounds(training_data(config), config.data, name="target")
        self._classes, is_multi = sound_labels(target)
        if is_multi:
            raise UserError(
                "target: clips with several classes at once cannot be related; give each clip one."
            )
        self._add("target", [clip for clip in target.clips if clip_labels(clip)])
        for name, path in config.data.source_domain.items():
            self._add(name, read_sounds(path, config.data, name=name).clips)

    def _add(self, name: str, clips: list[Clip]) -> None:
        self._totals[name] = len(clips)
        self._sets[name] = draw(clips, CLIPS, self._config.runtime.seed)

    @property
    def samples(self) -> dict[str, str]:
        """How much of each set is looked at."""
        longest = self._config.data.window_seconds
        return {
            name: f"{len(found)} of {self._totals[name]} clips, up to {longest:g} s of each"
            for name, found in self._sets.items()
        }

    @property
    def labelled_by(self) -> str:
        """What the labels are."""
        return f"classes ({', '.join(self._classes[:8])})"

    def labels(self) -> tuple[list[str], list[str]]:
        """Label of each of the target's clips, and what it belongs together with."""
        clips = self._sets["target"]
        return [clip_labels(c)[0] for c in clips], [c.group or str(c.path) for c in clips]

    def open(self, checkpoint: Checkpoint) -> SoundModel:
        """A backbone, with a head that is not used.

        Raises:
            UserError: not a speech encoder.
        """
        data, head = self._config.data, self._config.head
        return new_sound_model(checkpoint, ["a", "b"], is_multi=False, data=data, head=head)

    def features(self, model: SoundModel, name: str) -> FeatureStore:
        """Mean-pooled states [1, layer, width] of a set's clips on every layer."""
        clips, longest = self._sets[name], self._config.data.window_seconds
        times: list[list[float]] = [[] for _ in clips]
        return clip_features(model, name, clips, times, self._config, self._device, longest)

    def describe(self, model: SoundModel, name: str) -> dict[str, float | None]:
        """Figures of one set."""
        clips = self._sets[name]
        levels = [snr_db(clip.samples()) for clip in clips]
        bands = [bandwidth_hz(clip.samples()) for clip in clips]
        known_levels = [level for level in levels if level is not None]
        known_bands = [band / 1000 for band in bands if band is not None]
        counts = Counter(label for clip in clips for label in clip_labels(clip))
        return {
            "bandwidth_khz": float(np.median(known_bands)) if known_bands else None,
            "snr_db": float(np.median(known_levels)) if known_levels else None,
            "balance": evenness(list(counts.values()), len(self._classes)),
        }

    def describe_pair(self, name: str) -> dict[str, float | None]:
        """Figures of the target and another set: none beside distances."""
        return {}
