"""`mmtransfer token`: who may use a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmtransfer.errors import UserError

_ACTIONS = ("add", "list", "remove")
_ROLES = ("viewer", "operator", "admin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, the name, the role, the file."""
    parser.description = (
        "Make, list and remove the tokens with which others use mmtransfer serve. A token is shown "
        "once, when it is made; only its digest is kept. A running server follows at once."
    )
    parser.add_argument("action", metavar="ACTION", choices=_ACTIONS, help="add, list or remove")
    parser.add_argument("name", metavar="NAME", nargs="?", help="whose token")
    parser.add_argument(
        "--role",
        choices=_ROLES,
        metavar="viewer|operator|admin",
        help="viewer: see and search; operator: have recordings, streams and texts processed as "
        "well; admin: forget and reload as well",
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="file of tokens (default: tokens.json in the user's folder of settings)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    from mmtransfer.server.tokens import Role, Tokens, tokens_path

    tokens = Tokens(arguments.tokens or tokens_path())
    if arguments.action == "list":
        for token in tokens.all():
            print(f"{token.role.name.lower():8}  {token.name}")
        return 0
    if arguments.name is None:
        raise UserError(f"expected mmtransfer token {arguments.action} NAME.")
    if arguments.action == "remove":
        tokens.remove(arguments.name)
        return 0
    if arguments.role is None:
        raise UserError(f"expected --role, one of {', '.join(_ROLES)}.")
    print(tokens.add(arguments.name, Role[arguments.role.upper()]))
    return 0
