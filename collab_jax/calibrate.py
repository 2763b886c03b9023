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
import contextlib
import json
import math
import os
import pathlib

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports.page import percent
from collab_jax.routing import measures
from collab_jax.routing.calibration import (
    Calibration,
    bias_for_accuracy,
    bias_for_rate,
    calls,
    tracker,
)
from collab_jax.runtime.errors import UserError, run_command

NAME = "collab_config.json"
VERSION = 1
RATES = tuple(round(0.05 * i, 2) for i in range(1, 20))  # of the table of biases


def to_config(
    calibration: Calibration,
    margins: np.ndarray,
    answered: np.ndarray,
    call_unanswered: bool = True,
    decision_token: str | None = None,
    marker: str | None = None,
) -> dict:
    """collab_config.json as a dict (keys: see the module), from a calibration and what it was made
    from.

    call_unanswered is False where `answered` was all True in order to leave every call to the
    margin.
    """
    c = calibration
    table = []
    for rate in RATES:
        with contextlib.suppress(UserError):  # out of reach
            other = bias_for_rate(margins, answered, rate, c.delta)
            table.append({"rate": rate, "bias": other.bias, "expected": other.rate})
    state = tracker(margins, answered, c.bias, c.value if c.target == "rate" else c.rate)
    return {
        "version": VERSION,
        "decision_token": decision_token,
        "marker": marker,
        "target": c.target,
        "value": c.value,
        "delta": c.delta,
        "bias": c.bias,
        "call_unanswered": call_unanswered,
        "prompts": c.n,
        "call_rate": {"expected": c.rate, "low": c.low, "high": c.high},
        "accuracy": {"measured": c.accuracy, "low": c.accuracy_low},
        "biases": table,
        "tracking": {name: getattr(state, name) for name in ("budget", "step", "low", "high")},
    }


def write(path: pathlib.Path, config: dict) -> pathlib.Path:
    """Writes the file, complete or not at all, and returns its path; a `path` that does not end in
    .json is a folder.
    """
    path = path if path.suffix == ".json" else path / NAME
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w") as file:
            file.write(json.dumps(config, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from None
    return path


def read(path: pathlib.Path) -> dict:
    """The dict that was written; `path` as for `write`. Raises UserError for a file that `write`
    did not make.
    """
    path = path if path.suffix == ".json" else path / NAME
    again = "make it with python -m collab_jax.calibrate"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {again}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {again}") from None
    if not isinstance(config, dict) or "version" not in config:
        raise UserError(f"{path} is not a calibration: {again}")
    if config["version"] != VERSION:
        raise UserError(
            f"{path} has version {config['version']!r}, this program reads {VERSION}: {again}"
        )
    for key, kind in _KEYS.items():
        if not _fits(config, {key: kind}):
            fault = f"{key}={config[key]!r} is not valid" if key in config else f"{key} is missing"
            raise UserError(f"{path}: {fault}: {again}")
    return config


_NUMBER = int | float
_KEYS = {  # of the file, with the types of their values; of a list, the type of its items
    "decision_token": str | None,
    "marker": str | None,
    "target": str,
    "value": _NUMBER,
    "delta": _NUMBER | None,
    "bias": _NUMBER,
    "call_unanswered": bool,
    "prompts": int,
    "call_rate": {"expected": _NUMBER, "low": _NUMBER, "high": _NUMBER},
    "accuracy": {"measured": _NUMBER | None, "low": _NUMBER | None},
    "biases": [{"rate": _NUMBER, "bias": _NUMBER, "expected": _NUMBER}],
    "tracking": {"budget": _NUMBER, "step": _NUMBER, "low": _NUMBER, "high": _NUMBER},
}


def _fits(value, kind) -> bool:
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            k in value and _fits(value[k], inner) for k, inner in kind.items()
        )
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    if isinstance(value, bool):  # to Python, it is an int
        return kind is bool
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))


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
        "--out", type=pathlib.Path, required=True, help=f"folder for {NAME}, or a .json file"
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
    config = to_config(
        calibration, margins, answered, not args.margin_only, args.decision_token, args.marker
    )
    print(_summary(calibration, write(args.out, config)))
    if held_out:
        print(
            f"on the {len(held_out['id'])} prompts held out: {checked(calibration.bias, held_out, args.margin_only)}"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
