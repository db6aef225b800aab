"""The same run over texts on a Ray cluster: actors classify, one process takes the rows from the
data and writes them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtransfer.config import RuntimeConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint, resolve
from mmtransfer.scale.cluster import Workers, connected, other_weights, ray_module
from mmtransfer.scale.texts import Classifier, Part, TextOptions, TextRun
from mmtransfer.text.classifier import Prediction, TextSettings

_ATTEMPTS = 5  # at a part whose worker or node died under it


class Worker:
    """An actor that classifies."""

    def __init__(self, model: str, runtime: RuntimeConfig):
        self._model, self._runtime = model, runtime

    def open(self) -> tuple[str, TextSettings]:
        """Load the model; returns its digest and its settings."""
        checkpoint = resolve(self._model)
        self._classifier = Classifier(checkpoint, self._runtime)
        return checkpoint.digest, self._classifier.settings

    def classify(self, texts: Sequence[str], targets: Sequence[str | None]) -> list[Prediction]:
        """See `Classifier.classify`."""
        return self._classifier.classify(texts, targets)

    def cpu_s(self) -> float:
        """Processor time that it took so far."""
        return time.process_time()


def classify_on_ray(
    run: TextRun, parts: Iterator[Part], checkpoint: Checkpoint, options: TextOptions
) -> TextSettings:
    """Classify parts on a cluster; returns the settings of the model.

    Raises:
        UserError: no such cluster, another version or other weights there, no room for a worker,
            or a part under which workers die.
    """
    ray = ray_module()
    folder = Path(options.model)
    model = str(folder.resolve()) if folder.exists() else options.model
    settings: list[TextSettings] = []
    started = time.process_time()
    with connected(
        str(options.ray),
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        threads=options.runtime.threads,
    ) as (count, threads):
        run.summary.workers = count

        def opened(found: tuple[str, TextSettings]) -> int:
            digest, own = found
            if digest != checkpoint.digest:
                raise other_weights(options.model)
            settings.append(own)
            return threads + 1  # one of them waits there

        actor = ray.remote(Worker).options(
            num_cpus=threads,
            num_gpus=options.gpus_per_worker,
            max_concurrency=threads,
        )
        workers = Workers(lambda: actor.remote(model, options.runtime), count, opened)
        calls: dict[Any, Part] = {}
        again: list[Part] = []
        attempts: Counter[int] = Counter()
        is_left = True
        while is_left or calls or again:
            while workers.has_room and (is_left or again):
                part = again.pop() if again else next(parts, None)
                if part is None:
                    is_left = False
                    break
                calls[workers.call("classify", part.texts, part.targets)] = part
            for ready in workers.wait():
                if workers.settle_start(ready):
                    continue
                part = calls.pop(ready)
                try:
                    run.add(part, workers.result(ready))
                except ray.exceptions.RayError as error:
                    attempts[part.number] += 1
                    if attempts[part.number] == _ATTEMPTS:
                        lines = f"{part.rows[0].number} to {part.rows[-1].number}"
                        why = " ".join(str(error).split())[:200]
                        raise UserError(
                            f"{options.data}: rows {lines}: whoever classified them died "
                            f"{_ATTEMPTS} times: {why}"
                        ) from None
                    again.append(part)
        run.summary.cpu_s = workers.cpu_s() + time.process_time() - started
    return settings[0]
