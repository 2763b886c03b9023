"""The one error a user can mend: its message is a single line that says what is wrong and what to
do.
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input, configuration or data; command lines print it without a traceback and exit with
    status 1.
    """


def run_command(main: Callable[[list[str]], int]) -> None:
    """Exits with main(arguments)'s status; a UserError is one line and status 1."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
