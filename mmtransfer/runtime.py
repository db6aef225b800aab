"""Threads, device and processes, from the configuration instead of from global state."""

from __future__ import annotations

import atexit
import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransfer.errors import UserError

if TYPE_CHECKING:  # neither is needed to watch a camera, and both take long to load
    import torch
    from accelerate import Accelerator
    from torch.distributed import Store  # type: ignore[attr-defined]

    from mmtransfer.config import Config, RuntimeConfig, TrainConfig

WAIT_S = 24 * 3600
"""How long a process waits for others, which may fill the cache of their node meanwhile."""

_NO_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "failed to map segment")


def cores() -> int:
    """Cores for this process: those it may run on, shared with the processes launched beside it."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def use_runtime(runtime: RuntimeConfig) -> Iterator[None]:
    """The configured number of threads, for as long as the block lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(runtime.threads or cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the machine has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    # Plain ones are of torch's CPU allocator, CTranslate2, MKL in it, and a library being loaded.
    text, kinds = str(error).lower(), (RuntimeError, ImportError)
    return isinstance(error, kinds) and any(words in text for words in _NO_MEMORY)


def _check_device(runtime: RuntimeConfig) -> None:
    import torch

    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda: no usable GPU on this machine. Use auto or cpu.")
    if runtime.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device: mps: not available on this machine. Use auto or cpu.")


def choose_device(runtime: RuntimeConfig) -> torch.device:
    """The device that Accelerate would train on, for inference.

    Raises:
        UserError: a device this machine does not have.
    """
    import torch
    from accelerate import PartialState

    _check_device(runtime)
    if runtime.device == "cpu":
        return torch.device("cpu")
    # Without an Accelerator, whose precision would bind a training run later in this process.
    return PartialState().device


def make_accelerator(
    train: TrainConfig, runtime: RuntimeConfig, run_dir: Path | None = None
) -> Accelerator:
    """An Accelerator from the configuration; `ACCELERATE_*` settings fill in what is `auto`. A
    tracker's files, if it keeps any, go to the run folder.

    Raises:
        UserError: a device or precision this machine does not have, a tracker that is not
            installed, or a distributed type that this loop does not run.
    """
    import torch
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import InitProcessGroupKwargs

    if torch.distributed.is_available():
        import torch.distributed.nn.functional  # later, its defaults would hold the group for ever
    _check_device(runtime)
    tracker = None if train.report_to == "none" else train.report_to
    if tracker is not None and find_spec(tracker) is None:
        raise UserError(f"train.report_to: {tracker} is not installed. pip install {tracker}")
    precision: str | None = train.mixed_precision
    if precision == "auto":
        precision = None  # ACCELERATE_MIXED_PRECISION, if set
        gpu = runtime.device in ("auto", "cuda") and torch.cuda.is_available()
        if "ACCELERATE_MIXED_PRECISION" not in os.environ and gpu:
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=runtime.device == "cpu",
            log_with=tracker,
            project_dir=run_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(
                    init_method=_rendezvous_method(), timeout=timedelta(seconds=WAIT_S)
                )
            ],
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"device {runtime.device} with mixed precision {precision}: {reason}"
        ) from None
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this trainer runs "
            "on one device or data-parallel (MULTI_GPU, MULTI_CPU), each with the whole model: "
            "scores, regularisers and checkpoints are not made of shards. For a model that does "
            "not fit, freeze layers, use adapters or train.gradient_checkpointing."
        )
    if accelerator.num_processes > 1:
        atexit.unregister(_leave_processes)
        atexit.register(_leave_processes)
    return accelerator


def _leave_processes() -> None:
    """End the threads of communication while there is an interpreter: one that lets go of a tensor
    after that aborts the process, whose work is done.
    """
    import torch

    gc.collect()  # what is left of a parallel model holds them too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _rendezvous_method() -> str | None:
    """How the processes of a launcher find each other; None for torch's own way."""
    from torch.distributed.rendezvous import register_rendezvous_handler

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler("mmtransfer", _rendezvous)  # type: ignore[no-untyped-call]
    return "mmtransfer://"


def _rendezvous(url: str, timeout: timedelta) -> Iterator[tuple[Store, int, int]]:
    """Torch's rendezvous, with a part of the store for this start of the processes alone.

    What torchrun restarts is given the store of those that have died (torch 2.12, static and
    c10d), and would wait at their addresses for ever. Its count of restarts differs between nodes.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=timeout))
    yield PrefixStore(_session(store, rank, size, timeout), store), rank, size


def _session(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """The name of a session in which all these processes are, and none that has died before.

    The first process opens one and begins when all others have signed in; whoever comes later,
    in the place of one that is gone, waits for the next.

    Raises:
        TimeoutError: they were not all there in time.
    """
    if rank == 0:
        name = f"session {store.add('sessions', 1)}"
        store.set("session", name)
        places = [f"{name}, process {other}" for other in range(1, size)]
        store.wait(places)
        store.set(f"{name} begins", " ".join(store.get(place).decode() for place in places))
        return name
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("session").decode()
        if store.check([f"{name} begins"]):
            if own in store.get(f"{name} begins").decode().split():
                return name
        else:
            store.set(f"{name}, process {rank}", own)
        time.sleep(0.05)
    raise TimeoutError(f"process {rank} waited {timeout} for process 0")


@contextmanager
def tracked(accelerator: Accelerator, config: Config) -> Iterator[None]:
    """The configured tracker, if any, from now until the block ends, however it ends.

    Raises:
        UserError: the tracker cannot be started.
    """
    if config.train.report_to == "none":
        yield
        return
    values = {
        f"{section}.{name}": value if isinstance(value, (int, float, str, bool)) else str(value)
        for section, fields in config.model_dump(mode="json").items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }
    try:
        accelerator.init_trackers("trackers", config=values)
    except Exception as error:  # whatever it raises: no account, no network, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"train.report_to: {config.train.report_to} cannot be started ({reason})."
        ) from None
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
