"""No message, name or file holds a password or a token."""

import http.server
import json
import logging
import threading
import traceback

import pytest
import yaml
from conftest import tone, write_media
from support.engines import FakeEngine

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Camera, Journal, Monitor, load_options
from mmtransfer.monitoring.outputs.alerts import Mqtt, Webhook
from mmtransfer.monitoring.outputs.dashboard import metrics
from mmtransfer.monitoring.sources.cameras import named_cameras
from mmtransfer.monitoring.sources.clips import cut_recording
from mmtransfer.speech.addresses import checked_address, public_address, without_secrets
from mmtransfer.speech.audio import MediaError, decode_clip, open_media, stream_audio

SECRET = "s3cr3t"
USERS = [
    "admin:{}",
    "admin:{}#1",
    "admin:1#{}",
    "admin:{}/1",
    "admin:12/{}",
    "admin:?{}",
    "admin:{}[1",
    "admin:{}]1",
    "admin:x@{}",
    "admin:x@{}#/?@",
    "admin:{}:{}",
    "{}",
    "{}#1",
    "{}:",
    ":{}",
    "admin:%23{}",
]
PLACES = [
    "{}://127.0.0.1:9/cam?token={}",
    "{}://127.0.0.1:9/cam?channel=1&pwd={}&subtype=0",
    "{}://127.0.0.1:9/user=admin_password={}_channel=1_stream=0.sdp",
    "{}://127.0.0.1:9/user=admin&password={}&channel=1.sdp?real_stream",
    "{}://127.0.0.1:9/cam;auth={}",
    "{}://127.0.0.1:9/cam#{}",
    "{}://127.0.0.1:9/cam?{}",
    "{}://127.0.0.1:port/cam?token={}",
    "{}://[127.0.0.1/cam?token={}",
]
ADDRESSES = [
    *(f"rtsp://{user.replace('{}', SECRET)}@127.0.0.1:9/cam" for user in USERS),
    *(f"http://{user.replace('{}', SECRET)}@127.0.0.1:9/gate.mp4" for user in USERS),
    *(place.format(scheme, SECRET) for place in PLACES for scheme in ("rtsp", "https")),
    f"admin:{SECRET}@127.0.0.1/cam",
    f"rtsp:/admin:{SECRET}@127.0.0.1/cam",
    f"rtsp:admin:{SECRET}@127.0.0.1/cam",
]


def told(call, *arguments):
    """The message and everything else that a failure shows."""
    try:
        found = call(*arguments)
    except Exception as error:
        return "".join(traceback.format_exception_only(error)) + repr(error)
    return str(found)


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_that_is_told_of_an_address_holds_its_secret(address, tmp_path, caplog):
    file = tmp_path / "cameras.yaml"
    said = [public_address(address), without_secrets(f"cannot open '{address}': no", address)]
    said += [told(lambda: checked_address(address) and None), without_secrets(f"see {address}")]
    said += [told(lambda: [camera.name for camera in named_cameras([address])])]
    said += [told(cut_recording, address, 0.0, 1.0, tmp_path / "clip.mkv")] * address.startswith(
        "http"
    )
    for rows in ([{"name": "gate", "url": address}], [address], [{"name": address, "url": "x"}]):
        file.write_text(yaml.safe_dump({"cameras": rows}))
        said.append(told(lambda: [c.name for c in load_options(file, model="m").sources]))  # type: ignore[union-attr]
    file.write_text(f"cameras:\n- {{name: gate, url: '{address}'\n")
    said.append(told(lambda: load_options(file, model="m")))
    for channel in (Webhook, Mqtt):
        said.append(told(channel, address))
    said.append(told(open_media, address))
    assert all(SECRET not in text for text in [*said, caplog.text]), said


@pytest.mark.parametrize("mark", list("#/?[]"))
def test_a_mark_that_ends_the_host_is_refused_with_advice(mark, capsys):
    address = f"rtsp://admin:pa{mark}ss@127.0.0.1:8554/cam"
    with pytest.raises(UserError, match=r"127.0.0.1:8554/cam: .*%23 %2F %3F %5B"):
        named_cameras([address])
    assert main(["monitor", "bundled:whisper-tiny.en", address]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1
    assert "ss@" not in said.err + said.out


@pytest.mark.parametrize(
    "address",
    [
        "rtsp://cam.local/1",
        "rtsp://10.0.0.1:554/h264/ch1/main",
        "http://host.org/live@2x.m3u8",
        "https://[::1]:8080/x",
        "rtsp://cam/1?channel=2&subtype=0",
        "tcp://h:1",
        "gate.mp4",
        "/x/a@b.mp4",
        "12:30.wav",
        "alsa:hw:0",
        "pcm:16000",
        "-",
        "c:\\gate.mp4",
    ],
)
def test_what_hides_nothing_is_shown_as_it_is(address):
    assert public_address(address) == checked_address(address) == address


def test_a_file_may_be_called_like_a_user_and_a_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_media(tmp_path / "12:30@gate.wav", tone(1.0))
    assert public_address("12:30@gate.wav") == "12:30@gate.wav"
    assert len(decode_clip("12:30@gate.wav")) == 16_000


@pytest.fixture
def refusing():
    """A server that answers 404 to every request, or a cut recording for `/cut.wav`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        body = b""

        def do_GET(self):
            is_there = self.path.startswith("/cut")
            self.send_response(200 if is_there else 404)
            self.send_header("Content-Length", str(len(self.body)) if is_there else "0")
            self.end_headers()
            if is_there:
                self.wfile.write(self.body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Handler, f"admin:{SECRET}@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_media_errors_hold_no_secret(refusing, tmp_path, capsys, caplog):
    handler, place = refusing
    data = write_media(tmp_path / "a.flac", tone(8.0)).read_bytes()
    handler.body = data[: len(data) // 2]
    for name in (f"gate.mp4?token={SECRET}", f"cut.flac?token={SECRET}"):
        address = f"http://{place}/{name}"
        assert main(["monitor", "bundled:whisper-tiny.en", address]) == 2
        with pytest.raises(MediaError) as caught:
            list(stream_audio(address))
        said = capsys.readouterr()
        assert SECRET not in said.err + said.out + str(caught.value) + caplog.text
        assert f"127.0.0.1:{place.rpartition(':')[2]}/{name.partition('?')[0]}" in said.err


def test_a_webhook_that_refuses_holds_no_secret(refusing, caplog):
    _, place = refusing
    reasons = []
    for address in (f"http://{place}/hook/{SECRET}", f"http://admin:{SECRET}@127.0.0.1:9/x"):
        hook = Webhook(address, settled=lambda alert, why: reasons.append(why), give_up_s=0.0)
        with caplog.at_level(logging.INFO):
            hook.send({"event": "alert"})
            hook.close()
    assert len(reasons) == 2
    assert all(reasons)
    assert SECRET not in caplog.text + "".join(reasons)


def test_journal_and_metrics_hold_no_secret(tmp_path, refusing, caplog):
    from mmtransfer.speech.recognition import Recognizer

    handler, place = refusing
    data = write_media(tmp_path / "a.flac", tone(8.0)).read_bytes()
    handler.body = data[: len(data) // 2]
    address = f"http://{place}/cut.flac?token={SECRET}"
    (named,) = named_cameras([address])
    cameras = [named, Camera(name="gate", url=address)]
    journal = Journal(
        tmp_path / "j", model="m", model_digest="d", sources={c.name: c.url for c in cameras}
    )
    monitor = Monitor(Recognizer(FakeEngine()))
    items = list(monitor.watch(cameras, journal=journal))
    journal.close()
    written = "".join(path.read_text() for path in (tmp_path / "j").iterdir() if path.is_file())
    assert json.loads((tmp_path / "j" / "journal.json").read_text())["sources"]
    assert '"event": "cut"' in written
    shown = written + metrics(monitor.stats) + caplog.text + named.name
    assert SECRET not in shown
    assert all(SECRET not in repr(item) for item in items)
