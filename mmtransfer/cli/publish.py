"""`mmtransfer publish`: a run on the Hub."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and where it goes."""
    parser.description = (
        "Upload a run's model in one commit, as a private repository unless --public."
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("repo_id", metavar="REPO_ID", help="USER/NAME on the Hub")
    parser.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be sent")


def run(arguments: argparse.Namespace) -> int:
    """Upload it and print where it is; returns the exit code."""
    from mmtransfer.hub.publish import publish

    print(
        publish(
            arguments.run_folder,
            arguments.repo_id,
            private=not arguments.public,
            dry_run=arguments.dry_run,
        )
    )
    return 0
