"""The models of a server by the names that clients call them by, each loaded once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.monitoring.options import MonitorOptions, RecognitionOptions
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.server.options import COMPUTING, RECOGNIZING, ServerOptions, short_name
from mmtransfer.server.problems import Problem
from mmtransfer.server.shared import Door, SharedRecognizer, Urgency
from mmtransfer.speech.engine import DecodingOptions
from mmtransfer.speech.recognizers import open_recognizer

if TYPE_CHECKING:
    from mmtransfer.sound.classifier import SoundModel
    from mmtransfer.text.classifier import TextModel


@dataclass
class Models:
    """What is served."""

    speech: dict[str, SharedRecognizer] = field(default_factory=dict)
    texts: dict[str, TextModel] = field(default_factory=dict)
    sounds: dict[str, SoundModel] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    """When they were loaded, in seconds since 1970."""
    _shared: dict[tuple[Any, ...], SharedRecognizer] = field(default_factory=dict)
    """Recognisers by the digests of their checkpoints and by how they compute and search."""

    @property
    def names(self) -> list[str]:
        """Of all of them."""
        return [*self.speech, *self.texts, *self.sounds]

    def recognizer(self, name: str | None) -> SharedRecognizer:
        """The speech model of that name; the first where none is named.

        Raises:
            Problem: there is none (404).
        """
        return named(self.speech, name or next(iter(self.speech), ""), "speech")

    def open_speech(
        self,
        checkpoint: Checkpoint,
        *,
        language: str | None,
        context_s: float | None,
        options: DecodingOptions,
        **computing: Any,
    ) -> Door:
        """As `open_recognizer`, for a camera: of a model that is open already and computes and
        searches as the camera wants it, that one.
        """
        shared = self._open(checkpoint, None, options, computing)
        return shared.open(
            Urgency.CAMERA,
            language=language or shared.language,
            prompt=options.prompt,
            context_s=context_s,
        )

    def _open(
        self,
        checkpoint: Checkpoint,
        language: str | None,
        options: DecodingOptions,
        computing: Mapping[str, Any],
    ) -> SharedRecognizer:
        """A recogniser that detects the language where none is given; each door may have its own,
        and its own prompt.
        """
        own = (checkpoint.digest, *sorted(computing.items()), options.beam_size)
        if checkpoint.kind == "ctc":  # it has no words with times, nor languages
            keys: list[tuple[Any, ...]] = [own]
        else:
            # One that gives all words their times does for those who need fewer.
            keys = [(*own, words_from_s) for words_from_s in (0.0, options.words_from_s)]
            language, options = language or "auto", replace(options, prompt="")
        for key in keys:
            if key in self._shared:
                return self._shared[key]
        opened = open_recognizer(checkpoint, language=language, options=options, **computing)
        shared = self._shared[keys[-1]] = SharedRecognizer(opened)
        return shared

    def add(self, name: str, checkpoint: Checkpoint, options: RecognitionOptions) -> None:
        """Load a model of any kind.

        Raises:
            UserError: a model that cannot be used.
        """
        if checkpoint.kind == "sentiment":
            from mmtransfer.runs.models import load

            self.texts[name] = cast("TextModel", load(checkpoint))  # or several in one
        elif checkpoint.kind == "sound":
            from mmtransfer.sound.classifier import load_sound_model

            self.sounds[name] = load_sound_model(checkpoint)
        else:
            if checkpoint.kind == "ctc":
                options = replace(options, words=False, language=None)
            computing = {part: getattr(options, part) for part in COMPUTING}
            self.speech[name] = self._open(
                checkpoint, options.language, options.decoding, computing
            )


def open_models(options: ServerOptions, watched: MonitorOptions | None = None) -> Models:
    """Load all models of these options; where they name none, that of the cameras.

    Raises:
        UserError: a model that cannot be used.
    """
    models, sources = Models(), dict(options.models)
    of_cameras = set[str | None]()
    if watched is not None:
        sources = sources or {short_name(watched.model): watched.model}
        own = [one.model for one in watched.sources if isinstance(one, Camera)]
        of_cameras = {watched.model, *own}
    found = {name: resolve(source) for name, source in sources.items()}
    for name, checkpoint in found.items():
        asked = options.recognition(sources[name])
        if watched is not None and sources[name] in of_cameras:  # they share it if they can
            theirs = {one: getattr(watched, one) for one in RECOGNIZING}
            asked = replace(asked, **theirs | options.recognizing)
        models.add(name, checkpoint, asked)
    return models


def named(models: Mapping[str, Any], name: str, kind: str) -> Any:
    """The model of that name.

    Raises:
        Problem: there is none (404).
    """
    if name not in models:
        known = ", ".join(models) or "none"
        raise Problem(
            404,
            f"model '{name:.60}': no model for {kind} of that name is served; known: {known}.",
            code="model_not_found",
        )
    return models[name]
