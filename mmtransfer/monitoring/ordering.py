"""Everything that is found, put back into each source's order, written, and then handed out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from mmtransfer.monitoring.decoding import Found, Result, is_trusted, lines_of
from mmtransfer.monitoring.events import (
    Alert,
    FileDone,
    Item,
    NoText,
    Partial,
    Recording,
    SourceEnd,
    Stopped,
    Transcript,
    line_id,
    segment_id,
)
from mmtransfer.monitoring.fair_queue import Job
from mmtransfer.monitoring.ledger import Ledger
from mmtransfer.monitoring.lines import Line
from mmtransfer.monitoring.moments import Moments
from mmtransfer.monitoring.sources.source import Source
from mmtransfer.monitoring.texts import alerts, new_alerts, revised
from mmtransfer.speech.engine import Word, word_logprob
from mmtransfer.speech.segments import Segment

_PAST_SEGMENTS = 64  # more than a window takes
_LESS_LIKELY = 0.1  # nats a word, by which a turn's text may be less likely than the first one
_LESS_LIKELY_ELSEWHERE = 0.3  # in another context
HandedOut = Generator[Item, None, bool]
"""Items that have been written; at its end, whether all that is ready could be."""


class Output:
    """What the segments of a source became, by their places."""

    def __init__(self, source: Source):
        self.source = source
        self.count = self.emitted = 0
        """Places that have been given, and of these, what has been handed out."""
        self.recent: dict[str, list[Transcript]] = {}
        """Of a live source: the lines of segments whose turn is not over, by segment."""
        self._past: dict[str, list[Transcript]] = {}  # of the last segments whose turn is
        self.logprobs: dict[str, float] = {}
        """Of those segments: the mean log-probability of their words, where it is known."""
        self.end: SourceEnd | None = None
        self._done: dict[int, Found | FileDone | Recording | None] = {}
        self._turns: deque[tuple[Job, Result]] = deque()  # decoded
        self._open_turns = 0

    def place(self) -> int:
        """The next place."""
        self.count += 1
        return self.count - 1

    def put(self, place: int, found: Found | FileDone | Recording | None) -> None:
        """What has come of a place; None for a segment that the journal has already."""
        self._done[place] = found

    @property
    def is_ready(self) -> bool:
        """Whether something has come of the place that is next."""
        return self.emitted in self._done

    @property
    def next(self) -> Found | FileDone | Recording | None:
        """What has come of the place that is next."""
        return self._done[self.emitted]

    def advance(self) -> None:
        """It has been dealt with."""
        del self._done[self.emitted]
        self.emitted += 1

    # --- turns --------------------------------------------------------------------------------

    def open_turn(self) -> None:
        """A turn is over, and may change lines."""
        self._open_turns += 1

    def put_turn(self, job: Job, result: Result) -> None:
        """It has been decoded."""
        self._turns.append((job, result))

    def known_lines(self, window: Segment) -> list[list[Line]]:
        """The lines that each segment of a window has."""
        names = (segment_id(self.source.name, piece.start) for piece in window.pieces)
        known = {**self._past, **self.recent}
        return [
            [Line(line.start, line.end, line.text) for line in known.get(name, ())]
            for name in names
        ]

    @property
    def next_turn(self) -> tuple[Job, Result] | None:
        """The next turn that has been decoded, once all its segments have been handed out."""
        if self._turns and self._turns[0][0].after <= self.emitted:
            return self._turns[0]
        return None

    def settle_turn(self, job: Job) -> None:
        """It changes nothing more."""
        if self._turns and self._turns[0][0] is job:
            self._turns.popleft()
        self._open_turns -= 1
        for piece in job.segment.pieces:
            name = segment_id(self.source.name, piece.start)
            self._past[name] = self.recent.pop(name, [])
            self.logprobs.pop(name, None)
        for name in [*self._past][:-_PAST_SEGMENTS]:
            del self._past[name]

    @property
    def is_settled(self) -> bool:
        """Whether everything has been handed out."""
        return self.emitted == self.count and not self._open_turns


class Ordering:
    """Hands out what is ready: what happens to sources at once, and each source's segments in
    order, followed by their alerts. The ledger has it before; while it takes nothing, all waits.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        ledger: Ledger,
        moments: Moments,
        clock: Callable[[], float],
        *,
        with_words: bool,
    ):
        self.outputs = [Output(source) for source in sources]
        """By number of the source."""
        self._ledger, self._moments = ledger, moments
        self.clock = clock
        """That of the run, by which live sources have their times."""
        self._with_words = with_words
        self._open = len(self.outputs)
        self._unplaced: deque[Item | NoText] = deque()

    @property
    def is_over(self) -> bool:
        """Whether every source has ended, and that has been handed out."""
        return not self._open

    def admit(self, source: Source) -> None:
        """Hand out what one more source gives; its number is the next."""
        self.outputs.append(Output(source))
        self._open += 1

    def add(self, item: Item | NoText) -> None:
        """Something without a place; it is handed out as soon as it is written."""
        self._unplaced.append(item)

    def items(self) -> Iterator[Item]:
        """Write and hand out what is ready."""
        if self._ledger.is_blocked:
            return
        is_written = yield from self._events()
        for output in self.outputs if is_written else ():
            is_written = (
                (yield from self._segments(output))
                and (yield from self._revisions(output))
                and (yield from self._end(output))
            )
            if not is_written:
                return

    def _events(self) -> HandedOut:
        while self._unplaced:
            item = self._unplaced[0]
            if not isinstance(item, Partial) and not self._ledger.write(item):
                return False
            self._unplaced.popleft()
            if not isinstance(item, NoText):
                yield item
        return True

    def _segments(self, output: Output) -> HandedOut:
        source = output.source
        while output.is_ready:
            found = output.next
            if isinstance(found, FileDone | Recording):
                if not self._ledger.write(found.line(source.name)):
                    return False
                output.advance()
                continue
            ready = [] if found is None else found if isinstance(found, list) else [found]
            if source.is_live:
                now = self.clock()
                ready = [_delayed(line, now - line.end) for line in ready]
            raised = self._with_clips(source, alerts(ready, source.keywords))
            if not self._ledger.write(*ready, *raised):
                return False
            output.advance()
            if not source.is_live:
                source.room.release()
            if not ready:
                continue
            self._ledger.forget(ready[0].id)
            lines = [line for line in ready if isinstance(line, Transcript)]
            if lines:
                if source.is_live and source.recognizer.window_s:
                    output.recent[lines[0].id] = lines
                self._count(source, lines)
            self._raise(source, raised)
            yield from lines
            yield from raised
        return True

    def _revisions(self, output: Output) -> HandedOut:
        """The lines that read differently now that their turn is known."""
        source = output.source
        while (turn := output.next_turn) is not None:
            job, result = turn
            before, after, changed = self._compared(output, job, result)
            if not is_trusted(job.segment, result.hypothesis):
                changed = []
            late_s = self.clock() - job.segment.end
            changed = [replace(line, delay_s=round(late_s, 3)) for line in changed]
            raised = new_alerts(after, before, source.keywords) if changed else []
            raised = self._with_clips(source, raised)
            if not self._ledger.write(*changed, *raised):
                return False
            output.settle_turn(job)
            source.stats.revised += len(changed)
            self._raise(source, raised)
            yield from changed
            yield from raised
        return True

    def _compared(
        self, output: Output, job: Job, result: Result
    ) -> tuple[list[Transcript], list[Transcript], list[Transcript]]:
        """The lines of a turn's segments before and after it was known, and those that changed."""
        source = output.source
        found_lines = lines_of(
            *(source.address_of(job.id), source.name, job.id, result), with_words=self._with_words
        )
        lines, words = iter(found_lines), iter(result.lines)
        before: list[Transcript] = []
        after: list[Transcript] = []
        changed: list[Transcript] = []
        for piece, count in zip(job.segment.pieces, result.pieces, strict=False):
            name = segment_id(source.name, piece.start)
            known = output.recent.get(name, [])
            found = [replace(next(lines), id=line_id(name, number)) for number in range(count)]
            own = [word for line in islice(words, count) for word in line.words]
            before += known
            if _stays(known, output.logprobs.get(name, -math.inf), found, own):
                after += known
            else:
                after += found
                changed += revised(known, found)
        return before, after, changed

    def _end(self, output: Output) -> HandedOut:
        end, source = output.end, output.source
        if end is None or not output.is_settled:
            return True
        is_news = not source.has_ended and not isinstance(end.error, Stopped)
        if is_news and not self._ledger.write(end.line()):
            return False
        output.end = None
        if source.recorder is not None:  # all that it was asked for has been handed out
            source.recorder.close()
        if end.error is not None and not isinstance(end.error, Stopped):
            source.stats.failure = str(end.error)
        self._open -= 1
        yield end
        return True

    def _with_clips(self, source: Source, raised: Iterable[Alert]) -> list[Alert]:
        return [replace(one, clip=self._moments.path(source, one.segment)) for one in raised]

    def _raise(self, source: Source, raised: Sequence[Alert]) -> None:
        """Count alerts, and have one recording of each segment kept."""
        source.stats.alerts += len(raised)
        for alert in {one.segment: one for one in reversed(raised)}.values():
            self._moments.keep(source, alert)

    @staticmethod
    def _count(source: Source, lines: Sequence[Transcript]) -> None:
        source.stats.segments += 1
        source.stats.lines += len(lines)
        source.stats.last_text = lines[-1].text
        if lines[-1].delay_s is not None:
            source.stats.add_delay(lines[-1].delay_s)


def _stays(
    known: Sequence[Transcript], logprob: float, found: Sequence[Transcript], words: Sequence[Word]
) -> bool:
    """Whether a segment's lines, whose words have that log-probability, stay although its turn has
    others for it: where it has no text, or words that are less likely. In another context they may
    be so by more: an adapter decodes shorter ones, and is no judge of the source's own weights.
    """
    if not known:
        return False
    if not any(line.text for line in found):
        return True
    is_comparable = {line.context_s for line in known} == {line.context_s for line in found}
    margin = _LESS_LIKELY if is_comparable else _LESS_LIKELY_ELSEWHERE
    return word_logprob(words) < logprob - margin


def _delayed(line: Transcript | NoText, delay_s: float) -> Transcript | NoText:
    return replace(line, delay_s=round(delay_s, 3)) if isinstance(line, Transcript) else line
