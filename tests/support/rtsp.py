"""A camera: an RTSP server (RFC 2326) that plays audio over RTP in the same connection (RFC 3550).

As a program: python rtsp.py PORT AUDIO.npy PACE, until it is killed.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from contextlib import suppress

import numpy as np

PACKET_S = 0.02
AUDIO = "m=audio 0 RTP/AVP 97\r\na=rtpmap:97 L16/{rate}/1\r\na=control:trackID=1\r\n"
VIDEO = "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:trackID=1\r\n"


class RtspCamera:
    """Plays 16-bit audio once to each client, then stays silent; at the pace 1 as it was spoken.

    `changes` are calls to make when so many seconds of it have been played, in order, each once;
    those behind its end are made at the end. Fields may be changed while it runs: `answers` (a
    camera that accepts connections and says nothing), `has_audio`, `rate`, `damage` (share of
    packets that carry rubbish), `clock` (added to the timestamps of packets to come, in seconds).
    """

    def __init__(self, samples, port=0, rate=16_000, *, pace=1.0, changes=()):
        self.samples, self.rate, self.pace, self.changes = samples, rate, pace, list(changes)
        self.answers, self.has_audio, self.damage, self.clock = True, True, 0.0, 0.0
        self.clients, self.began_at = 0, 0.0  # when it last began to play, in seconds since 1970
        self.played = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"rtsp://127.0.0.1:{self._listener.getsockname()[1]}/audio"
        self._closing = threading.Event()
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        """Go away, and cut every connection."""
        self._closing.set()
        self._thread.join()
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _serve(self):
        self._listener.settimeout(0.05)
        while not self._closing.is_set():
            with suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self.clients += 1
                self._open.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        with suppress(OSError):
            text = b""
            while not self._closing.is_set():
                data = connection.recv(4096)
                if not data:
                    return
                text += data
                while self.answers and b"\r\n\r\n" in text:
                    head, _, text = text.partition(b"\r\n\r\n")
                    self._answer(connection, head.decode())

    def _answer(self, connection, head):
        lines = head.split("\r\n")
        method = lines[0].split()[0]
        fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        extra, body = "", ""
        if method == "OPTIONS":
            extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == "DESCRIBE":
            track = AUDIO.format(rate=self.rate) if self.has_audio else VIDEO
            body = f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n{track}"
            extra = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
        elif method == "SETUP":
            extra = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
        elif method == "PLAY":
            extra = "Session: 1\r\n"
        sequence = fields.get("CSeq", "0")
        connection.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {sequence}\r\n{extra}\r\n{body}".encode())
        if method == "PLAY" and self.has_audio:
            threading.Thread(target=self._play, args=(connection,), daemon=True).start()

    def _play(self, connection):
        rng = np.random.default_rng(0)
        size = round(PACKET_S * self.rate)
        data = (np.clip(self.samples, -1, 1) * 32767).astype(">i2")
        began, self.began_at = time.monotonic(), time.time()
        with suppress(OSError):
            for number, start in enumerate(range(0, len(data), size)):
                due = began + number * PACKET_S / self.pace
                if self._closing.wait(max(0.0, due - time.monotonic())):
                    return
                self._change(number * PACKET_S)
                payload = data[start : start + size].tobytes()
                if rng.random() < self.damage:
                    payload = rng.bytes(len(payload) // 2)
                stamp = (start + round(self.clock * self.rate)) % 2**32
                packet = struct.pack(">BBHII", 0x80, 97, number % 2**16, stamp, 7) + payload
                connection.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
        self._change(float("inf"))
        self.played.set()

    def _change(self, seconds):
        while self.changes and self.changes[0][0] <= seconds:
            self.changes.pop(0)[1]()


if __name__ == "__main__":
    RtspCamera(np.load(sys.argv[2]), int(sys.argv[1]), pace=float(sys.argv[3]))
    threading.Event().wait()
