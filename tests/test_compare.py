"""Every measure by hand numbers on five prompts, and its symmetries on random ones."""

import numpy as np
import pytest

from collab_jax import compare

T, F = True, False


def records(n=None, seed=0, **columns):
    """Records with the columns the measures read; five hand-made prompts, or n random ones."""
    if n is None:
        base = dict(
            local_correct=[T, F, F, T, F],
            cloud_correct=[T, T, F, F, T],
            margin=[-3.0, 2.0, 1.0, -1.0, -2.0],
            logp=[-0.1, -5.0, -0.2, -0.3, -4.0],
            ended=[T, T, T, T, F],
        )
    else:
        rng = np.random.default_rng(seed)
        base = dict(
            local_correct=rng.random(n) < 0.5,
            cloud_correct=rng.random(n) < 0.9,
            margin=rng.normal(size=n),
            logp=-rng.exponential(size=n),
            ended=rng.random(n) < 0.95,
        )
    size = len(base["margin"])
    base |= dict(
        id=[f"p{i}" for i in range(size)], prompt=[f"q{i}" for i in range(size)], cloud_known=[T] * size, stratum=["a"] * size, formatted=base["ended"], tokens=[10] * size, natural_tokens=[5] * size,
        natural_called=[T] * 2 + [F] * (size - 2), natural_completed=[T] + [F] * (size - 1),
        natural_correct=base["local_correct"], natural_ended=base["ended"],
    )  # fmt: skip
    return {name: np.array(column) for name, column in (base | columns).items()}


def test_replay_by_hand():
    r = records()
    margin = compare.margin_score(r)
    assert margin.argmax() == 4  # cut off: first for the cloud
    assert compare.replay(r, margin, 0.0).tolist() == [T, F, F, T, F]
    assert compare.replay(r, margin, 0.2).tolist() == [T, F, F, T, T]
    assert compare.replay(r, margin, 0.4).tolist() == [T, T, F, T, T]
    assert compare.replay(r, margin, 0.8).tolist() == [T, T, F, F, T]
    assert compare.replay(r, margin, 1.0).tolist() == r["cloud_correct"].tolist()
    assert compare.replay(r, margin, 0.39).sum() == compare.replay(r, margin, 0.2).sum()  # never above the budget


def test_perfect_router_by_hand():
    r = records()
    assert [compare.replay(r, compare.oracle_score(r), b).sum() for b in (0, 0.2, 0.4, 0.8, 1.0)] == [2, 3, 4, 4, 3]


def test_no_router_beats_the_perfect_one():
    r = records(n=500)
    for b in (0.1, 0.3, 0.7):
        at = compare.at_budget(r, b)
        assert at["oracle"]["value"] >= max(at[name]["value"] for name in ("margin", "logprob", "random"))


def test_random_is_the_mean_over_all_draws():
    r = records(n=60)
    rng = np.random.default_rng(0)
    drawn = np.mean([compare.replay(r, rng.random(60), 0.3).mean() for _ in range(4000)])
    assert abs(compare.random_outcomes(r, 0.3).mean() - drawn) < 0.005


def test_rate_is_wilsons_interval():
    got = compare.rate(np.array([T] * 8 + [F] * 2))
    assert got["value"] == 0.8
    assert got["low"] == pytest.approx(0.4902, abs=1e-4) and got["high"] == pytest.approx(0.9433, abs=1e-4)
    assert compare.rate(np.zeros(10, bool))["low"] == 0


def test_paired_interval_by_hand():
    got = compare.mean(np.array([1.0, 0.0, 0.0, 1.0]))  # sd 0.57735, half width 1.96 * 0.57735 / 2
    assert got["value"] == 0.5 and got["high"] - 0.5 == pytest.approx(0.56579, abs=1e-4)


def test_auc_by_hand_and_by_symmetry():
    r = records()
    assert compare.auc(r, r["margin"]) == pytest.approx(5 / 6)  # wrong: 2, 1, -2; right: -3, -1: five of six pairs
    assert compare.auc(r, -r["margin"]) == pytest.approx(1 / 6)
    assert compare.auc(r, np.zeros(5)) == 0.5
    assert compare.auc(records(local_correct=[T] * 5), np.zeros(5)) is None


def test_summary_by_hand():
    s = compare.summary(records())
    assert s["n"] == 5 and s["local_accuracy"]["value"] == 0.4 and s["cloud_accuracy"]["value"] == 0.6
    natural = s["natural"]  # prompts 0 and 1 called (both right in the cloud), 4 was cut off
    assert natural["call_rate"]["value"] == 0.4 and natural["local_share"]["value"] == 0.4
    assert natural["overall_accuracy"]["value"] == 0.6 and natural["local_correct"]["value"] == 0.2
    assert natural["marker_completed"] == 0.5
    assert set(s["at_budget"]) == {"0.1", "0.2", "0.3"} and s["device_tokens"] == {"local": 10.0, "natural": 5.0}


def test_gains_are_paired_and_refuse_other_prompts():
    before, after = records(), records(local_correct=[T, T, F, T, F])
    assert compare.gains(before, after)["local_accuracy"]["value"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="different prompts"):
        compare.gains(before, records(n=5) | {"id": np.array(list("abcde"))})


def test_frontier_ends_at_the_device_and_at_the_cloud():
    r = records(n=200)
    for name in ("margin", "logprob", "random", "oracle"):
        x, y = compare.frontier(r, name)
        assert (x[0], x[-1]) == (0, 1)
        assert y[0] == r["local_correct"].mean() and y[-1] == r["cloud_correct"].mean()


def test_examples_to_show_are_what_they_say():
    r = records()
    shown = dict(compare.examples_to_show(r))
    assert shown["asked, though it would have solved it"] == 0 and shown["rightly asked the cloud"] == 1
    assert shown["solved on the device"] == 3 and shown["stayed, and was wrong"] == 2


def test_routers_order_what_has_no_answer_among_themselves():
    r = records(n=300)
    first = compare.no_answer(r)
    assert 0 < first.sum() < 300
    for score in (compare.margin_score(r), compare.logprob_score(r)):
        assert score[first].min() > score[~first].max() and len(np.unique(score[first])) == first.sum()


def test_random_lies_between_the_device_and_the_cloud():
    r = records(n=500)
    ends = sorted([r["local_correct"].mean(), r["cloud_correct"].mean()])
    assert ends[0] < compare.at_budget(r, 0.3)["random"]["value"] < ends[1]
