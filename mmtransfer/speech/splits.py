"""The clips of a run: splits, and what a source rehearses beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mmtransfer.cache import cache_path, put
from mmtransfer.config import Config, DataConfig
from mmtransfer.errors import UserError
from mmtransfer.speech.clip_scores import decode_clips
from mmtransfer.speech.clips import (
    Clip,
    ClipSet,
    bundled_speech,
    hold_out,
    load_clips,
    refuse_leaks,
)
from mmtransfer.speech.ctc import CtcModel
from mmtransfer.speech.guards import rejection
from mmtransfer.speech.whisper import SpeechModel
from mmtransfer.transfer.features import cache_key, weights_digest
from mmtransfer.transfer.splits import Splits, choose_rehearsal, load_splits

logger = logging.getLogger(__name__)


def load_clip_splits(
    config: Config,
    max_seconds: float,
    *,
    labelled: bool = True,
    languages: Sequence[str] | None = None,
    train_clips: list[Clip] | None = None,
) -> Splits[ClipSet]:
    """Training, validation and source-domain clips, checked for leaks.

    Unless `labelled`, training and validation clips need no transcripts. `languages` are those
    that the source has, `train_clips` what `read_clips` gave of the training data.

    Raises:
        UserError: no training data named, unusable data, or a leak between splits.
    """
    data = config.data
    load = partial(load_clips, config=data, max_seconds=max_seconds, languages=languages)

    def read(path: str, name: str, role: str) -> ClipSet:
        known = train_clips if role == "train" else None
        return load(path, name=name, labelled=labelled or role == "source", clips=known)

    return load_splits(
        config,
        read,
        lambda train: hold_out(train.clips, data.validation_fraction, config.runtime.seed),
        lambda one, other: refuse_leaks(one, other, data.allow_leaks),
    )


def add_rehearsal(
    splits: Splits[ClipSet],
    source: SpeechModel | CtcModel,
    language: str | None,
    share: float,
    config: Config,
    device: torch.device,
) -> None:
    """Give a speech transfer the clips that it rehearses, checked for leaks; without transcripts
    they get the source's.

    `language` is that in which the source transcribes; None if it does not transcribe, so that
    there is nothing to forget. `share` is that of rehearsal in each batch.

    Raises:
        UserError: unusable data, or a leak into validation or source-domain sets.
    """
    named = choose_speech_rehearsal(config, language, share)
    if named is None:
        return
    path, columns = Path(named), config.data
    if named == "bundled":
        spoken = language or config.data.language or "en"
        found = bundled_speech(spoken)
        if found is None:
            raise UserError(
                f"data.rehearsal: bundled is speech in English, the language is '{spoken}'. Name a "
                "folder with general speech in that language, or none."
            )
        path, columns = found, DataConfig()  # it has its own column names, whatever the user's are
    clips = load_clips(
        path, columns, name="rehearsal", max_seconds=source.max_context_s, labelled=False
    )
    for other in (splits.validation, *splits.source_domain.values()):
        refuse_leaks(clips, other, config.data.allow_leaks)
    if not any(clip.text for clip in clips.clips):
        if language is None:
            raise UserError(
                f"{named}: no transcripts, and {config.source_model} has no output "
                "that could take their place."
            )
        clips = transcribe(source, clips, config, device)
    splits.rehearsal = clips
    logger.info(
        "rehearsal: %s, %s, %.0f %% of each batch; data.rehearsal: none turns it off",
        named,
        clips.size,
        100 * share,
    )


def choose_speech_rehearsal(config: Config, language: str | None, share: float) -> str | None:
    """What a speech transfer rehearses: a path, `bundled` or nothing; see `add_rehearsal`.

    Raises:
        UserError: a share of rehearsal without data for it.
    """
    usual = None
    if config.data.rehearsal == "auto" and share and language is not None:
        if bundled_speech(language) is not None:
            usual = "bundled"
        else:
            logger.info(
                "rehearsal: off, since this package has general speech in English alone and the "
                "source model transcribes '%s'; name some with data.rehearsal",
                language,
            )
    return choose_rehearsal(config, usual=usual)


def _cached_texts(path: Path, count: int) -> list[str] | None:
    """So many transcripts in the cache; None if they are not there, or damaged."""
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(texts, list) and len(texts) == count
    return texts if is_whole and all(isinstance(text, str) for text in texts) else None


def transcribe(
    source: SpeechModel | CtcModel, clips: ClipSet, config: Config, device: torch.device
) -> ClipSet:
    """Clips with what the source transcribes as their text: learnt again, it keeps the source as it
    is (Li & Hoiem 2016: learning without forgetting). Kept in the cache folder.

    Raises:
        UserError: the source transcribes none of them without doubt.
    """
    spoken = [clip.language for clip in clips.clips]
    key = cache_key(
        kind="transcripts",
        weights=weights_digest([source.model], source.model.config),
        language=source.language,
        items=[clip.identity for clip in clips.clips],
        **({"languages": spoken} if any(spoken) else {}),
    )
    path = cache_path("transcripts", f"{key}.json")
    texts = _cached_texts(path, len(spoken))
    if texts is None:
        found = decode_clips(
            source,
            clips.clips,
            device,
            config.evaluation.batch_seconds,
            progress=f"transcribing {clips.name} clips",
        )
        texts = [
            "" if rejection(hypothesis, clip.seconds) else hypothesis.text
            for clip, hypothesis in zip(clips.clips, found, strict=True)
        ]
        text = json.dumps(texts, ensure_ascii=False)
        put(path, lambda part: part.write_text(text, encoding="utf-8"))
    usable = [replace(c, text=text) for c, text in zip(clips.clips, texts, strict=True) if text]
    if not usable:
        raise UserError(
            f"{clips.name}: the source model is not confident on any of the {len(clips)} clips. "
            "Name speech in its language, or give the clips transcripts."
        )
    doubtful = len(clips) - len(usable)
    if doubtful:
        logger.info(
            "%s: %d clips skipped, on which the source model is not confident", clips.name, doubtful
        )
    return replace(clips, clips=usable)
