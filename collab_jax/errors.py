"""The one error a user can mend: its message is a single line that says what is wrong and what to do."""


class UserError(ValueError):
    """Bad input, configuration or data; command lines print it without a traceback and exit with status 1."""
