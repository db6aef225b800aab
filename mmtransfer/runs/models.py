"""What there is: tasks by their names, and any model by its name."""

from __future__ import annotations

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.hub.signing import verify as check_signature
from mmtransfer.sound.classifier import SoundModel
from mmtransfer.sound.classifier_task import SoundTask
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.ctc_task import CtcTask
from mmtransfer.speech.short_context_task import ShortContextTask
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.speech.whisper_task import SpeechTask
from mmtransfer.text.classifier import TextModel
from mmtransfer.text.classifier_task import SentimentTask
from mmtransfer.transfer.task import Task

Model = SpeechModel | CtcModel | TextModel | SoundModel

TASKS: dict[str, type[Task]] = {
    "speech": SpeechTask,
    "ctc": CtcTask,
    "short_context": ShortContextTask,
    "sentiment": SentimentTask,
    "sound": SoundTask,
}
"""By `task` of a configuration, and by the kind of a checkpoint."""


def task_for(config: Config, source: Checkpoint) -> type[Task]:
    """The task of a transfer. Speech is transcribed by CTC unless the source is a Whisper, or
    `head.type` says otherwise.
    """
    head = config.head.type
    if config.task == "speech" and (head == "ctc" or (head == "auto" and source.kind == "ctc")):
        return TASKS["ctc"]
    return TASKS[config.task]


def task_of(checkpoint: Checkpoint) -> type[Task]:
    """The task of a finished model.

    Raises:
        UserError: a kind that this version does not know.
    """
    if checkpoint.kind not in TASKS:
        raise UserError(
            f"{checkpoint.source}: expected a model for {', '.join(TASKS)}, found one for "
            f"{checkpoint.kind!r:.60}. Upgrade mmtransfer, or choose another model."
        )
    return TASKS[checkpoint.kind]


def load(
    source: str | Checkpoint,
    *,
    revision: str | None = None,
    language: str | None = None,
    verify: str | None = None,
) -> Model:
    """Load a finished transfer in any form, or a pretrained model, ready for use.

    A `TextModel` has `predict(texts)`, a `SoundModel` `predict(recordings)`; a `SpeechModel` or
    `CtcModel` is what `Recognizer` takes. `revision` reaches every part of a Hub model. With
    `verify`, a public key or `WHO,ISSUER`, it must be signed by them (see `signing.verify`).

    Raises:
        UserError: not found, nothing that this toolkit runs, or not signed so.
    """
    found = source if isinstance(source, Checkpoint) else resolve(source, revision)
    if verify is not None:
        check_signature(found, verify)
    model: Model = task_of(found).load(found, language)
    return model
