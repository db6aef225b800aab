"""Classes of sounds (alarm, glass, dog, ...) in the audio of every source, whether somebody speaks
or not: classified in overlapping windows, smoothed over time, one event for each sound.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtransfer.errors import UserError
from mmtransfer.monitoring.events import (
    ClassifiedSound,
    Occurrence,
    SourceEnd,
    SourceEvent,
    Stopped,
    segment_id,
)
from mmtransfer.monitoring.sources.source import Source
from mmtransfer.speech.audio import SAMPLE_RATE

OVERLAP = 5
"""Windows that hold each moment: they begin a fifth of their length after each other."""
THRESHOLD = 0.8
"""Probability over which a sound of a class begins, where nothing else is given."""
DEFAULT = "default"
"""Stands among thresholds for all classes that are not named."""
_RELEASE = 0.5  # share of its threshold under which a sound has ended
_LONGEST_S = 60.0  # one that goes on is another event then: an alarm is reported while it rings
_BATCH = 8  # windows of all sources, classified at once
_WAITING = 12  # windows of one source; a recording waits for room, a live source skips them
_REPORT_AGAIN_S = 600.0  # of skipped audio
_NICE = 10  # of the thread that classifies, against those that transcribe

Classify = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Probabilities [window, class] of float32 samples at 16 kHz of at most the model's window."""


@dataclass(frozen=True)
class SoundClasses:
    """What classifies sounds, and from which probability on they are reported."""

    labels: Sequence[str]
    window_s: float
    classify: Classify
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By label, or `default`. A class of threshold 1 is never reported.

    Raises:
        UserError: a class that the model does not have.
    """

    def __post_init__(self) -> None:
        for name in self.thresholds:
            if name != DEFAULT and name not in self.labels:
                raise UserError(
                    f"sound_thresholds: expected classes of the model ({', '.join(self.labels)}) "
                    f"or '{DEFAULT}', found '{name}'."
                )

    @property
    def levels(self) -> np.ndarray:
        """The threshold of each class."""
        default = self.thresholds.get(DEFAULT, THRESHOLD)
        return np.array([self.thresholds.get(label, default) for label in self.labels])


@dataclass(frozen=True)
class Step:
    """The audio from the beginning of one window to that of the next."""

    samples: np.ndarray
    at: float
    """Seconds on the source's time line."""
    of: str
    """Beginning of the ids of what begins in it."""

    @property
    def end(self) -> float:
        """When it is over, in seconds."""
        return self.at + len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class _Window:
    """Audio that is classified at once."""

    steps: tuple[Step, ...]
    samples: int
    """How many of the last of them it holds; where a source ends, a window begins within a step."""
    before: tuple[Step, ...] = ()
    """What it may reach into."""

    def audio(self) -> np.ndarray:
        """Float32 [samples]."""
        joined = np.concatenate([step.samples for step in (*self.before, *self.steps)])
        return joined[-self.samples :]


class _End:
    """Stands where audio ends: what goes on beyond is another sound."""


# --- from probabilities to sounds -----------------------------------------------------------------


@dataclass
class _Sounding:
    """A sound that has not ended."""

    start: float
    end: float
    peak: float
    of: str


class SoundTracker:
    """Finds the sounds of one source in the probabilities of its windows.

    The probability of a step is the mean over all windows that hold it. A sound begins with the
    first step over the threshold of its class, and ends with the last one before its probability
    falls to half of that.
    """

    def __init__(self, camera: str, labels: Sequence[str], levels: np.ndarray):
        self._camera, self._labels, self._levels = camera, labels, levels
        self._sounding: dict[int, _Sounding] = {}
        self._rows: deque[np.ndarray] = deque(maxlen=OVERLAP)  # of the last windows
        self._left: Sequence[Step] = ()  # of the last window, behind its first

    def add(self, steps: Sequence[Step], row: np.ndarray) -> Iterator[ClassifiedSound]:
        """The next window, one step after the last one, and the probability of each class in it:
        no later window holds its first step. Yields the sounds that are over.
        """
        self._rows.append(row)
        self._left = steps[1:]
        yield from self._step(steps[0])

    def finish(self) -> Iterator[ClassifiedSound]:
        """No audio follows the last window. Yields all sounds that are not over yet."""
        count = len(self._rows)
        for number, step in enumerate(self._left, 1):
            if count + number > OVERLAP:  # the oldest window ended before this step
                self._rows.popleft()
            yield from self._step(step)
        for number in sorted(self._sounding):
            yield self._over(number)
        self._rows.clear()
        self._left = ()

    def _step(self, step: Step) -> Iterator[ClassifiedSound]:
        shares = np.mean(self._rows, axis=0)
        for number, (share, level) in enumerate(zip(shares, self._levels, strict=True)):
            one = self._sounding.get(number)
            if one is not None and (share <= _RELEASE * level or step.end - one.start > _LONGEST_S):
                yield self._over(number)
                one = None
            if one is not None:
                one.end, one.peak = step.end, max(one.peak, float(share))
            elif share > level:
                self._sounding[number] = _Sounding(step.at, step.end, float(share), step.of)

    def _over(self, number: int) -> ClassifiedSound:
        one, label = self._sounding.pop(number), self._labels[number]
        start = round(one.start, 3)
        # What stands behind the last @ of an id is its time.
        identity = f"{segment_id(one.of, start)}#{label.replace('@', ' ')}"
        end, peak = round(one.end, 3), round(one.peak, 4)
        return ClassifiedSound(self._camera, identity, label, start, end, peak)


# --- from audio to probabilities ------------------------------------------------------------------


class SoundWindows:
    """Cuts the audio of one source into overlapping windows, no longer than the model's, which
    would cut them otherwise.
    """

    def __init__(self, window_s: float):
        self.step = int(window_s * SAMPLE_RATE) // OVERLAP
        """Samples from the beginning of one window to that of the next."""
        self._steps: deque[Step] = deque(maxlen=OVERLAP)
        self._parts: list[np.ndarray] = []  # of the step that is not whole
        self._count = 0  # samples of it
        self._at, self._of = 0.0, ""

    def feed(self, samples: np.ndarray, at: float, of: str) -> Iterator[_Window]:
        """Take audio that follows the last, as `SoundStream.feed`; yields windows that it fills."""
        while len(samples):
            if not self._count:
                self._at, self._of = at, of
            part = samples[: self.step - self._count]
            self._parts.append(part)
            self._count += len(part)
            samples, at = samples[len(part) :], at + len(part) / SAMPLE_RATE
            if self._count == self.step:
                self._steps.append(self._whole_step())
                if len(self._steps) == OVERLAP:
                    yield _Window(tuple(self._steps), OVERLAP * self.step)

    def finish(self) -> Iterator[_Window]:
        """The audio ends, or goes on after a gap; yields the last window, which ends with it."""
        before: tuple[Step, ...] = ()
        if self._count:
            if len(self._steps) == OVERLAP:
                before = (self._steps[0],)
            self._steps.append(self._whole_step())
        elif len(self._steps) == OVERLAP:  # its last window is on its way
            self._steps.clear()
        if self._steps:
            steps = tuple(self._steps)
            length = sum(len(step.samples) for step in (*before, *steps))
            yield _Window(steps, min(length, OVERLAP * self.step), before)
            self._steps.clear()

    def _whole_step(self) -> Step:
        step = Step(np.concatenate(self._parts), self._at, self._of)
        self._parts, self._count = [], 0
        return step


class RecordingSounds:
    """Finds the sounds of one recording in the caller's thread, in batches that depend on nothing
    else; `of` is the beginning of their ids.
    """

    def __init__(self, classes: SoundClasses, name: str, of: str):
        self._classes, self._of = classes, of
        self._windows = SoundWindows(classes.window_s)
        self._tracker = SoundTracker(name, classes.labels, classes.levels)
        self._waiting: list[_Window] = []

    def feed(self, samples: np.ndarray, at: float) -> Iterator[ClassifiedSound]:
        """Take audio that follows the last, the first sample at `at` seconds; yields sounds."""
        for window in self._windows.feed(samples, at, self._of):
            self._waiting.append(window)
            if len(self._waiting) == _BATCH:
                yield from self._classify()

    def finish(self) -> Iterator[ClassifiedSound]:
        """The recording ends; yields the last sounds."""
        self._waiting += self._windows.finish()
        yield from self._classify()
        yield from self._tracker.finish()

    def _classify(self) -> Iterator[ClassifiedSound]:
        batch, self._waiting = self._waiting, []
        rows = self._classes.classify([window.audio() for window in batch]) if batch else ()
        for window, row in zip(batch, rows, strict=True):
            yield from self._tracker.add(window.steps, row)


class SoundStream:
    """The audio of one source on its way to the classifier. Its reader calls `feed`, `finish`,
    `then` and `end`; the other methods are the classifier's.
    """

    def __init__(
        self,
        source: Source,
        classes: SoundClasses,
        events: queue.Queue[Any],
        changed: threading.Condition,
        stopping: threading.Event,
    ):
        self.number, self.is_live = source.number, source.is_live
        self.tracker = SoundTracker(source.name, classes.labels, classes.levels)
        self._camera, self._stats = source.name, source.stats
        self._events, self._stopping = events, stopping
        self._comes_again = not source.is_live and not source.is_piped
        self._cutter = SoundWindows(classes.window_s)
        self._changed = changed  # its lock holds what waits
        self._waiting: deque[Any] = deque()
        self._windows = 0  # among what waits
        self._reported_at = -_REPORT_AGAIN_S

    def feed(self, samples: np.ndarray, at: float, of: str) -> None:
        """Float32 samples at 16 kHz that follow the last ones, the first of them at `at` seconds;
        `of` is the beginning of the ids of what is in them. A recording waits for room.
        """
        for window in self._cutter.feed(samples, at, of):
            self._put(window)

    def finish(self) -> None:
        """The audio ends, or goes on after a gap; the last window ends with it."""
        for window in self._cutter.finish():
            self._put(window)
        with self._changed:
            self._waiting.append(_End())
            self._changed.notify_all()

    def then(self, item: Any) -> None:
        """Hand something on once everything before it has been classified."""
        with self._changed:
            self._waiting.append(item)
            self._changed.notify_all()

    def end(self, end: SourceEnd) -> None:
        """The source has ended. A recording that was stopped is not classified to its end: it is
        decoded again in the next session, and its last sounds, and what says that they are all
        known, come then.
        """
        if self._comes_again and isinstance(end.error, Stopped):
            with self._changed:
                self._waiting.clear()
                self._windows = 0
        else:
            self.finish()
        self.then(end)

    def _put(self, window: _Window) -> None:
        with self._changed:
            if self.is_live and self._windows >= _WAITING:
                self._skip(window.steps[0].at)
            while self._windows >= _WAITING and not self._stopping.is_set():
                self._changed.wait(0.2)
            self._waiting.append(window)
            self._windows += 1
            self._changed.notify_all()

    def _skip(self, now: float) -> None:
        """Leave out all that waits, so that what is classified are stretches and not shreds."""
        self._stats.unclassified_s += self._windows * self._cutter.step / SAMPLE_RATE
        self._waiting = deque(one for one in self._waiting if not isinstance(one, _Window))
        self._waiting.append(_End())
        self._windows = 0
        if now - self._reported_at >= _REPORT_AGAIN_S:
            self._reported_at = now
            why = f"{self._stats.unclassified_s:.1f} s of audio so far: classification is too slow"
            event = SourceEvent(self._camera, Occurrence.UNCLASSIFIED, round(now, 3), why)
            self._events.put((self.number, event))  # at once: what waits may wait for long

    # --- the classifier's side, with the lock held ------------------------------------------------

    @property
    def has_window(self) -> bool:
        """Whether a window is next."""
        return bool(self._waiting) and isinstance(self._waiting[0], _Window)

    def take_items(self) -> list[Any]:
        """What waits before the next window."""
        found = []
        while self._waiting and not isinstance(self._waiting[0], _Window):
            found.append(self._waiting.popleft())
        return found

    def take_windows(self, most: int) -> list[_Window]:
        """At most so many windows, up to what waits between them."""
        found: list[_Window] = []
        while len(found) < most and self._waiting and isinstance(self._waiting[0], _Window):
            found.append(self._waiting.popleft())
        self._windows -= len(found)
        return found


class SoundWorker:
    """A thread that classifies the audio of all sources; what it finds goes into `events` as
    (number of the source, item), an exception as what ends it.

    Windows of several sources share a batch: live ones first, each as many as there is room for.
    On Linux it gives way to the threads that transcribe.
    """

    def __init__(self, classes: SoundClasses, events: queue.Queue[Any], stopping: threading.Event):
        self._classes, self._events, self._stopping = classes, events, stopping
        self._streams: list[SoundStream] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="sounds", daemon=True)

    def stream(self, source: Source) -> SoundStream:
        """What takes the audio of a source."""
        made = SoundStream(source, self._classes, self._events, self._changed, self._stopping)
        with self._changed:
            self._streams.append(made)
            self._streams.sort(key=lambda stream: not stream.is_live)
        return made

    def start(self) -> None:
        """Begin to classify."""
        self._thread.start()

    def close(self) -> None:
        """Wait for what is being classified; what waits stays."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere it would be the whole process
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            while not self._is_over:
                self._work()
        except Exception as error:  # the run's thread raises it
            self._events.put(error)

    def _work(self) -> None:
        """Deal with what waits before the next windows, then with a batch of these."""
        with self._changed:
            items = [(stream, stream.take_items()) for stream in self._streams]
            batch = self._take_batch()
            if not batch and not any(found for _, found in items):
                self._changed.wait(0.5)
                return
            self._changed.notify_all()
        for stream, found in items:
            for item in found:
                if isinstance(item, _End):
                    self._put(stream, stream.tracker.finish())
                else:
                    self._events.put((stream.number, item))
        if not batch:
            return
        rows = self._classes.classify([window.audio() for _, window in batch])
        for (stream, window), row in zip(batch, rows, strict=True):
            self._put(stream, stream.tracker.add(window.steps, row))

    def _take_batch(self) -> list[tuple[SoundStream, _Window]]:
        waiting = sum(stream.has_window for stream in self._streams)
        share = max(1, _BATCH // max(1, waiting))
        batch: list[tuple[SoundStream, _Window]] = []
        for stream in self._streams:
            most = min(share, _BATCH - len(batch))
            batch += [(stream, window) for window in stream.take_windows(most)]
        served = {stream.number for stream, _ in batch}
        self._streams.sort(key=lambda stream: (not stream.is_live, stream.number in served))
        return batch

    def _put(self, stream: SoundStream, sounds: Iterator[ClassifiedSound]) -> None:
        for sound in sounds:
            self._events.put((stream.number, sound))
