"""The live budget: the rate is held, also when the mix changes; a target takes effect at once."""

import collections
import json
import math

import numpy as np
import pytest
from conftest import ROOT

from collab_jax import records
from collab_jax.calibrate import answered
from collab_jax.routing import collab_config
from collab_jax.routing.calibration import bias_for_rate
from collab_jax.runtime.errors import UserError
from collab_jax.serve import budget
from collab_jax.serve.budget import (
    BURST,
    Controller,
    Ticket,
    decide,
    retarget,
    start,
    take_back,
)

QUERIES = 2000


@pytest.fixture(scope="module")
def table():
    """Test records of a trained model: margins, and which responses have an answer."""
    file = ROOT / "docs" / "results" / "chain" / "ours" / "seed-0" / "after.parquet"
    return records.read(file)


@pytest.fixture(scope="module")
def scores(table):
    """What a call is decided by, +inf without an answer."""
    return np.where(answered(table, False), table["margin"], np.inf)


@pytest.fixture(scope="module")
def calibration(table):
    half = {name: column[::2] for name, column in table.items()}
    margins, is_answered = half["margin"], answered(half, False)
    return collab_config.to_config(bias_for_rate(margins, is_answered, 0.3), margins, is_answered)


def traffic(state, stream, delay=32):
    """(state after, calls granted) of queries whose bias is `delay` queries old when they end."""
    waiting, granted = collections.deque(), []
    for score in [*stream, *[None] * delay]:
        if score is not None:
            waiting.append((score, state.tracker.bias))
        if len(waiting) > delay or score is None:
            score, bias = waiting.popleft()
            state, ok = decide(state, bool(score + bias > 0))
            granted.append(ok)
    return state, np.array(granted)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_the_rate_is_within_two_points_also_when_the_mix_changes(
    calibration, scores, target, shift
):
    """shift: of all margins from the middle on, in spreads (of the middle 98 %)."""
    stream = np.random.default_rng(0).permutation(scores)[:QUERIES]
    low, high = np.quantile(scores[np.isfinite(scores)], [0.01, 0.99])
    stream[QUERIES // 2 :] += shift * (high - low)
    state, granted = traffic(start(calibration, target), stream)
    assert abs(granted.mean() - target) < 0.02
    assert state.calls == granted.sum() and state.queries == QUERIES


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_another_kind_of_question_is_no_harder(calibration, table, scores, target):
    """First questions with three numbers, then with four, which call far more often."""
    rng = np.random.default_rng(1)
    kinds = [np.flatnonzero(table["stratum"] == s) for s in sorted(set(table["stratum"]))]
    stream = np.concatenate([scores[rng.choice(k, QUERIES // 2)] for k in kinds])
    _, granted = traffic(start(calibration, target), stream)
    assert abs(granted.mean() - target) < 0.02


def test_a_new_target_takes_effect_at_once(calibration, scores):
    stream = np.random.default_rng(2).permutation(scores)[:QUERIES]
    state, _ = traffic(start(calibration, 0.4), stream[:500])
    state = retarget(state, budget.points(calibration), 0.1)
    assert (state.queries, state.calls) == (0, 0)
    _, granted = traffic(state, stream[500:], delay=0)
    assert abs(granted.mean() - 0.1) < 0.02 and granted[:200].mean() < 0.2


def test_an_uncalibrated_model_finds_its_bias(scores):
    stream = np.random.default_rng(3).permutation(np.resize(scores, 4 * QUERIES))
    state, granted = traffic(start(None, 0.3), stream)
    assert abs(granted[-QUERIES:].mean() - 0.3) < 0.02


def test_the_bucket_is_a_hard_limit():
    """Whatever is wanted, n queries have at most target * n + BURST calls."""
    for target in (0.0, 0.05, 0.5, 1.0):
        state = start(None, target)
        calls = 0
        for n in range(1, 400):
            state, granted = decide(state, True)
            calls += granted
            assert calls <= min(n, target * n + BURST)
        assert calls >= math.floor(target * n)
        assert target > 0 or calls == 0
        assert state.tracker.bias <= start(None, target).tracker.bias


def test_a_call_that_failed_is_as_if_it_had_not_been(calibration):
    state = start(calibration, 0.3)
    for wanted in (True, False, True, True):
        state, _ = decide(state, wanted)
    after, granted = decide(state, True)
    assert granted
    back = take_back(after, Ticket(0, 0.3))
    assert back.tracker.bias == pytest.approx(state.tracker.bias)
    assert back.debt == pytest.approx(state.debt)
    assert (back.queries, back.calls) == (state.queries, state.calls)
    assert back.bucket == pytest.approx(state.bucket)


def test_a_call_that_failed_after_the_target_changed_gives_its_token_back_and_no_more(calibration):
    state = start(calibration, 0.9)
    for _ in range(10):
        state, granted = decide(state, True)
        assert granted
    lowered = retarget(state, budget.points(calibration), 0.1)
    after = lowered
    for _ in range(10):
        after = take_back(after, Ticket(0, 0.9))
    assert after == lowered._replace(bucket=pytest.approx(BURST))
    assert (after.queries, after.calls, after.debt) == (0, 0, 0.0)


def test_a_target_of_all_or_nothing_and_back_keeps_what_was_learnt(tmp_path, calibration):
    controller = Controller(tmp_path / "budget.json", "m", calibration, 0.3)
    for wanted in (True, False, False, True):
        controller.decide(wanted)
    bias = controller.bias
    for target, said in ((1, budget.LIMIT), (0, -math.inf)):
        controller.set_target(target)
        assert controller.bias == said
        controller.set_target(0.3)
        assert controller.bias == bias


def test_biases_lie_on_lines_between_calibrated_ones():
    points = [budget.Point(0.1, -4.0), budget.Point(0.3, 0.0)]
    assert [budget.bias_for(points, r) for r in (0.05, 0.1, 0.2, 0.3, 0.9)] == [
        -4.0, -4.0, pytest.approx(-2.0), 0.0, 0.0,
    ]  # fmt: skip
    assert budget.bias_for(points, 0) == -math.inf and budget.bias_for(points, 1) > 1000
    assert budget.bias_for([], 0.2) is None


def test_the_state_survives_a_restart(tmp_path, calibration):
    path = tmp_path / "budget.json"
    controller = Controller(path, "m", calibration, 0.3)
    controller.set_target(0.2)
    tickets = [controller.decide(wanted) for wanted in (True, True, False)]
    assert tickets == [Ticket(1, 0.2), Ticket(1, 0.2), None]
    controller.take_back(Ticket(1, 0.2))
    controller.save()
    assert Controller(path, "m", calibration, 0.3).state == controller.state
    assert Controller(path, "other", calibration, 0.3).state == start(calibration, 0.3)
    again = calibration | {"bias": calibration["bias"] + 1}  # the same name, calibrated once more
    assert Controller(path, "m", again, 0.3).state == start(again, 0.3)
    controller.set_target(0)
    assert controller.bias == -math.inf and not controller.decide(True)
    assert controller.report()["achieved_call_rate"] == 0
    controller.save()
    assert Controller(path, "m", calibration, 0.3).report()["target_call_rate"] == 0


@pytest.mark.parametrize("damage", ["{", "[]", json.dumps({"model": "m", "tracker": {}})])
def test_a_damaged_state_says_what_to_do(tmp_path, calibration, damage):
    path = tmp_path / "budget.json"
    path.write_text(damage)
    with pytest.raises(UserError, match="delete it"):
        Controller(path, "m", calibration, 0.3)
