"""Group Adaptive Policy Gradient: the method of "Collaborative Device-Cloud LLM Inference through
Reinforcement Learning" (arXiv 2509.24050): reward, prompt filter, advantage, loss and step. Pure
functions, no I/O, no tokenizer.

Axis letters, used everywhere: D devices, P prompts a device, Q = D * P prompts of the global batch,
G responses of a group, B = P * G rows, L prompt columns, T response columns, S = L + T, N query
heads, K kv heads, H head, E width, V vocabulary.

One step (section 4 of the paper):

    verdicts [Q, G] --reward--> r [Q, G] --advantage--> A [Q, G] \\
                    --prompt_filter--> keep [Q] -------------------> pack kept prompts over devices -> gradient -> Optax

The parts are an `Algorithm`, of which GAPG is the paper's; `algorithms.py` has the others.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from collab_jax.models import lora
from collab_jax.models.decoder import Params

# ---------------------------------------------------------------------------------------------------- state


@flax.struct.dataclass
class RewardState:
    """The weights, and how often each outcome occurred: OUTCOMES, in that order."""

    alphas: jax.Array  # f32[3]: alpha_a, alpha_c, alpha_f
    counts: jax.Array  # i32[5]


OUTCOMES = ("correct_formatted", "correct", "called_right", "wrong_formatted", "nothing")


@flax.struct.dataclass
class FilterState:
    """The budget and what was done about it so far. rho = rho_num / rho_den exactly, so that no
    rounding adds up.
    """

    budget: jax.Array  # f32[], share of queries
    price: jax.Array  # f32[], of a call in units of reward (a Lagrange multiplier); 0 but under control "lagrangian"
    rho_num: jax.Array  # i32[]
    rho_den: jax.Array  # i32[]
    carry: jax.Array  # i32[], unused fraction of a prompt, in units of 1 / rho_den
    prompts: jax.Array  # i32[], totals from here on
    d1: jax.Array
    d2: jax.Array
    kept: jax.Array
    kept_d2: jax.Array
    empty_d1_streak: jax.Array  # steps in a row in which no prompt was solved on the device


@flax.struct.dataclass
class TrainState:
    """All that changes between steps, saved, and the same on every device; and `frozen`, which is
    neither changed nor saved.
    """

    step: jax.Array  # i32[]
    params: Params  # that are trained: all, or an adapter
    opt_state: optax.OptState
    reward: RewardState
    filter: FilterState
    empty_updates: jax.Array  # i32[], steps without a kept prompt, so without an update
    nonfinite_updates: jax.Array  # i32[], steps whose gradient was not finite, so without an update
    nonfinite_streak: jax.Array  # i32[], of those, how many in a row
    average: Params | None = (
        None  # f32, of the params after each step, each weighing `average` times the next; None: none
    )
    frozen: Params | None = None  # the model that an adapter belongs to; None: no adapter

    @property
    def final_params(self) -> Params:
        """What the run delivers: the averaged `params` where they are kept, in the type of the
        others, or these.
        """
        if self.average is None:
            return self.params
        return jax.tree.map(lambda a, p: a.astype(p.dtype), self.average, self.params)

    @property
    def final_model(self) -> Params:
        """The whole model that the run delivers."""
        return lora.join(self.frozen, self.final_params)

    @property
    def sampling_model(self) -> Params:
        """The whole model that samples, and that the next step improves."""
        return lora.join(self.frozen, self.params)


@flax.struct.dataclass
class Rollout:
    """What a step learns from; `rollout.py` draws the layout."""

    prompts: jax.Array  # i32[Q, L]
    prompt_mask: jax.Array  # bool[Q, L]
    tokens: jax.Array  # i32[Q, G, T]
    logp: jax.Array  # f32[Q, G, T], when sampled
    mask: jax.Array  # bool[Q, G, T]
    correct: jax.Array  # bool[Q, G], answered on the device, and right
    called: jax.Array  # bool[Q, G]
    formatted: jax.Array  # bool[Q, G]
    cloud_correct: jax.Array  # bool[Q], the cloud's verdict where it was needed
    cloud_known: jax.Array  # bool[Q], False only where the verdict was needed and the cloud failed
    barred: jax.Array | None = (
        None  # i32[Q, G, T], the token that was disallowed there, or -1; None: none was
    )


def zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def init_reward(alpha_a: float, alpha_c: float, alpha_f: float) -> RewardState:
    """Needs alpha_a > alpha_c > alpha_f >= 0 (paper, equation of the hierarchical reward)."""
    return RewardState(
        alphas=jnp.array([alpha_a, alpha_c, alpha_f], jnp.float32), counts=jnp.zeros(5, jnp.int32)
    )


def rho_of(budget: float) -> Fraction:
    """The ratio cloud : local of a budget in [0, 0.999], a share of all queries: b / (1 - b), with
    a small denominator.
    """
    share = Fraction(budget).limit_denominator(10_000)
    return share / (1 - share)


def init_filter(budget: float) -> FilterState:
    rho = rho_of(budget)
    totals = {
        name: zero()
        for name in ("carry", "prompts", "d1", "d2", "kept", "kept_d2", "empty_d1_streak")
    }
    return FilterState(
        budget=jnp.float32(budget),
        price=jnp.float32(0),
        rho_num=jnp.int32(rho.numerator),
        rho_den=jnp.int32(rho.denominator),
        **totals,
    )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    reward: RewardState,
    filter: FilterState,
    averaged: bool = False,
) -> TrainState:
    """The TrainState before the first step, nothing frozen; averaged: with an `average`."""
    counters = {
        name: zero() for name in ("step", "empty_updates", "nonfinite_updates", "nonfinite_streak")
    }
    average = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params) if averaged else None
    opt_state = optimizer.init(params)
    return TrainState(
        params=params,
        opt_state=opt_state,
        reward=reward,
        filter=filter,
        average=average,
        **counters,
    )


# --------------------------------------------------------------------------------------------------- reward


def reward(
    state: RewardState,
    correct: jax.Array,
    called: jax.Array,
    formatted: jax.Array,
    cloud_correct: jax.Array,
) -> tuple[jax.Array, RewardState]:
    """Hierarchical reward r f32[Q, G] (paper, section 4.1) from bool[Q, G] verdicts and
    cloud_correct bool[Q].

    local and right: alpha_a (+ alpha_f if well formed); called and the cloud right: alpha_c; local,
    wrong, well
    formed: alpha_f; anything else: 0.
    """
    a, c, f = state.alphas
    by_call = jnp.where(cloud_correct[:, None], 2, 4)
    by_answer = jnp.where(correct, jnp.where(formatted, 0, 1), jnp.where(formatted, 3, 4))
    outcome = jnp.where(called, by_call, by_answer)
    r = jnp.stack([a + f, a, c, f, jnp.zeros_like(a)])[outcome]
    return r, state.replace(
        counts=state.counts + jnp.bincount(outcome.reshape(-1), length=5).astype(jnp.int32)
    )


# --------------------------------------------------------------------------------------------------- filter


def classes(
    correct: jax.Array, cloud_correct: jax.Array, cloud_known: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(D1, D2) bool[Q]: some response is right on the device; none is, and the cloud is known to be
    right.
    """
    solved = correct.any(axis=1)
    return solved & cloud_known, ~solved & cloud_correct & cloud_known


def prompt_filter(
    state: FilterState,
    r: jax.Array,
    correct: jax.Array,
    cloud_correct: jax.Array,
    cloud_known: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, FilterState]:
    """keep bool[Q] (paper, section 4.3): all of D1, and of D2 a random part of n = floor(rho |D1| +
    carry) prompts.

    Membership is by correctness, never by the reward r f32[Q, G]. So sum |D2 kept| <= rho * sum
    |D1| over the whole run. The fraction of n that is cut off is carried; a quota that found no D2
    prompt is not. Whoever calls this with the same key, on any device, keeps the same prompts.
    """
    del r
    d1, d2 = classes(correct, cloud_correct, cloud_known)
    keep, carry = within_quota(state, d1, d2, key)
    return keep, tally(state, d1, d2, keep, correct.any(axis=1)).replace(carry=carry)


def within_quota(
    state: FilterState, d1: jax.Array, d2: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """keep bool[Q] and the new carry i32[]: all of d1, and of d2 as many as the quota pays for.

    d1, d2: bool[Q]. The quota is rho |d1| and what was carried; the d2 prompts are drawn at random.
    """
    quota = state.rho_num * d1.sum() + state.carry  # in units of 1 / rho_den
    draw = jnp.where(d2, jax.random.uniform(key, d2.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(draw))
    keep = d1 | (d2 & (rank < quota // state.rho_den))
    return keep, (quota % state.rho_den).astype(jnp.int32)


def tally(
    state: FilterState, d1: jax.Array, d2: jax.Array, keep: jax.Array, solved: jax.Array
) -> FilterState:
    """Returns the state with the totals after one more batch; all arguments bool[Q].

    solved: prompts with a right response of the device, whether or not their verdicts are known.
    `empty_d1_streak` grows only where none is solved. Where some are, but D1 is empty since the
    cloud's verdict on each of them is unknown (an outage), the step says nothing of the model, and
    the streak stays as it is.
    """
    count = lambda mask: mask.sum().astype(jnp.int32)  # noqa: E731
    streak = jnp.where(solved.any(), state.empty_d1_streak, state.empty_d1_streak + 1)
    return state.replace(
        prompts=state.prompts + d1.size,
        d1=state.d1 + count(d1),
        d2=state.d2 + count(d2),
        kept=state.kept + count(keep),
        kept_d2=state.kept_d2 + count(keep & d2),
        empty_d1_streak=jnp.where(d1.any(), 0, streak),
    )


# ------------------------------------------------------------------------------------------ advantage and loss


def advantage(r: jax.Array, mask: jax.Array) -> jax.Array:
    """Leave-one-out advantage f32[Q, G] of r f32[Q, G]: r_i - mean of the others = G / (G - 1) *
    (r_i - mean r).

    It weighs the sum of a response's log-probabilities, so the responses' mask bool[Q, G, T] does
    not matter here. With the mean over the group in `loss` this is the paper's estimator, 1 / (G -
    1) sum_i grad log pi(y_i) (r_i - mean r).
    """
    del mask
    G = r.shape[1]
    A = (r - r.mean(axis=1, keepdims=True)) * (G / (G - 1))
    return jnp.where(
        (r == r[:, :1]).all(axis=1, keepdims=True), 0.0, A
    )  # exactly, whatever rounding makes of the mean


def loss(logp: jax.Array, mask: jax.Array, advantage: jax.Array, group: int) -> jax.Array:
    """-(1 / G) sum_i A_i log pi(y_i | x) over any responses i of groups of `group` = G, so summed
    over prompts.

    logp f32[..., T], mask bool[..., T] (EOS in), advantage f32[...]; log pi is the sum over the
    response's own tokens. The gradient over whole groups is the policy gradient.
    """
    return -jnp.sum(advantage * jnp.sum(logp * mask, axis=-1)) / group


# ------------------------------------------------------------------------------------------------ algorithm


def no_control(
    reward: RewardState, filter: FilterState, call_rate: jax.Array
) -> tuple[RewardState, FilterState]:
    """The weights stay what they are: GAPG holds calls down by its filter alone."""
    del call_rate
    return reward, filter


class Algorithm(NamedTuple):
    """The parts of a step, all pure.

    control: after each step, from that step's share of calls f32[] among the responses that might
    call.
    """

    reward: Callable  # (RewardState, correct, called, formatted, cloud_correct) -> r f32[Q, G], RewardState
    advantage: Callable  # (r f32[Q, G], mask bool[Q, G, T]) -> f32[Q, G], weight of each response's summed log-prob
    prompt_filter: Callable  # (FilterState, r, correct, cloud_correct, cloud_known, key) -> keep bool[Q], FilterState
    control: Callable  # (RewardState, FilterState, call_rate) -> RewardState, FilterState


GAPG = Algorithm(reward, advantage, prompt_filter, no_control)

# ----------------------------------------------------------------------------------------------------- step
