"""The journal: nothing lost, nothing doubled, whatever happens to the process."""

import errno
import json
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE
from support.children import Command
from support.engines import fake_monitor
from support.sources import QUICK_DECODING

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Journal, SourceEnd, Transcript
from mmtransfer.monitoring.events import segment_id
from mmtransfer.monitoring.sources.cameras import Camera, named_cameras

VIDEO = EXAMPLE / "monitor.mp4"


def journal(folder, *, model="m", digest="d", sources=None, **options):
    sources = sources or {VIDEO.stem: str(VIDEO)}
    return Journal(folder, model=model, model_digest=digest, sources=sources, **options)


def read(folder):
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return lines


def texts(lines):
    return [(line["id"], line["text"]) for line in lines if "text" in line]


@pytest.fixture(scope="module")
def whole():
    """What an uninterrupted run hears."""
    return [(t.id, t.text) for t in fake_monitor()[0].transcribe(VIDEO)]


def test_everything_is_written_before_it_is_told(tmp_path, whole):
    monitor, _ = fake_monitor()
    book = journal(tmp_path)
    for item in monitor.watch([VIDEO], journal=book):
        lines = read(tmp_path)
        if isinstance(item, Transcript):
            assert lines[-1]["id"] == item.id
            assert {"camera", "id", "start", "end", "text"} <= set(lines[-1])
        else:
            size = VIDEO.stat().st_size
            assert lines[-1] == {"camera": "monitor", "event": "end", "size": size, "seconds": 120}
    book.close()
    assert texts(read(tmp_path)) == whole


@pytest.mark.parametrize("stop_after", [1, 5, 12])
def test_an_interrupted_run_goes_on_without_loss_or_repetition(tmp_path, whole, stop_after):
    monitor, _ = fake_monitor()
    book = journal(tmp_path)
    stream = monitor.watch([VIDEO], journal=book)
    for _ in range(stop_after):
        next(stream)
    stream.close()
    book.close()
    assert len(texts(read(tmp_path))) == stop_after
    monitor, engine = fake_monitor()
    book = journal(tmp_path)
    said = [item for item in monitor.watch([VIDEO], journal=book) if isinstance(item, Transcript)]
    book.close()
    assert texts(read(tmp_path)) == whole
    assert [t.id for t in said] == [name for name, _ in whole[stop_after:]]
    assert sum(size for size, _ in engine.calls) == len(whole) - stop_after
    # A third time there is nothing left to do, and the recording is not even read.
    monitor, engine = fake_monitor()
    book = journal(tmp_path)
    items = list(monitor.watch([VIDEO], journal=book))
    book.close()
    assert [type(item) for item in items] == [SourceEnd]
    assert not engine.calls
    assert monitor.stats.audio_s == 0


def test_segments_without_text_are_written_with_their_reason(tmp_path):
    monitor, _ = fake_monitor(lambda context_s: "gate " * 30)
    book = journal(tmp_path)
    list(monitor.watch([VIDEO], journal=book))
    book.close()
    lines = read(tmp_path)
    assert len(lines) > 10
    assert all(line["reason"] == "looping" for line in lines[:-1])
    monitor, engine = fake_monitor()
    book = journal(tmp_path)
    list(monitor.watch([VIDEO], journal=book))
    book.close()
    assert not engine.calls


def test_a_line_that_was_cut_by_a_kill_is_cut_off(tmp_path):
    book = journal(tmp_path)
    book.write({"camera": "a", "id": "a@1.000", "start": 1.0, "end": 2.0, "text": "one"})
    book.close()
    (path,) = tmp_path.glob("*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"camera": "a", "id": "a@2.0')
    book = journal(tmp_path)
    assert book.known({"a"}, set()).ids == {"a": {"a@1.000"}}
    assert book.known(set(), {"a@1.000", "a@3.000"}).ids == {"a": {"a@1.000"}}
    assert book.known(set(), set()).ids == {}
    book.write({"camera": "a", "id": "a@2.000", "text": "two"})
    book.close()
    assert [line["text"] for line in read(tmp_path)] == ["one", "two"]


def test_files_are_rotated_by_size_and_day(tmp_path, monkeypatch):
    book = journal(tmp_path, rotate_bytes=200)
    for number in range(12):
        book.write({"camera": "a", "id": segment_id("a", number), "text": "x" * 40})
    names = [path.name for path in book.files]
    assert len(names) > 2
    monkeypatch.setattr(time, "strftime", lambda form: "2999-01-01")
    book.write({"camera": "a", "id": "later", "text": "y"})
    book.close()
    assert [p.name for p in sorted(tmp_path.glob("*.jsonl"))][-1] == "2999-01-01.0000.jsonl"
    assert len(read(tmp_path)) == 13
    assert [line["id"] for line in read(tmp_path)][:2] == ["a@0.000", "a@1.000"]


def test_a_disk_that_takes_no_new_file_is_tried_again(tmp_path, monkeypatch):
    book = journal(tmp_path, rotate_bytes=60)
    book.write({"camera": "a", "text": "one"})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[Journal.__module__], "open_private", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                book.write({"camera": "a", "text": "two" * 10})
    book.write({"camera": "a", "text": "two" * 10})
    book.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert [line["text"] for line in read(tmp_path)] == ["one", "two" * 10]


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """The file takes ten bytes of the next line and no more, however often that is tried."""
    book = journal(tmp_path)
    book.write({"camera": "a", "text": "one"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = book.files[0].stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match=r"No space left|too large"):
                book.write({"camera": "a", "text": "two"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["text"] for line in read(tmp_path)] == ["one"]
    book.write({"camera": "a", "text": "two"})
    book.close()
    assert [line["text"] for line in read(tmp_path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other", "digest": "e"}, r"another model \(m, now other\)"),
        ({"sources": {"yard": "yard.mp4"}}, r"other sources \(different: monitor, yard\)"),
    ],
)
def test_a_journal_of_another_model_or_source_says_so(tmp_path, changes, message):
    journal(tmp_path).close()
    with pytest.raises(UserError, match=message) as caught:
        journal(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    journal(tmp_path).close()  # the refusal left it free


def test_unusable_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="found a file"):
        journal(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.jsonl").touch()
    with pytest.raises(UserError, match="but no journal"):
        journal(tmp_path / "other")
    book = journal(tmp_path / "mine")
    with pytest.raises(UserError, match="another monitor is writing"):
        journal(tmp_path / "mine")
    book.close()


def test_only_its_own_files_are_the_journal(tmp_path, whole):
    book = journal(tmp_path)
    heard = list(fake_monitor()[0].watch([VIDEO], journal=book))
    book.close()
    (tmp_path / "out.jsonl").write_text('{"text": "of someone else"}\n')
    book = journal(tmp_path)
    assert [path.name for path in book.files] == [
        path.name for path in sorted(tmp_path.glob("*.jsonl")) if path.name != "out.jsonl"
    ]
    again = list(fake_monitor()[0].watch([VIDEO], journal=book))
    book.close()
    assert not [item for item in again if isinstance(item, Transcript)]
    assert [(t.id, t.text) for t in heard if isinstance(t, Transcript)] == whole


def test_cameras_have_short_names_of_their_own():
    yard = Camera("yard", "rtsp://10.0.0.9/yard")
    sources: list[str | Path | Camera] = ["in/gate.mp4", "yard.mkv", "out/gate.mp4", yard]
    assert {camera.name: camera.url for camera in named_cameras(sources)} == {
        "gate": "in/gate.mp4",
        "yard-2": "yard.mkv",
        "gate-2": "out/gate.mp4",
        "yard": "rtsp://10.0.0.9/yard",
    }
    streams = ["rtsp://me:secret@10.0.0.7:554/audio", "rtsp://10.0.0.8/audio"]
    names = [camera.name for camera in named_cameras(streams)]
    assert names == ["10.0.0.7:554/audio", "10.0.0.8/audio"]


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_monitor_goes_on_where_it_stopped(whisper_tiny, short_video, tmp_path, how):
    """With a real process and a real model."""
    folder, output = tmp_path / "journal", tmp_path / "out.txt"
    arguments = ["monitor", str(whisper_tiny), str(short_video), "--journal", str(folder)]
    arguments += [*QUICK_DECODING, "--output", str(output)]
    with Command(*arguments) as process:
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(how)
        process.communicate()
        assert process.returncode == (-9 if how == signal.SIGKILL else 143)
    before = texts(read(folder))
    assert 3 <= len(before) <= 9
    assert main(arguments) == 0
    after = texts(read(folder))
    assert after[: len(before)] == before
    assert len({name for name, _ in after}) == len(after)
    alone = tmp_path / "alone"
    assert main([*arguments[:4], str(alone), "--quiet", *QUICK_DECODING]) == 0
    assert after == texts(read(alone))
    # The text file is whole as well.
    assert len(output.read_text(encoding="utf-8").splitlines()) == len(after)
