"""Servers of others that a fleet needs, where their programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if _is_open(port):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@contextmanager
def postgres() -> Iterator[tuple[str, Path]]:
    """A PostgreSQL with one user, `site`, whose password is `wisteria`; gives the beginning of
    addresses, to which a database is added, and the folder of its files.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("needs PostgreSQL's server programs")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses root
        try:
            nobody = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("needs the user postgres, since PostgreSQL refuses root")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="postgres-") as made:
        if user:
            os.chown(made, user["user"], user["group"])
        with _postgres(Path(made), initdb, user) as address:
            yield address, Path(made) / "data"


@contextmanager
def _postgres(folder: Path, initdb: str, user: dict[str, Any]) -> Iterator[str]:
    data, secret, port = folder / "data", folder / "secret", free_port()
    secret.write_text("wisteria\n")
    make: list[Any] = [
        initdb,
        "-D",
        data,
        "-U",
        "site",
        "-A",
        "scram-sha-256",
        f"--pwfile={secret}",
    ]
    make += ["-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
    options = {"listen_addresses": "127.0.0.1", "port": port, "fsync": "off"}
    options |= {"unix_socket_directories": "", "max_connections": 30}
    run: list[Any] = [Path(initdb).with_name("postgres"), "-D", data]
    run += [f"--{name}={value}" for name, value in options.items()]
    with (folder / "log").open("wb") as log:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            run, stdout=log, stderr=log, cwd=folder, **user
        )
    try:
        _await(port, process, folder / "log")
        address = f"postgresql://site:wisteria@127.0.0.1:{port}/"
        for _ in range(600):  # it may still be starting
            with suppress(psycopg.OperationalError), psycopg.connect(f"{address}postgres"):
                break
            time.sleep(0.05)
        yield address
    finally:
        process.send_signal(signal.SIGINT)  # at SIGTERM it would wait for clients
        process.wait(60)


class Nats:
    """A nats-server with JetStream that can be stopped and started again."""

    def __init__(self, folder: Path):
        program = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin")
        if program is None:
            pytest.skip("needs nats-server")
        self._program, self._folder, self._port = program, folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"nats://site:wisteria@127.0.0.1:{self._port}"

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        log = self._folder / "log"
        command: list[Any] = [self._program, "-js", "-sd", self._folder, "-a", "127.0.0.1"]
        command += ["-p", str(self._port), "--user", "site", "--pass", "wisteria"]
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out)
        _await(self._port, self._process, log)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
