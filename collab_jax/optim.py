"""The optimizer: AdamW behind a global-norm clip, with a linear warm-up."""

import jax
import optax


def make_schedule(learning_rate: float, warmup_steps: int, decay_steps: int | None) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then constant, or cosine to 0 at `decay_steps`."""
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    if decay_steps is None:
        return optax.join_schedules([warmup, optax.constant_schedule(learning_rate)], [warmup_steps])
    cosine = optax.cosine_decay_schedule(learning_rate, max(decay_steps - warmup_steps, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def make_optimizer(schedule: optax.Schedule, weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """Clip to `clip_norm`, then AdamW (no decay on vectors: norms and biases)."""

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
