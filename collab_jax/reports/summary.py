"""One evaluation in figures: what report.json and eval.json hold. Intervals are of 95 %: Wilson's,
or a bootstrap's. No jax.
"""

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.routing import measures, routers
from collab_jax.routing.measures import Rate, estimate, rate
from collab_jax.routing.response import no_answer

BUDGETS = (0.1, 0.2, 0.3)
SUMMARY_ROUTERS = ("margin", "logprob", "random", "perfect")


def at_budgets(table: Records) -> dict[str, dict[str, Rate]]:
    """Overall accuracy of SUMMARY_ROUTERS by budget, margin's lead over random, and its share of
    the perfect router's gain.
    """
    f = measures.frontiers(
        {name: [(table, routers.score(name, table))] for name in SUMMARY_ROUTERS}, BUDGETS
    )
    share = measures.perfect_share(f.rates, f.accuracy["margin"], f.accuracy["perfect"])
    return {
        str(b): {
            **{name: estimate(f.at(name, b)) for name in SUMMARY_ROUTERS},
            "margin_over_random": estimate(f.at("margin", b) - f.at("random", b)),
            "perfect_gain_share": estimate(share[:, f.column(b)]),
        }
        for b in BUDGETS
    }


def summary(table: Records) -> dict:
    """The figures of one evaluation, as report.json holds them (`before`, `after`)."""
    n = len(table["id"])
    decided = table["natural_called"]
    answered = {name: column[~no_answer(table)] for name, column in table.items()}
    free = int(table["natural_completed"].sum())
    aucs = lambda t: {name: _auc(t, name) for name in ("margin", "logprob")}  # noqa: E731
    return {
        "n": n,
        "local_accuracy": rate(table["local_correct"]),
        "cloud_accuracy": rate(table["cloud_correct"]),
        "natural": {
            "call_rate": rate(decided),
            "local_share": rate(
                ~decided & table["natural_ended"]
            ),  # answered on the device, right or wrong
            "local_correct": rate(~decided & table["natural_correct"]),
            "overall_accuracy": rate(
                np.where(decided, table["cloud_correct"], table["natural_correct"])
            ),
            # of the calls, how many free decoding wrote to the end
            "marker_completed": free / int(decided.sum()) if decided.any() else None,
        },
        "at_budget": at_budgets(table),
        "device_tokens": {
            "local": float(table["tokens"].mean()),
            "natural": float(
                table["natural_tokens"].mean()
            ),  # up to the decision token where it called
        },
        "no_answer": rate(no_answer(table)),
        "cloud_unknown": rate(~table["cloud_known"]),  # failed calls; they count as wrong
        "share_attempt": shared(table),
        "auc": aucs(table),
        "auc_answered": aucs(answered),
        "local_accuracy_by_stratum": {
            str(s): rate(table["local_correct"][table["stratum"] == s])
            for s in np.unique(table["stratum"])
        },
    }


def shared(table: Records) -> dict | None:
    """The cloud's accuracy on what the device handed over, with its attempt and without; None where
    that was not asked.
    """
    if "shared_known" not in table or not table["shared_known"].any():
        return None
    both = table["shared_known"]
    return {
        "n": int(both.sum()),
        "accuracy": rate(table["cloud_correct"][both]),
        "accuracy_shared": rate(table["shared_correct"][both]),
        "extra_input_tokens": float(table["shared_extra_tokens"][both].mean()),
    }


def _auc(table: Records, router: str) -> float | None:
    """AUC of "local is wrong", or None where the device is always right, or always wrong."""
    right = table["local_correct"]
    return (
        measures.auc(table, routers.score(router, table))
        if right.any() and not right.all()
        else None
    )


def gains(before: Records, after: Records) -> dict[str, Rate]:
    """Paired differences, after - before, on the same prompts. Raises UserError where the prompts
    differ.
    """
    before = records.align(after, before, "after", "before")
    tables = {"before": before, "after": after}
    f = measures.frontiers(
        {name: [(t, routers.score("margin", t))] for name, t in tables.items()}, BUDGETS
    )
    gain = lambda budget: estimate(f.at("after", budget) - f.at("before", budget))  # noqa: E731
    return {"local_accuracy": gain(0), **{f"margin_at_{b}": gain(b) for b in BUDGETS}}


def examples_to_show(table: Records) -> list[tuple[str, int]]:
    """(what it shows, row) for a few rows: solved, rightly asked, wrongly asked, wrongly stayed;
    those that occur.
    """
    asked, right = table["natural_called"], table["natural_correct"]
    kinds = {
        "solved on the device": ~asked & right,
        "rightly asked the cloud": asked & ~table["local_correct"] & table["cloud_correct"],
        "asked, though it would have solved it": asked & table["local_correct"],
        "stayed, and was wrong": ~asked & ~right,
    }
    return [(kind, int(np.flatnonzero(rows)[0])) for kind, rows in kinds.items() if rows.any()]
