"""Speech to text with scores: clips in batches of equal context, by one of several engines.

Nothing here needs torch; an engine brings what it needs.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from mmtransfer.progress import track
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.contexts import clip_context_s, longer_context_s
from mmtransfer.speech.end_of_turn import EndOfTurn
from mmtransfer.speech.engine import DecodingOptions, Engine, Hypothesis
from mmtransfer.speech.guards import LOOPING, agreed, rejection


class Recognizer:
    """Batched recognition with an engine, or with a loaded model on a torch device.

    `shortest_context_s` overrides the shortest context stored with the model. `end_of_turn` is what
    decides at cameras whether a pause ends a turn, for a model that has it.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: Any = "cpu",
        options: DecodingOptions | None = None,
        batch_seconds: float = 120.0,
        shortest_context_s: float | None = None,
        end_of_turn: EndOfTurn | None = None,
    ):
        if hasattr(model, "decode"):
            self.engine: Engine = model
        else:
            from mmtransfer.speech.engines_transformers import transformers_engine

            self.engine = transformers_engine(model, device, options)
        self.batch_seconds = batch_seconds
        self.shortest_context_s = shortest_context_s
        self.end_of_turn = end_of_turn

    def context_s(self, clip: np.ndarray, *, is_first: bool = False) -> float:
        """Context in which a clip is decoded; depends on its own length only. With `is_first`, for
        a text that is wanted at once and will be decoded again, short also for long clips.
        """
        engine, shortest = self.engine, self.shortest_context_s
        return clip_context_s(
            len(clip) / SAMPLE_RATE,
            shortest_s=engine.shortest_context_s if shortest is None else shortest,
            longest_s=engine.max_context_s,
            margin_s=engine.margin_s,
            short_s=math.inf if is_first and engine.window_s else engine.short_s,
        )

    @property
    def window_s(self) -> float:
        """How much speech of a recording is decoded at a time; see `Engine.window_s`."""
        return self.engine.window_s

    @property
    def has_time(self) -> bool:
        """Whether what can wait would be decoded at once; not always, where one is shared."""
        return True

    def batch_size(self, context_s: float) -> int:
        """Clips of that context in a batch."""
        return max(1, int(self.batch_seconds / context_s))

    def longer_context_s(self, context_s: float) -> float | None:
        """Context in which a flagged clip is decoded next; None after the full window."""
        return longer_context_s(context_s, self.engine.max_context_s)

    def warm_up(self, most: int) -> None:
        """Decode silence in batches as large as they become, of at most so many clips, in every
        worker at once: the memory for them is taken now, not in the middle of the night.
        """
        workers, full = self.engine.workers, self.engine.max_context_s
        together = threading.Barrier(workers)

        def decode(seconds: float) -> None:
            clip = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
            context = self.context_s(clip)
            together.wait()
            self.decode([clip] * min(most, self.batch_size(context)), context)

        with ThreadPoolExecutor(workers) as pool:
            # Several full windows side by side take more than `decode` ever does.
            for seconds in (self.batch_seconds / most, full / 2, *[full] * workers):
                list(pool.map(decode, [seconds] * workers))

    def transcribe(
        self,
        clips: Sequence[np.ndarray],
        *,
        context_s: float | None = None,
        guarded: bool = False,
        reject: bool = False,
        progress: str | None = None,
    ) -> list[Hypothesis]:
        """Hypotheses of 16-kHz float32 clips, in their order; `progress` labels a bar.

        A clip's context depends on its own length only (or is `context_s` for all), and a batch
        holds clips of one context, so results do not depend on what else is in the batch. With
        `guarded`, clips whose text the guards object to are decoded again in longer contexts; with
        `reject`, text that stays in doubt is left out, as `monitor` does.
        """
        readings: dict[int, list[Hypothesis]] = defaultdict(list)
        contexts = {i: context_s or self.context_s(clip) for i, clip in enumerate(clips)}
        results: dict[int, Hypothesis] = {}
        while contexts:
            batches = self._batches(contexts)
            found: dict[int, Hypothesis] = {}
            for context, chosen in track(batches, progress) if progress else batches:
                decoded = self.decode([clips[index] for index in chosen], context)
                found.update(zip(chosen, decoded, strict=True))
            results |= found
            contexts = {}
            for index, hypothesis in found.items() if guarded else ():
                longer = self.longer_context_s(hypothesis.context_s)
                seconds = len(clips[index]) / SAMPLE_RATE
                reason = rejection(hypothesis, seconds)
                if reason is None:
                    continue
                readings[index].append(hypothesis)
                if longer is not None:
                    contexts[index] = longer
                elif reject:
                    looping = reason == LOOPING
                    believed = agreed(readings[index], seconds) if looping else None
                    results[index] = believed or replace(hypothesis, text="", tokens=(), words=())
        return [results[index] for index in range(len(clips))]

    def _batches(self, contexts: dict[int, float]) -> list[tuple[float, list[int]]]:
        by_context: dict[float, list[int]] = defaultdict(list)
        for index, context in contexts.items():
            by_context[context].append(index)
        batches: list[tuple[float, list[int]]] = []
        for context, indices in sorted(by_context.items()):
            size = self.batch_size(context)
            starts = range(0, len(indices), size)
            batches += [(context, indices[start : start + size]) for start in starts]
        return batches

    def decode(
        self, clips: list[np.ndarray], context_s: float, *, can_wait: bool = False
    ) -> list[Hypothesis]:
        """Decode a batch of one context; if memory does not hold it, as two halves. What `can_wait`
        is provisional, or decoded again; it makes a difference where a recogniser is shared.
        """
        try:
            return self.engine.decode(clips, context_s)
        except (RuntimeError, MemoryError) as error:
            from mmtransfer.runtime import is_out_of_memory

            if len(clips) == 1 or not is_out_of_memory(error):
                raise
        half = len(clips) // 2
        self.batch_seconds = half * context_s  # later calls start with what fits
        parts = (clips[:half], clips[half:])
        return [found for part in parts for found in Recognizer.decode(self, part, context_s)]
