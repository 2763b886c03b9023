"""Calibration: margins on held-out prompts give the decision token's bias for a budget.

    python -m collab_jax.calibrate --records RUN/after.parquet --rate 0.3 --delta 0.05 --out FOLDER

writes collab_config.json (`routing/collab_config.py` documents it) and prints what was chosen and
what is promised of it; `routing/calibration.py` says how a bias is chosen. Responses without an
answer always go to the cloud. Where they alone exceed the budget, leave them to the margin as well:
`--margin_only`. With `--hold_out 0.5` a random half of the records does not choose the bias; the
call rate and accuracy on that half are printed, and the call rates on 200 such halves: one alone is
a matter of luck. Where records have strata, so are the call rates were all prompts of a stratum
alone, by the bias as it is, and by one that tracks the budget, as a server's does. No jax.
"""

import argparse
import pathlib
import re

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.routing import collab_config, measures
from collab_jax.routing.calibration import (
    Calibration,
    bias_for_accuracy,
    bias_for_rate,
    calls,
    tracked,
    tracker,
)
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent

SPLITS = 200  # of which the call rates are told
SERVED = 2000  # prompts of a stratum that a tracking bias is tried on


def split(table: Records, share: float, seed: int = 0) -> tuple[Records, Records | None]:
    """The records to calibrate on, and a random `share` of them; None where that is 0."""
    if not 0 <= share < 1:
        raise UserError(f"--hold_out {share:g}: a share of the records, in [0, 1)")
    n = len(table["id"])
    first = n - round(share * n)
    if share == 0:
        return table, None
    if not 0 < first < n:
        raise UserError(
            f"--hold_out {share:g} of {n} records leaves {first} to calibrate on and {n - first} "
            "to check: change it"
        )
    order = np.random.default_rng(seed).permutation(n)  # records may be sorted by anything
    return (
        {name: column[order[:first]] for name, column in table.items()},
        {name: column[order[first:]] for name, column in table.items()},
    )


def one_row_a_problem(table: Records, seed: int = 0) -> Records:
    """The records, or one random row of each problem where several rows are of one.

    Such are the rows of prompts that show budgets, ID@BUDGET, and of a suite's samples, ID#NUMBER.
    Rows of one problem are no independent draws, which a calibration takes its records for.
    """
    ids = table["id"].astype(str)
    if "shown_budget" in table:
        ids = np.array([key.rpartition("@")[0] for key in ids])
    elif all(re.fullmatch(r".*#\d+", key, re.DOTALL) for key in ids):
        ids = np.array([key.rpartition("#")[0] for key in ids])
    order = np.random.default_rng(seed).permutation(len(ids))
    _, first = np.unique(ids[order], return_index=True)
    if len(first) == len(ids):
        return table
    print(f"{len(ids)} rows are of {len(first)} problems: one of each, at random, is used")
    kept = np.sort(order[first])
    return {name: column[kept] for name, column in table.items()}


def answered(table: Records, margin_only: bool) -> np.ndarray:
    """bool[n]: the prompts whose call the margin decides; the others always go to the cloud."""
    return (table["ended"] & table["formatted"]) | margin_only


def check(bias: float, table: Records, margin_only: bool) -> str:
    """Call rate and overall accuracy of a bias on records, in percent with their intervals.

    The accuracy is over the prompts whose cloud verdict is known.
    """
    sent = calls(bias, table["margin"], answered(table, margin_only))
    right = np.where(sent, table["cloud_correct"], table["local_correct"])[table["cloud_known"]]
    accuracy = f"{percent(measures.rate(right))} %" if right.size else "not known"
    return f"call rate {percent(measures.rate(sent))} %, overall accuracy {accuracy}"


def main(argv: list[str]) -> int:
    """Chooses a bias, writes it, and prints what was chosen."""
    args = parse(argv)
    everything = records.read(args.records)
    records.require(everything, ["margin"], "calibration")
    everything = one_row_a_problem(everything)
    table, held_out = split(everything, args.hold_out)
    if args.accuracy is not None:
        table = records.known(table)
    calibration = choose(args, table)
    margins, is_answered = table["margin"], answered(table, args.margin_only)
    config = collab_config.to_config(
        calibration,
        margins,
        is_answered,
        call_unanswered=not args.margin_only,
        decision_token=args.decision_token,
        marker=args.marker,
    )
    print(describe(calibration, collab_config.write(args.out, config)))
    if "local_grade" in table:
        print("answers have grades: an accuracy here is the share of them that count as right")
    if held_out:
        outcome = check(calibration.bias, held_out, args.margin_only)
        print(f"on the {len(held_out['id'])} prompts held out: {outcome}")
        print(over_splits(args, everything))
        if len(set(held_out["stratum"])) > 1:
            print(by_stratum(calibration, table, held_out, args.margin_only))
    return 0


def choose(args: argparse.Namespace, table: Records) -> Calibration:
    """The bias for the rate or the accuracy that was asked for; verdicts are known for the latter.

    Raises UserError where there is none.
    """
    margins, is_answered = table["margin"], answered(table, args.margin_only)
    if args.accuracy is None:
        return bias_for_rate(margins, is_answered, args.rate, args.delta)
    local, cloud = table["local_correct"], table["cloud_correct"]
    return bias_for_accuracy(margins, is_answered, local, cloud, args.accuracy, args.delta)


def over_splits(args: argparse.Namespace, table: Records) -> str:
    """How far the call rate on what is held out depends on which records these are."""
    rates, impossible = [], 0
    for seed in range(SPLITS):
        first, held_out = split(table, args.hold_out, seed)
        assert held_out
        if args.accuracy is not None:
            first = records.known(first)
        try:
            bias = choose(args, first).bias
        except UserError:
            impossible += 1
            continue
        is_answered = answered(held_out, args.margin_only)
        rates.append(calls(bias, held_out["margin"], is_answered).mean())
    low, high = np.quantile(rates, (0.025, 0.975))
    return (
        f"over {SPLITS} such splits: call rate {np.mean(rates):.1%} on average, {low:.1%} to "
        f"{high:.1%} in 95 % of them" + (f"; no bias in {impossible}" if impossible else "")
    )


def by_stratum(c: Calibration, table: Records, held_out: Records, margin_only: bool) -> str:
    """The call rates were all prompts like the held-out ones of one stratum, drawn from these.

    table: what the calibration was made from.
    """
    budget = c.value if c.target == "rate" else c.rate
    state = tracker(table["margin"], answered(table, margin_only), c.bias, budget)
    rng, rows = np.random.default_rng(0), []
    for stratum in sorted(set(held_out["stratum"])):
        drawn = rng.choice(np.flatnonzero(held_out["stratum"] == stratum), SERVED)
        margins, is_answered = held_out["margin"][drawn], answered(held_out, margin_only)[drawn]
        fixed, moving = calls(c.bias, margins, is_answered), tracked(state, margins, is_answered)
        rows.append(f"{stratum} {fixed.mean():.1%}, {moving.mean():.1%}")
    return (
        f"were all prompts of one stratum, call rate by this bias, and by one that tracks "
        f"{budget:.1%} over {SERVED} of them: {'; '.join(rows)}"
    )


def describe(c: Calibration, path: pathlib.Path) -> str:
    """Two lines: what was chosen, and what is promised."""
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
        f"bias {c.bias:+.4f} from {c.n} prompts: expected call rate {interval}{measured}; "
        f"wrote {path}\npromised: {promise}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.calibrate",
        description="Chooses the decision token's bias for a budget or an accuracy.",
    )
    add = parser.add_argument
    add("--records", type=pathlib.Path, required=True, help="held-out records with margins")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--rate", type=float, help="share of prompts to send to the cloud")
    target.add_argument(
        "--accuracy", type=float, help="overall accuracy to reach with as few calls as possible"
    )
    add("--delta", type=float, help="promise it, except in this share of calibrations")
    add(
        "--out",
        type=pathlib.Path,
        required=True,
        help=f"folder for {collab_config.NAME}, or a .json file",
    )
    add("--hold_out", type=float, default=0.0, help="share of the records to check on")
    add("--margin_only", action="store_true", help="responses without an answer go by margin, too")
    add("--decision_token", help="written into the file for a server")
    add("--marker", help="the call as text, written into the file for a server")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
