"""The decision token's bias for a call rate or an accuracy, from margins on held-out prompts.

With the online rule that holds a rate when the prompts change. Pure functions, no jax. A prompt is
called when margin + bias > 0, and always when its response has no answer (cut off, or not well
formed): no bias changes that, so its score is +inf. Where such responses alone exceed the budget,
leave them to the margin as well: answered = all True. A margin of -inf (no decision state) is never
called by a bias. What is promised holds for prompts drawn like the calibration prompts,
independently of each other; for others there is `track`.

Where the threshold lies. "The k-th largest score" leaves the gap up to the next larger one open;
the threshold is the middle of that gap. Every point of it calls the same calibration prompts, and a
higher one calls no more of the others, so a bound from above is kept; the expected rate is half a
prompt in n + 1 lower. In return nothing lies on the threshold: where logits are bfloat16 many
margins are equal, and a server that adds `logit_bias` would break such ties by token number.
Margins and biases are float32, as on the device; for those margin + bias > 0 is exact in float32
and in float64.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from collab_jax.runtime.errors import UserError

# No two logits are this far apart: this bias calls all that can be called, its negative only what
# must be.
LIMIT = 1e4
# For a promised accuracy one prompt in so many places the thresholds that the others test.
PLACING = 10
GRID = np.linspace(1, 0, 101)  # call rates of those thresholds, in the order of the tests


class Calibration(NamedTuple):
    """A bias and what is known of it."""

    bias: float  # float32
    target: str  # "rate" or "accuracy"
    value: float  # of the target
    delta: float | None  # the promise fails in at most this share of calibrations; None: no promise
    n: int  # calibration prompts
    called: int  # of these, by this bias
    k: int  # the threshold lies between the k-th largest score and the next larger one
    rate: float  # expected call rate
    low: float  # of its 95 % interval
    high: float
    accuracy: float | None = None  # overall, on the prompts that tested it; with target "accuracy"
    accuracy_low: float | None = None  # its lower bound at 1 - delta


class Tracker(NamedTuple):
    """The state of the online rule: its bias, and what stays the same."""

    bias: float
    budget: float  # share of prompts to call
    step: float  # of the bias, in logits
    low: float  # the bias stays in [low, high]
    high: float


def bias_for_rate(
    margins: np.ndarray, answered: np.ndarray, rate: float, delta: float | None = None
) -> Calibration:
    """The bias that calls a share `rate` of prompts.

    It comes from margins f[n] (-inf allowed) and answered bool[n]. The share of prompts above the
    k-th largest of n scores is Beta(k, n - k + 1) distributed where scores are continuous, and
    stochastically smaller where they tie (order statistics of uniforms; Vovk, arXiv 1209.2673).

    Without delta, k is the largest with k / (n + 1) <= rate: over all calibration sets, the mean
    call rate is at most `rate`; this one's may be above, see the interval. With delta, k is the
    largest with P(Beta(k, n - k + 1) > rate) = P(Binom(n, rate) <= k - 1) <= delta: a call rate
    above `rate` has probability <= delta.

    Raises UserError for bad input, for fewer prompts than that takes, and where responses without
    an answer exceed it.
    """
    scores = -np.sort(-_scores(margins, answered))  # falling
    _check_share("rate", rate)
    _check_share("delta", delta)
    n, unanswered = len(scores), int(np.isposinf(scores).sum())
    k = _rank(n, rate, delta)
    if k < 1:
        raise UserError(
            f"{n} calibration prompts are too few for a rate of {rate:g}{_with(delta)}: at least "
            f"{_prompts_for_rate(rate, delta)} are needed"
        )
    if k <= unanswered:
        raise UserError(
            f"{unanswered} of {n} calibration responses ({unanswered / n:.1%}) have no answer and "
            f"go to the cloud whatever the bias: a rate of {rate:g}{_with(delta)} is out of reach, "
            f"{_lowest_rate(unanswered, n, delta):.1%} is the lowest; or leave these to the margin "
            "too, with --margin_only (answered = all True)"
        )
    called = int((scores > scores[k - 1]).sum())
    threshold = between(scores[k - 1], scores[called - 1] if called else np.inf)
    expected, low, high = _rate(called, n)
    return Calibration(
        bias=-threshold,
        target="rate",
        value=float(rate),
        delta=delta,
        n=n,
        called=called,
        k=k,
        rate=expected,
        low=low,
        high=high,
    )


def bias_for_accuracy(
    margins: np.ndarray,
    answered: np.ndarray,
    local_correct: np.ndarray,
    cloud_correct: np.ndarray,
    accuracy: float,
    delta: float | None = None,
) -> Calibration:
    """The bias with the fewest calls whose overall accuracy reaches `accuracy`.

    margins are f[n], the others bool[n]. Without delta: the fewest calls that reach it on these
    prompts, a choice made on what measures it, so a little optimistic. With delta, the true
    accuracy is below `accuracy` with probability <= delta: thresholds are tested from calling
    everything downwards, each by its exact (Clopper-Pearson) lower bound at 1 - delta, up to the
    first that fails (fixed-sequence testing; Angelopoulos et al., Learn then Test, arXiv
    2110.01052). That holds for thresholds chosen without the prompts that test them, so every tenth
    prompt, in the order given, only places them, at call rates 1, 0.99, ..., 0. The interval of the
    call rate does not account for the choice.

    Raises UserError for bad input, where the accuracy is out of reach, and for fewer prompts than
    the bound takes.
    """
    scores = _scores(margins, answered)
    local = _column("local_correct", local_correct, len(scores))
    cloud = _column("cloud_correct", cloud_correct, len(scores))
    _check_share("accuracy", accuracy)
    _check_share("delta", delta)
    if delta is None:
        threshold, measured = _measured_threshold(scores, local, cloud, accuracy)
        bound = None
    else:
        threshold, measured, bound = _promised_threshold(scores, local, cloud, accuracy, delta)
    n, called = len(scores), int((scores > threshold).sum())
    expected, low, high = _rate(called, n)
    return Calibration(
        bias=-threshold,
        target="accuracy",
        value=float(accuracy),
        delta=delta,
        n=n,
        called=called,
        k=called + 1,
        rate=expected,
        low=low,
        high=high,
        accuracy=measured,
        accuracy_low=bound,
    )


def calls(bias: float, margins: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Which prompts go to the cloud under a bias, bool[n]; margins f[n], answered bool[n]."""
    return _scores(margins, answered) > np.float32(-bias)


def track(state: Tracker, called: bool) -> Tracker:
    """The state after a served prompt: bias <- bias - step * (called - budget).

    called: whether it went to the cloud, for whatever reason. Quantile tracking (Gibbs and Candes,
    arXiv 2106.00072; Angelopoulos et al., arXiv 2307.16895). It needs no assumption on the prompts:
    as long as the bias meets no limit, the T updates add up to mean(called) - budget = (first bias
    - last bias) / (step * T), which is at most (high - low) / (step * T) in size. If margins alone
    decide and lie in [a, b], and the first bias in [-b, -a], the bias stays in [-b - step, -a +
    step] and |mean(called) - budget| <= (b - a + step) / (step * T): a call lowers it only from
    above -b, no call raises it only from below -a.

    The limits matter in a run of responses that the bias does not decide (without an answer, or
    without a decision state): else it would run away, and would take as long to come back.
    """
    bias = state.bias - state.step * (called - state.budget)
    return state._replace(bias=min(max(bias, state.low), state.high))


def tracked(state: Tracker, margins: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Which prompts go to the cloud, bool[n], by a bias that tracks the budget through all of them.

    margins f[n] and answered bool[n] are of prompts in the order in which they are served.
    """
    sent = np.zeros(len(margins), bool)
    for i, score in enumerate(_scores(margins, answered).tolist()):
        sent[i] = score + state.bias > 0
        state = track(state, sent[i])
    return sent


def tracker(margins: np.ndarray, answered: np.ndarray, bias: float, budget: float) -> Tracker:
    """A state to begin with, from calibration margins f[n] and answered bool[n].

    A step is a fiftieth of the margins' spread (that of the middle 98 %): while margins stay in it,
    the bound of `track` is 51 / T, and the bias wanders by a small part of the spread. The limits
    leave room for a shift by one spread.
    """
    scores = _scores(margins, answered)
    _check_share("budget", budget)
    finite = scores[np.isfinite(scores)]
    lowest, highest = np.quantile(finite, [0.01, 0.99]).tolist() if len(finite) else (0.0, 0.0)
    spread = highest - lowest
    if not spread > 0:
        raise UserError(
            "the answered calibration prompts' margins do not differ: no bias holds a rate on them"
        )
    low, high = -highest - spread, -lowest + spread
    return Tracker(min(max(float(bias), low), high), budget, spread / 50, low, high)


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise UserError(f"{name}={value:g}: it must lie between 0 and 1, both excluded")


def _with(delta: float | None) -> str:
    return "" if delta is None else f" with delta {delta:g}"


def _column(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """The values, bool[n]. Raises UserError where they are anything else."""
    values = np.asarray(values)
    if values.dtype != bool or values.shape != (n,):
        raise UserError(
            f"{name} must be one True or False for each of {n} margins: it is "
            f"{values.dtype}{values.shape}"
        )
    return values


def _scores(margins: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Scores f32[n], +inf without an answer."""
    margins = np.asarray(margins)
    if margins.dtype.kind not in "fiu" or margins.ndim != 1 or not len(margins):
        raise UserError(
            "margins must be a list of numbers, one a prompt: they are "
            f"{margins.dtype}{margins.shape}"
        )
    answered = _column("answered", answered, len(margins))
    if np.isnan(margins).any():
        raise UserError(
            f"{np.isnan(margins).sum()} of {len(margins)} margins are NaN: evaluate the model again"
        )
    if (margins >= LIMIT).any() or (np.isfinite(margins) & (margins <= -LIMIT)).any():
        raise UserError(
            f"margins must be differences of logits, below {LIMIT:g} in size, or -inf: some are not"
        )
    return np.where(answered, margins, np.inf).astype(np.float32)


def _rank(n: int, rate: float, delta: float | None) -> int:
    """k as in `bias_for_rate`; 0 where there is none."""
    if delta is None:  # rounding shall not cost a prompt: 0.29 * 100 is 28.999...
        return min(int(rate * (n + 1) + 1e-9), n)
    below = int(stats.binom.ppf(delta, n, rate))  # counts with a tail below delta: 0 ... below - 1
    return below + int(stats.binom.cdf(below, n, rate) <= delta * (1 + 1e-9))


def _prompts_for_rate(rate: float, delta: float | None) -> int:
    """The smallest n with _rank >= 1; with delta, the smallest with (1 - rate)^n <= delta."""
    n = 1 / rate - 1 if delta is None else math.log(delta) / math.log1p(-rate)
    return max(math.ceil(n * (1 - 1e-9)), 1)


def _lowest_rate(unanswered: int, n: int, delta: float | None) -> float:
    """The smallest rate with _rank > unanswered, rounded up to a tenth of a point."""
    if unanswered == n:
        return 1.0
    k = unanswered + 1
    rate = k / (n + 1) if delta is None else stats.beta.ppf(1 - delta, k, n - unanswered)
    return math.ceil(1000 * rate) / 1000


def between(below: float, above: float) -> float:
    """A float32 number in [below, above), half way where both are finite."""
    if np.isinf(below):
        return math.copysign(LIMIT, below)
    if np.isinf(above):
        return float(below)
    middle = np.float32((float(below) + float(above)) / 2)
    # Of neighbouring numbers, the middle may round to the larger.
    return float(middle if middle < above else below)


def _rate(called: int, n: int) -> tuple[float, float, float]:
    """(expected, low, high) of the call rate, with a 95 % interval.

    Expected is half way between the means of Beta(called, .) and Beta(called + 1, .); the interval
    is that of both, Clopper and Pearson's for `called` of n.
    """
    low = float(stats.beta.ppf(0.025, called, n - called + 1)) if called else 0.0
    high = float(stats.beta.ppf(0.975, called + 1, n - called)) if called < n else 1.0
    return (called + 0.5) / (n + 1), low, high


def _measured_threshold(
    scores: np.ndarray, local: np.ndarray, cloud: np.ndarray, accuracy: float
) -> tuple[float, float]:
    """(threshold with the fewest calls that reach `accuracy`, its accuracy) on these prompts."""
    n, order = len(scores), np.argsort(-scores, kind="stable")
    gain = np.cumsum(cloud[order].astype(int) - local[order])  # of calling the first 1, 2, ..., n
    correct = local.sum() + np.concatenate([[0], gain])  # [n + 1]
    above = np.concatenate([[np.inf], scores[order]])  # [n + 1], the lowest score that is called
    below = np.concatenate([scores[order], [-np.inf]])  # and the highest that is not
    # No threshold parts equal scores, +inf and -inf among them.
    possible = np.flatnonzero(above > below)
    reached = possible[correct[possible] >= accuracy * n - 1e-9]
    if not len(reached):
        best = possible[correct[possible].argmax()]
        raise UserError(
            f"no call rate reaches an accuracy of {accuracy:g} on these {n} prompts: the highest "
            f"is {correct[best] / n:.1%}, at {best / n:.1%} calls"
        )
    fewest = reached[0]
    threshold = between(float(below[fewest]), float(above[fewest]))
    return threshold, float(correct[fewest] / n)


def _promised_threshold(
    scores: np.ndarray, local: np.ndarray, cloud: np.ndarray, accuracy: float, delta: float
) -> tuple[float, float, float]:
    """(threshold, its accuracy on the testing prompts, that accuracy's lower bound).

    It is the last of the sequence that passes.
    """
    placing = np.arange(len(scores)) % PLACING == PLACING - 1
    thresholds = _thresholds(scores[placing])
    sent = scores[~placing] > thresholds[:, None]  # [grid, testing prompts]
    correct, n = np.where(sent, cloud[~placing], local[~placing]).sum(1), int((~placing).sum())
    bound = np.where(
        correct > 0, stats.beta.ppf(delta, np.maximum(correct, 1), n - correct + 1), 0.0
    )
    passed = int(np.logical_and.accumulate(bound >= accuracy).sum())
    if not passed:
        share, needed = correct[0] / n, ""
        if share - accuracy > 1e-4:  # less headroom would take some 10^8 prompts to see
            needed = (
                f"; if that holds, about {_prompts_for_accuracy(share, accuracy, delta)} are needed"
            )
        raise UserError(
            f"an accuracy of {accuracy:g} cannot be promised{_with(delta)} from {len(scores)} "
            f"prompts: calling everything reaches {share:.1%} on them, of which {bound[0]:.1%} can "
            f"be promised{needed}"
        )
    last = passed - 1
    return float(thresholds[last]), float(correct[last] / n), float(bound[last])


def _thresholds(scores: np.ndarray) -> np.ndarray:
    """Thresholds f32[grid] that call about the shares GRID of scores [m].

    The first calls all, the last only what must be called.
    """
    falling = -np.sort(-scores)
    not_called = np.concatenate([falling, [-np.inf]])[np.rint(GRID * len(falling)).astype(int)]
    above = np.array(
        [np.min(falling, where=falling > below, initial=np.inf) for below in not_called]
    )
    inner = [between(float(b), float(a)) for b, a in zip(not_called, above, strict=True)]
    return np.array([-LIMIT, *inner[1:-1], LIMIT], np.float32)


def _prompts_for_accuracy(share: float, accuracy: float, delta: float) -> int:
    """About how many prompts it takes if a `share` > accuracy of them is correct.

    The prompts that place thresholds are included.
    """
    n = 1
    while stats.beta.ppf(delta, share * n, n - share * n + 1) < accuracy:
        n += 1 + n // 50
    return n + (n - 1) // (PLACING - 1)
