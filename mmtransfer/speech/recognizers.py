"""A recogniser by its model's name, on the engine that suits model and machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, other_kind, resolve
from mmtransfer.runtime import cores
from mmtransfer.speech.end_of_turn import open_end_of_turn
from mmtransfer.speech.engine import DecodingOptions
from mmtransfer.speech.recognition import Recognizer

if TYPE_CHECKING:
    from mmtransfer.speech.ctc import CtcModel
    from mmtransfer.speech.whisper import SpeechModel

logger = logging.getLogger(__name__)
_CPU_BATCH_S, _BATCH_S = 120.0, 240.0
ENGINES = ("auto", "ctranslate2", "transformers")


def open_recognizer(
    source: str | Checkpoint,
    *,
    revision: str | None = None,
    language: str | None = None,
    engine: str = "auto",
    compute_type: str | None = None,
    device: str = "auto",
    threads: int = 0,
    context_s: float | None = None,
    options: DecodingOptions | None = None,
) -> Recognizer:
    """A recogniser with a run folder's, checkpoint's, Hub or bundled model.

    `engine` is `ctranslate2` (Whisper only; the default on CPU), `transformers` (any model, any
    device) or `auto`. `compute_type` is CTranslate2's precision: int8 on CPU and float16 on GPU
    unless given. `device` is `auto` (a GPU if there is one), `cpu`, `cuda` or `mps`. `context_s`
    overrides the shortest context stored with the model (infinity: always the full one, by the
    source's own weights). `threads` 0 takes every core.

    Raises:
        UserError: a model that cannot be used, or not by this engine; a device that this machine
            does not have, or a precision that the device does not compute in.
    """
    found = source if isinstance(source, Checkpoint) else resolve(source, revision)
    engine = engine_for(found, engine, device)
    threads = threads or cores()
    model: Any
    place: Any
    end_of_turn = None
    if engine == "ctranslate2":
        from mmtransfer.speech.engines_ctranslate2 import CTranslate2Whisper

        model = CTranslate2Whisper(
            found,
            language=language,
            options=options,
            compute_type=compute_type,
            threads=threads,
            device=device,
        )
        place = model.device
        end_of_turn = open_end_of_turn(found, model.encode)
    else:
        from mmtransfer.config import RuntimeConfig
        from mmtransfer.runtime import choose_device
        from mmtransfer.speech.engines_transformers import transformers_engine

        if compute_type is not None:
            logger.warning("precision %s is ctranslate2's alone, and left out", compute_type)
        place = choose_device(RuntimeConfig.model_validate({"device": device}))
        speech = _load(found, language)
        model = transformers_engine(speech, place, options, threads=threads)
    logger.debug("%s: engine %s on %s, %d threads", found.source, engine, place, threads)
    # On CPU four full windows at a time take two thirds of the time of one by one; more gain
    # little, and attention over them takes much memory.
    batch_seconds = _CPU_BATCH_S if engine == "ctranslate2" and place == "cpu" else _BATCH_S
    return Recognizer(
        model,
        shortest_context_s=context_s,
        batch_seconds=batch_seconds,
        end_of_turn=end_of_turn,
    )


def engine_for(checkpoint: Checkpoint, engine: str = "auto", device: str = "auto") -> str:
    """The engine that a model is decoded by, where it is left open.

    Raises:
        UserError: no such engine.
    """
    if engine not in ENGINES:
        raise UserError(f"engine '{engine}': expected one of {', '.join(ENGINES)}.")
    if engine != "auto":
        return engine
    return "ctranslate2" if _suits_ctranslate2(checkpoint, device) else "transformers"


def _load(checkpoint: Checkpoint, language: str | None) -> SpeechModel | CtcModel:
    from mmtransfer.speech.ctc import load_ctc_model
    from mmtransfer.speech.whisper import load_speech_model

    if checkpoint.kind == "ctc":
        return load_ctc_model(checkpoint, language=language)
    if checkpoint.kind != "speech":
        raise other_kind(checkpoint, "a speech recogniser")
    return load_speech_model(checkpoint, language=language)


def _suits_ctranslate2(checkpoint: Checkpoint, device: str) -> bool:
    import ctranslate2

    if device not in ("auto", "cpu") or (device == "auto" and ctranslate2.get_cuda_device_count()):
        return False
    return checkpoint.kind == "speech"
