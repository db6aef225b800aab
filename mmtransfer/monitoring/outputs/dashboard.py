"""The state of a running monitor: a table on the terminal, numbers for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmtransfer.errors import UserError
from mmtransfer.monitoring.stats import CameraStats, MonitorStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

_LOOPBACK = "127.0.0.1"
_WIDE = 130  # columns of a terminal that hold the last text as well
_COUNTERS = {
    "audio_seconds": ("audio_s", "Audio decoded."),
    "recognition_seconds": ("decode_s", "Time of the recogniser."),
    "segments": ("segments", "Segments with text."),
    "decoded_again": ("decoded_again", "Segments decoded again in longer contexts."),
    "dropped": ("dropped", "Segments for which there was no room."),
    "alerts": ("alerts", "Keywords, loud sounds and sounds of classes."),
    "unclassified_seconds": ("unclassified_s", "Audio in which sounds were not classified."),
    "reconnects": ("reconnects", "Connections after the first."),
}
_GAUGES = {
    "connected": ("is_connected", "Whether a live source sends audio."),
    "waiting_segments": ("waiting", "Segments cut, and not decoded yet."),
    "real_time_factor": ("real_time_factor", "Recognition time over audio."),
}


@contextmanager
def dashboard(stats: MonitorStats) -> Iterator[None]:
    """A table below what is printed, renewed twice a second."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(
        get_renderable=lambda: table(stats, console.width),
        console=console,
        refresh_per_second=2,
        transient=False,
    ):
        yield


def table(stats: MonitorStats, width: int) -> Any:
    """One row for each source; the last text where `width` columns of text have room for it,
    and it stands above the table anyway.
    """
    from rich.table import Table
    from rich.text import Text

    columns = ["audio", "texts", "waiting", "lag", "95 %", "RTF", "dropped", "reconn."]
    made = Table(padding=(0, 1) if width >= _WIDE else 0)
    made.add_column("source", overflow="fold", min_width=8)
    made.add_column("state", no_wrap=True)
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    if width >= _WIDE:
        made.add_column("last text", ratio=1, no_wrap=True, min_width=20)
    for name, camera in list(stats.cameras.items()):
        row = [
            name,
            _state(camera),
            f"{camera.audio_s:.0f} s",
            str(camera.segments),
            str(camera.waiting),
            f"{camera.delay_s(0.5):.2f} s" if camera.delays_s else "-",
            f"{camera.delay_s(0.95):.2f} s" if camera.delays_s else "-",
            f"{camera.real_time_factor:.3f}",
            str(camera.dropped),
            str(camera.reconnects),
            camera.last_text,
        ]
        made.add_row(*(Text(cell) for cell in row[: len(made.columns)]))  # as it is: no markup
    return made


def _state(camera: CameraStats) -> str:
    if camera.is_connected:
        return "connected"
    return "lost" if camera.events["lost"] else "reading" if camera.audio_s else "waiting"


class Numbers:
    """All numbers at the time they are asked for, as Prometheus' client collects them."""

    def __init__(self, stats: MonitorStats):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
        from prometheus_client.metrics_core import GaugeMetricFamily

        cameras = list(self._stats.cameras.items())
        for kind, names in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, (attribute, help_text) in names.items():
                family = kind(f"mmtransfer_{name}", help_text, labels=["camera"])
                for camera, numbers in cameras:
                    family.add_metric([camera], float(getattr(numbers, attribute)))
                yield family
        rejected = CounterMetricFamily(
            "mmtransfer_rejected", "Segments without text, by reason.", labels=["camera", "reason"]
        )
        sounds = CounterMetricFamily(
            "mmtransfer_sounds", "Sounds of classes, by class.", labels=["camera", "label"]
        )
        delays = HistogramMetricFamily(
            "mmtransfer_delay_seconds", "From the end of speech to its text.", labels=["camera"]
        )
        for camera, numbers in cameras:
            for reason, count in sorted(numbers.rejected.copy().items()):
                rejected.add_metric([camera, reason], count)
            for label, count in sorted(numbers.sounds.copy().items()):
                sounds.add_metric([camera, label], count)
            delays.add_metric([camera], *numbers.delay_histogram())
        yield from (rejected, sounds, delays)


def metrics(stats: MonitorStats) -> str:
    """All numbers in Prometheus' text format."""
    from prometheus_client import generate_latest

    return generate_latest(_registry(stats)).decode()


def _registry(stats: MonitorStats) -> CollectorRegistry:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(Numbers(stats))
    return registry


def host_and_port(address: str) -> tuple[str, int]:
    """`[HOST:]PORT`, by default of this machine alone.

    Raises:
        UserError: not a port.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"metrics: expected [HOST:]PORT, found '{address}'.")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    return host or _LOOPBACK, int(port)


@contextmanager
def metrics_server(stats: MonitorStats, address: str) -> Iterator[int]:
    """Serve `/metrics` at `[HOST:]PORT`; yields the port.

    Raises:
        UserError: not a port, or one that is taken.
    """
    from prometheus_client import start_http_server

    host, port = host_and_port(address)
    try:
        server, thread = start_http_server(port, host, _registry(stats))
    except (OSError, UnicodeError) as error:  # also of a name that no host has
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"metrics: cannot listen on {address}: {reason}.") from None
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
