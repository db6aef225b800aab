"""More clients than there is room for, clients that leave, and clients that hang."""

import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import write_media
from support.servers import running
from support.web import wait_for

from mmtransfer.server import serve, uploads


@pytest.fixture
def recording(speech, tmp_path):
    return write_media(tmp_path / "gate.ogg", speech).read_bytes()


def post(server, recording, **options):
    form: dict[str, Any] = {"files": {"file": ("gate.ogg", recording)}, "data": {"model": "site"}}
    return httpx.post(f"{server.url}/v1/audio/transcriptions", timeout=60, **form, **options)


def number(server, name):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_who_finds_no_place_is_told_when_to_come_again(fake_recognizer, recording):
    hold = threading.Event()
    fake_recognizer(hold=lambda: hold.wait(60))
    with running(requests=2) as server, ThreadPoolExecutor(8) as pool:
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        first = [pool.submit(post, server, recording) for _ in range(2)]
        wait_for(lambda: server.state.places.taken == 2)
        late = [pool.submit(post, server, recording).result(60) for _ in range(6)]
        assert [answer.status_code for answer in late] == [503] * 6
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in late)
        assert late[0].json()["error"]["code"] == "overloaded"
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        hold.set()
        texts = [answer.result(60).json()["text"] for answer in first]
        assert texts == ["some words here some words here"] * 2
        assert post(server, recording).status_code == 200
        assert number(server, "mmtransfer_places_refused") == 6
        assert number(server, 'mmtransfer_requests_total{door="openai",status="503"}') == 6
        assert number(server, "mmtransfer_request_audio_seconds_total") > 30


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_gives_the_place_to_the_next(stream, fake_recognizer, recording):
    hold = threading.Event()
    engine = fake_recognizer(hold=lambda: hold.wait(60), workers=1)
    with running(requests=1) as server:
        url = f"{server.url}/v1/audio/transcriptions"
        files, data = {"file": ("gate.ogg", recording)}, {"stream": str(stream)}
        request = httpx.Request("POST", url, data=data, files=files)
        connection = socket.create_connection(("127.0.0.1", server.port))
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode())
        connection.sendall(request.read())
        wait_for(lambda: engine.running == 1)
        connection.close()
        if not stream:
            assert server.state.places.taken == 1  # what runs is waited for
        hold.set()
        wait_for(lambda: server.state.places.taken == 0)
        wait_for(lambda: not list(server.state.uploads.folder.iterdir()))
        assert post(server, recording).status_code == 200


def ask(server, *parts):
    """What a server answers to bytes, until it hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while data := connection.recv(4096):
            answer += data
    return answer.decode()


HEAD = (
    "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n"
    "Content-Type: multipart/form-data; boundary=x\r\n{}\r\n"
)


def test_who_hangs_is_let_go(fake_recognizer, monkeypatch):
    fake_recognizer()
    monkeypatch.setattr(serve, "_HEADERS_S", 0.3)
    monkeypatch.setattr(serve, "_IDLE_S", 0)
    monkeypatch.setattr(uploads, "_CHUNK_S", 0.3)
    with running() as server:
        assert ask(server) == ""
        assert ask(server, b"GET /healthz HTTP/1.1\r\nHost: localh") == ""
        assert "408" in ask(server, HEAD.format(5000, "").encode(), b"--x\r\n").splitlines()[0]
        slow = HEAD.format(5000, "Expect: 100-continue\r\nConnection: close\r\n").encode()
        assert " 408 " in ask(server, slow)
        monkeypatch.setattr(uploads, "_PATIENCE_S", -1.0)
        slow = HEAD.format(5000, "Connection: close\r\n").encode()
        assert " 408 " in ask(server, slow, b"--x\r\nContent-Disposition")
        assert server.state.places.taken == 0


def test_one_connection_too_many_is_told_when_to_come_again(fake_recognizer, monkeypatch):
    fake_recognizer()
    monkeypatch.setattr(serve, "_CONNECTIONS", 1)
    with running() as server, socket.create_connection(("127.0.0.1", server.port)) as first:
        first.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(4096).startswith(b"HTTP/1.1 200")
        late = httpx.get(f"{server.url}/healthz")
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) >= 1


def test_what_a_killed_server_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = tmp_path / "mmtransfer-uploads-killed"
    (killed / "files").mkdir(parents=True)
    (killed / "files" / "0.upload").write_bytes(b"secret")
    (killed / ".lock").touch()
    other = tmp_path / "mmtransfer-uploads-of-something-else"
    other.mkdir()
    running_one, starting = uploads.Uploads(1.0), uploads.Uploads(1.0)
    (running_one.folder / "1.upload").touch()
    assert not killed.exists()
    assert other.exists()
    assert starting.folder.is_dir()
    last = uploads.Uploads(1.0)
    assert (running_one.folder / "1.upload").exists()
    for one in (running_one, starting, last):
        one.close()
    assert list(tmp_path.iterdir()) == [other]


def test_too_large_is_refused_by_what_it_says_and_by_what_comes(fake_recognizer):
    fake_recognizer()
    with running(max_upload_mb=0.01) as server:
        close = "Connection: close\r\nExpect: 100-continue\r\n"
        assert " 413 " in ask(server, HEAD.format(10**12, close).encode())
        url = f"{server.url}/v1/audio/transcriptions"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        parts = (b"--x\r\n" for _ in range(10_000))  # without a length
        assert httpx.post(url, content=parts, headers=kind).status_code in (400, 413)
        long = {"Content-Type": f"multipart/form-data; boundary={'x' * 10_000}"}
        assert httpx.post(url, content=b"x", headers=long).status_code == 400
        fields = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' for _ in range(65)
        )
        found = httpx.post(url, content=fields + b"--x--\r\n", headers=kind)
        assert found.json()["error"]["message"] == "expected 64 fields at most."
