"""The state of a running monitor: a table on the terminal, numbers for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.monitoring.stats import CameraStats, MonitorStats

_LOOPBACK = "127.0.0.1"
_WIDE = 130  # columns of a terminal that hold the last text as well
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
    """One row for each source; what was said last where `width` columns of text have room for it,
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


def metrics(stats: MonitorStats) -> str:
    """All numbers in Prometheus' text format."""
    cameras = list(stats.cameras.items())
    lines: list[str] = []

    def add(name: str, kind: str, help_text: str, rows: list[tuple[str, float]]) -> None:
        lines.append(f"# HELP mmtransfer_{name} {help_text}")
        lines.append(f"# TYPE mmtransfer_{name} {kind}")
        lines.extend(f"mmtransfer_{name}{{{labels}}} {value:g}" for labels, value in rows)

    def each(attribute: str) -> list[tuple[str, float]]:
        return [(_label(name), float(getattr(camera, attribute))) for name, camera in cameras]

    add("audio_seconds_total", "counter", "Audio read.", each("audio_s"))
    add("recognition_seconds_total", "counter", "Time of the recogniser.", each("decode_s"))
    add("segments_total", "counter", "Segments with text.", each("segments"))
    add("repeated_total", "counter", "Segments read again in longer contexts.", each("repeated"))
    rejected = [
        (f'{_label(name)},reason="{reason}"', float(count))
        for name, camera in cameras
        for reason, count in sorted(camera.rejected.copy().items())
    ]
    add("rejected_total", "counter", "Segments without text, by reason.", rejected)
    add("dropped_total", "counter", "Segments for which there was no room.", each("dropped"))
    add("alerts_total", "counter", "Watch words and loud sounds.", each("alerts"))
    add("reconnects_total", "counter", "Connections after the first.", each("reconnects"))
    add("connected", "gauge", "Whether a live source sends audio.", each("is_connected"))
    add("waiting_segments", "gauge", "Segments cut, and not read yet.", each("waiting"))
    add("real_time_factor", "gauge", "Recognition time over audio.", each("real_time_factor"))
    delays = [
        (f'{_label(name)},quantile="{quantile:g}"', camera.delay_s(quantile))
        for name, camera in cameras
        if camera.delays_s
        for quantile in (0.5, 0.95)
    ]
    add("delay_seconds", "gauge", "From the end of speech to its text, last 1000.", delays)
    return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'camera="{escaped}"'


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
    place = host_and_port(address)

    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0

        def do_GET(self) -> None:
            is_known = self.path.split("?")[0] in ("/metrics", "/")
            body = metrics(stats).encode() if is_known else b"see /metrics\n"
            self.send_response(200 if is_known else 404)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: Any) -> None:
            """No line for each request."""

    try:
        server = ThreadingHTTPServer(place, Handler)
    except (OSError, UnicodeError) as error:  # also of a name that no host has
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"metrics: cannot listen on {address}: {reason}.") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="metrics", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
