"""Any model by its name: run folder, checkpoint folder, Hub id or bundled source."""

from __future__ import annotations

from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.speech.ctc import CtcModel, load_ctc_model
from mmtransfer.speech.whisper import SpeechModel, load_speech_model
from mmtransfer.text.classifier import TextModel, load_text_model

Model = SpeechModel | CtcModel | TextModel


def load(
    source: str | Checkpoint, *, revision: str | None = None, language: str | None = None
) -> Model:
    """Load a finished transfer in any form, or a pretrained model, ready for use.

    A `TextModel` has `predict(texts)`; a `SpeechModel` or `CtcModel` is what `Recognizer` takes.
    `revision` reaches every part of a Hub model.

    Raises:
        UserError: not found, or nothing that this toolkit runs.
    """
    found = source if isinstance(source, Checkpoint) else resolve(source, revision)
    if found.kind == "sentiment":
        return load_text_model(found)
    if found.kind == "ctc":
        return load_ctc_model(found, language=language)
    return load_speech_model(found, language=language)
