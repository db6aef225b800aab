"""What libraries in Rust (the tokenizers) write to standard error when they give up: lines of their
own, past every handler of Python, beside the exception that says the same.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_BEGINS = re.compile(rb"thread '.*panicked at ")
_GOES_ON = re.compile(rb"note: |stack backtrace:|\s+\d+: |\s+at ")
_PATIENCE_S = 0.5
_lock = threading.Lock()
_inside = 0
_kept: tuple[int, threading.Thread] | None = None  # standard error itself, and what passes lines on


@contextmanager
def without_panics() -> Iterator[None]:
    """Standard error without those lines, for as long as the block takes; everything else that
    anything writes there meanwhile comes through, line by line.
    """
    global _inside, _kept
    with _lock:
        if _inside == 0:
            _kept = _divert()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _kept is not None:
                _restore(*_kept)
                _kept = None


def _divert() -> tuple[int, threading.Thread] | None:
    try:
        own = os.dup(2)
    except OSError:  # closed
        return None
    source, target = os.pipe()
    os.dup2(target, 2)
    os.close(target)
    thread = threading.Thread(target=_pass_on, args=(source, own), daemon=True)
    thread.start()
    return own, thread


def _restore(own: int, thread: threading.Thread) -> None:
    os.dup2(own, 2)
    # A process that was started meanwhile may hold the pipe; its lines are passed on as well.
    thread.join(_PATIENCE_S)


def _pass_on(source: int, own: int) -> None:
    blank, is_message, is_panic = b"", False, False
    with open(source, "rb") as lines, open(own, "wb", 0) as out:
        for line in lines:
            begins = _BEGINS.match(line) is not None
            is_panic = begins or is_message or (is_panic and _GOES_ON.match(line) is not None)
            is_message = begins  # one line of it comes next
            if is_panic:
                blank = b""  # a blank line goes before it
                continue
            out.write(blank if line == b"\n" else blank + line)
            blank = line if line == b"\n" else b""
        out.write(blank)
