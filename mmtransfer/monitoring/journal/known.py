"""What an earlier session of a monitor has dealt with, by its journal."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmtransfer.monitoring.events import (
    ClassifiedSound,
    FileDone,
    FolderState,
    LineKind,
    Recording,
    Sound,
    SourceEnd,
    recording_of,
)
from mmtransfer.monitoring.journal.records import record_of

_OF_SOURCES = (LineKind.END, LineKind.CUT, LineKind.READING, LineKind.FILE)


class Known:
    """All segments of `recordings` (cameras by name), and of the others those among `waiting`."""

    def __init__(self, recordings: Collection[str], waiting: Collection[str]):
        self._recordings, self._waiting = recordings, waiting
        self.ids: dict[str, set[str]] = {}
        """Segments by camera."""
        self.ends: dict[str, SourceEnd] = {}
        """The last end of a recording, by camera."""
        self.folders: dict[str, FolderState] = {}
        """What was read of folders, by camera."""
        self.sounds: dict[str, dict[str, list[float]]] = {}
        """When there were loud sounds, by camera and recording."""
        self.classified: dict[str, list[ClassifiedSound]] = {}
        """Sounds of classes, by camera."""
        self._reading: dict[str, dict[str, Recording]] = {}  # by camera and beginning of ids

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in the next line of the journal.

        Raises:
            ValueError: it is damaged.
        """
        camera = line["camera"]
        if "id" in line:
            self._add_segment(camera, line)
        elif line.get("event") in _OF_SOURCES:
            record = record_of(line)
            if isinstance(record, SourceEnd):
                self.ends[camera] = record
            elif isinstance(record, Recording):
                self.folders.setdefault(camera, FolderState())
                self._reading.setdefault(camera, {})[record.of] = record
            elif isinstance(record, FileDone):
                self._add_file(camera, record)

    def _add_segment(self, camera: str, line: Mapping[str, Any]) -> None:
        name, end = line["id"], line.get("end")
        # The whole line is not checked: there are months of them.
        if not isinstance(name, str) or not isinstance(end, int | float):
            raise ValueError(f"expected a segment's id and end, found {name!r:.40} and {end!r:.40}")
        if camera not in self._recordings and name not in self._waiting:
            return
        of = recording_of(name)
        file = self._reading.get(camera, {}).get(of)
        if line.get("event") == LineKind.SOUND:
            sound = record_of(line)
            assert isinstance(sound, Sound)
            self.sounds.setdefault(camera, {}).setdefault(of, []).append(sound.start)
        elif line.get("event") == LineKind.SOUND_CLASS:
            classified = record_of(line)
            assert isinstance(classified, ClassifiedSound)
            self.classified.setdefault(camera, []).append(classified)
        elif file is not None:
            # Segments come in order: what lies before the end of one has been decoded.
            begun = (end - file.at, file.size, file.probe)
            self.folders[camera].begun[file.name, file.inode] = begun
        self.ids.setdefault(camera, set()).add(name)

    def _add_file(self, camera: str, file: FileDone) -> None:
        state = self.folders.setdefault(camera, FolderState())
        state.done.pop((file.name, file.inode), None)  # the last of a name comes last
        state.done[file.name, file.inode] = file
        state.begun.pop((file.name, file.inode), None)
        state.into.pop(file.name, None)
        if file.into:
            state.into[file.into] = file.into_s
