"""Target data for speech: manifests, subtitles, decoded-clip cache, splits, leak checks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.audio import SAMPLE_RATE, MediaError, decode_clip, stream_audio
from mmtransfer.cache import atomic_path, cache_path
from mmtransfer.config import DataConfig
from mmtransfer.errors import UserError
from mmtransfer.progress import track
from mmtransfer.segments import Segmenter

logger = logging.getLogger(__name__)
_READERS = 2  # more wait for each other: decoding returns to the interpreter with every packet
_CACHE_VERSION = "2"  # raise it when decoding changes
_SUBTITLES = (".srt", ".vtt")
_TEXT_FILES = {".csv", ".json", ".jsonl", ".txt", ".md", ".srt", ".vtt", ".tsv", ".yaml", ".yml"}


@dataclass(frozen=True)
class Clip:
    """A stretch of a recording with its transcript."""

    path: Path
    text: str
    """Empty for silence."""
    start: float = 0.0
    """Seconds into the recording."""
    end: float | None = None
    """Seconds into the recording; None for its end."""
    group: str | None = None
    """What must stay in one split: speaker, camera, source file."""
    language: str | None = None
    seconds: float = 0.0
    """Length of the decoded audio."""
    digest: str = ""
    """Identity of the decoded audio; empty for digital silence."""
    cached: Path | None = None
    """Decoded samples (float16 .npy)."""

    @property
    def identity(self) -> str:
        """What tells the decoded audio from any other."""
        return f"{self.digest} {self.seconds}"

    @property
    def name(self) -> str:
        """Short name for messages."""
        span = "" if self.end is None else f"[{self.start:g}-{self.end:g} s]"
        return f"{self.path.name}{span}"

    def samples(self) -> np.ndarray:
        """Float32 [samples] at 16 kHz."""
        if self.cached is None:
            return decode_clip(self.path, self.start, self.end)
        return np.load(self.cached).astype(np.float32)


@dataclass(frozen=True)
class ClipSet:
    """The usable clips of one split, and what was left out."""

    name: str
    clips: list[Clip]
    skipped: list[str] = field(default_factory=list)
    """One line per clip that could not be used, with the reason."""

    @property
    def seconds(self) -> float:
        """Audio in the set, in seconds."""
        return sum(clip.seconds for clip in self.clips)

    def __len__(self) -> int:
        return len(self.clips)


# --- reading -------------------------------------------------------------------------------------


def read_clips(source: str | Path, config: DataConfig, *, labelled: bool = True) -> list[Clip]:
    """Clips named by a folder with metadata.csv/.jsonl, a CSV/JSONL manifest, or a folder of
    recordings with .srt/.vtt files beside them. Nothing is decoded yet.

    Unless `labelled`, transcripts may be missing, and a folder of recordings alone gives the
    stretches of speech in them.

    Raises:
        UserError: no such path, no manifest or subtitles in it, a missing column, a bad value.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (expected speech data).")
    if path.is_file():
        if path.suffix.lower() in _SUBTITLES:
            return _subtitle_clips(path)
        return _manifest_clips(path, config, labelled)
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).is_file():
            return _manifest_clips(path / name, config, labelled)
    subtitles = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUBTITLES)
    clips = [clip for subtitle in subtitles for clip in _subtitle_clips(subtitle)]
    if not clips and not labelled:
        clips = _spoken_clips(path)
    if not clips:
        raise UserError(
            f"{path}: expected metadata.csv (columns {config.file_column},{_text_column(config)}), "
            "or recordings with .srt or .vtt files beside them; found neither."
        )
    return clips


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start} cannot be read). Save it as UTF-8."
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV or JSONL file as mappings.

    Raises:
        UserError: another ending, not UTF-8, malformed, or empty.
    """
    text = _read_text(path)
    kind = path.suffix.lower()
    rows: list[dict[str, Any]] = []
    if kind == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: not a valid CSV file: {error}.") from None
    elif kind == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error.msg}.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object.")
            rows.append(row)
    else:
        raise UserError(f"{path}: expected a .csv or .jsonl manifest, found '{kind or 'no'}' file.")
    if not rows:
        raise UserError(f"{path}: the manifest is empty.")
    return rows


def _text_column(config: DataConfig) -> str:
    return config.text_column or "transcription"


def _spoken_clips(folder: Path) -> list[Clip]:
    """Stretches of speech in every recording below a folder."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix.lower() not in _TEXT_FILES
    ]
    clips = []
    for path in track(paths, "finding speech", total=len(paths)):
        segmenter = Segmenter()
        try:
            found = [s for block in stream_audio(path) for s in segmenter.feed(block)]
        except MediaError as error:
            logger.warning("skipped: %s", error)
            continue
        for segment in [*found, *segmenter.finish()]:
            end = segment.samples_start + len(segment.samples) / SAMPLE_RATE
            clips.append(Clip(path, "", segment.samples_start, end, str(path)))
    return clips


def _manifest_clips(path: Path, config: DataConfig, labelled: bool) -> list[Clip]:
    rows = read_rows(path)
    text_column = _text_column(config)
    needed = {"file_column": config.file_column}
    if labelled:
        needed["text_column"] = text_column
    for setting, column in needed.items():
        if column not in rows[0]:
            found = ", ".join(str(name) for name in rows[0])
            raise UserError(
                f"{path}: column '{column}' not found; columns are {found}. Set data.{setting}."
            )
    clips = []
    for number, row in enumerate(rows, 2 if path.suffix.lower() == ".csv" else 1):
        where = f"{path}:{number}"
        if not row.get(config.file_column):
            raise UserError(f"{where}: column '{config.file_column}' is empty.")
        start = _seconds(row.get("start"), where, "start") or 0.0
        end = _seconds(row.get("end"), where, "end")
        if end is not None and end <= start:
            raise UserError(f"{where}: end ({end:g} s) is not after start ({start:g} s).")
        clips.append(
            Clip(
                path=path.parent / str(row[config.file_column]),
                text=" ".join(str(row.get(text_column) or "").split()),
                start=start,
                end=end,
                group=str(row[config.group_column]) if row.get(config.group_column) else None,
                language=row.get("language") or None,
            )
        )
    return clips


def _seconds(value: Any, where: str, column: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise UserError(f"{where}: column '{column}': expected seconds, found {value!r}.")
    return seconds


_CUE = re.compile(
    r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})\s*-->\s*(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
)
_TAG = re.compile(r"<[^>\n]*>|\{\\[^}\n]*\}")


def parse_subtitles(text: str) -> Iterator[tuple[float, float, str]]:
    """Cues of an SRT or WebVTT text as (start, end, text), times in seconds."""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = block.strip().split("\n")
        for index, line in enumerate(lines):
            match = _CUE.search(line)
            if not match:
                continue
            numbers = match.groups()
            start, end = (
                int(hours or 0) * 3600
                + int(minutes) * 60
                + int(seconds)
                + int(fraction.ljust(3, "0")) / 1000
                for hours, minutes, seconds, fraction in (numbers[:4], numbers[4:])
            )
            words = _TAG.sub("", " ".join(lines[index + 1 :]))
            yield start, end, " ".join(words.split())
            break


def _subtitle_clips(subtitle: Path) -> list[Clip]:
    stem = subtitle.with_suffix("")
    beside = [
        p
        for p in sorted(subtitle.parent.iterdir())
        # `talk.mp4` with `talk.srt`, or `talk.mp4` with `talk.mp4.srt` or `talk.en.srt`
        if p.is_file()
        and p.suffix.lower() not in _TEXT_FILES
        and (p.with_suffix("") == stem or p == stem or p.with_suffix("") == stem.with_suffix(""))
    ]
    if not beside:
        raise UserError(f"{subtitle}: no recording of the same name beside it.")
    cues = [cue for cue in parse_subtitles(_read_text(subtitle)) if cue[1] > cue[0]]
    if not cues:
        raise UserError(f"{subtitle}: no subtitle cues found.")
    group = str(beside[0])
    return [Clip(beside[0], text, start, end, group) for start, end, text in cues]


# --- decoding and cache --------------------------------------------------------------------------


def _decode_cached(clip: Clip) -> Clip:
    """Decode a clip, or find it in the cache; fill in length, digest and cache path."""
    try:
        path = clip.path.resolve(strict=True)
    except OSError:
        raise MediaError(f"{clip.path}: no such file.") from None
    stat = path.stat()
    key = json.dumps(
        [_CACHE_VERSION, str(path), stat.st_size, stat.st_mtime_ns, clip.start, clip.end]
    )
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    cached = cache_path("audio", name[:2], f"{name}.npy")
    if cached.exists():
        samples = np.load(cached)
    else:
        samples = decode_clip(path, clip.start, clip.end).astype(np.float16)
        with atomic_path(cached) as part, part.open("wb") as file:
            np.save(file, samples)
    digest = hashlib.sha256(samples.tobytes()).hexdigest()[:32] if samples.any() else ""
    return replace(clip, seconds=len(samples) / SAMPLE_RATE, digest=digest, cached=cached)


def load_clips(
    source: str | Path,
    config: DataConfig,
    *,
    name: str,
    max_seconds: float = 30.0,
    labelled: bool = True,
) -> ClipSet:
    """Read and decode a set of clips; see `read_clips` for `labelled`.

    Clips that cannot be decoded or are longer than `max_seconds` are left out and listed.

    Raises:
        UserError: see `read_clips`; more than `data.max_undecodable` of the clips failed to
            decode; nothing usable is left.
    """
    clips = read_clips(source, config, labelled=labelled)

    def attempt(clip: Clip) -> Clip | str:
        try:
            return _decode_cached(clip)
        except MediaError as error:
            return str(error)

    with ThreadPoolExecutor(_READERS) as pool:
        results = list(track(pool.map(attempt, clips), f"reading {name}", total=len(clips)))
    failed = [result for result in results if isinstance(result, str)]
    for line in failed:
        logger.warning("skipped: %s", line)
    if len(failed) > config.max_undecodable * len(clips):
        raise UserError(
            f"{source}: {len(failed)} of {len(clips)} clips could not be decoded "
            f"(data.max_undecodable is {config.max_undecodable:g}). First: {failed[0]}"
        )
    usable: list[Clip] = []
    skipped = list(failed)
    for clip in results:
        if isinstance(clip, str):
            continue
        if clip.seconds > max_seconds:
            skipped.append(
                f"{clip.path}: {clip.seconds:.1f} s is longer than {max_seconds:g} s; cut it by "
                "start and end columns or by subtitles."
            )
            logger.warning("skipped: %s", skipped[-1])
        else:
            usable.append(clip)
    if not usable:
        raise UserError(f"{source}: none of the {len(clips)} clips is usable. First: {skipped[0]}")
    return ClipSet(name, usable, skipped)


def bundled_speech(language: str) -> Path | None:
    """The general speech in this package to rehearse in that language (ISO code), if any."""
    folder = Path(__file__).parent / "rehearsal" / language
    return folder if folder.is_dir() else None


# --- splits and leaks ----------------------------------------------------------------------------


def connected(keys: Iterable[Sequence[str]]) -> list[list[int]]:
    """Indices of the items that belong together: those that share a key, directly or through
    others. Each item has at least one key.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    firsts = []
    for first, *others in keys:
        firsts.append(first)
        for other in others:
            parent[root(other)] = root(first)
    together = defaultdict(list)
    for index, first in enumerate(firsts):
        together[root(first)].append(index)
    return [together[key] for key in sorted(together)]


def hold_out(clips: Sequence[Clip], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of (training, validation) clips; about `fraction` of them held out.

    Clips that share a group, a file (where no group is given) or identical audio stay together.

    Raises:
        UserError: everything belongs together, so nothing can be held out.
    """
    groups = connected(
        [
            f"group {clip.group}" if clip.group is not None else f"file {clip.path}",
            *([f"audio {clip.digest}"] if clip.digest else []),
        ]
        for clip in clips
    )
    random.Random(seed).shuffle(groups)
    wanted = max(1, round(fraction * len(clips)))
    held: list[int] = []
    for group in groups:
        # Take a group only if that brings the share nearer to what was asked, and leaves a rest.
        taken = len(held) + len(group)
        if taken < len(clips) and abs(taken - wanted) < abs(len(held) - wanted):
            held += group
    if not held:
        smallest = min(groups, key=len)
        if len(groups) > 1:
            held = list(smallest)
    if not held:
        raise UserError(
            f"All {len(clips)} training clips belong to one group, so no validation data can be "
            "held out. Name data.validation, or give the clips a group column."
        )
    chosen = set(held)
    return [i for i in range(len(clips)) if i not in chosen], sorted(held)


def find_leaks(first: Iterable[Clip], second: Iterable[Clip]) -> dict[str, list[str]]:
    """What two splits share: `same-recording` (overlapping stretches of one file) and
    `same-audio` (identical decoded samples under whatever name). Digital silence does not count.
    """
    leaks: dict[str, list[str]] = {"same-recording": [], "same-audio": []}
    by_file = defaultdict(list)
    by_audio = {}
    for clip in first:
        by_file[clip.path.resolve()].append(clip)
        if clip.digest:
            by_audio[clip.digest] = clip
    for clip in second:
        for other in by_file[clip.path.resolve()]:
            clip_end = math.inf if clip.end is None else clip.end
            other_end = math.inf if other.end is None else other.end
            if clip.start < other_end and other.start < clip_end:
                leaks["same-recording"].append(clip.name)
                break
        else:
            twin = by_audio.get(clip.digest)
            if twin is not None:
                same_text = "same" if twin.text == clip.text else "different"
                leaks["same-audio"].append(f"{clip.name} = {twin.name} ({same_text} text)")
    return {kind: names for kind, names in leaks.items() if names}


def refuse_leaks(first: ClipSet, second: ClipSet, allowed: Sequence[str]) -> dict[str, list[str]]:
    """Leaks between two splits; those not allowed by name end the run.

    Raises:
        UserError: a leak that is not in `allowed`.
    """
    leaks = find_leaks(first.clips, second.clips)
    for kind, names in leaks.items():
        message = (
            f"{len(names)} clips of '{second.name}' are also in '{first.name}' ({kind}): "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
        )
        if kind not in allowed:
            raise UserError(
                f"{message} Scores would flatter the model. Remove them from one of the two, or "
                f"accept them with data.allow_leaks: [{kind}]."
            )
        logger.warning("%s Accepted by data.allow_leaks.", message)
    return leaks
