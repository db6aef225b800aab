"""What `mmtransfer monitor` does: sources, model, journal and sinks put together."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmtransfer.audio import MediaError, is_standard_input, open_media
from mmtransfer.decoding import DecodingOptions
from mmtransfer.errors import UserError
from mmtransfer.monitoring.alerts import Channel, Mqtt, Webhook
from mmtransfer.monitoring.cameras import Camera, load_cameras, named_cameras, public_address
from mmtransfer.monitoring.dashboard import dashboard, host_and_port, metrics_server
from mmtransfer.monitoring.journal import Journal
from mmtransfer.monitoring.live import SourceEvent, is_live
from mmtransfer.monitoring.memory import keep_steady
from mmtransfer.monitoring.pipeline import Monitor, load_monitor
from mmtransfer.monitoring.readers import is_folder
from mmtransfer.monitoring.sinks import (
    FileSink,
    ReportSink,
    Sink,
    StandardOutput,
    check_outputs,
    output_path,
)
from mmtransfer.monitoring.transcripts import Alert, MonitorStats, Sound, SourceEnd, Transcript
from mmtransfer.monitoring.watch import WatchList
from mmtransfer.sources import model_digest

logger = logging.getLogger(__name__)
_LINES: dict[str | None, Any] = {None: Transcript, "alert": Alert, "sound": Sound}
"""What the journal's lines were, by their event."""


def run(arguments: Namespace) -> int:
    """Monitor until the sources end or a signal comes; returns the exit code.

    Raises:
        UserError: something that cannot be used.
        OSError: an output that cannot be written.
    """
    keep_steady()
    cameras = _cameras(arguments)
    outputs = [Path(path) for path in arguments.output]
    endless = [c.name for c in cameras if is_live(c.url) or is_folder(c.url)]
    check_outputs(outputs, live=endless)
    for camera in cameras:  # before the model is loaded, which takes seconds
        WatchList(camera.watch)
        if camera.name not in endless and not is_standard_input(camera.url):
            open_media(camera.url).close()
    if arguments.metrics_port:
        host_and_port(arguments.metrics_port)
    if arguments.clips and Path(arguments.clips).is_file():
        raise UserError(f"{arguments.clips}: expected a folder for clips, found a file.")
    with ExitStack() as opened:
        journal = None
        if arguments.journal:
            journal = _open_journal(arguments, cameras)
            opened.callback(journal.close)
        channels = _channels(arguments, journal, opened)
        monitor = load_monitor(
            arguments.model,
            language=arguments.language,
            context_s=arguments.context,
            engine=arguments.engine,
            compute_type=arguments.compute,
            threads=arguments.threads,
            options=DecodingOptions(arguments.beam, arguments.words, arguments.prompt),
            cameras=cameras,
            sentiment=arguments.sentiment,
            clips=Path(arguments.clips) if arguments.clips else None,
        )
        opened.callback(lambda: print(summary(monitor.stats), file=sys.stderr))
        sinks = _sinks(arguments, cameras, outputs, opened)
        for line in journal.lines() if journal is not None else ():
            kind = _LINES.get(line.get("event"))
            if kind is None:
                continue
            for sink in sinks[line["camera"]]:
                if not isinstance(sink, StandardOutput):  # files hold what was heard before, too
                    sink.write(kind(**line))
        if arguments.metrics_port:
            opened.enter_context(metrics_server(monitor.stats, arguments.metrics_port))
        if arguments.dashboard:
            opened.enter_context(dashboard(monitor.stats))
        return _watch(monitor, cameras, journal, sinks, channels)


def _watch(
    monitor: Monitor,
    cameras: list[Camera],
    journal: Journal | None,
    sinks: Mapping[str, list[Sink]],
    channels: list[Channel],
) -> int:
    failures = 0
    stops: list[int] = []

    def stop(number: int, frame: Any) -> None:
        """What has been cut is still decoded; a second signal ends it at once."""
        if stops:
            raise KeyboardInterrupt
        stops.append(number)
        monitor.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for item in monitor.watch(cameras, journal=journal):
            if isinstance(item, SourceEvent):
                print(f"{item.camera}: {item.event} {item.detail}".strip(), file=sys.stderr)
            elif isinstance(item, SourceEnd):
                if isinstance(item.error, MediaError):  # the other sources go on
                    failures += 1
                    print(f"mmtransfer: error: {item.error}", file=sys.stderr)
                elif item.error is not None and not stops:
                    raise item.error
            else:
                for sink in sinks[item.camera]:
                    sink.write(item)
                if isinstance(item, Alert | Sound):
                    for channel in channels:
                        channel.send(asdict(item))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stops[0] if stops else 2 if failures else 0


def _cameras(arguments: Namespace) -> list[Camera]:
    """The sources with what the command line says of all of them."""
    if arguments.sources and arguments.cameras:
        raise UserError("give either SOURCE... or --cameras, not both.")
    if not arguments.sources and not arguments.cameras:
        raise UserError("expected SOURCE... or --cameras FILE.yaml. See mmtransfer monitor -h.")
    cameras = (
        load_cameras(arguments.cameras) if arguments.cameras else named_cameras(arguments.sources)
    )
    return [
        replace(
            camera,
            watch=[*camera.watch, *arguments.watch],
            loud_db=camera.loud_db or arguments.loud,
        )
        for camera in cameras
    ]


def _open_journal(arguments: Namespace, cameras: list[Camera]) -> Journal:
    """The journal; its model is that of all cameras, those with their own included."""
    own = {(c.name, c.model, c.language) for c in cameras if c.model or c.language}
    names = [arguments.model, *(f"{name}: {model}" for name, model, _ in sorted(own, key=str))]
    digests = [model_digest(arguments.model)]
    for name, model, language in sorted(own, key=str):
        digests.append(f"{name} {model_digest(model) if model else ''} {language or ''}")
    return Journal(
        arguments.journal,
        model=", ".join(names),
        model_digest="; ".join(digests),
        sources={camera.name: camera.url for camera in cameras},
    )


def _channels(arguments: Namespace, journal: Journal | None, opened: ExitStack) -> list[Channel]:
    def failed(alert: Mapping[str, Any], why: str) -> None:
        if journal is not None:
            line = {"camera": alert["camera"], "event": "alert not delivered", "detail": why}
            try:
                journal.write({**line, "segment": alert.get("segment", alert.get("id"))})
            except OSError as error:  # the channel's thread goes on
                logger.warning("the journal cannot be written (%s)", error.strerror)

    made: list[Channel] = []
    if arguments.webhook:
        secret = os.environ.get("MMTRANSFER_WEBHOOK_SECRET")
        made.append(Webhook(arguments.webhook, secret=secret, failed=failed))
    if arguments.mqtt:
        made.append(Mqtt(arguments.mqtt, failed=failed))
    for channel in made:
        opened.callback(channel.close)
    return made


def _sinks(
    arguments: Namespace, cameras: list[Camera], outputs: list[Path], opened: ExitStack
) -> dict[str, list[Sink]]:
    """By camera; one file may be shared by all."""
    shown = sys.stdout.isatty() if arguments.partial is None else arguments.partial
    terminal = StandardOutput(
        name_source=len(cameras) > 1,
        # The table shows what is being said, too.
        partial=shown and not arguments.dashboard and not arguments.quiet,
        quiet=arguments.quiet,
    )
    shared: dict[Path, Sink] = {}
    sinks: dict[str, list[Sink]] = {}
    names = [camera.name for camera in cameras]
    for camera in cameras:
        sinks[camera.name] = [terminal]
        for output in outputs:
            path = output_path(output, camera.name, names)
            if path not in shared:
                is_report = path.suffix == ".html"
                shared[path] = (
                    ReportSink(path, public_address(camera.url)) if is_report else FileSink(path)
                )
                opened.callback(shared[path].close)
            sinks[camera.name].append(shared[path])
    return sinks


def summary(stats: MonitorStats) -> str:
    """The last line of a run."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in stats.rejected.items())
    dropped = f"; {stats.dropped} dropped" if stats.dropped else ""
    return (
        f"{stats.segments} segments from {stats.audio_s:.1f} s of audio in {stats.wall_s:.1f} s "
        f"(real-time factor {stats.real_time_factor:.3f}); {stats.repeated} decoded again; "
        f"rejected: {rejected or 'none'}{dropped}"
    )
