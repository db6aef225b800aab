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
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmtransfer.audio import decode_clip
from mmtransfer.end_of_turn import (
    FRAME_S,
    EndOfTurn,
    Pause,
    TurnSettings,
    find_pauses,
    frames_of,
    outcome,
)
from mmtransfer.monitoring import LiveSettings
from mmtransfer.progress import track
from mmtransfer.recognizers import open_recognizer
from mmtransfer.voice_activity import FRAME

Scored = tuple[int, Pause, dict[float, float]]
"""Number of its minute, and the head's probability at each step."""


def scored(judge: EndOfTurn, path: Path, number: int) -> list[Scored]:
    """The pauses of a recording."""
    samples, found = decode_clip(path), []
    for pause in track(list(find_pauses(samples)), path.name):
        steps = [at for at in judge.steps_s if pause.frames >= frames_of(at)]
        heard = {at: samples[: (pause.start + frames_of(at)) * FRAME] for at in steps}
        probabilities = {at: judge.probability(clip) for at, clip in heard.items()}
        found.append((10_000 * number + int(pause.start * FRAME_S / 60), pause, probabilities))
    return found


def dealt(pauses: list[Scored], steps: tuple[float, ...]) -> list[Scored]:
    """The same with the probabilities of each step in another order."""
    rng = np.random.default_rng(0)
    others = [(minute, pause, dict(own)) for minute, pause, own in pauses]
    for at in steps:
        having = [own for _, _, own in others if at in own]
        values = rng.permutation([own[at] for own in having])
        for own, value in zip(having, values, strict=True):
            own[at] = float(value)
    return others


def describe(name: str, pauses: list[Scored], rule: TurnSettings) -> None:
    """Print what a rule does."""
    minutes: dict[int, list[tuple[Pause, dict[float, float]]]] = {}
    for minute, pause, own in pauses:
        minutes.setdefault(minute, []).append((pause, own))
    parts = [outcome(own, rule) for own in minutes.values()]
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(parts), len(parts)) for _ in range(2000)]

    def interval(arrays: list[np.ndarray], statistic: Callable[[np.ndarray], float]) -> str:
        drawn = [np.concatenate([arrays[i] for i in draw]) for draw in draws]
        low, high = np.quantile([statistic(one) for one in drawn if len(one)], [0.025, 0.975])
        return f"{statistic(np.concatenate(arrays)):.3f} [{low:.3f}, {high:.3f}]"

    cut = interval([part.cut_short for part in parts], lambda x: float(x.mean()))
    delays = np.concatenate([part.delays_s for part in parts])
    print(f"  {name:12} cut short {cut}", end="")
    if len(delays):
        middle = interval([part.delays_s for part in parts], lambda x: float(np.median(x)))
        print(
            f"; delay p50 {middle} s, mean {delays.mean():.3f} s, "
            f"p95 {np.quantile(delays, 0.95):.3f} s",
            end="",
        )
    print()


def main() -> None:
    """Measure on all recordings together, and on each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("recordings", nargs="+", type=Path)
    arguments = parser.parse_args()
    judge = open_recognizer(arguments.model).end_of_turn
    if judge is None:
        sys.exit(f"{arguments.model} has no learned end of turn")
    fixed = replace(judge.settings, steps=(), longest_s=LiveSettings().pause_s)
    found = {p: scored(judge, p, n) for n, p in enumerate(arguments.recordings)}
    together = [pause for own in found.values() for pause in own]
    for name, pauses in [("all", together), *[(path.name, own) for path, own in found.items()]]:
        ends = sum(pause.is_end() for _, pause, _ in pauses)
        print(f"{name}: {len(pauses)} pauses, {ends} of them ends")
        if ends < len(pauses):
            describe("fixed pause", pauses, fixed)
            describe("head", pauses, judge.settings)
            describe("chance", dealt(pauses, judge.steps_s), judge.settings)


if __name__ == "__main__":
    main()
