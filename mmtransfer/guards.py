"""Guards against text where nobody spoke, and against a decoder caught in a loop."""

from __future__ import annotations

import re

from mmtransfer.decoding import Hypothesis

NO_SPEECH_PROB = 0.6
NO_SPEECH_LOGPROB = -1.0
MIN_LOGPROB = -1.5
SHORT_S = 1.0
SHORT_MIN_LOGPROB = -0.8
MAX_COMPRESSION_RATIO = 2.4
MAX_REPEATS = 4
_WORD = re.compile(r"\w+", re.UNICODE)


def is_looping(hypothesis: Hypothesis) -> bool:
    """Whether the text repeats itself as only a decoder caught in a loop does.

    True when its compression ratio is above 2.4 (Radford et al. 2022, section 4.5), when a phrase
    of one to eight words comes more than four times in a row, or when it never ended.
    """
    if not hypothesis.finished or hypothesis.compression_ratio > MAX_COMPRESSION_RATIO:
        return True
    words = _WORD.findall(hypothesis.text.lower())
    if len(words) == 1 and len(words[0]) > MAX_REPEATS:  # languages without spaces
        words = list(words[0])
    for length in range(1, 9):
        repeats = 1
        for start in range(length, len(words) - length + 1, 1):
            # Consecutive equal phrases: each word equals the one a phrase earlier.
            if words[start : start + length] == words[start - length : start]:
                repeats = _run_length(words, start - length, length)
                if repeats > MAX_REPEATS:
                    return True
    return False


def _run_length(words: list[str], start: int, length: int) -> int:
    phrase, count = words[start : start + length], 0
    while words[start + count * length : start + (count + 1) * length] == phrase:
        count += 1
    return count


def rejection(hypothesis: Hypothesis, speech_s: float) -> str | None:
    """Why the text of `speech_s` seconds of speech is not to be believed, or None.

    - `empty`: nothing was recognised, or only symbols.
    - `no speech`: the model holds the segment for silence and is unsure of its words.
    - `improbable`: the words are unlikely even to the model. Under a second of "speech" is often
      a sneeze or a bark, so it needs better evidence than a sentence does.
    - `looping`: see `is_looping`.
    """
    if not _WORD.search(hypothesis.text):
        return "empty"
    unsure = hypothesis.avg_logprob < NO_SPEECH_LOGPROB
    if hypothesis.no_speech_prob > NO_SPEECH_PROB and unsure:
        return "no speech"
    if hypothesis.avg_logprob < (SHORT_MIN_LOGPROB if speech_s < SHORT_S else MIN_LOGPROB):
        return "improbable"
    if is_looping(hypothesis):
        return "looping"
    return None
