"""`mmtransfer compare`: structures of transfer side by side under one budget."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mmtransfer.cli.common import quiet_libraries
from mmtransfer.cli.train import add_fields
from mmtransfer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, what is compared, and an option for each field."""
    parser.description = (
        "Train structures of transfer under one budget with several seeds and report which "
        "differences are significant. The same command resumes an interrupted one. Every field of "
        "the configuration can be overridden, as for train."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration (see configs/)")
    parser.add_argument(
        "--structures",
        nargs="+",
        metavar="NAME",
        help="source, scratch, feature, combined, end_to_end, lora (default: all), or NAME=STAGES "
        'with a list of stages, e.g. gradual=\'[{"frozen": "all"}, {"frozen": 4}]\'',
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each structure (default: 3)")
    parser.add_argument("--steps", type=int, help="the budget of each run, in optimiser steps")
    parser.add_argument("--seconds", type=float, help="the same in seconds of training")
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="SHARE",
        help="shares of the training data, for learning curves; the whole is always among them",
    )
    parser.add_argument("--to", metavar="DIR", help="folder to write (default: run_dir)")
    parser.set_defaults(overrides=add_fields(parser))


def run(arguments: argparse.Namespace) -> int:
    """Compare and print the table; returns the exit code."""
    from mmtransfer.config import load_config

    config = load_config(arguments.config, arguments.overrides(arguments))
    quiet_libraries()
    from mmtransfer.runs.compare import compare
    from mmtransfer.transfer.trainer import Interrupted

    try:
        found = compare(
            config,
            structures=_structures(arguments.structures),
            seeds=arguments.seeds,
            steps=arguments.steps,
            seconds=arguments.seconds,
            shares=arguments.shares,
            to=arguments.to,
        )
    except Interrupted as stop:
        print("mmtransfer: stopped; the same command resumes", file=sys.stderr)
        return stop.exit_code
    print(found)
    print(f"page: {arguments.to or config.run_dir}/comparison.html")
    return 0


def _structures(given: list[str] | None) -> dict[str, list[dict[str, Any]] | None] | None:
    if given is None:
        return None
    found: dict[str, list[dict[str, Any]] | None] = {}
    for text in given:
        name, separator, stages = text.partition("=")
        found[name] = None
        if separator:
            try:
                found[name] = json.loads(stages)
            except json.JSONDecodeError:
                raise UserError(
                    f"--structures {name}: expected a list of stages as JSON, found {stages!r:.80}."
                ) from None
    return found
