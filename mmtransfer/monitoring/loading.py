"""A monitor by its model's name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.monitoring.decoding import TextClasses
from mmtransfer.monitoring.events import Transcript
from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS
from mmtransfer.monitoring.monitor import Monitor
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.monitoring.sound_events import SoundClasses
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.kinds import goes_on
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.segments import SegmenterSettings

_TURN_TIMED_FROM_S = 1.5  # the words of a turn this long get times, by which they find their lines
_WINDOW_TIMED_FROM_S = 4.0  # those of a window, by which it is seen whether words are missing


def load_monitor(
    model: str | Path | RecognitionOptions,
    *,
    cameras: Sequence[Camera] = (),
    models: Mapping[str, Checkpoint] | None = None,
    settings: SegmenterSettings | None = None,
    live: LiveSettings | None = None,
    alert_clips: Path | None = None,
    open_speech: Callable[..., Recognizer] | None = None,
    **options: Any,
) -> Monitor:
    """A monitor with a run folder's, checkpoint's, Hub or bundled model; other `options` are fields
    of `RecognitionOptions`, which may stand in the place of the model.

    `cameras` may name models and languages of their own; if one is live, all memory that
    recognition needs is allocated at once. `models` are those of `resolve_models`, where they are
    known already. In `alert_clips` a short recording is kept around each alert. `open_speech` opens
    recognisers where they are shared with others.

    Raises:
        UserError: a model or an option that cannot be used.

    Example:
        load_monitor("runs/site", language="de", words=True).watch(["gate.mp4"])
    """
    if isinstance(model, RecognitionOptions):
        model = replace(model, **options)
    else:
        model = RecognitionOptions(str(model), **options)
    found = resolve_models(model, cameras) if models is None else models
    recognizers = Recognizers(model, found, cameras, open_speech)
    others = recognizers.own(cameras)
    classifier = text_classifier(found[model.sentiment]) if model.sentiment else None
    sounds = None
    if model.sounds:
        sounds = sound_classes(found[model.sounds], model.sound_thresholds or {}, model.device)
    own = recognizers.open(model.model, model.language)
    recognizers.warm_up()
    return Monitor(
        own,
        settings,
        live=live,
        others=others,
        classifier=classifier,
        alert_clips=alert_clips,
        sounds=sounds,
        lines=model.lines,
        with_words=model.words,
    )


def recognizer_of(
    checkpoint: Checkpoint,
    options: RecognitionOptions,
    *,
    words_from_s: float = _WINDOW_TIMED_FROM_S,
    open_speech: Callable[..., Recognizer] = open_recognizer,
) -> Recognizer:
    """A recogniser with a model; the words of speech of that length get times in any case.

    Raises:
        UserError: a model or an option that cannot be used.
    """
    decoding = options.decoding
    # What may have to be split into lines needs the times of its words.
    words_from_s = min(words_from_s, decoding.words_from_s, options.line_s)
    return open_speech(
        checkpoint,
        language=options.language,
        engine=options.engine,
        compute_type=options.compute_type,
        device=options.device,
        threads=options.threads,
        context_s=options.shortest_context_s,
        options=replace(decoding, words_from_s=words_from_s),
    )


class Recognizers:
    """Recognisers by model and language, each opened once, for these cameras; `models` are those of
    `resolve_models`, `open_speech` opens them where they are shared with others.
    """

    def __init__(
        self,
        options: RecognitionOptions,
        models: Mapping[str, Checkpoint],
        cameras: Sequence[Camera],
        open_speech: Callable[..., Recognizer] | None = None,
    ):
        self._options, self._models = options, models
        self._open = open_speech or open_recognizer
        self._has_live = any(goes_on(camera) for camera in cameras)
        self._opened: dict[tuple[str, str | None], Recognizer] = {}

    def open(self, model: str, language: str | None) -> Recognizer:
        """That of a model and a language."""
        if (model, language) not in self._opened:
            self._opened[model, language] = recognizer_of(
                self._models[model],
                replace(self._options, language=language),
                words_from_s=_TURN_TIMED_FROM_S if self._has_live else _WINDOW_TIMED_FROM_S,
                open_speech=self._open,
            )
        return self._opened[model, language]

    def own(self, cameras: Sequence[Camera]) -> dict[str, Recognizer]:
        """Those of cameras, by name, that name a model or a language of their own."""
        options = self._options
        return {
            camera.name: self.open(
                camera.model or options.model, camera.language or options.language
            )
            for camera in cameras
            if camera.model or camera.language
        }

    def warm_up(self) -> None:
        """Allocate all memory that live cameras need at once."""
        for recognizer in self._opened.values() if self._has_live else ():
            recognizer.warm_up(BATCH_SEGMENTS)


def resolve_models(
    options: RecognitionOptions, cameras: Sequence[Camera] = ()
) -> dict[str, Checkpoint]:
    """Every model that options and cameras name, by that name, each found once.

    Raises:
        UserError: a model that cannot be found.
    """
    own = [camera.model for camera in cameras]
    names = [options.model, *own, options.sentiment, options.sounds]
    return {name: resolve(name) for name in dict.fromkeys(names) if name is not None}


def text_classifier(checkpoint: Checkpoint) -> TextClasses:
    """What gives texts the classes of a sentiment model, from any thread.

    Raises:
        UserError: not a text classifier.
    """
    from mmtransfer.runs.models import load
    from mmtransfer.text.classifier import TextModel

    model = load(checkpoint)
    if not isinstance(model, TextModel):
        raise UserError(
            f"{checkpoint.source}: expected a model that classifies texts, found one of speech."
        )

    one_at_a_time = threading.Lock()  # a tokenizer keeps how it was last asked to cut

    def classifier(texts: list[str]) -> list[tuple[str, float]]:
        with one_at_a_time:
            found = model.predict(texts)
        return [(verdict.label, verdict.probabilities[verdict.label]) for verdict in found]

    return classifier


def sound_classes(
    checkpoint: Checkpoint, thresholds: Mapping[str, float], device: str
) -> SoundClasses:
    """What classifies sounds with a model, on a device as in `RecognitionOptions`.

    Raises:
        UserError: not a sound classifier, a threshold of a class that it does not have, or a device
            that is not there.
    """
    from mmtransfer.config import RuntimeConfig
    from mmtransfer.runtime import choose_device
    from mmtransfer.sound.classifier import load_sound_model

    model = load_sound_model(checkpoint)
    where = choose_device(RuntimeConfig.model_validate({"device": device}))
    model.network.to(where)

    def classify(windows: Sequence[np.ndarray]) -> np.ndarray:
        def piece(number: int, start: int, end: int) -> np.ndarray:
            return windows[number][start:end]

        lengths = [len(window) for window in windows]
        return model.probabilities(model.logits(lengths, piece, device=where))

    return SoundClasses(model.labels, model.window_s, classify, thresholds)


def monitor(
    model: str | Path | RecognitionOptions, source: str | Path, **options: Any
) -> Iterator[Transcript]:
    """Transcripts of a recording, each as soon as it is recognised; options as `load_monitor`.

    Example:
        for line in monitor("runs/site", "gate.mp4"):
            print(line.start, line.text)
    """
    yield from load_monitor(model, **options).transcribe(source)
