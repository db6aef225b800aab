"""What is decoded next, without a thread."""

import queue
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS, Job
from mmtransfer.monitoring.scheduler import Batch, Decoded, Scheduler, Workers
from mmtransfer.speech.segments import Segment


def job(camera=0, start=0.0, *, context_s=4.0, samples=16, **options):
    segment = Segment(start, start + 1.0, np.zeros(samples, np.float32))
    return Job(camera, 0, f"{camera}@{start:.3f}", segment, (0, context_s), **options)


def started(scheduler, is_ready=lambda turn: True, has_time=lambda draft: True):
    """Everything that may run now."""
    batches = []
    while (batch := scheduler.next(is_ready, has_time)) is not None:
        batches.append(batch)
    return batches


def test_a_segment_goes_before_what_is_still_being_said():
    scheduler = Scheduler(2)
    draft, segment = job(0, is_draft=True), job(1)
    scheduler.add_draft(draft)
    scheduler.add(segment)
    assert [batch.jobs for batch in started(scheduler)] == [[segment], [draft]]


def test_drafts_keep_one_worker_at_most():
    scheduler = Scheduler(2)
    scheduler.add_draft(job(0, is_draft=True, context_s=4.0))
    scheduler.add_draft(job(1, is_draft=True, context_s=8.0))
    (first,) = started(scheduler)
    scheduler.add(job(2))
    (segment,) = started(scheduler)
    assert not segment.is_draft
    scheduler.done(segment)
    assert not started(scheduler)
    scheduler.done(first)
    (second,) = started(scheduler)
    assert second.is_draft
    assert second.jobs[0].camera == 1 - first.jobs[0].camera


def test_no_draft_while_every_worker_is_busy():
    scheduler = Scheduler(1)
    scheduler.add(job(0))
    scheduler.add_draft(job(1, is_draft=True))
    (batch,) = started(scheduler)
    scheduler.done(batch)
    assert started(scheduler)[0].is_draft


def test_only_a_whole_draft_begins_while_its_recogniser_has_no_time():
    scheduler = Scheduler(2)
    scheduler.add_draft(job(0, is_draft=True))
    assert started(scheduler, has_time=lambda draft: False) == []
    whole = job(1, is_draft=True, is_whole=True, context_s=8.0)
    scheduler.add_draft(whole)
    assert [b.jobs for b in started(scheduler, has_time=lambda draft: False)] == [[whole]]


def test_the_last_draft_of_a_source_counts_and_none_once_it_is_over():
    scheduler = Scheduler(1)
    old, new = job(0, samples=16, is_draft=True), job(0, samples=32, is_draft=True)
    scheduler.add_draft(old)
    scheduler.add_draft(new)
    (batch,) = started(scheduler)
    assert batch.jobs == [new]
    assert scheduler.running_draft(job(0, samples=32)) is new
    assert scheduler.running_draft(job(0, samples=16)) is None
    assert scheduler.running_draft(job(1, samples=32)) is None
    scheduler.done(batch)
    scheduler.add_draft(old)
    scheduler.drop_draft(0)
    assert not started(scheduler)


def test_whole_drafts_come_first_and_are_decoded_together():
    scheduler = Scheduler(1)
    whole = [job(n, 10.0 + n, is_draft=True, is_whole=True) for n in range(6)]
    for draft in (job(7, 1.0, is_draft=True), *whole):
        scheduler.add_draft(draft)
    (batch,) = started(scheduler)
    assert batch.jobs == whole[:4]


def test_a_turn_runs_beside_full_workers_once_it_is_ready():
    scheduler = Scheduler(1)
    turns = [job(0, 1.0, is_turn=True, after=2), job(1, 2.0, is_turn=True, after=1)]
    for turn in turns:
        assert scheduler.add_turn(turn) is None
    scheduler.add(job(2))
    emitted = {0: 0, 1: 1}

    def is_ready(turn):
        return turn.after <= emitted[turn.camera]

    segment, turn = started(scheduler, is_ready)
    assert not segment.is_turn
    assert turn.jobs == [turns[1]]
    emitted[0] = 2
    assert not started(scheduler, is_ready)  # one at a time
    scheduler.done(turn)
    assert [batch.jobs for batch in started(scheduler, is_ready)] == [[turns[0]]]


def test_turns_pause_while_much_waits():
    scheduler = Scheduler(1)
    for number in range(2 * BATCH_SEGMENTS + 1):
        scheduler.add(job(number, context_s=4.0))
    scheduler.add_turn(job(0, is_turn=True))
    (batch,) = started(scheduler)
    assert len(batch.jobs) == BATCH_SEGMENTS
    scheduler.done(batch)
    segments, turn = started(scheduler)
    assert len(segments.jobs) == BATCH_SEGMENTS
    assert turn.is_turn


def test_of_too_many_turns_the_oldest_is_given_up():
    scheduler = Scheduler(1)
    turns = [job(0, float(number), is_turn=True) for number in range(34)]
    late = [scheduler.add_turn(turn) for turn in turns]
    assert late[:32] == [None] * 32
    assert late[32:] == turns[:2]


def test_a_turn_that_is_decoded_again_goes_before_the_others():
    scheduler = Scheduler(1)
    first, second = job(0, 1.0, is_turn=True), job(0, 2.0, is_turn=True)
    scheduler.add_turn(first)
    (batch,) = started(scheduler)
    scheduler.add_turn(second)
    scheduler.done(batch)
    scheduler.add_turn_again(first)
    assert started(scheduler)[0].jobs == [first]


def test_the_least_important_is_dropped():
    scheduler = Scheduler(1)
    scheduler.add(job(0, 5.0))
    scheduler.add(job(1, 1.0))
    dropped = scheduler.drop({0: 0, 1: 3})
    assert dropped is not None
    assert dropped.camera == 0
    assert scheduler.drop({0: 0}) is None


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([4.0, 8.0])), max_size=40),
    st.randoms(use_true_random=False),
)
def test_everything_is_decoded_once_and_never_more_at_a_time_than_there_are_workers(
    workers, added, random
):
    scheduler, waiting, decoded = Scheduler(workers), list(enumerate(added)), []
    running: list[Batch] = []
    while waiting or running:
        if waiting and random.random() < 0.6:
            number, (camera, context_s) = waiting.pop(0)
            scheduler.add(job(camera, float(number), context_s=context_s))
            scheduler.add_draft(job(camera, number + 0.5, is_draft=True))
        running += started(scheduler)
        assert len(running) <= workers
        assert sum(batch.is_draft for batch in running) <= 1
        assert all(len({one.kind for one in batch.jobs}) == 1 for batch in running)
        if running:
            batch = running.pop(random.randrange(len(running)))
            scheduler.done(batch)
            decoded += [one.segment.start for one in batch.jobs if not one.is_draft]
    assert sorted(decoded) == [float(number) for number in range(len(added))]


def test_workers_decode_turns_and_segments_side_by_side():
    events, together = queue.Queue[Any](), threading.Barrier(2, timeout=30)

    def decode(jobs):
        together.wait()
        return [one.id for one in jobs]

    workers = Workers(1, decode, events)
    batches = [Batch([job(0)]), Batch([job(1, is_turn=True)])]
    for batch in batches:
        workers.start(batch)
    found = [events.get(timeout=30) for _ in batches]
    workers.close()
    assert all(isinstance(one, Decoded) for one in found)
    assert {one.batch: one.results for one in found} == {
        batches[0]: ["0@0.000"],
        batches[1]: ["1@0.000"],
    }


def test_what_decoding_raises_comes_out_where_its_results_would():
    events = queue.Queue[Any]()

    def decode(jobs):
        raise MemoryError("no room")

    workers = Workers(1, decode, events)
    workers.start(Batch([job(0)]))
    decoded = events.get(timeout=30)
    workers.close()
    with pytest.raises(MemoryError, match="no room"):
        decoded.results  # noqa: B018
