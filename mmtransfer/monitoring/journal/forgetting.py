"""What is to be forgotten goes out of a journal, the clips and the spool, byte for byte.

Lines are written over where they lie, so that the journal can be written to, and followed,
meanwhile. A line with `"event": "forgotten"` says before what went, for those who follow.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtransfer.cache import open_private
from mmtransfer.data.words import split_words
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import LineKind
from mmtransfer.monitoring.journal.files import (
    EPOCH_S,
    day_of,
    journal_files,
    parsed,
    time_or_day,
    whole_lines,
)
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.monitoring.sources.clips import AROUND_S, clip_path

FORGOTTEN = "forgotten"
"""Event of a line that was forgotten, or, with `before` or `lines`, that says what was."""
_NOTHING = b'{"camera":"","event":"forgotten"}'
KEPT = (LineKind.READING, LineKind.FILE, LineKind.END, LineKind.CUT, FORGOTTEN)
"""Events that resuming needs; there is nothing in them of what was spoken."""
_RAISED = (LineKind.ALERT, LineKind.SOUND, LineKind.SOUND_CLASS)
_NAMES = {"camera", "id", "segment", "source", "event", "to", "clip", "language"}
"""Fields that hold nothing of what was spoken."""
EVER = 1e11
"""Later than anything: seconds since 1970."""
_LINES_AT_ONCE = 1000


@dataclass(frozen=True)
class Rule:
    """What is to be forgotten: what all of these are true of.

    Raises:
        UserError: a phrase without a letter, or nothing at all.
    """

    before: float | Mapping[str, float] = EVER
    """What was before that time, in seconds since 1970; for all cameras, or for each by its name,
    and then of these alone."""
    camera: str | None = None
    phrase: str | None = None
    """Lines that hold it, whatever its case, also within a word."""
    _words: str = field(init=False, default="")
    _letters: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.phrase is not None:
            words = split_words(self.phrase)
            if not words:
                raise UserError(f"expected a phrase with words, found {self.phrase!r:.80}.")
            object.__setattr__(self, "_words", f" {' '.join(words)} ")
            object.__setattr__(self, "_letters", _folded(self.phrase.strip()))
        elif self.before == EVER and self.camera is None:
            raise UserError("expected a time, a camera or a phrase to forget, found none.")

    def limit(self, camera: str) -> float | None:
        """Before when what a camera gave is due; None for never."""
        if self.camera is not None and camera != self.camera:
            return None
        return self.before if isinstance(self.before, float | int) else self.before.get(camera)

    def is_due(self, line: Mapping[str, Any], day: float) -> bool:
        """Whether a line of the journal is to be forgotten."""
        if line.get("event") in KEPT:
            return False
        limit = self.limit(line["camera"])
        if limit is None or time_or_day(line, day) >= limit:
            return False
        return self.phrase is None or any(map(self._is_in, _texts(line)))

    def is_damage_due(self, line: bytes, day: float) -> bool:
        """Whether a damaged line may hold something that is."""
        if self.phrase is not None or self.camera is not None:
            text = _folded(line.decode("utf-8", "replace"))
            wanted = self._letters if self.phrase is not None else _folded(self.camera or "")
            return wanted in text
        limits = self.before.values() if isinstance(self.before, Mapping) else [self.before]
        return any(day < limit for limit in limits)

    def _is_in(self, text: str) -> bool:
        folded = _folded(text)
        if self._letters in folded:
            return True
        if self._words.split(maxsplit=1)[0] not in folded:
            return False
        return self._words in f" {' '.join(split_words(text))} "


@dataclass
class Forgotten:
    """What has been forgotten, or would be."""

    lines: int = 0
    """Lines of text."""
    events: int = 0
    """Alerts, sounds and other events."""
    clips: int = 0
    missing_clips: int = 0
    """Clips that the journal names and that are not there."""
    segments: int = 0
    """Audio that waited to be recognised."""


@dataclass(frozen=True)
class _Clip:
    camera: str
    moment: str
    start: float
    end: float
    path: str
    is_due: bool


@dataclass
class _Plan:
    """What the first pass has found."""

    counts: Forgotten = field(default_factory=Forgotten)
    files: list[Path] = field(default_factory=list)
    """With something that is due."""
    cameras: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    """Of which something is due; with names and times of it if there is a phrase, or it is of a
    recording.
    """
    recordings: set[str] = field(default_factory=set)
    """Sources that are none that live."""
    clips: list[_Clip] = field(default_factory=list)
    spoken: list[tuple[str, float, float]] = field(default_factory=list)
    """Camera, start and end of lines with the phrase."""


def forget(
    folder: Path,
    rule: Rule,
    append: Callable[[dict[str, Any]], None],
    *,
    files: Sequence[Path] | None = None,
    recordings: Collection[str] = (),
    clips: Path | None = None,
    with_clips: bool = True,
    dry_run: bool = False,
) -> Forgotten:
    """Forget in the journal in `folder`, in these of its files or all, and, `with_clips`, in the
    clips that it names, which are where it says or else in the folder `clips`. `append` writes a
    line into the journal.

    Of recordings (the cameras that are known to be, and those that the files show to be) the times
    of segments stay, so that they are not transcribed again. If it is broken off, the same again
    goes on with it.

    Raises:
        OSError: a file that cannot be written.
    """
    plan = _Plan(recordings=set(recordings))
    for path in journal_files(folder) if files is None else files:
        _look_at(plan, path, rule)
    if with_clips:
        _forget_named_clips(plan, clips, dry_run=dry_run)
    if dry_run:
        return plan.counts
    for camera, lines in plan.cameras.items():
        what = {"camera": camera, "event": FORGOTTEN}
        if rule.phrase is None:
            append({**what, "before": rule.limit(camera)})
        for first in range(0, len(lines), _LINES_AT_ONCE):
            append({**what, "lines": lines[first : first + _LINES_AT_ONCE]})
    last = journal_files(folder)[-1:]
    for path in plan.files:
        if _overwrite(path, rule, plan.recordings) and path not in last:
            path.unlink()
    return plan.counts


def _look_at(plan: _Plan, path: Path, rule: Rule) -> None:
    day, is_concerned = day_of(path), False
    for raw in whole_lines(path):
        line = parsed(raw)
        if line is None:
            is_concerned = is_concerned or rule.is_damage_due(raw, day)
            continue
        event, start = line.get("event"), line.get("start")
        is_old = isinstance(start, int | float) and start < EPOCH_S
        if is_old or (event in KEPT and event != FORGOTTEN):
            plan.recordings.add(line["camera"])
        is_due = rule.is_due(line, day)
        if event in _RAISED and isinstance(line.get("clip"), str):
            _note_clip(plan, line, is_due=is_due)
        if is_due:
            is_concerned = True
            _note(plan, rule, line, day)
    if is_concerned:
        plan.files.append(path)


def _note(plan: _Plan, rule: Rule, line: Mapping[str, Any], day: float) -> None:
    camera, identity = line["camera"], line.get("id", line.get("segment"))
    if line.get("event") is None:
        plan.counts.lines += 1
    else:
        plan.counts.events += 1
    named, start = plan.cameras.setdefault(camera, []), line.get("start")
    # In what time zone an index has counted the days of recordings is not known here.
    is_old = isinstance(start, int | float) and start < EPOCH_S
    if isinstance(identity, str) and (is_old or rule.phrase is not None):
        named.append((identity, time_or_day(line, day)))
    if rule.phrase is not None and (span := _span(line)) is not None:
        plan.spoken.append((camera, *span))


def _span(line: Mapping[str, Any]) -> tuple[float, float] | None:
    """When a line begins and ends, if it says so."""
    start, end = line.get("start"), line.get("end")
    if isinstance(start, int | float) and isinstance(end, int | float):
        with suppress(OverflowError):
            return float(start), float(end)
    return None


def _note_clip(plan: _Plan, line: Mapping[str, Any], *, is_due: bool) -> None:
    camera, moment, span = line["camera"], line.get("segment", line.get("id")), _span(line)
    if span is None:
        return
    # What a damaged journal may name is not removed, only what a monitor has written.
    named = clip_path(Path(), camera, str(moment))
    if Path(line["clip"]).parts[-2:] == named.parts:
        plan.clips.append(_Clip(camera, str(moment), *span, line["clip"], is_due))


def _forget_named_clips(plan: _Plan, folder: Path | None, *, dry_run: bool) -> None:
    paths: dict[Path, _Clip] = {}
    for clip in plan.clips:
        holds = any(
            camera == clip.camera and start <= clip.end + AROUND_S and clip.start - AROUND_S <= end
            for camera, start, end in plan.spoken
        )
        if clip.is_due or holds:
            paths[Path(clip.path)] = clip
    for path, clip in paths.items():
        if not path.is_file() and folder is not None:
            path = clip_path(folder, clip.camera, clip.moment)
        if not path.is_file() or path.is_symlink():
            plan.counts.missing_clips += 1
            continue
        plan.counts.clips += 1
        if not dry_run:
            path.unlink()


def forget_clips(folder: Path, limits: Mapping[str, float]) -> int:
    """Remove the clips of cameras that were written before these times; returns how many."""
    count = 0
    for camera, limit in limits.items():
        own = clip_path(folder, camera, "").parent
        for path in [*own.glob("*.mkv"), *own.glob("*.mkv.part")]:
            if path.is_file() and path.lstat().st_mtime < limit:
                path.unlink()
                count += 1
    return count


def forget_spool(folder: Path, rule: Rule, *, dry_run: bool = False) -> int:
    """Remove audio that waits in the spool of the journal in `folder`, while nobody writes it;
    returns how many segments. What was spoken in it is not known, so a phrase removes none.
    """
    if rule.phrase is not None or not (folder / "spool").is_dir():
        return 0
    spool, count = Spool(folder / "spool"), 0
    for camera, name, segment in list(spool.waiting()):
        limit = rule.limit(camera)
        if limit is not None and segment.start < limit:
            count += 1
            if not dry_run:
                spool.remove(name)
    for path in () if dry_run else (folder / "spool").glob("*.damaged"):
        path.unlink()  # whose it was cannot be known, and nothing can be made of it
    return count


def _overwrite(path: Path, rule: Rule, recordings: set[str]) -> bool:
    """Write over what is due in a file; whether there is nothing else left in it."""
    day, place, is_empty = day_of(path), 0, True
    with open_private(path, "rb+", buffering=0) as file:
        for raw in whole_lines(path):
            line, stub = parsed(raw), None
            if line is None:
                stub = b"" if rule.is_damage_due(raw, day) else None
            elif rule.is_due(line, day):
                stub = _stub(line) if line["camera"] in recordings else _NOTHING
            if stub is not None:
                room = len(raw) - 1
                if len(stub) > room:
                    stub = _NOTHING if len(_NOTHING) <= room else b""
                os.pwrite(file.fileno(), stub.ljust(room), place)
            left = raw.rstrip() if stub is None else stub
            is_empty = is_empty and left in (_NOTHING, b"")
            place += len(raw)
        os.fsync(file.fileno())
    return is_empty


def _stub(line: Mapping[str, Any]) -> bytes:
    """What resuming a recording needs of a line."""
    if not isinstance(line.get("id"), str):
        return _NOTHING
    kept = {name: line[name] for name in ("camera", "id", "start", "end") if name in line}
    return json.dumps({**kept, "event": FORGOTTEN}, separators=(",", ":")).encode()


def _texts(value: Any) -> Iterator[str]:
    """All texts in a line but names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in _NAMES:
                yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _folded(text: str) -> str:
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
