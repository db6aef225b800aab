"""The cache folder, and atomic writes into it."""

import atexit
import errno
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
_SEAL = "whole.json"
_FULL_BYTES = 1 << 20  # a disk with less is full
_stand_ins: dict[Path, Path] = {}  # by cache root that cannot be written
_making_one = threading.Lock()


def cache_path(*parts: str) -> Path:
    """Where a thing of that name lies below the cache root (`MMTRANSFER_CACHE`, else the user's
    cache folder), or may be put; the folder around it exists.

    What a cache holds is used whether it can be written or not. What it lacks and cannot take goes
    into a folder that lives as long as the process.

    Raises:
        UserError: neither that, nor a temporary folder can be written.
    """
    root = _root()
    path = root.joinpath(*parts)
    if _exists(path) or root not in _stand_ins:
        try:
            if _exists(path):
                if _is_trusted(path, root):
                    return path
                logger.warning("%s: is another user's, or others may write it; made anew", path)
                remove(path)
            make_private(path.parent)
            tempfile.TemporaryFile(dir=path.parent).close()  # access rights alone do not tell
            return path
        except OSError as error:
            _stand_in(root, error)
    path = _stand_ins[root].joinpath(*parts)
    make_private(path.parent)
    return path


def _is_trusted(path: Path, root: Path) -> bool:
    """Whether what a cache holds can only have been put there by this user, the system's or, where
    others cannot write into it, the cache's own.
    """
    if not hasattr(os, "geteuid"):
        return True
    folder, found, own = root.stat(), path.lstat(), os.geteuid()
    if folder.st_uid == own and not folder.st_mode & stat.S_IRWXO:
        return True
    owners = {own, 0}
    if not folder.st_mode & stat.S_IWOTH:
        owners.add(folder.st_uid)
    is_open = found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode)
    return found.st_uid in owners and not is_open


def make_private(folder: Path) -> None:
    """Make a folder that is not there yet, for this user alone."""
    missing = [folder, *folder.parents]
    for path in reversed(missing[: next(i for i, path in enumerate(missing) if path.is_dir())]):
        path.mkdir(mode=0o700, exist_ok=True)


def open_private(path: Path, mode: str, *, follow: bool = False, **options: Any) -> IO[Any]:
    """Open a file to write; a new one is for this user alone.

    A link in its place is not followed; with `follow` one that this user made is.

    Raises:
        UserError: a link.
    """
    is_own = follow and path.is_symlink() and path.lstat().st_uid == os.geteuid()
    extra = 0 if is_own else getattr(os, "O_NOFOLLOW", 0)
    try:
        return open(path, mode, opener=lambda p, flags: os.open(p, flags | extra, 0o600), **options)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path}: expected a file to write, found a link. Remove it.") from None


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Note what a finished folder of the cache holds; see `is_whole`."""
    (folder / _SEAL).write_text(json.dumps(_sizes(folder)), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a folder of the cache is there as it was sealed, by the sizes of its files."""
    try:
        sizes = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return bool(sizes == _sizes(folder))


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _SEAL
    }


def _root() -> Path:
    named = os.environ.get("MMTRANSFER_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "mmtransfer"
    except RuntimeError:  # a user without a home
        return Path("/nonexistent/.cache/mmtransfer")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be looked into
        return False


def _stand_in(root: Path, error: OSError) -> None:
    """Make a folder for what the cache cannot take."""
    with _making_one:
        if root in _stand_ins:
            return
        reason = error.strerror or str(error)
        what = f"the cache folder {root} cannot be written ({reason})"
        remedy = "set MMTRANSFER_CACHE to a folder that can"
        try:
            _stand_ins[root] = Path(tempfile.mkdtemp(prefix="mmtransfer-cache-"))
        except OSError:
            raise UserError(f"{what}, nor can a temporary one; {remedy}.") from None
        atexit.register(shutil.rmtree, _stand_ins[root], ignore_errors=True)
        logger.warning("%s: what it lacks is made anew at every start; %s", what, remedy)


def put(path: Path, write: Callable[[Path], object]) -> Path:
    """Make the thing that is missing at a path from `cache_path`: `write` creates a file or folder
    at the path that it gets. Returns where it lies: elsewhere, for as long as the process lives,
    where the cache's disk is full.
    """
    root, is_full = _root(), False
    try:
        with atomic_path(path) as part:
            try:
                write(part)
            except Exception as error:  # libraries wrap it: SafetensorError, RuntimeError
                is_full = _is_full(error, path.parent)  # while the part takes the room
                raise
        return path
    except Exception:
        if not is_full or not path.is_relative_to(root):
            raise
        _stand_in(root, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        path = _stand_ins[root] / path.relative_to(root)
        make_private(path.parent)
        with atomic_path(path) as part:
            write(part)
        return path


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if os.strerror(errno.ENOSPC) in str(error):  # all of it was asked for at once, and refused
        return True
    return shutil.disk_usage(folder).free < _FULL_BYTES


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends without error.

    The block may create a file or a folder there. A reader sees the old thing or the whole new
    one, never a part; after an error nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        yield part
        if target.is_dir():  # os.replace cannot put a folder in the place of a full one
            old = part.with_suffix(".old")
            os.replace(target, old)
            os.replace(part, target)
            shutil.rmtree(old)
        else:
            os.replace(part, target)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
