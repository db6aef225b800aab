"""Target data for speech: manifests, subtitles, decoded-clip cache, splits, leak checks."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.cache import cache_path, put
from mmtransfer.config import DataConfig, speech_columns
from mmtransfer.data.languages import is_listed, normal_language, read_language
from mmtransfer.data.tables import numbered_rows, plain, with_columns
from mmtransfer.errors import UserError
from mmtransfer.progress import track
from mmtransfer.speech.audio import (
    SAMPLE_RATE,
    LongMediaError,
    MediaError,
    check_file,
    decode_clip,
    stream_audio,
)
from mmtransfer.speech.recordings import (
    is_recording,
    is_visible,
    may_be_recording,
    visible_files,
)
from mmtransfer.speech.segments import Segmenter
from mmtransfer.speech.subtitles import read_subtitles

logger = logging.getLogger(__name__)
_READERS = 2  # more wait for each other: decoding returns to the interpreter with every packet
_CACHE_VERSION = "2"  # raise it when decoding changes
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.tsv", "metadata.parquet")
_SUBTITLES = (".srt", ".vtt", ".ass", ".ssa")
_PARTIAL = {"forced", "foreign", "signs", "songs", "commentary"}  # in names of subtitles
_CUT = "Cut it by start and end columns or by subtitles."
_LATEST_S = 1e8  # in a recording: three years
_MOST_TAGS = 3  # between the name of a recording and the ending of its subtitles


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
    """Its code; None where the data does not say."""
    seconds: float = 0.0
    """Length of the decoded audio."""
    digest: str = ""
    """Identity of the decoded audio; empty for digital silence."""
    cached: Path | None = None
    """Decoded samples (float16 .npy)."""
    where: str = ""
    """Where it is named: the table or subtitles, and the line."""

    @property
    def identity(self) -> str:
        """What distinguishes the decoded audio from any other."""
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

    @property
    def size(self) -> str:
        """How large it is, in words."""
        return f"{len(self)} clips ({self.seconds:.0f} s)"

    def subset(self, name: str, indices: Sequence[int], *, skipped: bool = False) -> ClipSet:
        """Some of its clips; with `skipped` what was left out stays listed."""
        return ClipSet(name, [self.clips[i] for i in indices], self.skipped if skipped else [])

    def report(self) -> dict[str, Any]:
        """Its entry in report.json."""
        seconds = round(self.seconds, 2)
        return {"clips": len(self), "seconds": seconds, "skipped": self.skipped}

    def __len__(self) -> int:
        return len(self.clips)


# --- reading -------------------------------------------------------------------------------------


def read_clips(source: str | Path, config: DataConfig, *, labelled: bool = True) -> list[Clip]:
    """Clips named by a folder with a metadata table, a manifest (CSV, TSV, JSON lines, Parquet), or
    a folder of recordings with .srt, .vtt or .ass files beside them. Nothing is decoded yet.

    Unless `labelled`, transcripts may be missing, and a folder of recordings alone gives the
    stretches of speech in them.

    Raises:
        UserError: no such path, no manifest or subtitles in it, a missing column, a bad value,
            subtitles of which none can be chosen.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (expected speech data).")
    if path.is_file():
        if path.suffix.lower() in _SUBTITLES:
            return _subtitle_clips(_beside(path, _recordings(path.parent)), config)
        return _manifest_clips(path, config, labelled)
    tables = [path / name for name in _METADATA if (path / name).is_file()]
    if tables:
        if len(tables) > 1:
            logger.warning("%s: using %s, not %s", path, tables[0].name, tables[1].name)
        return _manifest_clips(tables[0], config, labelled)
    clips = _subtitled_clips(path, config)
    if not clips and not labelled:
        clips = _spoken_clips(path)
    if not clips:
        raise UserError(
            f"{path}: expected metadata.csv (columns {config.file_column},"
            f"{config.text_column or 'transcription'}), or recordings with .srt, .vtt or .ass "
            "files beside them; found neither."
        )
    return clips


def _spoken_clips(folder: Path) -> list[Clip]:
    """Stretches of speech in every recording below a folder."""
    paths = [path for path in visible_files(folder) if may_be_recording(path)]
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
    columns = speech_columns(config)
    needed = {"file_column", "text_column"} if labelled else {"file_column"}
    rows = with_columns(str(path), numbered_rows(str(path)), columns, needed)
    file, text, group, language, start, end = columns.values()
    assert file is not None  # only the others may be left out
    assert text is not None
    languages: dict[str, str | None] = {"": None}
    folder, prefix = path.parent, f"{path}:"
    paths: dict[str, Path] = {}  # many clips are of the same file
    clips = []
    for number, row in rows:
        where = f"{prefix}{number}"
        if text not in row and labelled:
            raise UserError(
                f"{where}: '{text}' is missing; expected the transcript, or an empty one for "
                'silence ("").'
            )
        begins = seconds_cell(row.get(start), where, "start") or 0.0 if start is not None else 0.0
        ends = seconds_cell(row.get(end), where, "end") if end is not None else None
        if ends is not None and ends <= begins:
            raise UserError(f"{where}: end ({ends:g} s) is not after start ({begins:g} s).")
        spoken = row.get(language, "") if language is not None else ""
        if not isinstance(spoken, str) or spoken not in languages:
            spoken = _cell(row, language, where)
            if spoken not in languages:
                languages[spoken] = read_language(spoken, f"{where}: column '{language}'")
        name = file_name_cell(row.get(file), where, file)
        place = paths.get(name) or paths.setdefault(name, folder / name)
        clips.append(
            Clip(
                path=place,
                text=_cell(row, text, where),
                start=begins,
                end=ends,
                group=_cell(row, group, where) or None,
                language=languages[spoken],
                where=where,
            )
        )
    silent = sum(not clip.text for clip in clips)
    if silent and labelled:
        logger.info("%s: %d of %d transcripts are empty: silence", path, silent, len(clips))
    return clips


def _cell(row: dict[str, Any], column: str | None, where: str) -> str:
    if column is None:
        return ""
    value = row.get(column)
    return "" if value is None or value == "" else plain(value, where, column)


def file_name_cell(value: Any, where: str, column: str) -> str:
    """A cell with the name of a file.

    Raises:
        UserError: it is empty.
    """
    # As it is: a name may hold several spaces.
    name = value.strip() if isinstance(value, str) else plain(value, where, column)
    if not name:
        raise UserError(f"{where}: column '{column}' is empty.")
    return name


def seconds_cell(value: Any, where: str, column: str) -> float | None:
    """A cell with seconds; None where it is empty.

    Raises:
        UserError: no number of seconds.
    """
    if value is None or value == "":
        return None
    if type(value) is float and 0 <= value <= _LATEST_S:
        return value
    text = value if isinstance(value, str) else plain(value, where, column)
    try:
        seconds = math.nan if "_" in text else float(text or "nan")
    except ValueError:
        if not text.strip():
            return None
        seconds = math.nan
    if not 0 <= seconds <= _LATEST_S:
        if not text:  # not a number, as tables have it where there is none
            return None
        raise UserError(f"{where}: column '{column}': expected seconds, found {text[:40]!r}.")
    return seconds


# --- subtitles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subtitle:
    """A subtitle file beside its recording."""

    path: Path
    recording: Path
    tags: tuple[str, ...]
    """What its name has beyond the recording's: languages and kinds, `talk.en.sdh.srt`."""

    @property
    def language(self) -> str | None:
        """The language that it names."""
        found = (normal_language(tag) for tag in self.tags)
        return next((code for code in found if code is not None and is_listed(code)), None)

    @property
    def rank(self) -> tuple[bool, int, int, str]:
        """Best first: in full, with the fewest tags, SRT."""
        kinds = {kind for tag in self.tags for kind in re.split(r"[-_]", tag.lower())}
        is_part = bool(kinds & _PARTIAL)
        form = _SUBTITLES.index(self.path.suffix.lower())
        return is_part, len(self.tags), form, self.path.name


def _subtitled_clips(folder: Path, config: DataConfig) -> list[Clip]:
    """The cues of all recordings below a folder that have subtitles beside them."""
    files = visible_files(folder)
    recordings: dict[Path, dict[str, list[Path]]] = {}
    of: dict[Path, list[_Subtitle]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in _SUBTITLES:
            if path.parent not in recordings:
                recordings[path.parent] = _recordings(path.parent)
            found = _beside(path, recordings[path.parent])
            of[found.recording].append(found)
    clips = []
    for recording, subtitles in sorted(of.items()):
        clips += _subtitle_clips(_choose_subtitle(recording, subtitles, config.language), config)
    bare = [p.name for p in files if is_recording(p) and p not in of]
    if clips and bare:
        logger.warning(
            "%s: %d recordings without subtitles are left out: %s%s",
            folder,
            len(bare),
            ", ".join(bare[:3]),
            ", ..." if len(bare) > 3 else "",
        )
    return clips


def _choose_subtitle(recording: Path, found: list[_Subtitle], language: str | None) -> _Subtitle:
    """The one of several subtitles that is taken, which is logged.

    Raises:
        UserError: languages of which none is that of the data, or none is named.
    """
    known = sorted({s.language for s in found if s.language is not None})
    if language not in (None, "auto"):
        fitting = [s for s in found if s.language == language] or [
            s for s in found if s.language is None
        ]
        if not fitting:
            raise UserError(
                f"{recording}: subtitles in {', '.join(known)} beside it, the language is set to "
                f"'{language}'. Set data.language to the language of the speech, or add "
                "subtitles in it."
            )
    else:
        fitting = [s for s in found if s.language is None] or found
        if len({s.language for s in fitting}) > 1:
            raise UserError(
                f"{recording}: subtitles in {', '.join(known)} beside it. Set data.language to the "
                "one that is spoken."
            )
    chosen = min(fitting, key=lambda subtitle: subtitle.rank)
    if len(found) > 1:
        others = ", ".join(sorted(s.path.name for s in found if s is not chosen))
        logger.info("%s: using %s, not %s", recording.name, chosen.path.name, others)
    return chosen


def _recordings(folder: Path) -> dict[str, list[Path]]:
    """The recordings of a folder by their names with and without ending."""
    named: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if is_visible(path, folder) and may_be_recording(path) and path.is_file():
            named[path.name].append(path)
            if path.stem != path.name:
                named[path.stem].append(path)
    return named


def _beside(subtitle: Path, recordings: dict[str, list[Path]]) -> _Subtitle:
    """A subtitle file with the recording beside it: `talk.mp4` with `talk.srt`, `talk.mp4.srt`,
    `talk.en.srt` or `talk.en.forced.vtt`.

    Raises:
        UserError: there is none.
    """
    stem, tags = subtitle.stem, list[str]()
    while stem not in recordings and "." in stem and len(tags) < _MOST_TAGS:
        stem, _, tag = stem.rpartition(".")
        tags.insert(0, tag)
    if stem not in recordings:
        raise UserError(f"{subtitle}: no recording of the same name beside it.")
    found = [path for path in recordings[stem] if is_recording(path)] or recordings[stem]
    if len(found) > 1:
        others = ", ".join(path.name for path in found[1:])
        logger.info("%s: using %s, not %s", subtitle.name, found[0].name, others)
    return _Subtitle(subtitle, found[0], tuple(tags))


def _subtitle_clips(subtitle: _Subtitle, config: DataConfig) -> list[Clip]:
    path, recording, language = subtitle.path, subtitle.recording, subtitle.language
    group, prefix = str(recording), f"{path}:"
    return [
        Clip(
            recording,
            shown.replace("\n", " "),
            start,
            end,
            group,
            language,
            where=f"{prefix}{line}",
        )
        for start, end, shown, line in read_subtitles(path, language=language or config.language)
    ]


# --- decoding and cache --------------------------------------------------------------------------


def _decode_cached(clip: Clip, longest_s: float) -> Clip:
    """Decode a clip, or find it in the cache; fill in length, digest and cache path."""
    try:
        path = clip.path.resolve(strict=True)
        stat = path.stat()
    except (OSError, ValueError, RuntimeError):  # also of NUL in a name, and links in a circle
        raise MediaError(f"{clip.path}: no such file.") from None
    check_file(path)
    # By the time of its last change as well, which nobody can set.
    marks = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    key = json.dumps([_CACHE_VERSION, str(path), *marks, clip.start, clip.end])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    cached = cache_path("audio", name[:2], f"{name}.npy")
    samples = _cached_samples(cached)
    if samples is None:
        decoded = decode_clip(path, clip.start, clip.end, longest_s=longest_s).astype(np.float16)
        samples = decoded
        cached = put(cached, lambda part: _save(part, decoded))
    if len(samples) > longest_s * SAMPLE_RATE:
        raise LongMediaError(f"{path}: is longer than {longest_s:g} s.")
    digest = hashlib.sha256(samples.tobytes()).hexdigest()[:32] if samples.any() else ""
    return replace(clip, seconds=len(samples) / SAMPLE_RATE, digest=digest, cached=cached)


def _save(path: Path, samples: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, samples)


def _cached_samples(path: Path) -> np.ndarray | None:
    """The samples of a file in the cache; None if it is not there, or damaged."""
    try:
        samples = np.load(path)  # no pickles
    except (OSError, ValueError, EOFError, MemoryError):
        return None
    is_whole = isinstance(samples, np.ndarray) and samples.dtype == np.float16 and samples.ndim == 1
    return samples if is_whole and bool(np.isfinite(samples).all()) else None


def load_clips(
    source: str | Path,
    config: DataConfig,
    *,
    name: str,
    max_seconds: float = 30.0,
    labelled: bool = True,
    languages: Sequence[str] | None = None,
    clips: list[Clip] | None = None,
) -> ClipSet:
    """Read and decode a set of clips; see `read_clips` for `labelled`. `languages` are those that
    the model has; `clips` are what `read_clips` gave, where that is known.

    Clips that cannot be decoded or are longer than `max_seconds` are left out and listed.

    Raises:
        UserError: see `read_clips`; a clip in another language; more than `data.max_undecodable` of
            the clips failed to decode; nothing usable is left.
    """
    if clips is None:
        clips = read_clips(source, config, labelled=labelled)
    if languages is not None:
        _refuse_languages(source, clips, languages)

    def attempt(clip: Clip) -> Clip | MediaError:
        try:
            return _decode_cached(clip, max_seconds)
        except MediaError as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        results = list(track(pool.map(attempt, clips), f"reading {name}", total=len(clips)))
    long = [error for error in results if isinstance(error, LongMediaError)]
    others = (e for e in results if not isinstance(e, LongMediaError))
    failed = [str(error) for error in others if isinstance(error, MediaError)]
    skipped = [*failed, *(f"{error} {_CUT}" for error in long)]
    for line in skipped:
        logger.warning("skipped: %s", line)
    if len(failed) > config.max_undecodable * len(clips):
        raise UserError(
            f"{source}: {len(failed)} of {len(clips)} clips could not be decoded "
            f"(data.max_undecodable is {config.max_undecodable:g}). First: {failed[0]}"
        )
    usable = [result for result in results if isinstance(result, Clip)]
    if not usable:
        raise UserError(f"{source}: none of the {len(clips)} clips is usable. First: {skipped[0]}")
    return ClipSet(name, usable, skipped)


def usual_language(clips: Iterable[Clip]) -> str | None:
    """The language of most clips; None unless all of them say theirs."""
    counts = Counter(clip.language for clip in clips)
    return None if None in counts or not counts else counts.most_common(1)[0][0]


def _refuse_languages(source: str | Path, clips: Sequence[Clip], languages: Sequence[str]) -> None:
    others = [clip for clip in clips if clip.language not in (None, *languages)]
    if others:
        has = ", ".join(languages[:8]) + (", ..." if len(languages) > 8 else "")
        raise UserError(
            f"{others[0].where or source}: the language is "
            f"'{others[0].language}', the model has {has} ({len(others)} such clips). Leave them "
            "out, or choose a model that has it."
        )


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
