"""What routing is worth, from records alone (no jax): frontiers by replay, with 95 % intervals.

A router is one score for each prompt, higher meaning "send it to the cloud". Replaying a score at a budget sends the
highest-ranked share of prompts and reads the outcome from the records: the cloud's verdict for those, the device's own
for the rest. Every rate's denominator is all prompts.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

Records = dict[str, np.ndarray]  # a column each, [n]; evaluate.py documents them
Rate = dict[str, float]  # value, low, high

BUDGETS = (0.1, 0.2, 0.3)
_Z = float(stats.norm.ppf(0.975))


_FIRST = 1e6  # above every margin and every summed log-probability


def no_answer(records: Records) -> np.ndarray:
    """bool[n]: with the marker disallowed, cut off or not well formed; every router but the perfect one sends these first."""
    return ~(records["ended"] & records["formatted"])


def margin_score(records: Records) -> np.ndarray:
    """The trained decision: max_t m_t with the marker disallowed; what has no answer first, by margin too."""
    return records["margin"] + _FIRST * no_answer(records)


def logprob_score(records: Records) -> np.ndarray:
    """The log-probability gate: minus the response's summed log-probability; what has no answer first, likewise."""
    return -records["logp"] + _FIRST * no_answer(records)


def oracle_score(records: Records) -> np.ndarray:
    """The perfect router: first what only the cloud gets right, last what only the device does."""
    return records["cloud_correct"].astype(float) - records["local_correct"]


ROUTERS: dict[str, Callable[[Records], np.ndarray]] = {
    "margin": margin_score,
    "logprob": logprob_score,
    "oracle": oracle_score,
}


def rate(outcomes: np.ndarray) -> Rate:
    """Share of True of bool[n], with Wilson's interval."""
    k, n = int(outcomes.sum()), len(outcomes)
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return {"value": k / n, "low": float(interval.low), "high": float(interval.high)}


def mean(values: np.ndarray) -> Rate:
    """Mean of f[n] with the normal interval; of paired differences, a paired interval."""
    half = _Z * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"value": float(values.mean()), "low": float(values.mean()) - half, "high": float(values.mean()) + half}


def replay(records: Records, score: np.ndarray, budget: float) -> np.ndarray:
    """Outcomes bool[n] when the floor(budget * n) highest scores go to the cloud; equal scores in the records' order."""
    n = len(score)
    sent = np.zeros(n, bool)
    sent[np.argsort(-score, kind="stable")[: int(budget * n + 1e-9)]] = True
    return np.where(sent, records["cloud_correct"], records["local_correct"])


def random_outcomes(records: Records, budget: float) -> np.ndarray:
    """Expected outcomes f[n] of sending floor(budget * n) prompts at random: closed form, no draw."""
    n = len(records["local_correct"])
    share = int(budget * n + 1e-9) / n
    return (1 - share) * records["local_correct"] + share * records["cloud_correct"]


def auc(records: Records, score: np.ndarray) -> float | None:
    """Probability that a prompt the device gets wrong outranks one it gets right; None where there is only one kind."""
    wrong = ~records["local_correct"]
    positives, negatives = int(wrong.sum()), int((~wrong).sum())
    if not positives or not negatives:
        return None
    ranks = stats.rankdata(score)
    return float((ranks[wrong].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def at_budget(records: Records, budget: float) -> dict[str, Rate | float | None]:
    """Overall accuracy of every router at one budget, margin's lead over random, and its share of the perfect router's."""
    outcomes = {name: replay(records, score(records), budget) for name, score in ROUTERS.items()}
    random = random_outcomes(records, budget)
    table: dict[str, Rate | float | None] = {name: rate(o) for name, o in outcomes.items()}
    table["random"] = mean(random)
    table["margin_over_random"] = mean(outcomes["margin"] - random)
    gain = outcomes["oracle"].mean() - random.mean()
    table["oracle_gain_share"] = float((outcomes["margin"].mean() - random.mean()) / gain) if gain > 0 else None
    return table


def summary(records: Records) -> dict:
    """The figures of one evaluation, as report.json holds them (`before`, `after`)."""
    n = len(records["local_correct"])
    decided = records["natural_called"]
    answered = {name: column[~no_answer(records)] for name, column in records.items()}
    free = int(records["natural_completed"].sum())
    return {
        "n": n,
        "local_accuracy": rate(records["local_correct"]),
        "cloud_accuracy": rate(records["cloud_correct"]),
        "natural": {
            "call_rate": rate(decided),
            "local_share": rate(~decided & records["natural_ended"]),  # answered on the device, right or wrong
            "local_correct": rate(~decided & records["natural_correct"]),
            "overall_accuracy": rate(np.where(decided, records["cloud_correct"], records["natural_correct"])),
            # of the calls, how many free decoding wrote to the end
            "marker_completed": free / int(decided.sum()) if decided.any() else None,
        },
        "at_budget": {str(b): at_budget(records, b) for b in BUDGETS},
        "device_tokens": {
            "local": float(records["tokens"].mean()),
            "natural": float(records["natural_tokens"].mean()),  # up to the decision token where it called
        },
        "no_answer": rate(no_answer(records)),
        "cloud_unknown": rate(~records["cloud_known"]),  # failed calls; they count as wrong
        "auc": {name: auc(records, ROUTERS[name](records)) for name in ("margin", "logprob")},
        "auc_answered": {name: auc(answered, ROUTERS[name](answered)) for name in ("margin", "logprob")},
        "local_accuracy_by_stratum": {
            str(s): rate(records["local_correct"][records["stratum"] == s]) for s in np.unique(records["stratum"])
        },
    }


def gains(before: Records, after: Records) -> dict[str, Rate]:
    """Paired differences, after - before, on the same prompts. Raises ValueError where the prompts differ."""
    if not all(np.array_equal(before[name], after[name]) for name in ("id", "prompt")):
        raise ValueError("the two records are of different prompts")
    table = {"local_accuracy": mean(after["local_correct"].astype(float) - before["local_correct"])}
    for b in BUDGETS:
        a, z = (replay(r, margin_score(r), b).astype(float) for r in (after, before))
        table[f"margin_at_{b}"] = mean(a - z)
    return table


def frontier(records: Records, name: str, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """(call rates [points], overall accuracies [points]) of a router, or of "random", by replay at every budget."""
    budgets = np.linspace(0, 1, points)
    outcomes = [
        random_outcomes(records, b) if name == "random" else replay(records, ROUTERS[name](records), b) for b in budgets
    ]
    return budgets, np.array([o.mean() for o in outcomes])


def examples_to_show(records: Records) -> list[tuple[str, int]]:
    """(what it shows, row) for a few rows: solved, rightly asked, wrongly asked, wrongly stayed; those that occur."""
    asked, right = records["natural_called"], records["natural_correct"]
    kinds = {
        "solved on the device": ~asked & right,
        "rightly asked the cloud": asked & ~records["local_correct"] & records["cloud_correct"],
        "asked, though it would have solved it": asked & records["local_correct"],
        "stayed, and was wrong": ~asked & ~right,
    }
    return [(kind, int(np.flatnonzero(rows)[0])) for kind, rows in kinds.items() if rows.any()]
