"""What a router is worth, from records alone: rates, frontiers, RouteLLM's figures. No jax.

A router is a score f64[n], higher meaning "send it to the cloud"; only its order counts. At a
budget b the floor(b * n) highest are sent; the cloud's verdict counts for these, the device's own
for the others, and every rate's denominator is n. Where the budget cuts through equal scores, each
of them is sent with the same probability, and every figure is the exact expectation over that draw.
So nothing depends on the order of rows, nothing is drawn, and three routers have closed forms as
scores: random is a constant score, the perfect router `perfect_score`, and the best that can be
reached without the cloud's verdicts `reachable_score`.

Sources: Wilson 1927 (interval of a rate); RouteLLM, arXiv 2406.18665, section 3.2 and its
evaluation code (PGR, APGR, CPT); Efron & Tibshirani 1993 (percentile bootstrap); Student 1908 (the
mean of few seeds); Hanley & McNeil 1982 (AUC as a probability).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from collab_jax.records import Records
from collab_jax.runtime.errors import UserError

# A figure "value" with its 95 % interval "low" to "high"; None where one is not defined.
Rate = dict[str, float | None]

GRID = np.arange(101) / 100  # the budgets of a frontier
_TAIL = 0.025


# ---- rates


def rate(outcomes: np.ndarray) -> Rate:
    """The share of True in bool[n], with Wilson's interval."""
    k, n = int(outcomes.sum()), len(outcomes)
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
    """Probability f64[n] that each prompt is answered correctly in the end, at a budget."""
    p = sent(score, budget)
    return p * records["cloud_correct"] + (1 - p) * records["local_correct"]


def perfect_score(records: Records) -> np.ndarray:
    """The perfect router's score f64[n]; no score does better.

    What only the cloud gets right comes first, what only the device gets right last.
    """
    return records["cloud_correct"].astype(float) - records["local_correct"]


def reachable_score(records: Records) -> np.ndarray:
    """The reachable router's score f64[n]: it knows where the device is wrong, and the strata.

    What sending a prompt gains on average: the share that the cloud gets right in the prompt's
    stratum, less the device's own verdict. No router that does not know the cloud's verdicts can
    expect more.
    """
    _, stratum = np.unique(records["stratum"].astype(str), return_inverse=True)
    right = np.bincount(stratum, records["cloud_correct"]) / np.bincount(stratum)
    return right[stratum] - records["local_correct"]


def sent_counts(records: Records, score: np.ndarray, budget: float) -> dict[str, float]:
    """Expected numbers of prompts at a budget: sent, rescued, harmed, missed.

    rescued: sent, and only the cloud is right; harmed: sent, and only the device is right; missed:
    kept, and only the cloud is right. accuracy * n = local correct + rescued - harmed.
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


# ---- frontiers with a bootstrap


class Frontiers(NamedTuple):
    """Accuracy of methods over budgets: row 0 the figures, rows 1..R the same from the R resamples.

    Methods of one call share the resamples, so a difference of two is paired:
    `estimate(f.at("a", 0.3) - f.at("b", 0.3))`, `estimate(apgr(f.rates, f.accuracy["a"]))`.
    """

    budgets: np.ndarray  # f64[K], rising from 0 to 1
    rates: np.ndarray  # f64[K], share of calls: floor(budget * n) / n
    accuracy: dict[str, np.ndarray]  # method -> f64[1 + R, K]

    def at(self, method: str, budget: float) -> np.ndarray:
        """f64[1 + R] at one of `budgets`."""
        return self.accuracy[method][:, self.column(budget)]

    def column(self, budget: float) -> int:
        """Where `budget` is in K. Raises UserError where it is not."""
        near = np.flatnonzero(np.isclose(self.budgets, budget, rtol=0, atol=1e-9))
        if not near.size:
            raise UserError(
                f"the frontiers were not computed at a budget of {budget:g}: ask for it in "
                "`budgets`"
            )
        return int(near[0])


Runs = Sequence[tuple[Records, np.ndarray]]  # of a method: (records, score f64[n]) of each seed


def frontiers(
    methods: Mapping[str, Runs],
    budgets: Sequence[float] | np.ndarray = GRID,
    resamples: int = 1000,
    seed: int = 0,
) -> Frontiers:
    """Accuracy of every method at every budget (0 and 1 are added), over prompts and seeds.

    All tables hold the same prompts in the same order (`records.align`). A method's frontier is the
    mean of its seeds'. One resample draws n of the n prompts, with replacement, and weighs each
    method's seeds (`seed_weights`), so that its percentiles are those of a bootstrap over prompts
    and of a t interval over seeds at once. As the prompts are the same in every seed, one draw of
    them serves all seeds and methods: S seeds do not make S * n prompts. With one seed nothing is
    known of the spread over seeds: the interval is over prompts only, for this very model. Methods
    with equally many seeds have the same weights, so seed s of one is paired with seed s of the
    other. The draws depend on n, S and `seed` only: another method in the table changes no
    interval.

    Raises UserError where the prompts differ, a score holds NaN or has not one number a prompt, or
    nothing is given.
    """
    n = _same_prompts(methods)
    if resamples < 1:
        raise UserError(f"resamples={resamples}: an interval needs some, 1000 for two digits")
    points = np.unique([0.0, 1.0, *budgets])
    counts = calls(points, n)
    runs = {
        name: [_run(name, records, score) for records, score in seeds]
        for name, seeds in methods.items()
    }
    rng = np.random.default_rng([seed, 0])
    seed_rng = {
        size: np.random.default_rng([seed, size])
        for size in sorted({len(seeds) for seeds in runs.values()})
    }
    accuracy = {name: np.empty((1 + resamples, len(points))) for name in runs}
    times, weights = np.ones(n, np.int32), {size: np.full(size, 1 / size) for size in seed_rng}
    for r in range(1 + resamples):
        if r:  # row 0 has each prompt and each seed once
            times = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.int32)
            weights = {size: seed_weights(draw, size) for size, draw in seed_rng.items()}
        for name, seeds in runs.items():
            curves = np.array([_accuracy(run, times, counts) for run in seeds])
            accuracy[name][r] = weights[len(seeds)] @ curves
    return Frontiers(points, counts / n, accuracy)


def seed_weights(draw: np.random.Generator, size: int) -> np.ndarray:
    """Weights f64[S] of S = `size` seeds that add up to 1; those of one are just that.

    Of any figures x of the seeds, weights @ x has the t distribution with S - 1 degrees of freedom
    about their mean, in units of std(x) / sqrt(S), so that its percentiles are Student's interval.
    """
    if size == 1:
        return np.ones(1)
    noise = draw.standard_normal(size)
    wide = np.sqrt((size - 1) / draw.chisquare(size - 1))  # what makes a normal draw one of t
    return 1 / size + wide * (noise - noise.mean()) / np.sqrt(size * (size - 1))


class _Run(NamedTuple):
    """One seed of a method.

    32 bits hold every count, and halve the memory that a resample walks through.
    """

    ranking: Ranking
    local: np.ndarray  # i32[n]
    gain: np.ndarray  # i32[n], cloud - local, in the ranking's order


def _run(name: str, records: Records, score: np.ndarray) -> _Run:
    local, cloud = (
        records[column].astype(np.int32) for column in ("local_correct", "cloud_correct")
    )
    if np.shape(score) != local.shape:
        raise UserError(
            f"the score of {name} has shape {np.shape(score)}: it must be one number for each of "
            f"{len(local)} prompts"
        )
    ranking = rank(score, f"the score of {name}")
    return _Run(ranking, local, (cloud - local)[ranking.order])


def _accuracy(run: _Run, times: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Accuracy f64[K] of a resample, where the counts[K] highest are sent.

    The resample holds row i times[i] times, i32[n]. Repeated rows are equal scores, and within
    equal scores the expected gain is linear in how many of them are sent.
    """
    order, ends = run.ranking
    ordered = times[order]
    total = np.zeros(len(order) + 1, np.int32)  # sent with the first i of `order`
    gained = np.zeros(len(order) + 1, np.int32)
    np.cumsum(ordered, out=total[1:])
    np.cumsum(ordered * run.gain, out=gained[1:])
    # The group of equal scores in which each count is reached.
    group = np.searchsorted(ends, np.searchsorted(total[1:], counts), side="right")
    start, end = np.where(group > 0, ends[group - 1], 0), ends[group]
    share = (counts - total[start]) / np.maximum(total[end] - total[start], 1)
    gain = gained[start] + share * (gained[end] - gained[start])
    return (times @ run.local + gain) / times.sum()


def _same_prompts(methods: Mapping[str, Runs]) -> int:
    """The number of prompts.

    Raises UserError unless every table of every method has the same ids in the same order.
    """
    if not methods or not all(methods.values()):
        raise UserError(
            "nothing to compare: every method needs the records and the score of at least one seed"
        )
    first_name, first_runs = next(iter(methods.items()))
    first = first_runs[0][0]["id"]
    for name, table in methods.items():
        for i, (records, _) in enumerate(table):
            if not np.array_equal(records["id"], first):
                differ = len(set(records["id"]) ^ set(first))
                raise UserError(
                    f"{name} (seed {i + 1} of {len(table)}) is not of the prompts of {first_name}, "
                    f"or not in their order: {len(records['id'])} and {len(first)} prompts, "
                    f"{differ} ids in one of the two only; align the records"
                )
    return len(first)


def estimate(values: np.ndarray) -> Rate:
    """A figure f64[1 + R] with its 95 % interval: percentiles of the resamples.

    A resample that leaves the figure undefined (NaN) counts as beyond both ends; an end that falls
    on such resamples is None.
    """
    value, draws = float(values[0]), values[1:]
    low = np.quantile(np.where(np.isnan(draws), -np.inf, draws), _TAIL, method="inverted_cdf")
    high = np.quantile(np.where(np.isnan(draws), np.inf, draws), 1 - _TAIL, method="inverted_cdf")
    return {"value": _known(value), "low": _known(low), "high": _known(high)}


def _known(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


# ---- figures of a frontier; accuracy f64[..., K] at call rates f64[K] that rise from 0 to 1


def random_frontier(rates: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Accuracy f64[..., K] at random: the line from the device's accuracy to the cloud's."""
    return (1 - rates) * accuracy[..., :1] + rates * accuracy[..., -1:]


def area(rates: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Area under the frontier f64[...]: accuracy, averaged over all call rates."""
    return np.trapezoid(accuracy, rates, axis=-1)


def pgr(accuracy: np.ndarray) -> np.ndarray:
    """Performance gap recovered f64[..., K] (RouteLLM, section 3.2).

    It is (accuracy - device's) / (cloud's - device's): NaN where the cloud is no better than the
    device: there is no gap. May pass 1, and fall below 0.
    """
    device, cloud = accuracy[..., :1], accuracy[..., -1:]
    gap = np.where(cloud - device > 1e-12, cloud - device, np.nan)
    return (accuracy - device) / gap


def hull(accuracy: np.ndarray) -> np.ndarray:
    """The monotone hull f64[..., K]: the best at this call rate or a smaller one.

    It is a running maximum, since nobody who may spend a budget has to; not the concave hull. The
    ends, device alone and cloud alone, are in it.
    """
    return np.maximum.accumulate(accuracy, axis=-1)


def apgr(rates: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """RouteLLM's average PGR f64[...]: the mean over all call rates of the hull's PGR.

    It is 0.5 for random. RouteLLM defines the integral and approximates it by ten call rates; here
    it is the curve's own area. The hull is ours (without it: `area(rates, pgr(accuracy))`); on few
    prompts its running maximum adds a little that is noise.
    """
    return area(rates, hull(pgr(accuracy)))


def cpt(rates: np.ndarray, accuracy: np.ndarray, share: float) -> np.ndarray:
    """RouteLLM's call-performance threshold f64[...], a call rate.

    It is the smallest one at which the hull's PGR is `share`: linear between call rates, as in
    RouteLLM's code; `share` in (0, 1], so random's is `share`. NaN where PGR is.
    """
    if not 0 < share <= 1:
        raise UserError(f"CPT is of a share of the gap, above 0 and up to 1: got {share}")
    curve = hull(pgr(accuracy))
    after = np.argmax(curve >= share - 1e-12, axis=-1)[..., None]  # 1 or more: curve[0] is 0
    before = np.maximum(after - 1, 0)
    y0, y1 = np.take_along_axis(curve, before, -1), np.take_along_axis(curve, after, -1)
    with np.errstate(invalid="ignore"):
        threshold = rates[before] + (share - y0) / (y1 - y0) * (rates[after] - rates[before])
    return threshold[..., 0]


def gain_share(rates: np.ndarray, accuracy: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Share f64[..., K] of the best router's gain over random that a frontier reaches.

    best f64[..., K]: the frontier on the same records of the router that is taken for the best, the
    reachable or the perfect one. NaN where it gains nothing.
    """
    random = random_frontier(rates, accuracy)
    gain = np.where(best - random > 1e-12, best - random, np.nan)
    return (accuracy - random) / gain
