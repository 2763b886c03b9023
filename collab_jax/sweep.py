"""Sweeps: many training runs from one file, one after the other; a finished run is kept and never
repeated.

    python -m collab_jax.sweep --config configs/sweeps/paper_table.py --out runs/paper_table

Every cell runs with each of its seeds in OUT/CELL/seed-S, all cells' first seeds before any second,
so that a sweep that is stopped has a report of what there is. The same command goes on, also in the
middle of a run. A run that fails is told at the end, and the others go on. Then OUT has the report
of all cells (report.html, report.md) and their comparison (compare.md, compare.json).

`--publish DIR` copies what these are made of to DIR, without the heavy parts (checkpoints, margin
traces, cloud answers, all texts but those that the first run wrote at its end): small enough to
keep in a repository, and a sweep goes on from such a folder too.
"""

import argparse
import pathlib
import signal

from collab_jax.reports import sweep as sweep_report
from collab_jax.rl import sweeps
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.sweep", description="Many training runs from one file."
    )
    parser.add_argument(
        "--config", type=pathlib.Path, required=True, help="a file of configs/sweeps"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--publish", type=pathlib.Path, help="folder for the report and what it is made of"
    )
    args = parser.parse_args(argv)

    def stop(number, frame):
        raise sweeps.SweepStopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    sweep = sweeps.load(args.config)
    for folder, flag in ((args.out, "--out"), (args.publish or args.out, "--publish")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}): choose another {flag}"
            ) from None
    if args.publish and args.publish.resolve() == args.out.resolve():
        raise UserError(f"--publish {args.publish} is --out itself: choose another folder")
    try:
        failed = sweeps.run(sweep, args.out)
    except sweeps.SweepStopped:
        failed = []
        print("stopped and saved; the same command goes on")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if sweep_report.write_report(sweep, args.out, args.config) and args.publish:
        sweep_report.publish(sweep, args.out, args.publish)
    return int(bool(failed))


if __name__ == "__main__":
    cli.run(main)
