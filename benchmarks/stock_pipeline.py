"""Score a run's model in the stock transformers pipeline: 30-s padding, none of our decoding.

    python benchmarks/stock_pipeline.py RUN/model FOLDER

Prints the word error rate beside that of `mmtransfer evaluate` on the same clips, and whether the
pipeline's timestamps lie within the clips and in order.
"""

from __future__ import annotations

import argparse

from transformers import pipeline

from mmtransfer.config import DataConfig
from mmtransfer.runs import evaluate
from mmtransfer.speech.clips import load_clips
from mmtransfer.speech.scores import get_normalizer, score_clip, summarize_speech


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    arguments = parser.parse_args()

    clips = load_clips(arguments.data, DataConfig(), name="data").clips
    recognize = pipeline(
        "automatic-speech-recognition", model=arguments.model, trust_remote_code=False
    )
    results = recognize([clip.samples() for clip in clips], batch_size=16, return_timestamps=True)
    normalize = get_normalizer("english-v2")
    pairs = list(zip(clips, results, strict=True))
    stock = summarize_speech(
        [score_clip(clip.text, result["text"], normalize) for clip, result in pairs],
        normalizer="english-v2",
    )
    ours = evaluate(arguments.model, arguments.data)
    print(f"stock pipeline: WER {stock.wer:.4f}  [{stock.ci_low:.4f}, {stock.ci_high:.4f}]")
    print(f"mmtransfer evaluate: WER {ours['wer']:.4f}")

    good = 0
    for clip, result in pairs:
        times = [chunk["timestamp"] for chunk in result["chunks"] if chunk["text"].strip()]
        flat = [moment for span in times for moment in span]
        complete = bool(flat) and None not in flat
        good += complete and flat == sorted(flat) and flat[-1] <= clip.seconds + 0.5
    print(f"clips whose timestamps are complete, in order and within the clip: {good}/{len(clips)}")


if __name__ == "__main__":
    main()
