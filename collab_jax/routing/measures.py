"""What a score is worth at one budget, and how well it ranks, from records alone. No jax.

A router is a score f64[n], higher meaning "send it to the cloud"; only its order counts. At a
budget b the floor(b * n) highest are sent; the cloud's verdict counts for these, the device's own
for the others, and every rate's denominator is n. Where the budget cuts through equal scores, each
of them is sent with the same probability, and every figure is the exact expectation over that draw.
So nothing depends on the order of rows, nothing is drawn, and three routers have closed forms as
scores: random is a constant score, the perfect router `perfect_score`, and the best that can be
reached without the cloud's verdicts `reachable_score`. `curves.py` has all budgets at once.

Sources: Wilson 1927 (interval of a rate); Hanley & McNeil 1982 (AUC as a probability).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from collab_jax.records import Records, outcomes
from collab_jax.runtime.errors import UserError

# A figure "value" with its 95 % interval "low" to "high"; None where one is not defined.
Rate = dict[str, float | None]


# ---- rates


def rate(values: np.ndarray) -> Rate:
    """The share of True in bool[n], with Wilson's interval; the mean of f[n], with Student's."""
    n = len(values)
    if values.dtype != bool:
        wide = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else None
        mean = float(values.mean())
        if wide is None:
            return {"value": mean, "low": None, "high": None}
        return {"value": mean, "low": float(mean - wide), "high": float(mean + wide)}
    k = int(values.sum())
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return {"value": k / n, "low": float(interval.low), "high": float(interval.high)}


# ---- one score at one budget


class Ranking(NamedTuple):
    """A score's order: the prompts that a budget is spent on, first to last."""

    order: np.ndarray  # i64[n], rows from the highest score
    ends: np.ndarray  # i64[g], where each group of equal scores ends in `order` (exclusive)


def rank(score: np.ndarray, name: str = "the score") -> Ranking:
    """The order of a score f[n]; infinities rank like any number.

    Raises UserError where it holds NaN.
    """
    score = _numbers(score, name)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    return Ranking(order, np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, len(score)))


def _numbers(score: np.ndarray, name: str) -> np.ndarray:
    score = np.asarray(score, float)
    if (rows := np.flatnonzero(np.isnan(score))).size:
        raise UserError(
            f"{name} is NaN in {rows.size} of {len(score)} rows (first: row {rows[0] + 1}): a "
            "router must rank every prompt"
        )
    return score


def calls(budget: float | Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """The number of n prompts that each budget pays for, floor(budget * n), i64[...].

    A budget is a share of all prompts; raises UserError where it is not in [0, 1].
    """
    shares = np.asarray(budget, float)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise UserError(f"a budget is a share of all prompts, from 0 to 1: got {shares}")
    return np.floor(shares * n + 1e-9).astype(np.int64)  # 0.29 * 100 is 28.999999999999996


def sent(score: np.ndarray, budget: float) -> np.ndarray:
    """Probability f64[n] that each prompt is sent to the cloud at a budget.

    It is 1 or 0, or between where the budget cuts through equal scores.
    """
    return sent_of(rank(score), int(calls(budget, len(score))))


def sent_of(ranking: Ranking, count: int) -> np.ndarray:
    """Probability f64[n] that each prompt is among the first `count` of a ranking."""
    sizes = np.diff(ranking.ends, prepend=0)
    p = np.empty(len(ranking.order))
    p[ranking.order] = np.repeat(np.clip((count - (ranking.ends - sizes)) / sizes, 0, 1), sizes)
    return p


def replay(records: Records, score: np.ndarray, budget: float) -> np.ndarray:
    """Probability f64[n] that each prompt is answered correctly in the end, at a budget.

    Where answers have grades, the grade that is expected.
    """
    p = sent(score, budget)
    return p * outcomes(records, "cloud") + (1 - p) * outcomes(records, "local")


def perfect_score(records: Records) -> np.ndarray:
    """The perfect router's score f64[n]; no score does better.

    What only the cloud gets right comes first, what only the device gets right last.
    """
    return outcomes(records, "cloud").astype(float) - outcomes(records, "local")


def reachable_score(records: Records) -> np.ndarray:
    """The reachable router's score f64[n]: it knows where the device is wrong, and the strata.

    What sending a prompt gains on average: the share that the cloud gets right in the prompt's
    stratum, less the device's own verdict. No router that knows no more of the cloud can expect
    more; one that tells within a stratum what the cloud gets right may.
    """
    _, stratum = np.unique(records["stratum"].astype(str), return_inverse=True)
    right = np.bincount(stratum, outcomes(records, "cloud")) / np.bincount(stratum)
    return right[stratum] - outcomes(records, "local")


def sent_counts(records: Records, score: np.ndarray, budget: float) -> dict[str, float]:
    """Expected numbers of prompts at a budget: sent, rescued, harmed, missed.

    rescued: sent, and only the cloud is right; harmed: sent, and only the device is right; missed:
    kept, and only the cloud is right. accuracy * n = local correct + rescued - harmed. A graded
    answer is right as `local_correct` and `cloud_correct` say.
    """
    p, local, cloud = sent(score, budget), records["local_correct"], records["cloud_correct"]
    return {
        "sent": float(p.sum()),
        "rescued": float(p[~local & cloud].sum()),
        "harmed": float(p[local & ~cloud].sum()),
        "missed": float((1 - p)[~local & cloud].sum()),
    }


# ---- ranking


def auc(records: Records, score: np.ndarray) -> float:
    """Probability that a prompt the device gets wrong outranks one it gets right.

    Ties count as half: it is the area under the ROC curve. Raises UserError where the device is
    right on every prompt, or on none.
    """
    value = _auc(~records["local_correct"], score)
    if value is None:
        one = "right" if records["local_correct"].all() else "wrong"
        raise UserError(
            f"the AUC of 'local is wrong' needs both classes: local_correct says {one} on all "
            f"{len(score)} prompts"
        )
    return value


def auc_by_stratum(records: Records, score: np.ndarray) -> dict[str, float | None]:
    """The AUC within each stratum; None where all its prompts are of one class."""
    # A router that only tells strata apart has 0.5 in each.
    wrong, stratum = ~records["local_correct"], records["stratum"]
    return {str(s): _auc(wrong[stratum == s], score[stratum == s]) for s in np.unique(stratum)}


def _auc(wrong: np.ndarray, score: np.ndarray) -> float | None:
    score = _numbers(score, "the score")
    positives, negatives = int(wrong.sum()), int((~wrong).sum())
    if not positives or not negatives:
        return None
    ranks = stats.rankdata(score)
    return float((ranks[wrong].sum() - positives * (positives + 1) / 2) / (positives * negatives))
