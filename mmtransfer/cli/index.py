"""`mmtransfer index`: a journal made searchable, and searched."""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransfer.cli.common import INDEX_HELP, count, moment
from mmtransfer.data.printing import printable, whole_text
from mmtransfer.errors import UserError

if TYPE_CHECKING:
    from mmtransfer.server.hits import Hit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The journal, where its index lies, and what is searched for."""
    parser.description = (
        "Index what a journal holds and search it. The index takes in what was written since, and "
        "can be made again of the journal at any time."
    )
    parser.add_argument("--journal", metavar="DIR", required=True, help="journal of a monitor")
    parser.add_argument("--index", metavar="FILE|ADDRESS", help=INDEX_HELP)
    parser.add_argument(
        "--rebuild", action="store_true", help="make the index again of the whole journal"
    )
    parser.add_argument(
        "--search",
        type=whole_text,
        metavar="PHRASE",
        help="print the lines with these words, newest first; words in double quotes stand side by "
        "side",
    )
    parser.add_argument("--camera", metavar="NAME", nargs="+", help="search these cameras alone")
    parser.add_argument(
        "--after", type=moment, metavar="DATE", help="from this day or time on (2026-11-24T18:30)"
    )
    parser.add_argument("--before", type=moment, metavar="DATE", help="before this day or time")
    parser.add_argument("--alerts", action="store_true", help="only what raised an alert")
    parser.add_argument("--sentiment", metavar="CLASS", help="only lines of this class")
    parser.add_argument(
        "--sound",
        metavar="CLASS",
        help="sounds of this class (loud: those without one); with --search, lines within ten "
        "seconds of one",
    )
    parser.add_argument(
        "--limit", type=count, metavar="N", default=50, help="lines to print at most (default 50)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Index it and print what is found; returns the exit code."""
    from mmtransfer.monitoring.journal.files import journal_files
    from mmtransfer.server.indexing import open_index

    journal = Path(arguments.journal)
    if not journal_files(journal) and not (journal / "journal.json").is_file():
        raise UserError(f"{journal}: expected the folder of a journal, found none.")
    filters = {
        "camera": arguments.camera,
        "after": arguments.after,
        "before": arguments.before,
        "alert": arguments.alerts,
        "sentiment": arguments.sentiment,
        "sound": arguments.sound,
    }
    started = time.monotonic()
    with open_index(arguments.index, journal) as index:
        caught = index.rebuild(journal) if arguments.rebuild else index.catch_up(journal)
        if arguments.search is None and not any(filters.values()):
            damaged = f", {caught.damaged} of them corrupt and left out" if caught.damaged else ""
            seconds = time.monotonic() - started
            print(f"{journal}: {caught.lines} new lines{damaged}, in {seconds:.1f} s")
            return 0
        left, cursor = arguments.limit, None
        while left > 0:
            page = index.search(arguments.search or "", **filters, limit=left, cursor=cursor)
            for hit in page.hits:
                print(printable(_line(hit)), flush=True)
            left, cursor = left - len(page.hits), page.cursor
            if cursor is None:
                break
    return 0


def _line(hit: Hit) -> str:
    alerts = f" ALERT {', '.join(hit.alerts)}" if hit.alerts else ""
    label = f" ({hit.sentiment})" if hit.sentiment else ""
    text = f"SOUND {hit.text}" if hit.kind == "sound" else hit.text
    return f"{datetime.fromtimestamp(hit.at):%Y-%m-%d %H:%M:%S} {hit.camera} {text}{label}{alerts}"
