"""What the processes of a run do together, on one node or on several.

The main process alone uses the run folder, so that nodes need not share it: what the others need
from there is sent to them. A `UserError` in one process is raised in all, so that none waits for
one that has ended.
"""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    broadcast,
    broadcast_object_list,
    gather_object,
    recursively_apply,
)

from mmtransfer.errors import UserError
from mmtransfer.runtime import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


class LostProcessError(UserError):
    """Another process has ended or does not answer."""


def agreed(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something in every process.

    Raises:
        UserError: in all of them, what one of them raised.
    """
    if accelerator.num_processes == 1:
        return work()
    result, problem = _attempt(work)
    _raise_any(accelerator, problem)
    return result  # type: ignore[return-value]


def in_turn(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something in the first process of each node, then in its others, which find in the cache
    what it put there.

    Raises:
        UserError: in all of them, what one of them raised.
    """
    if accelerator.num_processes == 1:
        return work()
    result: T | None = None
    for turn in (True, False):
        problem = None
        if accelerator.is_local_main_process is turn:
            result, problem = _attempt(work)
        _raise_any(accelerator, problem)
    return result  # type: ignore[return-value]


def from_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something in the main process; all get what it gives, tensors in dictionaries, lists and
    tuples one at a time.

    Raises:
        UserError: in all of them, what it raised.
    """
    if accelerator.num_processes == 1:
        return work()
    result, problem = _attempt(work) if accelerator.is_main_process else (None, None)
    _raise_any(accelerator, problem)
    tensors: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return torch.empty_like(tensor, device="meta")

    def take(shape: torch.Tensor) -> torch.Tensor:
        if accelerator.is_main_process:
            whole = tensors.pop(0).to(accelerator.device).contiguous()
        else:
            whole = torch.empty(shape.shape, dtype=shape.dtype, device=accelerator.device)
        return broadcast(whole).cpu()

    skeleton = recursively_apply(put, result)
    return recursively_apply(take, broadcast_object_list([skeleton])[0])


def spread(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> None:
    """Put the main process's values into everybody's tensors."""
    if accelerator.num_processes == 1:
        return
    seen: set[int] = set()
    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                whole = tensor.detach().to(accelerator.device).contiguous()
                tensor.copy_(broadcast(whole))


def check_same(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Make sure that all processes have the same data, source and settings, by name.

    Raises:
        UserError: one of them has others.
    """
    if accelerator.num_processes == 1:
        return
    found = gather_object([(_place(accelerator), dict(values))])
    (main, expected), *others = found
    for place, own in others:
        for name, value in own.items():
            if value != expected[name]:
                raise UserError(
                    f"{name}: expected the same in all processes, found {expected[name]} in {main} "
                    f"and {value} in {place}. Put the same there."
                )


def check_run_folder(accelerator: Accelerator, run_dir: Path) -> None:
    """Say where the results will be, if not all nodes see the run folder.

    Raises:
        UserError: the main process has no checkpoint there, and another process has.
    """
    if accelerator.num_processes == 1:
        return
    has_run = gather_object([(_place(accelerator), (run_dir / "checkpoints").exists())])
    main, is_there = has_run[0]
    holders = [place for place, has in has_run if has]
    if holders and not is_there:
        raise UserError(
            f"{run_dir}: the checkpoint lies with {holders[0]}, and {main} has none. Let that node "
            "be the first (--node-rank 0, --machine_rank 0), copy the folder there, or remove it."
        )
    token = run_dir / f".seen-{broadcast_object_list([uuid.uuid4().hex])[0]}"

    def touch() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        token.touch()

    from_main(accelerator, touch)
    sees = gather_object([(_place(accelerator), token.exists())])
    if accelerator.is_main_process:
        token.unlink()
    blind = [place for place, does in sees if not does]
    if blind and accelerator.is_main_process:
        logger.info(
            "%s is not shared: checkpoints and results are written by %s alone, and %s %s none",
            run_dir,
            main,
            ", ".join(blind),
            "have" if len(blind) > 1 else "has",
        )


@contextmanager
def lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """The end of another process as one line.

    Raises:
        LostProcessError: one has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or is_out_of_memory(error) or not _is_lost(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise LostProcessError(
            f"another process of this run has ended or does not answer ({reason}). Its own output "
            "says why; start all of them again with --resume."
        ) from None


def _is_lost(error: RuntimeError) -> bool:
    # Gloo raises a plain RuntimeError.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _place(accelerator: Accelerator) -> str:
    return f"process {accelerator.process_index} on {socket.gethostname()}"


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


def _raise_any(accelerator: Accelerator, problem: str | None) -> None:
    """Raise the first problem that any process has, in all of them."""
    pairs = gather_object([(_place(accelerator), problem)])
    for place, found in pairs:
        if found is not None:
            where = "" if place == pairs[0][0] or found == problem else f" ({place})"
            raise UserError(found + where)
