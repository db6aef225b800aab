"""Any model by its name: run folder, checkpoint folder, Hub id or bundled source."""

from __future__ import annotations

from mmtransfer.backbones import SpeechModel, load_speech_model
from mmtransfer.ctc_models import CtcModel, is_ctc, load_ctc_model
from mmtransfer.errors import UserError
from mmtransfer.sources import fetch, model_type, read_metadata
from mmtransfer.text_models import TextModel, load_text_model

Model = SpeechModel | CtcModel | TextModel
_SPEECH_TYPES = ("whisper", "wav2vec2", "hubert", "wavlm")


def load(source: str, *, revision: str | None = None, language: str | None = None) -> Model:
    """Load a finished transfer in any form, or a pretrained model, ready for use.

    A `TextModel` has `predict(texts)`; a `SpeechModel` or `CtcModel` is what `Recognizer` takes.
    `revision` reaches every part of a Hub model.

    Raises:
        UserError: not found, or nothing that this toolkit runs.
    """
    _, commit = fetch(source, revision)
    revision = commit or revision  # the parts below come from the same commit
    task = task_of(source, revision=revision)
    if task == "sentiment":
        return load_text_model(source, revision=revision)
    if task == "ctc":
        return load_ctc_model(source, revision=revision, language=language)
    return load_speech_model(source, revision=revision, language=language)


def task_of(source: str, *, revision: str | None = None) -> str:
    """What a model is for: `speech` (a Whisper), `ctc` or `sentiment`.

    Raises:
        UserError: not found.
    """
    folder, _ = fetch(source, revision)
    metadata = read_metadata(folder)
    if metadata is not None:
        return str(metadata["task"])
    if is_ctc(source, folder):
        return "ctc"
    return "speech" if model_type(source, folder)[0] in _SPEECH_TYPES else "sentiment"


def load_recognizable(
    source: str, *, revision: str | None = None, language: str | None = None
) -> SpeechModel | CtcModel:
    """Load a model that recognises speech.

    Raises:
        UserError: not found, or a text model.
    """
    found = load(source, revision=revision, language=language)
    if isinstance(found, TextModel):
        raise UserError(f"{source}: expected a speech recogniser, found a text classifier.")
    return found
