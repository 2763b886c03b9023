"""Group-level policy gradient (GAPG): the method of the paper, on one page.

The paper is "Collaborative Device-Cloud LLM Inference through Reinforcement Learning" (Fang et al.,
arXiv 2509.24050). A model on a device solves a prompt itself or calls a cloud model. It samples G
responses y_1 .. y_G to each prompt x and learns from their rewards r_1 .. r_G:

    reward (section 4.1)         right on the device: alpha_a, and alpha_f more if well formed;
                                 a call that the cloud answers right: alpha_c;
                                 wrong but well formed: alpha_f; anything else: 0
    gradient (section 4)         1 / (G - 1) sum_i grad log pi(y_i | x) (r_i - mean r)
    constraint (section 4)       E[called] <= rho E[local], with rho = b / (1 - b) for a budget b
    prompt filter (section 4.3)  D1: some response is right on the device
                                 D2: none is, and the cloud is right
                                 update on all of D1 and on at most rho |D1| prompts of D2

One training step, in `rl/step.py`, puts the parts together:

    verdicts [Q, G] --reward--> r [Q, G] --advantage--> A [Q, G] --+
       |                                                           +--loss--> gradient --> Optax
       +-----------prompt_filter--> keep [Q] ----------------------+

All functions here are pure: no I/O, no tokenizer. The parts of a step form an `Algorithm`; GAPG is
the paper's, and `rl/algorithms.py` has those that it is compared with.

Axis letters, used everywhere in this project: D devices, P prompts on a device, Q = D * P prompts
of the global batch, G responses in a group, B = P * G rows, L prompt columns, T response columns,
S = L + T, N query heads, K kv heads, H head width, E width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from collab_jax.models import lora
from collab_jax.models.decoder import Params

# -------------------------------------------------------------------------------------------- state

OUTCOMES = ("correct_formatted", "correct", "called_right", "wrong_formatted", "nothing")


class RewardState(flax.struct.PyTreeNode):
    """The weights of the reward, and how often each outcome has occurred.

    Where prompts show budgets, there is a row of weights for each.
    """

    alphas: jax.Array  # f32[3] or f32[budgets, 3]: alpha_a, alpha_c, alpha_f
    counts: jax.Array  # i32[5], in the order of OUTCOMES


class FilterState(flax.struct.PyTreeNode):
    """The budget, and what the prompt filter has kept so far.

    rho = rho_num / rho_den is exact, so that no rounding adds up. `price` is charged for a call; it
    is a Lagrange multiplier under the control "lagrangian", and 0 under the others. `calls` is the
    last step's share of calls under the control "dual_alpha_c"; it begins at the budget. Where
    prompts show budgets, these three have one number for each of them.
    """

    budget: jax.Array  # f32[] or f32[budgets], share of queries that may be calls
    price: jax.Array  # the same shape, in units of reward
    calls: jax.Array  # the same shape, share of calls in the last step
    rho_num: jax.Array  # i32[]
    rho_den: jax.Array  # i32[]
    carry: jax.Array  # i32[], unused fraction of a prompt, in units of 1 / rho_den
    # Totals over all steps, i32[] each:
    prompts: jax.Array
    d1: jax.Array
    d2: jax.Array
    kept: jax.Array
    kept_d2: jax.Array
    empty_d1_streak: jax.Array  # i32[], steps in a row in which no prompt was solved, up to now


class TrainState(flax.struct.PyTreeNode):
    """All that changes between steps and is saved, the same on every device; and `frozen`.

    params: the parameters that are trained: the whole model, or an adapter. frozen: the model that
    an adapter belongs to, which is neither changed nor saved; None without an adapter. average: the
    mean of the params after each step, where each weighs `optim.average` times as much as the next,
    in f32; None if it is not wanted.
    """

    step: jax.Array  # i32[]
    params: Params
    opt_state: optax.OptState
    reward: RewardState
    filter: FilterState
    empty_updates: jax.Array  # i32[], steps that kept no prompt, and so made no update
    nonfinite_updates: jax.Array  # i32[], steps whose gradient was not finite: no update either
    nonfinite_streak: jax.Array  # i32[], how many of these in a row, up to now
    average: Params | None = None
    frozen: Params | None = None

    @property
    def final_params(self) -> Params:
        """The parameters that the run delivers: `average` in the type of `params`, or `params`."""
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


class Rollout(flax.struct.PyTreeNode):
    """What one step learns from; `rl/rollout.py` draws its layout.

    barred: the token that was disallowed at each place, or -1, and margin: the call's, where it was
    highest; both None if responses were free to call. hidden: the last hidden state there, where
    the decision alone is learnt; else None.
    cloud_known is False only where the cloud's verdict was needed and the cloud failed. Grades are
    None where answers are right or wrong, no more.
    """

    prompts: jax.Array  # i32[Q, L]
    prompt_mask: jax.Array  # bool[Q, L]
    tokens: jax.Array  # i32[Q, G, T]
    logp: jax.Array  # f32[Q, G, T], when sampled
    mask: jax.Array  # bool[Q, G, T]
    correct: jax.Array  # bool[Q, G], answered on the device, and right
    called: jax.Array  # bool[Q, G]
    formatted: jax.Array  # bool[Q, G]
    cloud_correct: jax.Array  # bool[Q], the cloud's verdict where it was needed
    cloud_known: jax.Array  # bool[Q]
    grade: jax.Array | None = None  # f32[Q, G], in [0, 1]: how right the device's answer is
    cloud_grade: jax.Array | None = None  # f32[Q], and the cloud's
    barred: jax.Array | None = None  # i32[Q, G, T]
    margin: jax.Array | None = None  # f32[Q, G], in logits
    hidden: jax.Array | None = None  # [Q, G, E]
    level: jax.Array | None = None  # i32[Q], which budget a prompt shows; None: none is shown


def zero() -> jax.Array:
    """A counter at 0, i32[]."""
    return jnp.zeros((), jnp.int32)


def init_reward(
    alpha_a: float, alpha_c: float, alpha_f: float, shown: Sequence[float] = ()
) -> RewardState:
    """The RewardState before the first step; it needs alpha_a > alpha_c > alpha_f >= 0.

    shown: the budgets that prompts show, if they do.
    """
    alphas = jnp.array([alpha_a, alpha_c, alpha_f], jnp.float32)
    return RewardState(
        alphas=jnp.tile(alphas, (len(shown), 1)) if shown else alphas,
        counts=jnp.zeros(5, jnp.int32),
    )


def rho_of(budget: float) -> Fraction:
    """The ratio cloud : local, b / (1 - b), of a budget b: a share of all queries in [0, 0.999].

    The share is rounded to a denominator of at most 10,000.
    """
    share = Fraction(budget).limit_denominator(10_000)
    return share / (1 - share)


def init_filter(budget: float, shown: Sequence[float] = ()) -> FilterState:
    """The FilterState before the first step, for a budget in [0, 0.999] of all queries.

    shown: the budgets that prompts show, if they do; rho is that of `budget` all the same.
    """
    rho = rho_of(budget)
    budgets = jnp.array(shown if shown else budget, jnp.float32)
    return FilterState(
        budget=budgets,
        price=jnp.zeros_like(budgets),
        calls=budgets,
        rho_num=jnp.int32(rho.numerator),
        rho_den=jnp.int32(rho.denominator),
        carry=zero(),
        prompts=zero(),
        d1=zero(),
        d2=zero(),
        kept=zero(),
        kept_d2=zero(),
        empty_d1_streak=zero(),
    )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    reward: RewardState,
    filter: FilterState,
    averaged: bool = False,
) -> TrainState:
    """The TrainState before the first step, with nothing frozen; `averaged` adds an `average`."""
    return TrainState(
        step=zero(),
        params=params,
        opt_state=optimizer.init(params),
        reward=reward,
        filter=filter,
        empty_updates=zero(),
        nonfinite_updates=zero(),
        nonfinite_streak=zero(),
        average=jax.tree.map(lambda p: p.astype(jnp.float32), params) if averaged else None,
    )


# ------------------------------------------------------------------------------------------- reward


def reward(
    state: RewardState,
    correct: jax.Array,
    called: jax.Array,
    formatted: jax.Array,
    cloud_correct: jax.Array,
    grade: jax.Array | None = None,
    cloud_grade: jax.Array | None = None,
) -> tuple[jax.Array, RewardState]:
    """The hierarchical reward r f32[Q, G] of each response, and the state with its outcome counted.

    The state's alphas are f32[3], or f32[Q, 3] where each prompt has its own. correct, called,
    formatted: bool[Q, G]; cloud_correct: bool[Q]. Paper, section 4.1:

        local, right, well formed       alpha_a + alpha_f
        local, right, format broken     alpha_a
        called, and the cloud is right  alpha_c
        local, wrong, well formed       alpha_f
        anything else                   0

    With grades in [0, 1], grade f32[Q, G] and cloud_grade f32[Q], an answer earns that part of
    alpha_a, a call that part of alpha_c.
    """
    a, c, f = jnp.moveaxis(state.alphas, -1, 0)[..., None]  # f32[1] or f32[Q, 1] each
    by_call = jnp.where(cloud_correct[:, None], 2, 4)
    by_answer = jnp.where(correct, jnp.where(formatted, 0, 1), jnp.where(formatted, 3, 4))
    outcome = jnp.where(called, by_call, by_answer)  # an index of OUTCOMES
    local = correct if grade is None else grade
    cloud = cloud_correct if cloud_grade is None else cloud_grade
    r = jnp.where(called, c * cloud[:, None], a * local + f * formatted)
    return r, state.replace(
        counts=state.counts + jnp.bincount(outcome.reshape(-1), length=5).astype(jnp.int32)
    )


# ----------------------------------------------------------------------------------------- gradient


def advantage(r: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The leave-one-out advantage f32[Q, G] of r f32[Q, G]: r_i - mean of the group's others.

    It equals G / (G - 1) (r_i - mean r). It weighs the sum of a response's log-probabilities, so
    the responses' mask bool[Q, G, T] does not matter here. With the mean over the group in `loss`
    it gives the paper's estimator, 1 / (G - 1) sum_i grad log pi(y_i | x) (r_i - mean r).
    """
    del mask
    G = r.shape[1]
    A = (r - r.mean(axis=1, keepdims=True)) * (G / (G - 1))
    # A group of equal rewards gives exactly 0, whatever rounding makes of their mean.
    return jnp.where((r == r[:, :1]).all(axis=1, keepdims=True), 0.0, A)


def loss(logp: jax.Array, mask: jax.Array, advantage: jax.Array, group: int) -> jax.Array:
    """-(1 / G) sum_i A_i log pi(y_i | x), f32[], over any responses i of groups of `group` = G.

    logp f32[..., T], mask bool[..., T] (EOS in), advantage f32[...]. log pi is the sum over the
    response's own tokens. Over whole groups, its gradient is the policy gradient summed over
    prompts.
    """
    return -jnp.sum(advantage * jnp.sum(logp * mask, axis=-1)) / group


# ------------------------------------------------------------------------------------------- filter


def classes(
    correct: jax.Array, cloud_correct: jax.Array, cloud_known: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(D1, D2) bool[Q] each, of correct bool[Q, G] and cloud_correct, cloud_known bool[Q].

    D1: some response is right on the device. D2: none is, and the cloud is known to be right. A
    prompt whose verdict is unknown is in neither.
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
    """keep bool[Q]: all of D1, and at random n = floor(rho |D1| + carry) prompts of D2.

    Paper, section 4.3. Membership is decided by correctness, never by the reward r f32[Q, G]. So
    the sum of kept D2 prompts is at most rho times the sum of D1 prompts, over the whole run.
    """
    del r
    d1, d2 = classes(correct, cloud_correct, cloud_known)
    keep, carry = within_quota(state, d1, d2, key)
    return keep, tally(state, d1, d2, keep, correct.any(axis=1)).replace(carry=carry)


def within_quota(
    state: FilterState, d1: jax.Array, d2: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """keep bool[Q]: all of d1 bool[Q], and as many of d2 bool[Q] as rho |d1| and the carry pay for.

    Also returns the new carry i32[], in units of 1 / rho_den. Which of d2 are kept is random; every
    device that calls this with the same key keeps the same prompts. The fraction of a prompt that
    is cut off the quota is carried to the next step; a quota that found no d2 prompt is lost.
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


# ---------------------------------------------------------------------------------------- algorithm

# (RewardState, correct, called, formatted, cloud_correct, grade=None, cloud_grade=None)
#     -> r f32[Q, G], RewardState
Reward = Callable[..., tuple[jax.Array, RewardState]]
# (r f32[Q, G], mask bool[Q, G, T]) -> f32[Q, G], the weight of each response's summed log-prob
Advantage = Callable[[jax.Array, jax.Array], jax.Array]
# (FilterState, r, correct, cloud_correct, cloud_known, key) -> keep bool[Q], FilterState
PromptFilter = Callable[
    [FilterState, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    tuple[jax.Array, FilterState],
]
# (RewardState, FilterState, call rate f32[] or f32[budgets]) -> RewardState, FilterState
Control = Callable[[RewardState, FilterState, jax.Array], tuple[RewardState, FilterState]]


class Algorithm(NamedTuple):
    """The parts of a step, all pure.

    control moves weights or price after each step, given the step's call rate: the share of calls
    among the responses that were free to call; of each budget, where prompts show several.
    """

    reward: Reward
    advantage: Advantage
    prompt_filter: PromptFilter
    control: Control


def no_control(
    reward: RewardState, filter: FilterState, call_rate: jax.Array
) -> tuple[RewardState, FilterState]:
    """Both states as they are: GAPG holds calls down by its filter alone."""
    del call_rate
    return reward, filter


GAPG = Algorithm(reward, advantage, prompt_filter, no_control)
