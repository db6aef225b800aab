"""Inputs made to do harm: how they are built, and what a command may make of them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import unicodedata
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtransfer.cli import main
from mmtransfer.errors import UserError

SECONDS = 60  # after which a command is taken to hang; nothing here needs one
MORE_BYTES = 1500 << 20  # that a command may take beyond what the process holds
ABSENT = object()


@contextmanager
def limited():
    """The block may neither hang nor take all memory."""

    def stop(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    held = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + MORE_BYTES, held[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, held)


def outcome(argv: list[Any], capsys: Any) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command that has handled its input: it gave an answer or
    refused in one line, and nothing of it steers a terminal.
    """
    capsys.readouterr()
    with limited():
        code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert "Traceback" not in err
    for text in (out, err):
        steering = [c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c != "\n"]
        assert not steering, repr(text)
    if code == 2:
        assert "mmtransfer: error: " in err
        last = [line for line in err.splitlines() if "mmtransfer: error: " in line][-1]
        assert len(last) < 2000
    return code, out, err


def refused(argv: list[Any], capsys: Any) -> str:
    """The line with which a command refuses its input."""
    code, out, err = outcome(argv, capsys)
    assert code == 2, (out, err)
    lines = [line for line in err.splitlines() if line.startswith("mmtransfer: error: ")]
    assert len(lines) == 1, err
    return lines[0]


def reason(call: Callable[[], Any]) -> str:
    """Why a call refuses what it is given; empty if it does not."""
    with limited():
        try:
            call()
        except UserError as error:
            return str(error)
    return ""


def copied(source: Path, target: Path) -> Path:
    """A copy of a model whose files are links to the same content until they are changed."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def rewrite(path: Path, text: str | bytes) -> None:
    """Put other content into a copied file."""
    path.unlink(missing_ok=True)
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    path.write_bytes(text)


def change(path: Path, key: str, value: Any) -> None:
    """Put a value at a dotted key of a JSON file, or take the key away (`ABSENT`)."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    *outer, last = key.split(".")
    place = found
    for name in outer:
        place = place.setdefault(name, {})
    if value is ABSENT:
        place.pop(last, None)
    else:
        place[last] = value
    rewrite(path, json.dumps(found))
