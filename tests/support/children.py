"""Child processes that run the command line, without the seconds that its imports take.

They are forked from a server that has imported everything (`multiprocessing`'s fork server), so
each is a process of its own, with its own signals, streams and threads, that starts at once. A
test of the start itself, or of the interpreter's end, uses `subprocess`.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

import yaml
from conftest import ROOT, child_environment

from mmtransfer import cli

_PRELOADED = ["pytest", "support.preloaded"]
_started = threading.Lock()


class _Descriptor:
    """A file descriptor that goes to the child with the arguments."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.number),)


def _received(sent: Any) -> _Descriptor:
    return _Descriptor(sent.detach())


def forking_context() -> Any:
    """The context of `multiprocessing` that forks from the server, which is started if need be."""
    context = multiprocessing.get_context("forkserver")
    with _started:
        from multiprocessing import forkserver

        context.set_forkserver_preload(_PRELOADED)
        before = dict(os.environ)
        # The server does not take over the paths of modules; what it fails to import it leaves.
        os.environ.update(child_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
        # As the command line has them when it imports these libraries.
        os.environ.update({"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"})
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    return context


def _main(
    program: Path | str | None,
    arguments: list[str],
    environment: dict[str, str],
    streams: list[_Descriptor],
) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
        os.close(stream.number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as at a start
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if "support.preloaded" not in sys.modules:
        importlib.import_module("support.preloaded")  # says what the server could not import
        raise ImportError("support.preloaded is not imported before processes are forked")
    _reload_hub()
    sys.argv = [str(program or "mmtransfer"), *arguments]
    if program is None:
        cli.entry()
    elif isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})


def _reload_hub() -> None:
    """Address and cache folder of the Hub as the environment has them now; they are variables that
    huggingface_hub sets when it is imported.
    """
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


class Command:
    """`mmtransfer ARGUMENTS` in a process of its own; the part of `subprocess.Popen` tests use.

    Its streams are pipes of text, or of bytes. `program` is another one: a script, or Python code.
    """

    def __init__(
        self,
        *arguments: object,
        program: Path | str | None = None,
        environment: dict[str, str] | None = None,
        text: bool = True,
    ):
        ends = [os.pipe() for _ in range(3)]
        theirs = [ends[0][0], ends[1][1], ends[2][1]]
        ours = [ends[0][1], ends[1][0], ends[2][0]]
        process = forking_context().Process(
            target=_main,
            args=(
                program,
                [str(argument) for argument in arguments],
                environment or child_environment(),
                [_Descriptor(number) for number in theirs],
            ),
        )
        process.start()
        for number in theirs:
            os.close(number)
        self._process = process
        form = "" if text else "b"
        encoding = "utf-8" if text else None
        self.stdin: IO[Any] = os.fdopen(ours[0], "w" + form, encoding=encoding)
        self.stdout: IO[Any] = os.fdopen(ours[1], "r" + form, encoding=encoding)
        self.stderr: IO[Any] = os.fdopen(ours[2], "r" + form, encoding=encoding)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Its exit code; negative for the signal that ended it, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutError: it goes on.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"the command still runs after {timeout} s")
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, given: Any = None, timeout: float = 300) -> tuple[Any, Any]:
        """What it prints on both streams until it ends, after it was given the input."""
        printed: dict[str, Any] = {}

        def collect(name: str, stream: IO[Any]) -> None:
            printed[name] = stream.read()

        streams = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [
            threading.Thread(target=collect, args=item, daemon=True) for item in streams.items()
        ]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError):
            if given:
                self.stdin.write(given)
            self.stdin.close()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return printed["stdout"], printed["stderr"]

    def close(self) -> None:
        """End it, whatever it does, and close its streams."""
        self.kill()
        self.wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                stream.close()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_command(*arguments: object, given: Any = None, **options: Any) -> tuple[int, Any, Any]:
    """(exit code, standard output, error output) of a `Command` that is given its whole input."""
    with Command(*arguments, **options) as command:
        out, error = command.communicate(given)
        return command.wait(), out, error


def run_module(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
    """In the place of `subprocess.run`, for `python -m MODULE ARGUMENTS` of a module of ours."""
    module, *arguments = command[2:]
    program = f"import sys\nfrom {module} import main\nsys.exit(main(sys.argv[1:]))"
    code, out, error = run_command(*arguments, program=program, text=False)
    return subprocess.CompletedProcess(command, code, out, error)


# The command line, whose process gets a signal when it is about to take a step.
STOPPED = """
import itertools, os
from mmtransfer import cli
from mmtransfer.transfer.trainer import Trainer

steps, take_step = itertools.count(), Trainer._step

def stopped(*arguments):
    if next(steps) == {after}:
        os.kill(os.getpid(), {number})
    return take_step(*arguments)

Trainer._step = stopped
cli.entry()
"""


def start_training(
    config: dict[str, Any],
    folder: Path,
    *options: str,
    name: str = "config.yaml",
    stop: tuple[int, int] | None = None,
) -> Command:
    """`mmtransfer train` on a configuration, in a process of its own; with `stop`, a number of
    steps and a signal, it gets that signal in the next step.
    """
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    program = STOPPED.format(after=stop[0], number=int(stop[1])) if stop else None
    return Command("train", path, *options, program=program)
