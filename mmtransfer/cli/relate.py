"""`mmtransfer relate`: how near backbones and source domains are to target data."""

from __future__ import annotations

import argparse
import json

from mmtransfer.cli.common import MODEL_HELP, quiet_libraries
from mmtransfer.cli.train import add_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration with its fields, further backbones, the form of the answer."""
    parser.description = (
        "Rank backbones and their layers by how well they predict the target's labels, and measure "
        "how far the target is from source-domain sets (data.source_domain). Nothing is trained."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration (see configs/)")
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=[],
        metavar="MODEL",
        help=f"backbones beside the source model: {MODEL_HELP}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(overrides=add_fields(parser))


def run(arguments: argparse.Namespace) -> int:
    """Relate and print; returns the exit code."""
    from mmtransfer.config import load_config

    config = load_config(arguments.config, arguments.overrides(arguments))
    quiet_libraries()

    from mmtransfer.runs.relate import relate
    from mmtransfer.runs.report import finite

    found = relate(config, arguments.candidates)
    if arguments.json:
        print(json.dumps(finite(found.as_dict()), ensure_ascii=False))
        return 0
    from rich.console import Console

    Console().print(found)
    return 0
