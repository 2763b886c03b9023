"""Sweeps: many training runs from one file, one after the other; no finished run is repeated.

    python -m collab_jax.sweep --config configs/sweeps/chain.py --out runs/chain

Every cell runs with each of its seeds in OUT/CELL/seed-S, all cells' first seeds before any second,
so that a sweep that is stopped has a report of what there is. The same command continues, also in
the middle of a run; SIGTERM or Ctrl-C saves and exits with status 75. A sweep with a search
(`Sweep.search`) first chooses each cell's best value of one setting on validation, by runs in
OUT/search (`rl/search.py`). Where a run fails, the others go on, and the exit status is 1. OUT then
has the report of all cells (report.html, report.md) and their comparison (compare.md,
compare.json).

Several hosts run the same command, with OUT on a file system that all share, and with --hosts=N
--host=I --coordinator=ADDRESS:PORT: all of them take part in each run. PORT and the one after it
are free on host 0.

`--publish DIR` writes the report to DIR, with what it is made of and without the rest (checkpoints,
margin traces, most natural responses, most metrics): small enough to keep in a repository. A sweep
continues from such a folder, too, and compares its runs with the same figures.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

from collab_jax.reports import publish
from collab_jax.reports import sweep as sweep_report
from collab_jax.rl import sweeps
from collab_jax.runtime import cli, files, process
from collab_jax.runtime.errors import UserError


def main(argv: list[str]) -> int:
    """Runs and reports a sweep; returns 1 where a run failed, STOPPED where it was stopped."""
    args = parse(argv)
    sweep = sweeps.load(args.config)
    _make_folder(args.out, "--out")
    if args.publish:
        _make_folder(args.publish, "--publish")
        if args.publish.resolve() == args.out.resolve():
            raise UserError(f"--publish {args.publish} is --out itself: choose another folder")
    with joined(args) as here, contextlib.nullcontext() if here.host else files.held(args.out):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        try:
            status = int(bool(sweeps.run(sweep, args.out, here)))
        except sweeps.SweepStopped:
            status = process.STOPPED
            print("stopped and saved; the same command continues")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # The other hosts wait: one that has ended is not waited for without end.
        reported = not here.host and sweep_report.write_report(sweep, args.out, args.config)
        if reported and args.publish:
            publish.publish(sweep, args.out, args.publish)
        if status == process.STOPPED and here.flags:
            sys.exit(status)  # which the other hosts are told
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.sweep", description="Runs many trainings from one file."
    )
    add = parser.add_argument
    add("--config", type=pathlib.Path, required=True, help="a file of configs/sweeps")
    add("--out", type=pathlib.Path, required=True, help="folder of all runs")
    add("--publish", type=pathlib.Path, help="folder for the report and what it is made of")
    add("--hosts", type=int, default=1, help="how many hosts run this command together")
    add("--host", type=int, help="which of them this is, from 0")
    add("--coordinator", help="ADDRESS:PORT of host 0; this port and the next are free")
    return parser.parse_args(argv)


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[sweeps.Here]:
    """This host, joined with the others while the context lasts.

    The hosts of each run find each other at the port after that of the coordinator. Raises
    UserError where the arguments do not agree.
    """
    if args.hosts == 1:
        yield sweeps.ALONE
        return
    address, _, port = (args.coordinator or "").rpartition(":")
    if args.host is None or not 0 <= args.host < args.hosts or not (address and port.isdigit()):
        raise UserError(
            f"a sweep on several hosts needs --hosts=N, --host=0 to N - 1 (here {args.hosts} and "
            f"{args.host}), and the --coordinator=ADDRESS:PORT of host 0"
        )
    if args.host:
        sys.stdout = open(os.devnull, "w")  # host 0 tells how the sweep stands
    flags = ("--hosts", str(args.hosts), "--host", str(args.host))
    import jax

    from collab_jax.runtime import hosts

    jax.config.update("jax_platforms", "cpu")  # other devices are for the runs
    hosts.join(args.hosts, args.host, args.coordinator)
    with hosts.failure_told():
        yield sweeps.Here(args.host, (*flags, "--coordinator", f"{address}:{int(port) + 1}"))
        hosts.gathered("that it is done", None, hosts.FOREVER)


def _make_folder(folder: pathlib.Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): choose another {flag}"
        ) from None


def _stop(*_: object) -> None:
    raise sweeps.SweepStopped


if __name__ == "__main__":
    cli.run(main)
