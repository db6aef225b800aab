"""`mmtransfer forget`: what was transcribed, removed for good."""

from __future__ import annotations

import argparse

from mmtransfer.cli.common import INDEX_HELP, moment
from mmtransfer.data.printing import whole_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The journal, and what is to be forgotten of it."""
    parser.description = (
        "Remove what was transcribed from a journal, its index, spool and clips, so that no byte "
        "of it is left in these files. With several conditions, what all of them are true of goes."
    )
    parser.add_argument(
        "--journal", metavar="DIR", required=True, help="journal that no monitor is writing"
    )
    parser.add_argument("--index", metavar="FILE|ADDRESS", help=INDEX_HELP)
    parser.add_argument(
        "--clips",
        metavar="DIR",
        help="folder of the clips, if they are no longer where the monitor wrote them",
    )
    parser.add_argument(
        "--before", type=moment, metavar="DATE", help="what was before this day or time"
    )
    parser.add_argument("--camera", metavar="NAME", help="what this camera gave")
    parser.add_argument(
        "--text",
        type=whole_text,
        metavar="PHRASE",
        help="lines that hold this phrase, whatever its case, and clips of them",
    )
    parser.add_argument("--dry-run", action="store_true", help="only count what would be removed")


def run(arguments: argparse.Namespace) -> int:
    """Forget it and print how much it was; returns the exit code."""
    from mmtransfer.monitoring.journal.forgetting import EVER, Rule
    from mmtransfer.server.forget import forget_everywhere

    before = EVER if arguments.before is None else arguments.before
    found = forget_everywhere(
        arguments.journal,
        Rule(before, arguments.camera, arguments.text),
        index=arguments.index,
        clips=arguments.clips,
        dry_run=arguments.dry_run,
    )
    missing = f" ({found.missing_clips} more are not there)" if found.missing_clips else ""
    print(
        f"{'would forget' if arguments.dry_run else 'forgot'} {found.lines} lines, {found.events} "
        f"alerts, sounds and other events, {found.clips} clips{missing}, {found.segments} segments "
        "that waited"
    )
    return 0
