"""The cache folder, and atomic writes into it."""

import atexit
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
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
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()  # access rights alone do not tell
            return path
        except OSError as error:
            _stand_in(root, error)
    path = _stand_ins[root].joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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
