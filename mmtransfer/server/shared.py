"""One recogniser for cameras, live streams and requests: who waits least comes first, and calls of
several that fit together are one batch.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS
from mmtransfer.speech.engine import Engine, Hypothesis
from mmtransfer.speech.recognition import Recognizer

_DRAFTS = 4  # provisional texts in a batch, beside which what is final gets its share of the cores
_VARIANTS = 16  # languages and prompts of requests that are kept ready


class Urgency(IntEnum):
    """Who goes first."""

    CAMERA = 0
    STREAM = 1
    REQUEST = 2


class LeftError(Exception):
    """Who asked for a text has left before it was decoded."""


@dataclass(eq=False)
class _Call:
    """Clips of one context that somebody waits for."""

    door: Door
    clips: list[np.ndarray]
    context_s: float
    can_wait: bool
    is_taken: bool = False
    results: list[Hypothesis] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def is_final(self) -> bool:
        """Whether it is a text of live speech that somebody waits for now."""
        return self.door.urgency != Urgency.REQUEST and not self.can_wait

    @property
    def is_settled(self) -> bool:
        return bool(self.results) or self.error is not None

    def fits(self, other: _Call) -> bool:
        """Whether both can be decoded in one batch."""
        return (
            self.door.engine is other.door.engine
            and self.context_s == other.context_s
            and self.is_final == other.is_final
            and self.door.urgency == other.door.urgency
        )


class SharedRecognizer:
    """Lets several monitors decode with one recogniser, each through a door of its own.

    As many batches run at once as the engine has workers, and one more, as in a monitor. Text of
    live speech comes first. While anything live is open, what can wait (provisional texts, turns
    decoded again) begins only while fewer batches run than all workers but one, and so do requests
    beside other requests: a batch that runs is not interrupted.
    """

    def __init__(self, recognizer: Recognizer):
        self._recognizer = recognizer
        self._engines: dict[tuple[str | None, str], Engine] = {(None, ""): recognizer.engine}
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._running: list[_Call] = []  # the first of each batch
        self._live = 0
        """Doors of cameras and streams that are open."""

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    @property
    def has_time(self) -> bool:
        """Whether a provisional text would be decoded at once."""
        with self._changed:
            is_waited_for = any(call.is_final or call.can_wait for call in self._waiting)
            return not is_waited_for and self._has_place and self._has_core(can_wait=True)

    @property
    def languages(self) -> list[str]:
        """ISO codes of the languages that it has, as far as they are known."""
        return self._recognizer.engine.languages

    @property
    def language(self) -> str | None:
        """Of cameras that name none: the server's, else that of the model."""
        engine = self._recognizer.engine
        return engine.own_language if engine.language == "auto" else engine.language

    def open(
        self,
        urgency: Urgency,
        *,
        language: str | None = None,
        prompt: str = "",
        context_s: float | None = None,
    ) -> Door:
        """A recogniser of its own for one monitor, in that language, with that prompt and that
        shortest context.

        Raises:
            UserError: a language that the model does not have.
        """
        engine = self._engines.get((language, prompt))
        if engine is None:
            engine = self._recognizer.engine.speaking(language, prompt)
            if len(self._engines) > _VARIANTS:
                del self._engines[next(key for key in self._engines if key != (None, ""))]
            self._engines[language, prompt] = engine
        with self._changed:
            self._live += urgency != Urgency.REQUEST
        return Door(self, self._recognizer, engine, urgency, context_s)

    def close(self, door: Door) -> None:
        """Nobody waits any more for what the door asked for."""
        with self._changed:
            self._live -= door.urgency != Urgency.REQUEST
            gone = [call for call in self._waiting if call.door is door]
            for call in gone:
                self._waiting.remove(call)
                call.error = LeftError()
            self._changed.notify_all()

    def decode(
        self, door: Door, clips: list[np.ndarray], context_s: float, *, can_wait: bool
    ) -> list[Hypothesis]:
        """Decode clips when it is their turn; in the caller's thread, or in that of another whose
        clips are in the same batch.
        """
        call = _Call(door, clips, context_s, can_wait)
        with self._changed:
            if door.is_closed:
                raise LeftError
            self._waiting.append(call)
            self._changed.notify_all()
            while not call.is_settled and (call.is_taken or self._next() is not call):
                self._changed.wait()
            batch = [] if call.is_settled else self._take(call)
        if batch:
            self._decode(batch)
        if call.error is not None:
            raise call.error
        return call.results

    def _decode(self, batch: list[_Call]) -> None:
        door = batch[0].door
        clips = [clip for call in batch for clip in call.clips]
        try:
            found = iter(Recognizer.decode(door, clips, batch[0].context_s))
            for call in batch:
                call.results = [next(found) for _ in call.clips]
        except BaseException as error:
            for call in batch:
                call.error = error
            raise
        finally:
            with self._changed:
                self._running.remove(batch[0])
                self._changed.notify_all()

    def _next(self) -> _Call | None:
        """The call that is decoded next; None while there is no place for one."""
        workers = self._recognizer.engine.workers
        finals = [call for call in self._waiting if call.is_final]
        if finals and len(self._running) <= workers:
            return min(finals, key=lambda call: call.door.urgency)  # of equals the first
        if finals or not self._has_place:
            return None
        if not self._live:
            return self._waiting[0] if self._waiting else None
        return next(
            (call for call in self._waiting if self._has_core(can_wait=call.can_wait)), None
        )

    @property
    def _has_place(self) -> bool:
        """Whether a batch that is not final may begin; one place is left for those that are."""
        workers = self._recognizer.engine.workers
        others = sum(not call.is_final for call in self._running)
        return others < workers and len(self._running) <= workers

    def _has_core(self, *, can_wait: bool) -> bool:
        """Whether a provisional text, or a request, takes no core from texts that are final."""
        requests = sum(call.door.urgency == Urgency.REQUEST for call in self._running)
        running = len(self._running) - requests if can_wait else requests
        return running < max(1, self._recognizer.engine.workers - 1)

    def _take(self, first: _Call) -> list[_Call]:
        """A batch that begins with this call, with others that fit into it."""
        batch, room = [first], self._recognizer.batch_size(first.context_s) - len(first.clips)
        if first.door.urgency != Urgency.REQUEST:
            most = _DRAFTS if first.can_wait else BATCH_SEGMENTS
            room = min(room, most - len(first.clips))
        for call in self._waiting:
            if call is not first and len(call.clips) <= room and call.fits(first):
                batch.append(call)
                room -= len(call.clips)
        for call in batch:
            self._waiting.remove(call)
            call.is_taken = True
        self._running.append(first)
        self._changed.notify_all()  # another may have a place as well
        return batch


class Door(Recognizer):
    """A recogniser that decodes with a shared one; what waits is given up when it is closed."""

    def __init__(
        self,
        shared: SharedRecognizer,
        recognizer: Recognizer,
        engine: Engine,
        urgency: Urgency,
        context_s: float | None,
    ):
        super().__init__(
            engine,
            batch_seconds=recognizer.batch_seconds,
            shortest_context_s=context_s,
            end_of_turn=recognizer.end_of_turn,
        )
        self._shared = shared
        self.urgency, self.is_closed = urgency, False

    @property
    def window_s(self) -> float:
        """As of every recogniser; 0 for a stream, whose text is final at once: its client cannot
        take back what a whole turn would change.
        """
        return 0.0 if self.urgency == Urgency.STREAM else super().window_s

    @property
    def has_time(self) -> bool:
        """As of every recogniser. Cameras share a monitor, of whose workers one that waits with a
        provisional text would be missed; a stream has its own.
        """
        return self.urgency != Urgency.CAMERA or self._shared.has_time

    def decode(
        self, clips: list[np.ndarray], context_s: float, *, can_wait: bool = False
    ) -> list[Hypothesis]:
        """Hypotheses of a batch, when it is its turn.

        Raises:
            LeftError: the door is closed.
        """
        return self._shared.decode(self, clips, context_s, can_wait=can_wait)

    def close(self) -> None:
        """Nobody waits any more; may be called twice."""
        if not self.is_closed:
            self.is_closed = True
            self._shared.close(self)
