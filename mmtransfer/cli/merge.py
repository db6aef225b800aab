"""`mmtransfer merge`: several models into one, or one part of the way back to its source model."""

from __future__ import annotations

import argparse

from mmtransfer.cli.common import MODEL_HELP, REVISION_HELP, at_revision, quiet_libraries
from mmtransfer.errors import UserError

_METHODS = (
    "auto",
    "interpolate",
    "uniform",
    "greedy",
    "task_arithmetic",
    "ties",
    "dare",
    "last",
    "ensemble",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, how they are combined, and what they are scored on."""
    parser.description = (
        "Combine models of one source model into one, scored on every domain that they came from."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--revision", help=f"{REVISION_HELP}: of each MODEL whose name has none behind an @"
    )
    parser.add_argument("--to", required=True, metavar="RUN", help="run folder to write")
    parser.add_argument(
        "--method",
        choices=_METHODS,
        default="auto",
        help="interpolate: between the source model and one model (auto for one); uniform: "
        "the mean (auto for several); greedy: the mean of those that help; task_arithmetic, ties, "
        "dare: the source model plus what each changed; last: the mean of a run's last "
        "checkpoints; ensemble: predictions of models that cannot be merged",
    )
    parser.add_argument(
        "--source-model",
        metavar="MODEL",
        help="source model that the models were adapted from, where it is not recorded",
    )
    parser.add_argument(
        "--share", type=float, help="interpolate: share of the way, instead of a sweep"
    )
    parser.add_argument(
        "--keep-source",
        type=float,
        metavar="LOSS",
        help="interpolate: the most target gain at that loss at most on every source-domain set",
    )
    parser.add_argument(
        "--scale", type=float, help="task_arithmetic, ties, dare: scale of the changes"
    )
    parser.add_argument(
        "--density", type=float, help="ties, dare: share of each change that is kept"
    )
    for name, what in (("data", "target domain"), ("source-domain", "source-domain set")):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=[],
            metavar="NAME=PATH",
            dest=f"{name.partition('-')[0]}_sets",
            help=f"a further {what}, beside those of the run folders",
        )
    parser.add_argument("--seed", type=int, default=0, help="random seed")


def run(arguments: argparse.Namespace) -> int:
    """Merge and print the table; returns the exit code."""
    quiet_libraries()
    from mmtransfer.config import RuntimeConfig, checked
    from mmtransfer.runs.merge import merge

    print(
        merge(
            [
                name if "@" in name else at_revision(name, arguments.revision)
                for name in arguments.models
            ],
            arguments.to,
            method=arguments.method,
            source_model=arguments.source_model,
            share=arguments.share,
            keep_source=arguments.keep_source,
            scale=arguments.scale,
            density=arguments.density,
            data=_named(arguments.data_sets),
            source_domain=_named(arguments.source_sets),
            runtime=checked(RuntimeConfig, {"seed": arguments.seed}, "merge"),
        )
    )
    return 0


def _named(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, separator, place = pair.partition("=")
        if not (name and separator and place):
            raise UserError(f"expected NAME=PATH, found {pair!r}.")
        found[name] = place
    return found
