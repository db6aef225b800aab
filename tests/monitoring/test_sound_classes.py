"""Sounds of classes: windows, smoothing, begin and end, restarts, and where they arrive."""

import json
import queue
import re
import threading
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLE, tone, write_media, write_wave_backbone
from support.engines import FakeEngine
from support.sessions import QUICK, collect, happened, lines_of, said
from support.sources import Paced, decode, write_at
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.cli.monitor import summary
from mmtransfer.config import DataConfig, HeadConfig
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.monitoring import (
    Camera,
    ClassifiedSound,
    Journal,
    Monitor,
    MonitorOptions,
    Session,
    SourceEvent,
)
from mmtransfer.monitoring.events import SourceEnd, Stopped
from mmtransfer.monitoring.loading import sound_classes
from mmtransfer.monitoring.outputs.dashboard import metrics
from mmtransfer.monitoring.sound_events import SoundClasses, SoundTracker, SoundWorker, Step
from mmtransfer.monitoring.sources.source import Source
from mmtransfer.monitoring.stats import CameraStats, MonitorStats
from mmtransfer.sound.classifier import load_sound_model, new_sound_model
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.recognition import Recognizer

LABELS = ("alarm", "glass")


def loudness(windows):
    """The share of a window that is loud, as the probability of an alarm."""
    shares = np.array([np.mean(np.abs(window) > 0.05) for window in windows])
    return np.stack([shares, np.zeros(len(shares))], 1)


def classes(classify=loudness, window_s=1.0, **thresholds):
    return SoundClasses(LABELS, window_s, classify, thresholds)


def beeps(seconds, *spans):
    """Silence with tones, each from one second to another; nobody speaks."""
    samples = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    for start, end in spans:
        first = round(start * SAMPLE_RATE)
        sound = np.sign(tone(end - start, hertz=440.0)).astype(np.float32) / 2
        samples[first : first + len(sound)] = sound
    return samples


def sounds_of(items):
    return [item for item in items if isinstance(item, ClassifiedSound)]


def spans(items):
    return [(item.start, item.end) for item in sounds_of(items)]


def monitor(found=None, **options):
    return Monitor(
        Recognizer(FakeEngine(workers=1)), live=QUICK, sounds=found or classes(), **options
    )


def book(folder, source):
    return Journal(folder, model="m", model_digest="d", sources={"gate": str(source)})


# --- begin and end --------------------------------------------------------------------------------


def tracked(rows, **thresholds):
    """Sounds of windows of five steps of a second each."""
    found = classes(**thresholds)
    tracker = SoundTracker("gate", LABELS, found.levels)
    second = np.zeros(SAMPLE_RATE, np.float32)
    sounds: list[ClassifiedSound] = []
    for number, row in enumerate(rows):
        steps = [Step(second, number + i, "gate") for i in range(5)]
        sounds += tracker.add(steps, np.array(row, float))
    return [*sounds, *tracker.finish()]


def test_a_probability_is_the_mean_of_all_windows_that_hold_the_moment():
    one = [[0, 0]] * 5 + [[1, 0]] * 5 + [[0, 0]] * 5
    # Step 9 is held by the windows 5 to 9 alone; those before and after it by fewer of them.
    [sound] = tracked(one)
    assert (sound.label, sound.start, sound.end, sound.probability) == ("alarm", 9, 12, 1.0)
    assert sound.id == "gate@9.000#alarm"
    assert tracked([[0, 0]] * 5 + [[1, 0]] + [[0, 0]] * 5) == []  # one window is no sound


def test_a_sound_begins_over_its_threshold_and_ends_under_half_of_it():
    rising = [[p, 0] for p in (0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5, 0.1, 0.1)]
    rows = [row for row in rising for _ in range(5)]
    assert tracked(rows, default=0.95) == []
    [one] = tracked(rows, default=0.8)
    assert (one.start, one.end, one.probability) == (23, 41, 0.9)
    # It does not end where it falls under the threshold, only under half of it.
    [lower] = tracked(rows, alarm=0.4)
    assert lower.start < one.start
    assert lower.end > one.end


def test_each_class_has_its_own_threshold_and_one_of_threshold_1_is_never_reported():
    rows = [[0.9, 0.6]] * 5
    assert [s.label for s in tracked(rows)] == ["alarm"]
    assert [s.label for s in tracked(rows, glass=0.5)] == ["alarm", "glass"]
    assert [s.label for s in tracked([[1.0, 0.6]] * 5, alarm=1, default=0.5)] == ["glass"]


def test_sounds_of_several_classes_overlap_and_end_with_the_audio():
    one, other = tracked([[1, 0]] * 5 + [[1, 1]] * 10)
    assert (one.label, one.start, one.end) == ("alarm", 0, 19)
    assert (other.label, other.end, other.probability) == ("glass", 19, 1.0)


def test_a_sound_that_goes_on_is_reported_each_minute():
    found = tracked([[1, 0]] * 150)
    assert [(s.start, s.end) for s in found] == [(0, 60), (60, 120), (120, 154)]


def test_a_label_does_not_break_the_id():
    tracker = SoundTracker("gate", ["a@b"], np.array([0.5]))
    steps = [Step(np.zeros(SAMPLE_RATE, np.float32), 3.0, "gate/a.wav")]
    [sound] = [*tracker.add(steps, np.array([1.0])), *tracker.finish()]
    assert sound.label == "a@b"
    assert sound.id.rpartition("@")[0] == "gate/a.wav"


def test_a_threshold_of_a_class_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"expected classes .*alarm, glass.* found 'glas'"):
        classes(glas=0.5)


# --- windows --------------------------------------------------------------------------------------


def classified_windows(parts, window_s=1.0, finish=True):
    """The windows that audio in these parts is classified in, and the sounds."""
    windows: list[np.ndarray] = []
    events: queue.Queue[Any] = queue.Queue()

    def classify(found):
        windows.extend(found)
        return np.tile([1.0, 0.0], (len(found), 1))

    source = Source(0, Camera("gate", "-"), Recognizer(FakeEngine()), CameraStats(), 1)
    worker = SoundWorker(classes(classify, window_s), events, threading.Event())
    stream = worker.stream(source)
    worker.start()
    at = 0.0
    for part in parts:
        stream.feed(part, at, "gate")
        at += len(part) / SAMPLE_RATE
    stream.end(SourceEnd("-", "gate", None))
    found: list[Any] = []
    while not found or not isinstance(found[-1], SourceEnd):
        found.append(events.get(timeout=60)[1])
    worker.close()
    return windows, found


@pytest.mark.parametrize("seconds", [0.001, 0.2, 0.5, 0.999, 1.0, 1.1, 1.2, 3.07])
def test_windows_cover_the_audio_and_the_last_ends_with_it(seconds):
    samples = np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32)
    pieces = np.array_split(samples, 7)
    windows, found = classified_windows(pieces)
    again, _ = classified_windows([samples])
    assert len(windows) == len(again)
    assert all(np.array_equal(a, b) for a, b in zip(windows, again, strict=True))
    assert windows[0][0] == 0
    assert windows[-1][-1] == samples[-1]
    assert all(len(window) == min(len(samples), SAMPLE_RATE) for window in windows)
    assert all(b[0] - a[0] <= SAMPLE_RATE / 5 for a, b in pairwise(windows))
    [sound, _] = found
    assert (sound.start, sound.end) == (0.0, round(seconds, 3))


def test_no_audio_is_no_window():
    windows, found = classified_windows([])
    assert windows == []
    assert len(found) == 1


def test_windows_of_several_sources_share_a_batch_and_live_ones_come_first():
    batches: list[list[float]] = []
    events: queue.Queue[Any] = queue.Queue()

    def classify(windows):
        batches.append([float(window[0]) for window in windows])
        return np.zeros((len(windows), 2))

    worker = SoundWorker(classes(classify), events, threading.Event())
    urls = ["a.wav", "rtsp://b/1", "c.wav"]
    streams = [
        worker.stream(Source(n, Camera(u[0], u), Recognizer(FakeEngine()), CameraStats(), 3))
        for n, u in enumerate(urls)
    ]
    for number, stream in enumerate(streams):
        stream.feed(np.full(2 * SAMPLE_RATE, number, np.float32), 0.0, "s")
        stream.end(SourceEnd("", "", None))
    worker.start()
    ended = 0
    while ended < 3:
        ended += isinstance(events.get(timeout=60)[1], SourceEnd)
    worker.close()
    assert set(batches[0]) == {0.0, 1.0, 2.0}
    assert batches[0][0] == 1.0
    assert sum(map(len, batches)) == 3 * 6


# --- recordings -----------------------------------------------------------------------------------


def test_sounds_are_found_where_nobody_speaks(tmp_path):
    path = write_media(tmp_path / "gate.wav", beeps(12, (2, 4), (7, 10)))
    at_work = monitor()
    items = list(at_work.watch([Camera("gate", str(path))]))
    assert not said(items)
    assert [sound.label for sound in sounds_of(items)] == ["alarm", "alarm"]
    for found, meant in zip(spans(items), [(2, 4), (7, 10)], strict=True):
        assert found == pytest.approx(meant, abs=0.61)
    assert isinstance(items[-1], SourceEnd)  # every sound comes before it
    assert at_work.stats.sounds == {"alarm": 2}
    assert at_work.stats.cameras["gate"].alerts == 2


def test_what_fails_in_classification_ends_the_run(tmp_path):
    path = write_media(tmp_path / "gate.wav", beeps(3))

    def classify(windows):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(monitor(classes(classify)).watch([str(path)]))


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_restart_loses_no_sound_and_reports_none_twice(stop_after, tmp_path):
    meant = [(2, 4), (7, 9), (12, 14), (17, 19)]
    path = write_media(tmp_path / "gate.wav", beeps(22, *meant))
    whole = spans(monitor().watch([Camera("gate", str(path))]))
    found = []
    for _ in range(3):
        journal, at_work = book(tmp_path / "j", path), monitor()
        for item in at_work.watch([Camera("gate", str(path))], journal=journal):
            found += sounds_of([item])
            if len(found) == stop_after:
                break  # as abruptly as a kill: what was found meanwhile is not written
        journal.close()
    assert spans(found) == whole
    assert len(whole) == 4
    lines = [line for line in lines_of(tmp_path / "j") if line.get("event") == "sound class"]
    assert [(line["start"], line["end"]) for line in lines] == whole
    assert {line["label"] for line in lines} == {"alarm"}


def test_a_recording_is_not_done_with_before_its_sounds_are_written(tmp_path):
    """Stopped while classification is behind, it is read again."""
    path = write_media(tmp_path / "gate.wav", beeps(9, (2, 4), (6, 8)))
    held = threading.Event()

    def classify(windows):
        held.wait(60)
        return loudness(windows)

    journal, at_work = book(tmp_path / "j", path), monitor(classes(classify))
    threading.Timer(0.5, at_work.stop).start()
    threading.Timer(1.0, held.set).start()
    first = list(at_work.watch([Camera("gate", str(path))], journal=journal))
    journal.close()
    assert isinstance(first[-1], SourceEnd)
    assert isinstance(first[-1].error, Stopped)
    assert not [line for line in lines_of(tmp_path / "j") if line.get("event") == "end"]
    journal = book(tmp_path / "j", path)
    again = list(monitor().watch([Camera("gate", str(path))], journal=journal))
    journal.close()
    assert len(spans(first) + spans(again)) == 2


def test_a_folder_that_is_taken_up_in_the_middle_of_a_file_has_each_sound_once(tmp_path):
    """Its segments are known up to a moment before which sounds are still to be found."""
    folder, at = tmp_path / "in", time.time() - 3600
    speech = decode(EXAMPLE / "monitor.mp4")[: 12 * SAMPLE_RATE]
    audio = np.concatenate([beeps(4, (1, 3)), speech, beeps(5, (2, 4))])
    write_at(folder / "0.wav", audio, at)
    write_at(folder / "1.wav", beeps(5, (1, 3)), at + 60)
    silent = classes(lambda windows: np.zeros((len(windows), 2)))
    journal = book(tmp_path / "j", folder)
    for item in monitor(silent).watch([Camera("gate", str(folder))], journal=journal):
        if said([item]):
            break
    journal.close()
    assert [line for line in lines_of(tmp_path / "j") if "text" in line]

    def beep(windows):
        return loudness([(np.abs(np.abs(w) - 0.5) < 0.01).astype(float) for w in windows])

    journal = book(tmp_path / "j", folder)
    items = collect(
        monitor(classes(beep)),
        {"gate": str(folder)},
        until=lambda items: len(sounds_of(items)) == 3,
        journal=journal,
    )
    journal.close()
    begin = at - len(audio) / SAMPLE_RATE
    ids = [(sound.id.split("@")[0], round(sound.start - begin)) for sound in sounds_of(items)]
    assert ids[0] == ("gate/0.wav", 1)
    assert [name for name, _ in ids] == ["gate/0.wav", "gate/0.wav", "gate/1.wav"]
    # Once more: all of it is known.
    journal = book(tmp_path / "j", folder)
    at_work = monitor(classes(beep))
    threading.Timer(1.5, at_work.stop).start()
    assert not sounds_of(at_work.watch([Camera("gate", str(folder))], journal=journal))
    journal.close()


# --- live sources ---------------------------------------------------------------------------------


@pytest.fixture
def paced():
    made = []

    def make(samples, pace):
        made.append(Paced([samples], pace=pace))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_sound_of_a_camera_is_found_and_known_by_the_time_of_day(paced, tmp_path):
    server, before = paced(beeps(9, (2, 4), (6, 8)), 3), time.time()
    items = collect(monitor(), {"gate": server.url}, until=lambda items: len(sounds_of(items)) == 2)
    one, other = spans(items)
    assert before < one[0] < time.time()
    assert other[0] - one[0] == pytest.approx(4, abs=0.41)
    assert one[1] - one[0] == pytest.approx(2, abs=1.0)


def test_a_sound_that_goes_on_when_the_monitor_stops_is_reported(paced):
    server, at_work = paced(beeps(60, (1, 60)), 2), monitor()

    def stop_in_the_middle():
        wait_for(lambda: at_work.stats.audio_s > 4)
        at_work.stop()

    threading.Thread(target=stop_in_the_middle).start()
    [sound] = sounds_of(at_work.watch([Camera("gate", server.url)]))
    assert sound.end - sound.start > 1


def test_classification_that_is_too_slow_keeps_no_transcript_waiting(paced, camera_speech):
    """What is skipped is counted and stated, and sounds are found again once there is time."""
    silence = np.zeros(30 * SAMPLE_RATE)
    server = paced(np.concatenate([camera_speech, beeps(9, (3, 6)), silence]), 4)
    held = threading.Event()

    def classify(windows):
        held.wait(60)
        return loudness([(np.abs(np.abs(w) - 0.5) < 0.01).astype(float) for w in windows])

    def until(items):
        if len(said(items)) >= 2 and "unclassified" in happened(items):
            held.set()
        return bool(sounds_of(items))

    at_work = monitor(classes(classify))
    items = collect(at_work, {"gate": server.url}, until=until)
    [event] = [i for i in items if isinstance(i, SourceEvent) and i.event == "unclassified"]
    assert "s of audio" in event.detail
    assert items.index(said(items)[1]) < items.index(sounds_of(items)[0])
    skipped = at_work.stats.unclassified_s
    assert skipped > 2
    assert f"{skipped:.1f} s in which sounds were not classified" in summary(at_work.stats)


# --- with a model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound_model(tmp_path_factory):
    """A random sound classifier with windows of two seconds."""
    folder = tmp_path_factory.mktemp("sound")
    backbone = write_wave_backbone(folder / "wave")
    model = new_sound_model(
        resolve(str(backbone)),
        list(LABELS),
        is_multi=True,
        data=DataConfig(window_seconds=2.0),
        head=HeadConfig(),
    )
    model.save(folder / "model", "full")
    return folder / "model"


def test_the_probabilities_are_those_of_the_model(sound_model):
    found = sound_classes(resolve(str(sound_model)), {}, "cpu")
    rng = np.random.default_rng(0)
    windows = [rng.normal(0, 0.1, n).astype(np.float32) for n in (32_000, 32_000, 9_000)]
    expected = load_sound_model(resolve(str(sound_model))).predict(windows)
    rows = [list(one.probabilities.values()) for one in expected]
    np.testing.assert_allclose(found.classify(windows), rows, atol=1e-5)
    assert (list(found.labels), found.window_s) == (list(LABELS), 2.0)


def test_a_sound_reaches_every_output_once(sound_model, random_whisper, receiver, tmp_path, capsys):
    path, desk = write_media(tmp_path / "gate.wav", beeps(5)), receiver()
    command = ["monitor", str(random_whisper), str(path), "--sounds", str(sound_model)]
    command += ["--sound-thresholds", "alarm=0.01", "glass=1", "--webhook", desk.url]
    command += ["--journal", str(tmp_path / "j"), "--alert-clips", str(tmp_path / "clips")]
    command += ["--output", str(tmp_path / "o.jsonl"), str(tmp_path / "o.html")]

    def written():
        rows = [json.loads(row) for row in (tmp_path / "o.jsonl").read_text().splitlines()]
        page = (tmp_path / "o.html").read_text()
        data = re.search(r'id="data">(.*?)</script>', page, re.S)
        assert data is not None
        assert json.loads(data[1]) == rows
        return rows

    assert main(command) == 0
    printed = capsys.readouterr()
    [row] = written()
    assert (row["event"], row["label"], row["start"], row["end"]) == ("sound class", "alarm", 0, 5)
    assert f"SOUND gate [00:00:00.0 → 00:00:05.0]: alarm ({row['probability']:.2f})" in printed.out
    assert "; sounds: 1 alarm" in printed.err
    assert [json.loads(body) for _, body in desk.got] == [row]
    assert (tmp_path / "clips" / "gate").is_dir()
    assert main(command) == 0
    assert written() == [row]
    assert len(desk.got) == 1
    assert "SOUND" not in capsys.readouterr().out


def test_an_alert_of_a_sound_that_did_not_arrive_is_sent_again(
    sound_model, random_whisper, receiver, tmp_path
):
    path, desk = write_media(tmp_path / "gate.wav", beeps(5)), receiver(*[503] * 9)
    options = MonitorOptions(
        str(random_whisper),
        sources=[path],
        sounds=str(sound_model),
        sound_thresholds={"alarm": 0.01, "glass": 1},
        journal=tmp_path / "j",
        webhook=desk.url,
    )
    with Session(options) as session:
        [sound] = sounds_of(session.items())
    desk.answers = []
    desk.got = []
    with Session(options) as session:
        assert not sounds_of(session.items())
    assert [json.loads(body) for _, body in desk.got] == [asdict(sound)]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--sounds", "MODEL", "--sound-thresholds", "alarm=2"], "--sound-thresholds: expected"),
        (["--sounds", "MODEL", "--sound-thresholds", "0.5"], "--sound-thresholds: expected"),
        (["--sounds", "MODEL", "--sound-thresholds", "dog=0.5"], "found 'dog'"),
        (["--sound-thresholds", "alarm=0.5"], "--sounds: expected a sound classifier"),
        (["--sounds", "WHISPER"], "expected a sound classifier, found a speech recogniser"),
    ],
)
def test_what_cannot_be_is_one_line(given, why, sound_model, random_whisper, tmp_path, capsys):
    path = write_media(tmp_path / "gate.wav", beeps(1))
    names = {"MODEL": str(sound_model), "WHISPER": str(random_whisper)}
    command = ["monitor", str(random_whisper), str(path), *(names.get(x, x) for x in given)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert why in error
    assert len(error.splitlines()) == 1


def test_numbers_for_prometheus_and_the_summary():
    stats = MonitorStats()
    stats.add_cameras(["gate"])
    stats.cameras["gate"].sounds.update({"glass": 2, "alarm": 1})
    stats.cameras["gate"].unclassified_s = 3.5
    text = metrics(stats)
    assert 'mmtransfer_sounds_total{camera="gate",label="glass"} 2.0' in text
    assert 'mmtransfer_unclassified_seconds_total{camera="gate"} 3.5' in text
    assert "; sounds: 1 alarm, 2 glass; 3.5 s in which" in summary(stats)
