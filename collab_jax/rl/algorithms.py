"""What the method is compared with: plain functions with the signatures of `gapg.py`'s.

`config.algorithm` names them, each by a key of `PARTS`:

    Task-Tuning Only           reward=task          advantage=grpo  filter=none
    Collaboration-Aware        reward=hierarchical  advantage=grpo  filter=none
    Tuning (paper)               (or advantage=dr_grpo)
    GAPG (paper)               reward=hierarchical  advantage=gapg  filter=d1d2
    DA-GRPO (2602.00166)       reward=hierarchical  advantage=grpo  filter=none  control=lagrangian

Our own are `standard`, GRPO's advantage without its mean over tokens, and decisions that are scored
(`scoring.py`).

With one update for each fresh batch the probability ratio of GRPO and Dr. GRPO is 1, and its clip
never acts; a KL term is left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.gapg import Algorithm, Control, FilterState, RewardState

# ------------------------------------------------------------------------------------------- reward


def task_reward(
    state: RewardState,
    correct: jax.Array,
    called: jax.Array,
    formatted: jax.Array,
    cloud_correct: jax.Array,
    grade: jax.Array | None = None,
    cloud_grade: jax.Array | None = None,
) -> tuple[jax.Array, RewardState]:
    """r f32[Q, G]: `gapg.reward` as if the cloud were never right, so that a call earns nothing."""
    del cloud_grade
    never = jnp.zeros_like(cloud_correct)
    return gapg.reward(state, correct, called, formatted, never, grade)


# ---------------------------------------------------------------------------------------- advantage


def grpo_advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """GRPO's advantage f32[Q, G] (arXiv 2402.03300): (r_i - mean) / (std + 1e-6) over the group.

    Each response counts by the mean over its tokens. r f32[Q, G], mask bool[Q, G, T].
    """
    return standard_advantage(r, mask) / jnp.maximum(mask.sum(axis=2), 1)


def standard_advantage(r: jax.Array, mask: jax.Array | None) -> jax.Array:
    """(r_i - mean) / (std + 1e-6) over the group, f32[Q, G]: GRPO's without its mean over tokens.

    r f32[Q, G]; the mask does not matter. A group of equal rewards gives exactly 0, whatever
    rounding makes of their mean.
    """
    del mask
    A = (r - r.mean(axis=1, keepdims=True)) / (r.std(axis=1, keepdims=True) + 1e-6)
    return jnp.where((r == r[:, :1]).all(axis=1, keepdims=True), 0.0, A)


def dr_grpo_advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """Dr. GRPO's advantage f32[Q, G] (arXiv 2503.20783): (r_i - mean) / T; tokens are summed.

    r f32[Q, G], mask bool[Q, G, T]. It is `gapg.advantage` times (G - 1) / (G T), so it has the
    same direction, and makes the same update (`optim.unit_norm`).
    """
    G = r.shape[1]
    return gapg.advantage(r, mask) * ((G - 1) / (G * mask.shape[2]))


def no_advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """0 f32[Q, G]: attempts teach nothing (`decision_alone`)."""
    del mask
    return jnp.zeros_like(r)


# ------------------------------------------------------------------------------------------- filter


def no_filter(
    state: FilterState,
    r: jax.Array,
    correct: jax.Array,
    cloud_correct: jax.Array,
    cloud_known: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, FilterState]:
    """keep bool[Q]: every prompt whose verdict is known; totals are counted, to compare runs."""
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
    """keep bool[Q]: every prompt but those whose rewards r f32[Q, G] are all equal.

    As in DAPO (arXiv 2503.14476), without its resampling. Such groups have no gradient, and the
    size of a gradient changes no update (`optim.unit_norm`): what `no_filter` does, but for a batch
    without any other group, which is no update here.
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
    """keep bool[Q]: as `gapg.prompt_filter`, but without the prompts that all responses solve.

    Such a prompt has no gradient, but in the paper's D1 it pays for D2 prompts; here it does not.
    """
    del r
    d1, d2 = gapg.classes(correct, cloud_correct, cloud_known)
    keep, carry = gapg.within_quota(state, d1 & ~correct.all(axis=1), d2, key)
    # The totals count D1 as the other filters do.
    return keep, gapg.tally(state, d1, d2, keep, correct.any(axis=1)).replace(carry=carry)


# ------------------------------------------------------------------------------------------ control


def lagrangian(rate: float, gain: float) -> Control:
    """DA-GRPO's control (arXiv 2602.00166): price <- max(0, price + rate (call rate - budget)).

    It has no gain. The paper's own constraint, E[called] <= rho E[local], is the same one: called -
    rho local is (1 + rho) (called - budget), so that its multiplier moves as this price does.
    """
    del gain

    def control(
        reward: RewardState, filter: FilterState, call_rate: jax.Array
    ) -> tuple[RewardState, FilterState]:
        price = jnp.maximum(filter.price + rate * (call_rate - filter.budget), 0)
        return reward, filter.replace(price=price)

    return control


def dual_alpha_c(rate: float, gain: float) -> Control:
    """The control that moves alpha_c, what a right call earns, to bring calls to the budget.

    A proportional-integral controller in velocity form: alpha_c changes by rate (budget - call
    rate), and by gain times how much the call rate fell since the last step. It is kept in
    [alpha_f, alpha_a], which in this form leaves no integral to wind up. Calls follow alpha_c late,
    as the policy has to learn it and the optimizer has its momentum: without a gain the integral
    alone overshoots, and an average of the call rate, late too, makes the swing wider.
    """

    def control(
        reward: RewardState, filter: FilterState, call_rate: jax.Array
    ) -> tuple[RewardState, FilterState]:
        a, c, f = jnp.moveaxis(reward.alphas, -1, 0)
        change = rate * (filter.budget - call_rate) + gain * (filter.calls - call_rate)
        alphas = jnp.stack([a, jnp.clip(c + change, f, a), f], axis=-1)
        return reward.replace(alphas=alphas), filter.replace(calls=call_rate)

    return control


# -------------------------------------------------------------------------------------------- names

DECISIONS = ("sampled", "scored")

PARTS: dict[str, dict[str, Callable]] = {
    "reward": {"hierarchical": gapg.reward, "task": task_reward},
    "advantage": {
        "gapg": gapg.advantage,
        "grpo": grpo_advantage,
        "dr_grpo": dr_grpo_advantage,
        "standard": standard_advantage,
        "none": no_advantage,
    },
    "filter": {
        "d1d2": gapg.prompt_filter,
        "mixed": mixed_filter,
        "zero_variance": zero_variance_filter,
        "none": no_filter,
    },
    "control": {
        "none": lambda rate, gain: gapg.no_control,
        "lagrangian": lagrangian,
        "dual_alpha_c": dual_alpha_c,
    },
}


def make_algorithm(config: ConfigDict) -> Algorithm:
    """The Algorithm that `config.algorithm` names."""
    part = {name: functions[config.algorithm[name]] for name, functions in PARTS.items()}
    return Algorithm(
        reward=part["reward"],
        advantage=part["advantage"],
        prompt_filter=part["filter"],
        control=part["control"](config.algorithm.control_rate, config.algorithm.control_gain),
    )


def scores_decisions(config: ConfigDict) -> bool:
    """Whether no response of training calls, and each attempt's verdict teaches the decision."""
    return config.algorithm.decision == "scored"


def decision_alone(config: ConfigDict) -> bool:
    """Whether the model stays as it is but for the call's row of its head, which scores move."""
    return config.algorithm.advantage == "none"


def needs_cloud(config: ConfigDict) -> bool:
    """Whether training depends on the cloud's verdicts. Task tuning does not, and buys none."""
    return config.algorithm.reward != "task" or config.algorithm.filter in ("d1d2", "mixed")
