"""The one exception that reaches a user as a single line with exit code 2."""


class UserError(Exception):
    """Input that cannot be used: says what was expected, what was found, and the fix."""
