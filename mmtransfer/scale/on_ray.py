"""The same run on a Ray cluster: tasks that cut, actors that recognise, one process that writes.

Plain tasks and actors rather than Ray Data: a piece is one object, made by a generator that waits
while too many are in the object store; rows are small, so the driver alone writes them, which makes
them exactly once by the same few lines as in one process. Whatever dies (worker, node, object), its
group is cut again without the pieces that are there, as after a restart; Ray's own retries, which
would know less, are off.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtransfer.monitoring.loading import resolve_models
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.monitoring.sound_events import SoundClasses
from mmtransfer.scale.cluster import Workers, connected, got, other_weights, ray_module
from mmtransfer.scale.pieces import FileEnd, Piece, cut
from mmtransfer.scale.recognising import Line, open_sounds, open_transcriber, settings_of
from mmtransfer.scale.sources import BulkFile, Group
from mmtransfer.scale.transcribe import BulkOptions, BulkRun

logger = logging.getLogger(__name__)
_ATTEMPTS = 5  # at a group whose worker or node died under it
_WORKERS_PER_CUTTER = 4  # decoding and voice activity take a tenth of what recognition takes
_AHEAD = 4  # objects of a cutter that wait: two pieces, and what says what they are


class Worker:
    """An actor that recognises."""

    def __init__(self, options: RecognitionOptions):
        self._options = options

    def open(self) -> tuple[dict[str, Any], float, int]:
        """Load the models; returns what the rows depend on, the seconds that are decoded at a time,
        and how many pieces are transcribed at the same time.
        """
        models = resolve_models(self._options)
        self._transcriber = open_transcriber(self._options, models)
        settings = settings_of(self._options, models)
        return settings, self._transcriber.window_s, self._transcriber.workers

    def transcribe(self, piece: Piece, files: tuple[BulkFile, ...]) -> list[tuple[int, Line]]:
        """See `Transcriber.transcribe`."""
        return self._transcriber.transcribe(piece, files)

    def cpu_s(self) -> float:
        """Processor time that it took so far."""
        return time.process_time()


def cut_ahead(
    group: Group, window_s: float, known: set[str], options: RecognitionOptions
) -> Iterator[Any]:
    """What `cut` gives, as objects: ends as they are, of a piece its name and, if it is not
    known, the piece; last the processor time that it took.
    """
    started = time.process_time()
    if options.sounds is not None and not _sounds:
        _sounds.append(open_sounds(options))
    for found in cut(group, window_s, _sounds[0] if _sounds else None):
        if isinstance(found, FileEnd):
            yield found
            continue
        yield found.name
        if found.name not in known:
            yield found
    yield time.process_time() - started


_sounds: list[SoundClasses | None] = []  # of this process, which cuts one group after the other


def transcribe_on_ray(run: BulkRun, options: BulkOptions, settings: Mapping[str, Any]) -> None:
    """Transcribe what is to be done on a cluster.

    Raises:
        UserError: no such cluster, another version or other weights there, or no room for a worker.
    """
    recognition = _by_whole_paths(options.recognition)
    with connected(
        str(options.ray),
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        threads=recognition.threads,
    ) as (workers, threads):
        run.summary.workers = workers
        recognition = replace(recognition, threads=threads)
        _Driver(run, options, recognition, settings, workers).work()


def _by_whole_paths(options: RecognitionOptions) -> RecognitionOptions:
    """Options that name models in folders wherever a worker runs."""
    names = {name: getattr(options, name) for name in ("model", "sentiment", "sounds")}
    folders: dict[str, Any] = {
        name: str(Path(at).resolve()) for name, at in names.items() if at and Path(at).exists()
    }
    return replace(options, **folders)


class _Driver:
    """Keeps cutters and workers busy, and hands the run what they found."""

    def __init__(
        self,
        run: BulkRun,
        options: BulkOptions,
        recognition: RecognitionOptions,
        settings: Mapping[str, Any],
        workers: int,
    ):
        self._ray = ray = ray_module()
        self._run, self._settings = run, settings
        actor = ray.remote(Worker).options(
            num_cpus=recognition.threads,
            num_gpus=options.gpus_per_worker,
            # On a GPU one more is prepared meanwhile; without, that would take others' cores.
            max_concurrency=recognition.threads + bool(options.gpus_per_worker),
        )
        self._workers = Workers(lambda: actor.remote(recognition), workers, self._opened)
        self._cut = ray.remote(cut_ahead).options(
            num_cpus=0,
            max_retries=0,
            num_returns="streaming",
            scheduling_strategy="SPREAD",
            _generator_backpressure_num_objects=_AHEAD,
        )
        self._recognition = recognition
        self._cutters = -(-workers // _WORKERS_PER_CUTTER)
        self._window_s: float | None = None  # known with the first worker
        self._groups = deque(run.todo)
        # Generator -> group, pieces that it leaves out, pieces so far.
        self._cutting: dict[Any, tuple[Group, set[str], list[str]]] = {}
        self._waiting: deque[tuple[Group, str, Any]] = deque()  # pieces
        self._calls: dict[Any, tuple[Group, str, Any]] = {}
        self._attempts: Counter[str] = Counter()

    def work(self) -> None:
        """Until all groups are finished."""
        while self._groups or self._cutting or self._waiting or self._calls:
            self._hand_out()
            # Not taken out, what is cut waits in its generator, and that waits in turn.
            has_room = len(self._waiting) < max(1, len(self._workers))
            for ready in self._workers.wait(self._cutting if has_room else ()):
                if ready in self._cutting:
                    self._take(ready)
                elif not self._workers.settle_start(ready):
                    self._transcribed(ready)
        self._run.summary.cpu_s += self._workers.cpu_s()

    def _opened(self, found: tuple[dict[str, Any], float, int]) -> int:
        settings, self._window_s, at_once = found
        if settings != dict(self._settings):
            raise other_weights(self._recognition.model)
        return at_once + 1  # one of them waits there

    def _hand_out(self) -> None:
        while self._groups and self._window_s is not None and len(self._cutting) < self._cutters:
            group = self._groups.popleft()
            called = {name for own, name, _ in self._calls.values() if own == group}
            known = self._run.begin(group) | called
            self._cutting[self._cut.remote(group, self._window_s, known, self._recognition)] = (
                group,
                known,
                [],
            )
        while self._waiting and self._workers.has_room:
            group, name, piece = self._waiting.popleft()
            call = self._workers.call("transcribe", piece, group.files)
            self._calls[call] = (group, name, piece)

    def _take(self, generator: Any) -> None:
        """Take what a cutter gives next."""
        group, known, names = self._cutting[generator]
        try:
            found = got(next(generator))
            if isinstance(found, FileEnd):
                self._run.ended(group, found)
            elif isinstance(found, str):
                names.append(found)
                if found not in known:
                    self._waiting.append((group, found, next(generator)))
            else:
                del self._cutting[generator]
                self._run.summary.cpu_s += found
                self._run.all_cut(group, names)
        except self._ray.exceptions.RayError as error:
            self._again(group, error)

    def _transcribed(self, call: Any) -> None:
        ray = self._ray
        if call not in self._calls:  # of a group that was given up
            with suppress(ray.exceptions.RayError):
                self._workers.result(call)
            return
        group, name, piece = self._calls.pop(call)
        try:
            self._run.add(group, name, self._workers.result(call))
        except ray.exceptions.RayActorError as error:
            self._attempts[group.id] += 1
            if self._attempts[group.id] < _ATTEMPTS:
                self._waiting.appendleft((group, name, piece))
            else:
                self._again(group, error)
        except ray.exceptions.RayError as error:
            self._again(group, error)

    def _again(self, group: Group, error: Exception) -> None:
        """Cut a group once more, since what was cut, or who cut it, is lost."""
        if self._run.is_finished(group):  # what is lost was of an earlier cutting
            return
        self._attempts[group.id] += 1
        self._waiting = deque(one for one in self._waiting if one[0] != group)
        self._cutting = {g: one for g, one in self._cutting.items() if one[0] != group}
        if self._attempts[group.id] < _ATTEMPTS:
            logger.warning("a cutter or its node died; its files are decoded again")
            self._groups.appendleft(group)
            return
        self._calls = {call: one for call, one in self._calls.items() if one[0] != group}
        why = " ".join(str(error).split())[:200]
        self._run.give_up(group, f"whoever transcribed it died {_ATTEMPTS} times: {why}")
