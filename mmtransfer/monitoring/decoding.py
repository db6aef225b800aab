"""What decoding makes of jobs: text as lines, or what is decoded again, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from mmtransfer.data.words import split_words
from mmtransfer.monitoring.events import NoText, Transcript, line_id
from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS, Job
from mmtransfer.monitoring.lines import (
    Line,
    LineSettings,
    last_piece,
    longest_word_s,
    split_lines,
    split_pieces,
    text_ends_at,
)
from mmtransfer.monitoring.redaction import Redactor
from mmtransfer.monitoring.silence import Silences
from mmtransfer.monitoring.sources.source import Source
from mmtransfer.monitoring.texts import transcripts
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.guards import LOOPING, agreed, rejection
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Segment

TextClasses = Callable[[list[str]], list[tuple[str, float]]]
"""Texts to their classes, each with its probability."""
Found = list[Transcript | NoText] | NoText
"""What became of a segment: lines of text, with a half that gave none behind them; or no text."""
_MISSED_S = 2.0  # speech at the end of a window without a word is decoded on its own
_LONGEST_WORD_S = 1.6  # speech in one word, which alignment gives what a decoder left out beside it
_DELAY_S = 0.3  # by which a doubted segment is moved in its window when it is decoded again


@dataclass
class Result:
    """What a worker made of a job."""

    hypothesis: Hypothesis
    lines: list[Line]
    classified: list[tuple[str, float]] = field(default_factory=list)
    """Class and probability of each line's text."""
    pieces: list[int] = field(default_factory=list)
    """Of a turn: how many lines each of its segments has."""
    whole: tuple[tuple[float, ...], Hypothesis] | None = None
    """Of a segment: where those start that were decoded together, and as what."""


@dataclass(frozen=True)
class Rejected:
    """A text that stays in doubt after all that can be tried."""

    reason: str
    likeliest: Hypothesis


class Decoder:
    """Decodes batches with the recognisers of their sources (by number), and says what follows from
    a result. Segments of the sources `with_turns` are decoded again with the turn that they are of.
    What the sources' `redactors` take out is in no line, and `silences` say when it was spoken.
    """

    def __init__(
        self,
        recognizers: Sequence[Recognizer],
        lines: LineSettings,
        classifier: TextClasses | None = None,
        with_turns: Collection[int] = (),
        redactors: Sequence[Redactor | None] = (),
        silences: Sequence[Silences | None] = (),
    ):
        self._recognizers, self._lines, self._classifier = [*recognizers], lines, classifier
        self._with_turns, self._redactors = {*with_turns}, [*redactors]
        self._silences = [*silences]

    def admit(self, source: Source) -> None:
        """Decode for one more source; its number is the next."""
        self._recognizers.append(source.recognizer)
        self._redactors.append(source.redactor)
        self._silences.append(source.silences)
        if source.has_turns:
            self._with_turns.add(source.number)

    def kind(self, camera: int, context_s: float) -> tuple[tuple[int, float], int]:
        """Kind of a source's job, and how many of it make a batch."""
        recognizer = self._recognizers[camera]
        most = min(BATCH_SEGMENTS, recognizer.batch_size(context_s))
        return (id(recognizer), context_s), most

    def recognize(self, batch: Sequence[Job]) -> list[Result]:
        """Decode and classify a batch; may be called from any thread."""
        first = batch[0]
        if first.decoded is not None:
            return self._results([first.decoded], batch)
        found = self._recognizers[first.camera].decode(
            [job.samples for job in batch],
            first.kind[1],
            # A whole draft is the segment's text, unless somebody goes on.
            can_wait=first.is_turn or (first.is_draft and not first.is_whole),
        )
        return self._results(found, batch)

    def settle(self, job: Job, result: Result) -> Result | Rejected | list[Job]:
        """What becomes of a segment: its text, a rejection, or what is to be decoded in its place.
        A doubted text is decoded again: that of a segment in its turn without it, others in a
        longer context, and when there is none, in two halves; and once more if it is doubted for
        its repetitions alone. What a decoder left out at the end of a window is decoded on its own;
        where it seems to have left out something else, both halves are, see `of_halves`.
        """
        segment, hypothesis = job.segment, result.hypothesis
        seconds = segment.end - segment.start
        reason = rejection(hypothesis, seconds)
        if reason is None:
            cut = missed_from(segment, hypothesis)
            if cut is not None:
                return self._parts(job, segment.parts(cut))
            halves = segment.halves() if skips_speech(segment, hypothesis) else None
            if halves is None:
                return result
            job.kept = result
            return self._parts(job, halves)
        if job.window is not None:
            context_s = self._recognizers[job.camera].context_s(segment.samples, is_first=True)
            kind, most = self.kind(job.camera, context_s)
            return [replace(job, window=None, kind=kind, most=most)]
        job.readings = (*job.readings, hypothesis)
        again = self._longer_or_halves(job)
        if again:
            return again
        if reason == LOOPING:
            believed = agreed(job.readings, seconds)
            if believed is not None:
                return self._results([believed], [job])[0]
            if not job.is_delayed:
                return [replace(job, segment=segment.delayed(_DELAY_S), is_delayed=True)]
        likeliest = max(job.readings, key=lambda found: (bool(found.text), found.avg_logprob))
        return Rejected(reason, self._shown(job, likeliest))

    def draft_text(self, job: Job, result: Result) -> str:
        """The text of a segment that may go on."""
        redactor = self._redactors[job.camera] if self._redactors else None
        text = result.hypothesis.text
        return text if redactor is None else redactor.text(text, is_open=True)

    def longer_turn(self, job: Job, result: Result) -> Job | None:
        """A turn whose text is doubted, to be decoded in a longer context; None if it is not, or if
        there is none.
        """
        hypothesis, segment = result.hypothesis, job.segment
        longer = self._recognizers[job.camera].longer_context_s(hypothesis.context_s)
        if longer is None or rejection(hypothesis, segment.end - segment.start) is None:
            return None
        kind, most = self.kind(job.camera, longer)
        return replace(job, kind=kind, most=most)

    def _results(self, found: Sequence[Hypothesis], jobs: Sequence[Job]) -> list[Result]:
        """Hypotheses with their lines, and the classes of these."""
        results = []
        for job, whole in zip(jobs, found, strict=True):
            hypothesis = _of_segment(job, whole)
            shown = self._shown(job, hypothesis)  # guards judge what was decoded
            if job.is_turn:
                pieces = split_pieces(shown, job.segment, self._lines, job.known)
                lines = [line for piece in pieces for line in piece]
                results.append(Result(hypothesis, lines, pieces=[len(piece) for piece in pieces]))
            else:
                lines = split_lines(shown, job.segment, self._lines)
                results.append(Result(hypothesis, lines, whole=(job.starts, whole)))
        if self._classifier is not None:
            classified = [result for result in results if result.hypothesis.text.strip()]
            texts = [line.text for result in classified for line in result.lines]
            classes = iter(self._classifier(texts) if texts else [])
            for result in classified:
                result.classified = [next(classes) for _ in result.lines]
        return results

    def _shown(self, job: Job, hypothesis: Hypothesis) -> Hypothesis:
        redactor = self._redactors[job.camera] if self._redactors else None
        if redactor is None:
            return hypothesis
        silences = self._silences[job.camera] if self._silences else None
        if silences is not None:
            segment = job.segment
            for start, end in redactor.times(hypothesis):
                first = max(segment.start, segment.time_at(start))
                last = segment.end if end == math.inf else segment.time_at(end)
                silences.hide(first, max(first, last))
        return redactor.hypothesis(hypothesis)

    def _longer_or_halves(self, job: Job) -> list[Job]:
        """What is to be decoded in the place of a segment whose text is doubted; empty if there is
        no longer context, nor a pause in it.
        """
        recognizer = self._recognizers[job.camera]
        longer = recognizer.longer_context_s(job.readings[-1].context_s)
        if job.camera in self._with_turns and longer == recognizer.engine.max_context_s:
            return []  # its turn will be decoded in that
        if longer is not None:
            kind, most = self.kind(job.camera, longer)
            return [replace(job, kind=kind, most=most)]
        return self._parts(job, job.segment.halves() or ())

    def _parts(self, job: Job, segments: Sequence[Segment]) -> list[Job]:
        recognizer = self._recognizers[job.camera]
        parts = []
        for segment in segments:
            kind, most = self.kind(job.camera, recognizer.context_s(segment.samples))
            part = replace(job, half_of=job, halves={}, kept=None)
            part.segment, part.kind, part.most = segment, kind, most
            parts.append(part)
        return parts


def _of_segment(job: Job, whole: Hypothesis) -> Hypothesis:
    """Of what was decoded, the part that is of the job's segment; without text if it is in doubt
    which that is.
    """
    if job.window is None:
        return whole
    if not is_trusted(job.window, whole):
        return replace(whole, text="", tokens=(), words=())
    return last_piece(whole, job.window, job.segment, job.known)


def is_trusted(segment: Segment, hypothesis: Hypothesis) -> bool:
    """Whether no guard objects to a text, and it is that of all that was spoken."""
    is_doubted = rejection(hypothesis, segment.end - segment.start) is not None
    is_whole = missed_from(segment, hypothesis) is None and not skips_speech(segment, hypothesis)
    return is_whole and not is_doubted


def missed_from(segment: Segment, hypothesis: Hypothesis) -> int | None:
    """The piece behind which a window has no text, if so much is spoken from there on."""
    cut = text_ends_at(hypothesis, segment)
    missed = sum(piece.end - piece.start for piece in segment.pieces[cut:])
    return cut if cut > 0 and missed >= _MISSED_S else None


def skips_speech(segment: Segment, hypothesis: Hypothesis) -> bool:
    """Whether a word of a window has taken so much speech that a decoder must have left out some of
    it, before a pause or behind one.
    """
    return longest_word_s(hypothesis, segment) > _LONGEST_WORD_S


def of_halves(job: Job) -> Result | Found | None:
    """What became of a job both halves of which are known: its own text if that was doubted for
    what it may lack, and the halves have no more words.
    """
    found = joined(job.id, [job.halves[start] for start in sorted(job.halves)])
    if job.kept is None:
        return found
    lines = found if isinstance(found, list) else []
    words = sum(len(split_words(line.text)) for line in lines if isinstance(line, Transcript))
    own = sum(len(split_words(line.text)) for line in job.kept.lines)
    return job.kept if own >= words else found


def joined(identity: str, halves: Sequence[Found | None]) -> Found | None:
    """What became of a window that was decoded in halves: lines, and the half that gave none. None
    for one that was dropped.
    """
    lines = [line for half in halves if isinstance(half, list) for line in half]
    rejected = [half for half in halves if isinstance(half, NoText)]
    if not lines and not rejected:
        return None
    if not lines:
        text = " ".join(half.text for half in rejected).strip()
        return replace(rejected[0], end=rejected[-1].end, text=text)
    numbered = [replace(line, id=line_id(identity, number)) for number, line in enumerate(lines)]
    return [*numbered, *rejected]


def lines_of(
    source: str, name: str, identity: str, result: Result, *, with_words: bool
) -> list[Transcript]:
    """A result as the lines of a segment or turn of a source, by its address and its name."""
    found = transcripts(
        *(source, name, identity, result.hypothesis, result.lines),
        with_words=with_words,
    )
    if not result.classified:
        return found
    return [
        replace(line, sentiment=label, sentiment_prob=round(share, 4))
        for line, (label, share) in zip(found, result.classified, strict=True)
    ]
