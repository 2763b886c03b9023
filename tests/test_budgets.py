"""Prompts that show their budget: what they say, and that each budget has a control of its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax import gapg, records, train
from collab_jax.gapg import Rollout
from collab_jax.reports import summary
from collab_jax.rl import algorithms
from collab_jax.rl.signal import learning_signal
from collab_jax.runtime import metrics
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import make_task

LEVELS = (0.1, 0.3)
SHOWN = {
    "task__budgets": LEVELS,
    "task__prompt": "{budget}:{numbers}={target}",
    "algorithm__filter": "none",
    "algorithm__control": "dual_alpha_c",
    "algorithm__control_rate": 0.5,
    "prompt_length": 24,
}


def test_each_training_prompt_shows_one_and_each_test_problem_all(small):
    plain, task = make_task(small()), make_task(small(**SHOWN))
    asked = lambda example: task.prompt(example)[0]["content"]  # noqa: E731
    train_split, without = task.load("train"), plain.load("train")
    assert [e.id for e in train_split] == [e.id for e in without]
    assert [e.budget for e in train_split[:3]] == [0.1, 0.3, 0.1]
    assert asked(train_split[0]).startswith("10:") and asked(train_split[1]).startswith("30:")
    for split in ("validation", "test"):
        problems = plain.load(split)
        each = task.load(split)
        assert [e.id for e in each[:2]] == [f"{problems[0].id}@10", f"{problems[0].id}@30"]
        assert len({e.id for e in each}) == len(each) == 2 * len(problems)
        assert [asked(e).partition(":")[2] for e in each[::2]] == [
            plain.prompt(e)[0]["content"] for e in problems
        ]
        assert task.cloud_prompt(each[0]) == task.cloud_prompt(each[1])
    pairs = task.demonstrations(0)
    shown = [next(pairs)[0] for _ in range(4)]
    assert [asked(e).partition(":")[0] for e in shown] == ["10", "30", "10", "30"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task__prompt": "{numbers}={target}"}, "set both or neither"),
        ({"task__budgets": ()}, "set both or neither"),
        ({"task__budgets": (0.1, 1.0)}, "different shares"),
        ({"task__budgets": (0.1, 0.1)}, "different shares"),
        ({"algorithm__filter": "d1d2"}, "filter=d1d2 has the quota of one budget"),
    ],
)
def test_what_does_not_go_together(small, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        train.main(small(**(SHOWN | changes)), tmp_path)


# Two prompts of two responses. The first is right, and calls where the cloud is right; the second
# is wrong and well formed, and calls too.
CORRECT = jnp.array([[True, False], [False, False]])
CALLED = jnp.array([[False, True], [False, True]])


def batch(level):
    return Rollout(
        prompts=jnp.zeros((2, 3), jnp.int32),
        prompt_mask=jnp.ones((2, 3), bool),
        tokens=jnp.zeros((2, 2, 4), jnp.int32),
        logp=jnp.zeros((2, 2, 4)),
        mask=jnp.ones((2, 2, 4), bool),
        correct=CORRECT,
        called=CALLED,
        formatted=~CALLED,
        cloud_correct=jnp.array([True, True]),
        cloud_known=jnp.array([True, True]),
        level=None if level is None else jnp.array(level),
    )


def signal(level, alphas, shown, rate=0.5, price=None):
    params = {"w": jnp.zeros(2)}
    reward = gapg.init_reward(2.0, 0.5, 0.2, shown).replace(alphas=jnp.array(alphas))
    filter = gapg.init_filter(0.3, shown)
    if price is not None:
        filter = filter.replace(price=jnp.array(price))
    state = gapg.init_state(params, optax.sgd(1.0), reward, filter)
    algorithm = gapg.Algorithm(
        gapg.reward, gapg.advantage, algorithms.no_filter, algorithms.dual_alpha_c(rate, 0.0)
    )
    return learning_signal(algorithm, state, batch(level), jax.random.key(0))


def test_each_prompt_is_paid_and_each_control_moves_by_its_own_budget():
    found = signal([1, 0], [[2.0, 0.5, 0.2], [2.0, 1.0, 0.2]], LEVELS)
    # The first prompt shows 30 %, where a call earns 1.0, the second 10 %, where it earns 0.5.
    np.testing.assert_allclose(found.r, [[2.2, 1.0], [0.2, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(found.call_rates, [0.5, 0.5])
    # alpha_c moves by 0.5 (0.1 - 0.5) and 0.5 (0.3 - 0.5).
    np.testing.assert_allclose(found.reward.alphas[:, 1], [0.3, 0.9], rtol=1e-6)
    assert found.reward.counts.tolist() == [1, 0, 2, 1, 0]


def test_a_budget_without_a_prompt_in_the_batch_stays():
    found = signal([0, 0], [[2.0, 0.5, 0.2], [2.0, 1.0, 0.2]], LEVELS, rate=0.2)
    np.testing.assert_allclose(found.reward.alphas[:, 1], [0.5 + 0.2 * (0.1 - 0.5), 1.0])


def test_a_call_is_charged_the_price_of_its_budget():
    alphas = [[2.0, 0.5, 0.2]] * 2
    free, charged = signal([0, 1], alphas, LEVELS), signal([0, 1], alphas, LEVELS, price=[0.0, 1.0])
    # Half of a group's responses call: an advantage of 2 (1 - 1/2) = 1 in calls.
    np.testing.assert_allclose(charged.A - free.A, [[0, 0], [1, -1]], atol=1e-6)


def test_one_budget_shown_is_as_if_none_were():
    one, none = signal([0, 0], [[2.0, 0.5, 0.2]], (0.3,)), signal(None, [2.0, 0.5, 0.2], ())
    for name in ("r", "A", "keep", "call_rate"):
        np.testing.assert_array_equal(getattr(one, name), getattr(none, name))
    np.testing.assert_array_equal(one.reward.alphas[0], none.reward.alphas)
    np.testing.assert_array_equal(one.filter.calls[0], none.filter.calls)


@pytest.mark.slow
def test_a_run_learns_from_all_budgets_and_reports_each(small, tmp_path):
    config = small(**SHOWN, eval__prompts=32)
    assert train.main(config, tmp_path) == 0
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert {"call_rate_0", "call_rate_1", "alpha_c_0", "alpha_c_1"} <= rows[-1].keys()
    table = records.read(tmp_path / "after.parquet")
    assert table["shown_budget"].tolist() == [0.1, 0.3] * 16
    assert re.search(r"\| 30% +\|", (tmp_path / "report.md").read_text())


def test_what_is_done_at_a_budget_by_hand():
    """At 50 %: one of two prompts calls, and the margin sends the wrong one to a right cloud."""
    table = records.check(
        {
            "id": ["a", "b", "c", "d"],
            "shown_budget": [0.5, 0.5, 0.2, 0.2],
            "local_correct": [True, False, False, False],
            "cloud_correct": [True, True, False, True],
            "natural_called": [True, False, False, False],
            "natural_correct": [False, False, False, False],
            "margin": [-1.0, 1.0, 0.0, 0.0],
        },
        "table",
    )
    found = summary.shown_budgets(table)
    assert list(found) == ["0.2", "0.5"]
    assert found["0.5"]["call_rate"]["value"] == 0.5
    assert found["0.5"]["overall_accuracy"]["value"] == 0.5  # the call's
    assert found["0.5"]["margin"]["value"] == 1.0
    assert found["0.2"]["call_rate"]["value"] == found["0.2"]["local_accuracy"]["value"] == 0.0
    assert summary.shown_budgets({"id": table["id"]}) is None
