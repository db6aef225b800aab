"""`mmtransfer predict`: classes of texts or sounds."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mmtransfer.cli.common import add_model, count, data_config, quiet_libraries
from mmtransfer.data.printing import json_line, printable, whole_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the texts or recordings."""
    parser.description = (
        "Print or write the class of each text or clip with the probability of every class."
    )
    add_model(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify")
    given.add_argument("--audio", nargs="+", metavar="FILE", help="recordings to classify")
    given.add_argument(
        "--data",
        metavar="FILE",
        help="CSV, TSV, JSONL or Parquet file of texts or clips, or a folder of recordings",
    )
    parser.add_argument(
        "--target",
        help="entity or aspect of the sentiment of --text; without it the whole text is classified",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="CSV or JSONL file to write; by default JSON lines"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted --output")
    parser.add_argument("--text-column", help="column with the text (default text)")
    parser.add_argument(
        "--target-column", help="column with that entity or aspect (default target); none for none"
    )
    parser.add_argument("--threads", type=count, default=0, help="CPU threads; 0 uses every core")


def run(arguments: argparse.Namespace) -> int:
    """Classify texts or sounds; returns the exit code."""
    quiet_libraries()
    from mmtransfer.config import RuntimeConfig
    from mmtransfer.hub.checkpoint import resolve

    runtime = RuntimeConfig(threads=arguments.threads)
    checkpoint = resolve(arguments.model, arguments.revision)
    if arguments.audio or (arguments.data and checkpoint.kind == "sound"):
        return _run_sounds(arguments, checkpoint, runtime)
    from mmtransfer.text.prediction import predict_file, predict_texts

    if arguments.text:
        # Bytes that are no UTF-8 come as halves of surrogate pairs.
        texts = [whole_text(text) for text in arguments.text]
        target = whole_text(arguments.target) if arguments.target else None
        for row in predict_texts(checkpoint, texts, target, runtime=runtime):
            print(json_line(row))
        return 0
    counts = predict_file(
        checkpoint,
        arguments.data,
        arguments.output,
        config=data_config(arguments, "text_column", "target_column").data,
        resume=arguments.resume,
        runtime=runtime,
    )
    _print_counts(counts)
    return 0


def _run_sounds(arguments: argparse.Namespace, checkpoint: Any, runtime: Any) -> int:
    from mmtransfer.sound.prediction import predict_clips, predict_recordings

    if arguments.audio:
        for row in predict_recordings(checkpoint, arguments.audio, runtime=runtime):
            print(json_line(row))
        return 0
    counts = predict_clips(
        checkpoint,
        arguments.data,
        arguments.output,
        config=data_config(arguments).data,
        resume=arguments.resume,
        runtime=runtime,
    )
    _print_counts(counts)
    return 0


def _print_counts(counts: dict[str, int]) -> None:
    counted = ", ".join(f"{count} {label}" for label, count in counts.items())
    print(printable(counted), file=sys.stderr)
