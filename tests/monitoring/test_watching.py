"""What a watcher gets beside the text: provisional lines, sounds, clips, reports, numbers."""

import itertools
import json
import re
import socket
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, tone, write_media, write_text_backbone
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.engines import FakeEngine, LoudIsSpeech, fake_monitor
from support.sessions import collect, said, transcript
from support.sources import QUICK_DECODING, Paced, decode, remuxed, transport_stream
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import (
    Alert,
    Camera,
    Journal,
    LiveSettings,
    Monitor,
    MonitorStats,
    Partial,
    Sound,
    SourceEvent,
    Transcript,
)
from mmtransfer.monitoring.outputs.alerts import STOPPED, Mqtt
from mmtransfer.monitoring.outputs.dashboard import metrics, metrics_server, table
from mmtransfer.monitoring.outputs.report import report
from mmtransfer.monitoring.sound_level import Level, SoundLevel
from mmtransfer.monitoring.sources.clips import Recorder
from mmtransfer.monitoring.sources.live import _TimeLine
from mmtransfer.speech import segments
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Segment, Segmenter, SegmenterSettings

VIDEO = EXAMPLE / "monitor.mp4"


# --- provisional text -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_speech():
    """Eight seconds in which nobody pauses."""
    samples = decode(VIDEO)
    segments = [*Segmenter().feed(samples), *Segmenter().finish()]
    pieces = [samples[int(s.start * SAMPLE_RATE) : int(s.end * SAMPLE_RATE)] for s in segments]
    spoken = np.concatenate(pieces)[: 8 * SAMPLE_RATE]
    return np.concatenate([np.zeros(SAMPLE_RATE), spoken, np.zeros(3 * SAMPLE_RATE)]).astype("f4")


class GrowingEngine(FakeEngine):
    """Its text grows with the clip: a word for each half second."""

    def decode(self, clips, context_s):
        self.calls.append((len(clips), context_s))
        self.clips = [*getattr(self, "clips", []), *clips]
        texts = [f"word{n}" for n in range(60)]
        return [
            Hypothesis(
                " ".join(texts[: max(1, round(len(clip) / 8000))]), (1,), -0.1, 0.0, context_s
            )
            for clip in clips
        ]


@pytest.mark.parametrize("pace", [3.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_who_does_not_pause_is_transcribed_meanwhile(long_speech, pace):
    server = Paced([long_speech], pace=pace)
    monitor = Monitor(Recognizer(GrowingEngine()), live=LiveSettings(first_retry_s=0.1))
    seen = []
    timer = threading.Timer(120, monitor.stop)
    timer.start()
    for item in monitor.watch([Camera(name="gate", url=server.url)]):
        seen.append((time.time(), item))
        if isinstance(item, Transcript):
            monitor.stop()
    timer.cancel()
    server.close()
    partial = [(at, item) for at, item in seen if isinstance(item, Partial)]
    (final,) = [item for _, item in seen if isinstance(item, Transcript)]
    assert len(partial) >= 4
    first_at, first = partial[0]
    assert first.id == final.id
    assert first_at < final.end  # how soon is measured by benchmarks/live.py
    assert final.end - final.start > 5
    for (_, one), (_, other) in itertools.pairwise(partial):
        assert other.text.startswith(one.text)
        assert len(other.text) > len(one.text)
    assert final.delay_s is not None
    assert pace != 1 or final.delay_s > 0


def test_the_reading_in_the_pause_is_the_final_one(camera, camera_speech, camera_stream):
    """No samples are decoded twice, and the text is the one that they have alone."""
    engine = GrowingEngine()
    server = camera([camera_stream, 60])
    monitor = Monitor(Recognizer(engine), live=LiveSettings())
    items = collect(monitor, {"gate": server.url}, until=lambda i: len(said(i)) >= 3)
    segmenter = Segmenter(replace(SegmenterSettings(), pause_s=0.45), 3)
    alone = [*segmenter.feed(camera_speech.astype(np.float32)), *segmenter.finish()]
    for found, segment in zip(said(items), alone, strict=False):
        assert found.end - found.start == pytest.approx(segment.end - segment.start, abs=0.1)
        words = max(1, round(len(segment.samples) / 8000))
        assert abs(len(found.text.split()) - words) <= 1
    assert len({clip.tobytes() for clip in engine.clips}) == len(engine.clips)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
    st.sampled_from([1, 3, 8]),
)
def test_a_whole_draft_is_the_segment(pattern, block):
    """Whatever comes: a draft that calls itself whole has the samples of the segment that ends
    where it does."""
    rng = np.random.default_rng(0)
    segmenter = Segmenter(SegmenterSettings(pause_s=0.45), block)
    segmenter._probability = lambda x: np.where(x.reshape(-1, 512).max(1) > 0.5, 0.9, 0.1)  # type: ignore[assignment]
    drafts, segments = {}, list[Segment]()
    for voiced, frames in [*pattern, (False, 40)]:
        for _ in range(frames):
            samples = rng.uniform(0.6, 1, 512) if voiced else rng.uniform(0, 0.4, 512)
            segments += segmenter.feed(samples.astype(np.float32))
            running = segmenter.running()
            if running is not None and running[1]:
                drafts[running[0].start, running[0].end] = running[0]
    for segment in segments:
        draft = drafts.get((segment.start, segment.end))
        if draft is None:  # in large blocks the pause may be over when it is first seen
            assert block > 1
            continue
        np.testing.assert_array_equal(draft.samples, segment.samples)


# --- time -----------------------------------------------------------------------------------------


def block(seconds, media=None):
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32), media


def test_audio_in_bursts_is_no_gap():
    """As HLS comes: six seconds at once, every six seconds."""
    now, line = 1000.0, _TimeLine(1000.0, 1000.0)
    for burst in range(100):
        now += 6
        for piece in range(60):
            assert line.place(block(0.1, burst * 6 + piece / 10), now) is None
            line.advance(block(0.1, burst * 6 + piece / 10))
    assert line.position == pytest.approx(now, abs=0.2)


def test_what_the_stream_says_is_missing_is_a_gap_at_once():
    line = _TimeLine(1000.0, 1000.0)
    line.advance(block(1.0, 50.0))
    assert line.place(block(1.0, 51.0), 1002.0) is None
    line.advance(block(1.0, 51.0))
    assert line.place(block(1.0, 57.0), 1008.0) == pytest.approx(5.0)
    # A clock that is set means nothing.
    for wrong in (3.0, 9e9):
        assert line.place(block(1.0, wrong), 1003.0) is None


def test_audio_that_stays_late_was_lost():
    line, now = _TimeLine(1000.0, 1000.0), 1000.0
    found = []
    for second in range(100):
        now += 6 if second == 10 else 1
        lost = line.place(block(1.0), now)
        if lost is not None:
            found.append(lost)
            line = _TimeLine(line.position + lost, now)
        line.advance(block(1.0))
    assert found == [pytest.approx(5.0, abs=0.2)]
    assert line.position == pytest.approx(now, abs=0.3)


@settings(deadline=None, max_examples=10)
@given(st.floats(-500e-6, 500e-6))
@example(-500e-6)
@example(500e-6)
def test_the_time_line_follows_a_clock_that_drifts(drift):
    """Three hours of a camera whose crystal is a little fast or slow."""
    now, line = 0.0, _TimeLine(0.0, 0.0)
    for _ in range(3 * 3600):
        now += 1.0 + drift
        assert line.place(block(1.0), now) is None
        line.advance(block(1.0))
    assert line.position == pytest.approx(now, abs=0.2)


# --- sounds ---------------------------------------------------------------------------------------


def test_a_bang_is_told_once_and_dead_microphones_too():
    rng = np.random.default_rng(0)
    quiet = 0.001 * rng.standard_normal(10 * SAMPLE_RATE).astype(np.float32)
    bang = quiet.copy()
    bang[5 * SAMPLE_RATE : 6 * SAMPLE_RATE] = 0.5
    level = SoundLevel(20)
    (found,) = level.feed(bang, 100.0)
    assert found.at == pytest.approx(105.0)
    assert found.level_db == pytest.approx(-6, abs=0.1)
    assert found.background_db == pytest.approx(-60, abs=0.5)
    assert not list(SoundLevel(20).feed(quiet, 0.0))
    # What goes on becomes usual.
    long = np.concatenate([quiet, np.full(120 * SAMPLE_RATE, 0.5, np.float32)])
    assert len(list(SoundLevel(20).feed(long, 0.0))) == 1
    (dead,) = SoundLevel(20).feed(np.zeros(90 * SAMPLE_RATE, np.float32), 0.0)
    assert dead.is_dead
    assert dead.at == pytest.approx(59.75)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=20))
def test_levels_do_not_depend_on_the_blocks(sizes):
    rng = np.random.default_rng(1)
    samples = 0.001 * rng.standard_normal(sum(sizes) + 5 * SAMPLE_RATE).astype(np.float32)
    samples[-SAMPLE_RATE:] *= 300
    whole = list(SoundLevel(20).feed(samples, 7.0))
    one, found, at = SoundLevel(20), list[Level](), 0
    for size in [*sizes, 5 * SAMPLE_RATE]:
        found += one.feed(samples[at : at + size], 7.0 + at / SAMPLE_RATE)
        at += size
    assert len(found) == len(whole) == 1
    assert found[0].at == pytest.approx(whole[0].at)


# --- clips ----------------------------------------------------------------------------------------


def media_of(path):
    with av.open(str(path)) as container:
        kinds = {stream.type for stream in container.streams}
        times, pictures = [], 0
        for frame in container.decode(container.streams.audio[0]):
            assert frame.time is not None
            times.append(frame.time)
        container.seek(0)
        if "video" in kinds:
            pictures = sum(1 for _ in container.decode(container.streams.video[0]))
    return kinds, times[-1] - times[0], pictures


def key_frames(path):
    """Seconds at which a whole picture comes."""
    with av.open(str(path)) as container:
        packets = list(container.demux(container.streams.video[0]))
        return [float(p.pts * p.time_base) for p in packets if p.pts is not None and p.is_keyframe]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_clip_is_kept_around_an_alert_in_a_recording(tmp_path, container):
    video = VIDEO if container == "mp4" else remuxed(VIDEO, tmp_path / "monitor.mkv")
    monitor, _ = fake_monitor(texts=lambda c: "open the gate")
    monitor = Monitor(monitor._recognizer, alert_clips=tmp_path / "clips")
    watched = Camera(name="yard/1", url=str(video), keywords=["gate"])
    book = Journal(tmp_path / "j", model="m", model_digest="d", sources={"yard/1": str(video)})
    items = list(monitor.watch([watched], journal=book))
    book.close()
    raised = [item for item in items if isinstance(item, Alert)]
    assert raised
    for alert in raised:
        kinds, seconds, pictures = media_of(alert.clip)
        assert kinds == {"audio", "video"}
        assert pictures > 0
        begins = max(at for at in key_frames(video) if at <= max(0, alert.start - 5))
        assert seconds == pytest.approx(min(alert.end + 5, 120) - begins, abs=0.5)
    lines = [json.loads(x) for p in (tmp_path / "j").glob("*.jsonl") for x in p.open()]
    clips = [line["clip"] for line in lines if line.get("event") == "alert"]
    assert clips == [alert.clip for alert in raised]
    assert not [line for line in lines if line.get("event") == "no clip"]


def test_a_clip_is_kept_around_an_alert_of_a_camera(camera, camera_stream, tmp_path):
    server = camera([camera_stream, 60])
    monitor = Monitor(Recognizer(FakeEngine()), live=LiveSettings(), alert_clips=tmp_path)
    watched = Camera(name="gate", url=server.url, keywords=["some words"], loud_db=15)
    clips = lambda i: [x.clip for x in i if isinstance(x, Alert) and Path(x.clip).exists()]  # type: ignore[arg-type]  # noqa: E731
    items = []
    timer = threading.Timer(120, monitor.stop)
    timer.start()
    for item in monitor.watch([watched]):
        items.append(item)
        if clips(items):
            monitor.stop()
    timer.cancel()
    assert clips(items)
    kinds, seconds, _ = media_of(clips(items)[0])
    assert kinds == {"audio"}
    assert seconds > 1


def test_a_clip_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "clips").write_text("in the way")
    monitor = Monitor(Recognizer(FakeEngine()), alert_clips=tmp_path / "clips")
    items = list(monitor.watch([Camera(name="a", url=str(VIDEO), keywords=["words"])]))
    assert any(isinstance(i, SourceEvent) and i.event == "no clip" for i in items)
    assert said(items)


def test_a_clip_that_fails_after_the_last_source_ended_is_reported(tmp_path, monkeypatch):
    waits = iter([0.6])

    def cut(*_):
        time.sleep(next(waits, 0))  # the sources have ended by then
        raise OSError("the server has gone")

    monkeypatch.setattr("mmtransfer.monitoring.moments.cut_recording", cut)
    monitor = Monitor(Recognizer(FakeEngine()), alert_clips=tmp_path / "clips")
    items = list(monitor.watch([Camera(name="a", url=str(VIDEO), keywords=["words"])]))
    failed = [i for i in items if isinstance(i, SourceEvent) and i.event == "no clip"]
    assert len(failed) == len([i for i in items if isinstance(i, Alert)]) > 0


def test_a_connection_that_hung_does_not_empty_the_recording_of_the_next(tmp_path):
    recorder, hung, woke = Recorder(), threading.Event(), threading.Event()

    def connection_that_hangs():
        recorder.begin()
        hung.set()
        woke.wait(30)
        recorder.leave()

    old = threading.Thread(target=connection_that_hangs)
    old.start()
    assert hung.wait(30)
    path, told = tmp_path / "clip.mkv", []
    with av.open(str(write_media(tmp_path / "a.wav", tone(10)))) as container:
        recorder.begin()
        for packet in container.demux():
            if packet.pts is not None and packet.pts * packet.time_base > 6 and old.is_alive():
                woke.set()
                old.join()
                recorder.want(path, 1.0, 8.0, lambda *found: told.append(found))
            recorder.keep(packet)
        recorder.leave()
    assert told == [(path, "")]
    assert media_of(path)[1] == pytest.approx(7, abs=0.3)


def test_a_clip_that_is_wanted_after_the_connection_ended_is_written_of_what_it_left(tmp_path):
    recorder, told, path = Recorder(), [], tmp_path / "clip.mkv"
    with av.open(str(VIDEO)) as container:
        recorder.begin()
        for packet in container.demux():
            if packet.stream.type == "audio" and (packet.pts or 0) * packet.time_base > 12:
                break
            recorder.keep(packet)
        recorder.leave()
    del packet, container
    recorder.want(path, 3.0, 60.0, lambda *found: told.append(found))
    assert told == [(path, "")]
    kinds, seconds, pictures = media_of(path)
    assert kinds == {"audio", "video"}
    assert pictures > 0
    begins = max(at for at in key_frames(VIDEO) if at <= 3)
    assert seconds == pytest.approx(12 - begins, abs=0.5)
    recorder.begin()  # another connection, whose times are others
    recorder.leave()
    recorder.want(path, 3.0, 60.0, lambda *found: told.append(found))
    assert told[1:] == [(path, "nothing to write")]


def test_a_clip_that_a_connection_without_audio_still_holds_at_the_end_is_told(
    camera, tmp_path, monkeypatch
):
    monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)
    loud = 0.9 * np.sign(np.sin(np.arange(2 * SAMPLE_RATE) / 10))
    spoken = np.pad(loud, (SAMPLE_RATE // 2, SAMPLE_RATE)).astype(np.float32)
    server = camera([transport_stream(spoken), 60])
    patient = LiveSettings(read_s=60)
    monitor = Monitor(Recognizer(FakeEngine()), live=patient, alert_clips=tmp_path)
    watched = Camera(name="gate", url=server.url, keywords=["some words"])
    items = collect(monitor, [watched], until=lambda i: any(isinstance(x, Alert) for x in i))
    (clip,) = [item.clip for item in items if isinstance(item, Alert)]
    failed = [i.detail for i in items if isinstance(i, SourceEvent) and i.event == "no clip"]
    assert failed == ([] if Path(str(clip)).exists() else [f"{clip}: the source ended"])


# --- sentiment, languages, models -----------------------------------------------------------------


def test_texts_are_judged(tmp_path):
    judged = []

    def judge(texts):
        judged.extend(texts)
        return [("negative", 0.8)] * len(texts)

    monitor = Monitor(Recognizer(FakeEngine()), classifier=judge)
    found = list(monitor.transcribe(VIDEO))
    assert found
    assert {(t.sentiment, t.sentiment_prob) for t in found} == {("negative", 0.8)}
    assert len(judged) >= len(found)


def test_the_command_judges_texts(whisper_tiny, short_video, tmp_path, capsys):
    judge = write_text_backbone(tmp_path / "judge", labels=3)
    output = tmp_path / "out.jsonl"
    command = ["monitor", str(whisper_tiny), str(short_video), *QUICK_DECODING, "--sentiment"]
    assert main([*command, str(judge), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    from mmtransfer import load
    from mmtransfer.text.classifier import TextModel

    model = load(str(judge))
    assert isinstance(model, TextModel)
    for row, found in zip(rows, model.predict([row["text"] for row in rows]), strict=True):
        assert row["sentiment"] == found.label
        assert row["sentiment_prob"] == pytest.approx(found.probabilities[found.label], abs=1e-3)
    assert f"({rows[0]['sentiment']})" in capsys.readouterr().out
    assert main([*command, str(whisper_tiny)]) == 2
    assert "expected a model that classifies texts" in capsys.readouterr().err


def test_cameras_have_models_of_their_own():
    one, other = FakeEngine(lambda c: "first model"), FakeEngine(lambda c: "second model")
    monitor = Monitor(Recognizer(one), others={"b": Recognizer(other)})
    cameras = [Camera(name="a", url=str(VIDEO)), Camera(name="b", url=str(VIDEO))]
    items = list(monitor.watch(cameras))
    assert {t.text for t in said(items, "a")} == {"first model"}
    assert {t.text for t in said(items, "b")} == {"second model"}
    assert len(said(items, "a")) == len(said(items, "b"))


def test_a_journal_knows_the_models_of_its_cameras(whisper_tiny, random_whisper, tmp_path, capsys):
    write_media(tmp_path / "quiet.wav", np.zeros(3 * SAMPLE_RATE, np.float32))
    cameras = tmp_path / "cameras.yaml"
    command = ["monitor", str(whisper_tiny), "--cameras", str(cameras)]
    command += ["--journal", str(tmp_path / "j")]
    cameras.write_text("cameras: [{name: a, url: quiet.wav, loud_db: 30}]")
    assert main(command) == 0
    assert main(command) == 0  # nothing is left to do
    own = f"cameras: [{{name: a, url: quiet.wav, model: '{random_whisper}'}}]"
    cameras.write_text(own)
    capsys.readouterr()
    assert main(command) == 2
    assert "another model" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "j2")]) == 0


# --- report ---------------------------------------------------------------------------------------


def test_the_report_holds_everything_and_nothing_escapes(tmp_path):
    nasty = "</script><script>alert(1)</script> & 北门"
    said_ = replace(transcript(nasty), sentiment="negative", sentiment_prob=0.9)
    alert = Alert("a", "gate <b>", "gate", 1.0, "a@1", 14.6, 21.9, nasty)
    sound = Sound("a", "a@3#sound", 3.0, 3.25, -6.0, -60.0)
    (tmp_path / "a b.mp4").touch()
    page = report(str(tmp_path / "a b.mp4"), [said_, alert, sound], folder=tmp_path)
    assert page.count("<script") == 2
    assert 'src="a%20b.mp4"' in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    rows = json.loads(data[1])
    assert [row["start"] for row in rows] == [3.0, 14.6, 14.6]
    assert rows[1]["text"] == nasty
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched


def test_the_command_writes_a_report(whisper_tiny, short_video, tmp_path, capsys):
    output = tmp_path / "out.html"
    assert (
        main(
            [
                "monitor",
                str(whisper_tiny),
                str(short_video),
                *QUICK_DECODING,
                "--output",
                str(output),
            ]
        )
        == 0
    )
    rows = json.loads(re.findall(r'id="data">(.*?)</script>', output.read_text(), re.S)[0])
    printed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("[")]
    assert len(rows) == len(printed) > 5


def test_a_report_of_two_sessions_holds_the_alerts_of_both(whisper_tiny, short_video, tmp_path):
    output = tmp_path / "out.html"
    command = [
        "monitor",
        str(whisper_tiny),
        str(short_video),
        *QUICK_DECODING,
        "--quiet",
        "--loud",
        "20",
    ]
    command += ["--journal", str(tmp_path / "j"), "--output", str(output), "--keywords", "the"]

    def events():
        rows = json.loads(re.findall(r'id="data">(.*?)</script>', output.read_text(), re.S)[0])
        return [row.get("event") for row in rows]

    assert main(command) == 0
    first = events()
    assert {None, "alert"} <= set(first)
    assert main(command) == 0  # everything is in the journal
    assert events() == first


# --- numbers --------------------------------------------------------------------------------------


def watched_stats():
    stats = MonitorStats()
    stats.add_cameras(["gate", 'ya"rd'])
    gate = stats.cameras["gate"]
    gate.audio_s, gate.segments, gate.decode_s = 100.0, 7, 5.0
    for seconds in (0.1, 0.2, 0.3, 0.4, 2.0):
        gate.add_delay(seconds)
    gate.rejected["looping"] += 2
    gate.events["connected"] += 3
    gate.is_connected = True
    return stats


def test_numbers_for_prometheus():
    text = metrics(watched_stats())
    assert 'mmtransfer_segments_total{camera="gate"} 7' in text
    assert 'mmtransfer_reconnects_total{camera="gate"} 2' in text
    assert 'mmtransfer_rejected_total{camera="gate",reason="looping"} 2' in text
    for bound, count in (("0.1", 1), ("0.3", 3), ("0.5", 4), ("1.5", 4), ("2", 5), ("+Inf", 5)):
        assert f'mmtransfer_delay_seconds_bucket{{camera="gate",le="{bound}"}} {count}.0' in text
    assert 'mmtransfer_delay_seconds_sum{camera="gate"} 3.0' in text
    assert 'mmtransfer_delay_seconds_count{camera="ya\\"rd"} 0.0' in text
    assert 'mmtransfer_real_time_factor{camera="gate"} 0.05' in text
    assert 'mmtransfer_connected{camera="ya\\"rd"} 0' in text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"mmtransfer_audio_seconds", "mmtransfer_connected", "mmtransfer_delay_seconds"} <= names


def test_numbers_are_served_on_this_machine_alone():
    with metrics_server(watched_stats(), "0") as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert b"mmtransfer_audio_seconds_total" in answer.read()
        with (
            pytest.raises(UserError, match="cannot listen"),
            metrics_server(watched_stats(), str(port)),
        ):
            pass
    for wrong in ("x", "99999", "1.2.3.4:"):
        with pytest.raises(UserError, match="PORT"), metrics_server(watched_stats(), wrong):
            pass


def test_the_table_shows_every_source():
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as capture:
        console.print(table(watched_stats(), console.width))
    text = capture.get()
    assert "connected" in text
    assert 'ya"rd' in text
    assert "0.30 s" in text
    assert "last text" in text


def test_the_table_fits_a_terminal_of_80_columns_and_takes_texts_as_they_are():
    from rich.console import Console

    stats = watched_stats()
    stats.add_cameras(["[/gate]"])
    stats.cameras["[/gate]"].last_text = "[/x] [bold]"
    stats.cameras["[/gate]"].audio_s = 123456
    for width in (80, 200):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(table(stats, width))
        text = capture.get()
        assert "reconn." in text
        assert "123456 s" in text
        assert ("[/x] [bold]" in text) == (width == 200)


def test_the_command_shows_the_table_and_the_lines(whisper_tiny, short_video, capsys):
    command = [
        "monitor",
        str(whisper_tiny),
        str(short_video),
        *QUICK_DECODING,
        "--dashboard",
        "--metrics-port",
        "0",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "reconn." in out
    assert out.count("→") > 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keywords", "!!"], "expected words"),
        (["--alert-clips", "pyproject.toml"], "expected a folder for alert clips"),
        (["--metrics-port", "abc"], "PORT"),
        (["--metrics-port", ""], "PORT"),
        (["--metrics-port", "no.such.host.:9100"], "cannot listen"),
        (["--mqtt", "http://x"], "expected mqtt[s]://"),
        (["--webhook", "ftp://x"], "expected an address http[s]://"),
        (["--webhook", "http://h:x/y"], "expected an address http[s]://"),
        (["--webhook", "http://[h/y"], "expected an address http[s]://"),
        (["rtsp://[bad"], "not an address"),
        (["rtsp://h:port/x"], "not an address"),
        (["-", "-"], "given twice"),
        (["pcm:0"], "such as pcm:16000"),
        (["--output", str(VIDEO.with_suffix(".json"))], "unknown output format"),
        (["--loud", "-3"], "expected dB above the background level"),
    ],
)
def test_wrong_options_are_one_line_before_any_work(more, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["monitor", "bundled:whisper-tiny.en", str(VIDEO), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


# --- MQTT -----------------------------------------------------------------------------------------


def received(port, topic, count, ready, seconds=120):
    """What a subscriber gets."""
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    got, done = [], threading.Event()

    def on_message(client, data, message):
        got.append(json.loads(message.payload))
        if len(got) >= count:
            done.set()

    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda c, *rest: c.subscribe(topic, qos=1)
    client.on_subscribe = lambda *rest: ready()
    client.on_message = on_message
    client.connect("127.0.0.1", port)
    client.loop_start()
    done.wait(seconds)
    client.disconnect()
    client.loop_stop()
    return got


def test_alerts_reach_an_mqtt_broker(broker):
    port, start, _ = broker
    start()
    settled = []
    channel = Mqtt(
        f"mqtt://127.0.0.1:{port}/site/alerts",
        settled=lambda a, why: settled.append((a["number"], why)),
    )

    def ready():
        for number in range(3):
            channel.send({"camera": "gate", "keyword": "着火", "number": number})

    got = received(port, "site/alerts", 3, ready)
    channel.close()
    assert [message["number"] for message in got] == [0, 1, 2]
    assert got[0]["keyword"] == "着火"
    assert sorted(settled) == [(0, ""), (1, ""), (2, "")]


def test_answers_of_a_broker_do_not_hold_up_who_sends(broker):
    """Also not those that come while the connection is being made."""
    port, start, _ = broker
    start()
    settled = []
    channel = Mqtt(f"mqtt://127.0.0.1:{port}/a", settled=lambda a, why: settled.append(why))

    def send():
        for number in range(800):
            channel.send({"number": number})

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    sending.join(120)
    assert not sending.is_alive()
    wait_for(lambda: len(settled) == 800)
    channel.close()
    assert settled == [""] * 800


def test_a_broker_that_is_away_loses_nothing_untold():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failed = []
    channel = Mqtt(
        f"mqtt://127.0.0.1:{port}/a", settled=lambda a, why: failed.append((a["number"], why))
    )
    channel.send({"number": 1})
    assert not failed  # it does not wait
    channel.close(wait_s=0.2)
    assert failed == [(1, STOPPED)]
    for wrong in ("http://h/t", "mqtt://h", "mqtt:///topic", "mqtt://h:x/t", "mqtt://[h/t"):
        with pytest.raises(UserError, match=r"expected mqtt\[s\]://"):
            Mqtt(wrong)
    for wrong in ("mqtt://h/gate/+", "mqtt://h/gate/#", "mqtt://h/a%23"):
        with pytest.raises(UserError, match="a topic to publish to"):
            Mqtt(wrong)
