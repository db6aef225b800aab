"""Training on a Ray cluster: Ray Train starts the workers, each runs the same loop, and starts them
all again from the last checkpoint when one dies.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmtransfer.config import Config, build_config, merge, resolved
from mmtransfer.data.files import read_json
from mmtransfer.errors import UserError
from mmtransfer.runs.training import claim, train
from mmtransfer.runtime import WAIT_S
from mmtransfer.scale.cluster import Head, check_ray, check_workers, connected, got, ray_module
from mmtransfer.transfer.processes import LostProcessError

logger = logging.getLogger(__name__)
_STARTS_AGAIN = 3  # of all workers, when one of them died
_LOOK_S = 1.0
_LOG_EVERY_S = 10.0
_SEEN = ".seen-by-workers"  # in the run folder, while workers start


def train_on_ray(
    config: Config,
    ray: str,
    *,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    resume: bool = False,
) -> dict[str, Any]:
    """`train` by the workers of a cluster (`local`, `auto` or HOST:PORT); returns the report.

    A batch is that of all workers together. The run folder must be one that all nodes see.

    Raises:
        UserError: what `train` refuses, no such cluster, no room for the workers, a node that does
            not see the run folder, or workers that die again and again.
    """
    check_workers(ray, workers, gpus_per_worker)
    if gpus_per_worker not in (0, 1):
        raise UserError(f"gpus_per_worker: expected 0 or 1 in training, found {gpus_per_worker:g}.")
    if config.search.space or config.transfer.preset == "auto":
        raise UserError("--ray trains one structure; search and auto choose it in one process.")
    check_ray(ray)
    run_dir = Path(config.run_dir).resolve()
    claim(run_dir, resume)
    with connected(
        ray,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        threads=config.runtime.threads,
    ) as (count, threads):
        runtime: dict[str, Any] = {"threads": threads}
        if not gpus_per_worker and config.runtime.device == "auto":
            runtime["device"] = "cpu"
        values = merge(resolved(config), {"run_dir": str(run_dir), "runtime": runtime})
        if (source := Path(config.source_model)).exists():  # workers run in other folders
            values["source_model"] = str(source.resolve())
        _fit(values, run_dir, count, threads, int(gpus_per_worker))
    report: dict[str, Any] = read_json(run_dir / "report.json")
    return report


def _fit(values: dict[str, Any], run_dir: Path, count: int, threads: int, gpus: int) -> None:
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    ray = ray_module()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    problems = ray.remote(_Problems).options(num_cpus=0).remote()
    address = ray.get_runtime_context().gcs_address
    head = Head(address, "--resume goes on from the last checkpoint")
    run_dir.mkdir(parents=True, exist_ok=True)
    seen = run_dir / _SEEN
    seen.touch()
    try:
        # Ray Train keeps notes of its own; checkpoints are ours.
        with tempfile.TemporaryDirectory(prefix="mmtransfer-ray-") as notes:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"values": values, "problems": problems},
                torch_config=TorchConfig(timeout_s=WAIT_S),
                scaling_config=ScalingConfig(
                    num_workers=count,
                    use_gpu=bool(gpus),
                    resources_per_worker={"CPU": threads, **({"GPU": gpus} if gpus else {})},
                ),
                run_config=RunConfig(
                    name="run",
                    storage_path=notes,
                    failure_config=FailureConfig(max_failures=_STARTS_AGAIN),
                ),
            )
            with _followed(run_dir / "metrics.jsonl"):
                failure = _failure(trainer, head)
    finally:
        seen.unlink(missing_ok=True)
    problem = got(problems.first.remote())
    if problem is not None:
        raise UserError(problem)
    if failure is not None:
        raise UserError(
            f"{run_dir}: workers died {_STARTS_AGAIN + 1} times ({failure}). The checkpoint is "
            "kept; --resume continues."
        )


@contextmanager
def _followed(metrics: Path) -> Iterator[None]:
    """Log scores as the workers write them, and a step now and then, while the block lasts."""
    ended = threading.Event()
    start = metrics.stat().st_size if metrics.exists() else 0

    def follow(position: int, last_log: float = 0.0) -> None:
        while not ended.wait(_LOOK_S):
            if not metrics.exists():
                continue
            with metrics.open(encoding="utf-8") as file:
                # Workers that start again leave out what lies behind their checkpoint.
                file.seek(min(position, metrics.stat().st_size))
                rows = file.read()
                position = file.tell()
            for row in _rows(rows):
                scores = {name: row[name] for name in row if name.startswith("validation_")}
                if scores or time.monotonic() - last_log > _LOG_EVERY_S:
                    last_log = time.monotonic()
                    shown = scores or {"loss": row.get("loss")}
                    found = [
                        f"{name} {value:.4f}" for name, value in shown.items() if value is not None
                    ]
                    logger.info("step %s: %s", row.get("step"), ", ".join(found))

    follower = threading.Thread(target=follow, args=[start], daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _rows(text: str) -> Iterator[dict[str, Any]]:
    """The rows of lines of JSON; one that is not whole yet is left out."""
    for line in text.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def _failure(trainer: Any, head: Head) -> str | None:
    """Let Ray Train run while the cluster has its head; why it failed, if it did.

    Raises:
        KeyboardInterrupt: SIGINT.
        UserError: the cluster is gone.
    """
    failures: list[str] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # of any kind: Ray's versions differ in what they raise
            failures.append(" ".join(str(error).split())[:300])

    # In a thread of its own, since without a head it never returns, and takes SIGINT for itself.
    running = threading.Thread(target=fit, daemon=True)
    running.start()
    try:
        while running.is_alive():
            running.join(_LOOK_S)
            head.check()
    except KeyboardInterrupt:
        logger.warning("stopped; --resume continues from the last checkpoint")
        raise
    return failures[0] if failures else None


class _Problems:
    """An actor that keeps the first `UserError` of the workers: Ray would start them again."""

    def __init__(self) -> None:
        self._first: str | None = None

    def put(self, problem: str) -> None:
        self._first = self._first or problem

    def first(self) -> str | None:
        return self._first


def _work(given: dict[str, Any]) -> None:
    """What each worker runs."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    is_first = os.environ["RANK"] == "0"
    logging.getLogger("mmtransfer").setLevel(logging.INFO if is_first else logging.WARNING)
    config = build_config(given["values"])
    try:
        if not (Path(config.run_dir) / _SEEN).exists():
            raise UserError(
                f"{config.run_dir}: expected a run folder that all nodes see, found that "
                f"{os.uname().nodename} does not. Put it on a file system that they share."
            )
        train(config, resume=True)
    except LostProcessError:
        raise  # so that Ray starts all of them again
    except UserError as error:
        ray_module().get(given["problems"].put.remote(str(error)))
