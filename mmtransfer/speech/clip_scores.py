"""Scores of clips: what a recogniser makes of them, each by the rules of its language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmtransfer.config import Config
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.speech.clips import Clip, ClipSet
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.engine import DecodingOptions, Hypothesis
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.recognizers import engine_for, open_recognizer
from mmtransfer.speech.scores import (
    ClipScore,
    SpeechScore,
    default_normalizer,
    get_normalizer,
    score_clip,
    speech_metric,
    summarize_speech,
)
from mmtransfer.speech.whisper import SpeechModel


class ClipScoring:
    """How a set of clips is scored: each by the rules of its language, all by `metric`, or else by
    that of their languages.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        language: str | None,
        config: Config,
        metric: str | None = None,
    ):
        self._own, self._config = language, config
        self._normalizers: dict[str, Any] = {}
        spoken = {clip.language or language for clip in clips}
        metrics = {speech_metric(code) for code in spoken}
        self.metric = metric or ("cer" if metrics == {"cer"} else "wer")
        """The metric that counts for the set."""
        self._name = ", ".join(sorted({self._normalizer_name(code) for code in spoken}))

    def _normalizer_name(self, language: str | None) -> str:
        return self._config.evaluation.normalizer or default_normalizer(language)

    def score(self, clip: Clip, text: str) -> ClipScore:
        """Errors of what was recognised in a clip."""
        name = self._normalizer_name(clip.language or self._own)
        if name not in self._normalizers:
            self._normalizers[name] = get_normalizer(name)
        return score_clip(clip.text, text, self._normalizers[name])

    def summary(self, records: Sequence[ClipScore]) -> SpeechScore:
        """Scores of the whole set."""
        return summarize_speech(
            records,
            normalizer=self._name,
            metric=self.metric,
            bootstrap_samples=self._config.evaluation.bootstrap_samples,
            seed=self._config.runtime.seed,
        )

    def by_language(
        self, clips: Sequence[Clip], records: Sequence[ClipScore]
    ) -> dict[str, dict[str, Any]]:
        """Where there are several languages, the rate of each by its own metric."""
        parts: dict[str | None, list[int]] = clips_by_language(clips, self._own)
        if len(parts) < 2:
            return {}
        found = {}
        for language, rows in parts.items():
            metric = speech_metric(language)
            score = summarize_speech(
                [records[row] for row in rows],
                normalizer=self._normalizer_name(language),
                metric=metric,
                bootstrap_samples=100,
            )
            rate = getattr(score, metric)
            found[language or "unknown"] = {"clips": len(rows), "metric": metric, metric: rate}
        return found


def clips_by_language(clips: Sequence[Clip], language: str | None) -> dict[str | None, list[int]]:
    """Indices of clips by language; `language` is that of clips that do not say theirs."""
    rows: dict[str | None, list[int]] = defaultdict(list)
    for row, clip in enumerate(clips):
        rows[clip.language or language].append(row)
    return dict(rows)


Opener = Callable[[str | None], Recognizer]
"""Gives what decodes clips of a language."""


def decode_waves(
    speech: SpeechModel | CtcModel,
    waves: Sequence[np.ndarray],
    clips: Sequence[Clip],
    device: torch.device,
    batch_seconds: float,
    *,
    shortest_context_s: float | None = None,
    progress: str | None = None,
    opened: Opener | None = None,
    guards: bool = False,
) -> list[Hypothesis]:
    """What a model recognises in samples, each in the language of its clip; by what `opened` gives,
    or else by the model itself.
    """
    found: dict[int, Hypothesis] = {}
    for language, rows in clips_by_language(clips, speech.language).items():
        if opened is not None:
            recognizer = opened(language)
        else:
            recognizer = Recognizer(
                speaking(speech, language),
                device=device,
                batch_seconds=batch_seconds,
                shortest_context_s=shortest_context_s,
            )
        decoded = recognizer.transcribe(
            [waves[row] for row in rows], guarded=guards, reject=guards, progress=progress
        )
        found |= zip(rows, decoded, strict=True)
    return [found[row] for row in range(len(clips))]


def speaking(speech: SpeechModel | CtcModel, language: str | None) -> SpeechModel | CtcModel:
    """The model with the prompt of a language; a model of one has none for it, and one of
    characters none at all.
    """
    if isinstance(speech, SpeechModel) and speech.language is not None:
        return replace(speech, language=language)
    return speech


def as_monitored(
    checkpoint: Checkpoint, speech: SpeechModel | CtcModel, config: Config, device: torch.device
) -> tuple[Opener, dict[str, Any]]:
    """What `monitor` would decode clips of a language by, with the settings of `evaluation`, and
    what that is: engine, precision, beams, guards, prompt.
    """
    wanted = config.evaluation
    engine = engine_for(checkpoint, wanted.engine or "auto", device.type)
    options = DecodingOptions(wanted.beam_size, prompt=wanted.prompt)
    known: dict[str | None, Recognizer] = {}
    used = {"engine": engine, "precision": "float32", "beams": wanted.beam_size or 1}
    used |= {"guards": wanted.guards, "prompt": wanted.prompt}

    def opened(language: str | None) -> Recognizer:
        if language not in known and engine == "transformers":
            speech.model.to(device)
            known[language] = Recognizer(
                speaking(speech, language),
                device=device,
                options=options,
                batch_seconds=wanted.batch_seconds,
            )
        elif language not in known:
            found = open_recognizer(
                checkpoint,
                language=None if speech.language is None else language,
                engine=engine,
                compute_type=wanted.compute_type,
                device=device.type,
                threads=config.runtime.threads,
                options=options,
            )
            loaded: Any = found.engine
            shortest_s = loaded.shortest_context_s
            used.update(precision=loaded.precision, beams=loaded.beams(shortest_s))
            known[language] = found
        return known[language]

    return opened, used


def decode_clips(
    speech: SpeechModel | CtcModel,
    clips: Sequence[Clip],
    device: torch.device,
    batch_seconds: float,
    **options: Any,
) -> list[Hypothesis]:
    """What a model recognises in clips, each in its language; options as for `decode_waves`."""
    waves = [clip.samples() for clip in clips]
    return decode_waves(speech, waves, clips, device, batch_seconds, **options)


def evaluate_clips(
    speech: SpeechModel | CtcModel,
    clips: ClipSet,
    config: Config,
    device: torch.device,
    *,
    metric: str | None = None,
    **options: Any,
) -> SpeechScore:
    """Score a model on clips at its shortest safe context, by `metric` or else by that of their
    languages; options as for `decode_waves`.
    """
    hypotheses = decode_clips(
        speech,
        clips.clips,
        device,
        config.evaluation.batch_seconds,
        progress=f"evaluating {clips.name}",
        **options,
    )
    scoring = ClipScoring(clips.clips, speech.language, config, metric)
    records = [
        scoring.score(clip, found.text) for clip, found in zip(clips.clips, hypotheses, strict=True)
    ]
    languages = scoring.by_language(clips.clips, records)
    return replace(scoring.summary(records), languages=languages)
