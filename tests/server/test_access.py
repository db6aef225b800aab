"""Who may: tokens, roles, sessions of a browser, other sites, certificates."""

import json
import math
import stat
import time
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest
from support.servers import running, write_certificate
from support.web import wait_for
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import SourceEvent
from mmtransfer.monitoring.events import Occurrence
from mmtransfer.server import access, deepgram, page
from mmtransfer.server.options import ServerOptions
from mmtransfer.server.serve import program
from mmtransfer.server.tokens import Role, Tokens


@pytest.fixture
def tokens(tmp_path):
    """A file of tokens, and those of each role."""
    path = tmp_path / "settings" / "tokens.json"
    return path, {role: Tokens(path).add(role.name.lower(), role) for role in Role}


def bearer(token, scheme="Bearer"):
    return {"Authorization": f"{scheme} {token}"}


def test_tokens_are_made_listed_and_removed_and_only_digests_are_kept(tmp_path, capsys):
    path = tmp_path / "mine" / "tokens.json"
    command = ["token", "add", "desk", "--role", "operator", "--tokens", str(path)]
    assert main(command) == 0
    token = capsys.readouterr().out.strip()
    assert len(token) > 40
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    found = Tokens(path).find(token)
    assert found is not None
    assert found.role == Role.OPERATOR
    assert Tokens(path).find(token[:-1]) is None
    for wrong, message in (
        (command, "the name 'desk' has a token already"),
        (["token", "add", "a\nb", "--role", "viewer", "--tokens", str(path)], "name: expected"),
        (["token", "add", "b", "--tokens", str(path)], "expected --role, one of viewer"),
        (["token", "remove", "c", "--tokens", str(path)], "no token is called 'c'"),
        (["token", "remove", "--tokens", str(path)], "expected mmtransfer token remove NAME"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert main(["token", "list", "--tokens", str(path)]) == 0
    assert capsys.readouterr().out == "operator  desk\n"
    assert main(["token", "remove", "desk", "--tokens", str(path)]) == 0
    assert Tokens(path).find(token) is None
    path.write_text('{"what": 1}')
    assert main(["token", "list", "--tokens", str(path)]) == 2
    assert "expected a file that `mmtransfer token` wrote" in capsys.readouterr().err


def test_roles_decide_what_a_token_may(tokens, fake_recognizer, tmp_path):
    fake_recognizer()
    path, given = tokens
    audit = tmp_path / "audit.jsonl"
    with running(tokens=path, audit=audit) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/healthz").status_code == 200
        for given_headers in (None, bearer("x")):
            answer = client.get("/v1/models", headers=given_headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] in ("missing_token", "invalid_api_key")
        assert client.get("/metrics", headers=bearer(given[Role.VIEWER])).status_code == 200
        assert client.get("/v1/models", headers=bearer(given[Role.VIEWER])).status_code == 403
        for scheme in ("Bearer", "Token", "token"):
            headers = bearer(given[Role.OPERATOR], scheme)
            assert client.get("/v1/models", headers=headers).status_code == 200
        Tokens(path).remove("operator")  # while the server runs
        assert client.get("/v1/models", headers=headers).status_code == 401
        assert stat.S_IMODE(audit.stat().st_mode) == 0o600


def test_a_browser_has_a_session_whose_changes_carry_a_token(tokens, fake_recognizer, tmp_path):
    fake_recognizer()
    path, given = tokens
    audit = tmp_path / "audit.jsonl"
    with running(tokens=path, audit=audit) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/session").status_code == 401
        visit = client.get("/")
        assert (visit.status_code, visit.headers["location"]) == (303, "/login")
        assert client.get("/login").text.startswith("<!doctype html>")
        assert client.get("/static/page.css").status_code == 200
        assert client.get("/api/search").status_code == 401
        assert client.post("/login", json={"token": "x"}).status_code == 401
        answer = client.post("/login", json={"token": given[Role.ADMIN]})
        assert answer.json()["role"] == "admin"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert given[Role.ADMIN] not in cookie
        session = client.get("/session").json()
        assert client.get("/v1/models").status_code == 200
        assert client.post("/logout").status_code == 403
        assert client.post("/logout", headers={"X-CSRF-Token": "x"}).status_code == 403
        forged = {"Cookie": f"{access.COOKIE}={'A' * 43}"}
        assert httpx.get(f"{server.url}/session", headers=forged).status_code == 401
        kept = dict(client.cookies)
        assert client.post("/logout", headers={"X-CSRF-Token": session["csrf"]}).status_code == 200
        client.cookies.update(kept)
        assert client.get("/session").status_code == 401
        client.post("/login", json={"token": given[Role.ADMIN]})
        Tokens(path).remove("admin")
        assert client.get("/session").status_code == 401
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["action"] for line in lines] == ["log in", "log out", "log in"]
    assert lines[0]["who"] == "admin"


@pytest.mark.parametrize("end", ["removed", "broken", "logged out", "over"])
def test_who_may_no_more_is_told_nothing_more(end, tokens, fake_recognizer, monkeypatch):
    monkeypatch.setattr(page, "_EVERY_S", 0.1)
    fake_recognizer()
    path, given = tokens
    with running(tokens=path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        session = client.post("/login", json={"token": given[Role.VIEWER]}).json()
        opened = {} if end in ("logged out", "over") else bearer(given[Role.VIEWER])
        other = bearer(given[Role.ADMIN])
        live = server.state.live
        with (
            client.stream("GET", "/api/live", headers=opened) as stream,
            httpx.stream("GET", f"{server.url}/api/live", headers=other, timeout=60) as goes_on,
        ):
            following, lines = stream.iter_lines(), goes_on.iter_lines()
            for found in (following, lines):
                assert "cameras" in next(found)
            if end == "removed":
                Tokens(path).remove("viewer")
            elif end == "broken":
                path.write_text("none")
            elif end == "logged out":
                client.post("/logout", headers={"X-CSRF-Token": session["csrf"]})
            else:
                sessions = server.state.access._sessions
                for name, one in sessions.items():
                    sessions[name] = replace(one, until=0.0)
            live.put(SourceEvent("gate", Occurrence.CONNECTED, 1.0))
            assert not any("gate" in line for line in following)  # it has an end
            assert any("gate" in line for line in lines) == (end != "broken")


@pytest.mark.parametrize("form", ["", "&encoding=linear16&sample_rate=16000"])
def test_a_removed_token_ends_its_stream(form, tokens, fake_recognizer, monkeypatch):
    monkeypatch.setattr(deepgram, "_VALID_S", 0.1)
    fake_recognizer()
    path, given = tokens
    with running(tokens=path, streams=1) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/listen?{form}"
        with connect(url, additional_headers=bearer(given[Role.OPERATOR], "Token")) as stream:
            stream.send(b"\0" * 3200)
            stream.send('{"type": "Finalize"}')
            if form:
                assert "from_finalize" in stream.recv(timeout=60)
            Tokens(path).remove("operator")
            with suppress(ConnectionClosedError):
                while True:
                    stream.recv(timeout=60)
        assert stream.close_code == 1008
        assert stream.close_reason == "the token is not valid any more"
        wait_for(lambda: server.state.streams.taken == 0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:{port}", "Host": "localhost:{port}"}, 200),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "["}, 403),
        ({"Host": "[", "Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Host": "rebound.example:{port}"}, 403),
    ],
)
def test_pages_of_other_sites_get_nothing(headers, status, one_server):
    headers = {name: text.format(port=one_server.port) for name, text in headers.items()}
    answer = httpx.get(f"{one_server.url}/v1/models", headers=headers)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


@pytest.fixture(scope="module")
def one_server(whisper_tiny):
    with running() as server:
        yield server


def test_failed_tries_are_slowed_and_then_not_looked_at(tokens, fake_recognizer, monkeypatch):
    fake_recognizer()
    monkeypatch.setattr(access, "_TRY_S", 0.5)
    path, given = tokens
    with running(tokens=path) as server:
        monkeypatch.setattr(access, "_TRIES", 1)
        server.state.access._failing["127.0.0.1"] = 1  # one waits
        answer = httpx.get(f"{server.url}/metrics", headers=bearer(given[Role.ADMIN]))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        server.state.access._failing.clear()
        started = time.monotonic()
        assert httpx.get(f"{server.url}/metrics", headers=bearer("x")).status_code == 401
        assert time.monotonic() - started >= 0.5
        assert not server.state.access._failing
        assert not server.state.access._locks
        answer = httpx.get(f"{server.url}/metrics", headers=bearer(given[Role.ADMIN]))
        assert answer.status_code == 200


@pytest.fixture
def certificate(tmp_path):
    return write_certificate(tmp_path)


def test_https_by_a_certificate(certificate, tokens, fake_recognizer):
    fake_recognizer()
    path, given = tokens
    files = {"tls_certificate": certificate[0], "tls_key": certificate[1]}
    with running(host="0.0.0.0", tokens=path, **files) as server:
        url = f"https://127.0.0.1:{server.port}"
        with httpx.Client(verify=str(certificate[0]), base_url=url) as client:
            answer = client.post("/login", json={"token": given[Role.VIEWER]})
            assert "Secure" in answer.headers["set-cookie"]
            assert "strict-transport-security" in answer.headers


def test_what_cannot_be_served_is_one_line(tmp_path, certificate, one_server, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    model, missing = {"site": "bundled:whisper-tiny.en"}, tmp_path / "none"
    pair = {"tls_certificate": certificate[0], "tls_key": certificate[1]}
    for given, message in (
        ({"host": "0.0.0.0"}, "others than this machine could connect"),
        ({"tokens": missing}, "has no tokens"),
        ({"port": one_server.port}, "cannot listen on 127.0.0.1:.*in use"),
        ({"host": "no.such.host.invalid", "tokens": None}, "others than this machine"),
        ({"port": 70_000}, "port: expected 0 to 65535"),
        ({"requests": 0}, "requests and streams: expected 1 or more"),
        ({"max_audio_s": 0.0}, "expected numbers above 0"),
        ({"max_audio_s": math.nan}, "expected numbers above 0"),
        *(({"max_upload_mb": mb}, "expected numbers above 0") for mb in (math.nan, math.inf)),
        ({"max_upload_mb": 1e305}, "only max_audio_s may be inf"),
        ({"tls_key": certificate[1]}, "--tls-certificate and --tls-key together"),
        (pair | {"tls_key": missing}, "none: cannot be opened"),
        (pair | {"tls_key": certificate[0]}, "expected a certificate and its key in PEM"),
        ({"engine": "magic"}, "engine: expected one of auto"),
    ):
        with pytest.raises(UserError, match=message):
            program(ServerOptions(model, **({"port": 0} | given)))
    with pytest.raises(UserError, match="expected --model NAME=MODEL"):
        ServerOptions({})
    with pytest.raises(UserError, match="nothing here"):
        program(ServerOptions({"site": "nothing here"}, port=0))
