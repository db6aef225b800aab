"""Folders that recordings are written to: files that grow, change, move, and come side by side."""

import errno
import os
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from conftest import write_media
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.engines import FakeEngine
from support.sessions import broken_off, happened, lines_of, said, same_segments
from support.sources import write_at, write_pieces
from support.web import wait_for

from mmtransfer.monitoring import Alert, Camera, Journal, Monitor, Transcript
from mmtransfer.monitoring.events import FileDone
from mmtransfer.monitoring.sources import folders
from mmtransfer.monitoring.sources.folders import Folder, follows, series
from mmtransfer.speech.audio import SAMPLE_RATE, decode_clip
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import Segmenter


@pytest.fixture(scope="module")
def spoken(speech):
    """(start, end) of its segments."""
    segmenter = Segmenter()
    return [(s.start, s.end) for s in [*segmenter.feed(speech), *segmenter.finish()]]


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    """What is there is noticed soon."""
    monkeypatch.setattr(folders, "_LOOK_S", 0.1)


@pytest.fixture
def impatient(monkeypatch):
    """A file is complete after half a second without a change."""
    monkeypatch.setattr(folders, "_SETTLED_S", 0.5)


def watch(folder, journal, until, *, loud=None, seconds=120.0, read_s=float("inf")):
    """What a session of the monitor gives, and the journal's lines after it; it is also stopped
    half a second after it has taken in so much audio.
    """
    book = Journal(journal, model="m", model_digest="d", sources={"site": str(folder)})
    monitor = Monitor(Recognizer(FakeEngine(workers=1)))
    items, timer, over = [], threading.Timer(seconds, monitor.stop), threading.Event()

    def stop_when_read():
        while not over.wait(0.05):
            if monitor.stats.audio_s >= read_s:
                over.wait(0.5)
                monitor.stop()
                return

    timer.start()
    threading.Thread(target=stop_when_read, daemon=True).start()
    for item in monitor.watch([Camera("site", str(folder), loud_db=loud)], journal=book):
        items.append(item)
        if until(items):
            monitor.stop()
    timer.cancel()
    over.set()
    book.close()
    return items, lines_of(journal)


def texts(lines, name=""):
    return [line for line in lines if "text" in line and name in line["id"]]


def complete_names(folder):
    return [unread.name for unread in folder.look()]


# --- which files are complete ---------------------------------------------------------------------


def test_every_file_that_grows_is_left_alone(tmp_path, monkeypatch):
    """Not only the newest; also one whose time lies in the future, and one dated back."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    folder = Folder(tmp_path)
    for name in ("a.wav", "b.wav", "future.wav", "past.wav"):
        (tmp_path / name).write_bytes(b"x")
    long_ago = time.time() - 3600
    os.utime(tmp_path / "past.wav", (long_ago, long_ago))
    os.utime(tmp_path / "future.wav", (time.time() + 9e6, time.time() + 9e6))
    assert complete_names(folder) == ["past.wav"]
    for size in range(2, 14):
        clock[0] += 1
        for name in ("a.wav", "b.wav", "past.wav"):
            (tmp_path / name).write_bytes(b"x" * size)
            os.utime(tmp_path / name, (long_ago + size, long_ago + size))
        expected = ["future.wav"] if clock[0] >= 1010 else []
        assert complete_names(folder) == expected
    clock[0] += 10
    assert sorted(complete_names(folder)) == ["a.wav", "b.wav", "future.wav", "past.wav"]
    assert folder.writing == set()


def test_a_file_is_known_again_by_name_and_by_inode(tmp_path):
    path, old = tmp_path / "a.wav", time.time() - 60
    path.write_bytes(b"x")
    os.utime(path, (old, old))
    folder = Folder(tmp_path)
    assert complete_names(folder) == ["a.wav"]
    state = path.stat()
    folder.add(FileDone("a.wav", state.st_size, state.st_mtime_ns, state.st_ino))
    assert complete_names(folder) == []
    path.rename(tmp_path / "b.wav")
    assert complete_names(folder) == []
    os.utime(tmp_path / "b.wav", (old + 1, old + 1))
    (found,) = folder.look()
    assert found.before[0].name == "a.wav"


@pytest.mark.parametrize(
    ("name", "last", "differ"),
    [
        ("cam1/001.wav", "cam1/000.wav", 1),
        ("cam1/010.wav", "cam1/9.wav", 1),
        ("1/2026-01-02/00.00.wav", "1/2026-01-01/23.59.wav", 3),
        ("20260102T000000.mkv", "20260101T235900.mkv", 2),
        ("cam2/000.wav", "cam1/000.wav", 1),  # as near as a name can be; their times tell
        ("cam1/001.wav", "cam2/000.wav", 0),
        ("cam3/12.01.wav", "cam2/12.00.wav", 0),
        ("cam1/000.wav", "cam1/000.wav", 0),
        ("gate_1.wav", "yard_0.wav", 0),
        ("gate_1_2.wav", "gate_1.wav", 0),
        ("gate_1.wav", "gate_#.wav", 0),
    ],
)
def test_the_next_recording_is_that_of_the_same_camera(name, last, differ):
    assert follows(name, last) == differ


@given(name=st.text(st.characters(exclude_characters="\0"), max_size=30))
@example("0#")
@settings(max_examples=50)
def test_a_name_is_of_its_own_series(name):
    assert series(name) == series(series(name).replace("\0", "7"))
    assert follows(name, name) == 0


@pytest.mark.parametrize(
    "name", ["gate.WMA", "gate.amr", "gate.m2ts", "gate.aiff", "gate.mka", "a/b.mpeg", "gate.wav"]
)
def test_recordings_of_many_endings_are_taken(tmp_path, name):
    path, old = tmp_path / name, time.time() - 60
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (old, old))
    folder = Folder(tmp_path)
    assert complete_names(folder) == [name]
    assert not folder.others


@pytest.mark.parametrize(
    "name", ["._gate.wav", ".gate.wav", ".trash/gate.wav", "@eaDir/gate.wav", "__MACOSX/gate.wav"]
)
def test_hidden_and_resource_files_are_no_recordings(tmp_path, name):
    path, old = tmp_path / name, time.time() - 60
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (old, old))
    folder = Folder(tmp_path)
    assert complete_names(folder) == []
    assert not folder.others


def test_a_name_is_the_same_in_every_unicode_form(tmp_path):
    """As one system writes it, and another after a copy."""
    composed, apart, old = "B\u00fcro.wav", "Bu\u0308ro.wav", time.time() - 60
    path = tmp_path / apart
    path.write_bytes(b"x")
    os.utime(path, (old, old))
    folder = Folder(tmp_path)
    (found,) = folder.look()
    assert found.name == composed
    state = path.stat()
    for written in (composed, apart):
        known = Folder(tmp_path, [FileDone(written, state.st_size, state.st_mtime_ns, 1)])
        assert known.look() == []
    assert series(found.name) == series(composed)


# --- what is heard --------------------------------------------------------------------------------


def test_two_cameras_in_one_folder_are_two_recordings(speech, spoken, tmp_path):
    """Pieces that cut through words, interleaved in time; each is joined to its own next one."""
    folder, began = tmp_path / "in", time.time() - 3600
    silence = np.zeros(2 * SAMPLE_RATE, np.float32)
    voices = {"gate": speech, "yard": np.concatenate([silence, speech])}
    for name, samples in voices.items():
        write_pieces(folder, samples, 5, began, name + "_{:03d}.wav")
    enough = lambda items: len(said(items)) >= 2 * len(spoken)  # noqa: E731
    _, lines = watch(folder, tmp_path / "j", enough)
    for name, samples in voices.items():
        segmenter = Segmenter()
        alone = [*segmenter.feed(samples), *segmenter.finish()]
        found = [(t["start"], t["end"]) for t in texts(lines, f"site/{name}_")]
        same_segments(found, [(s.start, s.end) for s in alone])
        assert found[0][0] == pytest.approx(began + alone[0].start, abs=0.05)
    source = texts(lines)[0]["source"]
    assert source.startswith(str(folder))
    assert source.endswith(".wav")


def test_a_file_that_pauses_and_grows_is_read_on(speech, spoken, tmp_path, impatient):
    """Read up to the pause, then from there; also if a session ends in between."""
    folder, journal = tmp_path / "in", tmp_path / "j"
    half = int((spoken[0][1] + 0.8) * SAMPLE_RATE)
    whole, path = tmp_path / "whole.wav", folder / "gate.wav"
    write_media(whole, speech)
    data = whole.read_bytes()
    cut = len(data) - 2 * (len(speech) - half)
    path.parent.mkdir()
    path.write_bytes(data[:cut])  # its header tells of more than there is

    def grow(items):
        if len(said(items)) == 1 and path.stat().st_size == cut:
            path.write_bytes(data)
        return len(said(items)) >= 2

    _, lines = watch(folder, journal, grow)
    found = [(t["start"], t["end"]) for t in texts(lines)]
    assert [b - a for a, b in found] == pytest.approx([b - a for a, b in spoken], abs=0.15)
    # In two sessions, with what is new in the second one.
    path.write_bytes(data[:cut])
    journal = tmp_path / "j2"
    watch(folder, journal, lambda items: len(said(items)) == 1)
    path.write_bytes(data)
    _, lines = watch(folder, journal, lambda items: len(said(items)) >= 1)
    assert len(texts(lines)) == 2
    assert len({t["id"] for t in texts(lines)}) == 2


def test_what_is_replaced_is_heard_and_what_is_renamed_is_not(speech, spoken, tmp_path, impatient):
    folder, journal, old = tmp_path / "in", tmp_path / "j", time.time() - 3600
    write_at(folder / "gate.wav", speech, old)
    watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    (folder / "gate.wav").rename(folder / "kept.wav")
    write_at(folder / "gate.wav", np.roll(speech, SAMPLE_RATE)[SAMPLE_RATE // 2 :], old + 5)
    items, lines = watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    assert len(said(items)) == len(spoken)
    assert len(texts(lines)) == 2 * len(spoken)
    assert not texts(lines, "kept")
    # And nothing of it a third time: only a new file is heard.
    write_at(folder / "new.wav", speech, old + 1000)
    items, _ = watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    assert {t.id.partition("@")[0] for t in said(items)} == {"site/new.wav"}


def test_a_broken_recording_is_heard_once_it_is_repaired(speech, spoken, tmp_path, impatient):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "gate.wav").write_bytes(b"RIFF")

    def repair(items):
        if "unreadable" in happened(items) and (folder / "gate.wav").stat().st_size == 4:
            write_media(folder / "gate.wav", speech)
        return len(said(items)) >= len(spoken)

    items, lines = watch(folder, tmp_path / "j", repair)
    assert happened(items).count("unreadable") == 1
    assert len(texts(lines)) == len(spoken)


@pytest.mark.parametrize("dated", [3600.0, 946_684_800.0, 1_000_000_000.5])
def test_a_recording_of_a_clock_that_was_never_set_has_the_time_it_came(
    speech, spoken, tmp_path, dated
):
    folder, journal, before = tmp_path / "in", tmp_path / "j", time.time() - 60
    write_at(folder / "gate.wav", speech, dated)
    items, _ = watch(folder, journal, lambda items: len(said(items)) >= 1)
    assert happened(items) == ["undated"]
    write_at(folder / "yard.wav", speech, before)
    length_s = len(speech) / SAMPLE_RATE
    # What a second session reads on has the times that the first one gave.
    _, lines = watch(folder, journal, lambda items: any("yard" in t.id for t in said(items)))
    found = [line["start"] for line in texts(lines, "gate")]
    began = (folder / "gate.wav").stat().st_ctime - length_s
    assert began > before - length_s
    assert found == pytest.approx([began + start for start, _ in spoken], abs=0.15)


def test_speech_up_to_a_files_end_does_not_wait_for_the_next_file(speech, spoken, tmp_path):
    folder = tmp_path / "in"
    middle = int((spoken[-1][0] + 1.0) * SAMPLE_RATE)
    write_at(folder / "gate_01.wav", speech[:middle], time.time() - 60)
    items, _ = watch(folder, tmp_path / "j", lambda i: len(said(i)) >= len(spoken), seconds=50)
    assert len(said(items)) == len(spoken)


@pytest.mark.parametrize("after_s", [0.05, 0.3, 1.0])
def test_a_stop_in_the_middle_of_a_segment_loses_nothing_of_it(speech, spoken, tmp_path, after_s):
    """What runs when the monitor stops is not cut there and taken for whole, and a file whose last
    second has not been looked at is not done.
    """
    folder, journal = tmp_path / "in", tmp_path / "j"
    middle = int((spoken[-1][0] + after_s) * SAMPLE_RATE)
    now = time.time()
    write_at(folder / "gate_01.wav", speech[:middle], now - 60)
    (folder / "gate_02.wav").write_bytes(b"RIFF")  # the next one is being written
    watch(folder, journal, lambda items: False, read_s=middle / SAMPLE_RATE - 0.2)
    write_at(
        folder / "gate_02.wav", speech[middle:], now - 60 + (len(speech) - middle) / SAMPLE_RATE
    )
    _, lines = watch(folder, journal, lambda items: len(said(items)) >= len(spoken) - 1)
    same_segments([(t["start"], t["end"]) for t in texts(lines)], spoken)


def test_sounds_in_a_folder_are_told_once(speech, tmp_path):
    """Also if a session begins in the middle of what was read as one."""
    folder, journal, at = tmp_path / "in", tmp_path / "j", time.time() - 3600
    rng = np.random.default_rng(0)
    noise = (0.002 * rng.standard_normal(12 * SAMPLE_RATE)).astype(np.float32)
    for second in (4, 8):
        noise[second * SAMPLE_RATE + 1000 :][: SAMPLE_RATE // 4] *= 150
    pieces = [noise[: 5 * SAMPLE_RATE], np.concatenate([noise[5 * SAMPLE_RATE :], speech])]
    for number, piece in enumerate(pieces):
        at += len(piece) / SAMPLE_RATE
        write_at(folder / f"{number}.wav", piece, at)
    is_sound = lambda item: getattr(item, "event", "") == "sound"  # noqa: E731
    # Stopped before the second file is done; then it is read again from its beginning.
    watch(folder, journal, lambda items: len([i for i in items if is_sound(i)]) == 2, loud=20)
    write_at(folder / "9.wav", speech, at + 100)
    _, lines = watch(
        folder,
        journal,
        lambda items: any("9.wav" in t.id for t in items if isinstance(t, Transcript)),
        loud=20,
    )
    bangs = [line["start"] for line in lines if line.get("event") == "sound"]
    first = [b for b in bangs if b < at - len(speech) / SAMPLE_RATE]
    assert len(first) == 2
    assert np.diff(sorted(bangs)).min() > 1.0


def test_a_folder_that_goes_and_comes_back_is_told(speech, spoken, tmp_path):
    folder, away = tmp_path / "in", tmp_path / "away"
    write_at(folder / "a.wav", speech, time.time() - 60)

    def until(items):
        if len(said(items)) == len(spoken) and folder.exists() and not happened(items):
            folder.rename(away)
        if happened(items)[-1:] == ["lost"] and away.exists():
            away.rename(folder)
        return happened(items)[-1:] == ["connected"]

    items, lines = watch(folder, tmp_path / "j", until)
    assert happened(items) == ["lost", "connected"]
    assert len(texts(lines)) == len(spoken)


@pytest.fixture
def unlisted(monkeypatch):
    """Folders that cannot be listed."""
    paths, scandir = set[str](), os.scandir

    def list_or_fail(path):
        if str(path) in paths:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", list_or_fail)
    return paths


def test_a_subfolder_that_goes_while_it_is_listed_hides_no_other(tmp_path, unlisted):
    for day in ("monday", "tuesday"):
        write_at(tmp_path / day / "a.wav", np.zeros(1600, np.float32), time.time() - 60)
    unlisted.add(str(tmp_path / "monday"))
    folder = Folder(tmp_path)
    assert [unread.name for unread in folder.look()] == ["tuesday/a.wav"]
    assert folder.is_there


def test_a_share_that_fails_for_a_while_is_told(speech, spoken, tmp_path, unlisted):
    folder = tmp_path / "in"
    write_at(folder / "a.wav", speech, time.time() - 60)

    def until(items):
        if len(said(items)) == len(spoken) and not happened(items):
            unlisted.add(str(folder))
        if happened(items)[-1:] == ["lost"]:
            unlisted.clear()
        return happened(items)[-1:] == ["connected"]

    items, lines = watch(folder, tmp_path / "j", until)
    assert happened(items) == ["lost", "connected"]
    assert len(texts(lines)) == len(spoken)


def test_file_names_of_any_bytes_are_read(speech, spoken, tmp_path):
    """Bytes that are no UTF-8, and a colon, by which FFmpeg takes a name for an address."""
    folder, old = tmp_path / "in", time.time() - 3600
    folder.mkdir()
    write_at(folder / "12:30.wav", speech, old)
    plain = tmp_path / "plain.wav"
    write_media(plain, speech)
    odd = os.fsencode(folder) + b"/caf\xe9.wav"
    os.rename(plain, odd)
    os.utime(odd, (old + 100, old + 100))
    enough = lambda items: len(said(items)) >= 2 * len(spoken)  # noqa: E731
    items, lines = watch(folder, tmp_path / "j", enough)
    names = {t["id"].partition("@")[0] for t in texts(lines)}
    assert names == {"site/12:30.wav", "site/caf\\xe9.wav"}
    assert not happened(items)


def test_clips_are_cut_from_the_recording_in_the_folder(speech, spoken, tmp_path):
    folder, at = tmp_path / "in", time.time() - 3600
    write_at(folder / "1.wav", np.zeros(SAMPLE_RATE, np.float32), at - 100)
    write_at(folder / "2.wav", speech, at)
    monitor = Monitor(
        Recognizer(FakeEngine(lambda context_s: "open the gate")), alert_clips=tmp_path / "clips"
    )
    items = []

    def stop_when_cut():
        wait_for(lambda: len(list((tmp_path / "clips").rglob("*.mkv"))) == len(spoken))
        monitor.stop()

    threading.Thread(target=stop_when_cut, daemon=True).start()
    for item in monitor.watch([Camera("site", str(folder), keywords=["gate"])]):
        items.append(item)
    raised = [item for item in items if isinstance(item, Alert)]
    assert len(raised) == len(spoken)
    for alert, (start, end) in zip(raised, spoken, strict=True):
        assert alert.clip is not None
        cut = decode_clip(alert.clip)
        length = min(end + 5, len(speech) / SAMPLE_RATE) - max(0.0, start - 5)
        assert len(cut) / SAMPLE_RATE == pytest.approx(length, abs=0.3)


def test_cameras_with_like_names_do_not_swallow_each_other(speech, spoken, tmp_path):
    """The second one's recording is of the same time, and comes after a restart."""
    folder, journal, at = tmp_path / "in", tmp_path / "j", time.time() - 3600
    write_at(folder / "cam1" / "0001.wav", speech, at)
    watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    write_at(folder / "cam2" / "0001.wav", speech, at)
    items, lines = watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    assert len(said(items)) == len(spoken)
    assert len(texts(lines, "cam2/")) == len(texts(lines, "cam1/")) == len(spoken)


@pytest.mark.parametrize("change", ["touch", "copy", "rename", "grow"])
def test_a_file_that_changes_after_a_kill_is_heard_on_from_there(
    speech, spoken, tmp_path, impatient, change
):
    folder, journal, old = tmp_path / "in", tmp_path / "j", time.time() - 3600
    path = folder / "gate.wav"
    samples = np.tile(speech, 3)
    write_at(path, samples, old)
    broken_off(journal, folder, 2)
    expected = 3 * len(spoken)
    if change == "touch":
        os.utime(path, (old + 100, old + 100))
    elif change == "copy":
        path.write_bytes(path.read_bytes())
    elif change == "rename":
        path.rename(folder / "kept.wav")
    else:
        write_at(path, np.tile(speech, 4), old + 200)
        expected += len(spoken)
    items, lines = watch(folder, journal, lambda items: len(said(items)) >= expected - 2)
    assert len(said(items)) == expected - 2
    assert len({t["id"] for t in texts(lines)}) == len(texts(lines)) == expected


def test_speech_without_pauses_over_file_borders_survives_a_kill(speech, spoken, tmp_path):
    """Splits of long speech fall where they fell; after a kill nothing is lost or doubled."""
    voiced = speech[int(spoken[0][0] * SAMPLE_RATE) : int(spoken[0][1] * SAMPLE_RATE)]
    samples = np.concatenate([np.tile(voiced, 14), np.zeros(2 * SAMPLE_RATE, np.float32)])
    folder = tmp_path / "in"
    at = write_pieces(folder, samples, 15, time.time() - 3600)
    segmenter = Segmenter()
    alone = [*segmenter.feed(samples), *segmenter.finish()]
    assert len(alone) >= 3
    covered = sum(s.end - s.start for s in alone)
    for stop_after in range(1, len(alone)):
        journal = tmp_path / f"j{stop_after}"
        broken_off(journal, folder, stop_after)
        # What follows the last border is heard as well, so that all is.
        last = alone[-1].end - 0.6 + (at - len(samples) / SAMPLE_RATE)
        _, lines = watch(
            folder, journal, lambda items, last=last: any(t.end >= last for t in said(items))
        )
        spans = sorted((t["start"], t["end"]) for t in texts(lines))
        assert all(a[1] <= b[0] + 0.1 for a, b in pairwise(spans)), spans
        assert sum(b - a for a, b in spans) == pytest.approx(covered, abs=1.0)


def test_recordings_that_begin_alike_are_told_apart(speech, spoken, tmp_path, impatient):
    """Eleven seconds of digital silence, then other speech, written over the first."""
    folder, journal, old = tmp_path / "in", tmp_path / "j", time.time() - 3600
    silence = np.zeros(11 * SAMPLE_RATE, np.float32)
    write_at(folder / "gate.wav", np.concatenate([silence, speech]), old)
    watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    other = np.concatenate([silence, 0.5 * speech, 0.5 * speech])
    write_at(folder / "gate.wav", other, old + 100)
    items, _ = watch(folder, journal, lambda items: len(said(items)) >= 2 * len(spoken))
    assert len(said(items)) == 2 * len(spoken)


def test_rotation_by_renaming_is_nothing_new(speech, spoken, tmp_path, impatient):
    folder, journal, old = tmp_path / "in", tmp_path / "j", time.time() - 3600
    write_at(folder / "cam.1.wav", speech, old)
    write_at(folder / "cam.wav", 0.5 * speech, old + 100)
    watch(folder, journal, lambda items: len(said(items)) >= 2 * len(spoken))
    (folder / "cam.1.wav").rename(folder / "cam.2.wav")
    (folder / "cam.wav").rename(folder / "cam.1.wav")
    write_at(folder / "cam.wav", 0.7 * speech, old + 200)
    items, lines = watch(folder, journal, lambda items: len(said(items)) >= len(spoken))
    assert {t.id.partition("@")[0].partition("~")[0] for t in said(items)} == {"site/cam.wav"}
    assert len(texts(lines)) == 3 * len(spoken)


def test_a_file_is_not_done_whose_last_segment_was_not_taken(speech, spoken, tmp_path):
    """Stopped while recordings wait for room: what was not handed on is read the next time."""
    folder, journal, old = tmp_path / "in", tmp_path / "j", time.time() - 360_000
    piece = speech[: int((spoken[0][1] - 0.3) * SAMPLE_RATE)]
    for number in range(70):
        write_at(folder / f"{number:03d}.wav", piece, old + 600 * number)
    engine = FakeEngine(delay=0.2, workers=1)
    book = Journal(journal, model="m", model_digest="d", sources={"site": str(folder)})
    monitor, count = Monitor(Recognizer(engine)), 0
    for item in monitor.watch([Camera("site", str(folder))], journal=book):
        count += isinstance(item, Transcript)
        if count == 5:
            monitor.stop()
    book.close()
    done = {line["name"] for line in lines_of(journal) if line.get("event") == "file"}
    heard = {t["id"].partition("/")[2].partition("@")[0] for t in texts(lines_of(journal))}
    assert done <= heard
    assert 5 <= len(heard) < 70
    _, lines = watch(folder, journal, lambda items: len(said(items)) >= 70 - len(heard))
    names = [t["id"].partition("@")[0] for t in texts(lines)]
    assert len(names) == len(set(names)) == 70


def test_a_folder_tells_once_what_it_does_not_take(speech, spoken, tmp_path, impatient):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("notes.txt", "more.txt", "raw.pcmx", "noending", "._gate.wav"):
        (folder / name).write_bytes(b"x")
    write_at(folder / "gate.wav", speech, time.time() - 3600)

    def until(items):
        if len(said(items)) >= len(spoken):
            (folder / "late.cfg").write_bytes(b"x")
        return happened(items).count("skipped") >= 2

    items, _ = watch(folder, tmp_path / "j", until)
    first, second = [i.detail for i in items if getattr(i, "event", "") == "skipped"]
    assert first.startswith("1 without an ending, 1 .pcmx, 2 .txt:")
    assert second.startswith("1 .cfg:")
