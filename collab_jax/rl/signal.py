"""What a batch of verdicts teaches: rewards, advantages, which prompts are kept, the new states.

It is where an `Algorithm` is applied. Axis letters: see `gapg.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.gapg import Algorithm, FilterState, RewardState, Rollout, TrainState
from collab_jax.rl import scoring
from collab_jax.rl.scoring import Scored


class Signal(NamedTuple):
    """What a batch of Q prompts teaches, the same on every device."""

    r: jax.Array  # f32[Q, G], rewards
    A: jax.Array  # f32[Q, G], advantages, a call's price taken off
    keep: jax.Array  # bool[Q]
    scored: Scored | None  # of the decisions; None where calls are sampled
    learnable: jax.Array  # bool[Q], kept, and with an advantage or a decision that counts
    price: jax.Array  # f32[], a call's, the mean over prompts
    calls: jax.Array  # bool[Q, G]; where decisions are scored, what greedy decoding would call
    call_rate: jax.Array  # f32[], share of calls among the responses
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
    scored, calls = None, batch.called
    if batch.margin is not None:
        scored, price = scoring.scored(
            batch.margin, batch.correct, batch.cloud_correct, keep, filter.budget, batch.level
        )
        calls = batch.margin > 0
    learnable = keep & has_gradient(A, scored).any(axis=1)
    call_rate = call_rates = calls.mean()
    if batch.level is not None:
        count = lambda x: jnp.zeros_like(filter.calls).at[batch.level].add(x.sum(axis=1))  # noqa: E731
        shown = count(jnp.ones_like(calls))
        # A budget that no prompt of the batch shows has no news.
        call_rates = jnp.where(shown > 0, count(calls) / shown, filter.calls)
    reward, filter = algorithm.control(reward, filter, call_rates)
    return Signal(
        r=r,
        A=A,
        keep=keep,
        scored=scored,
        learnable=learnable,
        price=price.mean(),
        calls=calls,
        call_rate=call_rate,
        call_rates=call_rates,
        reward=reward,
        filter=filter,
    )


def has_gradient(A: jax.Array, scored: Scored | None) -> jax.Array:
    """bool[Q, G]: the responses that teach something, by their advantages or their decisions."""
    return A != 0 if scored is None else (A != 0) | (scored.call > 0) | (scored.answer > 0)


def _of_prompts(state: jax.Array, level: jax.Array | None) -> jax.Array:
    """What a state has for each budget, for each prompt; as it is where none is shown."""
    return state if level is None else state[level]
