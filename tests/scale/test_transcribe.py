"""Recordings in bulk: the rows of `monitor`, once each, whatever happens meanwhile."""

import json
import os
import re
import shutil
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from conftest import EXAMPLE, write_media
from support.clusters import tree
from support.engines import FakeEngine, LoudIsSpeech, utterances

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import ClassifiedSound, Monitor, RecognitionOptions, load_monitor
from mmtransfer.monitoring.sound_events import SoundClasses
from mmtransfer.scale import pieces, sources, transcribe
from mmtransfer.scale.on_ray import cut_ahead
from mmtransfer.scale.pieces import cut
from mmtransfer.scale.recognising import Transcriber
from mmtransfer.scale.rows import Output
from mmtransfer.scale.sources import BulkFile, grouped, list_files
from mmtransfer.scale.transcribe import BulkOptions
from mmtransfer.speech import segments
from mmtransfer.speech.audio import stream_audio
from mmtransfer.speech.recognition import Recognizer

MODEL = "bundled:whisper-tiny.en"


def rows(folder, kind="lines"):
    return ds.dataset(f"{folder}/{kind}", partitioning="hive").to_table().to_pylist()


def times(words):
    return [(word["text"], word["start"], word["end"]) for word in words]


@pytest.fixture
def archive(tmp_path):
    """Two folders with short recordings, a long one, one that is none, and something else."""
    folder = tmp_path / "archive"
    for name in ("gate", "yard"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            audio = utterances([1.0] * (1 + number))
            write_media(folder / name / f"{number}.wav", audio)
    write_media(folder / "yard" / "long.wav", np.concatenate([utterances([4.0] * 5)] * 4))
    (folder / "yard" / "bad.wav").write_bytes(b"no recording")
    (folder / "yard" / "notes.md").write_text("nothing to transcribe")
    return folder


@pytest.fixture
def engine(monkeypatch):
    """A recogniser whose text is known, and pieces of a few seconds."""
    made = FakeEngine()
    monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)
    monkeypatch.setattr(pieces, "PIECE_S", 4.0)
    monkeypatch.setattr(
        transcribe, "open_transcriber", lambda *given: Transcriber(Recognizer(made))
    )
    return made


def bulk(sources, output, **options):
    recognition = options.pop("recognition", RecognitionOptions(MODEL))
    options = {"max_errors": 50.0, **options}
    return transcribe.transcribe(
        BulkOptions(recognition, [str(s) for s in sources], str(output), **options)
    )


def test_rows_are_what_monitor_gives_whatever_is_transcribed_beside(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_S", 5.0)  # the recording is several
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_media(folder / "long.wav", np.concatenate([speech] * 2))
    for clip in sorted((EXAMPLE / "validation").glob("*.*"))[:3]:
        if clip.suffix != ".csv":
            shutil.copy(clip, folder)
    command = [MODEL, str(folder), "--output", str(out), "--words", "--formats", "srt", "jsonl"]
    assert main(["transcribe", *command]) == 0
    found = rows(out)
    monitor = load_monitor(MODEL, words=True)
    for path in sorted(folder.iterdir()):
        expected = list(monitor.transcribe(path))
        own = [row for row in found if row["file"] == str(path)]
        assert [r["text"] for r in own] == [line.text for line in expected]
        assert [(r["start"], r["end"]) for r in own] == [(li.start, li.end) for li in expected]
        assert [times(row["words"]) for row in own] == [times(line.words) for line in expected]
        assert [r["avg_logprob"] for r in own] == pytest.approx(
            [line.avg_logprob for line in expected], abs=2e-4
        )
        texts = [json.loads(t)["text"] for t in (out / "texts" / f"{path.name}.jsonl").open()]
        assert texts == [line.text for line in expected]
    assert len({row["id"] for row in found}) == len(found) > 4
    assert "-->" in (out / "texts" / "long.wav.srt").read_text()


def test_a_killed_run_goes_on_and_ends_the_same(archive, engine, tmp_path, monkeypatch):
    whole = bulk([archive], tmp_path / "whole")
    assert (whole.files, whole.failed, whole.known) == (8, 1, 0)
    assert {row["folder"] for row in rows(tmp_path / "whole")} == {"gate", "yard"}
    decoded = []

    def noted(path):
        decoded.append(path)
        return stream_audio(path)

    monkeypatch.setattr(pieces, "stream_audio", noted)
    out = tmp_path / "killed"

    def killed_at(count):
        """Run it in a process that is killed once it has kept so many pieces."""
        if (child := os.fork()) == 0:
            write, kept = Output.write_piece, []

            def counted(*given):
                write(*given)
                kept.append(given)
                if len(kept) == count:
                    os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(Output, "write_piece", counted)
            bulk([archive], out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    for count in (1, 2, 7):
        killed_at(count)
    assert list((out / "_run" / "pieces").iterdir())
    rest = bulk([archive], out)
    assert rest.pieces == whole.pieces - (1 + 2 + 7)  # none is transcribed twice
    assert rest.known == 3
    assert {path.parent.name for path in decoded} == {"yard"}
    assert tree(out) == tree(tmp_path / "whole")
    decoded.clear()
    again = bulk([archive], out)
    assert (again.files, again.known, decoded) == (0, 8, [])
    assert tree(out) == tree(tmp_path / "whole")


def gone(path):
    path.unlink()


def longer(path):
    write_media(path, utterances([1.0] * 5))


def without(folder, name, kind="lines"):
    """Rows of all files but one."""
    return [row for row in rows(folder, kind) if not row["file"].endswith(name)]


@pytest.mark.parametrize("change", [gone, longer])
@pytest.mark.parametrize("former", [False, True])
def test_a_changed_file_leaves_the_lines_of_others_in_a_half_done_group(
    engine, tmp_path, monkeypatch, change, former
):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    engine.workers = 1  # the first piece is the first that is kept
    for name in "abcd":  # all but the first have one content
        write_media(folder / f"{name}.wav", utterances([1.0] * (1 if name == "a" else 3)))
    bulk([folder], tmp_path / "whole")
    write = Output.write_piece

    def killed(*given):
        write(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_piece", killed)
        with pytest.raises(KeyboardInterrupt):
            bulk([folder], out)
    (piece,) = (out / "_run" / "pieces").glob("*/*.json")
    if former:  # by its number alone, as versions before named it
        piece.rename(piece.with_name("000000.json"))
    change(folder / "a.wav")
    bulk([folder], out)
    assert without(out, "a.wav") == without(tmp_path / "whole", "a.wav")
    counts = [(row["lines"], row["error"]) for row in without(out, "a.wav", "files")]
    assert counts == [(3, "")] * 3
    (row,) = [row for row in rows(out, "files") if row["file"].endswith("a.wav")]
    assert row["lines"] == len(rows(out)) - 9 == (0 if change is gone else 5)
    assert not list((out / "_run").glob("pieces/*"))


def test_a_group_that_is_cut_again_has_the_pieces_of_its_last_cutting(engine, tmp_path):
    for name in "ab":
        write_media(tmp_path / f"{name}.wav", utterances([1.0] * 3))
    (group,) = grouped(list_files([str(tmp_path)]))
    transcriber = Transcriber(Recognizer(engine))
    options = BulkOptions(RecognitionOptions(MODEL), [], "", max_errors=50.0)
    output = Output(str(tmp_path / "out"), {"model": "m", "sounds": None}, partition="folder")
    run = transcribe.BulkRun(output, [group], options)
    run.begin(group)
    first = [found for found in cut(group, 0.0) if isinstance(found, pieces.Piece)]
    late = first.pop(1)
    for piece in first:
        run.add(group, piece.name, transcriber.transcribe(piece, group.files))
    gone(tmp_path / "a.wav")
    known, names = run.begin(group), []
    for found in cut_ahead(group, 0.0, known, options.recognition):
        if isinstance(found, pieces.FileEnd):
            run.ended(group, found)
        elif isinstance(found, str):
            names.append(found)
        elif isinstance(found, pieces.Piece):
            run.add(group, found.name, transcriber.transcribe(found, group.files))
    run.add(group, late.name, transcriber.transcribe(late, group.files))
    run.all_cut(group, names)
    assert run.is_finished(group)
    assert [row["lines"] for row in rows(tmp_path / "out", "files")] == [0, 3]
    found = rows(tmp_path / "out")
    assert len({row["id"] for row in found}) == len(found) == 3
    assert {row["file"] for row in found} == {str(tmp_path / "b.wav")}


def test_progress_goes_on_within_a_long_file(archive, engine, tmp_path, monkeypatch):
    seen: list[tuple[int, float]] = []

    def advance(self, files, size, *, audio_hours, pieces):
        seen.append((files, 3600 * audio_hours))

    monkeypatch.setattr("mmtransfer.scale.progress.BulkProgress.advance", advance)
    summary = bulk([archive / "yard" / "long.wav"], tmp_path / "out")
    *within, (files, whole) = seen
    assert files == 1
    assert whole == pytest.approx(3600 * summary.audio_hours)
    seconds = [found for _, found in within]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= whole


def test_what_is_new_is_transcribed_and_what_changed_is_said(archive, engine, tmp_path, caplog):
    out = tmp_path / "out"
    bulk([archive / "gate"], out)
    before = tree(out)
    write_media(archive / "gate" / "new.wav", utterances([1.0]))
    write_media(archive / "gate" / "0.wav", utterances([1.0, 1.0, 1.0]))
    summary = bulk([archive / "gate"], out)
    assert (summary.files, summary.known) == (1, 3)
    assert "1 files have changed" in caplog.text
    after = tree(out)
    assert {n: after[n] for n in before if n.startswith("lines")} == {
        n: data for n, data in before.items() if n.startswith("lines")
    }


def test_a_file_that_could_not_be_used_is_tried_again_once_it_is_mended(archive, engine, tmp_path):
    out, bad = tmp_path / "out", archive / "yard" / "bad.wav"
    bulk([archive], out)
    lines = len(rows(out))
    unchanged = bulk([archive], out)
    assert (unchanged.files, unchanged.known) == (0, 8)
    retried = bulk([archive], out, retry_errors=True)
    assert (retried.files, retried.failed) == (1, 1)
    assert bulk([archive], out, retry_errors=True).files == 1
    assert [row["file"] for row in rows(out, "files")].count(str(bad)) == 2
    write_media(bad, utterances([1.0]))
    mended = bulk([archive], out, max_errors=5.0)
    assert (mended.files, mended.failed) == (1, 0)
    assert pq.read_table(out / "errors.parquet").num_rows == 0
    assert len(rows(out)) == lines + 1
    assert [row["file"] for row in rows(out)].count(str(bad)) == 1
    assert bulk([archive], out, retry_errors=True).files == 0


def test_bad_files_are_named_and_too_many_end_the_run(archive, engine, tmp_path):
    audio = utterances([1.0] * 4)
    audio *= np.sign(np.random.default_rng(0).standard_normal(len(audio))).astype(np.float32)
    cut = write_media(archive / "gate" / "cut.flac", audio)
    cut.write_bytes(cut.read_bytes()[: 2 * cut.stat().st_size // 3])
    bulk([archive, archive / "yard" / "long.wav"], tmp_path / "out", max_errors=30.0)
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [row["file"] for row in errors] == [
        str(cut),
        str(archive / "yard" / "bad.wav"),
    ]
    assert "ends early" in errors[0]["error"]
    assert errors[0]["lines"] > 0
    with pytest.raises(UserError, match=r"1 of 9 files .* more than 5 %.*errors\.parquet"):
        bulk([archive], tmp_path / "strict", max_errors=5.0)
    # What was done stays, and the run goes on when more is allowed.
    assert bulk([archive], tmp_path / "strict").known > 0


def test_an_output_belongs_to_a_model_its_settings_and_one_run(archive, engine, tmp_path):
    out = tmp_path / "out"
    bulk([archive / "gate"], out)
    others: list[tuple[dict[str, Any], str]] = [
        ({"recognition": RecognitionOptions(MODEL, words=True)}, "words false, and true"),
        ({"recognition": RecognitionOptions("bundled:whisper-base")}, "made with model"),
        ({"partition": "day"}, "partition"),
        ({"formats": ["srt"]}, "formats"),
    ]
    for options, what in others:
        with pytest.raises(UserError, match=what):
            bulk([archive / "gate"], out, **options)
    with pytest.raises(UserError, match="expected an empty folder"):
        bulk([archive / "gate"], archive)
    settings = json.loads((out / "_run" / "settings.json").read_text())
    output = Output(str(out), settings, partition="folder")
    with output.alone(), pytest.raises(UserError, match="another run"):
        bulk([archive / "gate"], out)
    # An earlier version, which cut speech in another way, has begun it.
    del settings["recognition_version"]
    (out / "_run" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"recognition_version null, and \d+ was asked for"):
        bulk([archive / "gate"], out)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_damaged_settings_are_one_line(archive, engine, tmp_path, damaged):
    out = tmp_path / "out"
    bulk([archive / "gate"], out)
    (out / "_run" / "settings.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"out/_run/settings\.json: expected .* found a damaged"):
        bulk([archive / "gate"], out)


def test_folders_in_a_manifest_are_errors(archive, engine, tmp_path):
    table = archive / "some.csv"
    table.write_text("file\n.\n..\ngate\ngate/0.wav\n")
    bulk([table], tmp_path / "out", formats=["srt"], max_errors=80.0)
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [row["error"] for row in errors] == [
        f"{folder}: expected a video or audio file, found a folder."
        for folder in (archive, archive / "..", archive / "gate")
    ]
    texts = [path for path in (tmp_path / "out" / "texts").rglob("*") if path.is_file()]
    assert [path.name for path in texts] == ["0.wav.srt"]


def test_addresses_are_listed_fetched_and_written(archive, engine, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in archive.rglob("*.wav"):
        memory.pipe_file(f"/shelf/{path.relative_to(archive)}", path.read_bytes())
    try:
        bulk(["memory://shelf"], "memory://rows", formats=["vtt"])
        bulk([archive], tmp_path / "out")
        found = sorted(memory.find("/rows/lines"))
        tables = [pq.read_table(BytesIO(memory.cat_file(path))) for path in found]
        remote = [row for table in tables for row in table.to_pylist()]
        assert {row["file"] for row in remote} >= {"memory:///shelf/yard/long.wav"}
        key = lambda row: (row["id"], row["text"])  # noqa: E731
        assert sorted(map(key, remote)) == sorted(map(key, rows(tmp_path / "out")))
        assert memory.exists("/rows/texts/yard/long.wav.vtt")
        errors = pq.read_table(BytesIO(memory.cat_file("/rows/errors.parquet"))).to_pylist()
        assert errors[0]["error"].startswith("memory:///shelf/yard/bad.wav: not a readable")
        assert bulk(["memory://shelf"], "memory://rows", formats=["vtt"]).known == 8
    finally:
        memory.rm("/shelf", recursive=True)
        memory.rm("/rows", recursive=True)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://b/Call #1.wav", "s3://b/Call #1.wav"),
        ("gs://b/session=a/al@ex.com/What?.wav", "gs://b/session=a/al@ex.com/What?.wav"),
        ("s3://me:secret/secret@b/x.wav?token=secret", r"s3://b/x.wav?***~\w{8}"),
        ("https://nvr/download?file=secret.wav", r"https://nvr/download?file=***~\w{8}"),
        ("https://nvr/session=secret/x.wav", r"https://nvr/session=***/x.wav~\w{8}"),
        ("ftp://me:secret@nvr/x.wav", r"ftp://nvr/x.wav~\w{8}"),
        ("/calls/#1?a=b.wav", "/calls/#1?a=b.wav"),
    ],
)
def test_an_address_is_shown_without_secrets_and_as_no_other(address, shown):
    files = [BulkFile(each, "", "", 0, "") for each in (address, address.replace("secret", "or"))]
    pattern = re.escape(shown).replace(re.escape(r"\w{8}"), r"\w{8}")
    assert all(re.fullmatch(pattern, file.shown) for file in files)
    assert len({file.shown for file in files}) == len({file.address for file in files})


def test_broken_files_of_any_names_are_counted_one_by_one(archive, engine, tmp_path):
    memory = fsspec.filesystem("memory")
    good = (archive / "gate" / "0.wav").read_bytes()
    for number in range(6):
        memory.pipe_file(f"/calls/session={number}/Call #{number}.wav", good)
        memory.pipe_file(f"/calls/session={number}/bad?id={number}", b"no recording")
    table = tmp_path / "some.csv"
    rest = "".join(f"memory://calls/session={n}/bad?id={n}\n" for n in range(6))
    table.write_text(f"file\n{rest}")
    try:
        sources = ["memory://calls", table]
        with pytest.raises(UserError, match="6 of 12 files could not be used"):
            bulk(sources, tmp_path / "out", max_errors=10.0)
        bulk(sources, tmp_path / "out", retry_errors=True)
    finally:
        memory.rm("/calls", recursive=True)
    assert len({row["file"] for row in rows(tmp_path / "out")}) == 6
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert len({row["file"] for row in errors}) == 6


def test_a_recording_has_no_name_with_a_secret(tmp_path, monkeypatch):
    class Web:
        """Names files of the web by their whole addresses, as fsspec does."""

        def info(self, path):
            return {"name": path.removeprefix("s3://"), "size": 1}

    monkeypatch.setattr(sources, "open_storage", lambda address: (Web(), address))
    table = tmp_path / "some.csv"
    table.write_text(
        "file\nhttps://nvr/a/x.wav?token=secret\nhttps://nvr/a/x.wav?token=se/cret\n"
        "https://me:secret@nvr\nhttps://nvr/y.wav?secret\ns3://b/z.wav?token=secret/1\n"
    )
    files = list_files([str(table)])
    assert len({file.name for file in files}) == 5
    names = [re.sub(r"-\w{8}(?=\.wav)", "", file.name) for file in files]
    assert sorted(names) == ["nvr", "x.wav", "x.wav", "y.wav", "z.wav"]


def test_long_names_are_cut_and_others_stay(engine, tmp_path):
    folder = tmp_path / "in"
    deep = "Записи совещаний/Конференц-зал на втором этаже "
    paths = [f"{deep}{n}/{'я' * 118}{n}.wav" for n in (1, 2)]
    short = ["Записи/зал.wav", f"{'a' * 240}/{'b' * 230}.wav"]  # as long as they may be
    for path in [*paths, *short]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_media(folder / path, utterances([1.0]))
    bulk([folder], tmp_path / "out", formats=["srt", "jsonl"])
    found = {row["file"]: row["folder"] for row in rows(tmp_path / "out")}
    assert len(found) == len(set(found.values())) == 4
    for path in paths:
        value = found[str(folder / path)]
        assert value.startswith("Записи совещаний/Конференц-")
        assert re.search(r"-[0-9a-f]{16}$", value)
    for path in short:
        assert found[str(folder / path)] == str(Path(path).parent)
        assert (tmp_path / "out" / "texts" / f"{path}.jsonl").is_file()
    for number in (1, 2):
        (text,) = (tmp_path / "out" / "texts" / f"{deep}{number}").glob("*.jsonl")
        assert re.fullmatch(r"я{90}-[0-9a-f]{16}\.jsonl", text.name)


def test_sources_are_patterns_manifests_and_files_by_day(archive, engine, tmp_path):
    for path in archive.rglob("*.wav"):
        os.utime(path, (1_700_000_000, 1_700_000_000))  # 2023-11-14 UTC
    table = tmp_path / "some.csv"
    table.write_text("file_name,note\narchive/gate/1.wav,x\narchive/gate/gone.wav,y\n")
    sources = [archive / "yard" / "[01].wav", table, archive / "gate" / "0.wav"]
    bulk(sources, tmp_path / "out", partition="day", formats=["srt"])
    files = pq.read_table(tmp_path / "out" / "files").to_pylist()
    assert sorted(row["file"].removeprefix(f"{archive}/") for row in files) == [
        *("gate/0.wav", "gate/1.wav", "gate/gone.wav", "yard/0.wav", "yard/1.wav"),
    ]
    assert [row["error"] for row in files if "gone" in row["file"]] == [
        f"{archive}/gate/gone.wav: no such file."
    ]
    assert {str(row["day"]) for row in rows(tmp_path / "out")} == {"2023-11-14"}
    folder = tmp_path / "out" / "texts"
    texts = {str(path.relative_to(folder)) for path in folder.rglob("*.srt")}
    assert texts >= {"1.wav.srt", "archive/gate/1.wav.srt"}
    assert len(texts) == 4  # two of them of the same name; none of what is gone


def test_sounds_are_those_of_monitor(archive, engine, tmp_path, monkeypatch):
    def classify(windows):
        return np.array([[float(np.abs(window).max() > 0.65)] for window in windows])

    classes = SoundClasses(["loud"], 1.0, classify)
    monkeypatch.setattr(transcribe, "open_sounds", lambda *given: classes)
    bulk([archive], tmp_path / "out")
    monitor = Monitor(Recognizer(engine), sounds=classes)
    expected = [
        (item.label, item.start, item.end, item.probability)
        for item in monitor.watch([archive / "yard" / "long.wav"])
        if isinstance(item, ClassifiedSound)
    ]
    found = [row for row in rows(tmp_path / "out", "sounds") if row["file"].endswith("long.wav")]
    assert expected
    assert [(r["label"], r["start"], r["end"], r["probability"]) for r in found] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["what://host/x"], "what://host/x"),
        (["ftp://me:secret@127.0.0.1:9/x"], "cannot be opened"),
        (["empty"], "expected recordings, found none"),
        (["empty", "--formats", "doc"], "formats: expected srt, vtt, jsonl"),
        (["empty", "--workers", "2"], "expected with ray"),
        (["empty", "--max-errors", "200"], "expected a percentage"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, monkeypatch, options, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["transcribe", MODEL, *options, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "secret" not in error
    assert len(error.strip().splitlines()) == 1


def test_memory_and_rows_of_many_files_are_bounded(engine, tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    write_media(folder / "0.wav", utterances([1.0], seconds=0.6))
    for number in range(1, 150):
        shutil.copy(folder / "0.wav", folder / f"{number}.wav")
    held, add = [], transcribe.BulkRun.add

    def counted(self, *given):
        held.append(len(self._work))
        add(self, *given)

    monkeypatch.setattr(transcribe.BulkRun, "add", counted)
    assert bulk([folder], tmp_path / "out").files == 150
    assert max(held) <= 2
    assert len(list((tmp_path / "out" / "files").iterdir())) == 3
