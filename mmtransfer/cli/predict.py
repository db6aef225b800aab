"""`mmtransfer predict`: classes of texts or sounds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mmtransfer.cli.common import (
    add_model,
    add_ray,
    at_revision,
    data_config,
    quiet_libraries,
    threads,
)
from mmtransfer.data.printing import json_line, printable, whole_text
from mmtransfer.errors import UserError


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
        "--output",
        metavar="FILE|DIR",
        help="CSV or JSONL file to write, or of --data a folder of Parquet files, which the same "
        "command goes on with; by default JSON lines",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted --output")
    parser.add_argument("--text-column", help="column with the text (default text)")
    parser.add_argument(
        "--target-column", help="column with that entity or aspect (default target); none for none"
    )
    parser.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 uses every core")
    add_ray(parser)


def run(arguments: argparse.Namespace) -> int:
    """Classify texts or sounds; returns the exit code."""
    quiet_libraries()
    from mmtransfer.config import RuntimeConfig
    from mmtransfer.hub.checkpoint import resolve
    from mmtransfer.scale.cluster import check_workers

    check_workers(arguments.ray, arguments.workers, arguments.gpus_per_worker or 0.0)
    runtime = RuntimeConfig(threads=arguments.threads)
    checkpoint = resolve(arguments.model, arguments.revision)
    if arguments.ray is not None and checkpoint.kind == "sound":
        raise UserError("--ray: expected a model of texts, found one of sounds.")
    if arguments.audio or (arguments.data and checkpoint.kind == "sound"):
        return _run_sounds(arguments, checkpoint, runtime)
    if _is_bulk(arguments):
        return _run_bulk(arguments, runtime)
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


def _is_bulk(arguments: argparse.Namespace) -> bool:
    """Whether rows go into a folder."""
    output = arguments.output
    to_folder = output is not None and (
        "://" in output or Path(output).suffix == "" or Path(output).is_dir()
    )
    if arguments.ray is not None and not (arguments.data and to_folder):
        raise UserError("--ray: expected --data with texts and a folder as --output.")
    return bool(arguments.data and to_folder)


def _run_bulk(arguments: argparse.Namespace, runtime: Any) -> int:
    from mmtransfer.scale.texts import TextOptions, classify

    options = TextOptions(
        at_revision(arguments.model, arguments.revision),
        arguments.data,
        arguments.output,
        columns=data_config(arguments, "text_column", "target_column").data,
        runtime=runtime,
        ray=arguments.ray,
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker or 0.0,
    )
    print(printable(classify(options).line()), file=sys.stderr)
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
