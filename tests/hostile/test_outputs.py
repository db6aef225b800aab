"""What is written and shown: to whom it is open, where it goes, and that nothing steers a terminal;
journals, spools and caches that somebody else has been at.
"""

import io
import json
import os
import stat

import numpy as np
import pytest
from conftest import write_dataset, write_media, write_text_backbone
from support.hostile import change, copied, limited, outcome, reason, refused, rewrite
from support.sessions import transcript

from mmtransfer.cache import cache_path, is_whole, open_private, seal
from mmtransfer.config import DataConfig
from mmtransfer.data.printing import json_line, printable, spreadsheet_cell
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.monitoring import Journal
from mmtransfer.monitoring.outputs.sinks import FileSink, StandardOutput
from mmtransfer.monitoring.sources.cameras import file_name
from mmtransfer.runs.publishing import publish
from mmtransfer.speech import voice_activity
from mmtransfer.speech.clips import load_clips
from mmtransfer.speech.engines_ctranslate2 import converted
from mmtransfer.speech.segments import Segment

STEERING = "\x1b[2J\x9b1m\r\n\0\x7f\u202e\u2028\ud800"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_text_backbone(tmp_path_factory.mktemp("classifier"), labels=2)


def open_to_others(folder):
    """What of a folder somebody else may look into."""
    paths = [folder, *folder.rglob("*")]
    return [path for path in paths if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]


# --- terminals and files --------------------------------------------------------------------------


def test_a_text_that_steers_is_shown_as_what_it_is():
    assert printable("gate\x1b[2J\n\x9b\udcff\u202e") == r"gate\x1b[2J\x0a\x9b\xff\u202e"
    assert printable("Über 数字 עברית 👩‍👧 \u200f") == "Über 数字 עברית 👩‍👧 \u200f"
    values = {"a": STEERING, "b": ["é", 1.5, None]}
    assert json.loads(json_line(values)) == values
    assert printable(json_line(values)) == json_line(values)
    assert spreadsheet_cell(3) == 3


@pytest.mark.parametrize("suffix", [".srt", ".vtt", ".ass", ".txt", ".jsonl"])
def test_words_that_steer_stay_in_their_line(suffix, tmp_path):
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    text = f"one{STEERING}two --> 3"
    for path, words in zip(paths, [text, printable(text)], strict=True):
        sink = FileSink(path)
        sink.write(transcript(words))
        sink.write(transcript("three"))
        sink.close()
    shown, plain = (path.read_text(encoding="utf-8") for path in paths)
    assert shown.count("\n") == plain.count("\n")
    assert shown == plain or suffix == ".jsonl"
    assert printable(shown.replace("\n", "")) == shown.replace("\n", "")


def test_words_that_steer_stay_in_their_line_of_the_terminal(capsys):
    sink = StandardOutput(name_source=True)
    sink.write(transcript(f"one{STEERING}two"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert printable(out[:-1]) == out[:-1]


@pytest.mark.parametrize(
    "argv",
    [
        ["monitor", "bundled:x", f"no{STEERING[:2]}[2J\n.wav"],
        ["predict", "./no\x1b]0;x\x07\n", "--text", "a"],
        ["predict", "bundled:\x1b[31m", "--text", "a"],
        ["evaluate", "bundled:x", "--data", "\x9b2J.csv"],
        ["train", "\x1b[2J.yaml"],
        ["publish", "\x1b[2J", "a/b"],
        ["\x1b[2J"],
        ["monitor", "--\x1b[2J"],
        ["monitor", "bundled:whisper-tiny.en", "rtsp://u:secret@\x1b[2J/x"],
    ],
)
def test_names_on_the_command_line_steer_no_terminal(argv, capsys):
    message = refused(argv, capsys)
    assert "secret" not in message


@pytest.mark.parametrize(
    "label", ["a\x1b[2J", "[/b]neg", "[link=http://x]y", "a\nb", "=1+1", "\u202e"]
)
def test_labels_steer_no_terminal(label, classifier, tmp_path, capsys):
    model = copied(classifier, tmp_path / "model")
    change(model / "config.json", "id2label", {"0": label, "1": "other"})
    table = tmp_path / "x.jsonl"
    rows = [{"text": "good", "label": label}, {"text": "bad", "label": "other"}] * 4
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for argv in (
        ["predict", model, "--text", "good"],
        ["predict", model, "--data", table],
        ["predict", model, "--data", table, "--output", tmp_path / "o.csv"],
        ["evaluate", model, "--data", table],
    ):
        code, out, err = outcome(argv, capsys)
        # A label of a table has single spaces, so one with a line break is in none.
        assert code == 0 or ("\n" in label and argv[0] == "evaluate"), err
    assert code or printable(label)[:2] in out  # the table may fold the rest


def test_columns_steer_no_terminal(classifier, tmp_path, capsys):
    table = tmp_path / "x.csv"
    table.write_text("te\x1b[2Jxt,b\na,b\n")
    refused(["predict", classifier, "--data", table], capsys)


# --- to whom it is open, and where it goes --------------------------------------------------------


def test_outputs_journal_and_spool_are_for_this_user_alone(tmp_path):
    folder = tmp_path / "journal"
    journal = Journal(folder, model="m", model_digest="d", sources={"a": "rtsp://x"})
    journal.write({"camera": "a", "id": "a@1", "start": 1.0, "end": 2.0, "text": "gate"})
    journal.spool().add("a", "a@1", Segment(1.0, 2.0, np.zeros(160, np.float32), 1.0))
    journal.close()
    assert not open_to_others(folder)
    FileSink(tmp_path / "x.jsonl").close()
    assert stat.S_IMODE((tmp_path / "x.jsonl").stat().st_mode) == 0o600


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    Journal(folder, model="m", model_digest="d", sources={}).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_predictions_are_not_written_through_a_link(classifier, tmp_path, capsys):
    table = tmp_path / "x.csv"
    table.write_text("text\ngood\n")
    mine = tmp_path / "mine"
    mine.write_text("a line that is not finish")
    (tmp_path / "o.jsonl.part").symlink_to(mine)
    argv = ["predict", classifier, "--data", table, "--output", tmp_path / "o.jsonl"]
    assert "interrupted output" in refused(argv, capsys)
    assert "found a link" in refused([*argv, "--resume"], capsys)
    assert mine.read_text() == "a line that is not finish"


def test_a_journals_file_that_is_a_link_is_neither_mended_nor_written(tmp_path):
    folder = tmp_path / "journal"
    Journal(folder, model="m", model_digest="d", sources={}).close()
    mine = tmp_path / "mine"
    mine.write_text("half a line")
    import time

    (folder / f"{time.strftime('%Y-%m-%d')}.0000.jsonl").symlink_to(mine)
    journal = Journal(folder, model="m", model_digest="d", sources={})
    with pytest.raises(UserError, match="found a link"):
        journal.write({"camera": "a", "event": "connected"})
    journal.close()
    assert mine.read_text() == "half a line"


def test_a_users_own_link_may_stand_for_an_output(tmp_path):
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "real.jsonl")
    FileSink(tmp_path / "x.jsonl").close()
    assert (tmp_path / "real.jsonl").exists()
    with pytest.raises(UserError, match="found a link"):
        open_private(tmp_path / "x.jsonl", "w")


@pytest.mark.parametrize("length", [100, 245, 255, 5000])
def test_names_of_any_length_make_names_of_files(length, tmp_path):
    names = {file_name("a" * (length - 1) + end) for end in ("a", "b", "é", "\udcff")}
    assert len(names) == 4
    for name in names:
        (tmp_path / f"{name}.mkv.part").touch()


# --- publishing -----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (tmp_path / "run" / "report.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (model / "config.json").write_text("{}")
    return tmp_path / "run"


def test_a_plain_run_is_listed(run_folder):
    listed, card = publish(run_folder, "me/x", dry_run=True).split("\n\n", 1)
    assert [line.split()[0] for line in listed.splitlines()] == ["README.md", "config.json"]
    assert card == "---\nlicense: mit\n---\n# x"


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "hidden", "nowhere", "model"])
def test_what_is_no_file_of_a_model_is_not_published(what, run_folder, tmp_path):
    secret = tmp_path / ".env"
    secret.write_text("TOKEN=1")
    path = run_folder / "model" / "notes.txt"
    if what == "link":
        path.symlink_to(secret)
    elif what == "folder":
        path.symlink_to(tmp_path)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "hidden":
        rewrite(run_folder / "model" / ".env", "TOKEN=1")
    elif what == "nowhere":
        path.symlink_to("none")
    else:
        (run_folder / "model").rename(tmp_path / "elsewhere")
        (run_folder / "model").symlink_to(tmp_path / "elsewhere")
    assert reason(lambda: publish(run_folder, "me/x", dry_run=True))


# --- journals and spools --------------------------------------------------------------------------

LINES = [
    "1",
    "null",
    "[]",
    '"a"',
    "{}",
    "{" * 50_000,
    '{"camera": 5}',
    '{"camera": "a", "event": 5}',
    '{"camera": "a", "event": []}',
    '{"camera": "a", "id": 5, "end": 1}',
    '{"camera": "a", "id": "a@1", "end": "x"}',
    '{"camera": "a", "id": "a@1"}',
    '{"camera": "a", "id": "a@1", "end": 1e400}',
    '{"camera": "a", "id": "' + "x" * 100_000 + '", "end": 1}',
    '{"camera": "a", "event": "end", "id": null}',
    '{"camera": "a", "event": "file", "name": 5}',
    '{"camera": "a", "event": "file", "name": "x", "inode": "y"}',
    '{"camera": "a", "event": "reading"}',
    '{"camera": "a", "event": "reading", "of": 5, "name": 1}',
    '{"camera": "a", "event": "alert", "id": "a@1", "end": 2, "score": {}}',
    '{"camera": "a", "event": "sound", "id": "a@1", "end": 2, "start": "x"}',
    '{"camera": "a", "event": "cut", "detail": {}}',
    '{"camera": "\\ud800", "id": "a@1", "end": 1}',
    '{"camera": "a", "id": "a@1", "end": NaN}',
    "9" * 5000,
    "\0\0\0",
    "\x80\x04pickle",
]


@pytest.mark.parametrize("line", LINES)
def test_a_journals_line_of_another_shape_is_damaged_and_no_end(line, tmp_path):
    sources = {"a": str(tmp_path / "folder")}
    folder = tmp_path / "journal"
    Journal(folder, model="m", model_digest="d", sources=sources).close()
    whole = '{"camera": "a", "id": "a@9.000", "start": 9.0, "end": 10.0, "text": "gate"}'
    path = folder / "2026-01-01.0000.jsonl"
    path.write_text(f"{line}\n{whole}\n", encoding="utf-8", errors="surrogatepass")
    with limited():
        journal = Journal(folder, model="m", model_digest="d", sources=sources)
        known = journal.known(["a"], [])
        records = list(journal.records())
        journal.close()
    assert "a@9.000" in known.ids["a"]
    assert records


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "{" * 50_000, '{"format": []}', "\0", "9" * 9999]
)
def test_a_damaged_head_of_a_journal_is_refused(content, tmp_path):
    Journal(tmp_path, model="m", model_digest="d", sources={}).close()
    rewrite(tmp_path / "journal.json", content)
    with pytest.raises(UserError, match="damaged"):
        Journal(tmp_path, model="m", model_digest="d", sources={})


HEADS = [
    "",
    "{}",
    "[]",
    "1",
    "{" * 50_000,
    '{"camera": "a", "id": 5, "start": 1, "end": 2, "samples_start": 1, "samples": 0}',
    '{"camera": 1, "id": "a@1", "start": 1, "end": 2, "samples_start": 1, "samples": 0}',
    '{"camera": "a", "id": "a@1", "start": "x", "end": 2, "samples_start": 1, "samples": 0}',
    '{"camera": "a", "id": "a@1", "start": 1e300, "end": 2, "samples_start": 1, "samples": 0}',
    '{"camera": "a", "id": "a@1", "start": NaN, "end": 2, "samples_start": 1, "samples": 0}',
    '{"camera": "a", "id": "a@1", "start": 1, "end": 2, "samples_start": 1, "samples": 1e9}',
    '{"camera": "a", "id": "a@1", "start": 1, "end": 2, "samples_start": 1, "samples": -1}',
    '{"camera": "a", "id": "a@1", "start": 1, "end": 2, "samples_start": 1, "samples": []}',
    "x" * 200_000,
]


@pytest.mark.parametrize("head", HEADS)
def test_a_spool_file_of_another_shape_is_left_aside(head, tmp_path):
    journal = Journal(tmp_path, model="m", model_digest="d", sources={"a": "rtsp://x"})
    spool = journal.spool()
    spool.add("a", "a@1", Segment(1.0, 2.0, np.zeros(160, np.float32), 1.0))
    [path] = (tmp_path / "spool").glob("*.segment")
    rewrite(path, head + "\n")
    with limited():
        assert not list(spool.waiting())
    assert not list((tmp_path / "spool").glob("*.segment"))
    journal.close()


def test_a_pipe_in_the_spool_is_left_aside(tmp_path):
    journal = Journal(tmp_path, model="m", model_digest="d", sources={"a": "rtsp://x"})
    spool = journal.spool()
    os.mkfifo(tmp_path / "spool" / "x.segment")
    with limited():
        assert not list(spool.waiting())
    journal.close()


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMTRANSFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_new_cache_is_for_this_user_alone(cache):
    cache_path("audio", "aa", "x.npy").write_text("")
    assert [path.name for path in open_to_others(cache)] == ["x.npy"]  # behind closed doors


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files away")
def test_what_others_put_into_the_cache_is_not_used(cache, caplog):
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    for name, owner in (("mine", 0), ("planted", 12345)):
        (cache / name).mkdir()
        (cache / name / "model.bin").write_text(name)
        os.chown(cache / name, owner, owner)
    assert (cache_path("mine") / "model.bin").exists()
    assert not cache_path("planted").exists()
    assert "made anew" in caplog.text


def test_what_anybody_can_write_in_the_cache_is_not_used(cache):
    cache.mkdir(mode=0o755)
    cache.chmod(0o755)
    (cache / "x").mkdir()
    (cache / "x").chmod(0o777)
    assert not cache_path("x").exists()


def test_a_folder_of_the_cache_that_was_cut_is_not_whole(tmp_path):
    folder = tmp_path / "x"
    (folder / "full").mkdir(parents=True)
    (folder / "full" / "model.bin").write_text("weights")
    assert not is_whole(folder)
    seal(folder)
    assert is_whole(folder)
    (folder / "full" / "model.bin").write_text("weigh")
    assert not is_whole(folder)
    (folder / "whole.json").write_text("{" * 9999)
    assert not is_whole(folder)


@pytest.mark.parametrize("file", ["full/model.bin", "settings.json", "full/config.json"])
def test_a_damaged_conversion_is_made_anew(file, cache, random_whisper, speech, tmp_path, capsys):
    path = write_media(tmp_path / "x.wav", speech)
    folder = converted(resolve(str(random_whisper)))
    before = (folder / file).read_bytes()
    (folder / file).write_bytes(before[: len(before) // 2])
    assert outcome(["monitor", random_whisper, path, "--quiet"], capsys)[0] == 0
    assert (folder / file).read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "nan"])
def test_damaged_samples_in_the_cache_are_decoded_anew(damage, cache, tmp_path):
    folder = write_dataset(tmp_path / "set", ["a"])
    [before] = load_clips(folder, DataConfig(), name="train").clips
    [path] = cache.glob("audio/*/*.npy")
    whole = path.read_bytes()
    samples = np.full(100, np.nan if damage == "nan" else 0, np.float16 if damage == "nan" else int)
    content = io.BytesIO()
    np.save(content, samples)
    path.write_bytes({"cut": whole[:-50], "empty": b""}.get(damage, content.getvalue()))
    [after] = load_clips(folder, DataConfig(), name="train").clips
    assert (after.digest, path.read_bytes()) == (before.digest, whole)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", None])
def test_damaged_weights_of_voice_activity_are_made_anew(content, cache, speech):
    voice_activity._network.cache_clear()
    found = voice_activity._network()
    [path] = cache.glob("voice_activity/*.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    voice_activity._network.cache_clear()
    again = voice_activity._network()
    assert path.stat().st_size == len(whole)
    frames = np.zeros((3, 576), np.float32)
    state = (np.zeros(128, np.float32), np.zeros(128, np.float32))
    np.testing.assert_array_equal(found(frames, state)[0], again(frames, state)[0])
