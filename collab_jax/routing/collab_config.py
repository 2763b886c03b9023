"""collab_config.json: what a server needs to hold a budget with an exported model."""

import contextlib
import json
import math
import os
import pathlib

import numpy as np

from collab_jax.routing.calibration import (
    Calibration,
    bias_for_rate,
    tracker,
)
from collab_jax.runtime.errors import UserError

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
