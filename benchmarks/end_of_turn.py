r"""The learned end of turn against a fixed pause, in the pauses of recordings.

    python benchmarks/end_of_turn.py bundled:whisper-tiny.en interviews/*.flac

A pause is at least 0.2 s without speech by voice activity; it is an end if no speech follows within
a second, else the speaker goes on. Cut short is the share of the latter in which a rule declares an
end; the delay is the silence before it declares a true one. `chance` is the head's rule with its
probabilities dealt out at random: what thresholds gain that know nothing. Intervals are 95 %
bootstrap over minutes of the recordings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.progress import track
from mmtransfer.speech.audio import decode_clip
from mmtransfer.speech.end_of_turn import (
    FIXED_S,
    FRAME_S,
    PAUSE_S,
    EndOfTurn,
    Pause,
    find_pauses,
    frames_of,
)
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.voice_activity import FRAME


@dataclass(frozen=True)
class Scored:
    """A pause with what a head says in it."""

    minute: int
    pause: Pause
    probability: float


def scored(head: EndOfTurn, path: Path, number: int) -> list[Scored]:
    """The pauses of a recording."""
    samples, found = decode_clip(path), []
    for pause in track(list(find_pauses(samples)), path.name):
        now = (pause.start + frames_of(PAUSE_S)) * FRAME
        minute = 10_000 * number + int(pause.start * FRAME_S / 60)
        found.append(Scored(minute, pause, head.probability(samples[:now])))
    return found


def learned_s(head: EndOfTurn, pauses: list[Scored]) -> list[float]:
    """Seconds of silence after which the head ends each turn, one pause after the other."""
    endpointer, found = head.endpointer(), []
    for one in pauses:
        found.append(
            endpointer.ask_s if endpointer.decide(one.probability) else endpointer.longest_s
        )
        endpointer.went_on(one.pause.frames * FRAME_S)
    return found


def dealt(pauses: list[Scored]) -> list[Scored]:
    """The same with the probabilities in another order."""
    order = np.random.default_rng(0).permutation(len(pauses))
    return [
        replace(one, probability=pauses[other].probability)
        for one, other in zip(pauses, order, strict=True)
    ]


def describe(name: str, pauses: list[Scored], waits_s: list[float]) -> None:
    """Print what a rule does."""
    minutes: dict[int, tuple[list[bool], list[float]]] = {}
    for one, wait_s in zip(pauses, waits_s, strict=True):
        cut, delays = minutes.setdefault(one.minute, ([], []))
        if one.pause.is_end():
            delays.append(frames_of(wait_s) * FRAME_S)
        else:
            cut.append(one.pause.frames >= frames_of(wait_s))
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(minutes), len(minutes)) for _ in range(2000)]

    def interval(lists: list[list[Any]], statistic: Callable[[np.ndarray], Any]) -> str:
        arrays = [np.array(own, float) for own in lists]
        drawn = [np.concatenate([arrays[i] for i in draw]) for draw in draws]
        low, high = np.quantile([statistic(one) for one in drawn if len(one)], [0.025, 0.975])
        return f"{statistic(np.concatenate(arrays)):.3f} [{low:.3f}, {high:.3f}]"

    text = f"  {name:12} cut short {interval([cut for cut, _ in minutes.values()], np.mean)}"
    every = np.concatenate([own for _, own in minutes.values()])
    if len(every):
        text += f"; delay p50 {interval([own for _, own in minutes.values()], np.median)} s, "
        text += f"mean {every.mean():.3f} s, p95 {np.quantile(every, 0.95):.3f} s"
    print(text)


def main() -> None:
    """Measure on all recordings together, and on each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("recordings", nargs="+", type=Path)
    arguments = parser.parse_args()
    head = open_recognizer(arguments.model).end_of_turn
    if head is None:
        sys.exit(f"{arguments.model} has no learned end of turn")
    found = {p.name: scored(head, p, n) for n, p in enumerate(arguments.recordings)}
    others = {name: dealt(own) for name, own in found.items()}
    for names in [list(found), *[[name] for name in found]]:
        pauses = [one for name in names for one in found[name]]
        ends = sum(one.pause.is_end() for one in pauses)
        print(f"{names[0] if len(names) == 1 else 'all'}: {len(pauses)} pauses, {ends} ends")
        if ends == len(pauses):
            continue
        waits = [wait for name in names for wait in learned_s(head, found[name])]
        by_chance = [wait for name in names for wait in learned_s(head, others[name])]
        describe("fixed pause", pauses, [FIXED_S] * len(pauses))
        describe("head", pauses, waits)
        describe("chance", pauses, by_chance)


if __name__ == "__main__":
    main()
