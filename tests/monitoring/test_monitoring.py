import errno
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import EXAMPLE, child_environment, tone, write_media
from hypothesis import given
from hypothesis import strategies as st
from support.children import Command, run_command
from support.engines import fake_monitor
from support.sessions import transcript
from support.sources import decode
from support.web import wait_for

from mmtransfer.cli import main
from mmtransfer.config import DataConfig
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Alert, Camera, Monitor, SourceEnd, Transcript
from mmtransfer.monitoring.fair_queue import FairQueue, Job
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.outputs.sinks import FileSink, check_outputs, clock, line, output_path
from mmtransfer.speech.audio import SAMPLE_RATE, TruncatedMediaError
from mmtransfer.speech.clips import read_clips
from mmtransfer.speech.scores import get_normalizer, score_clip
from mmtransfer.speech.segments import Segment

VIDEO = EXAMPLE / "monitor.mp4"


@given(st.floats(0, 200_000), st.sampled_from([1, 3]))
def test_clock_reads_back(seconds, decimals):
    text = clock(seconds, decimals=decimals)
    hours, minutes, rest = text.split(":")
    assert int(minutes) < 60
    assert float(rest) < 60
    value = int(hours) * 3600 + int(minutes) * 60 + float(rest)
    assert value == pytest.approx(seconds, abs=0.6 * 10**-decimals)


def test_line_for_people():
    assert line(transcript()) == "[00:00:14.6 → 00:00:21.9] gate two"


def test_subtitles_open_in_a_player(tmp_path):
    """FFmpeg's own parsers read back what was written."""
    lines = ["gate two", "a --> b <open> & shut", "北门"]
    for suffix in (".srt", ".vtt"):
        sink = FileSink(tmp_path / f"out{suffix}")
        for index, text in enumerate(lines):
            sink.write(transcript(text, 3661.5 + index, 3662.25 + index))
        sink.close()
        with av.open(str(tmp_path / f"out{suffix}")) as container:
            packets = [p for p in container.demux(container.streams[0]) if p.size]
        assert len(packets) == 3
        base: Any = packets[0].time_base
        assert [float(p.pts * base) for p in packets] == [3661.5, 3662.5, 3663.5]
        assert [float(p.duration * base) for p in packets] == [0.75] * 3
        assert "gate two" in bytes(packets[0]).decode()


def test_json_lines_and_text_are_on_disk_at_once(tmp_path):
    for suffix in (".jsonl", ".txt"):
        sink = FileSink(tmp_path / f"out{suffix}")
        sink.write(transcript("北门"))
        content = (tmp_path / f"out{suffix}").read_text(encoding="utf-8")
        assert "北门" in content
        assert content.endswith("\n")
        sink.close()
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert (row["start"], row["end"], row["text"]) == (14.6, 21.9, "北门")
    assert {"avg_logprob", "no_speech_prob", "compression_ratio"} <= set(row)


class FullDisk:
    """A file that takes so many bytes more, until the disk is made free."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return taken

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".vtt"])
def test_lines_that_a_full_disk_does_not_take_are_written_when_it_does(suffix, tmp_path, caplog):
    paths = [tmp_path / f"{name}{suffix}" for name in ("whole", "late", "closed")]
    sinks: list[Any] = [FileSink(path, waits=True) for path in paths]
    whole, late, closed = sinks
    disk = late._file = FullDisk(late._file, 10)
    closed._file = FullDisk(closed._file, 0)
    for number, text in enumerate(["one", "北门", "three", "four"]):
        if number == 3:
            disk.room = 10_000
        for sink in (whole, late, closed):
            sink.write(transcript(text))
        assert (paths[1].read_bytes() == paths[0].read_bytes()) is (number == 3)
    with pytest.raises(OSError, match=re.escape(str(paths[2]))):
        closed.close()
    assert [str(path) in caplog.text for path in paths] == [False, True, True]
    assert len(caplog.messages) == 2
    for sink in (whole, late):
        sink.close()
    again: Any = FileSink(paths[2], waits=True)
    other = again._file = FullDisk(again._file, 0)
    again.write(transcript("one"))
    other.room = 10_000
    again.close()
    assert "one" in paths[2].read_text(encoding="utf-8")


def test_lines_that_can_be_transcribed_again_do_not_wait_for_a_disk(tmp_path):
    sink: Any = FileSink(tmp_path / "o.txt")
    sink._file = FullDisk(sink._file, 0)
    with pytest.raises(OSError, match=r"No space left on device: .*o\.txt"):
        sink.write(transcript())


def test_outputs_are_checked_before_work(tmp_path):
    for path, message in [
        (tmp_path / "x.doc", r"unknown output format '\.doc'"),
        (tmp_path / "no" / "x.srt", "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            check_outputs([path])
    (tmp_path / "x.srt").mkdir()
    with pytest.raises(UserError, match="found a folder"):
        check_outputs([tmp_path / "x.srt"])


def test_each_video_gets_its_own_subtitles():
    cameras = ["gate", "yard", "gate-2"]
    names = [output_path(Path("o.srt"), camera, cameras).name for camera in cameras]
    assert names == ["o.gate.srt", "o.yard.srt", "o.gate-2.srt"]
    assert output_path(Path("o.jsonl"), "gate", cameras).name == "o.jsonl"
    assert output_path(Path("o.srt"), "gate", ["gate"]).name == "o.srt"
    # Names that differ in nothing that a file name may hold stay apart.
    altered = [output_path(Path("o.srt"), name, ["b", "c"]).name for name in ("a/b", "a:b", "..")]
    assert len(set(altered)) == 3
    assert all(name.startswith("o.") and "/" not in name for name in altered)
    with pytest.raises(UserError, match=r"\.srt files belong to a recording"):
        check_outputs([Path("o.srt")], live=["gate"])


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_transcripts_come_in_order_and_in_batches_of_one_context():
    # Until the whole video has been taken in, so that segments wait.
    monitor: Monitor
    monitor, engine = fake_monitor(hold=lambda: wait_for(lambda: monitor.stats.audio_s > 119))
    found = list(monitor.transcribe(VIDEO))
    starts = [t.start for t in found]
    assert starts == sorted(starts)
    assert len(found) >= 10
    assert max(size for size, _ in engine.calls) > 1
    assert max(size for size, _ in engine.calls) <= 8
    assert engine.most_running == 2
    assert monitor.stats.segments == len(found)
    assert monitor.stats.audio_s == pytest.approx(120, abs=1)


def job(camera, number, context_s, **options):
    segment = Segment(number, number + 1, np.zeros(1, np.float32))
    most = max(1, min(8, int(12 / context_s)))
    return Job(camera, number, f"{camera}@{number}", segment, (0, context_s), most, **options)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1.0, 2.0, 3.0])), min_size=1),
    st.integers(1, 4),
)
def test_every_segment_is_taken_once_and_a_sources_first_is_never_passed_over(given_jobs, workers):
    waiting, left = FairQueue(), []
    for number, (camera, context) in enumerate(given_jobs):
        left.append(job(camera, number, context))
        waiting.add(left[-1])
    while waiting:
        share = -(-len(waiting) // workers)
        batch = waiting.take(workers)
        first = [next(j for j in left if j.camera == camera) for camera in {j.camera for j in left}]
        assert batch[0] in first
        assert len({j.kind for j in batch}) == 1
        assert len(batch) <= min(batch[0].most, share)  # something is left for the others
        left = [j for j in left if j not in batch]
    assert not left


def test_a_talkative_source_does_not_delay_quiet_ones():
    """One source with a burst of two hundred segments, seven with one each now and then."""
    waiting = FairQueue()
    for number in range(200):
        waiting.add(job(0, number, 2.0 + number % 4))
    for _ in range(3):
        waiting.take()
    for camera in range(1, 8):
        waiting.add(job(camera, 0, 10.0 + camera))  # lengths that share no batch
    taken = [j.camera for _ in range(14) for j in waiting.take()]
    # The quiet ones' clocks stand where the talkative one's does, so all come at once.
    assert set(range(1, 8)) <= set(taken)
    # Having been silent earns no credit for later.
    for number in range(1, 20):
        waiting.add(job(3, number, 5.0))
    cameras = [[j.camera for j in waiting.take()] for _ in range(4)]
    assert any(0 in batch for batch in cameras)


def test_a_repeat_goes_before_what_came_after_it():
    waiting = FairQueue()
    waiting.add(job(0, 1, 2.0))
    waiting.add(job(0, 0, 8.0, is_repeat=True))
    assert [j.number for j in waiting.take()] == [0]


def test_several_recordings_are_read_side_by_side(cut_video):
    monitor, engine = fake_monitor(delay=0.02)
    items = list(monitor.watch([VIDEO, cut_video, EXAMPLE / "monitor.mp4"]))
    ends = [item for item in items if isinstance(item, SourceEnd)]
    assert [type(end.error) for end in ends].count(TruncatedMediaError) == 1
    assert len(ends) == 3
    alone = [(t.start, t.text) for t in fake_monitor()[0].transcribe(VIDEO)]
    found = [(t.start, t.text) for t in items if isinstance(t, Transcript)]
    first = [t for t in items if isinstance(t, Transcript) and t.source == str(VIDEO)]
    starts = [t.start for t in first]
    # The same file twice: each in order, together every segment twice.
    assert len(starts) == 2 * len(alone)
    assert sorted(starts) == sorted([start for start, _ in alone] * 2)
    assert len(found) > len(starts)
    # Segments of several recordings share batches.
    assert sum(size for size, _ in engine.calls) == len(found)
    assert not readers()


def test_a_failing_recogniser_ends_the_run_with_its_error():
    monitor, engine = fake_monitor()
    engine.decode = lambda clips, context_s: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(monitor.transcribe(VIDEO))
    assert not readers()


def test_the_first_transcript_does_not_wait_for_the_end():
    """It is there while the reader is held by the bounded queue or still reading."""
    monitor, _ = fake_monitor()
    stream = monitor.transcribe(VIDEO)
    next(stream)
    read_by_then = monitor.stats.audio_s
    stream.close()
    assert read_by_then < 119
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(
        t.name.startswith("reader") for t in threading.enumerate()
    ):
        time.sleep(0.05)
    assert not readers()


def test_a_doubtful_segment_is_decoded_again_with_longer_contexts():
    loop = "gate " * 30
    monitor, engine = fake_monitor(lambda context_s: "gate two" if context_s == 30.0 else loop)
    found = list(monitor.transcribe(VIDEO))
    assert {t.text for t in found} == {"gate two"}
    assert {t.context_s for t in found} == {30.0}
    starts = [t.start for t in found]
    assert starts == sorted(starts)
    assert monitor.stats.decoded_again == len(found)
    # Its own length, then a longer context, then the full one.
    own = sum(size for size, context in engine.calls if context < 8)
    assert own == len(found)
    assert len({context for _, context in engine.calls if context >= 8}) >= 2
    monitor, _ = fake_monitor(lambda context_s: loop)
    assert list(monitor.transcribe(VIDEO)) == []
    assert monitor.stats.rejected["looping"] == monitor.stats.decoded_again > 0


def test_a_word_that_is_repeated_is_text_and_raises_an_alert():
    """What is doubted is decoded again; what decodings agree on stays."""
    said = {"gate": "Fire! " * 6}
    monitor, engine = fake_monitor(lambda context_s: said["gate"])
    camera = Camera("gate", str(VIDEO), keywords=["fire"])
    items = list(monitor.watch([camera]))
    found = [item for item in items if isinstance(item, Transcript)]
    assert {t.text for t in found if t.end - t.start > 2} == {"Fire! " * 5 + "Fire!"}
    alerts = [item for item in items if isinstance(item, Alert)]
    assert len(alerts) == monitor.stats.segments + monitor.stats.rejected["looping"]
    assert {a.rejected for a in alerts if a.end - a.start > 2} == {""}
    assert len({context for _, context in engine.calls}) > 2


def test_what_is_rejected_raises_alerts_and_is_in_the_journal(tmp_path):
    monitor, _ = fake_monitor(lambda context_s: "Fire! " * 30)
    journal = Journal(tmp_path, model="m", model_digest="d", sources={"gate": str(VIDEO)})
    items = list(monitor.watch([Camera("gate", str(VIDEO), keywords=["fire"])], journal=journal))
    journal.close()
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.open()]
    rejected = [line for line in lines if line.get("event") == "rejected"]
    assert rejected
    assert {line["text"] for line in rejected} == {"Fire! " * 30}
    alerts = [item for item in items if isinstance(item, Alert)]
    assert {alert.rejected for alert in alerts} == {"looping"}
    assert len(alerts) == len(rejected) == monitor.stats.cameras["gate"].alerts
    assert not [item for item in items if isinstance(item, Transcript)]


@pytest.fixture(scope="module")
def cut_video(tmp_path_factory):
    """The first half of the example's bytes, with the container's index at the front."""
    path = write_media(tmp_path_factory.mktemp("cut") / "cut.mp4", decode(VIDEO), video=True)
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")
    path.write_bytes(data[: len(data) // 2])
    return path


def test_a_cut_video_is_transcribed_up_to_the_cut(cut_video):
    found = []

    def run():
        for piece in fake_monitor()[0].transcribe(cut_video):
            found.append(piece)

    with pytest.raises(TruncatedMediaError, match="ends early"):
        run()
    whole = list(fake_monitor()[0].transcribe(VIDEO))
    assert 3 <= len(found) < len(whole)
    for one, other in zip(found[:-1], whole, strict=False):
        assert one.start == pytest.approx(other.start, abs=0.1)


def test_the_source_model_reads_the_example(whisper_tiny, short_video, tmp_path, capsys):
    """The whole command on real speech: text in order, four outputs, nothing in silence."""
    outputs = [tmp_path / f"out{suffix}" for suffix in (".jsonl", ".srt", ".vtt", ".txt")]
    options = ["--output", *map(str, outputs)]
    assert main(["monitor", str(whisper_tiny), str(short_video), *options]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(row) for row in outputs[0].read_text(encoding="utf-8").splitlines()]
    assert len(captured.out.strip().splitlines()) == len(rows)
    assert "real-time factor" in captured.err
    whole = json.loads((EXAMPLE / "monitor.json").read_text(encoding="utf-8"))
    reference = [item for item in whole if item["end"] < 62]
    score = score_clip(
        " ".join(item["text"] for item in reference),
        " ".join(row["text"] for row in rows),
        get_normalizer("english-v2"),
    )
    assert score.word_errors / score.words < 0.75  # its names are strange to the source model
    for row in rows:
        assert any(r["start"] < row["end"] and row["start"] < r["end"] for r in reference), row


def test_silence_and_noise_give_no_text(whisper_tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    sound = np.concatenate(
        [
            np.zeros(8 * SAMPLE_RATE, np.float32),
            rng.normal(0, 0.05, 8 * SAMPLE_RATE).astype(np.float32),
            tone(8.0, hertz=120),
        ]
    )
    path = write_media(tmp_path / "quiet.mp4", sound, video=True)
    assert main(["monitor", str(whisper_tiny), str(path), "--output", str(tmp_path / "o.txt")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "o.txt").read_text() == ""


def test_unplayable_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    write_media(tmp_path / "mute.mp4", None, video=True)
    for name in ("missing.mp4", "empty.mp4", "text.mp4", "mute.mp4"):
        assert main(["monitor", "bundled:whisper-tiny.en", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert name in error
        assert "Traceback" not in error


def test_a_cut_video_exits_with_2_after_its_text(whisper_tiny, cut_video):
    """In a process of its own, as a user would see it."""
    code, _, error = run_command("monitor", whisper_tiny, cut_video)
    assert code == 2
    assert "ends early" in error
    assert "Traceback" not in error


def test_an_interrupted_run_keeps_what_it_wrote(whisper_tiny, short_video, tmp_path):
    output = tmp_path / "o.jsonl"
    with Command("monitor", whisper_tiny, short_video, "--output", output) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate()
        assert process.returncode == 130
    printed = [first, *rest.splitlines()]
    assert "Traceback" not in error
    rows = [json.loads(row) for row in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(printed) >= 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_videos_length(whisper_tiny, tmp_path):
    """Peak memory of a 10-minute and a 60-minute file within 10 %."""
    peaks = []
    blocks = decode(VIDEO)
    for minutes in (10, 60):
        samples = np.resize(blocks, minutes * 60 * SAMPLE_RATE)
        path = write_media(tmp_path / f"{minutes}.mp4", samples)
        program = (
            "import resource, sys\nfrom mmtransfer.cli import main\n"
            f"code = main(['monitor', {str(whisper_tiny)!r}, {str(path)!r}, '--quiet'])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\nsys.exit(code)"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout))
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("suffix", [".srt", ".vtt", ".ass"])
def test_what_a_monitor_writes_is_trained_on_as_it_was(tmp_path, suffix):
    """Marks of tags and entities, quotes, arrows, numbers alone; long lines are broken in two."""
    said = ["R&D <b>bold</b> 5 < 7 > 3 --> 4", "AT&amp;T &lt;i> \\N {x}", "7", "word " * 19 + "end"]
    sink = FileSink(tmp_path / f"talk{suffix}")
    for number, text in enumerate(said):
        sink.write(Transcript("a", "a", "a", number, number + 0.9, text, -0.1, 0.0, 1.0, 2.0))
    sink.close()
    write_media(tmp_path / "talk.wav", tone(4.0))
    clips = read_clips(tmp_path, DataConfig())
    assert [clip.text for clip in clips] == said
    assert [(clip.start, clip.end) for clip in clips] == [(n, n + 0.9) for n in range(4)]
