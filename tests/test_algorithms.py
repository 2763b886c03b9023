"""The other algorithms: hand numbers, and where each equals or differs from the paper's."""

import itertools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from collab_jax import gapg
from collab_jax.rl import algorithms

T, F = True, False
R = jnp.array([[2.2, 0.0, 0.5, 0.2], [0.5, 0.5, 0.2, 0.0], [0.2, 0.2, 0.2, 0.2]])
LENGTH = np.array([[3, 1, 2, 8], [4, 4, 8, 1], [1, 2, 3, 4]])
MASK = jnp.arange(8) < LENGTH[..., None]


def config(**changes):
    made = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    made.algorithm.update(changes)
    return made


# ------------------------------------------------------------------------------------------- reward


def test_task_reward_gives_a_call_nothing():
    state = gapg.init_reward(2.0, 0.5, 0.2)
    correct, called, formatted = (
        jnp.array([[T, F, F, F]]),
        jnp.array([[F, T, F, F]]),
        jnp.array([[T, F, T, F]]),
    )
    r, state = algorithms.task_reward(state, correct, called, formatted, jnp.array([T]))
    np.testing.assert_allclose(r, [[2.2, 0, 0.2, 0]], rtol=1e-6)
    assert state.counts.tolist() == [1, 0, 0, 1, 2]


def test_task_reward_is_the_papers_where_nothing_is_called():
    state, draw = gapg.init_reward(2.0, 0.5, 0.2), np.random.default_rng(0)
    correct, formatted = draw.random((9, 4)) < 0.5, draw.random((9, 4)) < 0.5
    batch = (
        state,
        jnp.array(correct),
        jnp.zeros((9, 4), bool),
        jnp.array(formatted),
        jnp.array(draw.random(9) < 0.5),
    )
    jax.tree.map(np.testing.assert_array_equal, algorithms.task_reward(*batch), gapg.reward(*batch))


# ---------------------------------------------------------------------------------------- advantage


def test_grpo_advantage_by_hand():
    mask = jnp.arange(4) < jnp.array([[1, 2], [4, 4]])[..., None]
    got = algorithms.grpo_advantage(jnp.array([[2.0, 0.0], [0.5, 0.0]]), mask)
    np.testing.assert_allclose(got, [[1, -1 / 2], [1 / 4, -1 / 4]], rtol=1e-4)


def test_grpo_forgets_the_size_of_a_reward_and_gapg_does_not():
    for scale in (0.25, 4.0):
        np.testing.assert_allclose(
            algorithms.grpo_advantage(scale * R, MASK),
            algorithms.grpo_advantage(R, MASK),
            rtol=1e-3,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            gapg.advantage(scale * R, MASK), scale * gapg.advantage(R, MASK), rtol=1e-5, atol=1e-6
        )


def test_gapg_is_leave_one_out_reinforce():
    """RLOO: each response against the mean of the others, summed over its tokens."""
    by_hand = [[r - (sum(row) - r) / 3 for r in row] for row in np.asarray(R).tolist()]
    np.testing.assert_allclose(gapg.advantage(R, MASK), by_hand, rtol=1e-5, atol=1e-6)


def test_dr_grpo_is_gapg_up_to_scale():
    G, width = R.shape[1], MASK.shape[2]
    np.testing.assert_allclose(
        algorithms.dr_grpo_advantage(R, MASK),
        gapg.advantage(R, MASK) * (G - 1) / (G * width),
        rtol=1e-5,
        atol=1e-7,
    )


def test_only_grpo_weighs_a_response_by_its_length():
    longer = jnp.arange(8) < 2 * LENGTH.clip(max=4)[..., None]
    shorter = jnp.arange(8) < LENGTH.clip(max=4)[..., None]
    for advantage in (gapg.advantage, algorithms.dr_grpo_advantage):
        np.testing.assert_array_equal(advantage(R, longer), advantage(R, shorter))
    np.testing.assert_allclose(
        2 * algorithms.grpo_advantage(R, longer), algorithms.grpo_advantage(R, shorter), rtol=1e-6
    )


def test_standard_advantage_of_equal_rewards_is_zero_whatever_rounding_makes_of_their_mean():
    assert not np.asarray(algorithms.standard_advantage(jnp.full((1, 7), 0.2), None)).any()
    np.testing.assert_allclose(
        algorithms.standard_advantage(jnp.array([[2.0, 0.0]]), None), [[1, -1]], rtol=1e-4
    )


# ------------------------------------------------------------------------------------------- filter


def filtered(prompt_filter, r, correct, cloud, known):
    state = gapg.init_filter(0.3)
    return prompt_filter(
        state,
        jnp.array(r),
        jnp.array(correct),
        jnp.array(cloud),
        jnp.array(known),
        jax.random.key(0),
    )


def test_no_filter_keeps_all_known():
    keep, state = filtered(
        algorithms.no_filter, [[2.0], [0.5], [0.0]], [[T], [F], [F]], [F, T, F], [T, T, F]
    )
    assert keep.tolist() == [T, T, F] and (state.kept, state.d1, state.d2) == (2, 1, 1)


def test_zero_variance_filter_keeps_what_has_a_gradient():
    r, correct = [[2.2, 2.2], [0.5, 0.2], [0.0, 0.0], [2.2, 0.0]], [[T, T], [F, F], [F, F], [T, F]]
    keep, state = filtered(algorithms.zero_variance_filter, r, correct, [T, T, F, F], [T, T, T, F])
    assert keep.tolist() == [F, T, F, F]  # the last one's verdict is unknown
    assert (state.prompts, state.kept, state.kept_d2, state.d1) == (4, 1, 1, 1)


def test_mixed_filter_lets_no_prompt_that_all_responses_solve_pay_for_another():
    correct = [[T, F], [T, T], [F, F], [F, F]]
    args = (
        jnp.zeros((4, 2)),
        jnp.array(correct),
        jnp.array([T] * 4),
        jnp.array([T] * 4),
        jax.random.key(0),
    )
    keep, state = algorithms.mixed_filter(gapg.init_filter(0.5), *args)  # rho = 1
    assert (
        keep[:2].tolist() == [T, F] and keep[2:].sum() == 1 and (state.d1, state.kept_d2) == (2, 1)
    )
    keep, state = gapg.prompt_filter(gapg.init_filter(0.5), *args)
    assert keep.all() and (state.d1, state.kept_d2) == (2, 2)


# ------------------------------------------------------------------------------------------ control


def controlled(control, rates, budget=0.3):
    reward, filter = gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(budget)
    for rate in rates:
        reward, filter = control(reward, filter, jnp.float32(rate))
    return reward, filter


def test_lagrangian_by_hand():
    control = algorithms.lagrangian(0.5, 0.0)
    reward, filter = controlled(control, [0.7, 0.4])  # 0.5 * (0.4 + 0.1)
    np.testing.assert_allclose(filter.price, 0.25, rtol=1e-6)
    np.testing.assert_allclose(reward.alphas, [2.0, 0.5, 0.2], rtol=1e-6)
    assert controlled(control, [0.7, 0.0, 0.0])[1].price == 0  # never below


def test_dual_alpha_c_by_hand_moves_both_ways_and_stays_between_its_neighbours():
    reward, filter = controlled(algorithms.dual_alpha_c(0.5, 0.0), [0.1, 0.5, 0.1])
    np.testing.assert_allclose(filter.calls, 0.1, rtol=1e-6)
    np.testing.assert_allclose(reward.alphas, [2.0, 0.5 + 0.5 * (0.2 - 0.2 + 0.2), 0.2], rtol=1e-6)
    reward, _ = controlled(algorithms.dual_alpha_c(0.0, 0.75), [0.1, 0.5, 0.2])
    np.testing.assert_allclose(reward.alphas[1], 0.5 + 0.75 * (0.3 - 0.2), rtol=1e-6)
    assert controlled(algorithms.dual_alpha_c(1.0, 0.0), [1.0] * 9)[0].alphas[1] == jnp.float32(0.2)
    assert controlled(algorithms.dual_alpha_c(1.0, 0.0), [0.0] * 30)[0].alphas[1] == 2.0


def test_dual_alpha_c_brings_a_late_plant_to_the_budget_and_does_not_wind_up():
    """Calls drift towards where alpha_c pays, as a policy learns; the gain damps their swing.

    For 60 steps nothing that alpha_c does has an effect: it then waits at its limit, and turns at
    once.
    """

    def rates(rate, gain, steps=500, dead=0):
        control, calls, found = algorithms.dual_alpha_c(rate, gain), 0.45, []
        reward, filter = gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(0.2)
        for i in range(steps):
            reward, filter = control(reward, filter, jnp.float32(calls))
            wanted = float(reward.alphas[1]) - 0.1  # where calls would settle
            calls += 0.03 * (wanted - calls) * (i >= dead)
            found.append(calls)
        return np.array(found)

    held = rates(0.02, 0.5)
    assert abs(held[-100:] - 0.2).max() < 0.01
    integral = rates(0.02, 0.0)
    assert held.min() > integral.min()  # less of an overshoot
    assert abs(rates(0.02, 0.5, dead=60)[-100:] - 0.2).max() < 0.01


def test_no_control_leaves_all_as_it_is():
    jax.tree.map(
        np.testing.assert_array_equal,
        controlled(gapg.no_control, [0.9]),
        controlled(gapg.no_control, []),
    )


# -------------------------------------------------------------------------------------------- names


def test_the_default_is_the_paper():
    made = algorithms.make_algorithm(config())
    assert made == gapg.GAPG


@pytest.mark.parametrize("parts", list(itertools.product(*algorithms.PARTS.values())))
def test_every_combination_can_be_made(parts):
    made = algorithms.make_algorithm(
        config(**dict(zip(algorithms.PARTS, parts, strict=True)), control_rate=0.1)
    )
    assert all(map(callable, made))


def test_task_tuning_needs_no_cloud_and_the_paper_does():
    assert algorithms.needs_cloud(config()) and algorithms.needs_cloud(
        config(reward="task")
    )  # its filter asks
    assert not algorithms.needs_cloud(config(reward="task", filter="none"))
    assert algorithms.needs_cloud(config(filter="none"))
