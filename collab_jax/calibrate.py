"""Calibration: from margins on held-out prompts, the bias of the decision token for a budget or an
accuracy (no jax).

    python -m collab_jax.calibrate --records RUN/after.parquet --rate 0.3 --delta 0.05 --out FOLDER

`calibration.py` says how a bias is chosen, and what is promised of it. Where responses without an
answer, which always go to the cloud, alone exceed the budget, leave them to the margin as well:
`--margin_only`. With `--hold_out 0.5` the last half of the records is kept out of it, and the call
rate and accuracy on these are told.

collab_config.json, which only this module writes:

    version         1
    decision_token  the token whose logit gets the bias, or null; marker: the call as text, or null
    target, value   "rate" or "accuracy", and which; delta: the promise fails in at most this share of calibrations, or null
    bias            added to the decision token's logit before the answer opens
    call_unanswered whether a response that ends without a call and without an answer goes to the cloud as well
    prompts         how many it was calibrated on
    call_rate       expected, low, high (95 %)
    accuracy        measured, and low: its bound at 1 - delta; null where not asked for
    biases          [{rate, bias, expected}]: other budgets, each with that delta by itself; those out of reach are left out
    tracking        budget, step, low, high of a `Tracker`
"""

import argparse
import pathlib

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.routing import collab_config, measures
from collab_jax.routing.calibration import (
    Calibration,
    bias_for_accuracy,
    bias_for_rate,
    calls,
)
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent


def _summary(c: Calibration, path: pathlib.Path) -> str:
    """Two lines: what was chosen, what is promised."""
    measured = "" if c.accuracy is None else f", overall accuracy {c.accuracy:.1%}"
    interval = f"{c.rate:.1%} (95 %: {c.low:.1%} to {c.high:.1%})"
    bound = "call rate at most" if c.target == "rate" else "overall accuracy at least"
    promise = f"{bound} {c.value:.1%} on prompts like these, "
    if c.delta is not None:
        promise += f"with probability {1 - c.delta:.1%} over calibration sets"
    elif c.target == "rate":
        promise += "on average over calibration sets; for a bound on this one give --delta"
    else:
        promise = "nothing beyond these prompts; for a bound give --delta"
    return (
        f"bias {c.bias:+.4f} from {c.n} prompts: expected call rate {interval}{measured}; wrote {path}\n"
        f"promised: {promise}"
    )


def split(table: Records, share: float) -> tuple[Records, Records | None]:
    """The records to calibrate on, and the last `share` of them; None where that is 0."""
    if not 0 <= share < 1:
        raise UserError(f"--hold_out {share:g}: a share of the records, in [0, 1)")
    n = len(table["id"])
    first = n - round(share * n)
    if share == 0:
        return table, None
    if not 0 < first < n:
        raise UserError(
            f"--hold_out {share:g} of {n} records leaves {first} to calibrate on and {n - first} to check: change it"
        )
    cut = lambda rows: {name: column[rows] for name, column in table.items()}  # noqa: E731
    return cut(slice(first)), cut(slice(first, n))


def checked(bias: float, table: Records, margin_only: bool) -> str:
    """Call rate and overall accuracy of a bias on records, in percent with their intervals."""
    sent = calls(bias, table["margin"], (table["ended"] & table["formatted"]) | margin_only)
    right = np.where(sent, table["cloud_correct"] & table["cloud_known"], table["local_correct"])
    return f"call rate {percent(measures.rate(sent))} %, overall accuracy {percent(measures.rate(right))} %"


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.calibrate", description="A bias for a budget."
    )
    parser.add_argument(
        "--records", type=pathlib.Path, required=True, help="held-out records with margins"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--rate", type=float, help="share of prompts to call")
    target.add_argument(
        "--accuracy", type=float, help="overall accuracy to reach with as few calls as possible"
    )
    parser.add_argument(
        "--delta", type=float, help="promise it, but for this share of calibrations"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help=f"folder for {collab_config.NAME}, or a .json file",
    )
    parser.add_argument(
        "--hold_out",
        type=float,
        default=0.0,
        help="share of the records, the last ones, to check it on",
    )
    parser.add_argument(
        "--margin_only", action="store_true", help="call what has no answer by its margin alone too"
    )
    parser.add_argument("--decision_token", help="noted in the file for a server")
    parser.add_argument("--marker", help="the call as text, likewise")
    args = parser.parse_args(argv)
    table = records.read(args.records)
    records.require(table, ["margin"], "calibration")
    table, held_out = split(table, args.hold_out)
    margins, answered = table["margin"], (table["ended"] & table["formatted"]) | args.margin_only
    if args.accuracy is None:
        calibration = bias_for_rate(margins, answered, args.rate, args.delta)
    else:
        cloud_correct = (
            table["cloud_correct"] & table["cloud_known"]
        )  # a failed call brought no answer
        verdicts = table["local_correct"], cloud_correct
        calibration = bias_for_accuracy(margins, answered, *verdicts, args.accuracy, args.delta)
    config = collab_config.to_config(
        calibration, margins, answered, not args.margin_only, args.decision_token, args.marker
    )
    print(_summary(calibration, collab_config.write(args.out, config)))
    if held_out:
        print(
            f"on the {len(held_out['id'])} prompts held out: {checked(calibration.bias, held_out, args.margin_only)}"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
