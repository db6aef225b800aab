"""`mmtransfer publish`: a run on the Hub."""

from __future__ import annotations

import argparse

from mmtransfer.cli.common import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and where it goes."""
    parser.description = (
        "Load a run's model, compare what it gives with what training recorded, and upload what "
        "changed in one commit, into a private repository unless --public. An interrupted upload "
        "continues with the same command."
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("repo_id", metavar="REPO_ID", help="USER/NAME on the Hub")
    parser.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch, made if it is not there (default main)"
    )
    parser.add_argument("--tag", help="a tag for the commit, such as v1.0")
    parser.add_argument("--message", help="what the commit says")
    parser.add_argument(
        "--pr",
        action="store_true",
        help="propose it as a pull request, also to a repository of others",
    )
    parser.add_argument(
        "--export",
        nargs="+",
        default=[],
        choices=("ct2", "onnx"),
        help="also send it in these formats, as mmtransfer export writes them",
    )
    parser.add_argument(
        "--sign",
        metavar="KEY",
        help="sign it: the file of a private key (PEM, elliptic curve), or 'sigstore'",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only print the files, their sizes and the card"
    )


def run(arguments: argparse.Namespace) -> int:
    """Upload it and print where it is; returns the exit code."""
    quiet_libraries()
    from mmtransfer.runs.publishing import publish

    print(
        publish(
            arguments.run_folder,
            arguments.repo_id,
            private=not arguments.public,
            revision=arguments.revision,
            tag=arguments.tag,
            message=arguments.message,
            pr=arguments.pr,
            exports=arguments.export,
            sign=arguments.sign,
            dry_run=arguments.dry_run,
        )
    )
    return 0
