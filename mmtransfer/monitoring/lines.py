"""A window's text as lines that can be followed while the recording plays.

Subtitling practice puts one sentence or clause on the screen at a time, on at most two lines of 42
characters, for at most seven seconds (BBC subtitle guidelines; Netflix timed text style guide).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rapidfuzz.distance import Levenshtein

from mmtransfer.speech.engine import Hypothesis, Word, word_logprob
from mmtransfer.speech.segments import Segment

_SENTENCE_END = (".", "?", "!", "…", "。", "？", "！")
_CLAUSE_END = (",", ";", ":", "、", "，", "；", "：")
_CLOSING = "\"'”’)]»」』"
_ROW = 42  # characters
_FAR_S = 1.0  # between a word and where the same word was before; times of attention are that bad
_SHORTEST_S = 0.1  # a frame or two of video
_CLAUSE_WORTH = 0.3  # of a line's length, by which it may be cut off its middle


@dataclass(frozen=True)
class LineSettings:
    """How long a line may be."""

    longest_s: float = 7.0
    """Seconds from its first word to the end of its last."""
    characters: int = 84
    """Two lines of 42 characters on the screen."""
    pause_s: float = 0.8
    """A pause this long between two words ends a line."""


@dataclass(frozen=True)
class Line:
    """A line of text and when it is spoken."""

    start: float
    """Seconds in the stream."""
    end: float
    text: str
    words: tuple[Word, ...] = ()
    """Its words with the stream's times, where they are known."""


def split_lines(
    hypothesis: Hypothesis, segment: Segment, settings: LineSettings | None = None
) -> list[Line]:
    """The lines of a segment's text, in order; one where the times of its words are not known.

    The first begins where the segment's speech starts, the last ends where it ends.
    """
    settings = settings or LineSettings()
    words = _in_stream(hypothesis.words, segment)
    texts = _spans(hypothesis.text, [word.text for word in words])
    if not texts:
        return [Line(segment.start, segment.end, hypothesis.text, words)]
    bounds = [0]
    for number, word in enumerate(words):
        is_last = number + 1 == len(words)
        pause = 0.0 if is_last else words[number + 1].start_s - word.end_s
        ends = word.text.rstrip(_CLOSING).endswith(_SENTENCE_END)
        if is_last or ends or pause >= settings.pause_s:
            bounds += _breaks(words, texts, bounds[-1], number + 1, settings)
    lines = [
        Line(
            words[first].start_s,
            words[stop - 1].end_s,
            "".join(texts[first:stop]).strip(),
            words[first:stop],
        )
        for first, stop in pairwise(bounds)
    ]
    lines[0] = replace(lines[0], start=segment.start)
    lines[-1] = replace(lines[-1], end=segment.end)
    return _seen(lines)


def _seen(lines: Sequence[Line]) -> list[Line]:
    """Lines that last long enough for a player to show them, since word alignment gives some words
    no time: what a line lacks the one after it begins later; at the end the one before ends sooner.
    """
    first, last = lines[0].start, lines[-1].end
    shortest = min(_SHORTEST_S, (last - first) / len(lines))
    found, at = list[Line](), first
    for number, line in enumerate(lines):
        start = min(max(line.start, at), last - shortest * (len(lines) - number))
        left = last - shortest * (len(lines) - number - 1)
        at = min(max(line.end, start + shortest), left)
        found.append(replace(line, start=start, end=at))
    return found


def split_pieces(
    hypothesis: Hypothesis,
    segment: Segment,
    settings: LineSettings | None = None,
    known: Sequence[Sequence[Line]] = (),
) -> list[list[Line]]:
    """The lines of each piece of a window; nothing where the times of the words are not known.

    `known` are the lines that each piece had when it was decoded alone. Its lines are as many
    then, and words stay in the line in which they were, as far as the texts agree; times of words
    alone, which are not that exact, would move some over the edges of lines that did not change. A
    piece without known lines gets new ones.
    """
    settings = settings or LineSettings()
    texts = _spans(hypothesis.text, [word.text for word in hypothesis.words])
    if not texts or not segment.pieces:
        return []
    words = _in_stream(hypothesis.words, segment)
    slots, places = _placed(words, segment, known)
    found: list[list[Line]] = [[] for _ in segment.pieces]
    for place, (number, line) in enumerate(slots):
        own = [index for index, at in enumerate(places) if at == place]
        text = "".join(texts[index] for index in own).strip()
        if line is not None:
            part = tuple(words[index] for index in own)
            found[number].append(Line(line.start, line.end, text, part))
        elif text:
            piece = segment.pieces[number]
            part = tuple(hypothesis.words[index] for index in own)
            alone = replace(hypothesis, text=text, words=part)
            bounds = replace(segment, start=piece.start, end=piece.end)
            found[number] = split_lines(alone, bounds, settings)
    return found


def last_piece(
    hypothesis: Hypothesis, window: Segment, segment: Segment, known: Sequence[Sequence[Line]] = ()
) -> Hypothesis:
    """Of a window's hypothesis the part that is of its last piece, as one of that segment alone;
    without text where the times of the words are not known. `known` are the lines of the pieces
    before it.
    """
    texts = _spans(hypothesis.text, [word.text for word in hypothesis.words])
    own: list[int] = []
    if texts:
        others = [*known][: len(window.pieces) - 1]
        slots, places = _placed(_in_stream(hypothesis.words, window), window, others)
        own = [index for index, place in enumerate(places) if place == len(slots) - 1]
    piece = window.pieces[-1]
    # The window may have left out some of the silence before it.
    moved_s = piece.samples_start - segment.samples_start - piece.offset_s
    words = tuple(
        replace(
            word,
            start_s=round(max(0.0, word.start_s + moved_s), 2),
            end_s=round(max(0.0, word.end_s + moved_s), 2),
        )
        for word in (hypothesis.words[index] for index in own)
    )
    text = "".join(texts[index] for index in own).strip()
    return replace(hypothesis, text=text, tokens=(), words=words, avg_logprob=word_logprob(words))


def _placed(
    words: Sequence[Word], window: Segment, known: Sequence[Sequence[Line]]
) -> tuple[list[tuple[int, Line | None]], list[int]]:
    """Where words with the stream's times belong: the places there are, each a piece and its known
    line, if it has one, and the number of each word's place.
    """
    slots: list[tuple[int, Line | None]] = []
    for number, _ in enumerate(window.pieces):
        lines = known[number] if number < len(known) else ()
        slots += [(number, line) for line in lines] or [(number, None)]
    owners = [line or window.pieces[number] for number, line in slots]
    spans = [(owner.start, owner.end) for owner in owners]
    return slots, _agreed_places(words, [line.text if line else "" for _, line in slots], spans)


def _agreed_places(
    words: Sequence[Word], before: Sequence[str], spans: Sequence[tuple[float, float]]
) -> list[int]:
    """For each word the number of the text that it belongs to, in order.

    `before` are the texts as they were, each spoken in its span: a word of which at least half the
    letters are aligned with letters of a text (Levenshtein) belongs to that, another one, between
    these, to the one in whose span most of it is spoken. (Attention leaves a word at a pause in
    the pause with one end, so neither its start nor its middle says where it belongs.)
    """
    letters = [(letter, n) for n, text in enumerate(before) for letter in _letters(text)]
    spelled = [(letter, n) for n, word in enumerate(words) for letter in _letters(word.text)]
    votes: list[Counter[int]] = [Counter() for _ in words]
    old, new = ("".join(letter for letter, _ in side) for side in (letters, spelled))
    for step in Levenshtein.opcodes(old, new) if old and new else ():
        for at in range(step.dest_end - step.dest_start if step.tag == "equal" else 0):
            votes[spelled[step.dest_start + at][1]][letters[step.src_start + at][1]] += 1
    by_time = [_place(word, spans) for word in words]
    agreed: list[int | None] = []
    for word, vote, timed in zip(words, votes, by_time, strict=True):
        (line, count), *_ = vote.most_common(1) or [(0, 0)]
        is_aligned = count and 2 * count >= len(_letters(word.text))
        is_new = not before[timed] and _shared(word, spans[line]) < -_FAR_S
        agreed.append(line if is_aligned and not is_new else None)
    places, lowest = [], 0
    for number, known in enumerate(agreed):
        if known is None:
            behind = (line for line in agreed[number + 1 :] if line is not None)
            known = min(by_time[number], next(behind, len(before) - 1))
        lowest = max(lowest, known)
        places.append(lowest)
    return places


def _place(word: Word, spans: Sequence[tuple[float, float]]) -> int:
    """The span that most of a word is in; between two of them, the nearer one."""
    return max(range(len(spans)), key=lambda place: _shared(word, spans[place]))


def _shared(word: Word, span: tuple[float, float]) -> float:
    """Seconds of a word in the span; less than 0 if it is so far from it."""
    return min(word.end_s, span[1]) - max(word.start_s, span[0])


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def rows(text: str) -> list[str]:
    """A line as it is put on the screen: on two rows where it is longer than one, of about the same
    length, rather cut behind a clause; between characters where there are no spaces.
    """
    if len(text) <= _ROW:
        return [text]
    places = [at for at, character in enumerate(text) if character == " "]
    places = places or list(range(1, len(text)))

    def badness(at: int) -> tuple[bool, float]:
        above, below = text[:at].rstrip(), text[at:].lstrip()
        uneven = abs(len(above) - len(below)) / len(text)
        clause = above.endswith((*_CLAUSE_END, *_SENTENCE_END))
        return max(len(above), len(below)) > _ROW, uneven - _CLAUSE_WORTH * clause

    at = min(places, key=badness)
    return [text[:at].rstrip(), text[at:].lstrip()]


def text_ends_at(hypothesis: Hypothesis, segment: Segment) -> int:
    """How many pieces of a window have been transcribed: a decoder that takes a pause for the end
    leaves out what follows. All of them where the times of the words are not known.
    """
    if not hypothesis.words:
        return len(segment.pieces)
    latest = max(word.start_s for word in hypothesis.words)
    return sum(piece.offset_s <= latest for piece in segment.pieces)


def longest_word_s(hypothesis: Hypothesis, segment: Segment) -> float:
    """How many seconds of a window's speech are in one word; 0 where the times of the words are not
    known, or it is one piece.
    """
    begins = [piece.offset_s - piece.samples_start for piece in segment.pieces]
    spans = [(at + p.start, at + p.end) for at, p in zip(begins, segment.pieces, strict=True)]
    times = (sum(max(0.0, _shared(word, span)) for span in spans) for word in hypothesis.words)
    return max(times, default=0.0)


def _breaks(
    words: Sequence[Word], texts: Sequence[str], first: int, stop: int, settings: LineSettings
) -> list[int]:
    """Numbers of the words behind the lines of a sentence: as few lines as it takes, each cut near
    the middle of what is left, rather behind a clause or at a pause.
    """
    length = len("".join(texts[first:stop]).strip())
    seconds = words[stop - 1].end_s - words[first].start_s
    if stop - first < 2 or (length <= settings.characters and seconds <= settings.longest_s):
        return [stop]

    def badness(place: int) -> float:
        uneven = abs(2 * len("".join(texts[first:place])) - length) / length
        pause = words[place].start_s - words[place - 1].end_s
        clause = words[place - 1].text.endswith(_CLAUSE_END)
        return uneven - _CLAUSE_WORTH * clause - min(pause, 1.0)

    place = min(range(first + 1, stop), key=badness)
    return [
        *_breaks(words, texts, first, place, settings),
        *_breaks(words, texts, place, stop, settings),
    ]


def _in_stream(words: Sequence[Word], segment: Segment) -> tuple[Word, ...]:
    """Words on the stream's time line, in order. A word ends where the next begins, unless the
    speech of its piece ends before.
    """
    found: list[Word] = []
    latest = segment.start
    for word in words:
        start = max(latest, min(segment.time_at(word.start_s), segment.end))
        end = max(start, min(segment.time_at(word.end_s), segment.end))
        for piece in segment.pieces:
            if piece.start <= start < piece.end:
                end = min(end, piece.end)
        found.append(Word(word.text, round(start, 2), round(end, 2), word.probability))
        latest = start
    return tuple(found)


def _spans(text: str, words: Sequence[str]) -> list[str]:
    """The text in as many parts as there are words, each up to where the next word begins; nothing
    where the words are not those of the text.
    """
    starts, at = [], 0
    for word in words:
        at = text.find(word, at)
        if at < 0:
            return []
        starts.append(at)
        at += len(word)
    if not starts:
        return []
    bounds = [0, *starts[1:], len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]
