"""A mix of tasks under one budget: how a bias divides the calls, what a bias for each would gain.

A budget is spent over all traffic, and the shares of the tasks in the records stand for those in
it. One bias sends the prompts with the highest margins, whatever their task, so a task whose
margins are high gets more of the calls. With a bias for each task the same number of calls goes
where it gains most. No jax.

The biases are cross-fitted: each half of the prompts is routed by those that the other half chose,
so no prompt chooses what it is judged by. Both ways to route make the same calls in all, and the
interval of their difference is of a paired bootstrap over prompts, for the biases that were found.
Responses without an answer come first either way: no bias changes that (`calibration.py`).

Source: Barlow et al. 1972 (isotonic regression).
"""

import hashlib
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from collab_jax.records import Records, outcomes
from collab_jax.routing import calibration, curves, measures, routers
from collab_jax.routing.curves import estimate
from collab_jax.routing.measures import Rate
from collab_jax.routing.response import no_answer


def at_budget(records: Records, budget: float) -> dict[str, Any]:
    """Returns what one bias on the margin does at a budget, and what a bias for each task does.

    `one_bias` and `own_biases` have the overall `accuracy`, and their `division` by `tasks`; `gain`
    is the difference of the two accuracies. All verdicts of the cloud must be known.
    """
    scores = {
        "one_bias": routers.score("margin", records),
        "own_biases": own_bias_score(records, budget),
    }
    f = curves.frontiers({name: [(records, s)] for name, s in scores.items()}, [budget])
    return {
        **{
            name: {
                "accuracy": estimate(f.at(name, budget)),
                "tasks": division(records, score, budget),
            }
            for name, score in scores.items()
        },
        "gain": estimate(f.at("own_biases", budget) - f.at("one_bias", budget)),
    }


# ---- how the calls of a score are divided


def division(records: Records, score: np.ndarray, budget: float) -> dict[str, dict[str, Rate]]:
    """Returns, by task, its part of the calls that a score f64[n] makes at a budget.

    `share_of_calls` is of all calls; `call_rate` and `accuracy` are of the task's own prompts.
    """
    return {
        str(name): _part(records, records["task"] == name, score, budget)
        for name in np.unique(records["task"])
    }


def _part(records: Records, here: np.ndarray, score: np.ndarray, budget: float) -> dict[str, Rate]:
    """The figures of `division` for the prompts `here`, bool[n].

    A frontier counts, over all prompts, local_correct of those kept and cloud_correct of those
    sent, whatever stands there: with True for what is here and sent, it counts the calls.
    """
    right = {f"{side}_correct": here * outcomes(records, side) for side in ("local", "cloud")}
    counted = {
        "calls": {"local_correct": np.zeros(len(here), bool), "cloud_correct": here},
        "right": right,
    }
    ids = {"id": records["id"]}
    f = curves.frontiers(
        {name: [(ids | columns, score)] for name, columns in counted.items()}, [budget]
    )
    calls, right, size = f.at("calls", budget), f.at("right", budget), f.at("calls", 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # no call, or a resample without the task
        return {
            "share_of_calls": estimate(calls / f.rates[f.column(budget)]),
            "call_rate": estimate(calls / size),
            "accuracy": estimate(right / size),
        }


# ---- a bias for each task


def own_bias_score(records: Records, budget: float) -> np.ndarray:
    """Returns the margin less its task's threshold, f64[n]: a score that ranks over all tasks.

    The thresholds of a half are those of `thresholds` on the other half at this budget, so above 0
    is what they send; the score is for this budget alone.
    """
    score, first = routers.score("margin", records), no_answer(records)
    gain = outcomes(records, "cloud").astype(float) - outcomes(records, "local")
    names, task = np.unique(records["task"].astype(str), return_inverse=True)
    half = halves(records["id"], task)
    own = score.copy()
    for chosen_by in (0, 1):
        fit, held = (half == chosen_by) & ~first, (half != chosen_by) & ~first
        count = int(measures.calls(budget, int((half == chosen_by).sum())))
        left = max(count - int((first & (half == chosen_by)).sum()), 0)
        found = thresholds(score[fit], gain[fit], task[fit], left, len(names))
        own[held] -= found[task[held]]
    return own


def halves(ids: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Which half each prompt is in, i64[n] of 0 and 1, whatever the order of the rows.

    Each half has half of every task's prompts, by a hash of the id. ids: str[n]; task: i64[n].
    """
    digests = [hashlib.blake2b(str(key).encode(), digest_size=8).hexdigest() for key in ids]
    half = np.empty(len(task), np.int64)
    for t in np.unique(task):
        rows = sorted(np.flatnonzero(task == t), key=digests.__getitem__)
        half[rows] = np.arange(len(rows)) % 2
    return half


def thresholds(
    score: np.ndarray, gain: np.ndarray, task: np.ndarray, count: int, tasks: int
) -> np.ndarray:
    """Returns the threshold of each task, f64[tasks], that sends `count` prompts to most gain.

    score: f64[n]. gain: f64[n], cloud - local. task: i64[n], below `tasks`. The gain that a score
    leads to is the isotonic regression of `gain` on it within its task: its steps are the slopes of
    the concave hull of the gain over calls, so sending the highest of all tasks first is the best
    on the hulls, and less taken in by noise than the best on the curves themselves. Equal gains are
    sent in the order of the scores, as one bias does. A task without prompts has the threshold of
    one bias for all.
    """
    expected = np.empty(len(score))
    for t in np.unique(task):
        expected[task == t] = _isotonic(score[task == t], gain[task == t])
    sent = _first(np.lexsort((-score, -expected)), count)
    found = np.full(tasks, _threshold(score, _first(np.argsort(-score, kind="stable"), count)))
    for t in np.unique(task):
        found[t] = _threshold(score[task == t], sent[task == t])
    return found


def _isotonic(score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """The isotonic regression f64[n] of the gain on the score; equal scores have the same."""
    levels, level, sizes = np.unique(score, return_inverse=True, return_counts=True)
    means = np.bincount(level, gain, len(levels)) / sizes
    return isotonic_regression(means, weights=sizes).x[level]


def _first(order: np.ndarray, count: int) -> np.ndarray:
    """bool[n]: the first `count` rows of an order i64[n]."""
    chosen = np.zeros(len(order), bool)
    chosen[order[:count]] = True
    return chosen


def _threshold(score: np.ndarray, sent: np.ndarray) -> float:
    """The threshold between the scores that are sent and the others."""
    return calibration.between(score[~sent].max(initial=-np.inf), score[sent].min(initial=np.inf))
