"""What a batch of verdicts teaches: rewards, advantages, which prompts are kept, the new states.

It is where an `Algorithm` is applied. Axis letters: see `gapg.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.gapg import Algorithm, FilterState, RewardState, Rollout, TrainState


class Signal(NamedTuple):
    """What a batch of Q prompts teaches, the same on every device."""

    r: jax.Array  # f32[Q, G], rewards
    A: jax.Array  # f32[Q, G], advantages, a call's price taken off
    keep: jax.Array  # bool[Q]
    learnable: jax.Array  # bool[Q], kept, and with an advantage
    free: jax.Array  # bool[Q, G], the response was free to call
    call_rate: jax.Array  # f32[], share of calls among the free responses
    call_rates: jax.Array  # the same, of each budget that is shown; else call_rate
    reward: RewardState
    filter: FilterState


def learning_signal(
    algorithm: Algorithm, state: TrainState, batch: Rollout, key: jax.Array
) -> Signal:
    """What the algorithm makes of a batch's verdicts, and its states after this batch."""
    of_prompts = functools.partial(_of_prompts, level=batch.level)
    r, reward = algorithm.reward(
        state.reward.replace(alphas=of_prompts(state.reward.alphas)),
        batch.correct,
        batch.called,
        batch.formatted,
        batch.cloud_correct,
        batch.grade,
        batch.cloud_grade,
    )
    reward = reward.replace(alphas=state.reward.alphas)
    keep, filter = algorithm.prompt_filter(
        state.filter, r, batch.correct, batch.cloud_correct, batch.cloud_known, key
    )
    cost, price = batch.called.astype(jnp.float32), of_prompts(state.filter.price)
    A = algorithm.advantage(r, batch.mask)
    A = A - price[..., None] * algorithm.advantage(cost, batch.mask)
    learnable = keep & (A != 0).any(axis=1)
    if batch.barred is None:
        free = jnp.ones_like(batch.called)
    else:
        free = (batch.barred < 0).all(axis=2)
    call_rate = call_rates = cost.sum() / free.sum()
    if batch.level is not None:
        count = lambda x: jnp.zeros_like(filter.calls).at[batch.level].add(x.sum(axis=1))  # noqa: E731
        # A budget that no prompt of the batch shows has no news.
        call_rates = jnp.where(count(free) > 0, count(cost) / count(free), filter.calls)
    reward, filter = algorithm.control(reward, filter, call_rates)
    return Signal(r, A, keep, learnable, free, call_rate, call_rates, reward, filter)


def _of_prompts(state: jax.Array, level: jax.Array | None) -> jax.Array:
    """What a state has for each budget, for each prompt; as it is where none is shown."""
    return state if level is None else state[level]
