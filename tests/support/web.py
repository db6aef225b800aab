"""A web server that alerts are sent to."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest


class Receiver:
    """A web server that answers as told and keeps what it got."""

    def __init__(self, *answers):
        self.answers, self.got = list(answers), list[Any]()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((dict(self.headers), body))
                code = receiver.answers.pop(0) if receiver.answers else 200
                if code == "nonsense":
                    self.wfile.write(b"what?\r\n\r\n")
                    self.close_connection = True
                    return
                if code == "hang":
                    time.sleep(1.5)
                    code = 200
                self.send_response(code)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver():
    made = []

    def make(*answers):
        made.append(Receiver(*answers))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def wait_for(condition, seconds=120.0):
    """Until it holds; the time is for machines that have other work, no test depends on it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    assert condition()
