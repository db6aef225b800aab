r"""Train the head that decides at cameras whether a pause ends a turn.

    python examples/make_end_of_turn.py whisper-tiny.en talk/*.flac meetings/*.flac
    python benchmarks/end_of_turn.py bundled:whisper-tiny.en interviews/*.flac

No transcripts are needed: whether the speaker goes on is what the recordings themselves show. The
encoder's states are computed once and kept in the cache. What is written goes into
``mmtransfer/speech/turn_ends/NAME.safetensors``. The second command
measures it on other recordings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.config import HeadConfig
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.hub.files import files_digest
from mmtransfer.speech.audio import SAMPLE_RATE, decode_clip
from mmtransfer.speech.end_of_turn import (
    FRAME_S,
    PAUSE_S,
    STATES_PER_SECOND,
    Pause,
    TurnSettings,
    adapter_digest,
    find_pauses,
    frames_of,
    last_states,
    write_turn_head,
)
from mmtransfer.speech.engines_ctranslate2 import CTranslate2Whisper
from mmtransfer.speech.voice_activity import FRAME
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features
from mmtransfer.transfer.heads import ClassifierHead
from mmtransfer.transfer.networks import build_head

PACKAGE = Path(__file__).resolve().parent.parent / "mmtransfer"
CONTEXT_S, STATES_S, LONGEST_S = 3.0, 0.2, 0.6
KEPT_S = 1.0  # of the encoder's states in the cache, so that heads can be compared
DROPOUT, RATE, WEIGHT_DECAY, STEPS = 0.5, 0.003, 1.0, 300
USUAL = 20  # quantiles that stand for the training recordings where a stream begins


def cached_states(
    engine: CTranslate2Whisper,
    model: Checkpoint,
    paths: Sequence[Path],
    pauses: Sequence[list[Pause]],
) -> FeatureStore:
    """The encoder's states 0.2 s into each pause, of each recording in turn."""
    moments = [(number, pause.start) for number, own in enumerate(pauses) for pause in own]
    kept = TurnSettings(CONTEXT_S, KEPT_S, LONGEST_S)
    silence = frames_of(PAUSE_S)
    loaded: dict[int, np.ndarray] = {}

    def states(index: int) -> np.ndarray:
        number, start = moments[index]
        return last_states(engine.encode, loaded[number][: (start + silence) * FRAME], kept)

    def compute(indices: Sequence[int]) -> Iterable[tuple[int, np.ndarray]]:
        loaded.clear()
        wanted = {moments[index][0] for index in indices}
        loaded.update({number: decode_clip(paths[number]) for number in wanted})
        with ThreadPoolExecutor(engine.workers) as pool:
            yield from zip(indices, pool.map(states, indices), strict=True)

    nothing = np.zeros(round(CONTEXT_S * SAMPLE_RATE), np.float32)
    values = last_states(engine.encode, nothing, kept).size
    key = cache_key(
        kind="end of turn",
        model=model.digest,
        recordings=[files_digest([path]) for path in paths],
        moments=moments,
        settings=[CONTEXT_S, KEPT_S, silence],
    )
    return cached_features("pauses", key, [values] * len(moments), compute, dtype="float16")


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
        functional.binary_cross_entropy_with_logits(logits, target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head.eval()
    with torch.no_grad():
        bias = float(head(torch.zeros(1, 1, features.shape[1]), None))
        weights = head(torch.eye(features.shape[1])[:, None], None)[:, 0].numpy() - bias
    return weights, bias


def usual(probabilities: np.ndarray, pauses_s: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Pairs that stand for all of them: quantiles of both, in no order."""
    at = (np.arange(USUAL) + 0.5) / USUAL
    order = np.random.default_rng(0).permutation(USUAL)
    both = np.quantile(probabilities, at[order]), np.quantile(pauses_s, at)
    return tuple(
        (round(float(one), 4), round(float(long), 3)) for one, long in zip(*both, strict=True)
    )


def main() -> None:
    """Compute, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="bundled source it is for, without bundled:")
    parser.add_argument("recordings", nargs="+", type=Path)
    arguments = parser.parse_args()
    model = resolve(f"bundled:{arguments.name}")
    engine = CTranslate2Whisper(model, threads=2)
    by_recording = [list(find_pauses(decode_clip(path))) for path in arguments.recordings]
    store = cached_states(engine, model, arguments.recordings, by_recording)
    count = round(STATES_S * STATES_PER_SECOND)
    features = np.stack([store[n][-count:].astype(np.float32).mean(0) for n in range(len(store))])
    write(arguments.name, features, [pause for own in by_recording for pause in own])


def write(name: str, features: np.ndarray, pauses: Sequence[Pause]) -> None:
    """Train on pooled states [pause, width], and put the head into the package."""
    is_end = np.array([pause.is_end() for pause in pauses])
    weights, bias = train(features, is_end)
    probabilities = 1 / (1 + np.exp(-(features @ weights + bias)))
    pauses_s = np.array([pause.frames * FRAME_S for pause in pauses])
    settings = TurnSettings(
        CONTEXT_S,
        STATES_S,
        LONGEST_S,
        usual(probabilities[~is_end], pauses_s[~is_end]),
        adapter_digest(PACKAGE / "speech" / "short_context" / name),
    )
    path = PACKAGE / "speech" / "turn_ends" / f"{name}.safetensors"
    write_turn_head(path, weights, bias, settings)
    print(f"{len(pauses)} pauses, {is_end.sum()} of them ends; {path}")


if __name__ == "__main__":
    main()
