"""Texts in bulk: in this process, and on Ray, killed on the way.

    python benchmarks/bulk_texts.py runs/sst2 sst2/train.csv --rows 2000000 --kills 3

Makes a file of so many rows out of a table with the column text, each with a number of its own,
and classifies it in process, and on Ray with two workers, where the whole run is killed some times
and started anew. Prints wall time with all starts, memory of the process that was started, and
whether each output is that of the first way: each row once, in order, with the same probabilities
to the last bit.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

RAY = ["--ray", "local", "--workers", "2", "--threads", "1"]


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--kills", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data.csv"
        write_rows(arguments.data, data, arguments.rows)
        expected, first_s = "", 0.0
        for way, options, kills in (
            ("in process, 2 threads", ["--threads", "2"], 0),
            (f"Ray, 2 workers, {arguments.kills} kills", RAY, arguments.kills),
        ):
            output = Path(work) / "output"
            command = [sys.executable, "-m", "mmtransfer", "predict", arguments.model]
            command += ["--data", str(data), "--output", str(output), *options]
            wall_s, peak = timed(command, output, arguments.rows, kills)
            found, rows = digest(output)
            expected, first_s = expected or found, first_s or wall_s
            print(
                f"{way:24s} {rows:,} rows, wall {wall_s:7.1f} s ({rows / wall_s:,.0f}/s, "
                f"{first_s / wall_s:.2f} of the first's speed), at most {peak:,.0f} MiB; "
                f"{'the same rows' if found == expected else 'OTHER ROWS'}",
                flush=True,
            )
            shutil.rmtree(output)


def write_rows(source: Path, target: Path, rows: int) -> None:
    """The table's texts again and again, with a number that makes each another."""
    with source.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with target.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["number", "text"])
        for number in range(rows):
            table.writerow([number, f"{texts[number % len(texts)]} {number // len(texts)}"])


def timed(command: list[str], output: Path, rows: int, kills: int) -> tuple[float, float]:
    """Wall time and peak memory (MiB) of a command; killed when shares of its rows are there."""
    start, peak = time.monotonic(), 0.0
    for kill in range(kills + 1):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        until = rows * (kill + 1) / (kills + 1)
        while process.poll() is None:
            time.sleep(1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peak = max(peak, int(line.split()[1]) / 1024)
            if kill < kills and count(output) >= until:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
        else:
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - start, peak


def count(output: Path) -> int:
    """Rows that are written: about, by parts of the usual size."""
    return 4096 * len(list(output.glob("rows/*.parquet")))


def digest(output: Path) -> tuple[str, int]:
    """Of all rows in the data's order, and how many there are."""
    parts = [pq.read_table(path) for path in sorted(output.glob("rows/*.parquet"))]
    rows = pa.concat_tables(parts).sort_by("row").combine_chunks()
    hashed = hashlib.sha256()
    for column in rows.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                hashed.update(buffer or b"")
    return hashed.hexdigest(), rows.num_rows


if __name__ == "__main__":
    main()
