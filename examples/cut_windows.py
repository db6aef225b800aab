"""Cut recordings of real speech into the windows from which a short-context adapter learns.

    python examples/cut_windows.py recordings --out speech

Each window is a turn, or a part of one, of at most 4 to 28 s, in turn at random, cut as a monitor
cuts recordings.  They go beside what ``make_speech.py`` wrote into ``--out``, as rows of its
``metadata.csv`` without a transcript: the source transcribes them in its full window.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import av
import numpy as np

from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio
from mmtransfer.speech.segments import SegmenterSettings, WindowSegmenter

WINDOWS_S = (4, 8, 12, 16, 20, 20, 24, 28)
AHEAD_S = 45  # looked at for the next window
MOST_S = 15 * 60  # of one recording, so that no voice is learnt by heart
BIT_RATE = 20_000


def write_opus(path: Path, samples: np.ndarray) -> None:
    """Mono speech at 16 kHz as Opus in Ogg."""
    with av.open(str(path), "w", format="ogg") as out:
        stream = out.add_stream("libopus", rate=48_000, layout="mono")
        stream.bit_rate = BIT_RATE
        resampler = av.AudioResampler("flt", "mono", 48_000)
        data = np.ascontiguousarray(samples[None], np.float32)
        frame = av.AudioFrame.from_ndarray(data, format="flt", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def main() -> None:
    """Cut and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, help="folder of recordings")
    parser.add_argument("--out", type=Path, required=True, help="folder of make_speech.py")
    parser.add_argument("--language", default="en")
    arguments = parser.parse_args()
    table = arguments.out / "metadata.csv"
    if not table.is_file():
        parser.error(f"{table}: no such file; make_speech.py writes it")
    paths = sorted(p for p in arguments.recordings.iterdir() if p.is_file())
    with table.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        for path in paths:
            drawn = random.Random(path.name)
            samples = np.concatenate(list(stream_audio(path)))[: MOST_S * SAMPLE_RATE]
            at = count = 0
            while at < len(samples) - SAMPLE_RATE:
                segmenter = WindowSegmenter(SegmenterSettings(), drawn.choice(WINDOWS_S))
                ahead = samples[at : at + AHEAD_S * SAMPLE_RATE]
                window = next(segmenter.feed(ahead), None)
                if window is None:  # nobody speaks
                    at += (AHEAD_S - 5) * SAMPLE_RATE
                    continue
                name = f"real_{path.stem}_{count:04d}.ogg"
                write_opus(arguments.out / name, window.samples)
                rows.writerow([name, "", path.stem, arguments.language])
                at += max(SAMPLE_RATE // 2, int(window.end * SAMPLE_RATE))
                count += 1


if __name__ == "__main__":
    main()
