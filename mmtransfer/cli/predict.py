"""`mmtransfer predict`: classes of texts."""

from __future__ import annotations

import argparse
import json
import sys

from mmtransfer.cli.common import add_model, count, data_config, quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the texts."""
    parser.description = (
        "Print or write the class of each text with the probability of every class."
    )
    add_model(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify")
    given.add_argument("--data", metavar="FILE", help="CSV, TSV, JSONL or Parquet file of texts")
    parser.add_argument("--target", help="what the texts given by --text are about")
    parser.add_argument(
        "--output", metavar="FILE", help="CSV or JSONL file to write; by default JSON lines"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted --output")
    parser.add_argument("--text-column", help="column with the text (default text)")
    parser.add_argument(
        "--target-column", help="column with the target (default target); none for none"
    )
    parser.add_argument("--threads", type=count, default=0, help="CPU threads; 0 uses every core")


def run(arguments: argparse.Namespace) -> int:
    """Classify texts; returns the exit code."""
    quiet_libraries()
    from mmtransfer.config import RuntimeConfig
    from mmtransfer.text.prediction import predict_file, predict_texts

    runtime = RuntimeConfig(threads=arguments.threads)
    if arguments.text:
        for row in predict_texts(
            arguments.model, arguments.text, arguments.target, runtime=runtime
        ):
            print(json.dumps(row, ensure_ascii=False))
        return 0
    counts = predict_file(
        arguments.model,
        arguments.data,
        arguments.output,
        config=data_config(arguments, "text_column", "target_column").data,
        resume=arguments.resume,
        runtime=runtime,
    )
    print(", ".join(f"{count} {label}" for label, count in counts.items()), file=sys.stderr)
    return 0
