"""Stand-ins for what is monitored: cameras on real sockets, and folders of recordings."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time

import av
import numpy as np
import pytest
from conftest import EXAMPLE, write_media
from support.rtsp import RtspCamera

from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio

QUICK_DECODING = ("--threads", "1", "--beam", "1")
"""Options with which a monitor of cameras, that decodes once before it begins, begins sooner."""


def decode(path):
    return np.concatenate(list(stream_audio(path)))


def transport_stream(samples, rate=SAMPLE_RATE):
    """The bytes of an MPEG transport stream, as cameras send it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as out:
        stream = out.add_stream("aac", rate=rate, layout="mono")
        for start in range(0, len(samples), rate):
            block = np.ascontiguousarray(samples[None, start : start + rate])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


class Server:
    """A TCP server that plays one of its scripts to each connection, in turn; the last for ever.

    A script is a list of bytes to send and of seconds to wait.
    """

    def __init__(self, *scripts):
        self.scripts, self.connections = list(scripts), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        self._listener.settimeout(0.1)
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            self.connections += 1
            threading.Thread(target=self._play, args=(connection, script), daemon=True).start()

    def _play(self, connection, script):
        with connection:
            for part in script:
                if isinstance(part, bytes):
                    try:
                        connection.sendall(part)
                    except OSError:
                        return
                else:
                    self._closing.wait(part)

    def close(self):
        self._closing.set()
        self._thread.join()
        self._listener.close()


class Paced(Server):
    """Sends 16-bit audio at a pace, 1 as it was spoken, as a WAV stream without an end."""

    def __init__(self, *scripts, pace=1.0):
        self.pace = pace
        super().__init__(*scripts)

    def _play(self, connection, script):
        (samples,) = script
        header = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 0xFFFFFFFF, b"WAVEfmt ", 16, 1, 1,
                             SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16, b"data", 0xFFFFFFFF)  # fmt: skip
        data = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        began, piece = time.monotonic(), SAMPLE_RATE // 10  # a twentieth of a second
        with connection:
            connection.sendall(header)
            for start in range(0, len(data), piece):
                due = began + (start + piece) / (2 * SAMPLE_RATE) / self.pace
                if self._closing.wait(max(0.0, due - time.monotonic())):
                    return
                try:
                    connection.sendall(data[start : start + piece])
                except OSError:
                    return
            self._closing.wait(60)


@pytest.fixture(scope="session")
def short_video(tmp_path_factory):
    """The first minute of the example's video: nine utterances, sound and picture."""
    path = tmp_path_factory.mktemp("short") / "monitor.mp4"
    with av.open(str(EXAMPLE / "monitor.mp4")) as whole, av.open(str(path), "w") as part:
        streams = {s.index: part.add_stream_from_template(s) for s in whole.streams}
        for packet in whole.demux():
            if packet.dts is not None and packet.dts * packet.time_base < 62:
                packet.stream = streams[packet.stream.index]
                part.mux(packet)
    return path


@pytest.fixture(scope="session")
def camera_speech():
    """Twenty seconds of the example, and silence behind it, so that the last words end."""
    return np.concatenate(
        [decode(EXAMPLE / "monitor.mp4")[: 20 * SAMPLE_RATE], np.zeros(SAMPLE_RATE)]
    )


@pytest.fixture(scope="session")
def camera_stream(camera_speech):
    return transport_stream(camera_speech.astype(np.float32))


@pytest.fixture
def camera():
    made = []

    def make(*scripts):
        made.append(Server(*scripts))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def rtsp():
    made = []

    def make(samples, **options):
        made.append(RtspCamera(samples, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def remuxed(source, path):
    """The same packets in another container."""
    with av.open(str(source)) as read, av.open(str(path), "w") as made:
        streams = {s.index: made.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
    return path


def write_at(path, samples, end):
    """A recording that was complete at a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_media(path, samples)
    os.utime(path, (end, end))


def write_pieces(folder, samples, seconds, began, name="{:03d}.wav"):
    """Recordings of so many seconds that follow each other; returns when the last one ended."""
    step, end = seconds * SAMPLE_RATE, began
    for number, start in enumerate(range(0, len(samples), step)):
        piece = samples[start : start + step]
        end += len(piece) / SAMPLE_RATE
        write_at(folder / name.format(number), piece, end)
    return end
