"""collab_config.json: what a server needs to hold a budget with an exported model.

version         1
decision_token  the token whose logit gets the bias, or null
marker          the call as text, or null
target, value   "rate" or "accuracy", and which one
delta           the promise fails in at most this share of calibrations; null: no promise
bias            added to the decision token's logit before the answer opens
call_unanswered whether a response that ends without a call and without an answer is sent, too
prompts         how many it was calibrated on
call_rate       expected, low, high (95 %)
accuracy        measured, and low: its bound at 1 - delta; null where not asked for
biases          [{rate, bias, expected}]: other budgets, each with that delta by itself; those
                out of reach are left out
tracking        budget, step, low, high of a `calibration.Tracker`
"""

import contextlib
import json
import math
import pathlib
from typing import Any

import numpy as np

from collab_jax.routing.calibration import Calibration, bias_for_rate, tracker
from collab_jax.runtime import files
from collab_jax.runtime.errors import UserError

NAME = "collab_config.json"
VERSION = 1
RATES = tuple(round(0.05 * i, 2) for i in range(1, 20))  # of the table of biases

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


def to_config(
    calibration: Calibration,
    margins: np.ndarray,
    answered: np.ndarray,
    call_unanswered: bool = True,
    decision_token: str | None = None,
    marker: str | None = None,
) -> dict[str, Any]:
    """collab_config.json as a dict, from a calibration and what it was made from.

    call_unanswered: False where `answered` was all True in order to leave every call to the margin.
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


def write(path: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
    """Writes the file, complete or not at all, and returns its path.

    A `path` that does not end in .json is the file's folder. Raises UserError where it cannot be
    written.
    """
    path = path if path.suffix == ".json" else path / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(config, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from None
    return path


def read(path: pathlib.Path) -> dict[str, Any]:
    """The dict that was written; `path` as for `write`.

    Raises UserError for a file that `write` did not make.
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


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type that _KEYS gives it."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            k in value and _fits(value[k], inner) for k, inner in kind.items()
        )
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    if isinstance(value, bool):  # to Python, it is an int
        return kind is bool
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))
