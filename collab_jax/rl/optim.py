"""The optimizer: AdamW behind a global-norm clip, with a linear warm-up; parameters in float32, or
compensated bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def make_schedule(
    learning_rate: float, warmup_steps: int, decay_steps: int | None
) -> optax.Schedule:
    """Returns the learning rate by step, from 0: a linear warm-up, then constant or a cosine.

    Step i of the warm-up has (i + 1) / warmup_steps of `learning_rate`: an update with a rate of 0
    would spend a batch on nothing. The cosine comes to 0 at `decay_steps`.
    """

    def warmup(step):
        return learning_rate * (step + 1) / max(warmup_steps, 1)

    if decay_steps is None:
        return optax.join_schedules(
            [warmup, optax.constant_schedule(learning_rate)], [warmup_steps]
        )
    cosine = optax.cosine_decay_schedule(learning_rate, max(decay_steps - warmup_steps, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule, weight_decay: float, clip_norm: float, param_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Clip to `clip_norm`, then AdamW (no decay on vectors: norms and biases), for parameters of
    `param_dtype`.
    """

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=matrices, mu_dtype=param_dtype)
    chain = optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
    return chain if param_dtype == "float32" else compensated(chain)


class Compensated(NamedTuple):
    """State of `compensated`: the inner optimizer's, and what rounding has kept from each parameter
    so far, in its type.
    """

    inner: optax.OptState
    owed: optax.Params


def compensated(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for parameters of few bits: Kahan's summation (Zamirai et al. 2020, "Revisiting
    BFloat16 Training").

    Beside a weight of 0.02 bfloat16 rounds a step of 5e-6 away, for ever; here it is owed and paid
    with those that follow. The inner optimizer sees float32, so the second moment, of which a step
    changes a thousandth, is float32 too.
    """

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def rounded(x, dtype):
        # To `dtype` and back would be no rounding on an accelerator, where XLA leaves such pairs
        # out.
        return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)

    def init(params):
        return Compensated(inner.init(wide(params)), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params):
        updates, inner_state = inner.update(wide(grads), state.inner, wide(params))
        wanted = jax.tree.map(jnp.add, updates, wide(state.owed))
        # Exact: both ends are numbers of the parameter's type, and optax adds their difference in
        # float32.
        paid = jax.tree.map(lambda p, w: rounded(p + w, p.dtype) - p, params, wanted)
        owed = jax.tree.map(lambda w, u, p: (w - u).astype(p.dtype), wanted, paid, params)
        return paid, Compensated(inner_state, owed)

    return optax.GradientTransformation(init, update)
