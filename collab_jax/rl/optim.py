"""The optimizer: AdamW behind a bound of the gradient, for parameters in float32 or in bfloat16."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from collab_jax.models import blocks
from collab_jax.runtime import split


def make_schedule(
    learning_rate: float, warmup_steps: int, decay_steps: int | jax.Array | None
) -> optax.Schedule:
    """Returns the learning rate by step, from 0: a linear warm-up, then constant or a cosine.

    Step i of the warm-up has (i + 1) / warmup_steps of `learning_rate`: an update with a rate of 0
    would spend a batch on nothing. The cosine comes to 0 at `decay_steps`, which may be traced: one
    program then serves runs of any length.
    """

    def warmup(step):
        return learning_rate * (step + 1) / max(warmup_steps, 1)

    if decay_steps is None:
        return optax.join_schedules(
            [warmup, optax.constant_schedule(learning_rate)], [warmup_steps]
        )

    def cosine(step):  # optax's takes no traced length
        whole = jnp.maximum(jnp.asarray(decay_steps) - warmup_steps, 1)
        return learning_rate * (0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / whole, 1))))

    return optax.join_schedules([warmup, cosine], [warmup_steps])


def unit_norm() -> optax.GradientTransformation:
    """Every gradient at norm 1; one of zeros stays.

    A policy gradient's size says which sum or mean an algorithm takes, and how many prompts it
    kept, more than how far to go. So its direction is the gradient's and its size the learning
    rate's alone: algorithms whose gradients are parallel make the same update. A clip would act on
    sums over tokens at every step, and on means at none.
    """

    def to_one(grads: optax.Updates, _: optax.Params | None) -> optax.Updates:
        norm = split.norm(grads) + 1e-30  # below every norm, and keeps 0 / 0 away
        return jax.tree.map(lambda g: g / norm, grads)

    return optax.stateless(to_one)


def clipped() -> optax.GradientTransformation:
    """A gradient's norm is at most 1: of a supervised mean loss, whose size means something."""

    def at_most_one(grads: optax.Updates, _: optax.Params | None) -> optax.Updates:
        norm = split.norm(grads)
        return jax.tree.map(lambda g: jnp.where(norm < 1, g, g / norm.astype(g.dtype)), grads)

    return optax.stateless(at_most_one)


def make_optimizer(
    schedule: optax.Schedule,
    weight_decay: float,
    bound: optax.GradientTransformation,
    param_dtype: str = "float32",
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """`bound` (`unit_norm` or `clipped`), then AdamW, for parameters of `param_dtype`.

    momentum: Adam's beta 1. Vectors (norms and biases) have no weight decay. `init` gives arrays of
    the host: whole moments need not fit the device that jax would make them on.
    """
    adamw = optax.adamw(
        schedule, b1=momentum, weight_decay=weight_decay, mask=_matrices, mu_dtype=param_dtype
    )
    chain = optax.chain(bound, adamw)
    made = chain if param_dtype == "float32" else compensated(chain)

    def init(params: optax.Params) -> optax.OptState:
        zeros = lambda x: np.zeros(x.shape, x.dtype)  # noqa: E731
        return jax.tree.map(zeros, jax.eval_shape(made.init, params))  # all of it begins at 0

    return optax.GradientTransformation(init, made.update)


def _matrices(params: optax.Params) -> optax.Params:
    """Which leaves are matrices, in one layer where they have those of all."""
    return jax.tree_util.tree_map_with_path(lambda path, x: blocks.axes(path, x) > 1, params)


class Compensated(NamedTuple):
    """The state of `compensated`."""

    inner: optax.OptState  # of the inner optimizer
    owed: optax.Params  # what rounding has kept from each parameter so far, in its type


def compensated(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for parameters of few bits, with Kahan's summation.

    (Zamirai et al. 2020, "Revisiting BFloat16 Training".) Beside a weight of 0.02, bfloat16 rounds
    every step of 5e-6 away; here such a step is owed, and paid together with those that follow. The
    inner optimizer sees float32, so the second moment, of which a step changes a thousandth, is
    float32 too.
    """

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Conversion to `dtype` and back would not round on an accelerator: XLA leaves such pairs
        # out there.
        return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)

    def init(params: optax.Params) -> Compensated:
        return Compensated(inner.init(wide(params)), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Compensated]:
        inner_updates, inner_state = inner.update(wide(updates), state.inner, wide(params))
        wanted = jax.tree.map(jnp.add, inner_updates, wide(state.owed))
        # Exact: both ends are numbers of the parameter's type, and optax adds their difference in
        # float32.
        paid = jax.tree.map(lambda p, w: rounded(p + w, p.dtype) - p, params, wanted)
        owed = jax.tree.map(lambda w, u, p: (w - u).astype(p.dtype), wanted, paid, params)
        return paid, Compensated(inner_state, owed)

    return optax.GradientTransformation(init, update)
