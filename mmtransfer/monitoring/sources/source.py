"""A source at work: its camera, its recogniser, and what earlier sessions have dealt with."""

from __future__ import annotations

import math
import threading
from pathlib import Path

from mmtransfer.data.printing import printable
from mmtransfer.monitoring.events import (
    ClassifiedSound,
    FolderState,
    Recording,
    Sound,
    recording_of,
)
from mmtransfer.monitoring.fair_queue import BATCH_SEGMENTS
from mmtransfer.monitoring.journal.known import Known
from mmtransfer.monitoring.keywords import Keywords
from mmtransfer.monitoring.redaction import Redactor
from mmtransfer.monitoring.silence import Silences
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.clips import Recorder
from mmtransfer.monitoring.sources.kinds import goes_on, is_folder
from mmtransfer.monitoring.stats import CameraStats
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import is_piped
from mmtransfer.speech.recognition import Recognizer

WAITING_SEGMENTS = 48
"""Of all sources together, that may wait in memory: recognition may be slower than reading."""
_AHEAD = 24  # of a recording: two workers' batches and half as many, each up to a window long
_RECORDINGS = 4096  # more than there are segments in work
_SAME_SOUND_S = 1.0  # a sound is reported again after a second of less at the soonest


class Source:
    """One of `count` sources of a run, which share the places of `waiting` segments."""

    def __init__(
        self,
        number: int,
        camera: Camera,
        recognizer: Recognizer,
        stats: CameraStats,
        count: int,
        waiting: int = WAITING_SEGMENTS,
    ):
        self.number, self.camera, self.name = number, camera, camera.name
        self.recognizer, self.stats = recognizer, stats
        self.address = printable(public_address(camera.url))
        """As it is shown."""
        self.is_live, self.is_folder = goes_on(camera), is_folder(camera.url)
        self.is_piped = is_piped(camera.url)
        self.keywords = Keywords(camera.keywords)
        self.redactor = Redactor(camera.redact) if camera.redact else None
        """What takes out of its texts what nobody may find later."""
        self.silences: Silences | None = None
        """What is silent in its clips, where they are redacted as well."""
        if self.redactor is not None and camera.redact_clips:
            self.silences = Silences(math.inf if self.is_live else 0.0)
        self.most = max(BATCH_SEGMENTS, waiting // max(1, count))
        """Segments of it that may be in memory."""
        self.room = threading.Semaphore(min(self.most, _AHEAD))
        """What a recording waits for."""
        self.stopping = threading.Event()
        """Set when its reader is to end."""
        self.recorder: Recorder | None = None
        """Of a live source, what keeps its last minute."""
        self.recordings: dict[str, Recording] = {}
        """The last files of a folder, by the beginning of their ids."""
        self.known: set[str] = set()
        """Segments that an earlier session has dealt with."""
        self.folder = FolderState()
        """What an earlier session has read of a folder."""
        self.has_ended, self.known_s = False, 0.0
        """Of a recording: whether an earlier session has read all of it, or how much of it."""
        self._sounds: dict[str, list[float]] = {}
        self._classified: dict[tuple[str, str], list[ClassifiedSound]] = {}

    @property
    def has_turns(self) -> bool:
        """Whether its segments are decoded again with the turn that they are of."""
        return self.is_live and self.recognizer.window_s > 0

    def take_up(self, known: Known) -> None:
        """What an earlier session has dealt with."""
        self.known = known.ids.get(self.name, set())
        self.folder = known.folders.get(self.name, self.folder)
        if self.is_folder:
            self._sounds = known.sounds.get(self.name, {})
        for sound in known.classified.get(self.name, ()):
            self._classified.setdefault((recording_of(sound.id), sound.label), []).append(sound)
        end = known.ends.get(self.name)
        if end is None or self.is_live or self.is_folder or self.is_piped:
            return
        path = Path(self.camera.url)
        size = path.stat().st_size if path.is_file() else None
        if size == end.size:
            self.has_ended = end.error is None
        else:  # it has grown, and is read on
            self.known_s = end.seconds

    def is_known_sound(self, sound: Sound | ClassifiedSound) -> bool:
        """Whether an earlier session has reported a sound; in a folder, where reading may begin in
        the middle of a file, not at the very same time. A sound of a class is known if it overlaps
        one: probabilities differ by a little from batch to batch.
        """
        if isinstance(sound, ClassifiedSound):
            same = self._classified.get((recording_of(sound.id), sound.label), ())
            return any(one.start < sound.end and sound.start < one.end for one in same)
        times = self._sounds.get(recording_of(sound.id), ())
        return sound.id in self.known or any(abs(at - sound.start) < _SAME_SOUND_S for at in times)

    def begin(self, recording: Recording) -> None:
        """A file of the folder is being read."""
        self.recordings[recording.of] = recording
        if len(self.recordings) > _RECORDINGS:
            del self.recordings[next(iter(self.recordings))]

    def address_of(self, identity: str) -> str:
        """Where a segment is from: the source, or the file of a folder."""
        recording = self.recordings.get(recording_of(identity))
        return printable(str(recording.path)) if recording is not None else self.address
