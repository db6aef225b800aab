"""A monitor by its options: sources, model, journal, outputs and channels put together."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from mmtransfer.cache import make_private
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.monitoring.delivery import open_channels, take_up
from mmtransfer.monitoring.events import Item, Raised, Shown, SourceEnd, SourceEvent, Stopped
from mmtransfer.monitoring.journal.forgetting import Forgotten, Rule, forget
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.keywords import Keywords
from mmtransfer.monitoring.loading import Recognizers, load_monitor, resolve_models
from mmtransfer.monitoring.memory import keep_steady, share_heap
from mmtransfer.monitoring.monitor import Monitor
from mmtransfer.monitoring.options import MonitorOptions
from mmtransfer.monitoring.outputs.alerts import Channel
from mmtransfer.monitoring.outputs.dashboard import host_and_port, metrics_server
from mmtransfer.monitoring.outputs.sinks import (
    OF_ONE_RECORDING,
    FileSink,
    ReportSink,
    Sink,
    check_outputs,
    output_path,
)
from mmtransfer.monitoring.redaction import Redactor
from mmtransfer.monitoring.retention import Keeper
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.monitoring.sources.kinds import goes_on, is_folder
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import MediaError, is_piped, open_media
from mmtransfer.speech.recognition import Recognizer

logger = logging.getLogger(__name__)
_OF_SOURCES = (
    "sources",
    "channels",
    "live",
    "keywords",
    "loud_db",
    "redact",
    "redact_clips",
    "retention",
)
"""Options that say something about the sources alone."""


def run(options: MonitorOptions, *, sinks: Sequence[Sink] = ()) -> MonitorStats:
    """Monitor until the sources end; transcripts and alerts go to outputs and channels of the
    options, and to `sinks`, which are closed at the end. Events of sources are logged.

    A source that cannot be opened or breaks off does not end the others; `failed` of what is
    returned says which did. To stop it before the sources end, or to get everything as it comes,
    use a `Session`.

    Raises:
        UserError: something that cannot be used.
        OSError: an output that cannot be written.

    Example:
        run(MonitorOptions("runs/site", sources=["gate.mp4"], output=["gate.srt"]))
    """
    with ExitStack() as opened:
        for sink in sinks:
            opened.callback(sink.close)
        session = opened.enter_context(Session(options))
        for item in session.items():
            if isinstance(item, SourceEvent):
                logger.info("%s: %s %s", item.camera, item.event, item.detail)
            elif isinstance(item, SourceEnd):
                if isinstance(item.error, MediaError):
                    logger.error("%s: %s", item.camera, item.error)
            else:
                for sink in sinks:
                    sink.write(item)
        return session.stats


class Session:
    """A monitor at work from `with` to its end. Everything that can be checked is, before anything
    is written; with a journal, what earlier sessions found is in the outputs as well, and alerts
    that never arrived are sent again. `open_speech` as of `load_monitor`; with `stays_open`,
    `items` goes on when all sources have ended, until `stop`, and `reload` may bring others.

    Raises:
        UserError: something that cannot be used.
        OSError: an output that cannot be written.

    Example:
        with Session(MonitorOptions("runs/site", sources=["rtsp://10.0.0.7/audio"])) as session:
            for item in session.items():
                print(item)
    """

    def __init__(
        self,
        options: MonitorOptions,
        *,
        open_speech: Callable[..., Recognizer] | None = None,
        stays_open: bool = False,
    ):
        self.options, self._opened = options, ExitStack()
        self._open_speech, self._stays_open = open_speech, stays_open
        self.cameras = options.cameras()
        """The sources, each separate channel as one of them."""
        self._monitor: Monitor
        self._journal: Journal | None = None
        self._channels: dict[str, Channel] = {}
        self._files: dict[str, list[Sink]] = {}
        self._sinks: dict[Path, Sink] = {}
        self._keeper: Keeper
        self._watched = list(self.cameras)
        self._changing = threading.Lock()

    def __enter__(self) -> Session:
        with ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def stats(self) -> MonitorStats:
        """What was done so far."""
        return self._monitor.stats

    def stop(self) -> None:
        """End `items` soon, from any thread: what has been cut is decoded within a few seconds, or
        waits in the journal's spool for the next session.
        """
        self._monitor.stop()

    def items(self) -> Iterator[Item]:
        """What happens, until every source has ended; all of it has been written and sent before it
        is handed out.
        """
        for item in self._monitor.watch(
            self._watched, journal=self._journal, stays_open=self._stays_open
        ):
            if isinstance(item, Shown):
                for sink in self._files[item.camera]:
                    sink.write(item)
            if isinstance(item, Raised):
                for channel in self._channels.values():
                    channel.send(asdict(item))
            yield item
            if isinstance(item, SourceEnd) and item.error is not None:
                is_known = isinstance(item.error, MediaError | Stopped)  # the other sources go on
                if not is_known and not self._monitor.is_stopping:
                    raise item.error

    def reload(
        self, options: MonitorOptions, off: Collection[str] = ()
    ) -> tuple[list[str], list[str]]:
        """Watch the sources of other options but those that are `off`, by name; from any thread,
        while `items` is at work. A source that is as it was goes on untouched, one that is not is
        cut where it is and opened again. Returns the names of those that go and those that come.

        Raises:
            UserError: something that cannot be used, or other options than those of sources that
                have changed; then all goes on as it was.
        """
        with self._changing:
            if not self._monitor.is_at_work:
                raise UserError("nothing is watched at the moment. Try again later.")
            self._check_same(options)
            known = {camera.name: camera for camera in self.cameras}
            cameras = [_as_known(camera, known.get(camera.name)) for camera in options.cameras()]
            wanted = [camera for camera in cameras if camera.name not in off]
            gone = [camera.name for camera in self._watched if camera not in wanted]
            fresh = [camera for camera in wanted if camera not in self._watched]
            outputs = [Path(path) for path in options.output]
            _check_places(options, fresh, outputs)
            _check_cameras(fresh)
            models = resolve_models(options, cameras)
            others = Recognizers(options, models, fresh, self._open_speech).own(fresh)
            files = self._open_files(cameras, outputs, self._opened)
            if self._journal is not None:
                self._journal.renew(**_identity(options, cameras, models))
            self._files = self._files | files  # what goes still has lines to come
            self._keeper.change(cameras)
            self._monitor.change(gone, fresh, others)
            self.options, self.cameras, self._watched = options, cameras, wanted
        return gone, [camera.name for camera in fresh]

    def forget(self, rule: Rule, *, dry_run: bool = False) -> Forgotten:
        """Forget in the journal and its clips, from any thread, while they are written; audio that
        waits to be recognised is left alone.

        Raises:
            UserError: there is no journal.
            OSError: a file that cannot be written.
        """
        if self._journal is None:
            raise UserError("there is no journal to forget in: give --journal DIR.")
        clips = self.options.alert_clips
        return forget(
            *(self._journal.folder, rule, self._journal.write),
            recordings=[camera.name for camera in self.cameras if not goes_on(camera)],
            clips=Path(clips) if clips is not None else None,
            dry_run=dry_run,
        )

    def _check_same(self, options: MonitorOptions) -> None:
        changed = [
            field.name
            for field in fields(MonitorOptions)
            if field.name not in _OF_SOURCES
            and getattr(options, field.name) != getattr(self.options, field.name)
        ]
        if changed:
            raise UserError(
                f"{', '.join(changed)}: changed, and only sources can change while they are "
                "watched. Stop it and start it again."
            )

    def _open(self, opened: ExitStack) -> None:
        options, cameras = self.options, self.cameras
        outputs = [Path(path) for path in options.output]
        endless = [c.name for c in cameras if goes_on(c) or is_folder(c.url)]
        if endless or any(is_piped(camera.url) for camera in cameras):
            keep_steady()
        else:
            share_heap()
        check_outputs(outputs, live=endless)
        _check_places(options, cameras, outputs)
        _check_cameras(cameras)  # before the model is loaded, which takes seconds
        address = None if options.metrics_port is None else str(options.metrics_port)
        if address is not None:
            host_and_port(address)
        models = resolve_models(options, cameras)
        if options.journal is not None:
            self._journal = _open_journal(options, cameras, models)
            opened.callback(self._journal.close)
        clips = Path(options.alert_clips) if options.alert_clips is not None else None
        self._keeper = Keeper(cameras, self._journal, clips)
        self._keeper.start()
        opened.callback(self._keeper.close)
        self._channels = open_channels(options, self._journal, opened)
        self._monitor = load_monitor(
            options,
            # What nobody sees need not be decoded.
            live=LiveSettings() if options.partial else LiveSettings(partial_s=math.inf),
            cameras=cameras,
            models=models,
            alert_clips=clips,
            open_speech=self._open_speech,
        )
        # Whatever may fail comes before the files of an earlier run are written anew.
        if address is not None:
            port = opened.enter_context(metrics_server(self._monitor.stats, address))
            host, _ = host_and_port(address)
            logger.info("serving Prometheus metrics at http://%s:%d/metrics", host, port)
        self._files = self._open_files(cameras, outputs, opened)
        if self._journal is not None:
            self._take_up(self._journal)

    def _open_files(
        self, cameras: Sequence[Camera], outputs: Sequence[Path], opened: ExitStack
    ) -> dict[str, list[Sink]]:
        """Output files by camera; one may be shared by all, and be open already."""
        names = [camera.name for camera in cameras]
        is_shared = self._stays_open or len(names) > 1  # others may come
        waits = self._stays_open or any(goes_on(c) or is_piped(c.url) for c in cameras)
        files: dict[str, list[Sink]] = {name: [] for name in names}
        for camera in cameras:
            for output in outputs:
                path = output_path(output, camera.name, names)
                if path not in self._sinks:
                    self._sinks[path] = (
                        ReportSink(path, public_address(camera.url))
                        if path.suffix == ".html"
                        else FileSink(path, name_source=is_shared, waits=waits)
                    )
                    opened.callback(self._sinks[path].close)
                files[camera.name].append(self._sinks[path])
        return files

    def _take_up(self, journal: Journal) -> None:
        """Write again what earlier sessions found. What was piped in to its end is another
        recording than what is piped in now: files of one recording are without it.
        """
        late: dict[str, list[tuple[Sink, Shown]]] = {
            camera.name: [] for camera in self.cameras if is_piped(camera.url)
        }
        of_one = {sink for path, sink in self._sinks.items() if path.suffix in OF_ONE_RECORDING}
        left_out: set[str] = set()

        def write(item: Shown | SourceEnd) -> None:
            if isinstance(item, SourceEnd):
                if item.error is None and late.get(item.camera):
                    late[item.camera].clear()
                    left_out.add(item.camera)
                return
            for sink in self._files.get(item.camera, ()):
                if item.camera in late and sink in of_one:
                    late[item.camera].append((sink, item))
                else:
                    sink.write(item)

        take_up(journal, write, self._channels)
        for name in left_out:
            logger.warning(
                "%s: what was piped in before has ended; subtitles and reports are without it, the "
                "journal has it",
                name,
            )
        for sink, item in itertools.chain(*late.values()):
            sink.write(item)


def _as_known(camera: Camera, known: Camera | None) -> Camera:
    """The camera; as it is known where it differs in nothing but what was asked of its server."""
    return known if known is not None and replace(known, live=camera.live) == camera else camera


def _check_cameras(cameras: Sequence[Camera]) -> None:
    """Refuse what cannot be used.

    Raises:
        UserError: keywords, rules of redaction, or a recording that cannot be opened.
    """
    for camera in cameras:
        Keywords(camera.keywords)
        Redactor(camera.redact)
        if not (goes_on(camera) or is_folder(camera.url) or is_piped(camera.url)):
            open_media(camera.url).close()


def _check_places(
    options: MonitorOptions, cameras: Sequence[Camera], outputs: Sequence[Path]
) -> None:
    """Refuse to overwrite a source, or to write among the journal's files.

    Raises:
        UserError: an output that is a source or lies in the journal's folder, or a folder for clips
            that is none or cannot be written.
    """
    read = [Path(camera.url) for camera in cameras if "://" not in camera.url]
    for output in outputs:
        if output.exists() and any(path.exists() and path.samefile(output) for path in read):
            raise UserError(f"{output}: is a source and would be overwritten. Name another file.")
        if options.journal and output.parent.resolve() == Path(options.journal).resolve():
            raise UserError(
                f"{output}: lies in the journal's folder, which holds nothing else. Name "
                "another folder."
            )
    if options.alert_clips is None:
        return
    clips = Path(options.alert_clips)
    if clips.exists() and not clips.is_dir():
        raise UserError(f"{clips}: expected a folder for alert clips, found a file.")
    for folder in (path for path in read if path.is_dir()):
        if clips.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{clips}: lies in {folder}, which is monitored, so clips would be transcribed "
                "as well. Name another folder."
            )
    make_private(clips)
    if not os.access(clips, os.W_OK):
        raise UserError(f"{clips}: the folder for alert clips is not writable.")


def _open_journal(
    options: MonitorOptions, cameras: Sequence[Camera], models: Mapping[str, Checkpoint]
) -> Journal:
    assert options.journal is not None
    return Journal(options.journal, **_identity(options, cameras, models))


def _identity(
    options: MonitorOptions, cameras: Sequence[Camera], models: Mapping[str, Checkpoint]
) -> dict[str, Any]:
    """What tells a journal from others; its model is that of all cameras, those with their own
    included.
    """
    own = {(c.name, c.model, c.language) for c in cameras if c.model or c.language}
    names = [options.model, *(f"{name}: {model}" for name, model, _ in sorted(own, key=str))]
    digests = [models[options.model].digest]
    for name, model, language in sorted(own, key=str):
        digests.append(f"{name} {models[model].digest if model else ''} {language or ''}")
    return {
        "model": ", ".join(names),
        "model_digest": "; ".join(digests),
        "sources": {camera.name: camera.url for camera in cameras},
    }
