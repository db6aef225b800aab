"""The training loop, on Accelerate, for every task and every stage.

One optimiser step takes one planned batch. Each process takes its share of it as micro-batches;
the loss is summed over target units and divided by their number over all processes, so that the
gradient does not depend on how the batch was cut or on how many processes there are. Gradients are
summed over processes while the last backward pass goes on. Everything random is a function of seed,
epoch, step and example, so a run that resumes from a checkpoint repeats the uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmtransfer.cache import atomic_path
from mmtransfer.config import Config
from mmtransfer.data.files import read_json
from mmtransfer.errors import UserError
from mmtransfer.progress import TrainingProgress
from mmtransfer.runtime import is_out_of_memory
from mmtransfer.transfer.gradients import GradientSums
from mmtransfer.transfer.processes import agreed, from_main, in_turn, spread
from mmtransfer.transfer.resume import (
    read_checkpoint,
    read_position,
    read_weights,
    whole_checkpoint,
    write_checkpoint,
    write_weights,
)
from mmtransfer.transfer.stages import SourcePath, Stage
from mmtransfer.transfer.task import Task, comparable

logger = logging.getLogger(__name__)
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the way from the source's weights: tried
_SPENT = 0.003  # of the validation metric, for keeping more of the source


Watch = Callable[[int, float], None]
"""Is given step and validation score after every evaluation."""


class Interrupted(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop and has written a checkpoint."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}; a checkpoint is written, --resume continues")
        self.step = step
        self.exit_code = 128 + signal_number


class NotFiniteError(UserError):
    """A loss or a gradient that is not finite."""


@dataclass
class TrainState:
    """Where a run stands, beside weights and optimiser."""

    stage: int = 0
    offset: int = 0
    """Steps of earlier stages."""
    step: int = 0
    """Steps of this stage."""
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    best: float | None = None
    """Best validation score; None before the first evaluation."""
    best_tie: float = 0.0
    """Its value of the metric that decides between equal scores; lower is better."""
    best_step: int = 0
    """Its step, counted over all stages."""
    evaluations_since_best: int = 0
    seconds: float = 0.0
    """Wall-clock training time, over all sessions of the run."""
    units: float = 0.0
    """Audio seconds or tokens (what the task counts) trained on."""
    splits: int = 0
    """How often micro-batches are halved, after running out of memory."""


@dataclass(frozen=True)
class TrainResult:
    """What a stage cost and where its best weights come from."""

    steps: int
    epochs: float
    best_step: int
    best: float | None
    best_tie: float
    metric: str
    seconds: float
    units: float
    early_stopped: bool
    trained_parameters: int


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals can only be handled in the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("stopping after this step, to write a checkpoint")

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_stages(
    task: Task,
    stages: Sequence[Stage],
    config: Config,
    accelerator: Accelerator,
    run_dir: Path,
    *,
    resume: bool = False,
    watch: Watch | None = None,
) -> list[TrainResult]:
    """Train the stages of a transfer one after the other; leaves the best weights in the model.

    A stage starts from the best weights of the one before and, if it trains the task's own loss,
    does not end below them on the validation data by more than chance. What `watch` raises ends the
    run.

    Raises:
        Interrupted: SIGINT or SIGTERM; a checkpoint is written.
        UserError: a loss that is not finite, no memory for a single example, or a checkpoint of
            another run.
    """
    folder = run_dir / "checkpoints"
    finished = folder / "stages.json"
    results: list[TrainResult] = []
    state = TrainState()
    saved = from_main(accelerator, lambda: read_position(folder / "last")) if resume else None
    with whole_checkpoint(folder):
        first = int(saved["stage"]) if saved is not None else 0
    if first:

        def read_stage() -> list[dict[str, Any]]:
            with whole_checkpoint(folder):
                read_weights(folder / f"stage-{first}.safetensors", task.model)
                return list(read_json(finished)[:first])

        rows = from_main(accelerator, read_stage)
        spread(accelerator, task.model.state_dict().values())
        with whole_checkpoint(folder):
            results = [TrainResult(**row) for row in rows]
    for stage in stages[first:]:
        state = TrainState(
            stage=stage.number,
            offset=sum(result.steps for result in results),
            splits=state.splits,
        )
        if results and stages[stage.number - 1].objective == "target":
            before = results[-1]
            state.best, state.best_tie = before.best, before.best_tie
            state.best_step = before.best_step
        if len(stages) > 1:
            logger.info("stage %d of %d", stage.number + 1, len(stages))
        trainer = Trainer(task, stage, config, accelerator, run_dir, state, watch)
        results.append(trainer.run(resume=saved is not None and saved["stage"] == stage.number))
        state = trainer.state
        last = stage is stages[-1]
        task.end(last=last)
        if accelerator.device.type == "cpu":
            # All that the next line would let go of. It collects garbage as well, which takes as
            # long as many steps of a small model, and nothing here is garbage in a cycle.
            accelerator._optimizers.clear()
        else:
            accelerator.free_memory()
        if accelerator.is_main_process and not last:
            write_weights(folder / f"stage-{stage.number + 1}.safetensors", task.model)
            with atomic_path(finished) as part:
                part.write_text(json.dumps([asdict(row) for row in results]), encoding="utf-8")
        accelerator.wait_for_everyone()
    return results


def evaluate_task(
    task: Task, accelerator: Accelerator, *, on_path: bool = False
) -> dict[str, float | None]:
    """Validation metrics; each process scores its share, all get the same result. `on_path`: of the
    examples that decide how far weights go back to the source.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    size = task.path_size if on_path else task.validation_size
    validate = task.validate_path if on_path else task.validate
    mine = list(range(size))[rank::world]
    records = validate(mine, accelerator.device) if mine else []
    pairs = gather_object(list(zip(mine, records, strict=True)))
    ordered = [record for _, record in sorted(pairs, key=lambda pair: pair[0])]
    return task.summarize(ordered)


def go_back(task: Task, path: SourcePath, wanted: float | str, accelerator: Accelerator) -> float:
    """Put weights between the source's and the tuned ones into the model; returns the share of the
    way.

    `wanted` is that share, or auto: from the tuned weights on towards the source, as long as the
    validation score stays within 0.003 of the best on the way.
    """
    path.close(task.model)
    if wanted != "auto":
        path.go(float(wanted))
        return float(wanted)
    sign = -1 if task.higher_is_better else 1
    best, kept = math.inf, 1.0
    for share in _SHARES:
        path.go(share)
        score = comparable(evaluate_task(task, accelerator, on_path=True), task.metric)
        logger.info(
            "interpolation %g between source and tuned weights: %s %.4f", share, task.metric, score
        )
        if sign * score - best > _SPENT:
            break
        best, kept = min(best, sign * score), share
    path.go(kept)
    return kept


def standard_error(score: float, examples: int) -> float:
    """About that of a score from 0 to 1, as if each example were right or wrong; not 0 where all or
    none are (Agresti & Coull 1998).
    """
    share = (min(max(score, 0.0), 1.0) * examples + 2) / (examples + 4)
    return math.sqrt(share * (1 - share) / (examples + 4))


class Trainer:
    """Trains one stage of a task into a run folder; see the module's docstring for how."""

    def __init__(
        self,
        task: Task,
        stage: Stage,
        config: Config,
        accelerator: Accelerator,
        run_dir: Path,
        state: TrainState | None = None,
        watch: Watch | None = None,
    ):
        self._watch = watch
        self.task, self.stage, self.config, self.runtime = task, stage, config.train, config.runtime
        self.accelerator, self.run_dir = accelerator, run_dir
        self.checkpoint = run_dir / "checkpoints" / "last"
        self.best_weights = run_dir / "checkpoints" / f"best-{stage.number}.safetensors"
        self.metrics_path = run_dir / "metrics.jsonl"
        self.state = state or TrainState(stage=stage.number)
        self._fixed = {
            name: getattr(config, name).model_dump(mode="json")
            for name in ("train", "transfer", "head", "augment")
        }
        for name in ("report_to", "keep_checkpoints"):  # change nothing that is trained
            del self._fixed["train"][name]
        # The training set by its content, wherever it lies.
        self._fixed["data"] = config.data.model_dump(mode="json") | {"train": task.fingerprint}
        self._fixed["evaluation"] = {"normalizer": config.evaluation.normalizer}
        self._seed = (config.runtime.seed, stage.number)
        task.model.to(accelerator.device)
        # The others of a node find its first one's activations in the cache.
        in_turn(accelerator, lambda: task.begin(stage, accelerator.device))
        self._budget = task.batch_budget * self.config.gradient_accumulation
        self._budget *= accelerator.num_processes
        self._plans: dict[int, list[list[int]]] = {}
        self.total_steps = self._count_steps()
        groups = task.parameter_groups()
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        fused = accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, fused=fused)
        self.optimizer: Any = accelerator.prepare(optimizer)
        self._sums: GradientSums | None = None
        if accelerator.num_processes > 1:
            self._sums = GradientSums([p for p in task.model.parameters() if p.requires_grad])

    # --- plan ---------------------------------------------------------------------------------

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self._plans:
            # Two are kept: batches are prepared ahead, across the end of an epoch.
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = self.task.plan(self._budget, seed=self._seed, epoch=epoch)
        return self._plans[epoch]

    def _count_steps(self) -> int:
        if self.stage.steps is not None:
            return self.stage.steps
        epochs = self.stage.epochs or 1.0
        # The number of batches can differ by a few between epochs, so they are counted.
        whole = int(epochs)
        steps = sum(len(self._batches(epoch)) for epoch in range(whole))
        if epochs > whole:
            steps += math.ceil((epochs - whole) * len(self._batches(whole)))
        return max(1, steps)

    def _upcoming(self) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, batch, indices) of every step from the state's position on."""
        epoch, batch = self.state.epoch, self.state.batch
        for _ in range(self.state.step, self.total_steps):
            while batch >= len(self._batches(epoch)):
                epoch, batch = epoch + 1, 0
            yield epoch, batch, self._batches(epoch)[batch]
            batch += 1

    def _prepared(self) -> Iterator[tuple[int, int, list[int], list[Any]]]:
        """Steps with this process's micro-batches, prepared ahead by worker threads."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        waiting: list[tuple[int, int, list[int], Future[list[Any]]]] = []
        workers = max(1, self.config.workers)
        with ThreadPoolExecutor(workers) as pool:
            try:
                for epoch, batch, indices in self._upcoming():
                    share = slice(rank, None, world)
                    job = pool.submit(self.task.prepare, indices, share, epoch)
                    waiting.append((epoch, batch, indices, job))
                    if len(waiting) > workers:
                        *step, job = waiting.pop(0)
                        yield (*step, job.result())  # type: ignore[misc]
                for *step, job in waiting:
                    yield (*step, job.result())  # type: ignore[misc]
            finally:
                for *_, job in waiting:
                    job.cancel()

    def rate(self, step: int) -> float:
        """Share of the peak rates in the step with that number, from 0: linear warm-up, then the
        schedule.
        """
        warmup = min(self.stage.warmup_steps, self.total_steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        if self.stage.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.stage.schedule == "linear" else 1.0

    # --- one step -----------------------------------------------------------------------------

    def _step(self, step: int, indices: list[int], micros: list[Any]) -> tuple[float, float]:
        """Forward, backward and update; returns the mean loss and the gradient norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate(step)
        for _ in range(self.state.splits):
            micros = [half for micro in micros for half in self.task.split(micro)]
        device = self.accelerator.device
        # As a float also where this process has no example of the batch.
        own = float(sum(self.task.weight(micro) for micro in micros))
        weight = torch.tensor(own, device=device)
        total = float(self.accelerator.reduce(weight, "sum"))
        while True:
            loss_sum, is_out = torch.zeros((), device=device), False
            try:
                loss_sum = self._backward(step, micros, total)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                is_out = True
            # Outside the except block, so that the traceback no longer holds the tensors.
            loss, failed = self._summed(loss_sum, is_out)
            if not failed:
                break
            again = partial(self._halve, step, indices) if is_out else list
            micros = agreed(self.accelerator, partial(again, micros))
        loss /= max(total, 1.0)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"Loss is {loss} at step {step + 1} on the batch: {self.task.names(indices)}. "
                "Lower train.learning_rate, or look at these examples."
            )
        scaler = self.accelerator.scaler  # of float16: clipping divides the gradients by its scale
        scale = 1.0 if scaler is None else scaler.get_scale()
        for term in self.task.regularisers:
            term.add_gradient(scale)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        norm = float(norm)
        if not math.isfinite(norm) and scaler is None:
            raise NotFiniteError(
                f"Gradient norm is {norm} at step {step + 1} on the batch: "
                f"{self.task.names(indices)}. Lower train.learning_rate."
            )
        self.optimizer.step()
        return loss, norm

    def _backward(self, step: int, micros: list[Any], total: float) -> torch.Tensor:
        if self._sums is None:
            self.optimizer.zero_grad()
        else:
            self._sums.begin()
        rank = self.accelerator.process_index
        # Dropout depends on seed, step and process only, so resuming needs no generator states.
        torch.manual_seed(hash((*self._seed, step, rank)) % 2**63)
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for number, micro in enumerate(micros, 1):
            with self.accelerator.autocast():
                loss = self.task.loss(micro, self.accelerator.device)
            if self._sums is not None and number == len(micros):
                self._sums.last()
            self.accelerator.backward(loss / max(total, 1.0))
            loss_sum += loss.detach()
        return loss_sum

    def _halve(self, step: int, indices: list[int], micros: list[Any]) -> list[Any]:
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = [half for micro in micros for half in self.task.split(micro)]
        if len(halves) == len(micros):
            raise UserError(
                f"Out of memory at step {step + 1} with a single example at a time: "
                f"{self.task.names(indices)}. Use shorter clips, "
                "train.gradient_checkpointing: true, or a smaller model."
            )
        self.state.splits += 1
        logger.warning(
            "out of memory at step %d: micro-batches are halved; batches stay the same", step + 1
        )
        return halves

    def _summed(self, loss: torch.Tensor, is_out: bool) -> tuple[float, bool]:
        """Sum of the loss over processes, and whether any of them ran out of memory; gradients are
        summed then.
        """
        if self._sums is None:
            return float(loss), is_out
        total, failed = self._sums.finish(torch.stack([loss, torch.full_like(loss, is_out)]))
        return float(total), bool(failed)

    # --- evaluation ---------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | None]:
        """Validation metrics, the same in every process."""
        return evaluate_task(self.task, self.accelerator)

    def _evaluate_and_keep_best(self) -> dict[str, float | None]:
        # Running statistics are each process's own; those of the main process are kept.
        spread(self.accelerator, (b for b in self.task.model.buffers() if b.is_floating_point()))
        metrics = self.evaluate()
        value = comparable(metrics, self.task.metric)
        tie = comparable(metrics, self.task.tie_metric)
        state = self.state
        if self._is_better(value, tie):
            state.best, state.best_tie = value, tie
            state.best_step = state.offset + state.step
            state.evaluations_since_best = 0
            self._keep_best()
        else:
            state.evaluations_since_best += 1
        return metrics

    def _is_better(self, value: float, tie: float) -> bool:
        """Whether a score, and that which decides between equal ones, beats the best."""
        state, sign = self.state, 1 if self.task.higher_is_better else -1
        if state.best is None:
            return True
        if state.best_step <= state.offset:
            # Of the stage before: the best of its many evaluations is partly luck, so that it holds
            # only against what is worse by a standard error (Breiman et al. 1984).
            return sign * (value - state.best) > -standard_error(
                state.best, self.task.validation_size
            )
        # On a small validation set many weights score the same.
        return (sign * value, -tie) > (sign * state.best, -state.best_tie)

    def _keep_best(self) -> None:
        if self.accelerator.is_main_process:
            write_weights(self.best_weights, self.task.model, trained_only=True)

    def _keep_snapshot(self) -> None:
        """A model of this step, as a finished run has one, in the place of the oldest."""
        kept, folder = self.config.keep_checkpoints, self.run_dir / "snapshots"
        is_whole = self.task.adapted is None or self.task.form == "adapter"
        if not (kept and is_whole and self.accelerator.is_main_process):
            return
        with atomic_path(folder / f"step-{self.state.offset + self.state.step:08d}") as part:
            part.mkdir(parents=True)
            self.task.carrier.save(part, self.task.form, self.task.adapted)
        for old in sorted(folder.glob("step-*"))[:-kept]:
            shutil.rmtree(old)

    # --- checkpoints --------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to resume."""
        return {
            **self._fixed,
            "source_model": self.task.source.digest,
            "seed": self.runtime.seed,
            "processes": self.accelerator.num_processes,
        }

    def save_checkpoint(self) -> None:
        """Weights, optimiser and position, written by the main process."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            optimizer = {
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            write_checkpoint(
                self.checkpoint,
                self.task.model,
                optimizer,
                state=asdict(self.state),
                settings=self._settings(),
            )
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self) -> bool:
        """Continue from the run folder's checkpoint; False if it has none.

        Raises:
            UserError: the checkpoint belongs to other settings or other data.
        """

        def read() -> tuple[dict[str, Any], dict[str, Any]] | None:
            if not self.checkpoint.is_dir():
                return None
            return read_checkpoint(self.checkpoint, self.task.model, settings=self._settings())

        found = from_main(self.accelerator, read)
        if found is None:
            return False
        optimizer, state = found
        spread(self.accelerator, self.task.model.state_dict().values())
        with whole_checkpoint(self.checkpoint):
            self.optimizer.optimizer.load_state_dict(optimizer["optimizer"])
            self.task.model.to(self.accelerator.device)
            if optimizer["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(optimizer["scaler"])
            self.state = TrainState(**state)
        return True

    def load_best(self) -> None:
        """Put the weights of the best evaluation into the model."""

        def read() -> None:
            if self.best_weights.is_file():
                read_weights(self.best_weights, self.task.model)

        from_main(self.accelerator, read)
        spread(self.accelerator, self.task.model.state_dict().values())

    # --- metrics ------------------------------------------------------------------------------

    def _log(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        step = values["step"]  # trackers take the rest, beside it, as far as it is defined
        shown = {k: v for k, v in values.items() if k != "step" and v is not None}
        self.accelerator.log(shown, step=step)

    def _forget_metrics_after(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint; resuming logs it again."""
        if not self.accelerator.is_main_process or not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # the process was killed in the middle of this line
        with atomic_path(self.metrics_path) as part:
            part.write_text("".join(kept), encoding="utf-8")

    # --- the loop -----------------------------------------------------------------------------

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train the stage to its end; leaves the best weights in the model.

        Raises:
            Interrupted: SIGINT or SIGTERM; a checkpoint is written.
            UserError: a loss that is not finite, no memory for a single example, or a checkpoint
                of another run.
        """
        if resume and self.load_checkpoint():
            logger.info("resuming at step %d of %d", self.state.step, self.total_steps)
        elif self.state.best is not None:
            self._keep_best()  # the weights that the stage before ended with
        self._forget_metrics_after(self.state.offset + self.state.step)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), _stop_signals() as signals:
                stopped_early = self._loop(signals)
        finally:
            if self._sums is not None:
                self._sums.close()
        self.load_best()
        state = self.state
        return TrainResult(
            steps=state.step,
            epochs=round(state.epoch + state.batch / len(self._batches(state.epoch)), 3),
            best_step=state.best_step,
            best=state.best,
            best_tie=state.best_tie,
            metric=self.task.metric,
            seconds=round(state.seconds, 2),
            units=round(state.units, 2),
            early_stopped=stopped_early,
            trained_parameters=sum(p.numel() for p in self.parameters),
        )

    def _loop(self, signals: list[int]) -> bool:
        state, config = self.state, self.config
        checkpoint_every = config.checkpoint_every
        self.task.train_mode()
        started = time.monotonic() - state.seconds
        progress = TrainingProgress(
            self.total_steps,
            state.step,
            unit=self.task.speed_unit,
            enabled=self.accelerator.is_main_process,
        )
        with progress:
            for epoch, batch, indices, micros in self._prepared():
                if self._patience_is_over():
                    return True
                loss, norm = self._step(state.step, indices, micros)
                state.step += 1
                state.epoch, state.batch = epoch, batch + 1
                lengths = self.task.lengths
                state.units += sum(lengths[index] for index in indices)
                state.seconds = time.monotonic() - started
                values = {
                    "step": state.offset + state.step,
                    "stage": state.stage,
                    "epoch": epoch,
                    "loss": loss,
                    "learning_rate": self.stage.learning_rate * self.rate(state.step - 1),
                    "grad_norm": norm,
                    "seconds": round(state.seconds, 3),
                }
                found = [term.penalty() for term in self.task.regularisers]
                penalties = [float(value) for value in found if value is not None]
                if penalties:
                    values["penalty"] = sum(penalties)
                self._log(values)
                last = state.step == self.total_steps
                epoch_done = state.batch == len(self._batches(epoch))
                every = config.evaluate_every
                pause = last or (state.step % every == 0 if every else epoch_done)
                # A contrastive stage trains no head, so a score would say nothing.
                if pause and self.stage.objective == "target":
                    metrics = self._evaluate_and_keep_best()
                    state.seconds = time.monotonic() - started
                    self._log(
                        {
                            "step": state.offset + state.step,
                            "stage": state.stage,
                            "epoch": epoch,
                        }
                        | {f"validation_{name}": value for name, value in metrics.items()}
                    )
                    self._keep_snapshot()
                    progress.evaluated(self.task.metric, metrics[self.task.metric])
                    if self._watch is not None:
                        value = comparable(metrics, self.task.metric)
                        self._watch(state.offset + state.step, value)
                    self.task.train_mode()
                progress.step(loss, state.units / max(state.seconds, 1e-9))
                stop = self._agreed_stop(signals)
                due = state.step % checkpoint_every == 0 if checkpoint_every else pause
                if (due and not last) or stop:
                    self.save_checkpoint()
                if stop:
                    raise Interrupted(state.step, stop)
        return False

    def _patience_is_over(self) -> bool:
        patience = self.config.patience
        return bool(patience) and self.state.evaluations_since_best >= patience

    def _agreed_stop(self, signals: list[int]) -> int:
        """The signal that any process received, so that all stop at the same step."""
        mine = signals[0] if signals else 0
        if self.accelerator.num_processes == 1:
            return mine
        return max(gather_object([mine]))
