"""Recordings in bulk: in this process, on one core, on Ray.

    python3 -m venv peer && peer/bin/pip install faster-whisper==1.2.1 'ray[data]==2.60.0'
    python benchmarks/bulk.py conversation --hours 2 --peer-python peer/bin/python

Makes so many hours (or somewhat less, to the end of a reference) out of a folder of recordings, in
files of a quarter of an hour, and transcribes them once each way, every way in a process of its
own. Prints wall time and processor time, each as a share of the first way's, and the word error
rate where the references lie beside the recordings as .json. Where the machine has other work, only
processor times compare. The peers are the recipes of `bulk_peers.py`, with the same weights and two
workers; their processor time is not taken, since Ray's workers are not their children.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow.dataset as ds

from mmtransfer.hub.checkpoint import resolve
from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio
from mmtransfer.speech.scores import default_normalizer, get_normalizer

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
    parser.add_argument("--peer-python", help="that has faster-whisper and Ray: also the peers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        recordings = Path(work) / "recordings"
        recordings.mkdir()
        hours, reference = write_recordings(arguments.folder, recordings, arguments.hours)
        print(f"{hours:.2f} h of audio in {len(list(recordings.iterdir()))} files")
        first: dict[str, Any] = {}
        for number, way in enumerate(arguments.only):
            found = measure(recordings, Path(work) / f"rows{number}", WAYS[way])
            first = first or found
            show(way, found, first, reference)
        if arguments.peer_python:
            own, packed = str(resolve(MODEL).folder), str(Path(work) / "packed")
            export = ["export", MODEL, "--to", packed, "--format", "ct2"]
            subprocess.run([sys.executable, "-m", "mmtransfer", *export], check=True)
            for recipe, python, model in (
                ("pipeline", sys.executable, own),
                ("faster-whisper", arguments.peer_python, packed),
            ):
                found = measure_peer(python, recipe, model, recordings, Path(work) / recipe)
                show(f"Ray Data, {recipe}", found, first, reference)


def show(way: str, found: dict[str, Any], first: dict[str, Any], reference: Sequence[str]) -> None:
    """Print a line."""
    line = f"{way:26s} wall {found['wall_s']:6.1f} s"
    line += f" ({first['wall_s'] / found['wall_s']:.2f} of the first's speed)"
    if "cpu_s" in found:
        line += f"  cpu {found['cpu_s']:6.1f} s ({found['cpu_s'] / first['cpu_s']:.2f})"
    if reference:
        line += f"  WER {jiwer.process_words(normal(reference), normal(found['texts'])).wer:.4f}"
    print(line, flush=True)


def normal(texts: Sequence[str]) -> str:
    """Normalised one by one, since what a bracket opens may be closed in another text."""
    normalize = get_normalizer(default_normalizer("en"))
    return " ".join(filter(None, map(normalize, texts)))


def write_recordings(source: Path, target: Path, hours: float) -> tuple[float, list[str]]:
    """Audio of all recordings of a folder, again and again, in files, to the last reference that
    ends within so many hours; returns its hours, and what is spoken.
    """
    blocks, texts, count, most = list[np.ndarray](), list[str](), 0, hours * 3600 * SAMPLE_RATE
    whole = (0, 0)  # samples and texts, where a reference ends
    for block, ended in _endless(source):
        if count >= most:
            break
        blocks.append(block)
        texts += ended
        count += len(block)
        if ended and count <= most:
            whole = (count, len(texts))
    samples = np.concatenate(blocks)[: whole[0] or round(most)]
    size = _FILE_S * SAMPLE_RATE
    for number, at in enumerate(range(0, len(samples), size)):
        with wave.open(str(target / f"{number:03d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((samples[at : at + size] * 32767).astype("<i2").tobytes())
    return len(samples) / SAMPLE_RATE / 3600, texts[: whole[1]]


def _endless(source: Path) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Blocks of audio, and the texts that end in each."""
    recordings = [path for path in sorted(source.iterdir()) if path.suffix != ".json"]
    while True:
        for path in recordings:
            beside = path.with_suffix(".json")
            items = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else []
            at = 0.0
            for block in stream_audio(path):
                at += len(block) / SAMPLE_RATE
                ended = [item["text"] for item in items if item["end"] <= at]
                del items[: len(ended)]
                yield block, ended
            if items:  # those that end with the recording, or a rounding behind it
                yield np.zeros(0, np.float32), [item["text"] for item in items]


def measure(recordings: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Summary of one run, with the wall time of its process and its text."""
    command = [sys.executable, "-m", "mmtransfer", "transcribe", MODEL, str(recordings)]
    wall_s, _ = timed([*command, "--output", str(output), *options])
    found: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    rows = ds.dataset(f"{output}/lines", partitioning="hive").to_table().to_pylist()
    rows.sort(key=lambda row: (row["file"], row["start"]))
    return {**found, "wall_s": wall_s, "texts": [row["text"] for row in rows]}


def measure_peer(
    python: str, recipe: str, model: str, recordings: Path, output: Path
) -> dict[str, Any]:
    """Wall time of a recipe's process, and its text."""
    script = str(Path(__file__).with_name("bulk_peers.py"))
    wall_s, found = timed([python, script, recipe, model, str(recordings), str(output), "2"])
    return {"wall_s": wall_s, "texts": json.loads(found.splitlines()[-1])}


def timed(command: list[str]) -> tuple[float, str]:
    """Wall seconds and standard output of a process."""
    own = {"PYTHONPATH": str(Path(__file__).parent.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    started = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout


if __name__ == "__main__":
    main()
