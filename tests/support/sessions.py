"""Sessions of a monitor with an engine that needs no model, and what came of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator

import pytest
from support.engines import FakeEngine

from mmtransfer.monitoring import Camera, Journal, LiveSettings, Monitor, SourceEvent, Transcript
from mmtransfer.speech.recognition import Recognizer

QUICK = LiveSettings(open_s=2.0, read_s=1.0, first_retry_s=0.1, last_retry_s=0.2, report_again_s=0)


def transcript(text="gate two", start=14.6, end=21.9):
    return Transcript("a.mp4", "a", f"a@{start:.3f}", start, end, text, -0.1, 0.0, 1.0, 20.0)


def live_monitor(**options):
    return Monitor(Recognizer(FakeEngine(**options)), live=QUICK)


def collect(monitor, sources, *, until, seconds=120.0, **options):
    """Items until a condition on them holds."""
    if isinstance(sources, dict):
        sources = [Camera(name=name, url=url) for name, url in sources.items()]
    items = []
    timer = threading.Timer(seconds, monitor.stop)
    timer.start()
    for item in monitor.watch(sources, **options):
        items.append(item)
        if until(items):
            monitor.stop()
    timer.cancel()
    return items


def said(items, camera=None):
    return [i for i in items if isinstance(i, Transcript) and camera in (None, i.camera)]


def happened(items, camera=None):
    events = [i for i in items if isinstance(i, SourceEvent) and camera in (None, i.camera)]
    return [event.event for event in events]


def lines_of(folder):
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def same_segments(found, spoken, tolerance=0.15):
    """Whether exactly these segments were found, by their lengths and distances."""
    assert len(found) == len(spoken), (found, spoken)
    first, start = found[0][0], spoken[0][0]
    for (a, b), (c, d) in zip(found, spoken, strict=True):
        assert a - first == pytest.approx(c - start, abs=tolerance)
        assert b - first == pytest.approx(d - start, abs=tolerance)


def broken_off(journal, folder, stop_after):
    """A session on a folder that ends after so many transcripts, as abruptly as by an exception."""
    book = Journal(journal, model="m", model_digest="d", sources={"site": str(folder)})
    monitor, count = Monitor(Recognizer(FakeEngine(workers=1))), 0
    stream = monitor.watch([Camera("site", str(folder))], journal=book)
    for item in stream:
        count += isinstance(item, Transcript)
        if count >= stop_after:
            break
    assert isinstance(stream, Generator)
    stream.close()
    book.close()
