"""Cut a stream of audio into segments of speech, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.mixing import brought_up
from mmtransfer.speech.voice_activity import FRAME, SpeechProbability

_FRAME_S = FRAME / SAMPLE_RATE
_BEFORE_SHARE = 0.75  # of a window, that an earlier turn may fill
_BLOCK_FRAMES = 32  # frames scored at once: about a second


@dataclass(frozen=True)
class SegmenterSettings:
    """How speech is cut into segments."""

    threshold: float = 0.5
    """Speech probability at which a segment starts."""
    threshold_off: float = 0.35
    """Probability below which a frame is a pause; lower than `threshold`, so that a segment does
    not flicker on and off."""
    pause_s: float = 0.6
    """A pause this long ends a segment; shorter ones are kept within it."""
    min_speech_s: float = 0.25
    """Less speech than this is a click, not a segment."""
    max_segment_s: float = 15.0
    """Longer speech is cut at its likeliest pause; padding included."""
    pad_s: float = 0.25
    """Audio kept after the speech."""
    pad_before_s: float = 0.8
    """Audio kept before the speech; in noise its beginning is noticed late."""
    piece_pause_s: float = 0.3
    """A pause this long ends a piece of a window; a window is cut between pieces alone."""
    join_share: float = 1.5
    """Pieces are joined over a pause of at most this many times the speech before it: who has
    talked for a while pauses and goes on, after a short call or answer the turn is over."""
    join_least_s: float = 0.8
    """A pause of this length is joined over in any case."""
    join_s: float = 3.0
    """A longer pause ends every turn."""
    kept_pause_s: float = 0.6
    """What a window keeps of a longer pause between its pieces."""


@dataclass(frozen=True)
class Piece:
    """A part of a window, between two pauses."""

    offset_s: float
    """Where its audio begins in the window's samples, in seconds."""
    samples_start: float
    """Seconds in the stream: where its audio begins."""
    start: float
    """Seconds in the stream: where its speech starts."""
    end: float
    """Seconds in the stream: where its speech ends."""


@dataclass(frozen=True)
class Segment:
    """A stretch of speech."""

    start: float
    """Seconds: where speech starts."""
    end: float
    """Seconds: where speech ends."""
    samples: np.ndarray
    """Float32 at 16 kHz, with padding on both sides."""
    samples_start: float = 0.0
    """Seconds: where the samples start."""
    pieces: tuple[Piece, ...] = ()
    """The parts that a window was joined from; none for a segment that is one stretch of audio."""

    def time_at(self, seconds: float) -> float:
        """The stream's time of a moment in the samples."""
        at = self.samples_start + seconds
        for piece in self.pieces:
            if piece.offset_s > seconds:
                break
            at = piece.samples_start + seconds - piece.offset_s
        return at

    def moved(self, seconds: float) -> Segment:
        """The same on a time line that begins so much earlier."""
        pieces = tuple(
            replace(
                piece,
                samples_start=seconds + piece.samples_start,
                start=seconds + piece.start,
                end=seconds + piece.end,
            )
            for piece in self.pieces
        )
        return replace(
            self,
            start=seconds + self.start,
            end=seconds + self.end,
            samples_start=seconds + self.samples_start,
            pieces=pieces,
        )

    def delayed(self, seconds: float) -> Segment:
        """The same speech with so much more silence before it."""
        silence = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
        pieces = tuple(replace(p, offset_s=p.offset_s + seconds) for p in self.pieces)
        if pieces:  # the silence belongs to the first one
            first = replace(
                pieces[0], offset_s=0.0, samples_start=pieces[0].samples_start - seconds
            )
            pieces = (first, *pieces[1:])
        return replace(
            self,
            samples=np.concatenate([silence, self.samples]),
            samples_start=self.samples_start - seconds,
            pieces=pieces,
        )

    def halves(self) -> tuple[Segment, Segment] | None:
        """A window as two, cut at the widest pause of its middle; None if it is one piece."""
        if len(self.pieces) < 2:
            return None
        middle = len(self.samples) / SAMPLE_RATE / 2

        def worth(number: int) -> float:
            before, behind = self.pieces[number - 1 : number + 1]
            return behind.start - before.end - abs(behind.offset_s - middle)

        return self.parts(max(range(1, len(self.pieces)), key=worth))

    def parts(self, cut: int) -> tuple[Segment, Segment]:
        """A window as two, the second from that piece on."""
        at = round(self.pieces[cut].offset_s * SAMPLE_RATE)
        return (
            _window(self.pieces[:cut], self.samples[:at]),
            _window(self.pieces[cut:], self.samples[at:]),
        )


def _window(pieces: Sequence[Piece], samples: np.ndarray) -> Segment:
    """Pieces and their audio, one behind the other, as a segment."""
    first = pieces[0].offset_s
    own = tuple(replace(piece, offset_s=piece.offset_s - first) for piece in pieces)
    return Segment(own[0].start, own[-1].end, samples, own[0].samples_start, own)


class Endpointer(Protocol):
    """Decides in a pause whether the speaker goes on."""

    ask_s: float
    """Silence after which it is asked."""
    longest_s: float
    """A pause this long ends a segment in any case."""
    context_s: float
    """Audio that it looks at."""

    def is_over(self, samples: np.ndarray) -> bool:
        """Whether the segment ends now."""
        ...

    def went_on(self, pause_s: float) -> None:
        """Speech came again after that much silence, about which it was asked."""
        ...


class Segmenter:
    """Turns audio blocks of any size into segments, as each ends.

    With an `endpointer` a pause ends a segment when that decides so, instead of after `pause_s`. It
    is asked at a set moment of the pause, so the segments do not depend on the size of the blocks.
    """

    def __init__(
        self,
        settings: SegmenterSettings | None = None,
        block_frames: int = _BLOCK_FRAMES,
        endpointer: Endpointer | None = None,
    ):
        self.settings = settings or SegmenterSettings()
        self._endpointer = endpointer
        self._ask = round(endpointer.ask_s / _FRAME_S) if endpointer else 0  # frames of silence
        self._is_asked = False  # about the running pause
        self._context = round(endpointer.context_s / _FRAME_S) if endpointer else 0  # frames
        self._block = block_frames * FRAME
        self._pad = round(self.settings.pad_s / _FRAME_S)  # frames
        before_s = min(self.settings.pad_before_s, self.settings.max_segment_s / 4)
        self._before = round(before_s / _FRAME_S)
        self._probability = SpeechProbability()
        self._pending = np.zeros(0, np.float32)  # less than a scoring block, not scored yet
        # Scored frames that may still be needed: from the start of the running segment (or the
        # padding before a next one) to now. Row k is frame `_first + k` of the stream.
        self._frames = np.zeros((0, FRAME), np.float32)
        self._scores = np.zeros(0, np.float32)
        self._first = 0
        self._started: int | None = None  # frame where speech started
        self._voiced = 0  # frames at or above the threshold in the running segment
        self._last_voiced = 0  # last frame that was not a pause
        self._taken = 0  # frames before this went into a segment, padding included

    def feed(self, samples: np.ndarray) -> Iterator[Segment]:
        """Take the next samples of the stream; yields segments that ended in them."""
        self._pending = np.concatenate([self._pending, samples])
        while len(self._pending) >= self._block:
            ready, self._pending = self._pending[: self._block], self._pending[self._block :]
            yield from self._score(ready)

    @property
    def is_idle(self) -> bool:
        """Whether nobody speaks."""
        return self._started is None

    @property
    def scored_s(self) -> float:
        """Seconds that have been looked at; less than a block of what was fed waits for more."""
        return (self._first + len(self._frames)) * _FRAME_S

    @property
    def running_s(self) -> float | None:
        """Where the running segment starts, in seconds; None without speech."""
        running = self.running()
        return running[0].start if running else None

    def running(self) -> tuple[Segment, bool] | None:
        """Running speech, as the segment that it would be if it ended here, and whether its
        samples would be the very same if no more speech came; None without speech.
        """
        if self._started is None or self._voiced * _FRAME_S < self.settings.min_speech_s:
            return None
        end = self._last_voiced + 1
        high = min(self._first + len(self._frames), end + self._pad)
        return self._segment(self._started, end, high), high == end + self._pad

    def finish(self) -> Iterator[Segment]:
        """The stream is over; yields what was still running."""
        padding = -len(self._pending) % FRAME
        if len(self._pending):
            yield from self._score(np.pad(self._pending, (0, padding)))
            self._pending = np.zeros(0, np.float32)
        if self._started is not None:
            yield from self._close(self._last_voiced + 1, now=self._first + len(self._frames))

    def _score(self, samples: np.ndarray) -> Iterator[Segment]:
        scores = self._probability(samples)
        base = self._first + len(self._frames)
        self._frames = np.concatenate([self._frames, samples.reshape(-1, FRAME)])
        self._scores = np.concatenate([self._scores, scores])
        settings = self.settings
        longest_pause_s = self._endpointer.longest_s if self._endpointer else settings.pause_s
        pause = max(1, round(longest_pause_s / _FRAME_S))
        longest = int(settings.max_segment_s / _FRAME_S) - self._before - self._pad
        for offset, score in enumerate(scores):
            frame = base + offset
            if self._started is None:
                if score < settings.threshold:
                    continue
                self._goes_on(frame)
                self._started, self._voiced = frame, 0
            if score >= settings.threshold_off:
                self._goes_on(frame)
                self._last_voiced = frame
            if score >= settings.threshold:
                self._voiced += 1
            silence = frame - self._last_voiced
            if silence >= pause or (silence == self._ask and self._is_over(frame)):
                yield from self._close(self._last_voiced + 1, now=frame + 1)
            elif frame - self._started + 1 >= longest:
                yield from self._split(frame)
        self._forget()

    def _is_over(self, frame: int) -> bool:
        """Whether the running segment ends in the pause that it is in, by the endpointer."""
        if self._endpointer is None or self._voiced * _FRAME_S < self.settings.min_speech_s:
            return False
        self._is_asked = True
        now = frame + 1 - self._first
        return self._endpointer.is_over(self._frames[max(0, now - self._context) : now].reshape(-1))

    def _goes_on(self, frame: int) -> None:
        """There is speech in that frame: give the endpointer the length of the pause before it."""
        if self._endpointer is not None and self._is_asked:
            self._endpointer.went_on((frame - self._last_voiced - 1) * _FRAME_S)
            self._is_asked = False

    def _split(self, frame: int) -> Iterator[Segment]:
        """End a segment that has grown too long at the quietest moment of its second half."""
        assert self._started is not None
        middle = self._started + (frame - self._started) // 2
        scores = self._scores[middle - self._first : frame - self._first]
        # A little smoothing, so that one odd frame inside a word is not taken for a pause.
        cut = middle + int(np.convolve(scores, np.ones(3) / 3, mode="same").argmin())
        # After a cut through running speech, padding would repeat the next segment's words.
        yield from self._close(cut + 1, now=cut + 1)
        rest = self._scores[cut + 1 - self._first : frame + 1 - self._first]
        voiced = np.flatnonzero(rest >= self.settings.threshold)
        if len(voiced):
            self._started = cut + 1 + int(voiced[0])
            self._voiced = len(voiced)
            audible = np.flatnonzero(rest >= self.settings.threshold_off)
            self._last_voiced = cut + 1 + int(audible[-1])

    def _close(self, end: int, *, now: int) -> Iterator[Segment]:
        """Emit the running segment up to (not including) frame `end`, with padding up to `now`."""
        assert self._started is not None
        started, voiced = self._started, self._voiced
        self._started = None
        if voiced * _FRAME_S < self.settings.min_speech_s:
            self._taken = max(self._taken, end if now == end else 0)
            return
        high = min(now, end + self._pad)
        yield self._segment(started, end, high)
        self._taken = high

    def _segment(self, started: int, end: int, high: int) -> Segment:
        """Speech from frame `started` to `end`, with its padding up to `high`."""
        low = max(self._first, self._taken, started - self._before)
        samples = self._frames[low - self._first : high - self._first].reshape(-1)
        # Models, too, take speech for what it is if it is loud enough.
        audible = brought_up(samples.copy())
        return Segment(started * _FRAME_S, end * _FRAME_S, audible, low * _FRAME_S)

    def _forget(self) -> None:
        """Drop frames that no segment can need any more."""
        now = self._first + len(self._frames)
        start = now if self._started is None else self._started
        keep = max(self._first, min(start - self._before, now - self._context))
        drop = keep - self._first
        self._frames, self._scores = self._frames[drop:].copy(), self._scores[drop:].copy()
        self._first = keep


class TurnJoiner:
    """Joins pieces of speech over the pauses of a turn, to windows of up to `window_s`.

    A model that has the context of a word makes fewer errors than one that is given
    sentence by sentence. Of a long pause only a part is kept, as it would take room that speech can
    use. A window that is full is cut at the widest pause of its second half. Where somebody waits
    for the text, it is closed at the first pause after `close_s` instead, and once what is being
    spoken behind it has no room in it.
    """

    def __init__(self, settings: SegmenterSettings, window_s: float, *, close_s: float = math.inf):
        self._settings, self._window_s, self._close_s = settings, window_s, close_s
        self._pieces: list[Segment] = []
        self._closed: list[Segment] = []  # the last ones

    @property
    def start(self) -> float | None:
        """Where the running window starts, in seconds; None if there is none."""
        return self._pieces[0].start if self._pieces else None

    def with_before(self, piece: Segment) -> Segment:
        """The window that a piece would end: it, and as much of its turn before it as fits; of a
        turn that has hardly begun, also the end of the one before.
        """
        goes_on = bool(self._pieces) and self._goes_on(piece.start)
        joined = [*self._pieces, piece] if goes_on else [piece]
        earlier = self._closed if goes_on else [*self._closed, *self._pieces]
        while len(joined) > 1 and self._length_s(joined) > self._window_s:
            joined, earlier = joined[1:], []
        for before in reversed(earlier):
            longer = [before, *joined]
            is_near = joined[0].start - before.end <= self._settings.join_s
            if not is_near or self._length_s(longer) > _BEFORE_SHARE * self._window_s:
                break
            joined = longer
        return self._joined(joined)

    def add(self, piece: Segment) -> Iterator[Segment]:
        """Take the next piece; yields windows that ended before it or with it."""
        if self._pieces and not self._goes_on(piece.start):
            yield self._close(len(self._pieces))
        self._pieces.append(piece)
        while self._length_s(self._pieces) > self._window_s and len(self._pieces) > 1:
            yield self._close(self._best_cut())
        if self._length_s(self._pieces) >= self._close_s:
            yield self._close(len(self._pieces))

    def wait_until(self, at: float) -> Iterator[Segment]:
        """No other piece starts before that time; yields the window if its turn is over by then."""
        if self._pieces and not self._goes_on(at):
            yield self._close(len(self._pieces))

    def go_on(self, running: Segment) -> Iterator[Segment]:
        """So much of the next piece has been spoken; yields the window if it has no room for it."""
        if self._pieces and self._length_s([*self._pieces, running]) > self._window_s:
            yield self._close(len(self._pieces))

    def finish(self) -> Iterator[Segment]:
        """No other piece follows; yields what was still running."""
        if self._pieces:
            yield self._close(len(self._pieces))

    def _goes_on(self, at: float) -> bool:
        """Whether speech that starts at that time belongs to the running turn."""
        settings = self._settings
        spoken = sum(piece.end - piece.start for piece in self._pieces)
        longest = max(settings.join_least_s, settings.join_share * spoken)
        return at - self._pieces[-1].end <= min(longest, settings.join_s)

    def _best_cut(self) -> int:
        """How many pieces the window takes of more than it has room for."""
        pieces = self._pieces
        fits = [n for n in range(1, len(pieces)) if self._length_s(pieces[:n]) <= self._window_s]
        full = [n for n in fits if self._length_s(pieces[:n]) > self._window_s / 2] or fits[-1:]
        return max(full, key=lambda n: (pieces[n].start - pieces[n - 1].end, n))

    def _length_s(self, pieces: Sequence[Segment]) -> float:
        return sum(len(samples) for samples in self._audio(pieces)) / SAMPLE_RATE

    def _audio(self, pieces: Sequence[Segment]) -> list[np.ndarray]:
        """The samples of each piece, without what is left out of the pauses before them."""
        audio = [pieces[0].samples]
        for before, piece in pairwise(pieces):
            behind = before.samples_start + len(before.samples) / SAMPLE_RATE - before.end
            lead = piece.start - piece.samples_start
            left_out = min(lead, max(0.0, behind + lead - self._settings.kept_pause_s))
            audio.append(piece.samples[round(left_out * SAMPLE_RATE) :])
        return audio

    def _close(self, count: int) -> Segment:
        chosen, self._pieces = self._pieces[:count], self._pieces[count:]
        self._closed = [*self._closed, *chosen]
        while len(self._closed) > 1 and self._length_s(self._closed) > self._window_s:
            del self._closed[0]
        return self._joined(chosen)

    def _joined(self, chosen: Sequence[Segment]) -> Segment:
        audio, pieces, offset = self._audio(chosen), [], 0
        for piece, samples in zip(chosen, audio, strict=True):
            left_out = (len(piece.samples) - len(samples)) / SAMPLE_RATE
            begins = piece.samples_start + left_out
            pieces.append(Piece(offset / SAMPLE_RATE, begins, piece.start, piece.end))
            offset += len(samples)
        return _window(pieces, np.concatenate(audio))


class WindowSegmenter:
    """Turns audio blocks of any size into windows of speech, as each ends; see `TurnJoiner`."""

    def __init__(self, settings: SegmenterSettings, window_s: float):
        self._segmenter = Segmenter(
            replace(settings, pause_s=settings.piece_pause_s, max_segment_s=window_s)
        )
        self._turns = TurnJoiner(settings, window_s)

    def feed(self, samples: np.ndarray) -> Iterator[Segment]:
        """Take the next samples of the stream; yields windows that ended in them."""
        for piece in self._segmenter.feed(samples):
            yield from self._turns.add(piece)
        if self._segmenter.is_idle:
            yield from self._turns.wait_until(self.scored_s)

    @property
    def is_idle(self) -> bool:
        """Whether nobody speaks, and no window waits for what follows."""
        return self._segmenter.is_idle and self._turns.start is None

    @property
    def scored_s(self) -> float:
        """See `Segmenter.scored_s`."""
        return self._segmenter.scored_s

    @property
    def running_s(self) -> float | None:
        """Where the speech starts that is in no window yet, in seconds; None without speech."""
        start = self._turns.start
        return self._segmenter.running_s if start is None else start

    def finish(self) -> Iterator[Segment]:
        """The stream is over; yields what was still running."""
        for piece in self._segmenter.finish():
            yield from self._turns.add(piece)
        yield from self._turns.finish()
