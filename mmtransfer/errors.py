"""The one exception that reaches a user as a single line with exit code 2."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")  # those of str.splitlines


class UserError(Exception):
    """Input that cannot be used: says what was expected, what was found, and the fix, on one line
    whatever it names.
    """

    def __str__(self) -> str:
        r"""The message, with breaks of lines that names brought in as in `\n`."""
        return _BREAKS.sub(lambda found: ascii(found[0])[1:-1], super().__str__())
