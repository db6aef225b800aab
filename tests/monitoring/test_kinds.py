"""Whether a source is live is what it says of itself; channels become sources of their own."""

import functools
import http.server
import threading

import av
import numpy as np
import pytest
from conftest import tone, write_media
from support.engines import FakeEngine

from mmtransfer.errors import UserError
from mmtransfer.monitoring import Camera, load_options
from mmtransfer.monitoring.sources.cameras import named_cameras
from mmtransfer.monitoring.sources.kinds import goes_on, settle


@pytest.fixture
def site(tmp_path):
    """A folder over HTTP; what ends in `.endless` is the file without its length."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_header(self, keyword, value):
            if keyword != "Content-Length" or "endless" not in self.path:
                super().send_header(keyword, value)

        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def write_playlist(folder, *, ends):
    with av.open(str(folder / "part.ts"), "w", format="mpegts") as out:
        stream = out.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(4.0)[None], "fltp", "mono")
        frame.sample_rate, frame.pts = 16_000, 0
        out.mux([*stream.encode(frame), *stream.encode(None)])
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:0\n"
    text = head + "#EXTINF:4.0,\npart.ts\n" + ("#EXT-X-ENDLIST\n" if ends else "")
    (folder / "list.m3u8").write_text(text)
    master = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=64000\nlist.m3u8\n"
    (folder / "master.m3u8").write_text(master)


def is_settled_live(address, **settings):
    (camera,) = settle([Camera("a", address, **settings)])
    assert camera.live is goes_on(camera)
    return camera.live


@pytest.mark.parametrize("ends", [True, False])
def test_a_playlist_is_live_until_it_has_an_end(site, ends):
    folder, address = site
    write_playlist(folder, ends=ends)
    for name in ("list.m3u8", "master.m3u8", "list.m3u8?name=gate.mp4"):
        assert is_settled_live(f"{address}/{name}") is not ends, name


@pytest.mark.parametrize("name", ["a.wav", "a.mp4", "a.flac", "a.ogg", "wav", "stream"])
def test_what_has_a_length_is_a_recording_whatever_it_is_called(site, name):
    folder, address = site
    suffix = {"wav": ".wav", "stream": ".flac"}.get(name, name[1:])
    made = write_media(folder / f"made{suffix}", tone(2.0))
    made.rename(folder / name)
    assert not is_settled_live(f"{address}/{name}")


def test_what_has_no_length_is_live_whatever_it_is_called(site):
    folder, address = site
    with av.open(str(folder / "endless.mp3"), "w", options={"write_xing": "0"}) as out:
        stream = out.add_stream("libmp3lame", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(3.0)[None], "fltp", "mono")
        frame.sample_rate = 16_000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    assert is_settled_live(f"{address}/endless.mp3")


def test_what_does_not_answer_goes_by_its_address_and_orders_go_first(site):
    folder, address = site
    write_media(folder / "a.wav", tone(1.0))
    assert is_settled_live("http://127.0.0.1:9/x")
    assert not is_settled_live("http://127.0.0.1:9/x.mp4")
    assert is_settled_live("rtsp://127.0.0.1:9/x")
    assert not is_settled_live(str(folder / "a.wav"))
    assert is_settled_live(f"{address}/a.wav", live=True)
    assert not is_settled_live("rtsp://127.0.0.1:9/x", live=False)
    with pytest.raises(UserError, match="found a path"):
        settle([Camera("a", str(folder / "a.wav"), live=True)])


# --- channels -------------------------------------------------------------------------------------


def test_each_channel_is_a_source_of_its_own(tmp_path):
    stereo = write_media(tmp_path / "call.wav", tone(1.0), channels=2)
    mono = write_media(tmp_path / "memo.wav", tone(1.0))
    cameras = [Camera(c.name, c.url, channels="split") for c in named_cameras([stereo, mono])]
    found = [(camera.name, camera.channels) for camera in settle(cameras)]
    assert found == [("call-1", 1), ("call-2", 2), ("memo-1", 1)]
    assert settle(settle(cameras)) == settle(cameras)
    assert [c.channels for c in settle(named_cameras([stereo]))] == ["mix"]
    with pytest.raises(UserError, match="named like the camera 'call-2'"):
        settle([*cameras, Camera("call-2", str(mono))])
    with pytest.raises(UserError, match="comes once only"):
        settle([Camera("a", "-", channels="split")])


def test_cameras_say_their_channels_in_their_file(tmp_path):
    write_media(tmp_path / "call.wav", tone(1.0), channels=2)
    file = tmp_path / "cameras.yaml"
    rows = [
        "{name: a, url: call.wav, channels: split}",
        "{name: b, url: call.wav, channels: 2}",
        "{name: c, url: call.wav, live: false}",
    ]
    file.write_text("cameras:\n" + "".join(f"- {row}\n" for row in rows))
    found = [(c.name, c.channels, c.live) for c in load_options(file, model="m").cameras()]
    assert found == [("a-1", 1, False), ("a-2", 2, False), ("b", 2, False), ("c", "mix", False)]
    for wrong in ("channels: 0", "channels: both", "live: 3"):
        file.write_text(f"cameras:\n- {{name: a, url: call.wav, {wrong}}}\n")
        with pytest.raises(UserError, match=wrong.partition(":")[0]):
            load_options(file, model="m")


def test_talkers_on_two_channels_are_told_apart(tmp_path, speech):
    from mmtransfer.monitoring import Monitor, Transcript
    from mmtransfer.speech.recognition import Recognizer

    path = tmp_path / "call.wav"
    silence = np.zeros_like(speech)
    left, right = np.concatenate([speech, silence]), np.concatenate([silence, speech])
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_f32le", rate=16_000, layout="stereo")
        both = np.ascontiguousarray(np.stack([left, right]).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(both, "flt", "stereo")
        frame.sample_rate = 16_000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    monitor = Monitor(Recognizer(FakeEngine()))
    items = list(monitor.watch([Camera("call", str(path), channels="split")]))
    said = [(i.camera, i.start) for i in items if isinstance(i, Transcript)]
    half = len(speech) / 16_000
    assert {camera for camera, start in said if start < half} == {"call-1"}
    assert {camera for camera, start in said if start >= half} == {"call-2"}
