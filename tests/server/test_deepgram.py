"""Deepgram's own client on a live stream of real speech: interim and final texts, its end."""

import json
import socket
import struct
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import av
import numpy as np
import pytest
from conftest import write_media
from deepgram import DeepgramClient
from deepgram.core.events import EventType
from deepgram.environment import DeepgramClientEnvironment
from support.servers import running
from support.web import wait_for
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from mmtransfer.server import deepgram


@pytest.fixture(scope="module")
def served(whisper_tiny):
    with running(streams=2) as server:
        yield server


def client_of(served):
    ends = dict.fromkeys(["production", "agent"], f"ws://127.0.0.1:{served.port}")
    ends |= dict.fromkeys(["base", "agent_rest"], served.url)
    return DeepgramClient(api_key="none", environment=DeepgramClientEnvironment(**ends))


class Listened:
    """What a client received, by kind."""

    def __init__(self, socket):
        self.messages: list[Any] = []
        self.is_closed = False
        socket.on(EventType.MESSAGE, self.messages.append)
        socket.on(EventType.CLOSE, lambda _: setattr(self, "is_closed", True))
        self.thread = threading.Thread(target=socket.start_listening, daemon=True)
        self.thread.start()

    def of(self, kind, **wanted):
        found = [m for m in self.messages if m.type == kind]
        return [m for m in found if all(getattr(m, k) == v for k, v in wanted.items())]

    @property
    def text(self):
        finals = self.of("Results", is_final=True)
        return " ".join(message.channel.alternatives[0].transcript for message in finals)


def pcm(speech):
    return (32767 * speech).astype("<i2").tobytes()


def test_speech_comes_back_as_interim_and_then_final_text(served, speech):
    with client_of(served).listen.v1.connect(
        model="site", encoding="linear16", sample_rate="16000", interim_results="true"
    ) as socket:
        got = Listened(socket)
        data = pcm(speech)
        for start in range(0, len(data), 3200):
            socket.send_media(data[start : start + 3200])
        socket.send_keep_alive()
        socket.send_finalize()
        wait_for(lambda: got.of("Results", from_finalize=True))
        before = got.text.strip()
        assert len(before.split()) > 15
        for start in range(0, len(data), 3200):
            socket.send_media(data[start : start + 3200])
        socket.send_close_stream()
        wait_for(lambda: got.is_closed)
    assert got.of("Metadata")[0].duration == pytest.approx(2 * len(speech) / 16_000, abs=0.01)
    finals = [m for m in got.of("Results", is_final=True) if m.duration]
    starts = [m.start for m in finals]
    assert starts == sorted(starts)
    assert finals[0].speech_final
    best = finals[0].channel.alternatives[0]
    assert [word.punctuated_word for word in best.words] == best.transcript.split()
    assert finals[0].start <= best.words[0].start <= best.words[-1].end
    assert best.words[-1].end <= finals[0].start + finals[0].duration
    assert 0 < best.confidence < 1
    text = {True: "", False: ""}
    for message in finals:
        text[message.start > 10] += f" {message.channel.alternatives[0].transcript}"
    assert text[False].strip() == text[True].strip() == before


def encoded(speech, container, tmp_path):
    return write_media(tmp_path / f"live.{container}", speech).read_bytes()


@pytest.mark.parametrize("form", ["ogg", "mkv", "wav", "mulaw", "alaw", "linear32"])
def test_containers_and_raw_samples_of_other_forms(form, served, speech, tmp_path):
    parameters = {}
    samples = (32767 * speech).astype("<i2")
    if form in ("mulaw", "alaw"):
        coder: Any = av.CodecContext.create(f"pcm_{form}", "w")
        coder.sample_rate, coder.format, coder.layout = 16_000, "s16", "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate = 16_000
        data = b"".join(bytes(packet) for packet in [*coder.encode(frame), *coder.encode(None)])
    elif form == "linear32":
        data = np.repeat(samples.astype("<i4") << 16, 2).tobytes()  # of two channels
        parameters["channels"] = "2"
    else:
        data = encoded(speech, form, tmp_path)
    if form not in ("ogg", "mkv", "wav"):
        parameters |= {"encoding": form, "sample_rate": "16000"}
    with client_of(served).listen.v1.connect(model="site", **parameters) as socket:
        got = Listened(socket)
        for start in range(0, len(data), 1237):
            socket.send_media(data[start : start + 1237])
        socket.send_close_stream()
        wait_for(lambda: got.is_closed)
    assert got.of("Metadata")[0].duration == pytest.approx(len(speech) / 16_000, abs=0.2)
    assert len(got.text.split()) > 15
    assert "gate" in got.text.casefold()
    assert not got.of("Results", is_final=False)


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"model": "nova"}, 404, "model 'nova': no model for speech"),
        ({"encoding": "linear16", "sample_rate": "7"}, 400, "sample_rate: expected 8000 to 192000"),
        ({"encoding": "linear16"}, 400, "sample_rate: expected"),
        ({"encoding": "mulaw", "sample_rate": "8000", "channels": "99"}, 400, "channels: expected"),
        ({"encoding": "g729", "sample_rate": "8000"}, 400, "encoding: expected one of linear16"),
        ({"language": "klingon"}, 400, "language: expected an ISO code"),
        ({"language": "de"}, 400, "English only"),
    ],
)
def test_bad_parameters_are_refused_before_the_stream_begins(given, status, message, served):
    url = f"ws://127.0.0.1:{served.port}/v1/listen?{urlencode({'model': 'site'} | given)}"
    with pytest.raises(InvalidStatus) as refused:
        connect(url)
    assert refused.value.response.status_code == status
    assert message in json.loads(refused.value.response.body)["err_msg"]


def test_streams_have_places_and_silent_clients_lose_theirs(fake_recognizer, monkeypatch):
    fake_recognizer()
    monkeypatch.setattr(deepgram, "_SILENT_S", 0.5)
    with running(streams=1) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/listen?encoding=linear16&sample_rate=16000"
        with connect(url) as first:
            with pytest.raises(InvalidStatus, match="503"):
                connect(url)
            first.send("nonsense")
            assert "SchemaError" in first.recv(timeout=60)
            assert "Metadata" in first.recv(timeout=60)
            with suppress(ConnectionClosedError):
                first.recv(timeout=60)
        assert first.close_code == 1011
        wait_for(lambda: server.state.streams.taken == 0)
        with connect(url) as second:
            second.send(b"\0" * 3200)
            second.socket.close()  # no farewell
        wait_for(lambda: server.state.streams.taken == 0)
        with connect(url) as rude:
            for _ in range(500):
                rude.send("nonsense")
            linger = struct.pack("ii", 1, 0)
            rude.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            rude.socket.close()  # while the error is sent to it
        wait_for(lambda: server.state.streams.taken == 0)
        with connect(url) as third:
            third.send('{"type": "CloseStream"}')
            assert "Metadata" in third.recv(timeout=60)
        with pytest.raises(InvalidStatus, match="403"):
            connect(url, origin=Origin("https://elsewhere.example"))
        broken = f"ws://127.0.0.1:{server.port}/v1/listen"
        with connect(broken) as fourth:
            fourth.send(b"\n" * 100_000)
            with suppress(ConnectionClosedError):
                list(fourth)
        assert fourth.close_code == 1008
        assert "DATA-0000" in (fourth.close_reason or "")
