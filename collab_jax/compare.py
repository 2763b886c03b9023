"""What routing is worth, from records alone: this project's, or anybody's recorded answers. No jax.

    python -m collab_jax.compare --records A.parquet B.parquet --out DIR

compares every router that the records have the columns for (`routing/`), by replay on the same
prompts, and writes compare.json, compare.md, compare.html and frontier.png. A table may have a
name, and a file for each of its seeds:

    --records gapg=runs/gapg-0/after.parquet,runs/gapg-1/after.parquet \\
    --fit gapg=runs/gapg-0/fit.parquet,runs/gapg-1/fit.parquet

`--fit` gives learned routers the records of other prompts to be fitted on. Intervals are of 95 %:
Student's over seeds and a bootstrap's over prompts, at once; those of a difference are paired.
"""

import argparse
import pathlib
from collections.abc import Sequence

from collab_jax import records
from collab_jax.reports import comparison
from collab_jax.reports.comparison import Model
from collab_jax.reports.summary import BUDGETS
from collab_jax.routing import costs
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError


def parse_tables(words: Sequence[str]) -> dict[str, list[pathlib.Path]]:
    """Files by name, of words "NAME=FILE,FILE" or "FILE".

    A table without a name is called after its file, and after the folder too if names would
    collide. Raises UserError for a name that occurs twice, or that has ': ' in it.
    """
    tables: dict[str, list[pathlib.Path]] = {}
    # A folder may have "=" in its name, as a run of a search has.
    pairs = [word.partition("=")[::2] for word in words]
    pairs = [
        (name, paths) if paths and "/" not in name else ("", word)
        for (name, paths), word in zip(pairs, words, strict=True)
    ]
    unnamed = [pathlib.Path(paths).stem for name, paths in pairs if not name]
    for name, paths in pairs:
        files = [pathlib.Path(path) for path in paths.split(",")]
        if not name:
            stem = files[0].stem
            name = stem if unnamed.count(stem) == 1 else f"{files[0].parent.name}/{stem}"
        if ": " in name:
            raise UserError(
                f"a table cannot be called {name!r}, with ': ' in it: that separates model and "
                "router"
            )
        if name in tables:
            raise UserError(
                f"two tables are called {name!r}: give them names, as --records first={files[0]}"
            )
        tables[name] = files
    return tables


def load(words: Sequence[str], fit_words: Sequence[str]) -> dict[str, Model]:
    """The models of the command line, from the words of --records and --fit.

    Raises UserError where a --fit does not go with a --records.
    """
    tables, fits = parse_tables(words), parse_tables(fit_words)
    for name, files in fits.items():
        if len(files) != len(tables.get(name, ())):
            raise UserError(
                f"--fit {name} has {len(files)} files, --records {name} "
                f"{len(tables.get(name, ()))}: one for each seed"
            )
    models = {}
    for name, files in tables.items():
        fit_on = [records.read(file) for file in fits.get(name, ())]
        seeds = [records.read(file) for file in files]
        models[name] = Model(seeds, fit_on or [None] * len(seeds))
    return models


def prices(args: argparse.Namespace) -> costs.Prices | None:
    """The prices of the command line; None where it has none.

    Raises UserError for prices without --cloud_seconds.
    """
    given = (args.usd_per_call, args.usd_per_million_tokens, args.device_ms_per_token)
    if args.cloud_seconds is None:
        if any(price is not None for price in given):
            raise UserError("prices come with --cloud_seconds, the latency of a call")
        return None
    return costs.Prices(
        cloud_seconds=args.cloud_seconds,
        usd_per_call=args.usd_per_call,
        usd_per_million_tokens=args.usd_per_million_tokens,
        device_ms_per_token=args.device_ms_per_token,
    )


def main(argv: list[str]) -> int:
    """Compares the routers of the tables, and writes the comparison."""
    args = parse(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {args.out} ({error.strerror}): choose another --out"
        ) from None
    costs_of = prices(args)
    models = load(args.records, args.fit)
    result = comparison.compare(models, args.budgets, args.resamples, args.reference, costs_of)
    print(comparison.write(args.out, result))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.compare", description="Compares routers, from records alone."
    )
    add = parser.add_argument
    add(
        "--records",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE[,FILE]",
        help="a table, one file a seed",
    )
    add(
        "--fit",
        nargs="+",
        default=[],
        metavar="NAME=FILE[,FILE]",
        help="what learned routers are fitted on",
    )
    add(
        "--out",
        type=pathlib.Path,
        required=True,
        help="folder for compare.json, compare.md, compare.html, frontier.png",
    )
    add(
        "--budgets",
        type=float,
        nargs="+",
        default=BUDGETS,
        help="shares of prompts that go to the cloud",
    )
    add("--resamples", type=int, default=1000, help="of the bootstrap")
    add("--cloud_seconds", type=float, help="latency of a call; with it costs are reported")
    add("--usd_per_call", type=float, help="price of a call; default: the records' cloud_usd")
    add(
        "--usd_per_million_tokens",
        type=float,
        help="price of a call's tokens, by the records' cloud_tokens",
    )
    add("--device_ms_per_token", type=float, help="speed of the device; default: the records' ms")
    add("--reference", default="", metavar="NAME: ROUTER", help="what the others are compared with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
