"""What every command line shares: its flags, and each of the user's errors as one line.

A command with an experiment's config is `python -m collab_jax.X --config FILE --workdir DIR
[--config.KEY=VALUE ...]` and is started by `run_with_config`; any other one reads its arguments by
argparse and is started by `run`. Both refuse an unknown flag or key. A command defines flags of its
own in its `if __name__ == "__main__":` block: importing a module defines no flag, and the other
commands refuse this one's.
"""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import app, flags
from ml_collections import config_flags

from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError

Command = Callable[..., int]  # (config, workdir) or (config) -> exit status
# What parsing raises for a flag, a setting or a config file that cannot be used.
MISTAKES = (flags.Error, AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError)


def run(main: Callable[[list[str]], int]) -> None:
    """Exits with the status of main(arguments), or with 1 and one line for a UserError."""
    with _user_error_as_one_line():
        sys.exit(main(sys.argv[1:]))


def run_with_config(
    main: Command | Mapping[str, Command],
    workdir: bool = True,
    default_config: str | None = None,
    default_workdir: str | None = None,
    several_hosts: bool = False,
) -> None:
    """Exits with the status of main(config, workdir), or with 1 and one line for a UserError.

    workdir: whether the command has --workdir; without it, main(config) is called. A flag without a
    default is required. Of several commands by name, the first argument names the one to run.
    several_hosts: whether the command has --hosts, --host and --coordinator.
    """
    config_flag = config_flags.DEFINE_config_file(
        "config", default_config, "The experiment's file.", lock_config=True
    )
    if default_config is None:
        flags.mark_flag_as_required("config")
    workdir_flag = None
    if workdir:
        workdir_flag = flags.DEFINE_string(
            "workdir",
            default_workdir,
            "Folder of the run, with everything it writes; made if absent.",
        )
        if default_workdir is None:
            flags.mark_flag_as_required("workdir")

    joined = _hosts_flags() if several_hosts else contextlib.nullcontext

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            _ = config_flag.value.cpu_devices  # a missing file raises at its first use only
        except MISTAKES as error:
            raise UserError(" ".join(str(error).split())) from None
        return rest

    def start(argv: Sequence[str]) -> int:
        command, rest = _choose(main, argv[1:])
        if rest:
            raise UserError(
                f"unexpected argument {rest[0]!r}: settings are written --config.KEY=VALUE"
            )
        process.set_up(config_flag.value.cpu_devices)
        with joined():
            if workdir_flag is None:
                return command(config_flag.value)
            return command(config_flag.value, pathlib.Path(str(workdir_flag.value)).expanduser())

    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of each request
    with _user_error_as_one_line():
        app.run(start, flags_parser=parse)


def _hosts_flags() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Defines the flags of a command that runs on several hosts; returns `joined` with them."""
    count = flags.DEFINE_integer("hosts", 1, "Processes of this job, one on each host.")
    number = flags.DEFINE_integer(
        "host", None, "Which of them this is, from 0; default: as the scheduler says."
    )
    coordinator = flags.DEFINE_string(
        "coordinator", None, "ADDRESS:PORT of host 0; default: as the scheduler says."
    )
    return lambda: joined(count.value, number.value, coordinator.value)


@contextlib.contextmanager
def joined(count: int, number: int | None, coordinator: str | None) -> Iterator[None]:
    """The hosts of a job are joined while the context lasts, as `hosts.join` does it.

    An error that leaves it is told to the other hosts. What is printed is host 0's alone. Raises
    UserError for flags that do not go together.
    """
    from collab_jax.runtime import hosts, parallel  # which need jax; some commands do without

    if count < 1:
        raise UserError(f"--hosts={count} must be at least 1")
    if (number is None) != (coordinator is None):
        raise UserError("--host and --coordinator go together: set both, or neither")
    if count == 1:
        if number or coordinator:
            raise UserError("--host and --coordinator need --hosts, the number of processes")
        yield
        return
    if number is not None and not 0 <= number < count:
        raise UserError(f"--host={number} must lie in 0 to {count - 1}, as --hosts={count}")
    hosts.join(count, number, coordinator)
    if not hosts.is_first():
        sys.stdout = open(os.devnull, "w")  # host 0 tells how the run stands
    with hosts.failure_told():
        parallel.connect()
        yield


def _choose(
    main: Command | Mapping[str, Command], arguments: Sequence[str]
) -> tuple[Command, Sequence[str]]:
    """The command to run, and the arguments that are left."""
    if callable(main):
        return main, arguments
    name = arguments[0] if arguments else ""
    if name not in main:
        raise UserError(
            f"which of {', '.join(main)}? The command's name comes first, before the flags"
        )
    return main[name], arguments[1:]


@contextlib.contextmanager
def _user_error_as_one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
