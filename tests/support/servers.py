"""A server in a thread of its own, as clients find it: on a port."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.engines import FakeEngine

from mmtransfer.speech.recognition import Recognizer


@dataclass
class Running:
    """A server that runs."""

    port: int
    state: Any
    """Its `Server`."""
    wyoming: int = 0
    """Its other port."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running(models=None, **given: Any) -> Iterator[Running]:
    """A server with these models and options, until the block ends."""
    from mmtransfer.server.options import ServerOptions
    from mmtransfer.server.serve import program

    models = {"site": "bundled:whisper-tiny.en"} if models is None else models
    made, bound = program(ServerOptions(models, port=0, **given))
    app: Any = made.config.app
    thread = threading.Thread(target=lambda: asyncio.run(made.serve(sockets=[bound])), daemon=True)
    thread.start()
    try:
        other = made.assistants[1].getsockname()[1] if made.assistants else 0
        yield Running(bound.getsockname()[1], app.state.server, other)
    finally:
        made.should_exit = True
        thread.join(60)
        bound.close()
        assert not thread.is_alive()


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine's loopback and its key."""
    files = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -out {files[0]} -keyout {files[1]}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return files


class SpokenEngine(FakeEngine):
    """A fake engine that notes in what language and with what prompt it decodes."""

    languages = ("en",)
    spoken: tuple[str | None, str] = (None, "")

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.spoken_calls: list[tuple[str | None, str]] = []

    def speaking(self, language, prompt):
        other = object.__new__(SpokenEngine)
        other.__dict__ = self.__dict__ | {"spoken": (language, prompt)}
        return other

    def decode(self, clips, context_s):
        self.spoken_calls.append(self.spoken)
        return super().decode(clips, context_s)


@pytest.fixture
def fake_recognizer(monkeypatch, whisper_tiny):
    """Makes servers decode with a fake engine, which the call gives."""

    def use(*arguments, **options):
        engine = SpokenEngine(*arguments, **options)
        monkeypatch.setattr(
            "mmtransfer.server.models.open_recognizer", lambda *a, **o: Recognizer(engine)
        )
        return engine

    return use
