"""A monitor by its options: sources, model, journal, outputs and channels put together."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from mmtransfer.cache import make_private
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.monitoring.delivery import open_channels, take_up
from mmtransfer.monitoring.events import Item, Raised, Shown, SourceEnd, SourceEvent, Stopped
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.keywords import Keywords
from mmtransfer.monitoring.loading import load_monitor, resolve_models
from mmtransfer.monitoring.memory import keep_steady
from mmtransfer.monitoring.monitor import Monitor
from mmtransfer.monitoring.options import MonitorOptions
from mmtransfer.monitoring.outputs.alerts import Channel
from mmtransfer.monitoring.outputs.dashboard import host_and_port, metrics_server
from mmtransfer.monitoring.outputs.sinks import (
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
    that never arrived are sent again. `open_speech` as of `load_monitor`.

    Raises:
        UserError: something that cannot be used.
        OSError: an output that cannot be written.

    Example:
        with Session(MonitorOptions("runs/site", sources=["rtsp://10.0.0.7/audio"])) as session:
            for item in session.items():
                print(item)
    """

    def __init__(
        self, options: MonitorOptions, *, open_speech: Callable[..., Recognizer] | None = None
    ):
        self._options, self._opened = options, ExitStack()
        self._open_speech = open_speech
        self.cameras = options.cameras()
        """The sources, each separate channel as one of them."""
        self._monitor: Monitor
        self._journal: Journal | None = None
        self._channels: dict[str, Channel] = {}
        self._files: dict[str, list[Sink]] = {}

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
        for item in self._monitor.watch(self.cameras, journal=self._journal):
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

    def _open(self, opened: ExitStack) -> None:
        options, cameras = self._options, self.cameras
        outputs = [Path(path) for path in options.output]
        endless = [c.name for c in cameras if goes_on(c) or is_folder(c.url)]
        # It costs a recording a fifth of its time.
        if endless or any(is_piped(camera.url) for camera in cameras):
            keep_steady()
        check_outputs(outputs, live=endless)
        _check_places(options, cameras, outputs)
        for camera in cameras:  # before the model is loaded, which takes seconds
            Keywords(camera.keywords)
            Redactor(camera.redact)
            if camera.name not in endless and not is_piped(camera.url):
                open_media(camera.url).close()
        address = None if options.metrics_port is None else str(options.metrics_port)
        if address is not None:
            host_and_port(address)
        models = resolve_models(options, cameras)
        if options.journal is not None:
            self._journal = _open_journal(options, cameras, models)
            opened.callback(self._journal.close)
        clips = Path(options.alert_clips) if options.alert_clips is not None else None
        keeper = Keeper(cameras, self._journal, clips)
        if keeper.is_needed:
            keeper.start()
            opened.callback(keeper.close)
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
        self._files = _open_files(cameras, outputs, opened)
        if self._journal is not None:
            take_up(self._journal, self._write_again, self._channels)

    def _write_again(self, item: Shown) -> None:
        for sink in self._files.get(item.camera, ()):
            sink.write(item)


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
    """The journal; its model is that of all cameras, those with their own included."""
    assert options.journal is not None
    own = {(c.name, c.model, c.language) for c in cameras if c.model or c.language}
    names = [options.model, *(f"{name}: {model}" for name, model, _ in sorted(own, key=str))]
    digests = [models[options.model].digest]
    for name, model, language in sorted(own, key=str):
        digests.append(f"{name} {models[model].digest if model else ''} {language or ''}")
    return Journal(
        options.journal,
        model=", ".join(names),
        model_digest="; ".join(digests),
        sources={camera.name: camera.url for camera in cameras},
    )


def _open_files(
    cameras: Sequence[Camera], outputs: Sequence[Path], opened: ExitStack
) -> dict[str, list[Sink]]:
    """Output files by camera; one may be shared by all."""
    shared: dict[Path, Sink] = {}
    names = [camera.name for camera in cameras]
    files: dict[str, list[Sink]] = {name: [] for name in names}
    for camera in cameras:
        for output in outputs:
            path = output_path(output, camera.name, names)
            if path not in shared:
                is_report = path.suffix == ".html"
                shared[path] = (
                    ReportSink(path, public_address(camera.url)) if is_report else FileSink(path)
                )
                opened.callback(shared[path].close)
            files[camera.name].append(shared[path])
    return files
