"""A monitor inside a program of one's own: texts and alerts as they come, a journal to go on from.

    python examples/monitor_desk.py gate.mp4 journal
    python examples/monitor_desk.py rtsp://10.0.0.7/audio journal https://desk.example/alerts

The second argument is the journal's folder. Started again with it, nothing is transcribed twice,
and alerts that did not reach the webhook are sent again.
"""

import logging
import sys

from mmtransfer import UserError
from mmtransfer.monitoring import Alert, MonitorOptions, Shown, Transcript, run


class Desk:
    """A sink: gets what is found, in order."""

    def write(self, item: Shown) -> None:
        """Print it."""
        if isinstance(item, Alert):
            print(f"{item.camera}: {item.keyword.upper()} at {item.start:.1f} s", flush=True)
        elif isinstance(item, Transcript):
            print(f"{item.camera} {item.start:.1f} s: {item.text}", flush=True)

    def close(self) -> None:
        """No more will come."""


def main(arguments: list[str]) -> None:
    """Monitor a source until it ends."""
    if len(arguments) < 2:
        raise UserError("expected SOURCE and JOURNAL [WEBHOOK].")
    source, journal, *webhook = arguments
    options = MonitorOptions(
        "bundled:whisper-tiny.en",
        sources=[source],
        keywords=["fire", "open the gate"],
        journal=journal,
        webhook=webhook[0] if webhook else None,
    )
    stats = run(options, sinks=[Desk()])
    print(f"{stats.segments} segments, {sum(c.alerts for c in stats.cameras.values())} alerts")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
