"""`mmtransfer transcribe`: recordings in bulk, rows in Parquet files."""

from __future__ import annotations

import argparse
import os
import sys

from mmtransfer.cli.common import add_model, add_ray, at_revision, quiet_libraries
from mmtransfer.cli.monitor import add_recognition
from mmtransfer.errors import UserError

_BULK = (
    *("sources", "output", "partition", "formats", "max_errors", "retry_errors"),
    *("ray", "workers", "gpus_per_worker", "price"),
)
"""Arguments that are fields of `BulkOptions`; the others are of `RecognitionOptions`."""
_OTHERS = ("verb", "run", "flags", "model", "revision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the sources, the output, and a flag for each option."""
    parser.description = (
        "Transcribe finished recordings in bulk into Parquet files. The same command again goes on "
        "where it stopped."
    )
    parser.argument_default = argparse.SUPPRESS
    add_model(parser)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="folders, patterns ('*.mp4'), tables with a column file_name, recordings; paths or "
        "addresses that fsspec knows (s3://, gs://, hf://, ...)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder or address of the rows"
    )
    parser.add_argument(
        "--partition",
        choices=("folder", "day"),
        help="what the rows are parted by: folder of the file (default), or the UTC day of its "
        "last change",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        metavar="srt|vtt|jsonl",
        help="also write a file of each recording, in texts/",
    )
    parser.add_argument(
        "--max-errors",
        type=float,
        metavar="PERCENT",
        help="stop when more of the files cannot be used (default 5)",
    )
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="try files again that could not be used (those that have changed always are)",
    )
    add_ray(parser)
    parser.add_argument(
        "--price",
        type=float,
        metavar="P",
        help="of a worker's hour; the summary then has the cost of an hour of audio",
    )
    add_recognition(parser)
    flags = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
    parser.set_defaults(flags=flags)


def run(arguments: argparse.Namespace) -> int:
    """Transcribe all that is not transcribed yet; returns the exit code."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as for `monitor`
    quiet_libraries()
    from mmtransfer.monitoring.options import OptionError, RecognitionOptions
    from mmtransfer.scale.transcribe import BulkOptions, transcribe

    given = {name: value for name, value in vars(arguments).items() if name not in _OTHERS}
    bulk = {name: given.pop(name) for name in _BULK if name in given}
    model = at_revision(arguments.model, getattr(arguments, "revision", None))
    try:
        options = BulkOptions(RecognitionOptions(model, **given), **bulk)
    except OptionError as error:
        flag = arguments.flags.get(error.name, error.name)
        raise UserError(f"argument {flag}: {error.problem}.") from None
    print(transcribe(options).line(), file=sys.stderr)
    return 0
