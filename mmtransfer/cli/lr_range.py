"""`mmtransfer lr-range`: a learning rate by a range test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmtransfer.cli.common import count, quiet_libraries
from mmtransfer.cli.train import add_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration with its fields, the stage, the plot."""
    parser.description = (
        "Find a learning rate: train for some steps while the rate grows, and see where the loss "
        "falls fastest. Writes a plot."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration (see configs/)")
    parser.add_argument(
        "--stage", type=count, default=1, metavar="N", help="stage of the transfer, from 1"
    )
    parser.add_argument(
        "--range-steps", type=count, metavar="N", help="steps of the test (default 100)"
    )
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="the plot (default: lr_range.svg in the run folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(overrides=add_fields(parser))


def run(arguments: argparse.Namespace) -> int:
    """Test and print; returns the exit code."""
    from mmtransfer.config import load_config

    config = load_config(arguments.config, arguments.overrides(arguments))
    quiet_libraries()

    from mmtransfer.runs.lr_range import STEPS, lr_range, write_plot

    steps = STEPS if arguments.range_steps is None else arguments.range_steps
    found = lr_range(config, stage=arguments.stage, steps=steps)
    path = Path(arguments.plot or Path(config.run_dir) / "lr_range.svg")
    write_plot(found, path)
    if arguments.json:
        print(json.dumps(found.as_dict()))
    else:
        print(found)
        print(f"plot: {path}")
    return 0
