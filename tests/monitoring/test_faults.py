"""What happens to cameras and machines in months: real processes, RTSP, signals, full disks.

Each test compares the journal with what was said, segment by segment.
"""

import errno
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, write_media
from support.children import Command, run_command
from support.engines import FakeEngine
from support.rtsp import RtspCamera
from support.sessions import (
    QUICK,
    broken_off,
    collect,
    happened,
    lines_of,
    live_monitor,
    said,
    same_segments,
)
from support.sources import QUICK_DECODING, decode, free_port, write_at, write_pieces
from support.web import wait_for

from mmtransfer.monitoring import Camera, Journal, LiveSettings, Monitor, SourceEvent
from mmtransfer.monitoring.sources.live import SteadyClock
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Segmenter, SegmenterSettings

PACE = 4.0
"""How much faster than it was spoken audio is played where no test looks at the time it took."""
at_any_pace = pytest.mark.parametrize("pace", [PACE, pytest.param(1.0, marks=pytest.mark.slow)])


def assert_prompt(pace, items):
    """That at the pace of speech no text was late."""
    assert items
    assert pace != 1 or max(item.delay_s for item in items) < 1.5


@pytest.fixture(scope="module")
def spoken(speech):
    """(start, end) of its segments, as a camera's are cut."""
    segmenter = Segmenter(SegmenterSettings(pause_s=LiveSettings().pause_s), 3)
    found = [*segmenter.feed(speech), *segmenter.finish()]
    assert len(found) == 2
    return [(segment.start, segment.end) for segment in found]


def spans(items, camera=None):
    return [(t.start, t.end) for t in said(items, camera)]


def since_connected(items, camera):
    """What a camera said in its last connection."""
    own = [item for item in items if getattr(item, "camera", None) == camera]
    events = [i for i, item in enumerate(own) if getattr(item, "event", "") == "connected"]
    return spans(own[events[-1] :]) if events else []


def by_connection(lines):
    """(start, end) of one camera's segments, in order, for each of its connections."""
    lines = list(lines)
    segments: dict[str, Any] = {}
    for line in lines:
        if "id" in line and not line.get("revision"):
            start, end = segments.get(line["id"].partition("#")[0], (line["start"], line["end"]))
            name = line["id"].partition("#")[0]
            segments[name] = min(start, line["start"]), max(end, line["end"])
    # What is handed over at once when a connection begins was spoken in the two seconds before.
    began = sorted(x["at"] - 2 for x in lines if x.get("event") == "connected")
    return [
        sorted(span for span in segments.values() if start <= span[0] < stop)
        for start, stop in itertools.pairwise([*began, float("inf")])
    ]


# --- cameras --------------------------------------------------------------------------------------


@at_any_pace
def test_a_camera_over_rtsp(rtsp, speech, spoken, pace):
    server = rtsp(speech, pace=pace)
    enough = lambda i: len(said(i)) >= len(spoken)  # noqa: E731
    items = collect(live_monitor(), {"gate": server.url}, until=enough)
    same_segments(spans(items), spoken)
    # The times are those of the day when it was said; at a higher pace what FFmpeg hands over at
    # once, at most two seconds, is taken for what was said before.
    early = 0.0 if pace == 1 else 2.0
    assert -1.0 - early < spans(items)[0][0] - server.began_at - spoken[0][0] < 1.0
    assert_prompt(pace, said(items))


def test_damaged_packets_cost_no_more_than_themselves(rtsp, speech, spoken):
    server = rtsp(speech, pace=PACE)
    server.damage = 0.02
    other = rtsp(speech, pace=PACE)
    enough = lambda i: len(said(i, "whole")) >= len(spoken) and len(said(i, "bad")) >= 1  # noqa: E731
    items = collect(live_monitor(), {"bad": server.url, "whole": other.url}, until=enough)
    same_segments(spans(items, "whole"), spoken)
    assert said(items, "bad")
    assert "lost" not in happened(items, "bad")


def test_a_camera_that_sets_its_clock_loses_nothing(rtsp, speech, spoken):
    """Back by an hour in the middle of a connection; what it says is still in order."""
    server = rtsp(speech, pace=PACE)
    server.changes.append((6.0, lambda: setattr(server, "clock", -3600.0)))
    enough = lambda i: len(said(i)) >= len(spoken)  # noqa: E731
    items = collect(live_monitor(), {"gate": server.url}, until=enough)
    same_segments(spans(items), spoken)
    assert not server.changes


def test_this_machines_clock_may_jump(monkeypatch, rtsp, speech, spoken):
    clock = SteadyClock()
    real = time.time
    at = clock()
    monkeypatch.setattr(time, "time", lambda: real() - 7200)
    assert clock() - at < 1
    monkeypatch.setattr(time, "time", real)
    jump = lambda: monkeypatch.setattr(time, "time", lambda: real() - 7200)  # noqa: E731
    server = rtsp(speech, pace=PACE, changes=[(5.0, jump)])
    enough = lambda i: len(said(i)) >= len(spoken)  # noqa: E731
    items = collect(live_monitor(), {"gate": server.url}, until=enough)
    same_segments(spans(items), spoken)
    assert not server.changes


@at_any_pace
def test_a_camera_that_loses_its_audio_track_comes_back(rtsp, speech, spoken, pace):
    server = rtsp(speech, pace=pace)
    port = int(server.url.split(":")[2].split("/")[0])
    other = rtsp(np.tile(speech, 3), pace=pace)
    items, stages = [], list[str]()
    monitor = live_monitor()
    timer = threading.Timer(120, monitor.stop)
    timer.start()
    for item in monitor.watch(
        [Camera(name="gate", url=server.url), Camera(name="other", url=other.url)]
    ):
        items.append(item)
        if len(said(items, "gate")) >= 1 and not stages:
            stages.append("no audio")
            server.close()
            server = rtsp(speech, port=port, pace=pace)
            server.has_audio = False
        lost = [i for i in items if isinstance(i, SourceEvent) and "no audio track" in i.detail]
        if stages == ["no audio"] and (lost or happened(items, "gate").count("lost") >= 2):
            stages.append("back")
            server.has_audio = True
        if stages == ["no audio", "back"] and len(since_connected(items, "gate")) >= len(spoken):
            monitor.stop()
    timer.cancel()
    assert stages == ["no audio", "back"]
    same_segments(since_connected(items, "gate"), spoken)
    assert_prompt(pace, said(items, "other"))  # it never waited


@at_any_pace
def test_a_server_that_is_killed_and_restarted(speech, spoken, tmp_path, pace):
    """Another process, SIGKILL; the camera beside it does not notice."""
    np.save(tmp_path / "speech.npy", speech)
    port = free_port()

    def start():
        command = [sys.executable, str(ROOT / "tests" / "support" / "rtsp.py"), str(port)]
        return subprocess.Popen([*command, str(tmp_path / "speech.npy"), str(pace)])

    server, whole = start(), RtspCamera(np.tile(speech, 3), pace=pace)
    killed: list[int] = []
    monitor, items = live_monitor(), []
    timer = threading.Timer(120, monitor.stop)
    timer.start()
    sources = {"gate": f"rtsp://127.0.0.1:{port}/audio", "whole": whole.url}
    for item in monitor.watch([Camera(name=n, url=u) for n, u in sources.items()]):
        items.append(item)
        if not killed and said(items, "gate"):
            server.kill()
            server.wait()
            killed.append(len(said(items, "gate")))
            server = start()
        again = killed and "lost" in happened(items, "gate")
        if again and len(since_connected(items, "gate")) >= len(spoken):
            monitor.stop()
    timer.cancel()
    server.kill()
    whole.close()
    assert "lost" in happened(items, "gate")
    same_segments(since_connected(items, "gate"), spoken)
    assert "lost" not in happened(items, "whole")
    assert_prompt(pace, said(items, "whole"))


@pytest.mark.slow
def test_a_gstreamer_server_that_is_killed_and_restarted(speech, spoken, tmp_path):
    """An RTSP server that is not ours, with picture and sound; the clip of an alert has both."""
    python, port = "/usr/bin/python3", free_port()
    probe = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode:
        pytest.skip("needs Debian's python3-gi and gir1.2-gst-rtsp-server-1.0")

    video = write_media(tmp_path / "gate.mp4", np.tile(speech, 2), video=True)

    def start():
        command = [
            python,
            str(ROOT / "tests" / "support" / "gstreamer_rtsp.py"),
            str(port),
            str(video),
        ]
        made = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert made.stdout is not None
        assert made.stdout.readline() == b"ready\n"
        return made

    server, whole = start(), RtspCamera(np.tile(speech, 4))
    before, items = 0, []
    engine = FakeEngine(lambda context_s: "open the gate")
    monitor = Monitor(Recognizer(engine), live=QUICK, alert_clips=tmp_path / "clips")
    timer = threading.Timer(90, monitor.stop)
    timer.start()
    cameras = [
        Camera("gate", f"rtsp://127.0.0.1:{port}/gate", keywords=["gate"]),
        Camera("whole", whole.url),
    ]
    for item in monitor.watch(cameras):
        items.append(item)
        if not before and len(said(items, "gate")) >= 2:
            before = len(said(items, "gate"))
            server.kill()
            server.wait()
            server = start()
        again = before and happened(items, "gate").count("connected") == 2
        if again and len(since_connected(items, "gate")) >= 3:  # the clip of the first is there
            monitor.stop()
    timer.cancel()
    server.kill()
    server.wait()
    whole.close()
    same_segments(since_connected(items, "gate")[:2], spoken)
    assert "lost" in happened(items, "gate")
    assert "lost" not in happened(items, "whole")
    assert max(t.delay_s for t in said(items, "whole")) < 1.5
    kinds = set()
    for clip in (tmp_path / "clips").rglob("*.mkv"):
        with av.open(str(clip)) as container:
            kinds |= {stream.type for stream in container.streams}
            assert next(container.decode(audio=0)).samples
    assert kinds == {"audio", "video"}


def test_a_camera_that_connects_and_says_nothing(rtsp, speech, spoken):
    mute, whole = rtsp(speech, pace=PACE), rtsp(speech, pace=PACE)
    mute.answers = False
    enough = lambda i: (  # noqa: E731
        len(said(i, "whole")) >= len(spoken) and happened(i, "mute").count("lost") >= 2
    )
    items = collect(live_monitor(), {"mute": mute.url, "whole": whole.url}, until=enough)
    assert happened(items, "mute").count("lost") >= 2
    same_segments(spans(items, "whole"), spoken)


@at_any_pace
def test_one_talkative_camera_and_seven_quiet_ones(rtsp, speech, spoken, pace):
    """A burst of one does not delay the others beyond their share."""
    segment = speech[
        int((spoken[0][0] - 0.3) * SAMPLE_RATE) : int((spoken[0][1] + 0.6) * SAMPLE_RATE)
    ]
    late = np.concatenate([np.zeros(4 * SAMPLE_RATE, "f4"), segment])
    quiet = [rtsp(late, pace=pace) for _ in range(7)]
    talk, talk_all = (rtsp(np.tile(segment, 30), pace=pace) for _ in range(2))
    engine = FakeEngine(delay=0.15, workers=2)
    sources = {f"quiet{n}": server.url for n, server in enumerate(quiet)}
    sources |= {"talk": talk.url, "talk2": talk_all.url}

    def enough(items):
        return all(said(items, f"quiet{n}") for n in range(7))

    items = collect(Monitor(Recognizer(engine), live=QUICK), sources, until=enough)
    assert enough(items)
    assert_prompt(pace, [t for t in said(items) if t.camera.startswith("quiet")])


# --- the machine ----------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(rtsp, speech, spoken, tmp_path, monkeypatch):
    """The journal waits for room; what was recognised meanwhile is written then, once."""
    full = threading.Event()
    server = rtsp(speech, pace=PACE, changes=[(spoken[-1][1] + 1.0, full.clear)])
    book = Journal(tmp_path, model="m", model_digest="d", sources={"gate": server.url})
    write = book.write

    def guarded(*lines):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*lines)

    monkeypatch.setattr(book, "write", guarded)
    monitor, items = live_monitor(), []
    full.set()
    timer = threading.Timer(120, monitor.stop)
    timer.start()
    for item in monitor.watch([Camera(name="gate", url=server.url)], journal=book):
        items.append(item)
        if len(said(items)) >= len(spoken):
            monitor.stop()
    timer.cancel()
    book.close()
    same_segments(spans(items), spoken)
    texts = [line for line in lines_of(tmp_path) if "text" in line]
    assert [line["id"] for line in texts] == [t.id for t in said(items)]


def test_a_disk_that_stays_full_ends_with_an_error_and_keeps_the_audio(
    rtsp, speech, spoken, tmp_path, monkeypatch
):
    server = rtsp(speech, pace=PACE)
    sources = {"gate": server.url}
    book = Journal(tmp_path, model="m", model_digest="d", sources=sources)

    def fail(*lines):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(book, "write", fail)
    monitor = live_monitor()
    late = lambda: threading.Timer(1.5, monitor.stop).start()  # noqa: E731 - all has been cut then
    server.changes.append((float("inf"), late))
    with pytest.raises(OSError, match="No space left"):
        list(monitor.watch([Camera(name="gate", url=server.url)], journal=book))
    book.close()
    monkeypatch.undo()
    server.samples = np.zeros(SAMPLE_RATE, np.float32)
    book = Journal(tmp_path, model="m", model_digest="d", sources=sources)
    items = collect(
        live_monitor(), sources, until=lambda i: len(said(i)) >= len(spoken), journal=book
    )
    book.close()
    same_segments(sorted(spans(items)), spoken)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit")
def test_a_full_disk_holds_up_what_is_piped_in(whisper_tiny, tmp_path):
    """A real file that cannot grow, in a real process; audio that is piped in comes once only."""
    samples = decode(EXAMPLE / "monitor.mp4")[: 50 * SAMPLE_RATE]
    data, first = (samples * 32767).astype("<i2").tobytes(), 2 * 32 * SAMPLE_RATE
    command = ["monitor", whisper_tiny, "pcm:16000", *QUICK_DECODING, "--journal"]
    code, _, error = run_command(*command, tmp_path / "whole", given=data, text=False)
    assert code == 0, error
    with Command(*command, tmp_path / "piped", text=False) as process:
        process.stdin.write(data[:first])
        process.stdin.flush()
        assert process.stdout.readline()
        (journal,) = (tmp_path / "piped").glob("*.jsonl")
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        limit = (journal.stat().st_size + 10, unlimited[1])
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        rest = threading.Thread(target=process.stdin.write, args=(data[first:],))
        rest.start()
        while b"cannot be written" not in (line := process.stderr.readline()):
            assert line, "it ended"
        rest.join(30)
        time.sleep(1.0)
        assert process.poll() is None
        assert journal.stat().st_size <= limit[0]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        process.communicate()
        assert process.returncode == 0
    told = [
        [(line["id"], line.get("text")) for line in lines_of(tmp_path / name) if "id" in line]
        for name in ("whole", "piped")
    ]
    assert len(told[0]) > 5
    assert told[0] == told[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("source", ["named pipe", "-", "pcm:16000"])
def test_sigterm_ends_a_wait_for_what_nobody_pipes_in(source, whisper_tiny, tmp_path):
    if source == "named pipe":
        source = tmp_path / "pipe"
        os.mkfifo(source)
    with Command("monitor", whisper_tiny, source) as process:
        if source == "pcm:16000":
            process.stdin.write("\0" * 64000)
            process.stdin.flush()
        status = Path(f"/proc/{process.pid}/status")
        caught = lambda: int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16)  # noqa: E731
        wait_for(lambda: caught() >> (signal.SIGTERM - 1) & 1)
        time.sleep(0.5)  # it waits for its source by then
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert "error" not in process.stderr.read()


class Site:
    """The command in a process of its own, with a real model and a journal."""

    def __init__(self, model, sources, folder, *more):
        self.folder = folder
        command = ["monitor", model, *sources, "--journal", folder, "--quiet", *more]
        self.process = Command(*command, *QUICK_DECODING)

    def wait_for(self, count):
        """Until the journal holds so many texts."""

        def is_there():
            assert self.process.poll() is None, self.process.stderr.read()
            return len([line for line in lines_of(self.folder) if "text" in line]) >= count

        wait_for(is_there)

    def wait_for_each(self, count, cameras, before=()):
        """Until so many segments of each of so many cameras have texts, beside those `before`."""

        def is_there():
            assert self.process.poll() is None, self.process.stderr.read()
            new = [line for line in lines_of(self.folder)[len(before) :] if "text" in line]
            segments = {(line["camera"], line["id"].partition("#")[0]) for line in new}
            found = Counter(camera for camera, _ in segments)
            return len(found) == cameras and min(found.values()) >= count

        wait_for(is_there)

    def stop(self, number):
        """Its exit code."""
        self.process.send_signal(number)
        code = self.process.wait()
        self.process.close()
        return code


@pytest.mark.slow
def test_killed_and_started_again_with_cameras_that_go_on(
    rtsp, speech, spoken, whisper_tiny, tmp_path
):
    """SIGKILL while two cameras talk; nothing that was cut is lost, nothing is told twice."""
    servers = [rtsp(np.tile(speech, 4)) for _ in range(2)]
    sources = [server.url for server in servers]
    site = Site(whisper_tiny, sources, tmp_path / "j")
    site.wait_for_each(2, len(sources))
    assert site.stop(signal.SIGKILL) == -signal.SIGKILL
    cut = {path.name for path in (tmp_path / "j" / "spool").glob("*.segment")}
    before = lines_of(tmp_path / "j")
    site = Site(whisper_tiny, sources, tmp_path / "j")
    site.wait_for_each(len(cut) + 2, len(sources), before)
    assert site.stop(signal.SIGTERM) == 143
    after = lines_of(tmp_path / "j")
    assert after[: len(before)] == before
    ids = [line["id"] for line in after if "id" in line and not line.get("revision")]
    assert len(ids) == len(set(ids))
    assert not cut & {path.name for path in (tmp_path / "j" / "spool").glob("*.segment")}
    # In each connection the segments are those that were spoken, up to the one that a signal cut.
    period = len(speech) / SAMPLE_RATE
    wanted = [(c + n * period, d + n * period) for n in range(4) for c, d in spoken]
    for camera in {line["camera"] for line in after}:
        found = by_connection(line for line in after if line["camera"] == camera)
        assert len(found) == 2
        for segments in found:
            assert len(segments) > 1
            same_segments(segments[:-1], wanted[: len(segments) - 1], tolerance=0.3)


@pytest.mark.slow  # for its clock
@pytest.mark.parametrize("source", ["camera", "pipe"])
def test_a_request_to_stop_is_followed_within_seconds(rtsp, speech, whisper_tiny, tmp_path, source):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    url = str(pipe) if source == "pipe" else rtsp(np.tile(speech, 4)).url
    site = Site(whisper_tiny, [url], tmp_path / "j")
    if source == "pipe":
        wait_for((tmp_path / "j").exists)
    else:
        site.wait_for(1)
    started = time.monotonic()
    assert site.stop(signal.SIGTERM) == 143
    assert time.monotonic() - started < 6


@pytest.mark.slow
def test_a_webhook_that_is_down_keeps_nobody_waiting(rtsp, speech, whisper_tiny, tmp_path):
    """The alert is in the journal at once, and delivered when the other side is there."""
    port, got = free_port(), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *values):
            pass

    server = rtsp(np.tile(speech, 3), pace=PACE)
    address = f"http://127.0.0.1:{port}/alerts"
    # The tiny model says anything; every text holds some letter, so any alert will do: loudness.
    site = Site(whisper_tiny, [server.url], tmp_path / "j", "--webhook", address, "--loud", "10")
    site.wait_for(2)
    assert [line for line in lines_of(tmp_path / "j") if line.get("event") == "sound"]
    assert not got
    web = HTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    wait_for(lambda: got)
    site.stop(signal.SIGTERM)
    web.shutdown()
    web.server_close()
    assert got[0]["event"] == "sound"


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_that_recordings_are_written_to(speech, spoken, tmp_path):
    """Pieces of 5 s that cut through words are read as one; each segment has the time of day."""
    folder, began = tmp_path / "recordings", time.time() - 3600
    at = write_pieces(folder / "gate", speech, 5, began)
    (folder / "notes.txt").write_text("not a recording")
    (folder / "broken.wav").write_bytes(b"RIFF")
    os.utime(folder / "broken.wav", (at + 1, at + 1))
    book = Journal(tmp_path / "j", model="m", model_digest="d", sources={"site": str(folder)})
    monitor = Monitor(Recognizer(FakeEngine()))

    def enough(items):
        return len(said(items)) >= len(spoken) and "unreadable" in happened(items)

    collect(monitor, {"site": str(folder)}, until=enough, journal=book)
    book.close()
    segmenter = Segmenter()
    alone = [*segmenter.feed(speech), *segmenter.finish()]
    texts = [line for line in lines_of(tmp_path / "j") if "text" in line]
    same_segments([(t["start"], t["end"]) for t in texts], [(s.start, s.end) for s in alone])
    assert texts[0]["start"] == pytest.approx(began + alone[0].start, abs=0.1)
    # Started again: nothing is read twice, what came meanwhile is read.
    write_at(folder / "gate" / "100.wav", speech, at + 100)
    book = Journal(tmp_path / "j", model="m", model_digest="d", sources={"site": str(folder)})
    items = collect(
        Monitor(Recognizer(FakeEngine())),
        {"site": str(folder)},
        until=lambda i: len(said(i)) >= len(alone),
        journal=book,
    )
    book.close()
    assert len(said(items)) == len(alone)
    ids = [line["id"] for line in lines_of(tmp_path / "j") if "text" in line]
    assert len(ids) == len(set(ids)) == 2 * len(alone)


def test_a_folder_is_read_on_where_the_process_was_killed(speech, tmp_path):
    """Stopped after any number of segments, the rest is read, and only that."""
    folder = tmp_path / "recordings"
    write_pieces(folder, speech, 5, time.time() - 3600)
    segmenter = Segmenter()
    alone = [*segmenter.feed(speech), *segmenter.finish()]
    assert len(alone) > 1
    for stop_after in range(1, len(alone)):
        journal = tmp_path / f"j{stop_after}"
        for wanted in (stop_after, len(alone) - stop_after):
            broken_off(journal, folder, wanted)
        found = sorted((t["start"], t["end"]) for t in lines_of(journal) if "text" in t)
        same_segments(found, [(s.start, s.end) for s in alone], tolerance=0.4)
