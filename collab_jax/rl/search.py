"""The search before a sweep: each cell's best value of one setting, chosen on validation.

A comparison in which one side is tuned and the other is not shows who was tuned. So every cell is
run with the same number of values of the setting (the same ones, but where what is trained is of
another kind: `sweeps.Cell.values`), and where the best of them lies at an end, with the one beyond
it. search.json, in the sweep's folder, has what was tried, what came of it, and its cost.

What decides is what a trained model does by itself within the budget: its natural calls, cut to
those of highest margin where they are more than the budget. Ranked by margin up to the budget a
model that has learnt nothing may do best, and would be chosen though it never calls. Where a cell
stands for a router that routes its model, that router decides at the budget (`sweeps.Cell.router`).
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from collab_jax.runtime import files

FILE = "search.json"
FACTOR = 2.0  # from an end to the value beyond it
BEYOND = 1  # how many values may be tried beyond either end

Found = dict[str, Any]  # of a cell: "tried", a list of rows (`with_row`), and "chosen"


class Outcome(NamedTuple):
    """What came of a run."""

    accuracy: float  # within the budget
    call_rate: float  # of natural decoding, whatever the budget
    seconds: float  # of training


class Search(NamedTuple):
    """What is searched for, with which seeds; what natural calls bring within `budget` decides."""

    key: str  # of the config; a number
    values: Sequence[float]
    seeds: Sequence[int] = (0,)
    budget: float = 0.3


def next_value(values: Sequence[float], tried: Mapping[float, float]) -> float | None:
    """The value to try next, by the accuracies of those tried; None where the best one is known.

    It is known where it is inside of what was tried, or BEYOND an end nothing better was found.
    """
    for value in values:
        if value not in tried:
            return value
    best = best_value(tried)
    if best == max(tried) and best < max(values) * FACTOR ** (BEYOND - 0.5):
        return best * FACTOR
    if best == min(tried) and best > min(values) / FACTOR ** (BEYOND - 0.5):
        return best / FACTOR
    return None


def best_value(tried: Mapping[float, float]) -> float:
    """The value of the highest accuracy; of equal ones the smallest."""
    return min(tried, key=lambda value: (-tried[value], value))


def outcome(search: Search, folder: pathlib.Path, router: str = "") -> Outcome:
    """The Outcome of the run in `folder`, by its report.json.

    router: "margin" or "logprob", which routes the model; "": the model decides by itself.
    """
    report = json.loads((folder / "report.json").read_text())
    natural, within = report["after"]["natural"], report["after"]["at_budget"][str(search.budget)]
    call_rate = float(natural["call_rate"]["value"])
    few = not router and call_rate <= search.budget
    decides = natural["overall_accuracy"] if few else within[router or "margin"]
    return Outcome(float(decides["value"]), call_rate, float(report["seconds"]))


def tried(found: Found) -> dict[float, float]:
    """The accuracy of each value that was tried for a cell."""
    return {row["value"]: row["accuracy"] for row in found["tried"]}


def with_row(found: Found | None, value: float, of_seeds: Sequence[Outcome]) -> Found:
    """`found` with a value that was tried: means over seeds, and the seconds of all of them."""
    row = {
        "value": value,
        "accuracy": math.fsum(run.accuracy for run in of_seeds) / len(of_seeds),
        "call_rate": math.fsum(run.call_rate for run in of_seeds) / len(of_seeds),
        "seconds": round(math.fsum(run.seconds for run in of_seeds), 1),
    }
    rows = [*(found or {"tried": []})["tried"], row]
    return {"tried": sorted(rows, key=lambda row: row["value"])}


def read(out: pathlib.Path) -> dict[str, Found]:
    """What was found so far, by cell."""
    file = out / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def write(out: pathlib.Path, found: Mapping[str, Found]) -> None:
    """Writes what was found so far, by cell."""
    files.write_text(out / FILE, json.dumps(found, indent=2) + "\n")
