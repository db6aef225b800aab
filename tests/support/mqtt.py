"""A broker of MQTT."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest


@pytest.fixture
def broker():
    """A real broker; what was published to it, and what stops and starts it."""
    from amqtt.broker import Broker

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    async def start():
        made = Broker(config)
        await made.start()
        return made

    running = []
    yield port, lambda: running.append(run(start())), lambda: run(running.pop().shutdown())
    if running:
        run(running.pop().shutdown())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
