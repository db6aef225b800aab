"""What `mmtransfer monitor` does: sources, model, journal and sinks put together."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import resolve
from mmtransfer.monitoring.events import (
    Alert,
    Delivery,
    Sound,
    SourceEnd,
    SourceEvent,
    Transcript,
)
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.lines import LineSettings
from mmtransfer.monitoring.memory import keep_steady
from mmtransfer.monitoring.monitor import Monitor, load_monitor
from mmtransfer.monitoring.outputs.alerts import STOPPED, Channel, Mqtt, Settled, Webhook
from mmtransfer.monitoring.outputs.dashboard import dashboard, host_and_port, metrics_server
from mmtransfer.monitoring.outputs.sinks import (
    FileSink,
    ReportSink,
    Sink,
    StandardOutput,
    check_outputs,
    output_path,
)
from mmtransfer.monitoring.sources.cameras import Camera, load_cameras, named_cameras
from mmtransfer.monitoring.sources.kinds import goes_on, is_folder, settle
from mmtransfer.monitoring.sources.live import LiveSettings
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.monitoring.watch import WatchList
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import MediaError, is_piped, is_standard_input, open_media
from mmtransfer.speech.engine import DecodingOptions

logger = logging.getLogger(__name__)


def run(arguments: Namespace) -> int:
    """Monitor until the sources end or a signal comes; returns the exit code.

    Raises:
        UserError: something that cannot be used.
        OSError: an output that cannot be written.
    """
    cameras = _cameras(arguments)
    outputs = [Path(path) for path in arguments.output]
    endless = [c.name for c in cameras if goes_on(c) or is_folder(c.url)]
    if endless or any(is_piped(c.url) for c in cameras):  # costs a recording a fifth of its time
        keep_steady()
    check_outputs(outputs, live=endless)
    _check_places(arguments, cameras, outputs)
    for camera in cameras:  # before the model is loaded, which takes seconds
        WatchList(camera.watch)
        if camera.name not in endless and not is_piped(camera.url):
            open_media(camera.url).close()
    if arguments.metrics_port is not None:
        host_and_port(arguments.metrics_port)
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
            device=arguments.device,
            threads=arguments.threads,
            options=DecodingOptions(
                arguments.beam, 0.0 if arguments.words else math.inf, arguments.prompt
            ),
            lines=LineSettings(arguments.line_seconds, arguments.line_characters),
            # What nobody sees need not be decoded.
            live=LiveSettings() if _is_partial(arguments) else LiveSettings(partial_s=math.inf),
            cameras=cameras,
            sentiment=arguments.sentiment,
            clips=Path(arguments.clips) if arguments.clips else None,
        )
        # Whatever may fail comes before the files of an earlier run are written anew.
        if arguments.metrics_port is not None:
            host, _ = host_and_port(arguments.metrics_port)
            port = opened.enter_context(metrics_server(monitor.stats, arguments.metrics_port))
            logger.info("numbers for Prometheus at http://%s:%d/metrics", host, port)
        sinks = _sinks(arguments, cameras, outputs, opened)
        if journal is not None:
            _tell_again(journal, sinks, channels)
        opened.callback(lambda: print(summary(monitor.stats), file=sys.stderr))
        if arguments.dashboard:
            opened.enter_context(dashboard(monitor.stats))
        return _watch(monitor, cameras, journal, sinks, channels)


def _check_places(arguments: Namespace, cameras: list[Camera], outputs: list[Path]) -> None:
    """Refuse to write over what is read, or among the journal's files.

    Raises:
        UserError: an output that is a source or lies in the journal's folder, or a folder for clips
            that is none or cannot be written.
    """
    read = [Path(camera.url) for camera in cameras if "://" not in camera.url]
    read += [Path(arguments.cameras)] if arguments.cameras else []
    for output in outputs:
        if output.exists() and any(path.exists() and path.samefile(output) for path in read):
            raise UserError(f"{output}: is a source, and would be written over. Name another file.")
        if arguments.journal and output.parent.resolve() == Path(arguments.journal).resolve():
            raise UserError(
                f"{output}: lies in the journal's folder, which is the journal's alone. Name "
                "another folder."
            )
    if arguments.clips:
        clips = Path(arguments.clips)
        if clips.exists() and not clips.is_dir():
            raise UserError(f"{clips}: expected a folder for clips, found a file.")
        for folder in (path for path in read if path.is_dir()):
            if clips.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{clips}: lies in {folder}, whose recordings are read, and clips would be "
                    "among them. Name another folder."
                )
        clips.mkdir(parents=True, exist_ok=True)
        if not os.access(clips, os.W_OK):
            raise UserError(f"{clips}: the folder for clips cannot be written.")


def _tell_again(
    journal: Journal, sinks: Mapping[str, list[Sink]], channels: Mapping[str, Channel]
) -> None:
    """What earlier sessions recognised: files hold it, too, and alerts that were on their way when
    a session was killed are sent again.
    """
    waiting: dict[tuple[str, ...], Alert | Sound] = {}
    for record, to in journal.records():
        if isinstance(record, Delivery) and record.failure != STOPPED:
            key = (record.to, record.camera, record.segment, record.phrase)
            waiting.pop(key, None)
        if not isinstance(record, Transcript | Alert | Sound):
            continue
        if isinstance(record, Alert | Sound):
            waiting |= {(name, record.camera, *record.key): record for name in to}
        for sink in sinks.get(record.camera, ()):
            if not isinstance(sink, StandardOutput):
                sink.write(record)
    for (name, *_), alert in waiting.items():
        if name in channels:
            channels[name].send(asdict(alert))


def _watch(
    monitor: Monitor,
    cameras: list[Camera],
    journal: Journal | None,
    sinks: Mapping[str, list[Sink]],
    channels: Mapping[str, Channel],
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
                    for channel in channels.values():
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
    if sum(is_standard_input(camera.url) for camera in cameras) > 1:
        raise UserError("standard input is named twice; it can be read once only.")
    return settle(
        [
            replace(
                camera,
                watch=[*camera.watch, *arguments.watch],
                loud_db=camera.loud_db or arguments.loud,
                channels=arguments.channels if camera.channels == "mix" else camera.channels,
                live=arguments.live if camera.live is None else camera.live,
            )
            for camera in cameras
        ]
    )


def _open_journal(arguments: Namespace, cameras: list[Camera]) -> Journal:
    """The journal; its model is that of all cameras, those with their own included."""
    own = {(c.name, c.model, c.language) for c in cameras if c.model or c.language}
    names = [arguments.model, *(f"{name}: {model}" for name, model, _ in sorted(own, key=str))]
    digests = [resolve(arguments.model).digest]
    for name, model, language in sorted(own, key=str):
        digests.append(f"{name} {resolve(model).digest if model else ''} {language or ''}")
    return Journal(
        arguments.journal,
        model=", ".join(names),
        model_digest="; ".join(digests),
        sources={camera.name: camera.url for camera in cameras},
    )


def _channels(
    arguments: Namespace, journal: Journal | None, opened: ExitStack
) -> dict[str, Channel]:
    """Where alerts go, by name; the journal says which arrived."""

    def settled(name: str) -> Settled:
        def write(alert: Mapping[str, Any], why: str) -> None:
            if journal is None:
                return
            segment, phrase = alert.get("segment", alert.get("id", "")), alert.get("phrase", "")
            try:
                journal.write(Delivery(alert["camera"], name, segment, phrase, why).line())
            except OSError as error:  # the channel's thread goes on
                logger.warning("the journal cannot be written (%s)", error.strerror)

        return write

    made: dict[str, Channel] = {}
    if arguments.webhook:
        secret = os.environ.get("MMTRANSFER_WEBHOOK_SECRET")
        made["webhook"] = Webhook(arguments.webhook, secret=secret, settled=settled("webhook"))
        opened.callback(made["webhook"].close)
    if arguments.mqtt:
        made["mqtt"] = Mqtt(arguments.mqtt, settled=settled("mqtt"))
        opened.callback(made["mqtt"].close)
    if journal is not None:
        journal.channels = list(made)
    return made


def _is_partial(arguments: Namespace) -> bool:
    """Whether what is being spoken is shown before it ends."""
    if arguments.dashboard:
        return True
    shown = sys.stdout.isatty() if arguments.partial is None else arguments.partial
    return bool(shown) and not arguments.quiet


def _sinks(
    arguments: Namespace, cameras: list[Camera], outputs: list[Path], opened: ExitStack
) -> dict[str, list[Sink]]:
    """By camera; one file may be shared by all."""
    terminal = StandardOutput(
        name_source=len(cameras) > 1,
        # The table shows what is being said, too.
        partial=_is_partial(arguments) and not arguments.dashboard,
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
    if stats.revised or stats.not_revised:
        late = f" ({stats.not_revised} turns not, for lack of time)" if stats.not_revised else ""
        dropped = f"; {stats.revised} of {stats.lines} lines revised{late}{dropped}"
    return (
        f"{stats.segments} segments from {stats.audio_s:.1f} s of audio in {stats.wall_s:.1f} s "
        f"(real-time factor {stats.real_time_factor:.3f}); {stats.repeated} decoded again; "
        f"rejected: {rejected or 'none'}{dropped}"
    )
