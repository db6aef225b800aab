"""Progress where there is no terminal."""

import logging

from mmtransfer import progress


def test_long_work_is_logged_off_a_terminal(monkeypatch, caplog):
    now = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("mmtransfer.progress.time.monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO, logger="mmtransfer.progress"):
        assert list(progress.track("abcd", "reading clips", total=4)) == list("abcd")
    assert [r.getMessage() for r in caplog.records] == ["reading clips: 2/4", "reading clips: 4/4"]
