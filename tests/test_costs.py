"""What routing costs, by hand numbers on four prompts with traces."""

import numpy as np
import pytest

from collab_jax import records as tables
from collab_jax.routing import costs, curves
from collab_jax.runtime.errors import UserError

T, F = True, False


def records(local, cloud, **columns):
    base = dict(id=[f"p{i}" for i in range(len(local))], local_correct=local, cloud_correct=cloud)
    return tables.check(base | columns, "here")


def trace_records():
    """Largest margins 2, 1, -1, 4 (no answer, ranked first by 100 more)."""
    traces = [[-np.inf, 0.5, 2.0, 0.0], [1.0, -2.0], [-1.0, -1.0, -3.0], [-5.0, 1.5, 4.0, 0.0, 0.0]]
    return records(
        [T, F, T, F], [T, T, F, T], margins=traces, tokens=[4, 2, 3, 5], ms=[8.0, 2.0, 9.0, 5.0],
        cloud_usd=[0.1, 0.2, 0.3, 0.4], cloud_tokens=[10, 20, 30, 40],
    )  # fmt: skip


TRACE_SCORE = np.array([2.0, 1.0, -1.0, 104.0])


@pytest.mark.parametrize(
    "budget, tokens",
    [
        (0, [4, 2, 3, 5]),
        (0.25, [4, 2, 3, 5]),  # what has no answer only: it runs to its end
        (0.5, [3, 2, 3, 3]),  # threshold 2: row 0 calls at its third token, row 3 at 4.0
        (0.75, [3, 1, 3, 2]),  # threshold 1
        (1, [2, 1, 1, 2]),  # threshold -1
    ],
)
def test_device_tokens_before_a_call_by_hand(budget, tokens):
    assert costs.device_tokens(trace_records(), TRACE_SCORE, budget, "trace").tolist() == tokens


def test_device_tokens_where_the_budget_cuts_equal_margins():
    r = records([T, F], [T, T], margins=[[0.0, 1.0, 0.0, 0.0], [1.0, 0.0]], tokens=[4, 2])
    assert costs.device_tokens(r, np.ones(2), 0.5, "trace").tolist() == [
        3.0,
        1.5,
    ]  # half of 2 or 4, of 1 or 2


def test_device_tokens_of_routers_that_read_the_prompt_or_the_response():
    r = trace_records()
    assert costs.device_tokens(r, TRACE_SCORE, 0.5, "prompt").tolist() == [0, 2, 3, 0]
    assert costs.device_tokens(r, TRACE_SCORE, 0.5, "response").tolist() == [4, 2, 3, 5]
    assert costs.device_tokens(r, np.zeros(4), 0.5, "prompt").tolist() == [2, 1, 1.5, 2.5]


def test_cost_frontier_by_hand():
    r = trace_records()
    got = costs.cost_frontier(
        r, TRACE_SCORE, costs.Prices(cloud_seconds=2.0), "trace", budgets=[0, 0.5, 1]
    )
    assert got.accuracy == pytest.approx([0.5, 0.75, 0.75])
    assert got.usd == pytest.approx([0, (0.1 + 0.4) / 4, 0.25])  # rows 0 and 3 at a half
    assert got.device_tokens == pytest.approx([14 / 4, 11 / 4, 6 / 4])
    assert got.seconds == pytest.approx(
        [24e-3 / 4, (6 + 2 + 9 + 3) * 1e-3 / 4 + 1, (4 + 1 + 3 + 2) * 1e-3 / 4 + 2]
    )
    prices = costs.Prices(2.0, usd_per_call=0.5, usd_per_million_tokens=1e4, device_ms_per_token=10)
    got = costs.cost_frontier(
        r, TRACE_SCORE, prices, "response", own_tokens=np.array([4, 0, 0, 4]), budgets=[0.5]
    )
    assert got.usd[0] == pytest.approx((2 * 0.5 + (10 + 40) * 0.01) / 4)
    assert got.seconds[0] == pytest.approx((14 + 8) * 0.01 / 4 + 1)
    assert costs.cost_frontier(r, TRACE_SCORE, prices, "prompt").accuracy == pytest.approx(
        curves.frontiers({"x": [(r, TRACE_SCORE)]}, resamples=1).accuracy["x"][0]
    )
    grades = {"local_grade": np.array([0.5, 0, 1, 0]), "cloud_grade": np.array([1, 0.25, 1, 1])}
    got = costs.cost_frontier(r | grades, TRACE_SCORE, prices, "prompt", budgets=[0, 1])
    assert got.accuracy == pytest.approx([1.5 / 4, 3.25 / 4])


def test_absent_columns_are_named():
    r = records([T] * 5, [T] * 5)
    with pytest.raises(
        UserError, match="device tokens: the records have no column tokens and no margins"
    ):
        costs.device_tokens(r, np.arange(5.0), 0.2, "trace")
    r = records([T] * 5, [T] * 5, tokens=[1] * 5)
    with pytest.raises(UserError, match="no column cloud_usd"):
        costs.cost_frontier(r, np.arange(5.0), costs.Prices(1.0), "response")
    with pytest.raises(UserError, match="no column cloud_tokens"):
        costs.cost_frontier(
            r, np.arange(5.0), costs.Prices(1.0, usd_per_million_tokens=1.0), "response"
        )
    with pytest.raises(UserError, match="no column ms"):
        costs.cost_frontier(r, np.arange(5.0), costs.Prices(1.0, usd_per_call=1.0), "response")
