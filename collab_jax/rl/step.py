"""One training step: the gradient of the kept prompts, and the update of the whole state.

`make_step` gives the body of one device. It reads from top to bottom: what is learnt from
(`signal.py`), who computes what (`deal`), the gradient (`gradient.py`, or that of `scoring.py`
where the decision alone is learnt), the update (`updated`), and what a reader of the run sees
(`step_metrics`). Axis letters: see `gapg.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from collab_jax import gapg
from collab_jax.gapg import Algorithm, Rollout, TrainState
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.rl import scoring
from collab_jax.rl.gradient import Share, policy_gradient
from collab_jax.rl.scoring import Scored
from collab_jax.rl.signal import Signal, has_gradient, learning_signal
from collab_jax.runtime import split

# A body of one device: (state, rollout, key) -> state, metrics.
StepBody = Callable[[TrainState, Rollout, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def deal(signal: Signal, batch: Rollout, axis: str) -> tuple[jax.Array, jax.Array]:
    """(prompts i32[Q / D], n_prompts i32[]): what this device computes; the first n_prompts count.

    Prompts with a gradient are dealt like cards, those with most tokens first, so that devices have
    about the same work.
    """
    D, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    work = signal.learnable * batch.mask.sum((1, 2))
    dealt = jnp.argsort(-work, stable=True).reshape(work.shape[0] // D, D)[:, me]
    return dealt, (signal.learnable.sum() - me + D - 1) // D


def of_device(scored: Scored, axis: str) -> Scored:
    """What the prompts that this device sampled have of a batch's, f32[P, G] each."""
    D, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    return Scored(*(x.reshape(D, -1, *x.shape[1:])[me] for x in scored))


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
    temperature: float,
    chunk: int,
    average: float = 0.0,
) -> StepBody:
    """step(state, rollout, key) -> state, metrics: the body of one device, under the axis `axis`.

    The rollout is this device's share [P, ...]; state, key and results are the same on all devices.
    Every device sees all the verdicts, so that all draw the same subset; the kept prompts that have
    a gradient are then dealt out evenly. Prompts that were dropped, or whose responses all earned
    the same, cost nothing. average: the decay of the state's `average`, where it has one, in
    [0, 1). A rollout that has hidden states teaches the scored decision alone, by the call's row of
    the head.
    """

    def body(state: TrainState, rollout: Rollout, key: jax.Array):
        # Tokens are small beside the work they cause, so everything is gathered, and each device
        # takes what it is dealt.
        gathered = rollout.replace(hidden=None)
        batch: Rollout = jax.lax.all_gather(gathered, axis, tiled=True)
        signal = learning_signal(algorithm, state, batch, key)
        if rollout.hidden is None:
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
                temperature=temperature,
                chunk=chunk,
            )
            grads, drift, worst = policy_gradient(state.params, share)
        else:
            assert signal.scored is not None
            own = of_device(signal.scored, axis)
            grads = scoring.row_gradient(state.params, state.frozen, cfg, rollout, own)
            drift = worst = jnp.float32(0)  # no token is computed again
        # Sums and counts travel apart and are divided once: devices hold different numbers of kept
        # prompts.
        grads, drift = split.summed(grads, axis), split.total(drift, axis)
        worst = jax.lax.pmax(worst, axis)
        kept = signal.keep.sum()
        grads = jax.tree.map(lambda g: g / jnp.maximum(kept, 1), grads)
        norm = split.norm(grads)
        new_state = updated(state, optimizer, grads, norm, kept, signal, average)
        return new_state, step_metrics(batch, signal, state, new_state, kept, norm, drift, worst)

    return body
