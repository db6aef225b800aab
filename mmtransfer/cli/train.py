"""`mmtransfer train`: one transfer from a configuration."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

from mmtransfer.cli.common import add_ray, quiet_libraries
from mmtransfer.data.printing import printable
from mmtransfer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and an option for each of its fields."""
    parser.description = (
        "Run the transfer that a configuration describes and write its run folder. "
        "Every field of the configuration can be overridden: --train.learning_rate 1e-4"
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration (see configs/)")
    parser.add_argument("--run-dir", help="run folder to write (the same as --run_dir)")
    parser.add_argument(
        "--structure",
        metavar="NAME",
        help="feature, combined, end_to_end, lora, or auto, which chooses by short runs; in the "
        "place of the configuration's stages (the same as --transfer.preset without stages)",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        metavar="S",
        help="time of the choice and the training with --structure auto (the same as "
        "--auto.budget_seconds)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    add_ray(parser)
    parser.set_defaults(overrides=add_fields(parser))


def add_fields(parser: argparse.ArgumentParser) -> Any:
    """Add an option for every configuration field; returns what reads them back, nested."""
    from pydantic_settings import (
        BaseSettings,
        CliSettingsSource,
        SettingsConfigDict,
        SettingsError,
    )

    from mmtransfer.config import Config

    class Fields(Config, BaseSettings):
        model_config = SettingsConfigDict(
            extra="forbid", use_attribute_docstrings=True, frozen=True
        )

    own = {action.dest for action in parser._actions}
    source: Any = CliSettingsSource(
        Fields, root_parser=parser, cli_hide_none_type=True, cli_parse_none_str="null"
    )

    def read(arguments: argparse.Namespace) -> dict[str, Any]:
        given = {
            name: value
            for name, value in vars(arguments).items()
            if value is not None and name not in own and name not in ("verb", "run", "overrides")
        }
        try:
            return dict(source(parsed_args=given)())
        except SettingsError as error:
            named = re.search(r' for (?:field ")?([\w.]+)', str(error))
            field = named[1] if named else ""
            raise UserError(
                f"--{field}: expected JSON (a list or an object, names in double quotes), "
                f"found {given.get(field)!r}."
            ) from error

    return read


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from mmtransfer.config import load_config

    overrides = arguments.overrides(arguments)
    if arguments.run_dir is not None:
        overrides["run_dir"] = arguments.run_dir
    if arguments.structure is not None:
        overrides["transfer"] = {"stages": []} | overrides.get("transfer", {})
        overrides["transfer"]["preset"] = arguments.structure
    if arguments.budget_seconds is not None:
        overrides.setdefault("auto", {})["budget_seconds"] = arguments.budget_seconds
    config = load_config(arguments.config, overrides)
    quiet_libraries()

    from mmtransfer import runs
    from mmtransfer.scale.cluster import check_workers
    from mmtransfer.transfer.trainer import Interrupted

    gpus = arguments.gpus_per_worker or 0.0
    check_workers(arguments.ray, arguments.workers, gpus)
    try:
        if arguments.ray is None:
            report = runs.train(config, resume=arguments.resume)
        else:
            from mmtransfer.scale.train_on_ray import train_on_ray

            report = train_on_ray(
                config,
                arguments.ray,
                workers=arguments.workers,
                gpus_per_worker=gpus,
                resume=arguments.resume,
            )
    except Interrupted as stop:
        print(f"mmtransfer: {stop}", file=sys.stderr)
        return stop.exit_code
    if os.environ.get("RANK", "0") == "0":
        _print_report(config.run_dir, report)
    return 0


def _print_report(run_dir: str, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mmtransfer.runs.report import (
        choice_rows,
        forgetting_note,
        gain_note,
        metric_name,
        metric_rows,
    )

    better = "higher" if report["higher_is_better"] else "lower"
    table = Table(title=f"{metric_name(report['metric'])} with 95 % interval; {better} is better")
    for column in ("set", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for row in metric_rows(report):
        table.add_row(*(Text(printable(cell)) for cell in row))
    cost = report["cost"]
    console = Console()
    if "choice" in report:
        columns, rows = choice_rows(report["choice"])
        tried = Table(title="what was tried")
        for column in columns:
            tried.add_column(column, justify="left" if column == columns[0] else "right")
        for cells in rows:
            tried.add_row(*cells)
        console.print(tried)
        console.print(" ".join(report["choice"]["reasons"]), highlight=False, markup=False)
    console.print(table)
    line = f"{cost['steps']} steps in {cost['train_seconds']:.0f} s; best at step "
    line += f"{cost['best_step']}; saved as {report['form']}"
    if "shortest_context_s" in report["model"]:
        line += f"; shortest safe context {report['model']['shortest_context_s']:g} s"
    console.print(line, highlight=False, markup=False)
    console.print(f"run folder: {run_dir}", highlight=False, soft_wrap=True, markup=False)
    gain = gain_note(report)
    if gain is not None:
        console.print(gain, highlight=False, soft_wrap=True, markup=False)
    note = forgetting_note(report)
    if note is not None:
        console.print(note, highlight=False, soft_wrap=True, style="bold red", markup=False)
