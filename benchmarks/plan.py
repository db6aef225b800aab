"""What an archive or a fleet needs, simulated with what was measured on one machine.

    python benchmarks/plan.py --hours 100000 --cores 256
    python benchmarks/plan.py --cameras 10000 --cores 640
    python benchmarks/plan.py --postgres postgresql://USER@HOST/EMPTY --nats nats://HOST

Recordings go through a row of stages (listing, object store, cores, sink), lines of cameras through
another (cores, broker, index); each stage serves what comes in its order. What was measured has the
command that measures it; what is assumed is an option.
"""

from __future__ import annotations

import argparse
import heapq
import importlib
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RECOGNISED = 87 / 60 / (292 / 3600)
"""Hours of speech an hour and core, decoded and recognised: recognition.py, whisper-tiny.en."""
WATCHED = 16.0
"""Live cameras a core, speech a third of the time: live.py cameras --count 32, on two cores."""
ROWS = 3_000.0
"""Rows a second into Parquet files, one writer: --postgres; a machine that did other work."""
SHARED = 4_000.0
"""Lines a second into one PostgreSQL, all sites together: --postgres, likewise."""
SENT = 3_000.0
"""Lines a second of one site through one broker: --nats, likewise."""
LINES = 1_030.0
"""Of an hour of speech: with a mean length of 3.5 s."""
LINE_BYTES = 400.0
"""Of a journal: search.py."""
_PIECE_H = 1 / 6  # of a recording that a core takes at a time


class Stage:
    """Servers that take what comes in its order, one thing at a time each."""

    def __init__(self, name: str, servers: int = 1):
        self.name, self.servers, self.busy_s = name, servers, 0.0
        self._free = [0.0] * servers

    def serve(self, arrival: float, seconds: float) -> float:
        """When something is done that arrives then and takes so long."""
        self.busy_s += seconds
        done = max(arrival, self._free[0]) + seconds
        heapq.heapreplace(self._free, done)
        return done


def main() -> None:
    """Simulate, or measure; print what it gives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, help="hours of recordings")
    parser.add_argument("--cameras", type=int, help="live cameras")
    parser.add_argument("--cores", type=int, default=256)
    parser.add_argument("--speed", type=float, default=1.0, help="of the model: 1 is tiny's")
    parser.add_argument("--speech", type=float, default=0.35, help="share of a camera's time")
    parser.add_argument("--per-core-hour", type=float, default=0.04, help="price (assumed)")
    parser.add_argument("--list-per-s", type=float, default=5000, help="files listed (assumed)")
    parser.add_argument("--gbit-s", type=float, default=10, help="of the object store (assumed)")
    parser.add_argument("--kbit-s", type=float, default=128, help="of a recording (assumed)")
    parser.add_argument("--postgres", metavar="ADDRESS", help="measure rows and an index there")
    parser.add_argument("--nats", metavar="ADDRESS", help="measure a broker there")
    options = parser.parse_args()
    if options.postgres or options.nats:
        measure(options.postgres, options.nats)
    if options.hours:
        archive(options)
    if options.cameras:
        fleet(options)


def archive(options: argparse.Namespace) -> None:
    """Recordings as long as broadcasts are, until all rows are written."""
    rng, hours, end = random.Random(0), 0.0, 0.0
    listing, store = Stage("listing"), Stage("object store")
    cores, sink = Stage("cores", options.cores), Stage("sink")
    while hours < options.hours:
        length = left = min(rng.lognormvariate(-1.2, 1.0), 10.0)
        hours += length
        there = listing.serve(0.0, 1 / options.list_per_s)
        bits = length * 3600 * options.kbit_s * 1e3
        there = done = store.serve(there, bits / (options.gbit_s * 1e9))
        while left > 0:
            piece = min(left, _PIECE_H)
            took = piece / (RECOGNISED * options.speed) * 3600
            done, left = max(done, cores.serve(there, took)), left - piece
        end = max(end, sink.serve(done, LINES * length / ROWS))
    core_hours = cores.busy_s / 3600
    print(f"{hours:.0f} hours on {options.cores} cores: {end / 3600:.1f} hours")
    price = options.cores * end / 3600 * options.per_core_hour / hours * 1000
    print(f"  {core_hours:.0f} core hours, {hours / core_hours:.1f} hours of audio each")
    print(f"  cost of 1,000 hours: {price:.2f} at {options.per_core_hour} a core hour")
    print(f"  rows: {hours * LINES / 1e6:.0f} million, {hours * LINES * LINE_BYTES / 1e9:.0f} GB")
    for stage in (listing, store, cores, sink):
        share = stage.busy_s / stage.servers / end
        most = "" if stage is cores else f", saturates at {options.cores / share:.0f} cores"
        print(f"  {stage.name:12} busy {share:7.2%}{most}")


def fleet(options: argparse.Namespace) -> None:
    """Five minutes of cameras that speak as they like; how late their lines are in the index."""
    rng, seconds = random.Random(0), 300.0
    cores, broker, index = Stage("cores", options.cores), Stage("broker"), Stage("index")
    rate = options.cameras * options.speech * LINES / 3600  # lines a second
    took = 3600 / (WATCHED * 0.35 * LINES) / options.speed  # seconds of a core for a line
    at, late = 0.0, list[float]()
    while (at := at + rng.expovariate(rate)) < seconds:
        done = cores.serve(at, took)
        late.append(index.serve(broker.serve(done, 1 / SENT), 1 / SHARED) - at)
    late.sort()
    print(f"{options.cameras} cameras on {options.cores} cores: {rate:.0f} lines a second")
    print(
        f"  median {statistics.median(late):.2f} s, 95 % {late[int(0.95 * len(late))]:.2f} s late"
    )
    month = options.cores / options.cameras * 730 * options.per_core_hour
    print(f"  cost of a camera's month: {month:.2f} at {options.per_core_hour} a core hour")
    for stage in (cores, broker, index):
        share = stage.busy_s / stage.servers / seconds
        most = options.cameras / share
        print(f"  {stage.name:12} busy {share:7.2%}, saturates at {most:.0f} cameras")


def measure(postgres: str | None, nats: str | None, count: int = 50_000) -> None:
    """Send so many lines of a journal on, and take them in; print how many a second."""
    from mmtransfer.scale.ship import Line, collect, ship
    from mmtransfer.scale.sinks import IndexSink, ParquetSink

    with tempfile.TemporaryDirectory() as made:
        journal = Path(made) / "journal"
        search: Any = importlib.import_module("search")  # beside this file
        search.write_journal(journal, count, 20, search.words())
        lines = []
        for path in sorted(journal.glob("*.jsonl")):
            begin = 0
            for data in path.read_bytes().splitlines(keepends=True):
                lines.append(Line("x", "", path.name, begin, data))
                begin += len(data)
        size = statistics.mean(len(line.data) for line in lines)
        print(f"{len(lines)} lines of {size:.0f} bytes")
        if postgres is not None:
            for name, sink in (
                ("Parquet", ParquetSink(Path(made) / "rows")),
                ("PostgreSQL", IndexSink(postgres)),
            ):
                started = time.perf_counter()
                for first in range(0, len(lines), sink.most):
                    sink.take(lines[first : first + sink.most], {})
                print(f"{name}: {len(lines) / (time.perf_counter() - started):.0f} lines a second")
                sink.close()
        if nats is not None:
            started = time.perf_counter()
            ship(journal, nats, once=True)
            print(f"sent: {len(lines) / (time.perf_counter() - started):.0f} lines a second")
            sink = ParquetSink(Path(made) / "taken")
            started = time.perf_counter()
            collect(nats, sink, once=True)
            print(f"taken in: {len(lines) / (time.perf_counter() - started):.0f} lines a second")


if __name__ == "__main__":
    main()
