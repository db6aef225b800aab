"""Scores of a whole recording, transcribed as `monitor` does, against its reference."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.data.files import check_regular
from mmtransfer.data.printing import whole_text
from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import Transcript
from mmtransfer.monitoring.loading import load_monitor
from mmtransfer.monitoring.sources.kinds import is_folder, is_live
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.scores import default_normalizer, get_normalizer, speech_metric
from mmtransfer.speech.subtitles import read_subtitles

_SUBTITLES = (".srt", ".vtt", ".ass", ".ssa")
_MOST_BYTES, _LATEST_S = 64 << 20, 1e8
REFERENCES = (".json", ".jsonl", *_SUBTITLES, ".txt")
_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Spoken:
    """A part of a reference."""

    text: str
    start: float | None = None
    """Seconds into the recording, where the reference has times."""
    end: float | None = None


@dataclass(frozen=True)
class RecordingScore:
    """Errors in the text of a recording; words are characters where the language has no spaces."""

    metric: str
    """`wer`, or `cer` for languages written without spaces."""
    rate: float | None
    """Errors over reference words; None if the reference has none."""
    ci_low: float | None
    """Lower end of the 95 % bootstrap interval over the reference's parts; None if it is one."""
    ci_high: float | None
    words: int
    substitutions: int
    deletions: int
    insertions: int
    missed_per_minute: float
    """Deleted words per minute of the recording."""
    offset_p50_s: float | None
    """Median of how far, forwards or backwards, the first word of a part lies from where the
    reference has it; None where the reference has no times."""
    offset_p95_s: float | None
    lines: int
    segments: int
    rejected: int
    """Segments whose text the guards rejected."""
    seconds_audio: float
    seconds_wall: float
    """The recording alone; loading the model is not in it."""
    normalizer: str


def evaluate_recording(
    model: str, recording: str | Path, reference: str | Path, **settings: Any
) -> RecordingScore:
    """Transcribe a recording as `monitor` does and score the text; settings as `load_monitor`.

    The reference is a `.srt`, `.vtt`, `.ass` or `.txt` file, or `.json`/`.jsonl` with objects of
    `text` and, where known, `start` and `end` in seconds.

    Raises:
        UserError: a model, recording or reference that cannot be used.

    Example:
        evaluate_recording("bundled:whisper-tiny.en", "talk.mp3", "talk.srt").rate
    """
    source = str(recording)
    if is_folder(source) or is_live(source):
        kind = "a folder" if is_folder(source) else "a live source"
        raise UserError(
            f"{public_address(source)}: expected the recording that the reference is of, found "
            f"{kind}. Name one file."
        )
    spoken = read_reference(reference)
    monitor = load_monitor(model, **settings | {"words": True})  # lines need exact times
    started = time.perf_counter()
    lines = list(monitor.transcribe(recording))
    seconds = time.perf_counter() - started
    language = settings.get("language")
    if language == "auto":
        language = lines[0].language if lines else None
    return score_recording(
        lines,
        spoken,
        language=language,
        segments=monitor.stats.segments,
        rejected=sum(monitor.stats.rejected.values()),
        seconds_audio=monitor.stats.audio_s,
        seconds_wall=seconds,
    )


def read_reference(path: str | Path) -> list[Spoken]:
    """What was spoken in a recording, in order.

    Raises:
        UserError: no such file, another form, or nothing in it.
    """
    path = Path(path)
    if path.suffix.lower() not in REFERENCES:
        raise UserError(f"{path}: expected a reference in {', '.join(REFERENCES)}.")
    kind = path.suffix.lower()
    text, spoken = "", list[Spoken]()
    if not path.exists():
        raise UserError(f"{path}: no such reference.")
    try:
        if kind in _SUBTITLES:
            spoken = [Spoken(cue.text, cue.start, cue.end) for cue in read_subtitles(path)]
        else:
            check_regular(path, most=_MOST_BYTES)
            text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be used as a reference ({error}); write UTF-8.") from None
    if kind == ".txt":
        spoken = [Spoken(line) for line in text.splitlines() if line.strip()]
    elif text:
        spoken = _objects(path, text)
    if not any(part.text.strip() for part in spoken):
        raise UserError(f"{path}: the reference has no text.")
    return spoken


def _objects(path: Path, text: str) -> list[Spoken]:
    try:
        if path.suffix.lower() == ".json":
            items = json.loads(text)
        else:
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a list of objects with `text`, found no list.")
    spoken = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise UserError(f"{path}: item {number}: expected an object with a string `text`.")
        times = (item.get("start"), item.get("end"))
        if not all(
            at is None or (type(at) in (int, float) and 0 <= at <= _LATEST_S) for at in times
        ):
            raise UserError(f"{path}: item {number}: start and end are numbers of seconds.")
        spoken.append(Spoken(whole_text(item["text"]), *times))
    return spoken


def score_recording(
    lines: Sequence[Transcript],
    spoken: Sequence[Spoken],
    *,
    language: str | None = None,
    segments: int = 0,
    rejected: int = 0,
    seconds_audio: float = 0.0,
    seconds_wall: float = 0.0,
) -> RecordingScore:
    """Align the text of all lines with the whole reference, since neither's cuts need be the
    other's; lines in order, `language` as for `evaluate`.
    """
    import jiwer

    metric, name = speech_metric(language), default_normalizer(language)
    normalize = get_normalizer(name)

    def units(text: str) -> list[str]:
        return normalize.words(normalize(text))

    parts = [units(part.text) for part in spoken]
    found: list[str] = []
    times: list[float] = []
    for line in lines:
        own = units(line.text)
        found += own
        times += _times(line, len(own))
    wanted = [word for part in parts for word in part]
    bounds = [0, *accumulate(len(part) for part in parts)]
    part_of = [number for number, part in enumerate(parts) for _ in part]
    errors = np.zeros(len(parts), int)
    first_at: dict[int, float] = {}
    substitutions = deletions = insertions = 0
    if not wanted:
        insertions = len(found)
    elif not found:
        deletions = len(wanted)
        errors += [len(part) for part in parts]
    else:
        aligned = jiwer.process_words(" ".join(wanted), " ".join(found))
        substitutions, deletions = aligned.substitutions, aligned.deletions
        insertions = aligned.insertions
        starts = set(bounds)
        for chunk in aligned.alignments[0]:
            if chunk.type == "insert":
                place = min(chunk.ref_start_idx, len(part_of) - 1)
                errors[part_of[place]] += chunk.hyp_end_idx - chunk.hyp_start_idx
                continue
            for offset, place in enumerate(range(chunk.ref_start_idx, chunk.ref_end_idx)):
                if chunk.type != "equal":
                    errors[part_of[place]] += 1
                elif place in starts:
                    first_at[part_of[place]] = times[chunk.hyp_start_idx + offset]
    total = substitutions + deletions + insertions
    sizes = np.array([len(part) for part in parts])
    low, high = _interval(errors, sizes)
    offsets = [
        abs(at - start)
        for number, at in first_at.items()
        if (start := spoken[number].start) is not None
    ]
    p50, p95 = np.quantile(offsets, [0.5, 0.95]).tolist() if offsets else (None, None)
    return RecordingScore(
        metric=metric,
        rate=total / len(wanted) if wanted else None,
        ci_low=low,
        ci_high=high,
        words=len(wanted),
        substitutions=substitutions,
        deletions=deletions,
        insertions=insertions,
        missed_per_minute=round(60 * deletions / seconds_audio, 3) if seconds_audio else 0.0,
        offset_p50_s=None if p50 is None else round(p50, 3),
        offset_p95_s=None if p95 is None else round(p95, 3),
        lines=len(lines),
        segments=segments,
        rejected=rejected,
        seconds_audio=round(seconds_audio, 3),
        seconds_wall=round(seconds_wall, 3),
        normalizer=name,
    )


def _times(line: Transcript, count: int) -> list[float]:
    """When each of so many words of a line begins: where its words have times and are as many,
    those; else spread evenly.
    """
    words = line.words or []
    if len(words) == count:
        return [word["start"] for word in words]
    if words:  # numbers and contractions are other words once normalised
        starts = [word["start"] for word in words]
        places = np.linspace(0, len(starts) - 1, count) if count > 1 else np.zeros(count)
        return np.interp(places, np.arange(len(starts)), starts).tolist()
    return np.linspace(line.start, line.end, count, endpoint=False).tolist()


def _interval(errors: np.ndarray, sizes: np.ndarray) -> tuple[float | None, float | None]:
    """95 % bootstrap interval over parts (Bisani & Ney 2004)."""
    if np.count_nonzero(sizes) < 2:
        return None, None
    counts = np.random.default_rng(0).multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), size=_BOOTSTRAP_SAMPLES
    )
    totals = counts @ sizes
    rates = (counts @ errors)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(rates, [2.5, 97.5]).tolist()
    return low, high


def table(score: RecordingScore) -> str:
    """What a person wants to know of it, in a few lines."""
    if score.rate is None:
        first = f"{score.metric.upper()} undefined: the reference has no words"
    else:
        interval = ""
        if score.ci_low is not None and score.ci_high is not None:
            interval = f"  [{score.ci_low:.4f}, {score.ci_high:.4f}]"
        first = f"{score.metric.upper()} {score.rate:.4f}{interval}"
    unit = "words" if score.metric == "wer" else "characters"
    rows = [
        f"{first}  ({score.words} {unit}, normaliser {score.normalizer})",
        f"{score.substitutions} substitutions, {score.deletions} deletions "
        f"({score.missed_per_minute:.1f} {unit} missed per minute), {score.insertions} insertions",
    ]
    if score.offset_p50_s is not None:
        rows.append(
            f"start times off by {score.offset_p50_s:.2f} s (median), {score.offset_p95_s:.2f} s "
            "(95th percentile)"
        )
    rows.append(
        f"{score.lines} lines from {score.segments} segments ({score.rejected} rejected), "
        f"{score.seconds_audio:.1f} s of audio in {score.seconds_wall:.1f} s"
    )
    return "\n".join(rows)


def as_dict(score: RecordingScore) -> dict[str, Any]:
    """The fields for JSON, with the rate under the metric's name, too."""
    return {**asdict(score), score.metric: score.rate}
