"""What makes text of a piece, wherever it runs: the recogniser, guards and lines of `monitor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.monitoring.decoding import (
    Decoder,
    Found,
    Rejected,
    Result,
    TextClasses,
    lines_of,
    of_halves,
)
from mmtransfer.monitoring.events import NoText, Transcript
from mmtransfer.monitoring.fair_queue import Job
from mmtransfer.monitoring.lines import LineSettings
from mmtransfer.monitoring.loading import (
    recognizer_of,
    resolve_models,
    sound_classes,
    text_classifier,
)
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.monitoring.sound_events import SoundClasses
from mmtransfer.scale.pieces import Piece
from mmtransfer.scale.sources import BulkFile
from mmtransfer.speech.recognition import Recognizer

Line = Transcript | NoText

_RECOGNITION_VERSION = 3  # raise it when speech comes to be cut or decoded in another way


def settings_of(
    options: RecognitionOptions, models: Mapping[str, Checkpoint]
) -> dict[str, str | float | bool | dict[str, float] | None]:
    """What the rows of a run depend on: digests of the models, and how they are used; also by which
    version, so that no archive is cut in two ways.
    """
    return {
        "model": models[options.model].digest,
        "language": options.language,
        "engine": options.engine,
        "compute_type": options.compute_type,
        "context_s": options.context_s,
        "beam_size": options.beam_size,
        "prompt": options.prompt,
        "words": options.words,
        "line_s": options.line_s,
        "line_characters": options.line_characters,
        "sentiment": models[options.sentiment].digest if options.sentiment else None,
        "sounds": models[options.sounds].digest if options.sounds else None,
        "sound_thresholds": dict(options.sound_thresholds or {}),
        "recognition_version": _RECOGNITION_VERSION,
    }


class Transcriber:
    """A recogniser with all that its lines carry; `transcribe` may be called from `workers` threads
    at the same time.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        lines: LineSettings | None = None,
        classifier: TextClasses | None = None,
        with_words: bool = False,
    ):
        self._recognizer, self._with_words = recognizer, with_words
        self._decoder = Decoder([recognizer], lines or LineSettings(), classifier)
        self.workers = recognizer.engine.workers
        self.window_s = recognizer.window_s

    def transcribe(self, piece: Piece, files: Sequence[BulkFile]) -> list[tuple[int, Line]]:
        """The lines of a piece, in its order, each with the number of its file; with what was
        rejected. They depend on the piece alone.
        """
        found: list[Found | None] = [None] * len(piece.spoken)
        waiting = [
            self._job(number, spoken.id, spoken.segment)
            for number, spoken in enumerate(piece.spoken)
        ]
        while waiting:
            same = [job for job in waiting if job.kind == waiting[0].kind]
            batch = same[: same[0].most]
            waiting = [job for job in waiting if job not in batch]
            again: list[Job] = []
            for job, result in zip(batch, self._decoder.recognize(batch), strict=True):
                file = files[piece.spoken[job.number].file]
                verdict = self._decoder.settle(job, result)
                if isinstance(verdict, list):
                    again += verdict
                else:
                    self._finish(found, job, file, self._found(job, file, verdict))
            waiting = again + waiting
        lines: list[tuple[int, Line]] = []
        for spoken, one in zip(piece.spoken, found, strict=True):
            lines += [
                (spoken.file, line) for line in ([one] if isinstance(one, NoText) else one or [])
            ]
        return lines

    def _job(self, number: int, identity: str, segment: Any) -> Job:
        kind = self._decoder.kind(0, self._recognizer.context_s(segment.samples))
        return Job(0, number, identity, segment, *kind)

    def _found(self, job: Job, file: BulkFile, verdict: Result | Rejected) -> Found:
        if isinstance(verdict, Rejected):
            times = (round(job.segment.start, 3), round(job.segment.end, 3))
            return NoText(file.name, job.id, *times, verdict.reason, text=verdict.likeliest.text)
        return [*lines_of(file.shown, file.name, job.id, verdict, with_words=self._with_words)]

    def _finish(
        self, found: list[Found | None], job: Job, file: BulkFile, one: Found | None
    ) -> None:
        """Note what became of a job; of a half once the other is known."""
        whole = job.half_of
        if whole is None:
            found[job.number] = one
            return
        whole.halves[job.segment.start] = one
        if len(whole.halves) == 2:
            both = of_halves(whole)
            one = self._found(whole, file, both) if isinstance(both, Result) else both
            self._finish(found, whole, file, one)


def open_transcriber(
    options: RecognitionOptions, models: Mapping[str, Checkpoint] | None = None
) -> Transcriber:
    """A transcriber by options; `models` are those of `resolve_models`, where they are known.

    Raises:
        UserError: a model or an option that cannot be used.
    """
    models = resolve_models(options) if models is None else models
    return Transcriber(
        recognizer_of(models[options.model], options),
        lines=options.lines,
        classifier=text_classifier(models[options.sentiment]) if options.sentiment else None,
        with_words=options.words,
    )


def open_sounds(
    options: RecognitionOptions, models: Mapping[str, Checkpoint] | None = None
) -> SoundClasses | None:
    """What classifies sounds by options, if they ask for it; `models` as for a transcriber.

    Raises:
        UserError: a model or a threshold that cannot be used.
    """
    if options.sounds is None:
        return None
    found = resolve(options.sounds) if models is None else models[options.sounds]
    return sound_classes(found, options.sound_thresholds or {}, options.device)
