"""Guards against text where nobody spoke, and against a decoder caught in a loop.

A person repeats words as well. So repetition is a reason to decode again; what several decodings
agree on, and the duration can hold, is text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rapidfuzz.distance import LCSseq

from mmtransfer.data.words import split_words, spoken_syllables, word_spans
from mmtransfer.speech.engine import Hypothesis, Word

NO_SPEECH_PROB = 0.6
NO_SPEECH_LOGPROB = -1.0
MIN_LOGPROB = -1.5
SHORT_S = 1.0
SHORT_MIN_LOGPROB = -0.8
MAX_COMPRESSION_RATIO = 2.4
MAX_REPEATS = 4
LOOPING = "looping"
"""The objection to repetition, the only one that other decodings can overrule."""
_LONGEST_PHRASE = 8
_REPEATED_RATE = 5.0  # syllables a second; few keep repeating a word faster (diadochokinesis)
_RATE = 9.0  # of other speech, which is hardly ever faster
_TWICE_RATE = 7.0  # of a sentence that is spoken and comes twice; once it has half of that
_TWICE_WORDS = 4
_SLACK_S = 0.3  # by which voice activity may miss the ends of speech
_SAME_COUNT = 1.25  # of repetitions, and one more
_SAME_PHRASE = 0.8  # of two readings of a phrase, letter by letter
_AGREED = 0.5  # share of the words beside a repeated phrase that another decoding has as well
_AGREED_ALONE = 0.8  # the same where nothing can be told apart as repeated


@dataclass(frozen=True)
class _Run:
    """A phrase that comes several times in a row."""

    phrase: list[str]
    count: int
    start: int
    """Number of its first word."""

    def at(self, count: int) -> int:
        """Number of the word behind so many repetitions."""
        return self.start + count * len(self.phrase)

    @property
    def stop(self) -> int:
        return self.at(self.count)


def is_looping(hypothesis: Hypothesis, speech_s: float = math.inf) -> bool:
    """Whether the text of `speech_s` seconds repeats itself as a decoder caught in a loop does, and
    as some people do.

    True when its compression ratio is above 2.4 (Radford et al. 2022, section 4.5), when a phrase
    of one to eight words comes more than four times in a row, when a longer one comes twice in the
    time of one, or when it never ended.
    """
    if not hypothesis.finished or hypothesis.compression_ratio > MAX_COMPRESSION_RATIO:
        return True
    words = split_words(hypothesis.text)
    if len(words) == 1 and len(words[0]) > MAX_REPEATS:
        words = list(words[0])
    return bool(_runs(words)) or _is_doubled(hypothesis, speech_s)


def _is_doubled(hypothesis: Hypothesis, speech_s: float) -> bool:
    """Whether a phrase comes twice in a row, faster than anybody speaks, or once more in next to no
    time. Where the times of the words are not known, it has had all the time that there was.
    """
    timed = hypothesis.words or [Word(hypothesis.text, 0.0, speech_s, 1.0)]
    parts = [(part, word) for word in timed for part in split_words(word.text)]
    words = [part for part, _ in parts]
    for start in range(len(words)):
        for length in range(_TWICE_WORDS, (len(words) - start) // 2 + 1):
            middle, stop = start + length, start + 2 * length
            if words[start:middle] == words[middle:stop]:
                end_s = parts[stop - 1][1].end_s
                both_s, second_s = (end_s - parts[at][1].start_s for at in (start, middle))
                if _is_too_fast(words[start:stop], both_s, _TWICE_RATE):
                    return True
                if _is_too_fast(words[middle:stop], second_s, _RATE):
                    return True
    return False


def _is_too_fast(words: Sequence[str], seconds: float, rate: float) -> bool:
    """Whether words have more syllables than can be spoken in the time."""
    return spoken_syllables(words) > rate * (seconds + _SLACK_S)


def _runs(words: Sequence[str]) -> list[_Run]:
    """Phrases that come more than four times in a row, from first to last."""
    found, place = [], 0
    while place < len(words):
        runs = (_run(words, place, length) for length in range(1, _LONGEST_PHRASE + 1))
        run = next((run for run in runs if run.count > MAX_REPEATS), None)
        if run is not None:
            found.append(run)
        place = place + 1 if run is None else run.stop
    return found


def _run(words: Sequence[str], start: int, length: int) -> _Run:
    phrase, count = list(words[start : start + length]), 1
    while words[start + count * length : start + (count + 1) * length] == phrase:
        count += 1
    return _Run(phrase, count, start)


def rejection(hypothesis: Hypothesis, speech_s: float) -> str | None:
    """Why the text of `speech_s` seconds of speech is not to be believed by itself, or None.

    - `empty`: nothing was recognised, or only symbols.
    - `no speech`: the model holds the segment for silence and is unsure of its words.
    - `improbable`: the words are unlikely even to the model. Under a second of "speech" is often
      a sneeze or a bark, so it needs better evidence than a sentence does.
    - `too fast`: more is recognised than can be spoken in that time.
    - `looping`: see `is_looping`; other decodings may overrule it, see `agreed`.
    """
    words = split_words(hypothesis.text)
    if not words:
        return "empty"
    unsure = hypothesis.avg_logprob < NO_SPEECH_LOGPROB
    if hypothesis.no_speech_prob > NO_SPEECH_PROB and unsure:
        return "no speech"
    if hypothesis.avg_logprob < (SHORT_MIN_LOGPROB if speech_s < SHORT_S else MIN_LOGPROB):
        return "improbable"
    if is_looping(hypothesis, speech_s):
        return LOOPING
    if _is_too_fast(words, speech_s, _RATE):
        return "too fast"
    return None


def agreed(readings: Sequence[Hypothesis], speech_s: float) -> Hypothesis | None:
    """What is to be believed of several decodings of the same speech, all of them doubted and the
    last one for its repetitions; None if nothing is.

    The text is that of the last. A repeated phrase stays as often as two decodings have it, more
    or less, if so many fit into the duration, and goes otherwise; the text beside it stays where
    another decoding has most of its words.
    """
    *others, last = readings
    spans = word_spans(last.text)
    words = [word for word, _, _ in spans]
    others_words = [split_words(other.text) for other in others]
    runs = _runs(words)
    inside = {index for run in runs for index in range(run.start, run.stop)}
    beside = [word for index, word in enumerate(words) if index not in inside]
    is_cut_off = not last.finished and not (runs and runs[-1].stop == len(words))
    least = _AGREED if runs else _AGREED_ALONE
    if is_cut_off or not others or not _is_agreed(beside, others_words, least):
        return None
    left_s = speech_s + _SLACK_S - spoken_syllables(beside) / _RATE
    if left_s < 0:
        return None
    gone: list[tuple[int, int]] = []  # words of the last, from and to
    for run in runs:
        counts = [run.count, *(_count(run.phrase, other) for other in others_words)]
        kept = min(run.count, _shared(counts))
        seconds = kept * spoken_syllables(run.phrase) / _REPEATED_RATE
        if seconds > left_s:
            kept, seconds = 0, 0.0
        left_s -= seconds
        if kept < run.count:
            gone.append((run.at(kept), run.stop))
    found = _without(last, spans, gone)
    return found if split_words(found.text) else None


def _is_agreed(words: Sequence[str], others: Sequence[Sequence[str]], least: float) -> bool:
    """Whether another decoding has so many of the words, in their order."""
    if not words:
        return True
    return any(LCSseq.similarity(words, other) >= least * len(words) for other in others)


def _shared(counts: Sequence[int]) -> int:
    """The largest count of which another one is hardly more; loops have one as they come."""
    ordered = sorted(counts, reverse=True)
    pairs = pairwise(ordered)
    return next((less for more, less in pairs if more <= _SAME_COUNT * less + 1), 0)


def _count(phrase: Sequence[str], words: Sequence[str]) -> int:
    """How often a phrase, or one that is like it, comes in a row at the most."""
    length, whole = len(phrase), "".join(phrase)
    best = 0
    for start in range(len(words) - length + 1):
        run = _run(words, start, length)
        if run.count > best and LCSseq.normalized_similarity(whole, "".join(run.phrase)) >= (
            _SAME_PHRASE
        ):
            best = run.count
    return best


def _without(
    hypothesis: Hypothesis,
    spans: Sequence[tuple[str, int, int]],
    gone: Sequence[tuple[int, int]],
) -> Hypothesis:
    """A hypothesis without some of its words: those with numbers from and to."""
    text = hypothesis.text
    kept, at = [], 0
    for first, stop in gone:
        if first and spans[first - 1][0] == spans[stop - 1][0]:
            start, end = spans[first - 1][2], spans[stop - 1][2]  # signs behind the last one stay
        else:
            start, end = spans[first][1], spans[stop][1] if stop < len(spans) else len(text)
        kept.append((at, start))
        at = end
    kept.append((at, len(text)))
    return replace(
        hypothesis,
        text="".join(text[start:end] for start, end in kept).strip(),
        words=_words_in(hypothesis, kept),
    )


def _words_in(hypothesis: Hypothesis, kept: Sequence[tuple[int, int]]) -> tuple[Word, ...]:
    """The timed words that begin in some parts of the text; none if they are not those of it."""
    found, at = [], 0
    for word in hypothesis.words:
        at = hypothesis.text.find(word.text, at)
        if at < 0:
            return ()
        if any(start <= at < end for start, end in kept):
            found.append(word)
        at += len(word.text)
    return tuple(found)
