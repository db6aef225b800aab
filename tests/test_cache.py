"""A cache that cannot be written is no reason to stop."""

import errno
import logging
import os
import tempfile
from collections import namedtuple

import pytest
from conftest import write_dataset

from mmtransfer import cache
from mmtransfer.cache import atomic_path, cache_path
from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.hub.files import files_digest
from mmtransfer.speech.engines_ctranslate2 import converted

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache folder that has nothing to do with other tests'."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MMTRANSFER_CACHE", str(folder))
    return folder


@pytest.fixture
def read_only(root, monkeypatch):
    """The cache folder on a disk that takes nothing more; root may write anywhere else."""

    real = tempfile.TemporaryFile

    def refuse(**options):
        if str(options["dir"]).startswith(str(root)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(options["dir"]))
        return real(**options)

    def fill(name, text):
        path = cache_path(name)
        path.write_text(text)
        return path

    filled = fill("filled", "kept")
    monkeypatch.setattr("mmtransfer.cache.tempfile.TemporaryFile", refuse)
    return filled


def put(*parts):
    path = cache_path(*parts)
    with atomic_path(path) as part:
        part.write_text("made")
    return path


def test_what_is_put_into_a_writable_cache_stays_there(root, caplog):
    assert put("digests", "a") == root / "digests" / "a"
    assert cache_path("digests", "a").read_text() == "made"
    assert not caplog.records


def test_a_filled_cache_that_cannot_be_written_serves(read_only, caplog):
    assert cache_path("filled") == read_only
    assert cache_path("filled").read_text() == "kept"
    assert not caplog.records


def test_what_a_read_only_cache_lacks_goes_elsewhere(read_only, root, caplog):
    with caplog.at_level(logging.WARNING):
        made = put("digests", "b")
    assert not made.is_relative_to(root)
    assert cache_path("digests", "b") == made  # for as long as the process lives
    assert cache_path("filled") == read_only
    put("audio", "c")
    (record,) = caplog.records  # said once
    assert "MMTRANSFER_CACHE" in record.getMessage()
    assert str(root) in record.getMessage()


@pytest.mark.parametrize("below", ["file", "file/folder", "loop"])
def test_a_cache_that_is_no_folder_names_the_variable(tmp_path, monkeypatch, caplog, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("MMTRANSFER_CACHE", str(tmp_path / below))
    with caplog.at_level(logging.WARNING):
        assert put("x").read_text() == "made"
        assert len(files_digest([tmp_path / "file"])) == 64
    (record,) = caplog.records
    assert "MMTRANSFER_CACHE" in record.getMessage()


def test_nowhere_to_write_at_all_is_one_line(read_only, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mmtransfer.cache.tempfile.mkdtemp", full)
    with pytest.raises(UserError, match="MMTRANSFER_CACHE") as error:
        cache_path("new")
    assert "\n" not in str(error.value)


def test_a_model_is_evaluated_without_a_cache(random_whisper, tmp_path, monkeypatch, capsys):
    data = write_dataset(tmp_path / "data", ["gate one", "gate two"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMTRANSFER_CACHE", str(tmp_path / "file"))
    assert main(["evaluate", str(random_whisper), "--data", str(data)]) == 0
    assert "2 clips" in capsys.readouterr().out


def test_a_conversion_is_used_from_a_read_only_cache(root, random_whisper, monkeypatch):
    made = converted(resolve(str(random_whisper)))
    assert made.is_relative_to(root)

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("mmtransfer.cache.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("mmtransfer.cache.uuid.uuid4", refuse)  # nothing is written
    monkeypatch.setattr("mmtransfer.speech.whisper.load_speech_model", refuse)
    assert converted(resolve(str(random_whisper))) == made


def write_full(path):
    """As a disk that becomes full: a part is written."""
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_full_disk_does_not_take_lies_elsewhere_for_this_run(root, caplog):
    left = [write_full]

    def write(path):
        (left.pop() if left else (lambda p: p.write_text("whole")))(path)

    made = cache.put(cache_path("audio", "a.npy"), write)
    assert made.read_text() == "whole"
    assert not made.is_relative_to(root)
    assert [path for path in root.rglob("*") if path.is_file()] == []
    (record,) = caplog.records
    assert str(root) in record.getMessage()
    assert "MMTRANSFER_CACHE" in record.getMessage()
    # What comes next goes there at once.
    assert cache_path("audio", "b.npy").parent == made.parent


def test_another_error_while_a_thing_is_made_is_not_taken_for_a_full_disk(root):
    def write(path):
        raise PermissionError(errno.EACCES, "of a source")

    with pytest.raises(PermissionError):
        cache.put(cache_path("x"), write)


def test_a_full_disk_is_known_by_its_room_where_a_library_hides_the_reason(root, monkeypatch):
    def usage(folder):  # what is written in part takes the room until it is removed
        return Usage(9, 9, 0) if list(root.rglob("*.part")) else Usage(9, 0, 9 << 20)

    monkeypatch.setattr("mmtransfer.cache.shutil.disk_usage", usage)
    left = [ValueError("12 requested and 4 written")]

    def write(path):
        path.write_text("part")
        if left:
            raise left.pop()
        path.write_text("whole")

    assert cache.put(cache_path("x"), write).read_text() == "whole"


def test_a_full_disk_is_known_by_a_librarys_words_where_all_the_room_was_asked_for_at_once(root):
    left = [RuntimeError("I/O error: No space left on device (os error 28)")]

    def write(path):
        if left:
            raise left.pop()
        path.write_text("whole")

    assert not cache.put(cache_path("x"), write).is_relative_to(root)
