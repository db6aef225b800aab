"""Live sources over real sockets: servers that stop, hang, come back, send rubbish."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import EXAMPLE, child_environment
from support.children import Command, run_command
from support.engines import FakeEngine, LoudIsSpeech
from support.sessions import QUICK, collect, happened, live_monitor, said
from support.sources import QUICK_DECODING, decode, transport_stream
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import (
    Camera,
    Journal,
    Monitor,
    SourceEvent,
    load_options,
)
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.monitoring.sources import live
from mmtransfer.monitoring.sources.cameras import Retention
from mmtransfer.monitoring.sources.kinds import is_live
from mmtransfer.monitoring.sources.live import Block
from mmtransfer.speech import segments
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Segment


@pytest.fixture(scope="module")
def spoken(camera_speech, tmp_path_factory):
    """Lengths of the segments in it."""
    from mmtransfer.speech.segments import Segmenter

    segmenter = Segmenter(block_frames=4)
    found = [*segmenter.feed(camera_speech.astype(np.float32)), *segmenter.finish()]
    assert len(found) >= 3
    return [s.end - s.start for s in found]


@pytest.fixture
def minutes_apart(monkeypatch):
    """Lets a minute pass before each connection to a server, so that what it sends at once may have
    been said since the one before.
    """

    def follow(server):
        clock = lambda: time.time() + 60 * server.connections  # noqa: E731
        monkeypatch.setattr(sys.modules[Monitor.__module__], "SteadyClock", lambda: clock)

    return follow


def test_a_camera_that_restarts_is_heard_again(camera, camera_stream, spoken, minutes_apart):
    server = camera([camera_stream], [camera_stream, 60])
    minutes_apart(server)
    before = time.time()
    items = collect(
        live_monitor(), {"gate": server.url}, until=lambda i: len(said(i)) >= 2 * len(spoken)
    )
    assert len(said(items)) == 2 * len(spoken)
    assert happened(items)[:3] == ["connected", "lost", "connected"]
    starts = [t.start for t in said(items)]
    assert starts == sorted(starts)
    assert before + 60 - 22 < starts[0] < time.time() + 60
    assert len({t.id for t in said(items)}) == len(starts)
    lengths = [t.end - t.start for t in said(items)]
    np.testing.assert_allclose(lengths[: len(spoken)], spoken, atol=0.2)


def test_what_a_server_kept_is_the_past_and_comes_once(camera, monkeypatch):
    """Each connection, three seconds after the last, gets twelve seconds at once."""
    monkeypatch.setattr(live, "_AT_ONCE_S", 0.5)
    monkeypatch.setattr(live, "_BURST_S", 10.0)
    noise = np.random.default_rng(0).normal(0, 0.1, 12 * SAMPLE_RATE)
    kept = transport_stream(noise.astype(np.float32))
    half = len(kept) // 2
    server = camera([kept[:half], 0.7, kept[half:]], [kept])
    now = lambda: 1000.0 + 3 * server.connections  # noqa: E731
    stopping, found = threading.Event(), []
    for item in live.read_live("gate", server.url, stopping, settings=QUICK, now=now):
        found.append(item)
        if happened(found).count("lost") == 3:
            stopping.set()
    blocks = [item for item in found if isinstance(item, Block)]
    begins = [block.at for block in blocks if not block.is_joined]
    assert begins == pytest.approx([991, 1003, 1006], abs=0.2)
    assert blocks[-1].at + len(blocks[-1].samples) / SAMPLE_RATE == pytest.approx(1009, abs=0.2)
    assert max(len(block.samples) for block in blocks) <= SAMPLE_RATE
    details = [i.detail for i in found if isinstance(i, SourceEvent) and i.event == "connected"]
    assert details[0] == ""
    assert all(
        re.match(r"(8\.9|9\.\d) s that had come before", detail) for detail in details[1:]
    ), details


def test_a_camera_that_sends_nothing_does_not_hold_up_the_others(camera, camera_stream, spoken):
    mute, refused, whole = camera([60]), camera([]), camera([camera_stream, 60])
    dead = "tcp://127.0.0.1:9"  # nobody listens there
    sources = {"mute": mute.url, "refused": refused.url, "dead": dead, "whole": whole.url}

    def enough(items):
        lost = all(happened(items, name).count("lost") >= 2 for name in ("mute", "refused", "dead"))
        return lost and len(said(items, "whole")) >= len(spoken)

    items = collect(live_monitor(), sources, until=enough)
    assert enough(items)
    assert not said(items, "mute")
    details = {i.camera: i.detail for i in items if isinstance(i, SourceEvent)}
    assert details["mute"].startswith(("no audio for", "no answer in time"))
    assert mute.connections >= 2


def test_attempts_that_fail_alike_are_told_once(camera, camera_stream):
    """Weeks without a camera are a few lines; another failure, and its return, are told."""
    dead, back = camera([]), camera([camera_stream[:20_000]], [], [], [], [camera_stream, 60])
    alike = replace(QUICK, report_again_s=3600.0)
    monitor = Monitor(Recognizer(FakeEngine()), live=alike)

    def enough(items):
        return dead.connections >= 5 and happened(items, "back").count("connected") >= 2

    items = collect(monitor, {"dead": dead.url, "back": back.url}, until=enough)
    assert happened(items, "dead") == ["lost"]
    assert happened(items, "back")[:4] == ["connected", "lost", "lost", "connected"]


def test_a_stall_in_a_connection_is_noticed_and_what_was_said_is_kept(
    camera, camera_stream, spoken, minutes_apart
):
    half = camera_stream[: len(camera_stream) // 2]
    server = camera([half, 60], [camera_stream, 60])
    minutes_apart(server)
    items = collect(
        live_monitor(), {"gate": server.url}, until=lambda i: len(said(i)) > len(spoken)
    )
    assert happened(items)[:3] == ["connected", "lost", "connected"]
    assert len(said(items)) > len(spoken)


def test_rubbish_between_packets_is_skipped(camera, camera_stream, spoken):
    rng = np.random.default_rng(0)
    packet = 188
    middle = len(camera_stream) // packet // 2 * packet
    rubbish = rng.integers(0, 256, 10 * packet, np.uint8).tobytes()
    server = camera([camera_stream[:middle], rubbish, camera_stream[middle:], 60])
    items = collect(
        live_monitor(), {"gate": server.url}, until=lambda i: len(said(i)) >= len(spoken)
    )
    assert len(said(items)) >= len(spoken)


def test_a_sample_rate_that_changes_on_reconnection(
    camera, camera_speech, camera_stream, spoken, minutes_apart
):
    low = transport_stream(camera_speech[::2].astype(np.float32), rate=8_000)
    server = camera([camera_stream], [low, 60])
    minutes_apart(server)
    items = collect(
        live_monitor(), {"gate": server.url}, until=lambda i: len(said(i)) >= 2 * len(spoken)
    )
    assert abs(len(said(items)) - 2 * len(spoken)) <= 1


def test_nothing_is_lost_when_recognition_falls_behind(camera, camera_stream, spoken, tmp_path):
    """Four cameras talk at once, the recogniser is slow, and is stopped in the middle."""
    servers = [camera([camera_stream, 600]) for _ in range(4)]
    sources = {f"cam{n}": server.url for n, server in enumerate(servers)}
    wanted = 4 * len(spoken)

    def journal():
        return Journal(tmp_path, model="m", model_digest="d", sources=sources)

    def lines():
        found = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*.jsonl"))]
        return [json.loads(line) for part in found for line in part]

    book = journal()
    slow = live_monitor(delay=0.3, workers=1)
    engine = slow._recognizer.engine
    whole_decode = engine.decode
    engine.decode = lambda c, s: whole_decode(c[:1], s) * len(c)
    collect(slow, sources, until=lambda i: len(said(i)) >= 3, journal=book)
    book.close()
    first = [line["id"] for line in lines() if "text" in line]
    left = [name for _, name, _ in Spool(tmp_path / "spool").waiting()]
    assert not set(first) & set(left)

    # The cameras have no more to say; what waited is said now.
    for server in servers:
        server.scripts = [[600]]
    book = journal()
    items = collect(
        live_monitor(), sources, until=lambda i: len(said(i)) >= len(left), journal=book
    )
    book.close()
    assert sorted(t.id for t in said(items)) == sorted(left)
    everything = [line["id"] for line in lines() if "text" in line]
    assert len(everything) == len(set(everything))
    assert sorted(everything) == sorted(first + left)
    assert len(everything) <= wanted
    assert not list(Spool(tmp_path / "spool").waiting())


def test_when_the_disk_room_is_full_the_oldest_of_the_least_important_is_dropped_and_told(
    camera, camera_stream, spoken, tmp_path
):
    server, other = camera([camera_stream, 600]), camera([camera_stream, 600])
    sources = {"yard": server.url, "gate": other.url}
    book = Journal(tmp_path, model="m", model_digest="d", sources=sources)
    engine = FakeEngine(delay=1.0, workers=1)
    # Room for one segment that is decoded and one or two that wait.
    monitor = Monitor(Recognizer(engine), live=QUICK, spool_bytes=300_000)
    wanted = 2 * len(spoken)
    counted = lambda i: len(said(i)) + monitor.stats.dropped >= wanted  # noqa: E731
    cameras = [Camera(name="yard", url=server.url), Camera(name="gate", url=other.url, priority=5)]
    items = collect(monitor, cameras, until=counted, journal=book)
    book.close()
    found = [p.read_text().splitlines() for p in tmp_path.glob("*.jsonl")]
    lines = [json.loads(line) for part in found for line in part]
    dropped = [line for line in lines if line.get("event") == "dropped"]
    assert len(dropped) == monitor.stats.dropped > 0
    ids = [line["id"] for line in lines if "id" in line]
    assert len(ids) == len(set(ids)) == len(said(items)) + len(dropped)
    assert len(said(items)) >= 2  # those that were being decoded, and the last that waited
    by_camera = [line["camera"] for line in dropped]
    assert by_camera.count("yard") >= by_camera.count("gate")


def test_a_clock_that_is_set_forward_makes_nothing_old(monkeypatch):
    """What waits is as old as the run's own clock says: the machine's may not have been set yet."""
    monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)
    real, is_set = time.time, threading.Event()
    engine, at = FakeEngine(workers=1, hold=lambda: is_set.wait(60)), time.time() - 10

    def audio(stopping):
        utterance = np.repeat(np.array([0.5, 0.0], np.float32), [24_000, 16_000])
        for number in range(4):
            yield Block(utterance, at + 2.5 * number, number > 0)
            wait_for(lambda: engine.running)  # the others wait behind the first
        monkeypatch.setattr(time, "time", lambda: real() + 3 * 86_400)
        stopping.wait(0.5)
        is_set.set()

    monitor = Monitor(Recognizer(engine), live=QUICK)
    gate = Camera(name="gate", url="tcp://127.0.0.1:9", retention=Retention(audio=2.0))
    items = list(monitor.watch([gate], audio={"gate": audio}))
    assert len(said(items)) == 4
    assert monitor.stats.dropped == 0


def test_the_spool_keeps_samples_and_times(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    spool = Spool(tmp_path / "spool")
    spool.add("gate", "gate@2.000", Segment(2.0, 2.5, samples, 1.75))
    spool.add("gate", "gate@1.000", Segment(1.0, 1.5, samples[:10], 0.75))
    again = Spool(tmp_path / "spool")
    assert again.bytes == spool.bytes > 2000
    assert [name for _, name, _ in again.waiting()] == ["gate@1.000", "gate@2.000"]
    kept = again.load("gate@2.000")
    np.testing.assert_allclose(kept.samples, samples, atol=1e-4)
    assert (kept.start, kept.end, kept.samples_start) == (2.0, 2.5, 1.75)
    again.remove("gate@1.000")
    again.remove("gate@2.000")
    assert again.bytes == 0


def test_what_is_live():
    for source in ("rtsp://cam/1", "tcp://h:1", "https://h/live.m3u8", "http://h/x", "alsa:hw:0"):
        assert is_live(source), source
    for source in ("gate.mp4", "https://h/gate.mp4", "-", "/x/rtsp.mp4", "c:\\gate.mp4"):
        assert not is_live(source), source


def test_cameras_come_from_a_file(tmp_path, capsys):
    path = tmp_path / "cameras.yaml"
    path.write_text(
        "cameras:\n- {name: gate, url: 'rtsp://cam/1', priority: 2}\n- {name: b, url: b.mp4}\n"
    )
    (tmp_path / "b.mp4").touch()
    cameras = [c for c in load_options(path, model="m").sources if isinstance(c, Camera)]
    assert [(c.name, c.priority) for c in cameras] == [("gate", 2), ("b", 0)]
    assert cameras[1].url == str(tmp_path / "b.mp4")
    for text, message in [
        ("cameras: []", "found an empty list"),
        ("cameras: [3]", "camera 1: expected keys with values .* found 3"),
        ("cameras:\n- {name: a, url: b}\nother: 1", "found 'other'. Known are model, language"),
        ("cameras:\n- {name: a, url: b, keywords: ['']}", "camera 1: keywords"),
        ("cameras:\n- {name: a, url: b, loud_db: .inf}", "camera 1: loud_db"),
        ("cameras:\n- {name: 'a\\x07', url: b}".replace("'", '"'), "no control characters"),
        ("cameras:\n- {name: a, url: 'rtsp://[b'}", "camera 1: .* not an address"),
        ("cameras:\n- {name: a}", "url"),
        ("cameras:\n- {name: a, url: b, colour: red}", "Keys are name, url, priority"),
        ("cameras:\n- {name: a, url: b}\n- {name: a, url: c}", "occurs twice"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_options(path, model="m")
        assert main(["monitor", "bundled:whisper-tiny.en", "--cameras", str(path)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["monitor", "bundled:whisper-tiny.en"]) == 2
    assert "expected SOURCE" in capsys.readouterr().err


def test_the_command_watches_a_camera_and_stops_on_request(
    camera, camera_stream, whisper_tiny, tmp_path
):
    """A real process and a real model; SIGTERM ends it within seconds, with all that was said."""
    server = camera([camera_stream, 600])
    journal = tmp_path / "journal"
    command = ["monitor", whisper_tiny, server.url, "--journal", journal, *QUICK_DECODING]
    with Command(*command) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        assert all(line.startswith("[20") for line in lines), lines  # the date
        process.send_signal(signal.SIGTERM)
        rest = process.communicate()[0].splitlines()
        assert process.returncode == 143
    (path,) = journal.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["event"] == "connected"
    texts = [row for row in rows if "text" in row and "event" not in row]
    assert len(texts) == len(lines) + len(rest)


def test_standard_input_is_a_recording(whisper_tiny, tmp_path):
    data = transport_stream(decode(EXAMPLE / "monitor.mp4")[: 15 * SAMPLE_RATE])
    command = ["monitor", whisper_tiny, "-", *QUICK_DECODING]
    code, out, error = run_command(*command, given=data, text=False)
    assert code == 0, error
    assert len(out.decode().splitlines()) >= 2


def test_standard_input_may_be_raw_audio(whisper_tiny):
    samples = decode(EXAMPLE / "monitor.mp4")[: 15 * SAMPLE_RATE]
    expected = None
    for rate, name in ((16_000, "pcm:16000"), (8_000, "pcm:8000")):
        data = (samples[:: SAMPLE_RATE // rate] * 32767).astype("<i2").tobytes()
        command = ["monitor", whisper_tiny, name, "--threads", "1"]
        code, out, error = run_command(*command, given=data, text=False)
        assert code == 0, error
        starts = [line.split()[0] for line in out.decode().splitlines()]
        assert len(starts) >= 2
        assert expected is None or len(starts) == len(expected)
        expected = starts


def test_a_connection_that_hangs_does_not_keep_the_program(tmp_path):
    """The interpreter is not taken down around a thread that is inside FFmpeg."""
    program = (
        "import atexit, threading, time\nfrom mmtransfer import cli\n"
        "atexit.register(print, 'taken down')\n"
        "hang = threading.Thread(target=time.sleep, args=(60,), name='connection x', daemon=True)\n"
        "if {hangs}: hang.start()\n"
        "cli.main = lambda: print('said', end='') or 5\ncli.entry()"
    )
    for hangs, printed in ((True, "said"), (False, "saidtaken down\n")):
        command = [sys.executable, "-c", program.format(hangs=hangs)]
        result = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (5, printed), result.stderr
