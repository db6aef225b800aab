import csv
import json
import os

import numpy as np
import pytest
from conftest import tone, write_dataset, write_media
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.config import DataConfig
from mmtransfer.errors import UserError
from mmtransfer.speech.clips import (
    Clip,
    ClipSet,
    find_leaks,
    hold_out,
    load_clips,
    read_clips,
    refuse_leaks,
)

CONFIG = DataConfig()


def test_folder_with_metadata(tmp_path):
    folder = write_dataset(tmp_path / "set", ["one two", "", "three"], groups=["a", "b", "a"])
    clips = load_clips(folder, CONFIG, name="train")
    assert [clip.text for clip in clips.clips] == ["one two", "", "three"]
    assert [clip.group for clip in clips.clips] == ["a", "b", "a"]
    assert clips.seconds == pytest.approx(1.0 + 1.25 + 1.5, abs=0.01)
    assert clips.clips[0].samples().dtype == np.float32


def test_manifests_with_spans(tmp_path):
    write_media(tmp_path / "long.wav", tone(6.0))
    rows = [
        {"file_name": "long.wav", "transcription": "a", "start": 0, "end": 2},
        {"file_name": "long.wav", "transcription": "b", "start": 3.5, "end": 5},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("m.jsonl", "m.csv"):
        clips = load_clips(tmp_path / name, CONFIG, name="x").clips
        assert [clip.seconds for clip in clips] == pytest.approx([2.0, 1.5], abs=0.01)


def test_subtitled_videos_are_cut_by_their_cues(tmp_path):
    write_media(tmp_path / "talk.mp4", tone(6.0), video=True)
    (tmp_path / "talk.srt").write_text(
        "1\r\n00:00:00,500 --> 00:00:02,000\r\nHello\r\n<i>there</i>\r\n\r\n"
        "2\r\n00:00:03,000 --> 00:00:05,250\r\nGood bye\r\n"
    )
    write_media(tmp_path / "more.mkv", tone(3.0), video=True)
    (tmp_path / "more.en.vtt").write_text(
        "WEBVTT\n\nNOTE nothing\n\n00:01.000 --> 00:02.500 align:start\n<v Ann>Yes"
    )
    clips = load_clips(tmp_path, CONFIG, name="x").clips
    found = {(clip.path.name, clip.text, clip.start, clip.end) for clip in clips}
    assert found == {
        ("talk.mp4", "Hello there", 0.5, 2.0),
        ("talk.mp4", "Good bye", 3.0, 5.25),
        ("more.mkv", "Yes", 1.0, 2.5),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,transcription\na.wav,x\n", r"column 'file_name' not found.*Set data\.file_column"),
        ("file_name,text\na.wav,x\n", r"column 'transcription' not found; columns are file_name"),
        ("", "empty"),
        ("file_name,transcription,start,end\na.wav,x,3,2\n", "not after start"),
        ("file_name,transcription,start,end\na.wav,x,zero,2\n", "expected seconds, found 'zero'"),
        ("file_name,transcription\n,x\n", "is empty"),
    ],
)
def test_bad_manifests_get_one_clear_line(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_clips(tmp_path, CONFIG)


def test_other_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_clips(tmp_path / "nothing", CONFIG)
    with pytest.raises(UserError, match=r"expected metadata\.csv"):
        read_clips(tmp_path, CONFIG)
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nx")
    with pytest.raises(UserError, match="no recording of the same name"):
        read_clips(tmp_path, CONFIG)
    (tmp_path / "m.csv").write_bytes("file_name,transcription\na.wav,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_clips(tmp_path / "m.csv", CONFIG)
    (tmp_path / "m.jsonl").write_text('{"file_name": "a"')
    with pytest.raises(UserError, match=r"m\.jsonl:1: not valid JSON"):
        read_clips(tmp_path / "m.jsonl", CONFIG)


def test_undecodable_files_are_named_and_counted(tmp_path):
    folder = write_dataset(tmp_path / "set", [f"t{i}" for i in range(25)], seconds=0.5)
    (folder / "clip3.wav").write_text("broken")
    clips = load_clips(folder, CONFIG, name="train")
    assert len(clips) == 24
    assert len(clips.skipped) == 1
    assert "clip3.wav" in clips.skipped[0]
    (folder / "clip4.wav").unlink()
    with pytest.raises(UserError, match=r"2 of 25 clips could not be decoded.*clip3\.wav"):
        load_clips(folder, CONFIG, name="train")
    assert len(load_clips(folder, DataConfig(max_undecodable=0.2), name="train")) == 23


def test_overlong_clips_are_left_out_and_listed(tmp_path):
    folder = write_dataset(tmp_path / "set", ["a", "b"], seconds=1.0)
    clips = load_clips(folder, CONFIG, name="train", max_seconds=1.1)
    assert [clip.text for clip in clips.clips] == ["a"]
    assert "longer than 1.1 s" in clips.skipped[0]


def test_decoded_clips_are_cached_and_the_cache_is_never_stale(tmp_path, monkeypatch):
    from mmtransfer.speech import clips as data

    folder = write_dataset(tmp_path / "set", ["a", "b"])
    first = load_clips(folder, CONFIG, name="train").clips
    monkeypatch.setattr(data, "decode_clip", lambda *_: pytest.fail("decoded again"))
    again = load_clips(folder, CONFIG, name="train").clips
    assert [clip.digest for clip in again] == [clip.digest for clip in first]
    monkeypatch.undo()
    write_media(folder / "clip0.wav", tone(1.0, hertz=900))
    second = load_clips(folder, CONFIG, name="train").clips
    assert second[0].digest != first[0].digest
    before = (folder / "clip0.wav").stat()
    write_media(folder / "clip0.wav", tone(1.0, hertz=700))
    os.utime(folder / "clip0.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "clip0.wav").stat().st_size == before.st_size
    assert load_clips(folder, CONFIG, name="train").clips[0].digest != second[0].digest


clips_strategy = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(0, 12), st.integers(0, 9)),
    min_size=2,
    max_size=60,
)


@settings(max_examples=200)
@given(clips_strategy, st.floats(0.05, 0.5), st.integers(0, 3))
def test_held_out_clips_share_no_group_file_or_audio(rows, fraction, seed):
    from pathlib import Path

    clips = [
        Clip(Path(f"/x/{file}.wav"), "t", group=group, digest=f"d{file}-{audio}")
        for group, file, audio in rows
    ]
    try:
        train, held = hold_out(clips, fraction, seed)
    except UserError:
        return  # everything belongs together
    assert sorted(train + held) == list(range(len(clips)))
    assert train
    assert held

    def keys(indices):
        named = {clips[i].group or clips[i].path for i in indices}
        return named, {clips[i].digest for i in indices}

    for one, other in zip(keys(train), keys(held), strict=True):
        assert not one & other


def test_one_group_cannot_be_held_out(tmp_path):
    folder = write_dataset(tmp_path / "set", ["a", "b", "c"], groups=["x", "x", "x"])
    clips = load_clips(folder, CONFIG, name="train").clips
    with pytest.raises(UserError, match="one group"):
        hold_out(clips, 0.1, 0)


def test_leaks_are_refused_unless_allowed_by_name(tmp_path):
    train = write_dataset(tmp_path / "train", ["a", "b"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "copy.wav").write_bytes((train / "clip0.wav").read_bytes())
    (other / "metadata.csv").write_text("file_name,transcription\ncopy.wav,a\n")
    first = load_clips(train, CONFIG, name="train")
    copied = load_clips(other, CONFIG, name="validation")
    with pytest.raises(UserError, match=r"same-audio.*copy\.wav = clip0\.wav \(same text\)"):
        refuse_leaks(first, copied, [])
    assert refuse_leaks(first, copied, ["same-audio"])["same-audio"]
    with pytest.raises(UserError, match="same-recording"):
        refuse_leaks(first, first, ["same-audio"])


def test_disjoint_spans_of_one_file_are_no_leak_and_silence_is_none(tmp_path):
    write_media(tmp_path / "a.wav", np.zeros(64_000, np.float32))
    rows = "file_name,transcription,start,end\na.wav,,{},{}\n"
    sets = []
    for start, end in ((0, 1), (1, 2), (0.5, 1.5)):
        path = tmp_path / f"{start}.csv"
        path.write_text(rows.format(start, end))
        sets.append(load_clips(path, CONFIG, name=path.stem).clips)
    assert find_leaks(sets[0], sets[1]) == {}
    assert list(find_leaks(sets[0], sets[2])) == ["same-recording"]


def test_empty_set_type():
    assert ClipSet("x", []).seconds == 0
