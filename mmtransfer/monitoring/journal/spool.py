"""Audio that waits to be recognised, on disk: it survives the process, and memory stays small."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.cache import atomic_path, make_private, open_private
from mmtransfer.data.files import check_regular
from mmtransfer.data.printing import json_line
from mmtransfer.errors import UserError
from mmtransfer.speech.segments import Segment

logger = logging.getLogger(__name__)
_LONGEST_HEAD = 1 << 16  # bytes
_LATEST_S = 1e11  # since 1970
_SUFFIX = ".segment"  # a line of JSON, then 16-bit samples


class Spool:
    """Segments of live sources, each in a file until it has been dealt with."""

    def __init__(self, folder: Path):
        self._folder = folder
        make_private(folder)
        self.bytes = sum(
            path.stat().st_size for path in folder.glob(f"*{_SUFFIX}") if path.is_file()
        )
        """Size of all that waits."""

    def _path(self, name: str) -> Path:
        return self._folder / (
            hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24] + _SUFFIX
        )

    def add(self, camera: str, name: str, segment: Segment) -> None:
        """Write a segment; when this returns, a killed process does not lose it."""
        head = {
            "camera": camera,
            "id": name,
            "start": segment.start,
            "end": segment.end,
            "samples_start": segment.samples_start,
            "samples": len(segment.samples),
        }
        samples = np.clip(np.round(segment.samples * 32768), -32768, 32767).astype("<i2")
        data = json_line(head).encode() + b"\n" + samples.tobytes()
        with atomic_path(self._path(name)) as part, open_private(part, "wb") as file:
            file.write(data)
        self.bytes += len(data)

    def holds(self, name: str) -> bool:
        """Whether a segment is on the disk."""
        return self._path(name).exists()

    def load(self, name: str) -> Segment:
        """A segment with its samples."""
        line, _, data = self._path(name).read_bytes().partition(b"\n")
        head = json.loads(line)
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        return Segment(head["start"], head["end"], samples, head["samples_start"])

    def remove(self, name: str) -> None:
        """A segment has been dealt with."""
        path = self._path(name)
        if path.exists():
            self.bytes -= path.stat().st_size
            path.unlink()

    def waiting(self) -> Iterator[tuple[str, str, Segment]]:
        """(camera, id, segment) of what an earlier session left, oldest first. The samples are
        not read: silence of the same length, which takes no memory, stands for them.
        """
        heads = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            head = self._head(path)
            if head is None:
                logger.warning("%s: corrupt; renamed to .damaged and skipped", path)
                path.replace(path.with_suffix(".damaged"))
            else:
                heads.append(head)
        for head in sorted(heads, key=lambda head: head["start"]):
            silence = np.broadcast_to(np.float32(0), head["samples"])
            segment = Segment(head["start"], head["end"], silence, head["samples_start"])
            yield head["camera"], head["id"], segment

    def _head(self, path: Path) -> dict[str, Any] | None:
        """What a file says of its segment; None if it is not as it was written."""
        try:
            size = check_regular(path)
            with path.open("rb") as file:
                line = file.readline(_LONGEST_HEAD)
            head = json.loads(line)
            texts = (head["camera"], head["id"])
            times = (head["start"], head["end"], head["samples_start"])
            is_whole = (
                all(isinstance(text, str) for text in texts)
                and all(type(at) in (int, float) and abs(at) < _LATEST_S for at in times)
                and type(head["samples"]) is int
                and len(line) + 2 * head["samples"] == size
                and path == self._path(head["id"])
            )
        except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return head if is_whole else None
