"""What every command line shares: flags, and errors as one line.

`python -m collab_jax.X --config FILE --workdir DIR [--config.KEY=VALUE ...]`. An unknown key is an
error.
"""

import logging
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError

Command = Callable[..., int]
# What parsing raises for a flag, a setting or a config file that cannot be used.
MISTAKES = (flags.Error, AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError)


def main(run: Command | dict[str, Command], workdir: bool = True) -> None:
    """Parses the flags and exits with run(config, workdir)'s status, or run(config)'s; a UserError
    is told, and status 1.

    With several commands, by name, the first argument is the name of the one to run.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "The experiment's file.", lock_config=True
    )
    flags.mark_flag_as_required("config")
    if workdir:
        workdir_flag = flags.DEFINE_string(
            "workdir", None, "Where everything of this run is kept; made if absent."
        )
        flags.mark_flag_as_required("workdir")

    def start(argv):
        try:
            command = run
            if isinstance(run, dict):
                if (name := argv.pop(1) if len(argv) > 1 else None) not in run:
                    raise UserError(f"which of {', '.join(run)}? It comes first, before the flags")
                command = run[name]
            if len(argv) > 1:
                raise UserError(
                    f"unexpected argument {argv[1]!r}: settings are written --config.KEY=VALUE"
                )
            process.set_up(config_flag.value.cpu_devices)
            folder = [pathlib.Path(workdir_flag.value).expanduser()] if workdir else []
            sys.exit(command(config_flag.value, *folder))
        except UserError as error:
            sys.exit(f"error: {error}")

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
            _ = (
                config_flag.value.cpu_devices
            )  # a file that is not there is told at the first use only
            return rest
        except MISTAKES as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    logging.getLogger("jax").setLevel(logging.ERROR)
    app.run(start, flags_parser=parse)
