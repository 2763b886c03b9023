"""What routing is worth, from records alone (no jax, no model): ours, or anybody's recorded
answers.

    python -m collab_jax.compare --records A.parquet B.parquet --out DIR

compares every router that the records have the columns for (`routers/`), by replay on the same
prompts, and writes compare.json, compare.md, compare.html and frontier.png. A table may have a
name, and a file for each of its seeds:

    --records gapg=runs/gapg-0/after.parquet,runs/gapg-1/after.parquet --fit gapg=runs/gapg-0/fit.parquet,runs/gapg-1/fit.parquet

`--fit` gives learned routers the records of other prompts to be fitted on. Intervals are of 95 %,
from a bootstrap over seeds and prompts; those of a difference are paired.
"""

import argparse
import pathlib
from collections.abc import Sequence

from collab_jax import records
from collab_jax.reports import comparison
from collab_jax.reports.summary import BUDGETS
from collab_jax.routing import costs
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError

# ---------------------------------------------------------------------------------------- models and routers


# ---------------------------------------------------------------------------------------------------- output


def parse_tables(words: Sequence[str]) -> dict[str, list[pathlib.Path]]:
    """Files by name, of words "NAME=FILE,FILE" or "FILE"; one without a name is called after the
    file, and its folder if need be.
    """
    found: dict[str, list[pathlib.Path]] = {}
    alone = [pathlib.Path(word).stem for word in words if "=" not in word]
    for word in words:
        name, _, files = word.rpartition("=")
        paths = [pathlib.Path(file) for file in files.split(",")]
        if not name:
            name = (
                paths[0].stem
                if alone.count(paths[0].stem) == 1
                else f"{paths[0].parent.name}/{paths[0].stem}"
            )
        if ": " in name:
            raise UserError(
                f"a table cannot be called {name!r}, with ': ' in it: that parts model and router"
            )
        if name in found:
            raise UserError(
                f"two tables are called {name!r}: give them names, as --records first={paths[0]}"
            )
        found[name] = paths
    return found


def load(words: Sequence[str], fit_words: Sequence[str]) -> dict[str, comparison.Model]:
    """The models of the command line. Raises UserError where a --fit does not go with a --records."""
    tables, fits = parse_tables(words), parse_tables(fit_words)
    for name, files in fits.items():
        if len(files) != len(tables.get(name, ())):
            raise UserError(
                f"--fit {name} has {len(files)} files, --records {name} {len(tables.get(name, ()))}: one for each seed"
            )
    read = lambda files: [records.read(file) for file in files]  # noqa: E731
    return {
        name: comparison.Model(
            read(files), read(fits[name]) if name in fits else [None] * len(files)
        )
        for name, files in tables.items()
    }


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.compare", description="Routers compared, from records alone."
    )
    parser.add_argument(
        "--records",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE[,FILE]",
        help="a table, one file a seed",
    )
    parser.add_argument(
        "--fit",
        nargs="+",
        default=[],
        metavar="NAME=FILE[,FILE]",
        help="what learned routers are fitted on",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="folder for compare.json, compare.md, compare.html, frontier.png",
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=BUDGETS,
        help="shares of prompts that go to the cloud",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument(
        "--cloud_seconds", type=float, help="latency of a call; with it costs are told"
    )
    parser.add_argument(
        "--usd_per_call", type=float, help="price of a call; else the records' cloud_usd"
    )
    parser.add_argument(
        "--usd_per_million_tokens",
        type=float,
        help="price of a call's tokens, by the records' cloud_tokens",
    )
    parser.add_argument(
        "--device_ms_per_token", type=float, help="speed of the device; else the records' ms"
    )
    parser.add_argument(
        "--reference", default="", metavar="NAME: ROUTER", help="what the others are compared with"
    )
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {args.out} ({error.strerror}): choose another --out"
        ) from None
    prices = None
    if args.cloud_seconds is not None:
        prices = costs.Prices(
            args.cloud_seconds,
            args.usd_per_call,
            args.usd_per_million_tokens,
            args.device_ms_per_token,
        )
    elif (args.usd_per_call, args.usd_per_million_tokens, args.device_ms_per_token) != (None,) * 3:
        raise UserError("prices come with --cloud_seconds, the latency of a call")
    result = comparison.compare(
        load(args.records, args.fit), args.budgets, args.resamples, args.reference, prices
    )
    print(comparison.write(args.out, result))
    return 0


if __name__ == "__main__":
    cli.run(main)
