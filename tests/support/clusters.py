"""What runs in bulk have written, and processes of theirs that are killed."""

import os
import signal
import time
from pathlib import Path


def tree(folder):
    """What a run has written, but for what tells how long it took."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(n): p.read_bytes() for n, p in found.items() if n.name != "summary.json"}


def kill_one(title):
    """Kill a process below this one by the beginning of its title; whether there was one."""
    for number in below(os.getpid()):
        try:
            found = Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            continue
        if found.startswith(title.encode()):
            os.kill(number, signal.SIGKILL)
            return True
    return False


def below(parent):
    """The processes that this one, or one of its own, has started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, owner, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":  # nobody has taken note yet that it ended
            children.setdefault(int(owner), []).append(int(folder.name))
    found = [*children.get(parent, ())]
    for number in found:
        found += children.get(number, ())
    return found


def when_gone(session):
    """Wait until the processes of a session have ended, or end them: its cluster is of no use."""
    deadline = time.monotonic() + 20
    while members := [n for n in below(1) if in_session(n, session)]:
        if time.monotonic() > deadline:
            for number in members:
                os.kill(number, signal.SIGKILL)
        time.sleep(0.2)


def in_session(number, session):
    try:
        return os.getsid(number) == session
    except OSError:
        return False
