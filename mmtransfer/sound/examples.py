"""Target data for sounds: clips with the classes of what they hold, splits, leak checks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtransfer.config import Config, DataConfig
from mmtransfer.data.tables import SUFFIXES, numbered_rows, with_columns
from mmtransfer.errors import UserError
from mmtransfer.sound.classifier import LONGEST_CLIP_S
from mmtransfer.speech.clips import Clip, ClipSet, connected, load_clips, read_clips, refuse_leaks
from mmtransfer.speech.recordings import may_be_recording, visible_files
from mmtransfer.text.examples import (
    TextExample,
    TextSet,
    check_labels,
    hold_out_texts,
    label_names,
)
from mmtransfer.transfer.splits import Splits, load_splits

logger = logging.getLogger(__name__)
SEPARATOR = ";"
"""Between the labels of a clip that has several."""
_NAMED_SKIPS = 3


@dataclass(frozen=True)
class SoundSet(ClipSet):
    """Clips whose `text` holds their labels."""

    def subset(self, name: str, indices: Sequence[int], *, skipped: bool = False) -> SoundSet:
        """Some of its clips; with `skipped` what was left out stays listed."""
        return SoundSet(name, [self.clips[i] for i in indices], self.skipped if skipped else [])

    def report(self) -> dict[str, Any]:
        """Its entry in report.json."""
        counts = Counter(label for clip in self.clips for label in clip_labels(clip))
        return {**super().report(), "labels": dict(sorted(counts.items()))}


def clip_labels(clip: Clip) -> list[str]:
    """The labels of a clip; none where it holds no sound of any class."""
    parts = (" ".join(part.split()) for part in clip.text.split(SEPARATOR))
    return list(dict.fromkeys(part for part in parts if part))


def read_sounds(
    source: str | Path, config: DataConfig, *, name: str, labelled: bool = True
) -> SoundSet:
    """Decode a set of clips: a manifest or a folder with a metadata table (columns `file_name`,
    `label`, optional `group`, `start`, `end`), or a folder of recordings for each class.

    Clips that cannot be decoded are left out and listed.

    Raises:
        UserError: no such path, no label column, a bad value, too many clips that cannot be
            decoded, nothing usable.
    """
    path = Path(source)
    table = path if path.is_file() else _table(path)
    if table is not None:
        if labelled:
            needed = {"label_column": config.label_column}
            with_columns(str(table), numbered_rows(str(table)), dict(needed), set(needed))
        columns = {"text_column": config.label_column, "language_column": None}
        clips = read_clips(table, config.model_copy(update=columns), labelled=False)
    elif path.is_dir():
        clips = _class_folders(path)
    else:
        raise UserError(f"{path}: no such file or folder (expected clips of sounds).")
    found = load_clips(path, config, name=name, max_seconds=LONGEST_CLIP_S, clips=clips)
    return SoundSet(name, found.clips, found.skipped)


def _table(folder: Path) -> Path | None:
    tables = (folder / f"metadata{suffix}" for suffix in SUFFIXES)
    return next((path for path in tables if path.is_file()), None)


def _class_folders(folder: Path) -> list[Clip]:
    clips = [
        Clip(path, path.relative_to(folder).parts[0], where=str(path))
        for path in visible_files(folder)
        if path.parent != folder and may_be_recording(path)
    ]
    if not clips:
        raise UserError(
            f"{folder}: expected metadata.csv (columns file_name,label), or a folder of recordings "
            "for each class; found neither."
        )
    return clips


# --- labels --------------------------------------------------------------------------------------


def sound_labels(train: SoundSet) -> tuple[list[str], bool]:
    """The classes of the training data, and whether clips can have several of them, or none: some
    clip has.

    Raises:
        UserError: fewer than two classes, or two that look alike.
    """
    is_multi = any(SEPARATOR in clip.text for clip in train.clips)
    return label_names(_as_texts(train)), is_multi


def refuse_labels(sounds: ClipSet, labels: Sequence[str], *, is_multi: bool, where: str) -> None:
    """Refuse labels that are not among the known ones; `where` names the set's origin.

    Raises:
        UserError: a label that the training data does not have, or several where each clip has one.
    """
    several = [clip for clip in sounds.clips if len(clip_labels(clip)) > 1]
    if several and not is_multi:
        raise UserError(
            f"{where}: {several[0].where or several[0].name}: expected one label, as the clips of "
            f"the training data have, found {several[0].text!r:.80}."
        )
    check_labels(_as_texts(sounds), labels, where=where)


def drop_unlabelled(sounds: SoundSet) -> SoundSet:
    """The clips with a label; the others are listed.

    Raises:
        UserError: there is none.
    """
    skipped = [
        f"{clip.where or clip.name}: the label is empty"
        for clip in sounds.clips
        if not clip_labels(clip)
    ]
    if not skipped:
        return sounds
    if len(skipped) == len(sounds):
        raise UserError(f"'{sounds.name}': expected clips with a label, found none.")
    for line in skipped[:_NAMED_SKIPS]:
        logger.warning("skipped: %s", line)
    if len(skipped) > _NAMED_SKIPS:
        more = len(skipped) - _NAMED_SKIPS
        logger.warning("skipped: %d more clips of '%s' without a label", more, sounds.name)
    kept = [clip for clip in sounds.clips if clip_labels(clip)]
    return SoundSet(sounds.name, kept, [*sounds.skipped, *skipped])


def _as_texts(sounds: ClipSet) -> TextSet:
    """Labels in the form in which those of texts are checked."""
    rows = [
        TextExample("", label, name=clip.where or clip.name)
        for clip in sounds.clips
        for label in clip_labels(clip)
    ]
    return TextSet(sounds.name, rows)


# --- splits --------------------------------------------------------------------------------------


def load_sound_splits(config: Config) -> tuple[Splits[SoundSet], list[str], bool]:
    """Training, validation and source-domain clips, checked for leaks; the classes; and whether a
    clip can have several of them.

    Raises:
        UserError: no training data named, unusable data, one class only, a label that training
            data does not have, or a leak between splits.
    """
    data, classes = config.data, list[str]()
    is_multi = False

    def read(path: str, name: str, role: str) -> SoundSet:
        nonlocal is_multi
        found = read_sounds(path, data, name=name)
        if role == "train":
            labels, is_multi = sound_labels(found)
            classes.extend(labels)
        if not is_multi:
            found = drop_unlabelled(found)
        refuse_labels(found, classes, is_multi=is_multi, where=name if role == "train" else path)
        return found

    splits = load_splits(
        config,
        read,
        partial(hold_out_sounds, fraction=data.validation_fraction, seed=config.runtime.seed),
        lambda one, other: refuse_leaks(one, other, data.allow_leaks),
    )
    return splits, classes, is_multi


def hold_out_sounds(sounds: ClipSet, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of (training, validation) clips; about `fraction` of them held out, of each class
    about its share.

    Clips that share a group, a file or identical audio stay together. Every class keeps at least
    one clip in training.

    Raises:
        UserError: nothing can be held out.
    """
    together = connected(
        [
            f"file {clip.path}",
            *([f"group {clip.group}"] if clip.group is not None else []),
            *([f"audio {clip.digest}"] if clip.digest else []),
        ]
        for clip in sounds.clips
    )
    unit_of = {index: number for number, unit in enumerate(together) for index in unit}
    # Identical texts stay together: here the number of what belongs together.
    rows = [
        TextExample(str(unit_of[index]), (clip_labels(clip) or [""])[0])
        for index, clip in enumerate(sounds.clips)
    ]
    try:
        return hold_out_texts(rows, fraction, seed)
    except UserError:
        raise UserError(
            f"No validation data can be held out of {len(rows)} training clips in {len(together)} "
            "recordings or groups: some class would have none left. Name data.validation, or give "
            "more clips."
        ) from None
