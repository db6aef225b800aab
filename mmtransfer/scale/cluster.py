"""A Ray cluster: found or started, with the same versions everywhere, and the workers on it."""

from __future__ import annotations

import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mmtransfer
from mmtransfer.errors import UserError
from mmtransfer.runtime import cores

logger = logging.getLogger(__name__)
_CONNECT_S = 10.0
_LOOK_S = 1.0
_GONE_S = 20.0  # without a head that answers
_ANSWER_S = 30.0  # of a cluster, the start of the process that asks included
_STARTS = 3  # of a worker, one after the other, without success
_OBJECT_BYTES = 32 << 20  # what waits for a worker, at most some of them


def check_workers(ray: str | None, workers: int | None, gpus_per_worker: float) -> None:
    """Make sure that workers are asked for as they can be.

    Raises:
        UserError: fewer than one, or without a cluster.
    """
    if ray is None and (workers is not None or gpus_per_worker):
        raise UserError("workers and gpus_per_worker: expected with ray, found without.")
    if workers is not None and workers < 1:
        raise UserError(f"workers: expected 1 or more, found {workers}.")


def check_ray(address: str) -> None:
    """Make sure that Ray is there, and that something answers at an address.

    Raises:
        UserError: not installed, no address, or no answer in a few seconds.
    """
    ray_module()
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


def ray_module() -> Any:
    """Ray.

    Raises:
        UserError: it is not installed.
    """
    if "ray" not in sys.modules:
        _send_token()
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray. Install it: pip install 'mmtransfer[ray]'.") from None
    return ray


def _send_token() -> None:
    """Have Ray send the token that this machine has; to be called before Ray is imported.

    `ray start --head` asks for one wherever there is one, and Ray itself makes one with the first
    local cluster, but does not send it unasked. A cluster without tokens takes no notice.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    with suppress(OSError):
        token = token or Path(path).read_text(encoding="utf-8", errors="replace")
    if token.strip():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def connected(
    address: str, *, workers: int | None, gpus_per_worker: float, threads: int
) -> Iterator[tuple[int, int]]:
    """Connected to a cluster; how many workers there are, and the threads of each (0: as it fits).

    Raises:
        UserError: no such cluster, another version there, or no room for a worker.
    """
    ray = ray_module()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        wanted = workers or cores()
        threads = threads or max(1, cores() // wanted)
        room = _OBJECT_BYTES * (4 * wanted + 8)
        ray.init(
            num_cpus=max(cores(), wanted * threads),
            object_store_memory=max(room, 256 << 20),
            include_dashboard=False,
            **quiet,
        )
    else:
        threads = threads or 1
        _connect(ray, address, quiet)
    try:
        if address != "local":
            _compare_versions(ray)
        yield _room(ray, workers, gpus_per_worker, threads), threads
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, quiet: Mapping[str, Any]) -> None:
    # Something may take connections there that is no cluster, or one whose head is dead: Ray would
    # wait for it without end, in a call that nothing interrupts.
    look = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check"]
    try:
        asked = [*look, "--address", address]
        found = subprocess.run(asked, timeout=_ANSWER_S, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--ray {address}: no cluster answers there in {_ANSWER_S:g} s. Start one: ray start "
            "--head; or take --ray local."
        ) from None
    if b"InvalidAuthToken" in found.stderr:
        raise UserError(
            f"--ray {address}: the cluster asks for its token, which this machine does not have. "
            "Put that of the cluster's head into ~/.ray/auth_token here, or into RAY_AUTH_TOKEN."
        )
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


def _room(ray: Any, workers: int | None, gpus: float, threads: int) -> int:
    """How many workers there are: as many as were asked for, or as there is room for."""
    there = ray.cluster_resources()
    by_cpu = int(there.get("CPU", 0) // threads)
    by_gpu = int(there.get("GPU", 0) // gpus) if gpus else by_cpu
    most = min(by_cpu, by_gpu)
    if most < 1 or most < (workers or 1):
        raise UserError(
            f"workers: expected room for {workers or 1} with {threads} CPUs and {gpus:g} "
            f"GPUs each, found {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs."
        )
    return workers or most


class Head:
    """The head of the cluster, without which Ray ends this process after a minute, in its words.

    `resumes` says what goes on later where it is gone.
    """

    def __init__(self, address: str, resumes: str):
        host, _, port = address.rpartition(":")
        self._address, self._place = address, (host.strip("[]"), int(port))
        self._resumes = resumes
        self._seen = self._looked = time.monotonic()

    def check(self) -> None:
        """Make sure, now and then, that it takes connections.

        Raises:
            UserError: it has not for some time.
        """
        if time.monotonic() - self._looked < _GONE_S / 4:
            return
        try:
            socket.create_connection(self._place, timeout=_LOOK_S).close()
            self._seen = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._seen > _GONE_S:
                why = error.strerror or error
                raise UserError(
                    f"the head of the cluster, {self._address}, does not answer any more ({why}). "
                    f"{self._resumes} once there is a cluster again."
                ) from None
        self._looked = time.monotonic()


class Workers:
    """Actors with a method `open`, and calls of their methods; one that dies is replaced.

    `opened` is called with what `open` gave, and returns how many calls wait at one worker.
    """

    def __init__(self, make: Callable[[], Any], count: int, opened: Callable[[Any], int]):
        self._ray, self._make, self._count, self._opened = ray_module(), make, count, opened
        self._slots = 1
        self._starting: dict[Any, Any] = {}  # what its opening gives -> worker
        self._busy: dict[Any, int] = {}  # worker -> its calls
        self._calls: dict[Any, Any] = {}  # call -> worker
        self._failed_starts = 0
        self._head = Head(self._ray.get_runtime_context().gcs_address, "The same command goes on")
        for _ in range(count):
            self._start()

    def __len__(self) -> int:
        """How many have opened."""
        return len(self._busy)

    def wait(self, others: Iterable[Any] = ()) -> list[Any]:
        """One reference that is ready, or none after a moment: such that `result` or `settle_start`
        take, or one of others.

        Raises:
            UserError: the cluster is gone.
        """
        self._head.check()
        awaited = [*self._starting, *self._calls, *others]
        ready: list[Any] = self._ray.wait(awaited, timeout=_LOOK_S)[0]
        return ready

    @property
    def has_room(self) -> bool:
        """Whether one of them takes another call."""
        return any(calls < self._slots for calls in self._busy.values())

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker with the fewest calls; returns the reference."""
        worker = min(self._busy, key=lambda worker: self._busy[worker])
        self._busy[worker] += 1
        call = getattr(worker, method).remote(*arguments)
        self._calls[call] = worker
        return call

    def settle_start(self, ready: Any) -> bool:
        """Take note of a worker that has opened, if that is what is ready.

        Raises:
            UserError: it cannot work, or they die one after the other.
        """
        worker = self._starting.pop(ready, None)
        if worker is None:
            return False
        try:
            self._slots = self._opened(got(ready))
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS * self._count:
                why = " ".join(str(error).split())[:300]
                raise UserError(f"workers die before they begin: {why}") from None
            self._start()
            return True
        self._failed_starts = 0
        self._busy[worker] = 0
        return True

    def result(self, call: Any) -> Any:
        """What a call gave.

        Raises:
            UserError: it found something that cannot be used.
            RayError: who worked on it died, or what it worked with is lost.
        """
        worker = self._calls.pop(call)
        if worker in self._busy:
            self._busy[worker] -= 1
        try:
            return got(call)
        except self._ray.exceptions.RayActorError:
            if self._busy.pop(worker, None) is not None:  # once for all its calls
                logger.warning("a worker died; another one takes its place")
                self._ray.kill(worker)
                self._start()
            raise

    def cpu_s(self) -> float:
        """Processor time that those which live took, by their method of that name."""
        total = 0.0
        for used in [worker.cpu_s.remote() for worker in self._busy]:
            with suppress(self._ray.exceptions.RayError):  # one that dies now has done its work
                total += self._ray.get(used)
        return total

    def _start(self) -> None:
        worker = self._make()
        self._starting[worker.open.remote()] = worker


def got(ref: Any) -> Any:
    """What a task gave.

    Raises:
        UserError: it found something that cannot be used.
        RayError: who worked on it died, or what it worked with is lost.
    """
    ray = ray_module()
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None


def other_weights(model: str) -> UserError:
    """The error when a worker has another model by the same name."""
    return UserError(
        f"{model}: a worker has other weights by this name than this machine. Name a model that is "
        "the same on all nodes (a Hub id with @REVISION)."
    )
