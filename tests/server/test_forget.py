"""What is to be forgotten is in no byte of any file afterwards, and the rest is as it was."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.journals import NOON, alert, delivered, sound, text, time_zone, write

from mmtransfer.cli import main
from mmtransfer.monitoring import Camera, Journal, Transcript
from mmtransfer.monitoring.journal.files import journal_files, locked, parsed, whole_lines
from mmtransfer.monitoring.journal.spool import Spool
from mmtransfer.monitoring.retention import Keeper
from mmtransfer.monitoring.sources.cameras import Retention
from mmtransfer.server.index import FILE_NAME, Index
from mmtransfer.speech.segments import Segment

DAYS = ("2025-11-24", "2025-11-25")
EARLIER = NOON - 86400
WORDS = [{"text": " Hexburn", "start": NOON, "end": NOON + 1, "probability": 0.9}]


def everything(folder: Path) -> bytes:
    """All bytes of all files."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def lines(journal):
    return [parsed(raw) for path in journal_files(journal) for raw in whole_lines(path)]


@pytest.fixture
def place(tmp_path):
    """A journal of two days with clips, an index and audio that waits."""
    journal, clips = tmp_path / "journal", tmp_path / "clips"
    filler = [text("yard", EARLIER + n, f"filler{n} quiet morning") for n in range(3000)]
    old = text("gate", EARLIER, "The password is Xylophon.")
    write(journal, DAYS[0], old, alert(old, "password", clips), *filler)
    secret = text("gate", NOON, "Call Hexburn now.", words=WORDS)
    near = text("gate", NOON + 4, "A fire, quickly!")
    write(journal, DAYS[1], secret, alert(secret, "Hexburn", clips), delivered(secret, "Hexburn"))
    write(journal, DAYS[1], near, alert(near, "fire", clips), sound("yard", NOON, "alarm"))
    write(journal, DAYS[1], text("yard", NOON + 60, "仓库着火了"))
    spool = Spool(journal / "spool")
    for camera, start in (("gate", EARLIER), ("yard", NOON)):
        samples = np.zeros(1600, np.float32)
        spool.add(camera, f"{camera}@{start}", Segment(start, start + 0.1, samples, start))
    with Index(journal / FILE_NAME) as index:
        index.catch_up(journal)
    return tmp_path


def forget(place, *arguments):
    return main(["forget", "--journal", str(place / "journal"), *arguments])


def search(place, query, **filters):
    with Index(place / "journal" / FILE_NAME) as index:
        return [hit.text for hit in index.search(query, **filters).hits]


def test_a_phrase_leaves_no_byte_behind(place, capsys):
    assert forget(place, "--text", "hexburn", "--dry-run") == 0
    assert "would forget 1 lines, 2 alerts" in capsys.readouterr().out
    assert b"Hexburn" in everything(place)
    before = [line for line in lines(place / "journal") if "Hexburn" not in json.dumps(line)]
    assert forget(place, "--text", "hexburn") == 0
    # The other alert's clip goes as well: it holds the seconds before that alert.
    assert "forgot 1 lines, 2 alerts, sounds and other events, 2 clips," in capsys.readouterr().out
    assert b"hexburn" not in everything(place).lower()
    kept = [line for line in lines(place / "journal") if line.get("event") != "forgotten"]
    assert kept == before
    assert search(place, "hexburn") == []
    assert search(place, "fire") == ["A fire, quickly!"]
    assert search(place, "", alert=True) == ["A fire, quickly!", "The password is Xylophon."]
    with Index(place / "again.sqlite") as index:  # as it is made of the journal
        index.rebuild(place / "journal")
        assert index.names("alert") == ["fire", "password"]
        assert index.search("hexburn").hits == []


def test_a_phrase_in_another_script_and_form_is_found(place):
    assert forget(place, "--text", "着火") == 0
    assert "着火".encode() not in everything(place)
    assert search(place, "火") == []
    assert forget(place, "--text", "PASSWORD  IS, xylophon") == 0  # by its words
    assert b"Xylophon" not in everything(place)


def test_what_was_before_a_day_is_forgotten(place, capsys):
    assert forget(place, "--before", "2025-11-25") == 0
    assert "forgot 3001 lines, 1 alerts" in capsys.readouterr().out
    left = everything(place)
    assert b"Xylophon" not in left
    assert b"filler" not in left
    assert b"Hexburn" in left
    assert [path.name[:10] for path in journal_files(place / "journal")] == [DAYS[1]]
    assert len(list((place / "clips").rglob("*.mkv"))) == 2
    assert len(list((place / "journal" / "spool").iterdir())) == 1
    assert search(place, "filler1") == []
    assert search(place, "hexburn") == ["Call Hexburn now."]


def test_a_camera_is_forgotten_and_conditions_are_true_together(place, capsys):
    assert forget(place, "--camera", "gate", "--before", "2025-11-25") == 0
    assert "forgot 1 lines, 1 alerts, sounds and other events, 1 clips" in capsys.readouterr().out
    assert forget(place, "--camera", "gate") == 0
    left = everything(place)
    for words in (b"Xylophon", b"Hexburn", b"fire"):
        assert words not in left
    assert b"filler2999" in left
    assert list((place / "clips").rglob("*.mkv")) == []
    assert search(place, "", camera="gate") == []
    assert len(search(place, "filler7")) > 0


def test_clips_that_have_moved_are_found_where_they_are(place, capsys):
    (place / "clips").rename(place / "moved")
    assert forget(place, "--text", "hexburn", "--dry-run") == 0
    assert "0 clips (2 more are not there)" in capsys.readouterr().out
    assert forget(place, "--text", "hexburn", "--clips", str(place / "moved")) == 0
    assert "2 clips," in capsys.readouterr().out


def test_a_journal_names_no_other_files_to_remove(place):
    other = place / "other.mkv"
    other.write_bytes(b"")
    line = text("gate", NOON + 9, "Remove this.")
    write(place / "journal", DAYS[1], line, {**alert(line, "this"), "clip": str(other)})
    assert forget(place, "--text", "remove this") == 0
    assert other.exists()


def test_a_journal_that_is_being_written_is_left_alone(place, capsys):
    with locked(place / "journal"):
        assert forget(place, "--camera", "gate") == 2
    assert "another monitor is writing this journal" in capsys.readouterr().err
    assert b"Hexburn" in everything(place)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "expected a time, a camera or a phrase"),
        (["--text", "..."], "expected a phrase with words"),
        (["--before", "soon"], "expected a date like"),
    ],
)
def test_what_says_nothing_forgets_nothing(place, capsys, arguments, why):
    before = everything(place)
    assert forget(place, *arguments) == 2
    assert why in capsys.readouterr().err
    assert everything(place) == before


def test_a_damaged_line_with_the_phrase_goes_too(place):
    (path, *_) = journal_files(place / "journal")
    with path.open("ab") as file:
        file.write(b'{"camera": "gate", "text": "Hexburn \xff\n{"camera": "gate", "text": "Hexb')
    assert forget(place, "--text", "Hexburn") == 0
    assert b"Hexb" not in everything(place)


DAMAGED_TIMES = [b'"foo"', b"null", b"[]", b"NaN", b"Infinity", b"1" + b"0" * 400]


@pytest.mark.parametrize("start", DAMAGED_TIMES)
@pytest.mark.parametrize("event", [b"", b'"event": "alert", "keyword": "fire", '])
def test_a_line_without_a_time_keeps_none_from_being_forgotten(place, start, event):
    clip = next((place / "clips" / "gate").glob("gate@1764072000*"))
    line = (
        b'{"camera": "gate", %s"id": "%s", "start": %s, "end": %s, "text": "Hexburn", "clip": "%s"}'
    )
    path, *_ = journal_files(place / "journal")
    with path.open("ab") as file:
        file.write(line % (event, clip.stem.encode(), start, start, bytes(clip)) + b"\n")
    assert forget(place, "--text", "hexburn") == 0
    assert b"hexburn" not in everything(place).lower()
    assert search(place, "hexburn") == []


def test_forgotten_segments_of_a_recording_are_not_transcribed_again(tmp_path):
    video = tmp_path / "talk.wav"
    video.write_bytes(b"RIFF")
    sources = {"talk": str(video)}
    journal = Journal(tmp_path / "journal", model="m", model_digest="d", sources=sources)
    journal.write(text("talk", 3.0, "Hexburn opens."), text("talk", 9.0, "It closes."))
    journal.close()
    assert forget(tmp_path, "--text", "hexburn") == 0
    again = Journal(tmp_path / "journal", model="m", model_digest="d", sources=sources)
    assert again.known(["talk"], []).ids == {"talk": {"talk@3.000", "talk@9.000"}}
    found = [record for record, _ in again.records()]
    assert [record.text for record in found if isinstance(record, Transcript)] == ["It closes."]
    assert again.damaged == 0
    again.close()


@pytest.mark.parametrize("own", ["UTC0", "LINT-14", "HST10"])
@pytest.mark.parametrize("indexed", ["CET-1", "HST10", "LINT-14"])
@pytest.mark.parametrize("what", [("--text", "hexburn"), ("--before", "2025-11-26")])
def test_lines_of_recordings_are_forgotten_in_every_time_zone(tmp_path, own, indexed, what):
    """They have their times from the day on which they were transcribed."""
    journal = tmp_path / "journal"
    secret, kept = text("talk", 3.0, "Hexburn opens."), text("hall", 3.0, "Hexbury opens.")
    later = text("talk", 3.0, "It closes.")  # has the same id
    write(journal, DAYS[1], secret, alert(secret, "hexburn"), kept)
    write(journal, "2025-11-29", later)
    with time_zone(indexed), Index(journal / FILE_NAME) as index:
        index.catch_up(journal)
        assert len(index.search("hexburn").hits) == 1
    with time_zone(own):
        assert forget(tmp_path, *what) == 0
    if what[0] == "--text":
        assert search(tmp_path, "hexbury") == [kept["text"]]
    assert b"hexburn" not in everything(tmp_path).lower()
    assert search(tmp_path, "closes") == [later["text"]]


def test_forgetting_that_was_broken_off_is_finished_by_the_same_again(place, monkeypatch):
    from mmtransfer.monitoring.journal import forgetting

    with monkeypatch.context() as patch:
        patch.setattr(forgetting, "_overwrite", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forget(place, "--text", "hexburn")
    assert forget(place, "--text", "hexburn") == 0
    assert b"Hexburn" not in everything(place)


def test_a_monitor_keeps_nothing_longer_than_it_may(place):
    cameras = [
        Camera("gate", "rtsp://10.0.0.7/gate", retention=Retention(text=0.6, clips=0.5)),
        Camera("yard", "rtsp://10.0.0.7/yard"),
    ]
    sources = {camera.name: camera.url for camera in cameras}
    for path in journal_files(place / "journal"):  # it has no header yet
        path.rename(place / path.name)
    journal = Journal(place / "journal", model="m", model_digest="d", sources=sources)
    for day in DAYS:
        (place / f"{day}.0000.jsonl").rename(place / "journal" / f"{day}.0000.jsonl")
    now = NOON + 0.1 * 86400
    for path in (place / "clips").rglob("*.mkv"):
        os.utime(path, (now, now - 0.55 * 86400 * ("@" + str(int(EARLIER)) in path.name)))
    keeper = Keeper(cameras, journal, place / "clips")
    assert keeper.is_needed
    keeper.enforce(now)
    journal.write(text("gate", NOON + 100, "Still here."))
    assert len(list((place / "clips").rglob("*.mkv"))) == 2
    with Index(place / "journal" / FILE_NAME) as index:
        index.catch_up(place / "journal")
    left = everything(place)
    assert b"Xylophon" not in left
    assert b"Hexburn" in left
    assert b"filler42" in left  # the other camera's is kept
    keeper.enforce(now + 0.6 * 86400)
    assert b"Hexburn" not in (place / "journal" / f"{DAYS[1]}.0000.jsonl").read_bytes()
    assert list((place / "clips").rglob("*.mkv")) == []
    journal.close()


def test_what_was_written_after_the_last_look_at_a_file_is_removed_in_its_time(tmp_path):
    cameras = [
        Camera("gate", "rtsp://10.0.0.7/gate", retention=Retention(text=1)),
        Camera("yard", "rtsp://10.0.0.7/yard"),
    ]
    sources = {camera.name: camera.url for camera in cameras}
    folder = tmp_path / "journal"
    journal = Journal(folder, model="m", model_digest="d", sources=sources)
    write(folder, DAYS[0], text("yard", EARLIER, "All is well."))
    keeper = Keeper(cameras, journal, None)
    keeper.enforce(EARLIER)
    write(folder, DAYS[0], text("gate", EARLIER + 1800, "The password is Xylophon."))
    write(folder, DAYS[1], text("yard", NOON, "All is swell."))  # the day has changed
    keeper.enforce(NOON)
    assert b"Xylophon" in everything(folder)
    keeper.enforce(NOON + 3600)
    assert b"Xylophon" not in everything(folder)
    journal.close()


def test_a_line_without_a_time_goes_with_its_day(tmp_path):
    cameras = [Camera("gate", "rtsp://10.0.0.7/gate", retention=Retention(text=1))]
    folder = tmp_path / "journal"
    journal = Journal(folder, model="m", model_digest="d", sources={"gate": cameras[0].url})
    line = b'{"camera": "gate", "id": "gate@1", "start": %s, "text": "Xylophon"}\n'
    path = folder / f"{DAYS[0]}.0000.jsonl"
    path.write_bytes(b"".join(line % start for start in DAMAGED_TIMES))
    keeper = Keeper(cameras, journal, None)
    keeper.enforce(EARLIER)
    assert path.read_bytes().count(b"Xylophon") == len(DAMAGED_TIMES)
    keeper.enforce(NOON + 86400)
    assert b"Xylophon" not in everything(folder)
    journal.close()
