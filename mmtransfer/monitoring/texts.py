"""Lines of text out of what was recognised: their ids, their revisions, the keywords in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mmtransfer.monitoring.events import Alert, NoText, Transcript, line_id
from mmtransfer.monitoring.keywords import Keywords, Match
from mmtransfer.monitoring.lines import Line
from mmtransfer.speech.engine import Hypothesis, Word

_SPOKEN = re.compile(r"\w+(?:['’]\w+)*")
_SAME_ALERT_S = 1.0  # a word may move into the line before or behind


def transcripts(
    source: str,
    camera: str,
    identity: str,
    hypothesis: Hypothesis,
    lines: Sequence[Line],
    *,
    with_words: bool = False,
) -> list[Transcript]:
    """A segment's lines of text, with the scores of the whole."""
    return [
        Transcript(
            source=source,
            camera=camera,
            id=line_id(identity, number),
            start=round(line.start, 3),
            end=round(line.end, 3),
            text=line.text,
            avg_logprob=round(hypothesis.avg_logprob, 4),
            no_speech_prob=round(hypothesis.no_speech_prob, 4),
            compression_ratio=round(hypothesis.compression_ratio, 3),
            context_s=hypothesis.context_s,
            language=hypothesis.language,
            words=[_word(word) for word in line.words] if with_words and line.words else None,
        )
        for number, line in enumerate(lines)
    ]


def revised(lines: Sequence[Transcript], found: Sequence[Transcript]) -> list[Transcript]:
    """The lines of a segment that read differently in `found`, with ids of the first; those that
    `found` has no text for are empty. Case and punctuation alone make no difference.
    """
    if _spoken(lines) == _spoken(found):
        return []
    changed = [
        replace(new, id=old.id, revision=old.revision + 1)
        for old, new in zip(lines, found, strict=False)
        if _spoken([old]) != _spoken([new])
    ]
    more = [replace(new, revision=1) for new in found[len(lines) :]]
    gone = [
        replace(old, text="", words=None, revision=old.revision + 1) for old in lines[len(found) :]
    ]
    return [*changed, *more, *gone]


def _spoken(lines: Iterable[Transcript]) -> list[str]:
    return _SPOKEN.findall(" ".join(line.text for line in lines).casefold())


def _word(word: Word) -> dict[str, Any]:
    return {
        "text": word.text,
        "start": word.start_s,
        "end": word.end_s,
        "probability": word.probability,
    }


def alerts(found: Sequence[Transcript | NoText], keywords: Keywords) -> list[Alert]:
    """The keywords in a segment's lines, those that begin in one line and end in the next, and
    those in what was rejected.
    """
    lines = [line for line in found if isinstance(line, Transcript)]
    matched: list[tuple[Transcript | NoText, list[Match]]] = [
        *zip(lines, _matches(lines, keywords), strict=True)
    ]
    matched += [(line, keywords.find(line.text)) for line in found if isinstance(line, NoText)]
    return [
        Alert(
            line.camera,
            match.keyword,
            match.matched,
            match.score,
            line.id,
            line.start,
            line.end,
            line.text,
            rejected=line.reason if isinstance(line, NoText) else "",
        )
        for line, matches in matched
        for match in matches
    ]


def new_alerts(
    lines: Sequence[Transcript], before: Sequence[Transcript], keywords: Keywords
) -> list[Alert]:
    """The keywords in a turn's lines that were in none of the lines at that time before."""
    known = alerts(before, keywords)
    return [
        alert
        for alert in alerts(lines, keywords)
        if not any(
            other.keyword == alert.keyword
            and other.start <= alert.end + _SAME_ALERT_S
            and alert.start <= other.end + _SAME_ALERT_S
            for other in known
        )
    ]


def _matches(lines: Sequence[Transcript], keywords: Keywords) -> list[list[Match]]:
    own = [keywords.find(line.text) for line in lines]
    for number, (line, after) in enumerate(pairwise(lines)):
        known = {match.keyword for match in (*own[number], *own[number + 1])}
        both = keywords.find(f"{line.text} {after.text}")
        own[number] += [match for match in both if match.keyword not in known]
    return own
