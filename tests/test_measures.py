"""Every measure by hand numbers on a few prompts, its symmetries, and the bootstrap against a slow
one.
"""

import itertools

import numpy as np
import pytest
from scipy import stats

from collab_jax import records as tables
from collab_jax.routing import curves, measures
from collab_jax.runtime.errors import UserError

T, F = True, False
LOCAL, CLOUD = [T, F, F, T, F], [T, T, F, F, T]  # kept, rescued, lost, harmed, rescued where sent
SCORE = np.array([-3.0, 2.0, 1.0, -1.0, 5.0])  # order: rows 4, 1, 2, 3, 0


def records(local=LOCAL, cloud=CLOUD, **columns):
    base = dict(id=[f"p{i}" for i in range(len(local))], local_correct=local, cloud_correct=cloud)
    return tables.check(base | columns, "here")


def random_records(n, seed=0, device=0.5, cloud=0.9):
    """n prompts and a noisy score of 'the device is wrong' with some equal values."""
    rng = np.random.default_rng(seed)
    r = records(rng.random(n) < device, rng.random(n) < cloud)
    return r, np.round(rng.normal(size=n) - r["local_correct"], 1)


def curve(r, score, **kwargs):
    f = curves.frontiers({"x": [(r, score)]}, resamples=1, **kwargs)
    return f.rates, f.accuracy["x"][0]


# ---- rates


def test_rate_is_wilsons_interval():
    got = measures.rate(np.array([T] * 8 + [F] * 2))
    assert got == pytest.approx({"value": 0.8, "low": 0.4902, "high": 0.9433}, abs=1e-4)
    assert measures.rate(np.zeros(10, bool))["low"] == 0


# ---- one budget


@pytest.mark.parametrize(
    "budget, right", [(0, 2), (0.2, 3), (0.39, 3), (0.4, 4), (0.6, 4), (0.8, 3), (1, 3)]
)
def test_replay_by_hand(budget, right):
    assert measures.replay(records(), SCORE, budget).sum() == right


def test_a_budget_is_never_passed():
    assert measures.calls([0.29, 0.299, 1], 100).tolist() == [
        29,
        29,
        100,
    ]  # 0.29 * 100 is below 29 in floating point
    assert measures.calls(0.3, 9) == 2


def test_equal_scores_are_sent_as_in_the_mean_over_all_orders():
    score = np.array([1.0, 2.0, 1.0, 0.0, 1.0])
    for budget in (0.2, 0.4, 0.6, 0.8):
        hard = np.zeros(5)
        for order in map(list, itertools.permutations(range(5))):
            hard[
                np.array(order)[
                    np.argsort(-score[order], kind="stable")[: measures.calls(budget, 5)]
                ]
            ] += 1 / 120
        assert measures.sent(score, budget) == pytest.approx(hard)


def test_a_constant_score_is_random_in_closed_form():
    r, _ = random_records(70)
    rates, y = curve(r, np.zeros(70))
    assert y == pytest.approx(
        (1 - rates) * r["local_correct"].mean() + rates * r["cloud_correct"].mean(), abs=1e-12
    )
    assert y == pytest.approx(curves.random_frontier(rates, y), abs=1e-12)


def test_the_perfect_router_in_closed_form_and_never_beaten():
    r, score = random_records(300)
    rates, best = curve(r, measures.perfect_score(r))
    local, cloud = r["local_correct"], r["cloud_correct"]
    gain, loss = (~local & cloud).sum(), (local & ~cloud).sum()
    sent = np.round(rates * 300)
    closed = local.sum() + np.minimum(sent, gain) - np.maximum(0, sent - (300 - loss))
    assert best * 300 == pytest.approx(closed)
    for other in (score, -score, np.zeros(300)):
        assert (best >= curve(r, other)[1] - 1e-12).all()


def test_sent_counts_by_hand_and_their_balance():
    r = records()
    assert measures.sent_counts(r, SCORE, 0.8) == {
        "sent": 4,
        "rescued": 2,
        "harmed": 1,
        "missed": 0,
    }
    assert measures.sent_counts(r, np.zeros(5), 0.2) == pytest.approx(
        {"sent": 1, "rescued": 0.4, "harmed": 0.2, "missed": 1.6}
    )
    r, score = random_records(200)
    c = measures.sent_counts(r, score, 0.3)
    assert measures.replay(r, score, 0.3).sum() == pytest.approx(
        r["local_correct"].sum() + c["rescued"] - c["harmed"]
    )


# ---- AUC


def test_auc_by_hand_and_by_symmetry():
    r = records()
    score = np.array(
        [-3.0, 2.0, 1.0, -1.0, -2.0]
    )  # wrong: 2, 1, -2; right: -3, -1: five of six pairs
    assert measures.auc(r, score) == pytest.approx(5 / 6)
    assert measures.auc(r, -score) == pytest.approx(1 / 6)
    assert measures.auc(r, np.zeros(5)) == 0.5


def test_auc_within_strata_sees_through_a_router_that_reads_the_stratum():
    r = records(
        [T, T, F, T, F, F, F, F], [T] * 8, stratum=["easy"] * 3 + ["hard"] * 3 + ["none"] * 2
    )
    surface = (r["stratum"] != "easy").astype(float)
    assert measures.auc(r, surface) > 0.5
    assert measures.auc_by_stratum(r, surface) == {"easy": 0.5, "hard": 0.5, "none": None}
    assert measures.auc_by_stratum(r, np.arange(8)) == {"easy": 1.0, "hard": 1.0, "none": None}


# ---- figures of a frontier


def test_routellm_figures_by_hand():
    r = records([F, F, F, F, T], [T] * 5)
    rates, y = curve(
        r, np.array([5.0, 4, 3, 2, 1])
    )  # 0.2, 0.4, 0.6, 0.8, 1, 1 at 0, 0.2, ..., 1 calls
    assert curves.pgr(y)[[0, 20, 40, 60, 80, 100]] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert curves.apgr(rates, y) == pytest.approx(0.2 * (0.25 + 0.5 + 0.75 + 1 + 0.5))
    assert curves.area(rates, y) == pytest.approx(0.2 * (0.1 + 0.4 + 0.6 + 0.8 + 1 + 0.5))
    assert [curves.cpt(rates, y, x) for x in (0.5, 0.8, 1)] == pytest.approx(
        [0.4, 0.6 + 0.2 * 0.05 / 0.25, 0.8]
    )


def test_random_has_its_textbook_figures():
    rates, y = curve(random_records(1000)[0], np.zeros(1000))
    figures = [curves.apgr(rates, y), curves.cpt(rates, y, 0.5), curves.cpt(rates, y, 0.8)]
    assert figures == pytest.approx([0.5, 0.5, 0.8])


def test_the_hull_is_a_running_maximum():
    r = records([T, F, F, T], [F, T, T, T])  # 0.5, 0.25, 0.5, 0.75, 0.75: the first call harms
    rates, y = curve(r, np.array([4.0, 3, 2, 1]))
    at = [0, 25, 50, 75, 100]
    assert curves.pgr(y)[at].tolist() == [0, -1, 0, 1, 1]
    assert curves.hull(curves.pgr(y))[at].tolist() == [0, 0, 0, 1, 1]
    assert curves.apgr(rates, y) == pytest.approx(0.25 * (1 + 0.5))
    assert curves.cpt(rates, y, 0.5) == pytest.approx(0.5 + 0.25 * 0.5)


def test_figures_work_over_leading_axes():
    frontiers = [curve(*random_records(100, seed)) for seed in range(4)]
    rates, y = frontiers[0][0], np.array([y for _, y in frontiers]).reshape(2, 2, -1)
    for figure in (curves.apgr, curves.area, lambda x, a: curves.cpt(x, a, 0.5)):
        assert figure(rates, y).ravel() == pytest.approx(
            [float(figure(rates, y)) for _, y in frontiers]
        )


def test_without_a_gap_there_is_nothing_to_recover():
    r = records([T, T, F, F], [T, F, F, T])
    rates, y = curve(r, np.arange(4.0))
    assert np.isnan(curves.pgr(y)).all() and np.isnan(curves.cpt(rates, y, 0.5))
    assert np.isnan(curves.apgr(rates, y)) and not np.isnan(curves.area(rates, y))
    assert curves.estimate(np.full(11, np.nan)) == {"value": None, "low": None, "high": None}


def test_the_reachable_router_by_hand():
    """Six prompts in two strata; the cloud is right on two in the one, on one in the other."""
    r = records([F, F, T, F, T, F], [T, F, T, F, T, F])
    r["stratum"] = np.array(["a", "a", "a", "b", "b", "b"], object)
    score = measures.reachable_score(r)
    assert score == pytest.approx([2 / 3, 2 / 3, -1 / 3, 1 / 3, -2 / 3, 1 / 3])
    rates, y = curve(r, score)
    at = lambda calls: y[np.flatnonzero(np.isclose(rates, calls / 6))[0]]  # noqa: E731
    # Of two equal prompts one is rescued; then nothing is, in the other stratum.
    assert [at(i) for i in range(5)] == pytest.approx([2 / 6, 2.5 / 6, 3 / 6, 3 / 6, 3 / 6])


def test_without_strata_the_reachable_router_knows_one_share_and_nothing_beats_it():
    r, score = random_records(300)
    r["stratum"] = np.full(300, "", object)
    rates, best = curve(r, measures.reachable_score(r))
    wrong, cloud = 1 - r["local_correct"].mean(), r["cloud_correct"].mean()
    until = rates <= wrong
    lost = r["cloud_correct"][~r["local_correct"]].mean()  # of what it sends, what is rescued
    assert best[until] == pytest.approx(r["local_correct"].mean() + lost * rates[until])
    assert cloud == pytest.approx(best[-1])


def test_gain_share_by_hand():
    r = records()
    rates, y = curve(r, SCORE)
    share = curves.gain_share(rates, y, curve(r, measures.perfect_score(r))[1])
    assert share[[20, 40]] == pytest.approx([1, 1])
    bad = curves.gain_share(rates, curve(r, -SCORE)[1], curve(r, measures.perfect_score(r))[1])
    assert bad[40] == pytest.approx((0.2 - 0.48) / (0.8 - 0.48))  # sends rows 0 and 3
    assert np.isnan(share[0]) and np.isnan(share[100])


# ---- symmetries


@pytest.mark.parametrize(
    "transform",
    [lambda s: 3 * s - 7, np.exp, np.arctan, lambda s: np.where(s == s.max(), np.inf, s)],
)
def test_only_the_order_of_a_score_counts(transform):
    r, score = random_records(150)
    a, b = (curves.frontiers({"x": [(r, s)]}, resamples=20) for s in (score, transform(score)))
    assert np.array_equal(a.accuracy["x"], b.accuracy["x"])
    assert measures.auc(r, score) == measures.auc(r, transform(score))


def test_the_order_of_rows_changes_no_figure():
    r, score = random_records(150)
    order = np.random.default_rng(1).permutation(150)
    shuffled = {name: column[order] for name, column in r.items()}
    assert curve(shuffled, score[order])[1] == pytest.approx(curve(r, score)[1], abs=1e-12)


def test_every_row_twice_changes_no_figure():
    r, score = random_records(100)
    two = {name: np.concatenate([column, column]) for name, column in r.items()}
    twice = np.concatenate([score, score])
    (x, y), (xx, yy) = curve(r, score), curve(two, twice)
    assert yy == pytest.approx(y, abs=1e-12) and np.array_equal(x, xx)
    assert measures.auc(two, twice) == pytest.approx(measures.auc(r, score))
    counts = measures.sent_counts(r, score, 0.3)
    doubled = {name: 2 * count for name, count in counts.items()}
    assert measures.sent_counts(two, twice, 0.3) == pytest.approx(doubled)


def test_the_ends_are_the_device_and_the_cloud_and_the_middle_is_replay():
    r, score = random_records(130)
    f = curves.frontiers({"x": [(r, score)]}, budgets=[0.123, 0.5], resamples=1)
    assert f.budgets.tolist() == [0, 0.123, 0.5, 1] and f.rates.tolist() == [0, 15 / 130, 0.5, 1]
    expected = [measures.replay(r, score, b).mean() for b in f.budgets]
    assert f.accuracy["x"][0] == pytest.approx(expected)
    assert expected[0] == r["local_correct"].mean() and expected[-1] == r["cloud_correct"].mean()


# ---- bootstrap


def test_the_bootstrap_equals_a_naive_one_on_the_same_draws():
    one, two = random_records(30, 0), random_records(30, 1)
    methods = {"a": [one, two], "b": [one], "c": [two, (one[0], -one[1])]}
    f = curves.frontiers(methods, budgets=[0.1, 0.3, 0.77], resamples=25, seed=3)
    prompts, pairs = np.random.default_rng([3, 0]), np.random.default_rng([3, 2])
    for r in range(1, 26):
        rows = prompts.integers(30, size=30)
        noise = pairs.standard_normal(2)
        lean = (noise[0] - noise[1]) / 2 / pairs.chisquare(1) ** 0.5 / 2**0.5
        weights = [0.5 + lean, 0.5 - lean]
        for name, runs in methods.items():
            means = [
                [
                    measures.replay({k: c[rows] for k, c in table.items()}, score[rows], b).mean()
                    for b in f.budgets
                ]
                for table, score in runs
            ]
            expected = means[0] if len(runs) == 1 else np.array(weights) @ np.array(means)
            assert f.accuracy[name][r] == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    r, score = random_records(400, device=0.3)
    got = curves.estimate(curves.frontiers({"x": [(r, score)]}, resamples=2000).at("x", 0))
    p = r["local_correct"].mean()
    assert got["value"] == p
    assert got["high"] - got["low"] == pytest.approx(
        2 * 1.96 * (p * (1 - p) / 400) ** 0.5, rel=0.08
    )


@pytest.mark.parametrize("rights", [(T, F), (T, F, F), (T, T, F, F, F)])
def test_where_all_the_variance_is_between_seeds_the_interval_is_students(rights):
    runs = [(records([right] * 5, [T] * 5), np.zeros(5)) for right in rights]
    got = curves.estimate(curves.frontiers({"x": runs}, resamples=8000).at("x", 0))
    mean, S = np.mean(rights), len(rights)
    half = stats.t.ppf(0.975, S - 1) * np.std(rights, ddof=1) / S**0.5
    assert got["value"] == mean
    # The quantiles of 8,000 draws have an error of some 3 %, of Cauchy's, for two seeds, of 8 %.
    assert got["high"] - mean == pytest.approx(half, rel=0.25 if S == 2 else 0.1)
    assert mean - got["low"] == pytest.approx(half, rel=0.25 if S == 2 else 0.1)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_weights_of_seeds_leave_what_all_seeds_agree_on(size):
    draw = np.random.default_rng(0)
    assert [curves.seed_weights(draw, size).sum() for _ in range(9)] == pytest.approx([1.0] * 9)


def test_differences_are_paired():
    r, score = random_records(200)
    worse = score + np.random.default_rng(2).normal(size=200)
    f = curves.frontiers(
        {"a": [(r, score)], "b": [(r, worse)], "c": [(r, score.copy())]}, resamples=300
    )
    assert curves.estimate(f.at("a", 0.3) - f.at("c", 0.3)) == {"value": 0, "low": 0, "high": 0}
    width = lambda values: curves.estimate(values)["high"] - curves.estimate(values)["low"]  # noqa: E731
    assert width(f.at("a", 0.3) - f.at("b", 0.3)) < 0.9 * np.hypot(
        width(f.at("a", 0.3)), width(f.at("b", 0.3))
    )


def test_another_method_changes_no_interval_and_a_seed_repeats_them():
    a, b = random_records(60), random_records(60, 1)
    alone = curves.frontiers({"a": [a]}, resamples=30)
    together = curves.frontiers({"b": [b, b], "a": [a]}, resamples=30)
    assert np.array_equal(alone.accuracy["a"], together.accuracy["a"])
    other = curves.frontiers({"a": [a]}, resamples=30, seed=1).accuracy["a"]
    assert not np.array_equal(alone.accuracy["a"], other) and np.array_equal(
        alone.accuracy["a"][0], other[0]
    )


def test_estimate_by_hand_and_with_undefined_resamples():
    draws = np.arange(1.0, 1001)
    assert curves.estimate(np.append(7.0, draws)) == {"value": 7, "low": 25, "high": 975}
    draws[:20] = np.nan  # they count as below the lowest and as above the highest
    assert curves.estimate(np.append(7.0, draws)) == {"value": 7, "low": 25, "high": 995}
    draws[:30] = np.nan
    assert curves.estimate(np.append(7.0, draws)) == {"value": 7, "low": None, "high": None}


# ---- bad input


def refused(message, call, *args, **kwargs):
    with pytest.raises(UserError, match=message):
        call(*args, **kwargs)


def test_bad_input_is_refused_with_the_reason():
    r, holed = records(), np.array([1.0, np.nan, 2.0, np.nan, 0.0])
    refused(
        r"needs both classes: local_correct says right on all 5 prompts",
        measures.auc,
        records([T] * 5),
        SCORE,
    )
    refused(r"says wrong on all 5 prompts", measures.auc, records([F] * 5), SCORE)
    refused(r"NaN in 2 of 5 rows \(first: row 2\)", measures.auc, r, holed)
    refused(r"NaN in 2 of 5 rows", measures.replay, r, holed, 0.2)
    refused(r"the score of mine is NaN in 2 of 5 rows", curves.frontiers, {"mine": [(r, holed)]})
    refused(
        r"the score of mine has shape \(4,\): .* each of 5 prompts",
        curves.frontiers,
        {"mine": [(r, SCORE[:4])]},
    )
    refused(r"from 0 to 1: got 30", measures.replay, r, SCORE, 30)
    refused(r"from 0 to 1", curves.frontiers, {"x": [(r, SCORE)]}, budgets=[-0.1])
    refused(r"resamples=0", curves.frontiers, {"x": [(r, SCORE)]}, resamples=0)
    refused(r"nothing to compare", curves.frontiers, {})
    refused(r"nothing to compare", curves.frontiers, {"x": []})
    refused(r"above 0 and up to 1: got 80", curves.cpt, *curve(r, SCORE), 80)
    refused(
        r"not computed at a budget of 0.355",
        curves.frontiers({"x": [(r, SCORE)]}, resamples=1).at,
        "x",
        0.355,
    )


def test_other_prompts_are_refused():
    r = records()
    other = records(id=["p0", "p1", "p2", "p3", "q"])
    turned = {name: column[::-1] for name, column in r.items()}
    refused(
        r"b \(seed 1 of 1\) is not of the prompts of a, .* 2 ids in one of the two only; align",
        curves.frontiers,
        {"a": [(r, SCORE)], "b": [(other, SCORE)]},
    )
    refused(
        r"a \(seed 2 of 2\) is not .* or not in their order: 5 and 5 prompts, 0 ids",
        curves.frontiers,
        {"a": [(r, SCORE), (turned, SCORE)]},
    )
