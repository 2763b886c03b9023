"""The one error that a user can mend: its message says in one line what is wrong and what to do."""


class UserError(ValueError):
    """Bad input, configuration or data.

    A command line prints the message without a traceback and exits with status 1.
    """
