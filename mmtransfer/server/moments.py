"""The sound around a line: of its recording, or of a clip that was kept."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtransfer.errors import UserError
from mmtransfer.monitoring.sources.clips import AROUND_S
from mmtransfer.server.catching_up import JournalIndex
from mmtransfer.server.hits import Hit
from mmtransfer.speech.audio import SAMPLE_RATE, decode_clip

_LONGEST_S = 60.0
_LONGEST_CLIP_S = 300.0  # with all that lies before it to the last whole picture
_BEFORE_S, _AFTER_S = 5.0, 10.0
_PEAKS = 400


@dataclass(frozen=True)
class Moment:
    """Sound, and where a line is in it."""

    samples: np.ndarray
    """Float32 at 16 kHz."""
    start: float
    """Seconds into the sound."""
    end: float

    @property
    def peaks(self) -> list[float]:
        """The loudest of each of some hundred parts, 0 to 1."""
        parts = np.array_split(np.abs(self.samples), min(_PEAKS, max(1, len(self.samples))))
        return [round(min(1.0, float(part.max(initial=0.0))), 3) for part in parts]

    @property
    def wav(self) -> bytes:
        """A file that every browser plays."""
        data = io.BytesIO()
        with wave.open(data, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((np.clip(self.samples, -1, 1) * 32767).astype("<i2").tobytes())
        return data.getvalue()


def moment(index: JournalIndex, hit: Hit) -> Moment | None:
    """The sound around a line, as far as it was kept; None where nothing was."""
    return _of_recording(index, hit) or _of_clip(index, hit)


def _of_recording(index: JournalIndex, hit: Hit) -> Moment | None:
    source = Path(hit.source)
    if not hit.source or "://" in hit.source or not source.is_file():
        return None
    begun = index.recording_began(hit)
    start, end = hit.start - begun, min(hit.end - begun, hit.start - begun + _LONGEST_S)
    first = max(0.0, start - _BEFORE_S)
    for last in (end + _AFTER_S, end):  # the recording may end before
        try:
            samples = decode_clip(source, first, last)
        except UserError:
            continue
        return Moment(samples, start - first, end - first)
    return None


def _of_clip(index: JournalIndex, hit: Hit) -> Moment | None:
    for one in index.with_clips(hit):
        if one.clip is None or not Path(one.clip).is_file():
            continue
        try:
            samples = decode_clip(one.clip, longest_s=_LONGEST_CLIP_S)
        except UserError:
            continue
        # It ends where it was to end, and begins with the picture before its beginning.
        first = one.end + AROUND_S - len(samples) / SAMPLE_RATE
        start, end = hit.start - first, hit.end - first
        if end > 0:
            return Moment(samples, max(0.0, start), min(end, len(samples) / SAMPLE_RATE))
    return None
