"""How fast a journal is indexed and searched, on a journal that is made here.

    python benchmarks/search.py --lines 1000000
    python benchmarks/search.py --lines 1000000 --index postgresql://user:password@host/site

The journal is that of a site's year: cameras that take turns, words as frequent as those of a
language (Zipf), one line in forty in Chinese, one in two hundred with an alert.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mmtransfer.server.catching_up import JournalIndex
from mmtransfer.server.index import FILE_NAME
from mmtransfer.server.indexing import open_index

_YEAR_S = 365 * 86400
_FIRST = 1735689600.0  # 2025
_LETTERS = "的一是在有火警门开关人来去上下大小水电车"
_SYLLABLES = [*map("".join, itertools.product("bdfgklmnprst", "aeiou")), "tion", "er", "the"]


def main() -> None:
    """Make the journal, index it, search it; print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--cameras", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the journal here, or take that which is")
    parser.add_argument("--index", help="address of a PostgreSQL; by default a file in the folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        vocabulary = words()
        if not list(folder.glob("*.jsonl")):
            write_journal(folder, arguments.lines, arguments.cameras, vocabulary)
        with open_index(arguments.index, folder) as index:
            started, cpu = time.perf_counter(), time.process_time()
            caught = index.rebuild(folder)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            size = ""
            if arguments.index is None:
                each = (folder / FILE_NAME).stat().st_size / caught.lines
                size = f", {each:.0f} bytes/line"
            print(
                f"indexed {caught.lines} lines in {seconds:.1f} s ({cpu:.1f} s of CPU here): "
                f"{caught.lines / seconds:.0f} lines/s{size}"
            )
            search(index, vocabulary)


def words(count: int = 20_000) -> list[str]:
    """Words that no language has, the most frequent first."""
    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(_SYLLABLES, k=rng.choice((1, 2, 2, 3, 3, 4))))] = None
    return sorted(found, key=len)


def write_journal(folder: Path, count: int, cameras: int, vocabulary: list[str]) -> None:
    """A year's journal, a file a week."""
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    shares = [1 / (rank + 2) for rank in range(len(vocabulary))]
    texts = sentences(rng, vocabulary, list(itertools.accumulate(shares)))
    week, file = -1, None
    for number in range(count):
        start = round(_FIRST + number * _YEAR_S / count + rng.random(), 3)
        if (now := int((start - _FIRST) // (7 * 86400))) != week:
            week = now
            if file is not None:
                file.close()
            day = time.strftime("%Y-%m-%d", time.localtime(start))
            file = (folder / f"{day}.0000.jsonl").open("w", encoding="utf-8")
        assert file is not None
        camera = f"camera-{rng.randrange(cameras)}"
        line = {
            "source": "rtsp://10.0.0.7/audio",
            "camera": camera,
            "id": f"{camera}@{start:.3f}",
            "start": start,
            "end": round(start + 2.5, 3),
            "text": next(texts),
            **{"avg_logprob": -0.2, "no_speech_prob": 0.01, "compression_ratio": 1.2},
            **{"context_s": 3.0, "language": None, "words": None, "delay_s": 0.5, "revision": 0},
            "sentiment": rng.choice(("negative", "neutral", "positive")),
            "sentiment_prob": 0.9,
        }
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if number % 200 == 0:
            known = {name: line[name] for name in ("camera", "start", "end", "text")}
            alert = {**known, "keyword": "fire", "segment": line["id"], "event": "alert"}
            file.write(json.dumps(alert, ensure_ascii=False) + "\n")
    if file is not None:
        file.close()


def sentences(rng: random.Random, vocabulary: list[str], shares: list[float]) -> Iterator[str]:
    """Lines of eight words on average."""
    while True:
        for word in (pool := iter(rng.choices(vocabulary, cum_weights=shares, k=100_000))):
            if rng.random() < 1 / 40:
                yield "".join(rng.choices(_LETTERS, k=12))
            else:
                rest = itertools.islice(pool, rng.randrange(3, 12))
                yield " ".join((word.capitalize(), *rest)) + "."


def search(index: JournalIndex, vocabulary: list[str]) -> None:
    """First pages of queries of every kind, each ten times; the slowest are what counts."""
    latest = index.search(limit=1).hits[0]
    frequent, rare = vocabulary[:5], vocabulary[-3:]
    queries: dict[str, tuple[str, dict[str, object]]] = {
        "no words": ("", {}),
        "a frequent word": (frequent[0], {}),
        "frequent words together": (" ".join(frequent), {}),
        "frequent words side by side": (f'"{" ".join(frequent)}"', {}),
        "a rare word": (rare[0], {}),
        "rare words that never meet": (" ".join(rare), {}),
        "the beginning of words": ("the", {}),
        "a word there is not": ("qqqqqq", {}),
        "a Chinese letter": ("火", {}),
        "Chinese letters": ("火警", {}),
        "one camera": ("", {"camera": "camera-3"}),
        "a frequent word, one camera, alerts": (
            frequent[1],
            {"camera": "camera-3", "alert": True},
        ),
        "frequent words, a class, a day": (
            " ".join(frequent[:2]),
            {"sentiment": "negative", "after": latest.at - 86400},
        ),
        "a frequent word near a sound": (frequent[0], {"sound": "alarm"}),
    }
    for name, (query, filters) in queries.items():
        times = []
        for _ in range(10):
            started = time.perf_counter()
            page = index.search(query, **filters)  # type: ignore[arg-type]
            times.append(time.perf_counter() - started)
        more = "" if page.cursor is None or len(page.hits) == 50 else ", cut"
        print(
            f"{name:40} median {1000 * statistics.median(times):6.1f} ms, slowest "
            f"{1000 * max(times):6.1f} ms, {len(page.hits)} hits{more}"
        )


if __name__ == "__main__":
    main()
