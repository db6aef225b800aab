"""The same run on a Ray cluster: tasks that cut, actors that recognise, one process that writes.

Plain tasks and actors rather than Ray Data: a piece is one object, made by a generator that waits
while too many are in the object store; rows are small, so the driver alone writes them, which makes
them exactly once by the same few lines as in one process. Whatever dies (worker, node, object), its
group is cut again without the pieces that are there, as after a restart; Ray's own retries, which
would know less, are off.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mmtransfer
from mmtransfer.errors import UserError
from mmtransfer.monitoring.loading import resolve_models
from mmtransfer.monitoring.options import RecognitionOptions
from mmtransfer.monitoring.sound_events import SoundClasses
from mmtransfer.runtime import cores
from mmtransfer.scale.pieces import FileEnd, Piece, cut
from mmtransfer.scale.recognising import Line, open_sounds, open_transcriber, settings_of
from mmtransfer.scale.sources import BulkFile, Group
from mmtransfer.scale.transcribe import BulkOptions, BulkRun

logger = logging.getLogger(__name__)
_CONNECT_S = 10.0
_LOOK_S = 1.0
_ATTEMPTS = 5  # at a group whose worker or node died under it
_STARTS = 3  # of a worker, one after the other, without success
_WORKERS_PER_CUTTER = 4  # decoding and voice activity take a tenth of what recognition takes
_AHEAD = 4  # objects of a cutter that wait: two pieces, and what says what they are
_PIECE_BYTES = 32 << 20


def check_ray(address: str) -> None:
    """Make sure that Ray is there, and that something answers at an address.

    Raises:
        UserError: not installed, no address, or no answer in a few seconds.
    """
    _ray()
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UserError(
            f"--ray {address}: expected local, auto or HOST:PORT of a cluster. A ray:// address is "
            "of its client: run this command on a node of the cluster instead."
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"--ray {address}: no answer in {_CONNECT_S:g} s ({why}). Start a cluster: "
            "ray start --head."
        ) from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray. Install it: pip install 'mmtransfer[ray]'.") from None
    return ray


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
    group: Group, window_s: float, known: set[int], options: RecognitionOptions
) -> Iterator[Any]:
    """What `cut` gives, as objects: ends as they are, of a piece its number and, if it is not
    known, the piece; last the processor time that it took.
    """
    started = time.process_time()
    if options.sounds is not None and not _sounds:
        _sounds.append(open_sounds(options))
    for found in cut(group, window_s, _sounds[0] if _sounds else None):
        if isinstance(found, FileEnd):
            yield found
            continue
        yield found.number
        if found.number not in known:
            yield found
    yield time.process_time() - started


_sounds: list[SoundClasses | None] = []  # of this process, which cuts one group after the other


def transcribe_on_ray(run: BulkRun, options: BulkOptions, settings: Mapping[str, Any]) -> None:
    """Transcribe what is to be done on a cluster.

    Raises:
        UserError: no such cluster, another version or other weights there, or no room for a worker.
    """
    with _cluster(options) as (workers, recognition):
        run.summary.workers = workers
        _Driver(run, options, recognition, settings, workers).work()


@contextmanager
def _cluster(options: BulkOptions) -> Iterator[tuple[int, RecognitionOptions]]:
    """Connected; how many workers there are, and their options."""
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    recognition = _by_whole_paths(options.recognition)
    if options.ray == "local":
        wanted = options.workers or cores()
        recognition = replace(recognition, threads=recognition.threads or max(1, cores() // wanted))
        room = _PIECE_BYTES * (4 * wanted + 8)
        ray.init(
            num_cpus=max(cores(), wanted * recognition.threads),
            object_store_memory=max(room, 256 << 20),
            include_dashboard=False,
            **quiet,
        )
    else:
        recognition = replace(recognition, threads=recognition.threads or 1)
        _connect(ray, str(options.ray), quiet)
    try:
        if options.ray != "local":
            _compare_versions(ray)
        yield _room(ray, options, recognition.threads), recognition
    finally:
        ray.shutdown()


def _by_whole_paths(options: RecognitionOptions) -> RecognitionOptions:
    """Options that name models in folders wherever a worker runs."""
    names = {name: getattr(options, name) for name in ("model", "sentiment", "sounds")}
    folders: dict[str, Any] = {
        name: str(Path(at).resolve()) for name, at in names.items() if at and Path(at).exists()
    }
    return replace(options, **folders)


def _connect(ray: Any, address: str, quiet: Mapping[str, Any]) -> None:
    try:
        ray.init(address=address, **quiet)
    except ConnectionError:
        raise UserError(
            f"--ray {address}: found no running cluster. Start one: ray start --head; or take "
            "--ray local."
        ) from None
    except RuntimeError as error:  # other versions of Ray and Python
        raise UserError(f"--ray {address}: {' '.join(str(error).split())[:300]}") from None


def _compare_versions(ray: Any) -> None:
    def found() -> tuple[str | None, str]:
        # By value: it runs also where the package is not there.
        import platform

        try:
            import mmtransfer
        except ImportError:
            return None, platform.python_version()
        return mmtransfer.__version__, platform.python_version()

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = (mmtransfer.__version__, platform.python_version())
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    tasks = {
        ray.remote(found)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(): name
        for node, name in nodes.items()
    }
    for task, name in tasks.items():
        there = ray.get(task)
        if there != own:
            version = "none" if there[0] is None else there[0]
            raise UserError(
                f"node {name}: expected mmtransfer {own[0]} on Python {own[1]}, found {version} on "
                f"Python {there[1]}. Install the same on every node: "
                f"pip install 'mmtransfer[ray]=={own[0]}'."
            )


def _room(ray: Any, options: BulkOptions, threads: int) -> int:
    """How many workers there are: as many as were asked for, or as there is room for."""
    there, gpus = ray.cluster_resources(), options.gpus_per_worker
    by_cpu = int(there.get("CPU", 0) // threads)
    by_gpu = int(there.get("GPU", 0) // gpus) if gpus else by_cpu
    most = min(by_cpu, by_gpu)
    if most < 1 or most < (options.workers or 1):
        raise UserError(
            f"workers: expected room for {options.workers or 1} with {threads} CPUs and {gpus:g} "
            f"GPUs each, found {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs."
        )
    return options.workers or most


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
        self._ray = ray = _ray()
        self._run, self._settings, self._count = run, settings, workers
        self._actor = ray.remote(Worker).options(
            num_cpus=recognition.threads,
            num_gpus=options.gpus_per_worker,
            max_concurrency=recognition.threads + 1,
        )
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
        self._slots = 2  # calls at one worker; one of them waits there
        self._starting: dict[Any, Any] = {}  # what its opening gives -> worker
        self._busy: dict[Any, int] = {}  # worker -> its calls
        self._failed_starts = 0
        self._groups = deque(run.todo)
        # Generator -> group, pieces that it leaves out, pieces so far.
        self._cutting: dict[Any, tuple[Group, set[int], int]] = {}
        self._waiting: deque[tuple[Group, int, Any]] = deque()  # pieces
        self._calls: dict[Any, tuple[Any, Group, int, Any]] = {}
        self._attempts: Counter[str] = Counter()

    def work(self) -> None:
        """Until all groups are finished."""
        ray = self._ray
        for _ in range(self._count):
            self._start()
        while self._groups or self._cutting or self._waiting or self._calls:
            self._hand_out()
            # Not taken out, what is cut waits in its generator, and that waits in turn.
            has_room = len(self._waiting) < max(1, len(self._busy))
            awaited = [*self._starting, *self._calls, *(self._cutting if has_room else ())]
            for ready in ray.wait(awaited, timeout=_LOOK_S)[0]:
                if ready in self._starting:
                    self._opened(ready)
                elif ready in self._calls:
                    self._transcribed(ready)
                else:
                    self._take(ready)
        for used in [worker.cpu_s.remote() for worker in self._busy]:
            with suppress(ray.exceptions.RayError):  # one that dies now has done its work
                self._run.summary.cpu_s += ray.get(used)

    def _start(self) -> None:
        worker = self._actor.remote(self._recognition)
        self._starting[worker.open.remote()] = worker

    def _opened(self, ready: Any) -> None:
        worker = self._starting.pop(ready)
        try:
            settings, self._window_s, at_once = self._got(ready)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS * self._count:
                why = " ".join(str(error).split())[:300]
                raise UserError(f"workers die before they begin: {why}") from None
            self._start()
            return
        if settings != dict(self._settings):
            raise UserError(
                f"{self._recognition.model}: a worker has other weights by this name than this "
                "machine. Name a model that is the same on all nodes (a Hub id with @REVISION)."
            )
        self._failed_starts = 0
        self._slots = at_once + 1
        self._busy[worker] = 0

    def _hand_out(self) -> None:
        while self._groups and self._window_s is not None and len(self._cutting) < self._cutters:
            group = self._groups.popleft()
            called = {n for _, own, n, _ in self._calls.values() if own == group}
            known = self._run.begin(group) | called
            self._cutting[self._cut.remote(group, self._window_s, known, self._recognition)] = (
                group,
                known,
                0,
            )
        while self._waiting and self._busy:
            worker = min(self._busy, key=lambda worker: self._busy[worker])
            if self._busy[worker] >= self._slots:
                return
            group, number, piece = self._waiting.popleft()
            self._busy[worker] += 1
            call = worker.transcribe.remote(piece, group.files)
            self._calls[call] = (worker, group, number, piece)

    def _take(self, generator: Any) -> None:
        """Take what a cutter gives next."""
        group, known, count = self._cutting[generator]
        try:
            found = self._got(next(generator))
            if isinstance(found, FileEnd):
                self._run.ended(group, found)
            elif isinstance(found, int):
                self._cutting[generator] = (group, known, count + 1)
                if found not in known:
                    self._waiting.append((group, found, next(generator)))
            else:
                del self._cutting[generator]
                self._run.summary.cpu_s += found
                self._run.all_cut(group, count)
        except self._ray.exceptions.RayError as error:
            self._again(group, error)

    def _transcribed(self, call: Any) -> None:
        ray = self._ray
        worker, group, number, piece = self._calls.pop(call)
        if worker in self._busy:
            self._busy[worker] -= 1
        try:
            self._run.add(group, number, self._got(call))
        except ray.exceptions.RayActorError as error:
            if self._busy.pop(worker, None) is not None:  # once for all its calls
                logger.warning("a worker died; another one takes its place")
                ray.kill(worker)
                self._start()
            self._attempts[group.id] += 1
            if self._attempts[group.id] < _ATTEMPTS:
                self._waiting.appendleft((group, number, piece))
            else:
                self._again(group, error)
        except ray.exceptions.RayError as error:
            self._again(group, error)

    def _again(self, group: Group, error: Exception) -> None:
        """Cut a group once more, since what was cut, or who cut it, is lost."""
        self._attempts[group.id] += 1
        self._waiting = deque(one for one in self._waiting if one[0] != group)
        self._cutting = {g: one for g, one in self._cutting.items() if one[0] != group}
        if self._attempts[group.id] < _ATTEMPTS:
            logger.warning("a cutter or its node died; its files are decoded again")
            self._groups.appendleft(group)
            return
        self._calls = {call: one for call, one in self._calls.items() if one[1] != group}
        why = " ".join(str(error).split())[:200]
        self._run.give_up(group, f"whoever transcribed it died {_ATTEMPTS} times: {why}")

    def _got(self, ref: Any) -> Any:
        """What a task gave.

        Raises:
            UserError: it said that something cannot be used.
            RayError: who worked on it died, or what it worked with is lost.
        """
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
