"""What the command makes of sources that changed, odd names, and sessions that went wrong."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, child_environment, write_media
from support.engines import fake_monitor
from support.sessions import lines_of
from support.sources import QUICK_DECODING, decode, remuxed
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Journal, Segment, Transcript
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio

VIDEO = EXAMPLE / "monitor.mp4"


@pytest.fixture(scope="module")
def speech():
    """Two utterances of the example."""
    return decode(VIDEO)[int(5.5 * SAMPLE_RATE) : int(14.4 * SAMPLE_RATE)]


def texts(folder):
    return [line for line in lines_of(folder) if "text" in line and "event" not in line]


# --- sources that changed -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cut_recording_is_read_on_once_it_is_whole(whisper_tiny, tmp_path, capsys):
    """Matroska tells of the whole, not of its sound; the picture ends early as well."""
    whole = remuxed(VIDEO, tmp_path / "whole.mkv")
    path, folder, data = tmp_path / "gate.mkv", tmp_path / "j", whole.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    output = tmp_path / "gate.srt"
    command = ["monitor", str(whisper_tiny), str(path), "--journal", str(folder)]
    command += ["--output", str(output), "--quiet"]
    assert main(command) == 2
    assert "ends early" in capsys.readouterr().err
    before = texts(folder)
    path.write_bytes(data)
    assert main(command) == 0
    after = texts(folder)
    alone = tmp_path / "alone"
    assert main(["monitor", str(whisper_tiny), str(whole), "--journal", str(alone), "--quiet"]) == 0
    assert 3 < len(before) < len(after)

    def turns_behind_the_cut(found):
        """Where they start, from the first on that began behind it."""
        return [line["start"] for line in found if line["start"] > 75 and "#" not in line["id"]]

    assert len(turns_behind_the_cut(after)) > 2
    assert turns_behind_the_cut(after) == pytest.approx(turns_behind_the_cut(texts(alone)), abs=0.3)
    assert output.read_text(encoding="utf-8").count("-->") == len(after)
    assert main(command) == 0
    assert texts(folder) == after


@pytest.mark.parametrize("container", ["wav", "mkv"])
def test_a_recording_that_was_closed_and_is_longer_later_is_read_on(
    whisper_tiny, tmp_path, container
):
    """Its header has changed as well."""
    path, samples = tmp_path / f"gate.{container}", decode(VIDEO)[: 48 * SAMPLE_RATE]
    command = ["monitor", str(whisper_tiny), str(path), "--journal", str(tmp_path / "j"), "--quiet"]
    command += QUICK_DECODING
    write_media(path, samples[: 24 * SAMPLE_RATE])
    assert main(command) == 0
    before = texts(tmp_path / "j")
    write_media(path, samples)
    assert main(command) == 0
    after = texts(tmp_path / "j")
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert all(line["start"] > before[-1]["end"] for line in after[len(before) :])
    assert main(command) == 0
    assert texts(tmp_path / "j") == after


def test_a_picture_longer_than_its_sound_is_no_cut(whisper_tiny, tmp_path, speech):
    path = write_media(tmp_path / "gate.mkv", speech, video=True, offset_s=2.0)
    assert main(["monitor", str(whisper_tiny), str(path), "--quiet"]) == 0


def test_what_is_piped_in_is_told_from_what_was_before(whisper_tiny, tmp_path, speech, monkeypatch):
    folder = tmp_path / "j"

    def pipe(samples):
        raw = tmp_path / "raw"
        raw.write_bytes((samples * 32767).astype("<i2").tobytes())
        command = ["monitor", str(whisper_tiny), "pcm:16000", "--journal", str(folder), "--quiet"]
        with raw.open("rb") as file:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
            assert main(command) == 0
        return len(texts(folder))

    assert pipe(speech) == 2
    assert pipe(speech) == 2  # the same again
    # Another one that begins alike, with speech at the same times.
    assert pipe(np.concatenate([speech[:8000], 0.8 * speech[8000:]])) == 4
    assert len({line["id"] for line in texts(folder)}) == 4


def test_a_named_pipe_is_read_once_and_at_the_start(whisper_tiny, tmp_path, speech, capsys):
    pipe, sound = tmp_path / "pipe", write_media(tmp_path / "a.mkv", speech)
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(sound.read_bytes()))
    writer.start()
    assert main(["monitor", str(whisper_tiny), str(pipe)]) == 0
    writer.join()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_is_being_said_in_a_pipe_that_flows_is_told_when_it_stops(speech, monkeypatch):
    monitor, _ = fake_monitor(texts=lambda clip: "said")
    ends = os.pipe()
    data = (speech[:SAMPLE_RATE] * 32767).astype("<i2").tobytes() * 20  # no pause in it

    def write():
        with os.fdopen(ends[1], "wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
            for start in range(0, len(data), 3200):
                file.write(data[start : start + 3200])
                time.sleep(0.02)

    with os.fdopen(ends[0], "rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        threading.Thread(target=write, daemon=True).start()
        threading.Timer(1.5, monitor.stop).start()
        told = [item for item in monitor.watch(["pcm:16000"]) if isinstance(item, Transcript)]
    assert len(told) == 1
    assert 2 < told[0].end < 12


def test_a_file_in_place_of_standard_input_is_searched(speech, tmp_path, monkeypatch):
    """An mp4 whose index lies at its end."""
    path = remuxed(write_media(tmp_path / "early.mp4", speech), tmp_path / "late.mp4")
    data = path.read_bytes()
    assert data.find(b"moov") > data.find(b"mdat")
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        heard = sum(len(block) for block in stream_audio("-"))
    assert heard == pytest.approx(len(speech), abs=4096)


# --- names ----------------------------------------------------------------------------------------


def test_names_of_any_bytes_go_everywhere(whisper_tiny, tmp_path, speech, monkeypatch, capsys):
    """No UTF-8, a control character, a colon, two tracks: journal, report, clips and terminal."""
    monkeypatch.chdir(tmp_path)
    sound = write_media(tmp_path / "a.ogg", speech).read_bytes()
    names = [os.fsdecode(b"caf\xe9.ogg"), "12:30.ogg", "red\x1b[31m.ogg"]
    for name in names:
        with open(os.fsencode(name), "wb") as file:
            file.write(sound)
    command = ["monitor", str(whisper_tiny), *names, "--journal", "j", "--keywords", "gate", "hook"]
    command += ["--output", "o.html", "o.srt", "o.jsonl", "--alert-clips", "clips"]
    assert main(command) == 0
    assert {line["camera"] for line in texts(tmp_path / "j")} == {
        "caf\\xe9",
        "12:30",
        "red\\x1b[31m",
    }
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out
    assert len(captured.out.splitlines()) >= 6
    assert len(list(tmp_path.glob("o.*.srt"))) == len(list(tmp_path.glob("o.*.html"))) == 3
    assert main(command) == 0  # and again, from the journal
    assert len(texts(tmp_path / "j")) == 6


def test_text_goes_out_whatever_the_terminal_takes(whisper_tiny, tmp_path, speech):
    path = write_media(tmp_path / "a.ogg", speech)
    command = [sys.executable, "-m", "mmtransfer", "monitor", str(whisper_tiny), str(path)]
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True}
    plain = child_environment() | {"PYTHONIOENCODING": "ascii:strict"}
    done: Any = subprocess.run(command, env=plain, **options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.decode("ascii").splitlines()) == 2
    # No standard output at all, and no standard input.
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    assert subprocess.run(shell, env=child_environment(), **options).returncode == 0
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *command[:-1], "-"]
    done = subprocess.run(shell, env=child_environment(), **options)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[0].endswith("standard input is closed.")


def test_sources_may_follow_options(whisper_tiny, tmp_path, speech, capsys):
    path = str(write_media(tmp_path / "a.ogg", speech))
    assert main(["monitor", str(whisper_tiny), "--threads", "2", path, "--beam", "1", path]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"a", "a-2"}
    assert main(["monitor", str(whisper_tiny), "--threads", "2", path, "--nonsense"]) == 2
    assert "unknown argument --nonsense" in capsys.readouterr().err


def test_a_second_audio_track_is_mentioned(whisper_tiny, tmp_path, speech, caplog):
    import av

    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        tracks = [out.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono") for _ in range(2)]
        data = (speech * 32767).astype("<i2")[None]
        for track in tracks:
            frame = av.AudioFrame.from_ndarray(data, format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    assert main(["monitor", str(whisper_tiny), str(path), "--quiet"]) == 0
    assert "has 2 audio tracks; using the first" in caplog.text


# --- nothing produced is lost ---------------------------------------------------------------------


def test_a_start_that_fails_leaves_earlier_outputs_alone(whisper_tiny, tmp_path, speech, capsys):
    path = write_media(tmp_path / "a.ogg", speech)
    outputs = [tmp_path / name for name in ("o.html", "o.srt", "o.jsonl")]
    command = ["monitor", str(whisper_tiny), str(path), "--output", *map(str, outputs)]
    assert main(command) == 0
    before = [output.read_bytes() for output in outputs]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        capsys.readouterr()
        assert main([*command, "--metrics-port", str(taken.getsockname()[1])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Address already in use" in line
    assert [output.read_bytes() for output in outputs] == before


def test_outputs_never_replace_what_is_read(whisper_tiny, tmp_path, speech, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = write_media(tmp_path / "a.ogg", speech).rename(tmp_path / "a.txt")
    before = sound.read_bytes()
    for command, message in [
        ([str(sound), "--output", "a.txt"], "is a source"),
        ([str(VIDEO), "--journal", "j", "--output", "j/o.jsonl"], "in the journal's folder"),
        ([str(tmp_path), "--alert-clips", "a/clips"], "clips would be transcribed"),
    ]:
        (tmp_path / "j").mkdir(exist_ok=True)
        assert main(["monitor", str(whisper_tiny), *command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert sound.read_bytes() == before


def test_alerts_on_their_way_when_the_monitor_dies_are_sent_again(
    receiver,
    whisper_tiny,
    short_video,
    tmp_path,
    monkeypatch,
):
    """Delivered ones are not, nor those that were refused; the other side may see one twice."""
    folder, other = tmp_path / "j", receiver(200, 404)
    command = ["monitor", str(whisper_tiny), str(short_video), "--keywords", "gate", "yard"]
    command += ["--quiet", "--journal", str(folder)]
    assert main([*command, "--webhook", other.url]) == 0
    raised = [line for line in lines_of(folder) if line.get("event") == "alert"]
    assert len(raised) >= 3
    assert all(line["to"] == ["webhook"] for line in raised)
    # Killed while all but the first two were on their way: what the journal says of the rest goes.
    (path,) = folder.glob("*.jsonl")
    kept, settled = [], 0
    for text in path.read_text(encoding="utf-8").splitlines():
        if "delivered" in str(json.loads(text).get("event")):
            settled += 1
            if settled > 2:
                continue
        kept.append(text)
    assert settled == len(raised)
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    again = receiver()
    assert main([*command, "--webhook", again.url]) == 0
    wait_for(lambda: len(again.got) == len(raised) - 2)
    sent = [json.loads(body)["segment"] for _, body in again.got]
    assert sent == [line["segment"] for line in raised[2:]]
    # A third time there is nothing left, and without a webhook nothing is to be sent.
    third = receiver()
    assert main([*command, "--webhook", third.url]) == 0
    assert not third.got


def test_damaged_lines_of_a_journal_are_left_out_and_reported(
    tmp_path, whisper_tiny, speech, capsys, caplog
):
    path, folder = write_media(tmp_path / "a.ogg", speech), tmp_path / "j"
    command = ["monitor", str(whisper_tiny), str(path), "--journal", str(folder), "--quiet"]
    assert main(command) == 0
    (journal,) = folder.glob("*.jsonl")
    whole = journal.read_bytes()
    for damage in (b'{"camera": "a"\n', b"[1]\n", b"\xff\xfe\n", b"{}\n"):
        journal.write_bytes(damage + whole)
        caplog.clear()
        assert main([*command, "--output", str(tmp_path / "again.jsonl")]) == 0
        (report,) = (message for message in caplog.messages if "damaged" in message)
        assert "corrupt lines skipped: 1; the first is line 1 of" in report
        assert journal.read_bytes() == damage + whole  # nothing was recognised again
    journal.write_bytes(whole)
    for text in ("[1]", '{"format": 2, "model": 3, "sources": {}}', '{"model": {}}'):
        (folder / "journal.json").write_text(text)
        capsys.readouterr()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "journal.json: damaged" in line
    header = {"format": 1, "model": {"name": "m", "digest": "d"}, "sources": {}}
    (folder / "journal.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="by another version"):
        Journal(folder, model="m", model_digest="d", sources={})


def test_damaged_audio_in_the_spool_is_left_aside(tmp_path, caplog):
    spool = Spool(tmp_path)
    samples = np.ones(100, np.float32)
    for number in range(3):
        spool.add("gate", f"gate@{number}", Segment(number, number + 1, samples))
    cut, rubbish = sorted(tmp_path.glob("*.segment"))[:2]
    cut.write_bytes(cut.read_bytes()[:-7])
    rubbish.write_bytes(b"\x00\xff")
    assert len(list(Spool(tmp_path).waiting())) == 1
    assert caplog.text.count(": corrupt") == 2
    assert len(list(tmp_path.glob("*.damaged"))) == 2
