"""Who decodes first where several share one recogniser, and what becomes one batch."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.servers import SpokenEngine
from support.web import wait_for

from mmtransfer.server.shared import LeftError, SharedRecognizer, Urgency
from mmtransfer.speech.recognition import Recognizer

CLIP = np.zeros(16_000, np.float32)


class Shared:
    """A shared recogniser whose batches are let go one by one, and who called it in which order."""

    def __init__(self, workers):
        self.step = threading.Semaphore(0)
        self.engine = SpokenEngine(workers=workers, hold=self.step.acquire)
        self.recognizer = SharedRecognizer(Recognizer(self.engine))
        self.order: list[str] = []
        self.pool = ThreadPoolExecutor(16)

    def call(self, name, door, clips=1, context_s=5.0, **options):
        """Have a door decode in a thread; returns once it waits, or is decoded."""

        def decode():
            found = door.decode([CLIP] * clips, context_s, **options)
            self.order.append(name)
            assert len(found) == clips

        before = self.recognizer.waiting + len(self.engine.calls)
        future = self.pool.submit(decode)
        wait_for(lambda: self.recognizer.waiting + len(self.engine.calls) > before)
        return future

    def finish(self, futures):
        for _ in futures:
            self.step.release()
        for future in futures:
            future.result(60)


def test_cameras_come_before_streams_and_these_before_requests():
    shared = Shared(workers=1)
    doors = {u: shared.recognizer.open(u) for u in Urgency}
    futures = [shared.call("first", doors[Urgency.REQUEST])]  # it runs, and is not interrupted
    futures.append(shared.call("request", doors[Urgency.REQUEST], context_s=7.0))
    futures.append(shared.call("running", doors[Urgency.STREAM]))  # the place that is left
    futures.append(shared.call("draft", doors[Urgency.CAMERA], can_wait=True))
    futures.append(shared.call("stream", doors[Urgency.STREAM]))
    futures.append(shared.call("camera", doors[Urgency.CAMERA]))
    for count in range(1, 7):
        shared.step.release()
        wait_for(lambda count=count: len(shared.order) == count)
    assert set(shared.order[:2]) == {"first", "running"}
    assert shared.order[2:4] == ["camera", "stream"]
    shared.finish(futures)


def test_requests_leave_a_worker_free_while_something_is_live():
    shared = Shared(workers=2)
    door = shared.recognizer.open(Urgency.REQUEST)
    camera = shared.recognizer.open(Urgency.CAMERA)
    futures = [shared.call(str(n), door, context_s=5.0 + n) for n in range(3)]
    assert (len(shared.engine.calls), shared.recognizer.waiting) == (1, 2)
    camera.close()
    futures.append(shared.call("more", door, context_s=9.0))
    wait_for(lambda: len(shared.engine.calls) == 2)
    shared.finish(futures)


def test_calls_of_one_kind_are_one_batch_and_others_are_not():
    shared = Shared(workers=1)
    first = shared.recognizer.open(Urgency.REQUEST)
    named = shared.recognizer.open(Urgency.REQUEST, prompt="Brannock")
    futures = [shared.call("running", first)]
    futures += [shared.call(str(n), first, clips=2) for n in range(3)]
    futures.append(shared.call("longer", first, context_s=30.0))
    futures.append(shared.call("named", named))
    shared.finish(futures)
    assert sorted(shared.engine.calls) == [(1, 5.0), (1, 5.0), (1, 30.0), (6, 5.0)]
    assert (None, "Brannock") in shared.engine.spoken_calls
    assert shared.recognizer.waiting == 0


def test_provisional_texts_take_no_core_from_final_ones():
    shared = Shared(workers=2)
    door, other = (shared.recognizer.open(Urgency.STREAM) for _ in range(2))
    futures = [shared.call("final", door), shared.call("draft", other, can_wait=True)]
    assert shared.engine.calls == [(1, 5.0)]
    shared.step.release()
    wait_for(lambda: len(shared.engine.calls) == 2)
    assert shared.order == ["final"]
    shared.finish(futures[1:])


def test_a_camera_asks_for_no_provisional_text_that_would_wait_for_other_live_speech():
    shared = Shared(workers=2)
    request, stream, camera = (shared.recognizer.open(u) for u in reversed(Urgency))
    futures = [shared.call("request", request)]
    assert camera.has_time
    futures.append(shared.call("draft", camera, can_wait=True))
    assert len(shared.engine.calls) == 2
    assert not camera.has_time
    assert stream.has_time  # its monitor has workers of its own
    shared.finish(futures)
    assert camera.has_time


def test_few_provisional_texts_are_one_batch():
    shared = Shared(workers=1)
    doors = [shared.recognizer.open(Urgency.STREAM) for _ in range(7)]
    futures = [shared.call("running", doors[0], can_wait=True)]
    futures += [shared.call(str(n), door, can_wait=True) for n, door in enumerate(doors[1:])]
    shared.finish(futures)
    assert [count for count, _ in shared.engine.calls] == [1, 4, 2]


def test_who_leaves_waits_for_nothing():
    shared = Shared(workers=1)
    door, other = (shared.recognizer.open(Urgency.REQUEST) for _ in range(2))
    running = shared.call("running", other)
    waiting = shared.call("waiting", door)
    door.close()
    door.close()
    for gone in (waiting.result, lambda _: door.decode([CLIP], 5.0)):
        with pytest.raises(LeftError):
            gone(60)
    shared.finish([running])
    assert len(shared.engine.calls) == 1


def test_an_error_of_a_batch_is_everybodys():
    shared = Shared(workers=1)
    door = shared.recognizer.open(Urgency.REQUEST)
    futures = [shared.call("running", door), *(shared.call(str(n), door) for n in range(2))]
    shared.step.release()
    futures[0].result(60)
    wait_for(lambda: len(shared.engine.calls) == 2)
    shared.engine._texts = None  # it fails from now on
    shared.step.release()
    for future in futures[1:]:
        with pytest.raises(TypeError):
            future.result(60)
    assert shared.recognizer.waiting == 0
