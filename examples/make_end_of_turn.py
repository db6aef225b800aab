r"""Train the head that decides at cameras whether a pause ends a turn.

    python examples/make_end_of_turn.py whisper-tiny.en --train talk/*.flac \
        --development calls/*.flac
    python benchmarks/end_of_turn.py bundled:whisper-tiny.en interviews/*.flac

No transcripts are needed: whether the speaker goes on is what the recordings themselves show. The
encoder's states are computed once and kept in the cache. The head learns on `--train`; its
thresholds are chosen on `--development`. What is written goes into
``mmtransfer/turn_ends/NAME.safetensors``. The second command measures it on recordings that are
in neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.audio import SAMPLE_RATE, decode_clip
from mmtransfer.config import HeadConfig
from mmtransfer.ctranslate2_engine import CTranslate2Whisper
from mmtransfer.end_of_turn import (
    STATES_PER_SECOND,
    Pause,
    TurnSettings,
    adapter_digest,
    find_pauses,
    frames_of,
    last_states,
    outcome,
    write_turn_head,
)
from mmtransfer.features import FeatureStore, cache_key, cached_features
from mmtransfer.heads import ClassifierHead
from mmtransfer.networks import build_head
from mmtransfer.sources import files_digest, model_digest
from mmtransfer.voice_activity import FRAME

PACKAGE = Path(__file__).resolve().parent.parent / "mmtransfer"
CONTEXT_S = 3.0
KEPT_S = 1.0  # of the encoder's states in the cache, so that heads can be compared
STEPS_S = (0.2, 0.3, 0.45, 0.6)
FIXED_S = 0.45
STATES_S = 0.2
DROPOUT, RATE, WEIGHT_DECAY, STEPS = 0.1, 0.003, 0.01, 300
SHARES = ((0.75,), *[(0, 0.5, 0.6, 0.7, 0.8, 0.9)] * 3)
"""Of the ends, what each step's threshold may let pass; 0: the step is left out. The first is well
over a half, so that the median delay is that step's with other people too."""
LONGEST_S = 0.8
MEAN = 0.8  # of the fixed rule's delay, what the mean delay may be


@dataclass(frozen=True)
class Moment:
    """A step of a pause: what the head is asked about."""

    recording: int
    pause: Pause
    frames: int
    """Of silence so far."""


class Recordings:
    """Pauses of recordings, and the encoder's states at each of their steps."""

    def __init__(self, engine: CTranslate2Whisper, model: str, paths: Sequence[Path]):
        self.paths = list(paths)
        self.pauses = [list(find_pauses(decode_clip(p))) for p in self.paths]
        self.moments = [
            Moment(number, pause, frames_of(at))
            for number, own in enumerate(self.pauses)
            for pause in own
            for at in STEPS_S
            if pause.frames >= frames_of(at)
        ]
        kept = TurnSettings(CONTEXT_S, KEPT_S, (), 0.0)
        loaded: dict[int, np.ndarray] = {}

        def states(index: int) -> np.ndarray:
            moment = self.moments[index]
            end = (moment.pause.start + moment.frames) * FRAME
            return last_states(engine.encode, loaded[moment.recording][:end], kept)

        def compute(indices: Sequence[int]) -> Iterable[tuple[int, np.ndarray]]:
            loaded.clear()
            wanted = {self.moments[index].recording for index in indices}
            loaded.update({number: decode_clip(self.paths[number]) for number in wanted})
            with ThreadPoolExecutor(engine.workers) as pool:
                yield from zip(indices, pool.map(states, indices), strict=True)

        silence = np.zeros(round(CONTEXT_S * SAMPLE_RATE), np.float32)
        values = last_states(engine.encode, silence, kept).size
        key = cache_key(
            kind="end of turn",
            model=model_digest(model),
            recordings=[files_digest([path]) for path in self.paths],
            moments=[[m.recording, m.pause.start, m.frames] for m in self.moments],
            settings=[CONTEXT_S, KEPT_S],
        )
        self.store: FeatureStore = cached_features(
            "pauses", key, [values] * len(self.moments), compute, dtype="float16"
        )

    def pooled(self, states_s: float) -> np.ndarray:
        """Mean of the last states [moment, width]."""
        count = round(states_s * STATES_PER_SECOND)
        rows = range(len(self.moments))
        return np.stack([self.store[row][-count:].astype(np.float32).mean(0) for row in rows])

    def by_pause(self, scores: np.ndarray) -> list[tuple[Pause, dict[float, float]]]:
        """Every pause and the probability at each of its steps."""
        found, rest = [], iter(scores.tolist())
        for pause in chain.from_iterable(self.pauses):
            steps = [at for at in STEPS_S if pause.frames >= frames_of(at)]
            found.append((pause, {at: next(rest) for at in steps}))
        return found


def train(features: np.ndarray, is_end: np.ndarray, seed: int = 0) -> tuple[np.ndarray, float]:
    """Weights and bias of a linear output on pooled states, its batch normalisation folded in."""
    config = HeadConfig(pooling="mean", batch_norm=True, dropout=DROPOUT)
    head = build_head("classifier", features.shape[1], 0, 1, config, seed)
    assert isinstance(head, ClassifierHead)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    given = torch.from_numpy(features)[:, None]
    target = torch.from_numpy(is_end.astype(np.float32))
    torch.manual_seed(seed)
    head.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = head(given, None)[:, 0]
        functional.binary_cross_entropy_with_logits(logits, target).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        bias = float(head(torch.zeros(1, 1, features.shape[1]), None))
        weights = head(torch.eye(features.shape[1])[:, None], None)[:, 0].numpy() - bias
    return weights, bias


def choose(recordings: Recordings, scores: np.ndarray, settings: TurnSettings) -> TurnSettings:
    """The steps and thresholds that cut fewest turns short, of those that are quicker on average
    than the fixed rule by a fifth.
    """
    pauses = recordings.by_pause(scores)
    fixed = outcome(pauses, replace(settings, steps=(), longest_s=FIXED_S))
    frames = np.array([moment.frames for moment in recordings.moments])
    ends = np.array([moment.pause.is_end() for moment in recordings.moments])
    grids = []
    for at, shares in zip(STEPS_S, SHARES, strict=True):
        own = scores[(frames == frames_of(at)) & ends]
        grids.append([float(np.quantile(own, 1 - share)) if share else None for share in shares])
    best: tuple[float, float, TurnSettings] | None = None
    for needed in product(*grids):
        steps = zip(STEPS_S, needed, strict=True)
        used = tuple((at, least) for at, least in steps if least is not None)
        tried = replace(settings, steps=used)
        found = outcome(pauses, tried)
        share, mean = float(found.cut_short.mean()), float(found.delays_s.mean())
        if mean <= MEAN * fixed.delays_s.mean() and (best is None or (share, mean) < best[:2]):
            best = share, mean, tried
    assert best is not None
    return best[2]


def main() -> None:
    """Compute, train, choose, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="bundled source it is for, without bundled:")
    parser.add_argument("--train", nargs="+", type=Path, required=True)
    parser.add_argument("--development", nargs="+", type=Path, required=True)
    arguments = parser.parse_args()
    model = f"bundled:{arguments.name}"
    engine = CTranslate2Whisper(model, threads=2)
    learnt = Recordings(engine, model, arguments.train)
    is_end = np.array([moment.pause.is_end() for moment in learnt.moments])
    weights, bias = train(learnt.pooled(STATES_S), is_end)
    adapter = adapter_digest(PACKAGE / "short_context" / arguments.name)
    settings = TurnSettings(CONTEXT_S, STATES_S, (), LONGEST_S, adapter)
    recordings = Recordings(engine, model, arguments.development)
    scores = 1 / (1 + np.exp(-(recordings.pooled(STATES_S) @ weights + bias)))
    settings = choose(recordings, scores, settings)
    path = PACKAGE / "turn_ends" / f"{arguments.name}.safetensors"
    write_turn_head(path, weights, bias, settings)
    print(f"{path}: {settings}")


if __name__ == "__main__":
    main()
