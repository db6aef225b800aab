"""Recordings in bulk: in this process, on one core, on Ray.

    python benchmarks/bulk.py conversation --hours 2

Makes so many hours out of a folder of recordings, in files of a quarter of an hour, and transcribes
them once each way, every way in a process of its own. Prints wall time and processor time, and each
as a share of the first way's. Where the machine has other work, only processor times compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio

MODEL = "bundled:whisper-tiny.en"
_FILE_S = 900
WAYS: dict[str, list[str]] = {
    "in process": [],
    "in process, 1 thread": ["--threads", "1"],
    "Ray, 1 worker": ["--ray", "local", "--workers", "1", "--threads", "1"],
    "Ray, 2 workers": ["--ray", "local", "--workers", "2", "--threads", "1"],
}


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        recordings = Path(work) / "recordings"
        recordings.mkdir()
        hours = write_recordings(arguments.folder, recordings, arguments.hours)
        print(f"{hours:.2f} h of audio in {len(list(recordings.iterdir()))} files")
        first: dict[str, Any] = {}
        for number, way in enumerate(arguments.only):
            found = measure(recordings, Path(work) / f"rows{number}", WAYS[way])
            first = first or found
            print(
                f"{way:22s} wall {found['wall_s']:6.1f} s ({first['wall_s'] / found['wall_s']:.2f}"
                f" of the first's speed)  cpu {found['cpu_s']:6.1f} s"
                f" ({found['cpu_s'] / first['cpu_s']:.2f})  {found['lines']} lines",
                flush=True,
            )


def write_recordings(source: Path, target: Path, hours: float) -> float:
    """Audio of all recordings of a folder, again and again, in files; how many hours there are."""
    left = round(3600 * hours) * SAMPLE_RATE
    number, kept, count = 0, list[np.ndarray](), 0
    for block in _endless(source):
        kept.append(block[:left])
        count += len(kept[-1])
        left -= len(kept[-1])
        if count >= _FILE_S * SAMPLE_RATE or not left:
            with wave.open(str(target / f"{number:03d}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(SAMPLE_RATE)
                file.writeframes((np.concatenate(kept) * 32767).astype("<i2").tobytes())
            number, kept, count = number + 1, [], 0
        if not left:
            break
    return hours


def _endless(source: Path) -> Iterator[np.ndarray]:
    recordings = [path for path in sorted(source.iterdir()) if path.suffix != ".json"]
    while True:
        for path in recordings:
            yield from stream_audio(path)


def measure(recordings: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Summary of one run, with the wall time of its process."""
    command = [sys.executable, "-m", "mmtransfer", "transcribe", MODEL, str(recordings)]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--output", str(output), *options],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stderr=subprocess.DEVNULL,
    )
    found: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {**found, "process_s": time.perf_counter() - started}


if __name__ == "__main__":
    main()
