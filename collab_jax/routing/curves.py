"""Frontiers: accuracy at every budget, with intervals, and RouteLLM's figures of them. No jax.

Budgets and their figures are those of `measures.py`. Sources: Efron & Tibshirani 1993 (percentile
bootstrap); Student 1908 (the mean of few seeds); RouteLLM, arXiv 2406.18665, section 3.2 and its
evaluation code (PGR, APGR, CPT).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from collab_jax.records import Records, outcomes
from collab_jax.routing.measures import Ranking, Rate, calls, rank
from collab_jax.runtime.errors import UserError

GRID = np.arange(101) / 100  # the budgets of a frontier
_TAIL = 0.025


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


def mean(values: Sequence[np.ndarray], resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """The mean f64[1 + R] of a figure of each prompt, one f64[n] for each seed.

    Resampled over prompts and seeds as `frontiers` is, from the same draws.
    """
    table = np.array(values, float)
    rng, draw = np.random.default_rng([seed, 0]), np.random.default_rng([seed, len(table)])
    n, means = table.shape[1], np.empty(1 + resamples)
    means[0] = table.mean()
    for r in range(1, 1 + resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        means[r] = seed_weights(draw, len(table)) @ (table @ times / n)
    return means


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

    32 bits hold every count, and halve the memory that a resample walks through. Grades are f64.
    """

    ranking: Ranking
    local: np.ndarray  # i32[n] or f64[n]
    gain: np.ndarray  # the same, cloud - local, in the ranking's order


def _run(name: str, records: Records, score: np.ndarray) -> _Run:
    both = outcomes(records, "local"), outcomes(records, "cloud")
    number = np.int32 if all(x.dtype == bool for x in both) else np.float64
    local, cloud = (x.astype(number) for x in both)
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
    gained = np.zeros(len(order) + 1, run.gain.dtype)
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
