"""The models of a server by the names that clients call them by, each loaded once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.monitoring.options import MonitorOptions, RecognitionOptions
from mmtransfer.server.options import ServerOptions, short_name
from mmtransfer.server.problems import Problem
from mmtransfer.server.shared import Door, SharedRecognizer, Urgency
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
    _shared: dict[str, SharedRecognizer] = field(default_factory=dict)
    """Recognisers by the digests of their checkpoints."""

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

    def open_speech(self, checkpoint: Checkpoint, **options: Any) -> Door:
        """As `open_recognizer`, for a camera: of a model that is served already, that one."""
        shared = self._shared.get(checkpoint.digest)
        if shared is None:
            shared = self._shared[checkpoint.digest] = SharedRecognizer(
                open_recognizer(checkpoint, **options)
            )
        language, decoding = options.get("language"), options["options"]
        return shared.open(Urgency.CAMERA, language=language, prompt=decoding.prompt)

    def add(self, name: str, checkpoint: Checkpoint, options: RecognitionOptions) -> None:
        """Load a model of any kind.

        Raises:
            UserError: a model that cannot be used.
        """
        if checkpoint.kind == "sentiment":
            from mmtransfer.text.classifier import load_text_model

            self.texts[name] = load_text_model(checkpoint)
        elif checkpoint.kind == "sound":
            from mmtransfer.sound.classifier import load_sound_model

            self.sounds[name] = load_sound_model(checkpoint)
        else:
            if checkpoint.kind == "ctc":  # it has no words with times, nor languages
                options = replace(options, words=False, language=None)
            shared = self._shared.get(checkpoint.digest) or SharedRecognizer(
                open_recognizer(
                    checkpoint,
                    language=options.language,
                    engine=options.engine,
                    compute_type=options.compute_type,
                    device=options.device,
                    threads=options.threads,
                    options=options.decoding,
                )
            )
            self._shared[checkpoint.digest] = self.speech[name] = shared


def open_models(options: ServerOptions, watched: MonitorOptions | None = None) -> Models:
    """Load all models of these options; where they name none, that of the cameras.

    Raises:
        UserError: a model that cannot be used.
    """
    models = Models()
    sources = dict(options.models)
    if not sources and watched is not None:
        sources = {short_name(watched.model): watched.model}
    found = {name: resolve(source) for name, source in sources.items()}
    for name, checkpoint in found.items():
        models.add(name, checkpoint, options.recognition(sources[name]))
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
