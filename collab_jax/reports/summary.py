"""The figures of one evaluation, as report.json and validation.json have them. No jax.

Intervals are of 95 %: Wilson's, or a bootstrap's. Figures that depend on the cloud's verdict are
over the prompts on which it is known; the others are over all prompts. Where answers have grades,
an accuracy is their mean, with Student's interval; `right` has the shares that count as right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from collab_jax import records
from collab_jax.records import Records, outcomes
from collab_jax.routing import by_task, curves, measures, routers
from collab_jax.routing.curves import estimate
from collab_jax.routing.measures import Rate, rate
from collab_jax.routing.response import no_answer

BUDGETS = (0.1, 0.2, 0.3)
SUMMARY_ROUTERS = ("margin", "logprob", "random", "reachable", "perfect")
UNSAFE_CODE = "Code was judged without a sandbox (config.task.unsafe_code)."


def summary(table: Records) -> dict[str, Any]:
    """Returns the figures of one evaluation: `before` and `after` of report.json."""
    known = records.known(table)
    called = table["natural_called"]
    completed = int(table["natural_completed"].sum())
    answered = {name: column[~no_answer(table)] for name, column in table.items()}
    return {
        "n": len(table["id"]),
        "local_accuracy": rate(outcomes(table, "local")),
        "lenient_accuracy": lenient_accuracy(table),
        "cloud_accuracy": rate(outcomes(known, "cloud")),
        "right": right(table, known),
        "unjudged": rate(table["unjudged"]) if "unjudged" in table else None,
        "natural": {
            "call_rate": rate(called),
            # answered on the device, right or wrong
            "local_share": rate(~called & table["natural_ended"]),
            "local_correct": rate(~called & table["natural_correct"]),
            "overall_accuracy": rate(natural_outcomes(known)),
            # of the calls, the share whose marker free decoding wrote to its end
            "marker_completed": completed / int(called.sum()) if called.any() else None,
        },
        "at_budget": at_budgets(known),
        "shown_budgets": shown_budgets(known),
        "device_tokens": {
            "local": float(table["tokens"].mean()),
            # up to the decision token where it called
            "natural": float(table["natural_tokens"].mean()),
        },
        "no_answer": rate(no_answer(table)),
        "cloud_unknown": rate(~table["cloud_known"]),
        "share_attempt": shared(table),
        "redaction": redaction(table),
        "auc": _aucs(table),
        "auc_answered": _aucs(answered),
        "local_accuracy_by_stratum": {
            str(s): rate(outcomes(table, "local")[table["stratum"] == s])
            for s in np.unique(table["stratum"])
        },
        "by_task": tasks(table),
    }


def lenient_accuracy(table: Records) -> Rate | None:
    """Returns the local accuracy without regard to tags; None of records without that column."""
    return rate(outcomes(table, "lenient")) if "lenient_correct" in table else None


def right(table: Records, known: Records) -> dict[str, Rate] | None:
    """Returns the shares of graded answers that count as right; None where none is graded."""
    if "local_grade" not in table:
        return None
    return {"local": rate(table["local_correct"]), "cloud": rate(known["cloud_correct"])}


def natural_outcomes(table: Records) -> np.ndarray:
    """Returns what the natural pass came to, its own answer or the cloud's: bool[n], or grades."""
    cloud, own = outcomes(table, "cloud"), outcomes(table, "natural")
    return np.where(table["natural_called"], cloud, own)


def at_budgets(table: Records) -> dict[str, dict[str, Rate]]:
    """Returns, by budget, the overall accuracy of each of SUMMARY_ROUTERS and what margin gains.

    Beside them `margin_over_random`, and margin's share of the gain over random that can be had.
    """
    methods = {name: [(table, routers.score(name, table))] for name in SUMMARY_ROUTERS}
    f = curves.frontiers(methods, BUDGETS)
    share = curves.gain_share(f.rates, f.accuracy["margin"], f.accuracy["reachable"])
    return {
        str(b): {
            **{name: estimate(f.at(name, b)) for name in SUMMARY_ROUTERS},
            "margin_over_random": estimate(f.at("margin", b) - f.at("random", b)),
            "reachable_gain_share": estimate(share[:, f.column(b)]),
        }
        for b in BUDGETS
    }


def shown_budgets(table: Records) -> dict[str, dict[str, Rate]] | None:
    """Returns, by the budget that prompts show, what was done at it; None where none is shown.

    The natural share of calls and overall accuracy, and beside them the overall accuracy of the
    margin with a bias that makes the calls just that share.
    """
    if "shown_budget" not in table:
        return None
    found = {}
    for budget in np.unique(table["shown_budget"]):
        part = {name: column[table["shown_budget"] == budget] for name, column in table.items()}
        f = curves.frontiers({"margin": [(part, routers.score("margin", part))]}, [budget])
        found[f"{budget:g}"] = {
            "call_rate": rate(part["natural_called"]),
            "overall_accuracy": rate(natural_outcomes(part)),
            "local_accuracy": rate(outcomes(part, "local")),
            "margin": estimate(f.at("margin", budget)),
        }
    return found


def tasks(table: Records) -> dict[str, Any] | None:
    """Returns the figures of each task of a mix, and by budget what is done with its calls.

    `at_budget` is `routing.by_task.at_budget`, over all tasks. None where there is one task.
    """
    names = np.unique(table["task"])
    if len(names) == 1:
        return None
    known = records.known(table)
    return {
        "tasks": {str(name): _of_task(table, table["task"] == name) for name in names},
        "at_budget": {str(b): by_task.at_budget(known, b) for b in BUDGETS},
    }


def _of_task(table: Records, here: np.ndarray) -> dict[str, Any]:
    """Returns the figures of the prompts `here`, bool[n].

    `overall_accuracy` is None where no verdict of the cloud on them is known.
    """
    part = {name: column[here] for name, column in table.items()}
    overall = natural_outcomes(part)[part["cloud_known"]]
    return {
        "n": len(part["id"]),
        "local_accuracy": rate(outcomes(part, "local")),
        "call_rate": rate(part["natural_called"]),
        "overall_accuracy": rate(overall) if overall.size else None,
    }


def shared(table: Records) -> dict[str, Any] | None:
    """Returns the cloud's accuracy with the device's attempt and without it, over the same calls.

    None where the cloud was not asked with an attempt.
    """
    if "shared_known" not in table:
        return None
    both = table["shared_known"] & table["cloud_known"]
    if not both.any():
        return None
    return {
        "n": int(both.sum()),
        "accuracy": rate(table["cloud_correct"][both]),
        "accuracy_shared": rate(table["shared_correct"][both]),
        "extra_input_tokens": float(table["shared_extra_tokens"][both].mean()),
    }


def redaction(table: Records) -> dict[str, Any] | None:
    """Returns the share of prompts that redaction changed, and the cloud's accuracy on them.

    The accuracy is given with redaction and without, over the `n` whose verdicts are both known. On
    all other prompts both are the same answer. None where nothing was redacted.
    """
    if "redacted" not in table:
        return None
    both = table["redacted"] & table["plain_known"] & table["cloud_known"]
    return {
        "changed": rate(table["redacted"]),
        "n": int(both.sum()),
        "accuracy": rate(table["cloud_correct"][both]) if both.any() else None,
        "accuracy_plain": rate(table["plain_correct"][both]) if both.any() else None,
    }


def gains(before: Records, after: Records) -> dict[str, Rate]:
    """Returns the paired differences, after - before, on the same prompts.

    Raises UserError where the prompts differ.
    """
    before = records.align(after, before, "after", "before")
    known_before, known_after = records.known(before, [after]), records.known(after, [before])
    local = _gain_at_budgets(before, after, [0])
    return {
        "local_accuracy": local[0],
        **{
            f"margin_at_{budget}": gain
            for budget, gain in _gain_at_budgets(known_before, known_after, BUDGETS).items()
        },
    }


def _gain_at_budgets(
    before: Records, after: Records, budgets: Sequence[float]
) -> dict[float, Rate]:
    """Returns by budget how much better margin is on `after` than on `before`."""
    methods = {
        "before": [(before, routers.score("margin", before))],
        "after": [(after, routers.score("margin", after))],
    }
    f = curves.frontiers(methods, budgets)
    return {b: estimate(f.at("after", b) - f.at("before", b)) for b in budgets}


def _aucs(table: Records) -> dict[str, float | None]:
    """Returns the AUC of "the device is wrong" by router, None where one class is empty."""
    right = table["local_correct"]
    if right.all() or not right.any():
        return {"margin": None, "logprob": None}
    return {name: measures.auc(table, routers.score(name, table)) for name in ("margin", "logprob")}


def examples_to_show(table: Records) -> list[tuple[str, int]]:
    """Returns (what it shows, row) for a few rows of the natural pass, of the kinds that occur."""
    called, right = table["natural_called"], table["natural_correct"]
    kinds = {
        "solved on the device": ~called & right,
        "rightly asked the cloud": called & ~table["local_correct"] & table["cloud_correct"],
        "asked, though it would have solved it": called & table["local_correct"],
        "stayed, and was wrong": ~called & ~right,
    }
    return [(kind, int(np.flatnonzero(rows)[0])) for kind, rows in kinds.items() if rows.any()]
