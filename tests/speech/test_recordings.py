"""One rule of what a recording is, wherever files are looked for."""

import os
import time
from pathlib import Path

import pytest
from conftest import tone, write_media

from mmtransfer.config import DataConfig
from mmtransfer.monitoring.sources.folders import Folder
from mmtransfer.monitoring.sources.kinds import is_live
from mmtransfer.speech.clips import read_clips
from mmtransfer.speech.recordings import (
    MEDIA_SUFFIXES,
    is_recording,
    is_visible,
    may_be_recording,
    visible_files,
)


def test_every_ending_of_a_recording_may_be_one():
    assert all(may_be_recording(f"talk{suffix}") for suffix in MEDIA_SUFFIXES)
    assert len(MEDIA_SUFFIXES) == len(set(MEDIA_SUFFIXES))
    assert is_recording("a/TALK.MP4")
    assert not is_recording("talk.xyz")
    assert may_be_recording("talk.xyz")
    assert not may_be_recording("talk.srt")


@pytest.mark.parametrize("suffix", [".opus", ".aac", ".ts", ".flv", ".mxf", ".m4b"])
def test_an_address_that_does_not_answer_and_a_folder_agree(tmp_path, suffix):
    path, old = tmp_path / f"gate{suffix}", time.time() - 60
    path.write_bytes(b"x")
    os.utime(path, (old, old))
    assert [unread.name for unread in Folder(tmp_path).look()] == [path.name]
    assert not is_live(f"http://site.example/{path.name}?token=1")
    assert is_live("http://site.example/gate.m3u8")


def test_data_beside_hidden_files_and_system_folders(tmp_path):
    for name in ("talk.wav", ".talk.wav", "@eaDir/talk.wav", "deep/talk.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_media(tmp_path / name, tone(1.0))
    assert visible_files(tmp_path) == [tmp_path / "deep" / "talk.wav", tmp_path / "talk.wav"]
    assert not is_visible(Path("a/#recycle/b.wav"), Path("a"))
    assert is_visible(Path(".hidden/b.wav"), Path(".hidden"))


def test_subtitles_go_with_the_recording_among_files_of_the_same_name(tmp_path):
    (tmp_path / "talk.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nopen the gate\n")
    write_media(tmp_path / "talk.wav", tone(2.0)).rename(tmp_path / "talk.odd")
    (clip,) = read_clips(str(tmp_path), DataConfig())
    assert clip.path.name == "talk.odd"  # nothing else can be meant
    write_media(tmp_path / "talk.wav", tone(2.0))
    (clip,) = read_clips(str(tmp_path), DataConfig())
    assert clip.path.name == "talk.wav"
