"""A voice assistant's client: what there is, and a command as text."""

import asyncio
import json
import socket
from unittest.mock import Mock

import numpy as np
import pytest
from support.servers import running
from support.web import wait_for
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong

from mmtransfer.server import wyoming


@pytest.fixture(scope="module")
def served(whisper_tiny):
    with running(wyoming=0, streams=1) as server:
        yield server


async def command(port, samples, *, model="site", language=None, rate=16_000, width=2):
    """What a client gets for a spoken command."""
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Transcribe(name=model, language=language).event())
        await client.write_event(AudioStart(rate, width, 1).event())
        data = (32767 * samples).astype("<i2").tobytes()
        for start in range(0, len(data), 2048):
            chunk = AudioChunk(rate, width, 1, data[start : start + 2048])
            await client.write_event(chunk.event())
        await client.write_event(AudioStop().event())
        return await client.read_event()


def test_a_command_becomes_text(served, speech):
    async def talk():
        async with AsyncTcpClient("127.0.0.1", served.wyoming) as client:
            await client.write_event(Describe().event())
            info = Info.from_event(await client.read_event())
            await client.write_event(Ping("still there?").event())
            return info, Pong.from_event(await client.read_event())

    info, pong = asyncio.run(talk())
    assert [(model.name, model.languages) for model in info.asr[0].models] == [("site", ["en"])]
    assert pong.text == "still there?"
    for _ in range(2):  # its place is free again
        found = asyncio.run(command(served.wyoming, speech, language="en"))
        assert len(Transcript.from_event(found).text.split()) > 15
    silence = asyncio.run(command(served.wyoming, np.zeros(16_000, np.float32)))
    assert Transcript.from_event(silence).text == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "other"}, "model 'other': no model for speech of that name"),
        ({"language": "klingon"}, "language: expected an ISO code"),
        ({"language": "de"}, "English only"),
        ({"rate": 7}, "expected audio of 8000 to 192000 Hz"),
        ({"width": 3}, "width 2 or 4"),
        ({"width": []}, "width 2 or 4"),
    ],
)
def test_what_cannot_be_transcribed_is_an_error_event(given, message, served, speech):
    found = asyncio.run(command(served.wyoming, speech[:1000], **given))
    assert message in Error.from_event(found).text


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"type": "audio-start", "payload_length": 99999999999}\n',
        b'{"type": "audio-start", "data_length": -1}\n',
        b"x" * 200_000,
        b'{"type": "transcribe", "data": {',
        b"[" * 60_000 + b"\n",
    ],
)
def test_what_is_no_event_ends_the_connection(sent, served, monkeypatch, caplog):
    monkeypatch.setattr(wyoming, "_IDLE_S", 0.5)
    with socket.create_connection(("127.0.0.1", served.wyoming), timeout=60) as connection:
        try:
            connection.sendall(sent)
            assert connection.recv(100) == b""
        except ConnectionResetError:
            pass  # what it did not take was still on its way
    with socket.create_connection(("127.0.0.1", served.wyoming), timeout=60) as connection:
        connection.sendall(b'{"type": "ping"}\n')
        assert b"pong" in connection.recv(100)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("farewell", [True, False])
def test_a_command_longer_than_may_be_gets_the_text_so_far(
    farewell, fake_recognizer, speech, monkeypatch
):
    fake_recognizer()
    sent = np.tile(speech, 4)  # more than waits for a reader
    with running(wyoming=0, streams=1, max_audio_s=5.0) as server:
        take = Mock(wraps=server.state.streams.take)
        monkeypatch.setattr(server.state.streams, "take", take)
        for number in (1, 2):  # its place is free again
            if farewell:
                found = asyncio.run(command(server.wyoming, sent))
                assert Transcript.from_event(found).text == "some words here"
            else:
                asyncio.run(leave_in(server.wyoming, sent))
            wait_for(lambda n=number: take.call_count == n and not server.state.streams.taken)
        assert server.state.streams.refused == 0


async def leave_in(port, samples):
    """Leave in the middle of a command, without a word."""
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(AudioStart(16_000, 2, 1).event())
        data = (32767 * samples).astype("<i2").tobytes()
        for start in range(0, len(data), 32_000):
            chunk = AudioChunk(16_000, 2, 1, data[start : start + 32_000])
            await client.write_event(chunk.event())


def test_who_stops_talking_without_a_word_loses_the_place(served, monkeypatch):
    monkeypatch.setattr(wyoming, "_AUDIO_S", 0.3)
    event = {"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1}}
    with socket.create_connection(("127.0.0.1", served.wyoming), timeout=60) as connection:
        connection.sendall(json.dumps(event).encode() + b"\n")
        assert connection.recv(100) == b""
    assert served.state.streams.taken == 0
