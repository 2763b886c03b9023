"""Calibration: by hand, against exact tails, by enumerating every calibration set, by simulation,
and under shift.
"""

import itertools
import json
import math
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from collab_jax import calibrate
from collab_jax.routing import calibration, collab_config
from collab_jax.routing.calibration import bias_for_accuracy, bias_for_rate, track, tracker
from collab_jax.runtime.errors import UserError

T, F = True, False
HAND = np.array(
    [3.0, -1.0, 2.0, 0.0, 1.0, -2.0, -3.0, -4.0, -5.0]
)  # n = 9, so k / (n + 1) is in tenths
ALL = np.ones(9, bool)


def called(margins, answered, bias):
    """The rule that is served: bool[n]."""
    return (margins + bias > 0) | ~answered


# --- a call rate


def test_rate_by_hand():
    c = bias_for_rate(HAND, ALL, 0.3)  # k = 3: the third largest is 1, the next larger 2
    assert (c.bias, c.k, c.called, c.n, c.delta) == (-1.5, 3, 2, 9, None)
    assert called(HAND, ALL, c.bias).tolist() == [T, F, T, F, F, F, F, F, F]
    assert c.rate == 0.25  # between 2 / 10 and 3 / 10
    assert c.low == pytest.approx(stats.beta(2, 8).ppf(0.025)) and c.high == pytest.approx(
        stats.beta(3, 7).ppf(0.975)
    )
    assert (
        bias_for_rate(HAND, ALL, 0.1).bias == -3.0
    )  # nothing larger: at the largest itself, which stays local
    assert (
        bias_for_rate(HAND, ALL, 0.39).k == 3 and bias_for_rate(HAND, ALL, 0.4).k == 4
    )  # never above the budget
    assert (
        bias_for_rate(np.arange(99.0), np.ones(99, bool), 0.29).k == 29
    )  # 0.29 * 100 is 28.999...


def test_rate_with_delta_by_hand():
    # P(Binom(9, 0.5) <= 1) = 10 / 512, <= 2: 46 / 512
    assert bias_for_rate(HAND, ALL, 0.5, delta=0.05).k == 2
    assert bias_for_rate(HAND, ALL, 0.5, delta=0.09).k == 3
    assert bias_for_rate(HAND[:3], ALL[:3], 0.5, delta=0.125).k == 1  # (1 - 0.5)^3, exactly


def test_unanswered_come_first_and_no_decision_state_last():
    answered = np.array([T, T, F, T, T, F, T, T, T])
    margins = np.where(
        np.arange(9) == 4, -np.inf, HAND
    )  # scores: inf, inf, 3, 0, -1, -3, -4, -5, -inf
    c = bias_for_rate(margins, answered, 0.4)  # k = 4: 0, the next larger 3
    assert (c.bias, c.called) == (-1.5, 3)
    assert bias_for_rate(margins, answered, 0.3).bias == -3.0  # nothing answered is larger than 3
    c = bias_for_rate(margins, answered, 0.9)  # more than can be called: everything that can
    assert (c.bias, c.called, c.k, c.rate) == (calibration.LIMIT, 8, 9, 0.85)
    assert called(margins, answered, c.bias).sum() == 8


def test_ties_are_called_together_or_not_at_all():
    margins = np.array([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -1.0])
    c = bias_for_rate(margins, ALL, 0.4)  # the fourth largest is a 1, of three
    assert (c.bias, c.k, c.called, c.rate) == (-1.5, 4, 1, 0.15)


@pytest.mark.parametrize("n", [7, 60, 1001])
@pytest.mark.parametrize("rate", [0.07, 0.3, 0.5, 0.93])
@pytest.mark.parametrize("delta", [0.2, 0.05, 1e-3])
def test_rank_is_the_largest_that_the_tail_allows(n, rate, delta):
    k = calibration._rank(n, rate, delta)
    if k == 0:
        assert (1 - rate) ** n > delta
        need = calibration._prompts_for_rate(rate, delta)
        assert (1 - rate) ** need <= delta < (1 - rate) ** (need - 1)
    else:
        tail = stats.beta.sf(rate, k, n - k + 1)
        assert tail == pytest.approx(stats.binom.cdf(k - 1, n, rate), rel=1e-9)  # the identity
        assert tail <= delta < (stats.beta.sf(rate, k + 1, n - k) if k < n else 1)


def enumerate_sets(n, levels):
    """Every multiset of n draws from `levels` outcomes, as counts."""
    for bars in itertools.combinations(range(n + levels - 1), levels - 1):
        yield np.diff([-1, *bars, n + levels - 1]) - 1


@pytest.mark.parametrize("p", [(0.05, 0.15, 0.3, 0.5), (0.2, 0.1, 0.6, 0.1)])
def test_promise_holds_exactly_over_every_calibration_set(p):
    """Scores with heavy ties: +inf (no answer), 1, 0, -inf; no simulation, the probability of each
    outcome is summed.
    """
    n, rate, delta = 10, 0.35, 0.15
    margins, answered = np.array([9.0, 1.0, 0.0, -np.inf]), np.array([F, T, T, T])
    mean, exceeded, total = 0.0, 0.0, 0.0
    for counts in enumerate_sets(n, 4):
        weight = stats.multinomial.pmf(counts, n, p)
        total += weight
        for d in (None, delta):
            try:
                c = bias_for_rate(margins.repeat(counts), answered.repeat(counts), rate, d)
            except UserError:
                continue
            true = float(np.dot(p, called(margins, answered, c.bias)))
            if d is None:
                mean += weight * true
            else:
                exceeded += weight * (true > rate)
    assert total == pytest.approx(1)
    assert mean <= rate and exceeded <= delta


def test_promise_holds_in_simulation_and_is_not_idle():
    rng, n, rate, delta, repeats = np.random.default_rng(0), 200, 0.3, 0.1, 400
    answered = np.ones(n, bool)
    true = np.array(
        [
            stats.norm.sf(-bias_for_rate(rng.normal(size=n), answered, rate, delta).bias)
            for _ in range(repeats)
        ]
    )
    share, noise = (true > rate).mean(), 3 * (delta * (1 - delta) / repeats) ** 0.5
    assert share <= delta + noise
    assert share >= delta / 2 - noise  # exact up to the steps of the binomial and half a prompt


def draw(rng, n):
    """Margins in two heaps, as trained models have them; 4 % without an answer, 1 % without a
    decision state.
    """
    margins = np.where(rng.random(n) < 0.35, rng.normal(5, 1.5, n), rng.normal(-3, 1, n))
    margins[rng.random(n) < 0.01] = -np.inf
    return margins.astype(np.float32), rng.random(n) >= 0.04


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_fresh_prompts_are_called_within_two_points(rate):
    rng = np.random.default_rng(1)
    (margins, answered), fresh = draw(rng, 10_000), draw(rng, 10_000)
    c = bias_for_rate(margins, answered, rate)
    assert abs(called(*fresh, c.bias).mean() - rate) < 0.02
    assert c.low < rate < c.high


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e3])
def test_threshold_is_exact_in_float32_and_float64(scale):
    """Neighbouring float32 margins: the threshold parts what it should, whichever type adds the
    bias.
    """
    first = np.float32(1.1 * scale)
    margins = [first]
    for _ in range(8):
        margins.append(np.nextafter(margins[-1], np.float32(np.inf)))
    margins = np.array(margins[::-1], np.float32)  # falling
    for rate in (0.2, 0.5, 0.8):
        c = bias_for_rate(margins, ALL, rate)
        expected = np.arange(9) < c.k - 1
        bias = np.float32(c.bias)
        assert float(bias) == c.bias
        assert ((margins + bias > 0) == expected).all() and (margins + bias).dtype == np.float32
        assert ((margins.astype(float) + c.bias > 0) == expected).all()
        assert ((margins > -bias) == expected).all()  # the sampler's comparison


# --- an accuracy


def test_accuracy_by_hand():
    margins = np.array([3.0, 2.0, 1.0, 0.0, -1.0])
    local, cloud, answered = np.array([F, F, T, F, T]), np.array([T, F, T, T, F]), np.ones(5, bool)
    # calling the first 0 ... 5: 2, 3, 3, 3, 4, 3 of five are right
    assert bias_for_accuracy(margins, answered, local, cloud, 0.4).called == 0
    c = bias_for_accuracy(margins, answered, local, cloud, 0.6)
    assert (c.bias, c.called, c.accuracy, c.accuracy_low, c.target) == (
        -2.5,
        1,
        0.6,
        None,
        "accuracy",
    )
    c = bias_for_accuracy(margins, answered, local, cloud, 0.8)
    assert (c.bias, c.called, c.rate) == (0.5, 4, 0.75)
    with pytest.raises(
        UserError, match=r"accuracy of 0.9 on these 5 prompts: the highest is 80.0%, at 80.0% calls"
    ):
        bias_for_accuracy(margins, answered, local, cloud, 0.9)


def test_accuracy_respects_what_a_bias_cannot_part():
    right = np.ones(4, bool)
    c = bias_for_accuracy(np.array([1.0, 1.0, 1.0, 0.0]), right, ~right, right, 0.5)
    assert (c.called, c.accuracy) == (3, 0.75)  # ties go together
    c = bias_for_accuracy(
        np.array([1.0, 0.0, -1.0, -2.0]), np.array([T, F, T, F]), right, right, 0.5
    )
    assert (c.called, c.bias) == (2, -1.0)  # only what has no answer
    with pytest.raises(UserError, match="the highest is 75.0%, at 75.0% calls"):
        bias_for_accuracy(np.array([1.0, 0.0, -1.0, -np.inf]), right, ~right, right, 0.9)
    assert (
        bias_for_accuracy(np.array([1.0, 0.0, -1.0, -2.0]), right, ~right, right, 0.9).bias
        == calibration.LIMIT
    )


def test_promised_accuracy_by_the_exact_tail():
    """Equal margins leave one test, calling everything: it passes from the count on whose binomial
    tail is <= delta.
    """
    n, target, delta = 100, 0.8, 0.05  # 90 of them test
    testing = np.flatnonzero(np.arange(n) % 10 != 9)

    def passes(correct):
        cloud = np.zeros(n, bool)
        cloud[testing[:correct]] = True
        try:
            c = bias_for_accuracy(
                np.zeros(n), np.ones(n, bool), np.zeros(n, bool), cloud, target, delta
            )
        except UserError:
            return False
        return c.accuracy == correct / 90 and c.accuracy_low >= target

    first = next(k for k in range(91) if passes(k))
    assert stats.binom.sf(first - 1, 90, target) <= delta < stats.binom.sf(first - 2, 90, target)
    assert passes(90)


def test_promised_accuracy_stops_at_the_first_test_that_fails():
    """Calling everything is right with 0.6, fewer with down to 0.3, three in ten with 0.7: what
    passes there is not asked.
    """
    margins, yes = np.arange(1000.0)[::-1], np.ones(1000, bool)
    middle = (np.arange(1000) >= 300) & (np.arange(1000) < 700)
    c = bias_for_accuracy(margins, yes, middle, ~middle, 0.5, 0.05)
    assert 900 < c.called < 1000 and c.accuracy_low >= 0.5
    assert -c.bias % 10 == 5  # the tenths that place it have margins 0, 10, ...: half way
    assert (
        bias_for_accuracy(margins, yes, middle, ~middle, 0.5).called < 300
    )  # without a bound, the fewest


def test_promised_accuracy_in_simulation():
    """Scores u are uniform, the device is right with 1 - u, the cloud with 0.9: above t, 0.9 + 0.1
    t - t^2 / 2 are right.
    """
    rng, n, target, delta, repeats = np.random.default_rng(2), 400, 0.75, 0.1, 150
    calls, true = np.zeros(repeats), np.zeros(repeats)
    for i in range(repeats):
        u = rng.random(n)
        c = bias_for_accuracy(
            u, np.ones(n, bool), rng.random(n) < 1 - u, rng.random(n) < 0.9, target, delta
        )
        t = min(max(-c.bias, 0.0), 1.0)
        calls[i], true[i] = 1 - t, 0.9 + 0.1 * t - t**2 / 2
    assert (true < target).mean() <= delta + 3 * (delta * (1 - delta) / repeats) ** 0.5
    assert calls.mean() < 0.5  # 0.343 would be enough


def test_promised_accuracy_out_of_reach():
    n = 100
    yes, no, margins = np.ones(n, bool), np.zeros(n, bool), np.arange(n, dtype=float)
    with pytest.raises(
        UserError, match="calling everything reaches 0.0% on them, of which 0.0% can be promised$"
    ):
        bias_for_accuracy(margins, yes, no, no, 0.5, 0.05)
    with pytest.raises(
        UserError,
        match=r"from 20 prompts: .* 100.0% .* 84.7% can be promised; .* about 32 are needed",
    ):
        bias_for_accuracy(
            margins[:20], yes[:20], no[:20], yes[:20], 0.9, 0.05
        )  # 0.9^29 <= 0.05, and three place
    assert (
        bias_for_accuracy(margins[:32], yes[:32], no[:32], yes[:32], 0.9, 0.05).accuracy_low >= 0.9
    )


# --- online


def test_track_by_hand():
    state = calibration.Tracker(bias=0.0, budget=0.25, step=2.0, low=-2.0, high=1.0)
    after = track(state, True)
    assert after == state._replace(bias=-1.5) and state.bias == 0.0
    assert track(after, True).bias == -2.0  # the limit
    assert track(after, False).bias == -1.0


def test_track_holds_the_rate_where_a_fixed_bias_does_not():
    rng, budget = np.random.default_rng(3), 0.3
    margins, answered = draw(rng, 10_000)
    fixed = bias_for_rate(margins, answered, budget).bias
    state = tracker(margins, answered, fixed, budget)
    assert state.step == pytest.approx(
        np.ptp(np.quantile(margins[answered & np.isfinite(margins)], [0.01, 0.99])) / 50
    )
    (before, a), (after, b) = draw(rng, 5000), draw(rng, 5000)
    after = np.where(
        rng.random(5000) < 0.5, rng.normal(5, 1.5, 5000), after
    )  # two in three are hard now
    stream, answers = np.concatenate([before, after]), np.concatenate([a, b])
    calls = np.zeros(10_000, bool)
    at_first = state
    for i, (margin, answer) in enumerate(zip(stream.tolist(), answers.tolist(), strict=True)):
        calls[i] = margin + state.bias > 0 or not answer
        state = track(state, calls[i])
    np.testing.assert_array_equal(calibration.tracked(at_first, stream, answers), calls)
    assert abs(calls[:5000].mean() - budget) < 0.02 and abs(calls[5000:].mean() - budget) < 0.02
    assert called(after, b, fixed).mean() > budget + 0.2


@pytest.mark.parametrize("order", ["sorted", "reversed", "alternating", "random"])
def test_track_keeps_its_deterministic_bound(order):
    """No assumption on the stream but its range, and at every length, not only the last."""
    rng, a, b, budget, step = np.random.default_rng(4), -3.0, 2.0, 0.3, 0.2
    margins = np.sort(rng.uniform(a, b, 1000))
    margins = {
        "sorted": margins,
        "reversed": margins[::-1],
        "alternating": np.where(np.arange(1000) // 50 % 2, a, b),
        "random": rng.permutation(margins),
    }[order]
    state = calibration.Tracker(3.0, budget, step, -50.0, 50.0)  # begins at -a
    first, count = state.bias, 0
    for i, margin in enumerate(margins.tolist(), start=1):
        call = margin + state.bias > 0
        state, count = track(state, call), count + call
        assert -b - step <= state.bias <= -a + step
        assert count / i - budget == pytest.approx((first - state.bias) / (step * i))
        assert abs(count / i - budget) <= (b - a + step) / (step * i) + 1e-9


def test_tracker_comes_back_from_a_run_it_cannot_decide():
    margins = np.random.default_rng(5).normal(size=1000)
    state = begin = tracker(
        margins, np.ones(1000, bool), 100.0, 0.3
    )  # a bias out of range begins at the limit
    assert state.bias == state.high
    for _ in range(10_000):
        state = track(state, True)  # nothing but responses without an answer
    assert state.bias == state.low
    steps = 0
    while margins.max() + state.bias <= 0:
        state, steps = track(state, False), steps + 1
    assert steps < (begin.high - begin.low) / (begin.step * begin.budget)


# --- refusals

BAD = {
    "NaN": (dict(margins=np.where(HAND == 0, np.nan, HAND)), "1 of 9 margins are NaN"),
    "inf": (dict(margins=np.where(HAND == 0, np.inf, HAND)), "differences of logits"),
    "huge": (dict(margins=HAND * 1e9), "differences of logits"),
    "empty": (dict(margins=HAND[:0], answered=ALL[:0]), "margins must be a list of numbers"),
    "text": (dict(margins=HAND.astype(str)), "margins must be a list of numbers"),
    "table": (dict(margins=HAND[:, None]), "margins must be a list of numbers"),
    "length": (dict(answered=ALL[:4]), r"answered must be .* each of 9 margins: it is bool\(4,\)"),
    "type": (dict(answered=HAND), "answered must be one True or False"),
    "rate 0": (dict(rate=0.0), "rate=0: it must lie between 0 and 1"),
    "percent": (dict(rate=30.0), "rate=30: it must lie between 0 and 1"),
    "rate NaN": (dict(rate=math.nan), "rate=nan"),
    "delta": (dict(delta=1.0), "delta=1: it must lie between 0 and 1"),
    "few": (
        dict(rate=0.05),
        "9 calibration prompts are too few for a rate of 0.05: at least 19 are needed",
    ),
    "few for delta": (
        dict(delta=0.01),
        "too few for a rate of 0.3 with delta 0.01: at least 13 are needed",
    ),
    "unanswered": (
        dict(answered=HAND < 0),
        r"4 of 9 .* \(44.4%\) have no answer .* 50.0% is the lowest.*--margin_only",
    ),
    "as many unanswered as the budget": (
        dict(answered=HAND <= 0),
        r"3 of 9 .* 40.0% is the lowest",
    ),
    "all unanswered": (dict(answered=~ALL, delta=0.1), "9 of 9 .* 100.0% is the lowest"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_reason(name):
    changed, message = BAD[name]
    with pytest.raises(UserError, match=message):
        bias_for_rate(**{"margins": HAND, "answered": ALL, "rate": 0.3, **changed})


def test_other_refusals():
    for accuracy, delta, message in ((1.0, None, "accuracy=1"), (0.5, 0.0, "delta=0")):
        with pytest.raises(UserError, match=message):
            bias_for_accuracy(HAND, ALL, ALL, ALL, accuracy, delta)
    with pytest.raises(UserError, match="cloud_correct must be"):
        bias_for_accuracy(HAND, ALL, ALL, ALL[:3], 0.5)
    with pytest.raises(UserError, match="do not differ"):
        tracker(np.zeros(9), ALL, 0.0, 0.3)


def test_what_is_called_lowest_is_enough():
    rng = np.random.default_rng(6)
    margins, answered = rng.normal(size=500), rng.random(500) < 0.6
    for delta in (None, 0.05):
        lowest = calibration._lowest_rate(int((~answered).sum()), 500, delta)
        assert bias_for_rate(margins, answered, lowest, delta).called >= (~answered).sum()
        with pytest.raises(UserError, match="have no answer"):
            bias_for_rate(margins, answered, lowest - 0.003, delta)


# --- the file and the command line


def config(delta=None):
    margins, answered = draw(np.random.default_rng(7), 1000)
    return collab_config.to_config(
        bias_for_rate(margins, answered, 0.3, delta),
        margins,
        answered,
        decision_token="<unknown>",
        marker="<unknown> help",
    )


def test_config_returns_as_it_was_written(tmp_path):
    for delta in (None, 0.05):
        path = collab_config.write(tmp_path / "new" / "folder", config(delta))
        assert path.name == "collab_config.json" and [p.name for p in path.parent.iterdir()] == [
            path.name
        ]
        assert collab_config.read(path) == collab_config.read(path.parent) == config(delta)
    named = collab_config.write(tmp_path / "other.json", config())
    assert named == tmp_path / "other.json" and collab_config.read(named) == config()


def test_config_says_what_a_server_needs():
    c = config()
    assert (c["version"], c["decision_token"], c["marker"], c["prompts"]) == (
        1,
        "<unknown>",
        "<unknown> help",
        1000,
    )
    assert (
        c["target"] == "rate"
        and c["value"] == c["tracking"]["budget"] == 0.3
        and c["call_unanswered"] is True
    )
    rows = {row["rate"]: row for row in c["biases"]}
    assert rows[0.3]["bias"] == c["bias"] and rows[0.3]["expected"] == c["call_rate"]["expected"]
    assert list(rows) == list(collab_config.RATES) and list(rows)[::9] == [0.05, 0.5, 0.95]
    assert [row["rate"] for row in config(0.05)["biases"]][
        0
    ] == 0.1  # with delta, 0.05 is below the share without answer
    biases = [row["bias"] for row in c["biases"]]
    assert biases == sorted(biases)
    assert c["tracking"]["low"] < c["bias"] < c["tracking"]["high"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = collab_config.write(tmp_path, config())

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        collab_config.write(tmp_path, config(0.05))
    assert collab_config.read(path) == config()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read .*No such file.*make it with"),
        ('{"version": 1', "is not JSON"),
        ("[1]", "is not a calibration"),
        ('{"bias": 1.0}', "is not a calibration"),
        ('{"version": 2}', "version 2, this program reads 1"),
        ({"bias": "strong"}, "bias='strong' is not valid"),
        ({"bias": math.nan}, "bias=nan is not valid"),
        ({"bias": True}, "bias=True is not valid"),
        ({"biases": [{"rate": 0.1}]}, "biases=.* is not valid"),
        ({"tracking": None}, "tracking=None is not valid"),
        ({"delta": ...}, "delta is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "collab_config.json"
    if isinstance(text, dict):
        changed = config() | text
        text = json.dumps({key: value for key, value in changed.items() if value is not ...})
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        collab_config.read(path)


@pytest.fixture
def records(tmp_path):
    """A file of 1,000 records; what is called by margin, the device gets wrong."""
    margins, answered = draw(np.random.default_rng(8), 1000)
    columns = dict(
        id=[f"p{i}" for i in range(1000)],
        margin=margins.astype(float),
        ended=answered,
        formatted=np.ones(1000, bool),
        local_correct=(margins < 0) & answered,
        cloud_correct=np.ones(1000, bool),
        cloud_known=np.arange(1000) % 50 > 0,
    )

    def save(drop=(), **changed):
        kept = {name: column for name, column in (columns | changed).items() if name not in drop}
        path = tmp_path / "after.parquet"
        pq.write_table(pa.table(kept), path)
        return str(path)

    return save


@pytest.mark.parametrize(
    "flags, promise",
    [
        (
            ["--rate", "0.3"],
            "promised: call rate at most 30.0% on prompts like these, on average over calibration",
        ),
        (
            ["--rate", "0.3", "--delta", "0.05"],
            "promised: call rate at most 30.0% .* with probability 95.0%",
        ),
        (["--accuracy", "0.9"], "promised: nothing beyond these prompts"),
        (
            ["--accuracy", "0.9", "--delta", "0.1"],
            "promised: overall accuracy at least 90.0% .* with probability 90.0%",
        ),
    ],
)
def test_command_line(records, tmp_path, capsys, flags, promise):
    assert (
        calibrate.main(
            ["--records", records(), *flags, "--decision_token", "<u>", "--out", str(tmp_path)]
        )
        == 0
    )
    chosen, promised = capsys.readouterr().out.splitlines()
    assert chosen.startswith("bias ") and chosen.endswith(
        f"wrote {tmp_path / 'collab_config.json'}"
    )
    assert re.match(promise, promised)
    c = collab_config.read(tmp_path)
    assert c["decision_token"] == "<u>" and c["marker"] is None and f"{c['bias']:+.4f}" in chosen
    assert c["call_rate"]["expected"] <= (0.3 if "--rate" in flags else 0.4)
    assert (
        ("overall accuracy" in chosen)
        == (c["accuracy"]["measured"] is not None)
        == ("--accuracy" in flags)
    )


def test_what_is_held_out_checks_the_bias_and_does_not_make_it(records, tmp_path, capsys):
    flags = ["--rate", "0.3", "--out", str(tmp_path)]
    assert calibrate.main(["--records", records(), *flags, "--hold_out", "0.4"]) == 0
    out = capsys.readouterr().out
    table = pq.read_table(tmp_path / "after.parquet").to_pydict()
    margins, answered = (
        np.array(table["margin"]),
        np.array(table["ended"]) & np.array(table["formatted"]),
    )
    kept, rest = np.split(np.random.default_rng(0).permutation(1000), [600])
    first = bias_for_rate(margins[kept], answered[kept], 0.3)
    sent = (margins[rest] + first.bias > 0) | ~answered[rest]
    cloud, local = np.array(table["cloud_correct"]), np.array(table["local_correct"])
    right = np.where(sent, cloud[rest], local[rest])[np.array(table["cloud_known"])[rest]]
    assert collab_config.read(tmp_path)["bias"] == first.bias and first.n == 600
    assert f"on the 400 prompts held out: call rate {100 * sent.mean():.1f} (" in out
    assert f"overall accuracy {100 * right.mean():.1f} (" in out
    rates = []
    for seed in range(200):
        kept, rest = np.split(np.random.default_rng(seed).permutation(1000), [600])
        bias = bias_for_rate(margins[kept], answered[kept], 0.3).bias
        rates.append(((margins[rest] + bias > 0) | ~answered[rest]).mean())
    low, high = np.quantile(rates, (0.025, 0.975))
    assert f"call rate {np.mean(rates):.1%} on average, {low:.1%} to {high:.1%} in 95 %" in out
    for share, says in (
        ("1", "in \\[0, 1\\)"),
        ("0.9999", "leaves 0 to calibrate on"),
        ("0.0001", "and 0 to check"),
    ):
        with pytest.raises(UserError, match=says):
            calibrate.main(["--records", records(), *flags, "--hold_out", share])


def test_a_shift_to_one_stratum_is_told(records, tmp_path, capsys):
    """Margins of the hard ones lie 10 higher: the bias calls all of these, tracking 30 %."""
    hard = np.arange(1000) % 2 == 1
    margins = np.random.default_rng(4).normal(size=1000) + 10 * hard
    path = records(margin=margins, ended=[True] * 1000, stratum=np.where(hard, "hard", "easy"))
    flags = ["--rate", "0.4", "--hold_out", "0.5", "--out", str(tmp_path)]
    assert calibrate.main(["--records", path, *flags]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    easy, hard = re.findall(r"(?:easy|hard) ([\d.]+)%, ([\d.]+)%", told)
    assert float(easy[0]) == 0 and float(hard[0]) > 60
    assert 37 < float(easy[1]) < 40 < float(hard[1]) < 43
    assert calibrate.main(["--records", records(stratum=["one"] * 1000), *flags]) == 0
    assert "of one stratum" not in capsys.readouterr().out


def test_command_line_by_margin_alone(records, tmp_path):
    path = records(ended=np.arange(1000) % 5 > 0)  # one in five is cut off, whatever its margin
    arguments = ["--records", path, "--rate", "0.1", "--out", str(tmp_path / "low.json")]
    with pytest.raises(
        UserError, match="200 of 1000 .* have no answer .* 20.1% is the lowest; .* --margin_only"
    ):
        calibrate.main(arguments)
    assert calibrate.main([*arguments, "--margin_only"]) == 0
    c = collab_config.read(tmp_path / "low.json")
    assert c["call_unanswered"] is False and c["call_rate"]["expected"] == pytest.approx(
        0.1, abs=0.002
    )


def test_an_accuracy_is_over_the_prompts_whose_cloud_verdict_is_known(records, tmp_path):
    flags = ["--accuracy", "0.9", "--out", str(tmp_path)]
    known = np.arange(1000) % 50 > 0
    right = np.ones(1000, bool)
    biases = []
    for cloud in (right, right & known):  # what stands beside "not known" is no verdict
        assert calibrate.main(["--records", records(cloud_correct=cloud), *flags]) == 0
        biases.append(collab_config.read(tmp_path)["bias"])
        assert collab_config.read(tmp_path)["prompts"] == 980
    assert biases[0] == biases[1]
    all_known = records(cloud_correct=right & known, cloud_known=right)
    assert calibrate.main(["--records", all_known, *flags]) == 0
    assert collab_config.read(tmp_path)["bias"] > biases[0]  # more calls for as much


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(drop=["margin", "ended"]), "calibration: the records have no column margin"),
        (dict(margin=[None, *np.zeros(999)]), "margin is not a number in 1 of 1000 rows"),
        (dict(ended=[None, *[True] * 999]), "ended is not true or false"),
        (dict(id=["p0"] * 1000), "repeat an id"),
    ],
)
def test_bad_records_are_refused(records, tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        calibrate.main(["--records", records(**changed), "--rate", "0.3", "--out", str(tmp_path)])


def test_what_is_no_parquet_file_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    for name in ("a.parquet", "absent.parquet"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            calibrate.main(
                ["--records", str(tmp_path / name), "--rate", "0.3", "--out", str(tmp_path)]
            )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        collab_config.write(tmp_path / "file", config())


# --- rows that are of one problem


def test_of_rows_of_one_problem_one_is_used(capsys):
    ids = np.array([f"{problem}@{share} %" for problem in "abc" for share in (10, 20)])
    table = {"id": ids, "shown_budget": np.tile([0.1, 0.2], 3), "margin": np.arange(6.0)}
    used = calibrate.one_row_a_problem(table)
    assert [key[0] for key in used["id"]] == list("abc")
    assert ids[used["margin"].astype(int)].tolist() == used["id"].tolist()
    assert "6 rows are of 3 problems" in capsys.readouterr().out
    samples = {"id": np.array(["a#1", "a#2", "b#1", "b#2"]), "margin": np.arange(4.0)}
    assert [key[0] for key in calibrate.one_row_a_problem(samples)["id"]] == ["a", "b"]


@pytest.mark.parametrize("ids", [["a", "b"], ["a@1", "a@2"], ["a#1", "b"]])
def test_other_ids_are_each_a_problem(ids):
    table = {"id": np.array(ids), "margin": np.arange(2.0)}
    assert calibrate.one_row_a_problem(table) is table
