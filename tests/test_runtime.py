"""How the processes of a launcher find each other after some of them were started again."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from mmtransfer.runtime import _session as session

WAIT = timedelta(seconds=60)


@pytest.fixture
def store():
    store = HashStore()
    store.set_timeout(WAIT)
    return store


class Process(threading.Thread):
    def __init__(self, store, rank, size, timeout=WAIT):
        super().__init__(daemon=True)
        self.session = None
        self.arguments = (store, rank, size, timeout)
        self.start()

    def run(self):
        self.session = session(*self.arguments)


def together(processes):
    for process in processes:
        process.join(60)
    (name,) = {process.session for process in processes}
    return name


@pytest.mark.parametrize("size", [1, 2, 5])
def test_processes_meet_in_a_session_of_their_own_after_every_start(store, size):
    names = []
    for order in (range(size), reversed(range(size)), range(size)):
        names.append(together([Process(store, rank, size) for rank in order]))
    assert None not in names
    assert len(set(names)) == 3


def test_who_is_early_waits_for_the_first_process_and_not_for_its_predecessor(store):
    old = together([Process(store, rank, 2) for rank in (0, 1)])
    early = Process(store, 1, 2)
    early.join(0.5)
    assert early.session is None
    assert together([early, Process(store, 0, 2)]) not in (old, None)


def test_a_process_started_again_before_all_have_come_takes_its_place(store):
    first = Process(store, 0, 3)
    store.set("session 1, process 1", "signed in, and there it died")
    first.join(0.2)
    again = Process(store, 1, 3)
    last = Process(store, 2, 3)
    assert together([first, again, last]) is not None


def test_the_others_follow_a_first_process_that_was_started_again(store):
    other = Process(store, 1, 3)
    store.set("session", f"session {store.add('sessions', 1)}")  # and there it died
    other.join(0.2)
    assert together([other, Process(store, 2, 3), Process(store, 0, 3)]) == "session 2"


def test_what_processes_of_a_session_say_is_not_that_of_another(store):
    stores = [
        PrefixStore(together([Process(store, rank, 2) for rank in (0, 1)]), store) for _ in "ab"
    ]
    stores[0].set("address", "of one that died")
    assert not stores[1].check(["address"])


def test_without_a_first_process_it_ends_with_an_error():
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    store.set("session", "session 1")
    with pytest.raises(TimeoutError, match=r"process 1 waited .* for process 0"):
        session(store, 1, 2, timedelta(seconds=0.2))
