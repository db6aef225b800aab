"""Addresses that lead on: redirects and playlists reach what anybody can, and the own host of the
source, and nothing else of this machine or its network.
"""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import pytest
from conftest import tone

from mmtransfer.monitoring.sources.clips import cut_recording
from mmtransfer.speech.audio import MediaError, open_media, stream_audio
from mmtransfer.speech.remote import ALLOWED

PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{}\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"


class Places:
    """A web server on every address of loopback: answers by path, and what was asked for."""

    def __init__(self, segment):
        self.answers = {"/a.ts": segment}
        self.asked: list[tuple[str, str]] = []
        places = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                places.asked.append((self.headers["Host"], self.path))
                found = places.answers.get(self.path, b"")
                self.send_response(302 if isinstance(found, str) else 200 if found else 404)
                if isinstance(found, str):
                    self.send_header("Location", found)
                body = b"" if isinstance(found, str) else found
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def at(self, host, path):
        return f"http://{host}:{self.port}{path}"


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    path = tmp_path_factory.mktemp("segment") / "a.ts"
    with av.open(str(path), "w", format="mpegts") as out:
        stream = out.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(2.0)[None], "fltp", "mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return path.read_bytes()


@pytest.fixture
def places(segment):
    served = Places(segment)
    yield served
    served.server.shutdown()
    served.server.server_close()


def seconds(source):
    return sum(map(len, stream_audio(source))) / 16_000


def test_redirects_and_playlists_of_the_sources_own_host_are_followed(places, tmp_path):
    own = places.at("127.0.0.1", "")
    places.answers |= {
        "/r": f"{own}/r2",
        "/r2": "/a.ts",
        "/s.ts": "/a.ts",
        "/live": "/x.m3u8",
        "/x.m3u8": PLAYLIST.format("a.ts", f"{own}/s.ts").encode(),
    }
    assert seconds(f"{own}/a.ts") == pytest.approx(seconds(f"{own}/r"))
    assert len(places.asked) < 8
    assert seconds(f"{own}/x.m3u8") > 3.5
    assert seconds(f"{own}/live") > 3.5
    cut_recording(f"{own}/r", 0.0, 1.0, tmp_path / "clip.mkv")
    assert (tmp_path / "clip.mkv").stat().st_size
    assert (tmp_path / "clip.mkv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["redirect", "playlist", "playlist of playlists", "second segment"])
@pytest.mark.parametrize("to", ["127.0.0.2", "[::ffff:127.0.0.3]", "localhost.evil.test"])
def test_hosts_of_this_machine_are_not_reached_from_elsewhere(
    how, to, places, monkeypatch, segment
):
    found = socket.getaddrinfo

    def resolve(host, *arguments, **options):
        return found("127.0.0.4" if host.endswith(".test") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    target = places.at(to, "/secret.ts")
    outer = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{}\n"
    places.answers |= {
        "/secret.ts": segment,
        "/redirect": target,
        "/inner.m3u8": PLAYLIST.format(target, target).encode(),
        "/x.m3u8": {
            "playlist": PLAYLIST.format(target, target),
            "playlist of playlists": outer.format("inner.m3u8"),
            "second segment": PLAYLIST.format("a.ts", target),
        }.get(how, "").encode(),
    }
    source = places.at("127.0.0.1", "/redirect" if how == "redirect" else "/x.m3u8")
    if how == "second segment":
        assert seconds_or_less(source) < 2.5
    else:
        with pytest.raises(MediaError, match=rf"leads to .*{ALLOWED}"):
            open_media(source)
    assert "/secret.ts" not in [path for _, path in places.asked]
    monkeypatch.setenv(ALLOWED, "10.0.0.0/8, 127.0.0.0/8")
    assert seconds_or_less(source) > 1.5
    assert "/secret.ts" in [path for _, path in places.asked]


def seconds_or_less(source):
    """Audio of a recording that may end early."""
    found = 0
    try:
        for block in stream_audio(source):
            found += len(block)
    except MediaError:
        pass
    return found / 16_000


@pytest.mark.parametrize("place", ["file:///etc/passwd", "tcp://127.0.0.1:1/a", "http://[/", ""])
def test_other_protocols_are_not_followed(place, places):
    places.answers |= {"/r": place, "/x.m3u8": PLAYLIST.format(place, place).encode()}
    for path in ("/r", "/x.m3u8"):
        with pytest.raises(MediaError):
            open_media(places.at("127.0.0.1", path))


def test_a_circle_of_redirects_ends(places):
    places.answers |= {"/r": "/r"}
    with pytest.raises(MediaError, match="redirects"):
        open_media(places.at("127.0.0.1", "/r"))
    assert len(places.asked) < 12
