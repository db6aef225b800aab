"""Score the monitor on a recording with a reference: WER, real-time factor, words on silence.

    python benchmarks/monitoring.py MODEL VIDEO REFERENCE.json

REFERENCE.json is a list of {"start", "end", "text"} in seconds. The monitor runs as a process of
its own, so that start-up and model loading count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jiwer

from mmtransfer.speech.audio import stream_audio
from mmtransfer.speech.scores import get_normalizer


def main() -> None:
    """Run the monitor and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("video")
    parser.add_argument("reference", type=Path)
    parser.add_argument("options", nargs="*", help="further options of `mmtransfer monitor`")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.jsonl")
        command = [sys.executable, "-m", "mmtransfer.cli", "monitor", arguments.model]
        command += [arguments.video, "--quiet", "--output", str(output), *arguments.options]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        wall_s = time.perf_counter() - started
        found = [json.loads(line) for line in output.read_text().splitlines()]
    reference = json.loads(arguments.reference.read_text())
    audio_s = sum(len(block) for block in stream_audio(arguments.video)) / 16_000

    for name in ("english-v2", "basic-v2"):
        normalize = get_normalizer(name)
        wer = jiwer.wer(
            normalize(" ".join(item["text"] for item in reference)),
            normalize(" ".join(item["text"] for item in found)),
        )
        print(f"WER ({name}): {wer:.4f}")
    # A segment that touches no reference utterance is text where nobody spoke.
    invented = [
        item
        for item in found
        if not any(r["start"] < item["end"] and item["start"] < r["end"] for r in reference)
    ]
    words = sum(len(item["text"].split()) for item in invented)
    print(f"words emitted where nobody speaks: {words}  {[item['text'] for item in invented]}")
    print(f"wall {wall_s:.1f} s for {audio_s:.1f} s: real-time factor {wall_s / audio_s:.4f}")


if __name__ == "__main__":
    main()
