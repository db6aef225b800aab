"""Journal and spool of a run, and a disk that is full for a while."""

import errno
import json

import numpy as np
import pytest

from mmtransfer.monitoring import Journal, Segment
from mmtransfer.monitoring.events import Occurrence, SourceEvent
from mmtransfer.monitoring.ledger import Ledger

EVENT = SourceEvent("gate", Occurrence.GAP, 1.0, "2.0 s without audio")


@pytest.fixture
def journal(tmp_path):
    book = Journal(tmp_path, model="m", model_digest="d", sources={"gate": "rtsp://gate/1"})
    yield book
    book.close()


def lines_of(folder):
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.open()]


def segment(start=1.0, seconds=1.0):
    return Segment(start, start + seconds, np.full(round(16_000 * seconds), 0.5, np.float32))


class Full:
    """A disk that takes nothing until it is made free."""

    def __init__(self, journal, monkeypatch):
        self.is_full, self._write = True, journal.write
        monkeypatch.setattr(journal, "write", self.write)

    def write(self, *lines):
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._write(*lines)


def test_while_the_disk_is_full_lines_wait_and_it_is_asked_again(
    journal, tmp_path, monkeypatch, caplog
):
    now, disk = [0.0], Full(journal, monkeypatch)
    ledger = Ledger(journal, spools=True, waits=True, now=lambda: now[0])
    assert not ledger.is_blocked
    assert ledger.write(EVENT) is False
    assert ledger.is_blocked
    assert ledger.failure is not None
    now[0] = 1.1
    assert not ledger.is_blocked
    assert ledger.write(EVENT) is False
    assert ledger.is_blocked
    disk.is_full, now[0] = False, 2.2
    assert ledger.write(EVENT, {"camera": "gate", "event": "x"}) is True
    assert ledger.failure is None
    assert not ledger.is_blocked
    line = {"camera": "gate", "event": "gap", "at": 1.0, "detail": "2.0 s without audio"}
    assert lines_of(tmp_path) == [line, {"camera": "gate", "event": "x"}]
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_what_can_be_read_again_does_not_wait_for_a_disk(journal, monkeypatch):
    Full(journal, monkeypatch)
    with pytest.raises(OSError, match="No space"):
        Ledger(journal, spools=False, waits=False).write(EVENT)


def test_without_a_journal_nothing_is_kept_and_nothing_waits():
    ledger = Ledger(None, spools=True, waits=True)
    assert ledger.write(EVENT) is True
    ledger.keep("gate", "gate@1.000", segment())
    assert not ledger.holds("gate@1.000")
    assert not ledger.is_full
    ledger.forget("gate@1.000")
    known, left = ledger.take_up({"gate"})
    assert (known.ids, left) == ({}, [])


def test_audio_waits_on_disk_until_it_is_forgotten(journal):
    ledger = Ledger(journal, spools=True, waits=True, spool_bytes=50_000)
    ledger.keep("gate", "gate@1.000", segment())
    assert ledger.holds("gate@1.000")
    np.testing.assert_allclose(ledger.load("gate@1.000").samples, 0.5, atol=1e-4)
    assert not ledger.is_full
    ledger.keep("gate", "gate@3.000", segment(3.0))
    assert ledger.is_full
    ledger.forget("gate@1.000")
    assert not ledger.is_full
    assert not ledger.holds("gate@1.000")


def test_a_session_takes_up_what_the_last_one_left(journal):
    before = Ledger(journal, spools=True, waits=True)
    for start in (1.0, 3.0):
        before.keep("gate", f"gate@{start:.3f}", segment(start))
    # Written, and killed before its audio was forgotten.
    before.write({"camera": "gate", "id": "gate@1.000", "start": 1.0, "end": 2.0, "text": "open"})
    before.write({"camera": "yard", "id": "yard@7.000", "start": 7.0, "end": 8.0, "text": "shut"})
    known, left = Ledger(journal, spools=True, waits=True).take_up({"yard"})
    assert known.ids == {"gate": {"gate@1.000"}, "yard": {"yard@7.000"}}
    assert [(camera, identity) for camera, identity, _ in left] == [
        ("gate", "gate@1.000"),
        ("gate", "gate@3.000"),
    ]


def test_audio_that_the_disk_does_not_take_is_in_memory_still(journal, monkeypatch, caplog):
    ledger = Ledger(journal, spools=True, waits=True)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmtransfer.monitoring.journal.spool.Spool.add", fail)
    ledger.keep("gate", "gate@1.000", segment())
    assert not ledger.holds("gate@1.000")
    assert "held in memory alone" in caplog.text
