"""One training step: the gradient of the kept prompts, and the update of the whole state."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from collab_jax import gapg
from collab_jax.gapg import Algorithm, Rollout, TrainState
from collab_jax.models import decoder, logprobs, lora
from collab_jax.models.decoder import DecoderConfig, Params


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
                logp = logprobs.continued_logprobs(
                    whole, cfg, *kv, seen, tokens, temperature, chunk, barred
                )
                drift = jnp.abs(logp - sampled) * mask * weight[:, None]
                return gapg.loss(logp, mask, A[at] * weight, G), (drift.sum(), drift.max())

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
        d1, d2 = gapg.classes(batch.correct, batch.cloud_correct, batch.cloud_known)
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
