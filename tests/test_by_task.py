"""A mix under one budget by hand numbers, symmetries, and against all ways to divide the calls."""

import itertools

import numpy as np
import pytest
from fakes import F, T
from fakes import make_table as make

from collab_jax.records import Records
from collab_jax.reports import by_task as pages
from collab_jax.reports import summary
from collab_jax.routing import by_task, routers


def two_tasks(**columns) -> Records:
    """Eight prompts: the margins of all of a are above those of b, where the cloud is needed."""
    base = dict(
        task=["a"] * 4 + ["b"] * 4,
        local_correct=[F, T, T, T, F, F, F, T],
        cloud_correct=[T, T, T, F, T, T, F, T],
        margin=[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        logp=[-1.0] * 8,
        ended=[T] * 8,
        natural_called=[T, F, F, F, T, T, F, F],
    )
    base |= columns
    base |= {"formatted": base["ended"], "natural_correct": base["local_correct"]}
    return make(8, **base)


def drawn(n: int, seed: int, shift: float) -> Records:
    """n prompts of two tasks, alike but for a `shift` of b's margins; a margin says how hard it is.

    Margins are multiples of 1/1024, so that a whole shift changes no difference of two.
    """
    rng = np.random.default_rng(seed)
    hard = np.round(rng.normal(size=n) * 1024) / 1024
    is_b = rng.random(n) < 0.5
    return make(
        n,
        seed,
        task=np.where(is_b, "b", "a"),
        margin=hard + shift * is_b,
        local_correct=rng.random(n) < 1 / (1 + np.exp(2 * hard)),
        cloud_correct=rng.random(n) < 0.95,
    )


def value(rate):
    return rate["value"]


def test_one_bias_divides_the_calls_by_hand():
    table = two_tasks()
    score = routers.score("margin", table)
    quarter = by_task.division(table, score, 0.25)  # the two highest margins, both of a
    assert [value(quarter[t]["share_of_calls"]) for t in "ab"] == [1.0, 0.0]
    assert [value(quarter[t]["call_rate"]) for t in "ab"] == [0.5, 0.0]
    assert [value(quarter[t]["accuracy"]) for t in "ab"] == [1.0, 0.25]
    most = by_task.division(table, score, 0.75)  # all of a, whose last call harms, and 4, 5
    assert value(most["a"]["share_of_calls"]) == pytest.approx(2 / 3)
    assert [value(most[t]["call_rate"]) for t in "ab"] == [1.0, 0.5]
    assert [value(most[t]["accuracy"]) for t in "ab"] == [0.75, 0.75]
    none = by_task.division(table, score, 0.1)  # a budget of less than a prompt
    assert none["a"]["share_of_calls"] == {"value": None, "low": None, "high": None}
    assert value(none["a"]["call_rate"]) == 0 and value(none["a"]["accuracy"]) == 0.75


def test_where_answers_have_grades_accuracies_are_their_means():
    grades = dict(
        local_grade=[0.4, 0.6, 0.8, 1.0, 0.0, 0.2, 0.4, 0.6],
        cloud_grade=[1.0, 0.9, 0.8, 0.3, 1.0, 0.7, 0.1, 1.0],
    )
    table = two_tasks(**grades)
    quarter = by_task.division(table, routers.score("margin", table), 0.25)
    assert [value(quarter[t]["call_rate"]) for t in "ab"] == [0.5, 0.0]
    assert value(quarter["a"]["accuracy"]) == pytest.approx((1.0 + 0.9 + 0.8 + 1.0) / 4)
    assert value(quarter["b"]["accuracy"]) == pytest.approx(0.3)
    low, high = by_task.thresholds(
        table["margin"], table["cloud_grade"] - table["local_grade"], np.repeat([0, 1], 4), 2, 2
    )
    # 0.6 and 0.3 are gained by the first of each task's calls, as 1.0 is by b's first, at 4.
    assert (table["margin"][:4] > low).sum() == 1 and (table["margin"][4:] > high).sum() == 1


def test_the_parts_add_up_and_grow_with_the_budget():
    table = drawn(300, 1, shift=1.0)
    sizes = {t: (table["task"] == t).sum() for t in "ab"}
    before = dict.fromkeys("ab", 0.0)
    for budget in (0.1, 0.2, 0.3, 0.5):
        at = by_task.at_budget(table, budget)
        for way in ("one_bias", "own_biases"):
            of = at[way]["tasks"]
            assert sum(value(of[t]["share_of_calls"]) for t in "ab") == pytest.approx(1)
            called = sum(value(of[t]["call_rate"]) * sizes[t] for t in "ab")
            assert called == pytest.approx(300 * budget)
            right = sum(value(of[t]["accuracy"]) * sizes[t] for t in "ab") / 300
            assert value(at[way]["accuracy"]) == pytest.approx(right)
        for t in "ab":
            rate = value(at["one_bias"]["tasks"][t]["call_rate"])
            assert rate >= before[t]
            before[t] = rate


def test_thresholds_send_most_gain_by_hand():
    table = two_tasks()
    gain = table["cloud_correct"].astype(int) - table["local_correct"]
    score, task = table["margin"], np.repeat([0, 1], 4)
    # The first of a and the first two of b gain, nothing else does.
    assert by_task.thresholds(score, gain, task, 3, 2).tolist() == [7.5, 2.5]
    # Which of them, they do not say: the highest margin does, and then those below it.
    assert by_task.thresholds(score, gain, task, 1, 2).tolist() == [7.5, 4.0]
    # A task that is not among the prompts has the threshold of one bias.
    assert by_task.thresholds(score, gain, 2 * task, 3, 3).tolist() == [7.5, 5.5, 2.5]
    # The fourth call: of b 2 gains nothing, of a 7 neither, and 7 is higher.
    assert by_task.thresholds(score, gain, task, 4, 2).tolist() == [6.5, 2.5]


@pytest.mark.parametrize("seed", range(5))
def test_no_division_of_the_calls_gains_more_where_the_regression_has_a_step(seed):
    rng = np.random.default_rng(seed)
    task, score = np.repeat([0, 1, 2], 6), rng.permutation(18).astype(float)
    gain = rng.integers(-1, 2, 18)
    by_score = [np.flatnonzero(task == t)[np.argsort(-score[task == t])] for t in range(3)]

    def gained(counts):
        return sum(gain[rows[:k]].sum() for rows, k in zip(by_score, counts, strict=True))

    found = {}
    for count in range(19):
        sent = score > by_task.thresholds(score, gain, task, count, 3)[task]
        assert sent.sum() == count
        found[count] = gain[sent].sum()
    best = dict.fromkeys(range(19), -99)
    for counts in itertools.product(range(7), repeat=3):
        best[sum(counts)] = max(best[sum(counts)], gained(counts))
    assert all(found[count] <= best[count] for count in found)
    # At the corners of the best curve's concave hull nothing better is left.
    corners = [
        k
        for k in range(1, 18)
        if all(
            (best[k] - best[i]) * (j - k) > (best[j] - best[k]) * (k - i)
            for i in range(k)
            for j in range(k + 1, 19)
        )
    ]
    assert corners and all(found[k] == best[k] for k in corners)


def test_tasks_that_are_alike_gain_nothing_by_a_bias_for_each():
    gains = [by_task.at_budget(drawn(600, seed, shift=0.0), 0.3)["gain"] for seed in range(5)]
    assert -0.02 < np.mean([value(g) for g in gains]) < 0.003  # noise chooses, and costs a little
    assert sum(g["low"] <= 0 <= g["high"] for g in gains) >= 4


def test_a_shift_of_one_tasks_margins_harms_one_bias_and_not_a_bias_for_each():
    alike, shifted = (by_task.at_budget(drawn(600, 3, shift), 0.3) for shift in (0.0, 8.0))
    assert shifted["own_biases"] == alike["own_biases"]
    one = shifted["one_bias"]["tasks"]
    assert value(one["b"]["share_of_calls"]) > 0.85 and value(one["a"]["call_rate"]) < 0.1
    assert shifted["gain"]["low"] > 0


def test_no_prompt_chooses_its_own_bias_and_the_order_of_rows_does_not_count():
    table = drawn(200, 5, shift=1.0)
    own = by_task.own_bias_score(table, 0.3)
    half = by_task.halves(table["id"], (table["task"] == "b").astype(int))
    for t in "ab":
        sizes = np.bincount(half[table["task"] == t])
        assert abs(sizes[0] - sizes[1]) <= 1
    other_verdicts = np.where(half == 0, ~table["local_correct"], table["local_correct"])
    changed = by_task.own_bias_score(table | {"local_correct": other_verdicts}, 0.3)
    assert (changed[half == 0] == own[half == 0]).all() and (changed != own).any()
    order = np.random.default_rng(0).permutation(200)
    mixed = {name: column[order] for name, column in table.items()}
    assert (by_task.own_bias_score(mixed, 0.3) == own[order]).all()


def test_responses_without_an_answer_are_sent_first_whatever_the_bias():
    table = drawn(200, 6, shift=4.0)
    lost = ~table["ended"]
    own = by_task.own_bias_score(table, 0.3)
    assert lost.any() and own[lost].min() > own[~lost].max()
    below = lost.mean() - 0.01  # a budget that they use up: a bias moves nothing
    assert by_task.at_budget(table, below)["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_odd_tables_have_figures():
    alone = two_tasks(task=["a"] * 7 + ["b"], margin=[-np.inf] * 8)
    at = by_task.at_budget(alone, 0.5)
    assert value(at["gain"]) is not None and value(at["one_bias"]["tasks"]["b"]["call_rate"]) == 0.5
    cut_off = by_task.at_budget(two_tasks(ended=[F] * 8), 0.5)
    assert value(cut_off["gain"]) == 0


# ---- in reports


def test_results_by_task_by_hand_in_the_summary():
    s = summary.summary(two_tasks())["by_task"]
    a, b = s["tasks"]["a"], s["tasks"]["b"]
    assert (a["n"], value(a["local_accuracy"]), value(a["call_rate"])) == (4, 0.75, 0.25)
    # natural: a calls at 0 and is right there, the cloud is not asked elsewhere
    assert value(a["overall_accuracy"]) == 1.0 and value(b["overall_accuracy"]) == 0.75
    assert (value(b["local_accuracy"]), value(b["call_rate"])) == (0.25, 0.5)
    assert set(s["at_budget"]) == {"0.1", "0.2", "0.3"}
    at = summary.summary(two_tasks())["at_budget"]["0.3"]
    assert s["at_budget"]["0.3"]["one_bias"]["accuracy"] == at["margin"]
    assert summary.summary(make())["by_task"] is None


def test_a_task_whose_cloud_verdicts_are_all_unknown_has_its_own_figures():
    table = two_tasks(cloud_known=[T] * 4 + [F] * 4, cloud_correct=[T, T, T, F] + [F] * 4)
    s = summary.summary(table)["by_task"]
    assert s["tasks"]["b"]["overall_accuracy"] is None and s["tasks"]["b"]["n"] == 4
    assert list(s["at_budget"]["0.3"]["one_bias"]["tasks"]) == ["a"]
    text = pages.section({"by_task": s})
    assert "| b " in text and "No verdict of the cloud is known on b: " in text
    assert "No verdict" not in pages.section(summary.summary(two_tasks()))


def test_the_section_shows_each_task_at_each_budget():
    figures = summary.summary(drawn(200, 2, shift=1.0))
    text = pages.section(figures)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == (1 + 2) + (1 + 6) + (1 + 3)
    at = figures["by_task"]["at_budget"]["0.2"]
    (row,) = [row for row in rows if row.startswith("| 20%") and "| b " in row]
    assert f"{100 * value(at['one_bias']['tasks']['b']['share_of_calls']):.1f} (" in row
    assert f"{100 * value(at['gain']):+.1f} (" in text
    assert pages.section(summary.summary(make())) == ""
