"""Engines and detectors of speech that need no model: what they give is known."""

from __future__ import annotations

import threading
import time

import numpy as np

from mmtransfer.monitoring import Monitor
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.engine import Hypothesis, Word
from mmtransfer.speech.recognition import Recognizer

_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Each utterance has a loudness of its own, by which the engine knows it."""


class FakeEngine:
    """Notes on what it was called; its text depends on the context. `hold` is called meanwhile."""

    language = own_language = None
    max_context_s, shortest_context_s, margin_s = 30.0, 0.5, 0.0
    short_s, window_s = float("inf"), 0.0

    def __init__(self, texts=None, delay=0.0, workers=2, hold=None):
        self.calls: list[tuple[int, float]] = []
        self.workers = workers
        self.running = self.most_running = 0
        self._texts = texts or (lambda context_s: "some words here")
        self._hold = hold or (lambda: time.sleep(delay))
        self._lock = threading.Lock()

    def decode(self, clips, context_s):
        with self._lock:
            self.calls.append((len(clips), context_s))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        self._hold()
        with self._lock:
            self.running -= 1
        return [Hypothesis(self._texts(context_s), (1,), -0.1, 0.0, context_s) for _ in clips]


def fake_monitor(*arguments, **options):
    engine = FakeEngine(*arguments, **options)
    return Monitor(Recognizer(engine)), engine


class LoudIsSpeech:
    """A frame is speech where it is loud."""

    def __call__(self, samples):
        return (np.abs(samples.reshape(-1, 512)).mean(1) > 0.25).astype(np.float32)


class ContextEngine:
    """Knows a word better when it hears another one with it."""

    language = None
    max_context_s, shortest_context_s, margin_s = 30.0, 0.5, 0.0
    short_s, window_s = 8.0, 28.0
    workers = 2

    def __init__(self, alone, together, hold=None):
        self.alone, self.together, self.hold = alone, together, hold
        self.turns = 0  # decoded so far

    def decode(self, clips, context_s):
        return [self._decode(clip, context_s) for clip in clips]

    def _decode(self, clip, context_s):
        frames = np.abs(clip[: len(clip) // 512 * 512].reshape(-1, 512)).mean(1).round(1)
        found = [(level, np.flatnonzero(np.isclose(frames, level))) for level in _LEVELS]
        found = [(level, at) for level, at in found if len(at) > 3]
        if len(found) > 1 and self.hold is not None:
            self.hold.wait(10)
        self.turns += len(found) > 1
        known = self.alone if len(found) == 1 else self.together
        words: list[Word] = []
        for level, at in found:
            for number, text in enumerate(known[_LEVELS.index(level)].split()):
                start = (at[0] + number) * 512 / SAMPLE_RATE
                words.append(Word(f" {text}" if words else text, start, start + 0.03, 0.9))
        text = "".join(word.text for word in words)
        return Hypothesis(text, (1,) * len(words), -0.1, 0.0, context_s, words=tuple(words))


def utterances(pauses, seconds=1.0):
    parts = [np.zeros(SAMPLE_RATE, np.float32)]
    for level, pause in zip(_LEVELS, pauses, strict=False):
        parts.append(np.full(round(seconds * SAMPLE_RATE) // 512 * 512, level, np.float32))
        parts.append(np.zeros(round(pause * SAMPLE_RATE), np.float32))
    return np.concatenate(parts)
