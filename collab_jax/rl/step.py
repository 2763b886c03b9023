"""One training step: the gradient of the kept prompts, and the update of the whole state.

`make_step` gives the body of one device. It reads from top to bottom: what is learnt from
(`signal.py`), who computes what (`deal`), the gradient (`policy_gradient`), the update (`updated`),
and what a reader of the run sees (`step_metrics`). Axis letters: see `gapg.py`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from collab_jax import gapg
from collab_jax.gapg import Algorithm, Rollout, TrainState
from collab_jax.models import decoder, logprobs, lora
from collab_jax.models.decoder import ROWS, DecoderConfig, Params, Segment
from collab_jax.rl import scoring
from collab_jax.rl.scoring import Scored
from collab_jax.rl.signal import Signal, has_gradient, learning_signal

# A body of one device: (state, rollout, key) -> state, metrics.
StepBody = Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
# Of n prompts: last hidden states [n, 1, 1, E], and their segment; ROWS is axis n of every leaf.
KeysValues = tuple[jax.Array, Segment]


def cut_lengths(max_new: int, count: int) -> tuple[int, ...]:
    """About `count` lengths that ascend evenly to `max_new`, multiples of 8 except the last."""
    step = -(-max_new // (8 * count)) * 8
    return (*range(step, max_new, step), max_new)


# ----------------------------------------------------------------------------------------- gradient


class Share(NamedTuple):
    """One device's share of a step, and how it is computed."""

    cfg: DecoderConfig
    frozen: Params | None  # the model that the trained adapter belongs to
    batch: Rollout  # of all devices, Q prompts
    A: jax.Array  # f32[Q, G], advantages
    scored: Scored | None  # the weights of its decisions, where they are scored
    prompts: jax.Array  # i32[P], which prompts of the batch; the first `n_prompts` count
    n_prompts: jax.Array  # i32[]
    micro_rows: int  # responses in one backward pass
    lengths: tuple[int, ...]  # to which responses are cut; they ascend to T
    temperature: float
    chunk: int  # columns of logits that are held at once


class Rows(NamedTuple):
    """The B = P * G responses of a device, and the order in which they are computed."""

    place: jax.Array  # i32[B], of the response's prompt in the device's list
    member: jax.Array  # i32[B], of its group
    length: jax.Array  # i32[B], in tokens; 0 for a response without a gradient
    order: jax.Array  # i32[B and some padding], the longest first

    @property
    def count(self) -> jax.Array:
        """How many have a gradient, i32[]."""
        return (self.length > 0).sum()


class Sums(NamedTuple):
    """What is summed over the responses that are computed so far."""

    grads: Params  # f32, by the trained parameters
    dkv: KeysValues  # f32, by what the prompts leave: last hidden states, keys and values
    drift: jax.Array  # f32[], |log p recomputed - log p sampled|, over tokens
    worst: jax.Array  # f32[], its maximum


def policy_gradient(params: Params, share: Share) -> tuple[Params, jax.Array, jax.Array]:
    """The gradient of the loss by params over the share; and the drift: its sum, its maximum.

    Drift is |log p recomputed - log p sampled| of the tokens of the responses that are computed.

    Each prompt is computed once, in a pass of its own: the keys and values that it leaves are an
    input to the responses, so the gradient comes back through them (`dkv`). The responses go
    longest first, `micro_rows` at a time, and each such micro-batch is cut to the shortest of
    `lengths` that holds it. So a response costs what its length costs; responses without an
    advantage, and prompts after the first `n_prompts`, cost nothing.
    """
    P = share.prompts.shape[0]
    size = min(P, share.micro_rows)  # prompts in one micro-batch
    # What a micro-batch holds after the first `n_prompts` is computed and never used.
    share = share._replace(prompts=jnp.pad(share.prompts, (0, -P % size)))
    prompt_rounds = (share.n_prompts + size - 1) // size
    kv = prefill_prompts(params, share, prompt_rounds, size)

    rows = longest_first(share, P)
    row_rounds = (rows.count + share.micro_rows - 1) // share.micro_rows
    start = Sums(
        dkv=jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kv),
        grads=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        drift=jnp.float32(0),
        worst=jnp.float32(0),
    )
    add = functools.partial(add_micro_batch, params=params, share=share, kv=kv, rows=rows)
    sums = jax.lax.fori_loop(0, row_rounds, add, start)
    grads = pull_back(sums, params, share, kv, prompt_rounds, size)
    return grads, sums.drift, sums.worst


def prefill(params: Params, share: Share, i: jax.Array | int, size: int) -> KeysValues:
    """Computes the prompts of micro-batch number i, `size` of them."""
    at = jax.lax.dynamic_slice(share.prompts, (i * size,), (size,))
    whole = lora.join(share.frozen, params)
    batch = share.batch
    last, segment = decoder.prefill(whole, share.cfg, batch.prompts[at], batch.prompt_mask[at])
    return last[:, None, None], segment


def prefill_prompts(params: Params, share: Share, rounds: jax.Array, size: int) -> KeysValues:
    """What all prompts of the share leave, by place in the list; zeros after `rounds` rounds."""

    def store(i, whole: KeysValues) -> KeysValues:
        put = lambda w, part: jax.lax.dynamic_update_slice_in_dim(w, part, i * size, ROWS)  # noqa: E731
        return jax.tree.map(put, whole, prefill(params, share, i, size))

    n = share.prompts.shape[0]
    shapes = jax.eval_shape(lambda p: prefill(p, share, 0, size), params)
    of_all = lambda x: (*x.shape[:ROWS], n, *x.shape[ROWS + 1 :])  # noqa: E731
    empty = jax.tree.map(lambda x: jnp.zeros(of_all(x), x.dtype), shapes)
    return jax.lax.fori_loop(0, rounds, store, empty)


def longest_first(share: Share, P: int) -> Rows:
    """The responses of the first P prompts of the share, those with a gradient by length."""
    G = share.batch.tokens.shape[1]
    place, member = jnp.divmod(jnp.arange(P * G), G)
    tokens = share.batch.mask[share.prompts[place], member].sum(1)
    teaches = has_gradient(share.A, share.scored)[share.prompts[place], member]
    length = tokens * (place < share.n_prompts) * teaches
    order = jnp.pad(jnp.argsort(-length, stable=True), (0, -(P * G) % share.micro_rows))
    return Rows(place, member, length, order)


def add_micro_batch(
    i: jax.Array, sums: Sums, *, params: Params, share: Share, kv: KeysValues, rows: Rows
) -> Sums:
    """The sums with those of micro-batch number i of the rows."""
    m = share.micro_rows
    chosen = jax.lax.dynamic_slice(rows.order, (i * m,), (m,))
    weight = (i * m + jnp.arange(m) < rows.count).astype(jnp.float32)
    prompt, member = share.prompts[rows.place[chosen]], rows.member[chosen]

    def cut_to(width: int):
        return responses_gradient(
            params, share, kv, rows.place, chosen, prompt, member, weight, width
        )

    shortest = jnp.searchsorted(jnp.array(share.lengths), rows.length[chosen[0]])
    (grads, dkv), (drift, worst) = jax.lax.switch(
        shortest, [functools.partial(cut_to, width) for width in share.lengths]
    )
    spread = lambda whole, part: whole.at[..., rows.place[chosen], :, :, :].add(part)  # noqa: E731
    dkv = jax.tree.map(spread, sums.dkv, dkv)
    grads = jax.tree.map(jnp.add, sums.grads, grads)
    return Sums(grads, dkv, sums.drift + drift, jnp.maximum(sums.worst, worst))


def responses_gradient(
    params: Params,
    share: Share,
    kv: KeysValues,
    place: jax.Array,
    chosen: jax.Array,
    prompt: jax.Array,
    member: jax.Array,
    weight: jax.Array,
    width: int,
) -> tuple[tuple[Params, KeysValues], tuple[jax.Array, jax.Array]]:
    """The gradients of the loss by params and kv over m responses; and the drift's sum and max.

    The loss is `gapg.loss`, and `scoring.loss` where decisions are scored.

    chosen i32[m]: the rows of the responses, cut to `width` tokens; place i32[B]: the places of
    their prompts in kv. prompt, member i32[m]: where they lie in the batch. weight f32[m]: 0 for
    padding.
    """
    batch = share.batch
    rows = batch.tokens, batch.mask, batch.logp, batch.barred
    tokens, mask, sampled, barred = jax.tree.map(lambda x: x[prompt, member][:, :width], rows)

    def objective(params: Params, kv: KeysValues):
        last, segment = kv
        whole, cfg, group = lora.join(share.frozen, params), share.cfg, batch.tokens.shape[1]
        hidden = logprobs.continued_hidden(
            whole, cfg, last[:, 0, 0], segment, batch.prompt_mask[prompt], tokens
        )
        decided = jnp.float32(0)
        if share.scored is None:
            logp = logprobs.token_logprobs(
                whole, cfg, hidden, tokens, share.temperature, share.chunk
            )
        else:
            logp, odds = logprobs.barred_scores(
                whole, cfg, hidden, tokens, barred, share.temperature, share.chunk
            )
            call, answer = (x[prompt, member] * weight for x in share.scored)
            decided = scoring.loss(odds, barred >= 0, call, answer) / group
        drift = jnp.abs(logp - sampled) * mask * weight[:, None]
        advantage = share.A[prompt, member] * weight
        return gapg.loss(logp, mask, advantage, group) + decided, (drift.sum(), drift.max())

    own_kv = jax.tree.map(lambda x: x[..., place[chosen], :, :, :], kv)
    return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, own_kv)


def pull_back(
    sums: Sums, params: Params, share: Share, kv: KeysValues, rounds: jax.Array, size: int
) -> Params:
    """The gradient by params: of the responses, and through `dkv` of the prompts before them."""

    def add(i, grads: Params) -> Params:
        _, pull = jax.vjp(lambda p: prefill(p, share, i, size), params)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=ROWS)
        cut = lambda x, y: take(x, i * size).astype(y.dtype)  # noqa: E731
        return jax.tree.map(jnp.add, grads, pull(jax.tree.map(cut, sums.dkv, kv))[0])

    return jax.lax.fori_loop(0, rounds, add, sums.grads)


# --------------------------------------------------------------------------------------------- step


def deal(signal: Signal, batch: Rollout, axis: str) -> tuple[jax.Array, jax.Array]:
    """(prompts i32[Q / D], n_prompts i32[]): what this device computes; the first n_prompts count.

    Prompts with a gradient are dealt like cards, those with most tokens first, so that devices have
    about the same work.
    """
    D, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    work = signal.learnable * batch.mask.sum((1, 2))
    dealt = jnp.argsort(-work, stable=True).reshape(work.shape[0] // D, D)[:, me]
    return dealt, (signal.learnable.sum() - me + D - 1) // D


def updated(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    grads: Params,
    norm: jax.Array,
    kept: jax.Array,
    signal: Signal,
    average: float,
) -> TrainState:
    """The state after one step; without a kept prompt or a finite gradient, params stay."""
    finite = jnp.isfinite(norm)
    applies = finite & (kept > 0)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    either = lambda new, old: jax.tree.map(lambda a, b: jnp.where(applies, a, b), new, old)  # noqa: E731
    params = either(optax.apply_updates(state.params, updates), state.params)
    decay = jnp.float32(average)
    # 1 at the first step: the start is no part of the average.
    fresh = (1 - decay) / (1 - decay ** (state.step + 1))
    blend = lambda a, p: a + fresh * (p - a)  # noqa: E731
    return state.replace(
        step=state.step + 1,
        params=params,
        average=None if state.average is None else jax.tree.map(blend, state.average, params),
        opt_state=either(opt_state, state.opt_state),
        reward=signal.reward,
        filter=signal.filter,
        empty_updates=state.empty_updates + (kept == 0),
        nonfinite_updates=state.nonfinite_updates + ~finite,
        # A step without a gradient says nothing about the weights' health.
        nonfinite_streak=jnp.where(
            finite, state.nonfinite_streak * ~signal.learnable.any(), state.nonfinite_streak + 1
        ),
    )


def step_metrics(
    batch: Rollout,
    signal: Signal,
    state: TrainState,
    new: TrainState,
    kept: jax.Array,
    norm: jax.Array,
    drift: jax.Array,
    worst: jax.Array,
) -> dict[str, jax.Array]:
    """The metrics of a step from `state` to `new`; all are scalars, over all devices."""
    # Tokens that were computed: drift is their mean.
    teaches = signal.learnable[:, None] & has_gradient(signal.A, signal.scored)
    tokens = jnp.sum(batch.mask * teaches[..., None])
    d1, d2 = gapg.classes(batch.correct, batch.cloud_correct, batch.cloud_known)
    all_called = signal.calls.all(axis=1)
    log_p = jnp.sum(batch.logp * batch.mask)
    return {
        "reward": signal.r.mean(),
        "local_accuracy": batch.correct.mean(),  # of all responses, calls included
        **({} if batch.grade is None else {"local_grade": batch.grade.mean()}),
        "call_rate": signal.call_rate,
        **_by_budget(state, signal, batch.level),
        "alpha_c": state.reward.alphas[..., 1].mean(),  # what a right call earned
        "price": signal.price,  # what a call was charged
        "formatted": batch.formatted.mean(),
        "d1": d1.sum(),
        "d2": d2.sum(),
        "d2_called": (d2 & signal.calls.any(axis=1)).sum(),  # from these the call can be learnt
        "kept": kept,
        "dropped": signal.keep.shape[0] - kept,
        "no_signal": (signal.keep & ~signal.learnable).sum(),  # kept groups of equal rewards
        "all_called": (signal.keep & all_called).sum(),  # of those, the ones that spent quota
        "grad_norm": norm,  # before it is scaled to 1
        "entropy": -log_p / batch.mask.sum(),  # nats a token, estimated by the samples
        "drift": drift / jnp.maximum(tokens, 1),  # mean |log p recomputed - log p sampled|
        "drift_max": worst,
        "tokens": batch.mask.sum(),
        "empty_updates": new.empty_updates,
        "nonfinite_updates": new.nonfinite_updates,
        "nonfinite_streak": new.nonfinite_streak,
        "empty_d1_streak": new.filter.empty_d1_streak,
    }


def _by_budget(state: TrainState, signal: Signal, level: jax.Array | None) -> dict[str, jax.Array]:
    """What differs between the budgets that are shown, numbered in their order."""
    if level is None:
        return {}
    alphas = state.reward.alphas[:, 1]
    return {
        **{f"call_rate_{i}": rate for i, rate in enumerate(signal.call_rates)},
        **{f"alpha_c_{i}": alpha for i, alpha in enumerate(alphas)},
    }


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
) -> StepBody:
    """step(state, rollout, key) -> state, metrics: the body of one device, under the axis `axis`.

    The rollout is this device's share [P, ...]; state, key and results are the same on all devices.
    Every device sees all the verdicts, so that all draw the same subset; the kept prompts that have
    a gradient are then dealt out evenly. Prompts that were dropped, or whose responses all earned
    the same, cost nothing. `lengths`, to which responses are cut, ascend to T. average: the decay
    of the state's `average`, where it has one, in [0, 1).
    """

    def body(state: TrainState, rollout: Rollout, key: jax.Array):
        # Tokens are small beside the work they cause, so everything is gathered, and each device
        # takes what it is dealt.
        batch: Rollout = jax.lax.all_gather(rollout, axis, tiled=True)
        signal = learning_signal(algorithm, state, batch, key)
        prompts, n_prompts = deal(signal, batch, axis)
        share = Share(
            cfg=cfg,
            frozen=state.frozen,
            batch=batch,
            A=signal.A,
            scored=signal.scored,
            prompts=prompts,
            n_prompts=n_prompts,
            micro_rows=micro_rows,
            lengths=lengths,
            temperature=temperature,
            chunk=chunk,
        )
        grads, drift, worst = policy_gradient(state.params, share)
        # Sums and counts travel apart and are divided once: devices hold different numbers of kept
        # prompts.
        grads, drift = jax.lax.psum((grads, drift), axis)
        worst = jax.lax.pmax(worst, axis)
        kept = signal.keep.sum()
        grads = jax.tree.map(lambda g: g / jnp.maximum(kept, 1), grads)
        norm = optax.tree.norm(grads)
        new_state = updated(state, optimizer, grads, norm, kept, signal, average)
        return new_state, step_metrics(batch, signal, state, new_state, kept, norm, drift, worst)

    return body
