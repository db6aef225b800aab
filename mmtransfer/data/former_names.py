"""Fields and options by the names that version 0.1 had for them: taken for one release, with a
warning that gives the new name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
CONFIGURATION = {"source": "source_model"}
DATA = {"sources": "source_domain"}
MONITOR = {"watch": "keywords", "clips": "alert_clips"}
OPTIONS = {
    "source": "source_model",
    "data.sources": "data.source_domain",
    "watch": "keywords",
    "clips": "alert-clips",
}
"""Of the command line."""


def with_new_names(
    values: Mapping[str, Any], names: Mapping[str, str], where: str
) -> dict[str, Any]:
    """A copy of `values` in which each key of `names` has its new name.

    Raises:
        UserError: a value by both names.
    """
    renamed = dict(values)
    for former, new in names.items():
        if former not in renamed:
            continue
        if new in renamed:
            raise UserError(f"{where}: '{former}' is called '{new}' now; give one of them.")
        _warn(where, former, new)
        renamed[new] = renamed.pop(former)
    return renamed


def option_with_new_name(argument: str) -> str:
    """An argument of the command line; an option by its new name."""
    option, equals, value = argument.partition("=")
    new = OPTIONS.get(option[2:]) if option.startswith("--") else None
    if new is None:
        return argument
    _warn("command line", option, f"--{new}")
    return f"--{new}{equals}{value}"


def _warn(where: str, former: str, new: str) -> None:
    logger.warning(
        "%s: '%s' is called '%s' now; the former name works until 0.3",
        where,
        former,
        new,
    )
