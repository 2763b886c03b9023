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

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from collab_jax.models import decoder, lora
from collab_jax.models.decoder import DecoderConfig, Params

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
    empty_d1_streak: jax.Array  # steps in a row without a D1 prompt


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
    def learnt(self) -> Params:
        """What the run delivers: the averaged `params` where they are kept, in the type of the
        others, or these.
        """
        if self.average is None:
            return self.params
        return jax.tree.map(lambda a, p: a.astype(p.dtype), self.average, self.params)

    @property
    def policy(self) -> Params:
        """The whole model that the run delivers."""
        return lora.join(self.frozen, self.learnt)

    @property
    def behaviour(self) -> Params:
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
    return within_quota(state, *classes(correct, cloud_correct, cloud_known), key)


def within_quota(
    state: FilterState, d1: jax.Array, d2: jax.Array, key: jax.Array
) -> tuple[jax.Array, FilterState]:
    """keep bool[Q]: all of d1 bool[Q], and of d2 bool[Q] as many as rho |d1| and what was carried
    pay for, at random.
    """
    quota = state.rho_num * d1.sum() + state.carry  # in units of 1 / rho_den
    draw = jnp.where(d2, jax.random.uniform(key, d2.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(draw))
    keep = d1 | (d2 & (rank < quota // state.rho_den))
    return keep, tally(state, d1, d2, keep).replace(carry=(quota % state.rho_den).astype(jnp.int32))


def tally(state: FilterState, d1: jax.Array, d2: jax.Array, keep: jax.Array) -> FilterState:
    """The totals after one more batch."""
    count = lambda mask: mask.sum().astype(jnp.int32)  # noqa: E731
    return state.replace(
        prompts=state.prompts + d1.size,
        d1=state.d1 + count(d1),
        d2=state.d2 + count(d2),
        kept=state.kept + count(keep),
        kept_d2=state.kept_d2 + count(keep & d2),
        empty_d1_streak=jnp.where(d1.any(), 0, state.empty_d1_streak + 1),
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


def cut_lengths(max_new: int, count: int) -> tuple[int, ...]:
    """About `count` lengths that ascend evenly to T = `max_new`, all but the last multiples of 8."""
    step = -(-max_new // (8 * count)) * 8
    return (*range(step, max_new, step), max_new)


def policy_gradient(
    params: Params,
    frozen: Params | None,
    cfg: DecoderConfig,
    batch: Rollout,
    A: jax.Array,
    prompts: jax.Array,
    mine: jax.Array,
    *,
    micro_rows: int,
    lengths: tuple[int, ...],
    temperature: float,
    chunk: int,
) -> tuple[Params, jax.Array, jax.Array]:
    """Gradient of `loss` by `params`, which act joined with `frozen`, over the first `mine` of
    `prompts` i32[P], which index `batch` and A f32[Q, G]; and the sum and the largest of |log p
    recomputed - log p sampled| of those prompts' tokens.

    Each prompt is computed once, in a pass of its own: the keys and values that it leaves are an
    input to the responses, so the gradient comes back through them (`dkv`). The responses go
    longest first, `micro_rows` at a time, and each such micro-batch is cut to the shortest of
    `lengths` that holds it. A response costs what its length costs; rows without an advantage, or
    prompts past `mine`, cost nothing.
    """
    G = batch.tokens.shape[1]
    P, m = prompts.shape[0], micro_rows
    c = min(P, m)  # prompts of one micro-batch
    prompts = jnp.pad(
        prompts, (0, -P % c)
    )  # what a micro-batch holds past `mine` is computed and never used
    prompt_rounds = (mine + c - 1) // c

    def prefill(params, i):
        at = jax.lax.dynamic_slice(prompts, (i * c,), (c,))
        return decoder.prefill(
            lora.join(frozen, params), cfg, batch.prompts[at], batch.prompt_mask[at]
        )

    def store(i, whole):
        put = lambda w, part: jax.lax.dynamic_update_slice_in_dim(w, part, i * c, axis=0)  # noqa: E731
        return jax.tree.map(put, whole, prefill(params, i))

    shapes = jax.eval_shape(prefill, params, 0)
    empty = jax.tree.map(lambda x: jnp.zeros((prompts.shape[0], *x.shape[1:]), x.dtype), shapes)
    kv = jax.lax.fori_loop(
        0, prompt_rounds, store, empty
    )  # (last hidden states, Segment), by place in `prompts`

    place, of = jnp.divmod(jnp.arange(P * G), G)  # a row's place in `prompts` and in its group
    long = batch.mask[prompts[place], of].sum(1) * (place < mine) * (A[prompts[place], of] != 0)
    order = jnp.pad(jnp.argsort(-long, stable=True), (0, -(P * G) % m))
    rounds = ((long > 0).sum() + m - 1) // m

    def rows(i, total):
        chosen = jax.lax.dynamic_slice(order, (i * m,), (m,))
        weight = (i * m + jnp.arange(m) < (long > 0).sum()).astype(jnp.float32)
        at = prompts[place[chosen]], of[chosen]

        def cut(width):
            rows = batch.tokens, batch.mask, batch.logp, batch.barred
            tokens, mask, sampled, barred = jax.tree.map(lambda x: x[at][:, :width], rows)

            def objective(params, kv):
                whole, seen = lora.join(frozen, params), batch.prompt_mask[at[0]]
                logp = decoder.continued_logprobs(
                    whole, cfg, *kv, seen, tokens, temperature, chunk, barred
                )
                drift = jnp.abs(logp - sampled) * mask * weight[:, None]
                return loss(logp, mask, A[at] * weight, G), (drift.sum(), drift.max())

            mine_kv = jax.tree.map(lambda x: x[place[chosen]], kv)
            return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, mine_kv)

        fitting = jnp.searchsorted(jnp.array(lengths), long[chosen[0]])
        (grads, dkv), (drift, worst) = jax.lax.switch(
            fitting, [functools.partial(cut, width) for width in lengths]
        )
        spread = jax.tree.map(lambda w, part: w.at[place[chosen]].add(part), total[1], dkv)
        return (
            jax.tree.map(jnp.add, total[0], grads),
            spread,
            total[2] + drift,
            jnp.maximum(total[3], worst),
        )

    dkv = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), kv
    )  # a sum over rows, like `grads`
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), dkv
    grads, dkv, drift, worst = jax.lax.fori_loop(
        0, rounds, rows, (*zeros, jnp.float32(0), jnp.float32(0))
    )

    def back(i, grads):
        _, pull = jax.vjp(lambda p: prefill(p, i), params)
        part = jax.tree.map(
            lambda x, y: jax.lax.dynamic_slice_in_dim(x, i * c, c).astype(y.dtype), dkv, kv
        )
        return jax.tree.map(jnp.add, grads, pull(part)[0])

    return jax.lax.fori_loop(0, prompt_rounds, back, grads), drift, worst


def make_step(
    cfg: DecoderConfig,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    *,
    axis: str,
    micro_rows: int,
    lengths: tuple[int, ...],
    temperature: float,
    chunk: int,
    average: float = 0.0,
) -> Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, rollout, key) -> state, metrics: the body of one device under an axis named
    `axis`.

    The rollout is this device's share [P, ...]; state, key and results are the same on all devices.
    Every device sees all the verdicts, so that all draw the same subset; the kept prompts that have
    a gradient are then dealt out evenly, the longest first. Prompts that were dropped, or whose
    responses all earned the same, cost nothing. `lengths`, to which responses are cut, ascend to T.
    average: decay of the state's `average`, where it has one, in [0, 1).
    """

    def body(state: TrainState, rollout: Rollout, key: jax.Array):
        D, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
        # Tokens are small beside the work they cause, so everything is gathered and each device
        # takes what it is dealt.
        batch: Rollout = jax.lax.all_gather(rollout, axis, tiled=True)
        verdicts = batch.correct, batch.called, batch.formatted
        r, reward_state = algorithm.reward(state.reward, *verdicts, batch.cloud_correct)
        verdicts = batch.correct, batch.cloud_correct, batch.cloud_known
        keep, filter_state = algorithm.prompt_filter(state.filter, r, *verdicts, key)
        cost, price = batch.called.astype(jnp.float32), state.filter.price
        A = algorithm.advantage(r, batch.mask) - price * algorithm.advantage(cost, batch.mask)
        signal = keep & (A != 0).any(axis=1)
        free = (
            jnp.ones_like(batch.called) if batch.barred is None else (batch.barred < 0).all(axis=2)
        )  # might call
        call_rate = cost.sum() / free.sum()
        reward_state, filter_state = algorithm.control(reward_state, filter_state, call_rate)

        Q = keep.shape[0]
        work = signal * batch.mask.sum((1, 2))  # a prompt's tokens
        dealt = jnp.argsort(-work, stable=True).reshape(Q // D, D)[:, me]  # like cards
        mine = (signal.sum() - me + D - 1) // D
        grads, drift, worst = policy_gradient(
            state.params,
            state.frozen,
            cfg,
            batch,
            A,
            dealt,
            mine,
            micro_rows=micro_rows,
            lengths=lengths,
            temperature=temperature,
            chunk=chunk,
        )
        # Sums and counts travel apart and are divided once: devices hold different numbers of kept
        # prompts.
        grads, drift = jax.lax.psum((grads, drift), axis)
        kept = keep.sum()
        grads = jax.tree.map(lambda g: g / jnp.maximum(kept, 1), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        applies = finite & (kept > 0)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        either = lambda new, old: jax.tree.map(lambda a, b: jnp.where(applies, a, b), new, old)  # noqa: E731
        tokens = jnp.sum(batch.mask * (signal[:, None] & (A != 0))[..., None])  # that were computed
        params = either(optax.apply_updates(state.params, updates), state.params)
        decay = jnp.float32(average)
        fresh = (1 - decay) / (
            1 - decay ** (state.step + 1)
        )  # 1 at first: the start is no part of it
        blend = lambda a, p: a + fresh * (p - a)  # noqa: E731
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            average=None if state.average is None else jax.tree.map(blend, state.average, params),
            opt_state=either(opt_state, state.opt_state),
            reward=reward_state,
            filter=filter_state,
            empty_updates=state.empty_updates + (kept == 0),
            nonfinite_updates=state.nonfinite_updates + ~finite,
            # A step without a gradient says nothing of the weights' health.
            nonfinite_streak=jnp.where(
                finite, state.nonfinite_streak * ~signal.any(), state.nonfinite_streak + 1
            ),
        )
        d1, d2 = classes(batch.correct, batch.cloud_correct, batch.cloud_known)
        metrics = {
            "reward": r.mean(),
            "local_accuracy": batch.correct.mean(),  # of all responses, calls included
            "call_rate": call_rate,
            "alpha_c": state.reward.alphas[1],  # what a right call earned
            "price": price,  # what a call was charged
            "formatted": batch.formatted.mean(),
            "d1": d1.sum(),
            "d2": d2.sum(),
            "d2_called": (d2 & batch.called.any(axis=1)).sum(),  # from these the call can be learnt
            "kept": kept,
            "dropped": Q - kept,
            "no_signal": (keep & ~signal).sum(),  # kept groups whose responses all earned the same
            # Of those, the ones that spent quota on calls: all called that might.
            "all_called": (keep & (batch.called == free).all(axis=1)).sum(),
            "grad_norm": norm,  # before clipping
            "entropy": -jnp.sum(batch.logp * batch.mask)
            / batch.mask.sum(),  # nats a token, estimated by the samples
            "drift": drift / jnp.maximum(tokens, 1),  # mean |log p recomputed - log p sampled|
            "drift_max": jax.lax.pmax(worst, axis),
            "tokens": batch.mask.sum(),
            "empty_updates": new_state.empty_updates,
            "nonfinite_updates": new_state.nonfinite_updates,
            "nonfinite_streak": new_state.nonfinite_streak,
            "empty_d1_streak": filter_state.empty_d1_streak,
        }
        return new_state, metrics

    return body
