"""What the method is compared with, behind `gapg.py`'s signatures: plain functions, named by the
keys of `config.algorithm`.

    Task-Tuning Only                      reward=task          advantage=grpo  filter=none
    Collaboration-Aware Tuning (paper)    reward=hierarchical  advantage=grpo  filter=none  (or advantage=dr_grpo)
    GAPG (paper)                          reward=hierarchical  advantage=gapg  filter=d1d2
    DA-GRPO (arXiv 2602.00166)            reward=hierarchical  advantage=grpo  filter=none  control=lagrangian

Our own parts: `standard`, GRPO's advantage without its mean over tokens; `solo`, responses of a
group that may not call and are measured against each other alone (`by_kind`).

With one update for each fresh batch the probability ratio of GRPO and Dr. GRPO is 1 and its clip
idle; a KL term is left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.gapg import Algorithm, FilterState, RewardState

# --------------------------------------------------------------------------------------------------- reward


def task_reward(
    state: RewardState,
    correct: jax.Array,
    called: jax.Array,
    formatted: jax.Array,
    cloud_correct: jax.Array,
) -> tuple[jax.Array, RewardState]:
    """`gapg.reward` as if the cloud were never right: r f32[Q, G], and a call earns nothing."""
    return gapg.reward(state, correct, called, formatted, jnp.zeros_like(cloud_correct))


# ------------------------------------------------------------------------------------------------ advantage


def grpo_advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """GRPO's (arXiv 2402.03300) f32[Q, G]: (r_i - mean) / (std + 1e-6) over the group, each
    response by its tokens' mean.

    r f32[Q, G], mask bool[Q, G, T].
    """
    return standard_advantage(r, mask) / jnp.maximum(mask.sum(axis=2), 1)


def standard_advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """(r_i - mean) / (std + 1e-6) over the group, f32[Q, G]: GRPO's without its mean over tokens.

    r f32[Q, G]; the mask does not matter. A group that earned the same all over has none, whatever
    rounding makes of its mean.
    """
    del mask
    A = (r - r.mean(axis=1, keepdims=True)) / (r.std(axis=1, keepdims=True) + 1e-6)
    return jnp.where((r == r[:, :1]).all(axis=1, keepdims=True), 0.0, A)


def by_kind(advantage: Callable, solo: int) -> Callable:
    """`advantage` among the responses that may call, GAPG's among the first `solo` of each group,
    which may not.

    So the ones learn when to call and the others to solve, as task tuning does; neither is measured
    against the other.
    """

    def both(r: jax.Array, mask: jax.Array) -> jax.Array:
        own = gapg.advantage(r[:, :solo], mask[:, :solo])
        return jnp.concatenate([own, advantage(r[:, solo:], mask[:, solo:])], axis=1)

    return both if solo else advantage


def dr_grpo_advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """Dr. GRPO's (arXiv 2503.20783) f32[Q, G]: (r_i - mean) / T, tokens summed and divided by the
    limit T.

    r f32[Q, G], mask bool[Q, G, T]. So it is `gapg.advantage` times (G - 1) / (G T): the same
    direction.
    """
    G = r.shape[1]
    return gapg.advantage(r, mask) * ((G - 1) / (G * mask.shape[2]))


# --------------------------------------------------------------------------------------------------- filter


def no_filter(
    state: FilterState,
    r: jax.Array,
    correct: jax.Array,
    cloud_correct: jax.Array,
    cloud_known: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, FilterState]:
    """Keeps every prompt whose verdicts are known; the totals go on, so that runs compare."""
    del r, key
    d1, d2 = gapg.classes(correct, cloud_correct, cloud_known)
    keep = jnp.broadcast_to(cloud_known, d1.shape)
    return keep, gapg.tally(state, d1, d2, keep, correct.any(axis=1))


def zero_variance_filter(
    state: FilterState,
    r: jax.Array,
    correct: jax.Array,
    cloud_correct: jax.Array,
    cloud_known: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, FilterState]:
    """Drops the groups whose rewards r f32[Q, G] are all equal (DAPO, arXiv 2503.14476, without its
    resampling).

    They have no gradient; what changes is the number of prompts that the rest is divided by.
    """
    del key
    d1, d2 = gapg.classes(correct, cloud_correct, cloud_known)
    keep = cloud_known & (r != r[:, :1]).any(axis=1)
    return keep, gapg.tally(state, d1, d2, keep, correct.any(axis=1))


def mixed_filter(
    state: FilterState,
    r: jax.Array,
    correct: jax.Array,
    cloud_correct: jax.Array,
    cloud_known: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, FilterState]:
    """`gapg.prompt_filter` with another D1: prompts with right and wrong responses. One that all
    responses solve is dropped.

    Such a prompt has no gradient, but in the paper's D1 it pays for D2 prompts; here it does not.
    """
    del r
    d1, d2 = gapg.classes(correct, cloud_correct, cloud_known)
    keep, carry = gapg.within_quota(state, d1 & ~correct.all(axis=1), d2, key)
    # The totals' D1 is the paper's, as with every filter.
    return keep, gapg.tally(state, d1, d2, keep, correct.any(axis=1)).replace(carry=carry)


# -------------------------------------------------------------------------------------------------- control


def lagrangian(rate: float) -> Callable:
    """Control of DA-GRPO (arXiv 2602.00166): price <- max(0, price + rate * (call rate - budget))."""

    def control(
        reward: RewardState, filter: FilterState, call_rate: jax.Array
    ) -> tuple[RewardState, FilterState]:
        price = jnp.maximum(filter.price + rate * (call_rate - filter.budget), 0)
        return reward, filter.replace(price=price)

    return control


def dual_alpha_c(rate: float) -> Callable:
    """alpha_c <- alpha_c + rate * (budget - call rate), kept in [alpha_f, alpha_a]: the budget from
    both sides.
    """

    def control(
        reward: RewardState, filter: FilterState, call_rate: jax.Array
    ) -> tuple[RewardState, FilterState]:
        a, c, f = reward.alphas
        c = jnp.clip(c + rate * (filter.budget - call_rate), f, a)
        return reward.replace(alphas=jnp.stack([a, c, f])), filter

    return control


# ---------------------------------------------------------------------------------------------------- names

PARTS: dict[str, dict[str, Callable]] = {
    "reward": {"hierarchical": gapg.reward, "task": task_reward},
    "advantage": {
        "gapg": gapg.advantage,
        "grpo": grpo_advantage,
        "dr_grpo": dr_grpo_advantage,
        "standard": standard_advantage,
    },
    "filter": {
        "d1d2": gapg.prompt_filter,
        "mixed": mixed_filter,
        "zero_variance": zero_variance_filter,
        "none": no_filter,
    },
    "control": {
        "none": lambda rate: gapg.no_control,
        "lagrangian": lagrangian,
        "dual_alpha_c": dual_alpha_c,
    },
}


def make_algorithm(config: ConfigDict) -> Algorithm:
    """The Algorithm that `config.algorithm` names."""
    part = {name: functions[config.algorithm[name]] for name, functions in PARTS.items()}
    control = part["control"](config.algorithm.control_rate)
    return Algorithm(
        part["reward"], by_kind(part["advantage"], config.algorithm.solo), part["filter"], control
    )


def needs_cloud(config: ConfigDict) -> bool:
    """Whether training depends on the cloud's verdicts; task tuning does not, and then none is
    bought.
    """
    return config.algorithm.reward != "task" or config.algorithm.filter in ("d1d2", "mixed")
