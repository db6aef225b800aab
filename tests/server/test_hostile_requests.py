"""Requests that are made to do harm, and the table of OWASP ASVS 5.0, level 1, in the docs.

One server with tokens takes them all, and answers as before at the end.
"""

import ast
import asyncio
import re
import socket
import ssl
import time
from contextlib import suppress

import httpx
import pytest
from conftest import ROOT
from support.engines import FakeEngine
from support.servers import running, write_certificate
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import CloseCode

from mmtransfer.server import access
from mmtransfer.server.tokens import Role, Tokens
from mmtransfer.speech.recognition import Recognizer

TABLE = ROOT / "docs" / "reference" / "asvs.md"
ASSETS = ROOT / "mmtransfer" / "server" / "assets"
LISTEN = "/v1/listen?encoding=linear16&sample_rate=16000"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
LEVEL_1 = """
1.2.1 1.2.2 1.2.3 1.2.4 1.2.5 1.3.1 1.3.2 1.5.1 2.1.1 2.2.1 2.2.2 2.3.1 3.2.1 3.2.2 3.3.1 3.4.1
3.4.2 3.5.1 3.5.2 3.5.3 4.1.1 4.4.1 5.2.1 5.2.2 5.3.1 5.3.2 6.1.1 6.2.1 6.2.2 6.2.3 6.2.4 6.2.5
6.2.6 6.2.7 6.2.8 6.3.1 6.3.2 6.4.1 6.4.2 7.2.1 7.2.2 7.2.3 7.2.4 7.4.1 7.4.2 8.1.1 8.2.1 8.2.2
8.3.1 9.1.1 9.1.2 9.1.3 9.2.1 10.4.1 10.4.2 10.4.3 10.4.4 10.4.5 11.3.1 11.3.2 11.4.1 12.1.1
12.2.1 12.2.2 13.4.1 14.2.1 14.3.1 15.1.1 15.2.1 15.3.1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a file that nobody may get, a certificate, and tokens of each role."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.txt").write_text("TOP SECRET")
    given = {role: Tokens(folder / "tokens.json").add(role.name.lower(), role) for role in Role}
    return folder, given, write_certificate(folder)


@pytest.fixture(scope="module")
def server(place, whisper_tiny):
    """A server with tokens and an empty journal, that must be unharmed at the end."""
    folder = place[0]
    (folder / "journal").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        engine = FakeEngine(lambda context_s: "some words here")
        patched.setattr(
            "mmtransfer.server.models.open_recognizer", lambda *a, **o: Recognizer(engine)
        )
        patched.setattr(access, "_TRY_S", 0.0)
        with running(tokens=folder / "tokens.json", journal=folder / "journal") as server:
            yield server
            assert httpx.get(f"{server.url}/healthz").text == "ok\n"
            while server.state.streams.taken:  # of the last client, which is just gone
                time.sleep(0.01)
            assert server.state.places.taken == server.state.streams.taken == 0
            assert list(server.state.uploads.folder.iterdir()) == []
            assert (folder / "secret.txt").read_text() == "TOP SECRET"


@pytest.fixture
def admin(place):
    return {"Authorization": f"Bearer {place[1][Role.ADMIN]}"}


def raw(server, text: str) -> str:
    """What is answered to bytes, until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(text.encode("latin-1"))
        answer = b""
        with suppress(ConnectionResetError):  # it hangs up on what is too long
            while data := connection.recv(65536):
                answer += data
    return answer.decode("latin-1")


def logged_in(server, token) -> httpx.Client:
    client = httpx.Client(base_url=server.url)
    client.headers[access.CSRF] = client.post("/login", json={"token": token}).json()["csrf"]
    return client


def handshake(address: str, headers=None, **options) -> int:
    """The status with which a WebSocket is answered.

    Not by the client with threads: it reads and writes one TLS connection from two of them at a
    time, so that about one handshake in 300 on a busy machine waits for ever.
    """

    async def answered() -> int:
        try:
            async with connect(address, additional_headers=headers, **options):
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    return asyncio.run(answered())


# --- paths, sizes, forms -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../tokens.py",
        "/static/%2e%2e/tokens.py",
        "/static/..%2ftokens.py",
        "/static/%252e%252e%252ftokens.py",
        "/static/..\\tokens.py",
        "/static//etc/passwd",
        "/static/index.html%00.css",
        "/.git/config",
        "//etc/passwd",
        "/v1/models/../../etc/passwd",
        "/models/..%2f..%2fetc%2fpasswd",
        "/api/audio?camera=..%2f..&id=..%2f..%2fsecret.txt&at=0",
        "/api/moment?camera=gate&id=%2fetc%2fpasswd&at=0",
    ],
)
def test_no_path_leads_out(path, server, admin, place):
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = raw(server, f"{head}Authorization: {admin['Authorization']}\r\n\r\n")
    assert answer.split()[1] in ("400", "404", "405")
    for hidden in ("root:", "SECRET", "import ", str(place[0])):
        assert hidden not in answer


def test_a_files_name_is_text_and_never_a_path(server, admin, place, tmp_path):
    folder = place[0]
    before = sorted(folder.rglob("*"))
    for name in (
        f"{folder}/secret.txt",
        "../../secret.txt",
        "<script>alert(1)</script>.wav",
        "concat:a|b.wav",
        "x" * 5000 + ".wav",
        "a.wav\x00.sh",
    ):
        answer = httpx.post(
            server.url + TRANSCRIPTIONS, headers=admin, files={"file": (name, b"no recording")}
        )
        assert answer.status_code == 400
        assert name[:200] not in answer.text
        assert str(server.state.uploads.folder) not in answer.text
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n",
        b"ffconcat version 1.0\nfile {secret}\n",
        b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file://{secret}">]><MPD>&b;</MPD>',
        b"RIFF\xff\xff\xff\xffWAVEfmt \xff\xff\xff\xff",
        b"\x1aE\xdf\xa3" + bytes(64),
        b"",
    ],
)
def test_a_recording_opens_no_other_file(content, server, admin, place):
    content = content.replace(b"{secret}", str(place[0] / "secret.txt").encode())
    files = {"file": ("talk.wav", content)}
    answer = httpx.post(server.url + TRANSCRIPTIONS, headers=admin, files=files, timeout=60)
    assert answer.status_code == 400
    assert "SECRET" not in answer.text
    assert str(place[0]) not in answer.text


@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "a" * 200_000 + "\r\n\r\n",
        "GET /" + "a" * 200_000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        "POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "nonsense\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(request_text, server):
    answer = raw(server, request_text)
    is_long = len(request_text) > 100_000
    assert (is_long and not answer) or answer.split()[1] in ("400", "431", "501")
    assert answer.count("HTTP/1.1 ") <= 1


def test_bodies_of_json_are_bounded_in_size_and_depth(server, admin):
    for body, status in ((b"[" * 4000, 400), (b'"' + b"a" * 5000, 413), (b"\xff\xfe", 400)):
        answer = httpx.post(f"{server.url}/login", headers=admin, content=body)
        assert answer.status_code == status
    answer = httpx.post(f"{server.url}/models/site", headers=admin, content=b"[" * 100_000)
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize(
    "message", [b"x" * ((1 << 20) + 1), [b"x"] * 5000], ids=["long", "in many parts"]
)
def test_a_message_that_is_too_much_ends_its_connection(message, server, admin):
    async def code() -> int | None:
        async with connect(
            server.url.replace("http", "ws") + LISTEN, additional_headers=admin
        ) as it:
            with suppress(ConnectionClosed):
                await it.send(message)
            await it.wait_closed()
            return it.close_code

    # The connection may be reset before the client sees why: there was more to come.
    assert asyncio.run(code()) in (CloseCode.MESSAGE_TOO_BIG, CloseCode.ABNORMAL_CLOSURE)


# --- who asks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cookie",
    [
        f"{access.COOKIE}={'A' * 43}",
        f"{access.COOKIE}=",
        f"{access.COOKIE}=../../tokens.json",
        f"{access.COOKIE}=admin; role=admin; name=admin",
        f"__Host-{access.COOKIE}={'A' * 43}",
    ],
)
def test_a_forged_cookie_is_nobody(cookie, server):
    for path in ("/session", "/api/search", "/metrics", "/v1/models"):
        assert httpx.get(server.url + path, headers={"Cookie": cookie}).status_code == 401
    address = server.url.replace("http", "ws") + LISTEN
    assert handshake(address, {"Cookie": cookie}) in (401, 403)


def test_what_another_site_sends_is_refused(server, place):
    client = logged_in(server, place[1][Role.ADMIN])
    for headers in (
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{server.port + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"},
    ):
        for path in ("/logout", TRANSCRIPTIONS, "/models/site", "/login"):
            assert client.post(path, headers=headers).status_code == 403
    cookie = f"{access.COOKIE}={client.cookies[access.COOKIE]}"
    address = server.url.replace("http", "ws") + LISTEN
    assert handshake(address, {"Cookie": cookie}, origin="https://elsewhere.example") == 403
    assert handshake(address, {"Cookie": cookie}, origin=server.url) == 101
    del client.headers[access.CSRF]  # as a form of another site would come
    assert client.post("/logout").status_code == 403
    assert client.get("/session").status_code == 200
    client.close()


def test_tokens_come_in_headers_alone_and_no_account_is_there_before(server, place):
    token = place[1][Role.ADMIN]
    for query in (f"token={token}", f"access_token={token}", f"api_key={token}"):
        assert httpx.get(f"{server.url}/session?{query}").status_code == 401
    for guess in ("", "admin", "root", "none", token[:-1], token.lower(), f"{token} "):
        answer = httpx.post(f"{server.url}/login", json={"token": guess})
        assert answer.status_code == 401
    assert httpx.post(f"{server.url}/login", json={"token": {"$ne": ""}}).status_code == 401


def test_each_login_is_a_new_session_and_ends_the_one_before(server, place):
    client = logged_in(server, place[1][Role.VIEWER])
    first = client.cookies[access.COOKIE]
    client.post("/login", json={"token": place[1][Role.VIEWER]})
    second = client.cookies[access.COOKIE]
    assert first != second
    assert len(second) >= 43  # of 256 bits
    for cookie, status in ((first, 401), (second, 200)):
        headers = {"Cookie": f"{access.COOKIE}={cookie}"}
        assert httpx.get(f"{server.url}/session", headers=headers).status_code == status
    answer = client.post("/logout", headers={access.CSRF: client.get("/session").json()["csrf"]})
    assert "storage" in answer.headers["clear-site-data"]
    headers = {"Cookie": f"{access.COOKIE}={second}"}
    assert httpx.get(f"{server.url}/session", headers=headers).status_code == 401
    client.close()


def test_what_changes_something_is_no_get(server, admin):
    for path in ("/logout", TRANSCRIPTIONS, "/models/site"):
        assert httpx.get(server.url + path, headers=admin).status_code == 405


# --- what is answered ----------------------------------------------------------------------------


def test_every_answer_says_what_it_is_and_is_for_this_site_alone(server, admin):
    served = ("/", "/login", "/static/page.js", "/static/page.css", "/session", "/metrics")
    for path in (
        *served,
        "/healthz",
        "/v1/models",
        "/api/search",
        "/nothing",
        "/api/search?after=x",
    ):
        answer = httpx.get(server.url + path, headers=admin | {"Origin": server.url})
        kind = answer.headers["content-type"]
        assert kind == "application/json" or "charset=utf-8" in kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert "Traceback" not in answer.text


def test_the_page_runs_no_text_and_builds_no_markup():
    scripts = "".join(path.read_text() for path in ASSETS.glob("*.js"))
    pattern = r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(pattern, scripts)
    assert not re.search(r"javascript:|https?://(?!www\.w3\.org/2000/svg)", scripts)
    pages = "".join(path.read_text() for path in ASSETS.glob("*.html"))
    assert not re.search(r"<script(?! type=\"module\" src=\"/static/)|\son\w+=|https?://", pages)
    login = (ASSETS / "login.html").read_text()
    assert 'type="password" autocomplete="current-password"' in login
    assert "paste" not in (ASSETS / "login.js").read_text()


def test_over_tls_cookies_sockets_and_versions_are_what_they_should_be(
    place, fake_recognizer, monkeypatch
):
    fake_recognizer()
    folder, given, files = place
    tls = {"tls_certificate": files[0], "tls_key": files[1]}
    with running(tokens=folder / "tokens.json", **tls) as server:
        trusted = ssl.create_default_context(cafile=str(files[0]))
        url = f"https://127.0.0.1:{server.port}"
        with httpx.Client(verify=trusted, base_url=url) as client:
            answer = client.post("/login", json={"token": given[Role.OPERATOR]})
            cookie = answer.headers["set-cookie"]
            assert cookie.startswith(f"__Host-{access.COOKIE}=")
            for part in ("Secure", "HttpOnly", "SameSite=strict", "Path=/"):
                assert part in cookie
            age = re.search(r"max-age=(\d+)", answer.headers["strict-transport-security"])
            assert age is not None
            assert int(age[1]) >= 31536000
            assert client.get("/session").status_code == 200
        bearer = {"Authorization": f"Bearer {given[Role.OPERATOR]}"}
        address = url.replace("https", "wss") + LISTEN
        assert handshake(address, bearer, ssl=trusted) == 101
        with (
            socket.create_connection(("127.0.0.1", server.port)) as plain,
            trusted.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            assert wrapped.version() == "TLSv1.3"
        old = ssl.create_default_context(cafile=str(files[0]))
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection(("127.0.0.1", server.port)) as plain,
            pytest.raises(ssl.SSLError),
        ):
            old.wrap_socket(plain, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" not in plain.recv(4096)


# --- the table -----------------------------------------------------------------------------------


def test_the_table_has_every_item_of_level_1_and_names_tests_that_are_there():
    text = TABLE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| V\d", line)]
    applicable = [item for row in rows for item in re.findall(r"V(\d+\.\d+\.\d+)", row)]
    others = re.findall(r"V(\d+\.\d+\.\d+)", text.partition("## For the operator")[2])
    assert sorted([*applicable, *others]) == sorted(LEVEL_1.split())
    tests = {
        (path.stem, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)\.(test_\w+)`", row.split("|")[-2])
        assert named or row.split("|")[-2].strip() == "this page", row
        assert set(named) <= tests, row
