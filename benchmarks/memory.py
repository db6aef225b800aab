"""Peak memory of the monitor on a video and on the same video six times as long.

    python benchmarks/memory.py MODEL VIDEO

The long file repeats the video's audio; both runs are processes of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio

REPEATS = 6
PROGRAM = """
import resource, sys
from mmtransfer.cli import main
code = main(["monitor", sys.argv[1], sys.argv[2], "--quiet"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def write_audio(path: Path, samples: np.ndarray, repeats: int) -> None:
    """Encode the samples that many times over as AAC in an mp4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for _ in range(repeats):
            for start in range(0, len(samples), SAMPLE_RATE):
                block = samples[start : start + SAMPLE_RATE]
                frame = av.AudioFrame.from_ndarray(block[None], "fltp", "mono")
                frame.sample_rate = SAMPLE_RATE
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    """Print both peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("video")
    arguments = parser.parse_args()
    samples = np.concatenate(list(stream_audio(arguments.video)))
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for repeats in (1, REPEATS):
            path = Path(folder, f"{repeats}.mp4")
            write_audio(path, samples, repeats)
            command = [sys.executable, "-c", PROGRAM, arguments.model, str(path)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks.append(int(result.stdout) / 1024)
            minutes = repeats * len(samples) / SAMPLE_RATE / 60
            print(f"{minutes:.0f} minutes: peak {peaks[-1]:.0f} MiB", flush=True)
    print(f"ratio: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
