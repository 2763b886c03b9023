"""What the method is compared with, behind `gapg.py`'s signatures; configs name them by these keys."""

import jax
import jax.numpy as jnp

from collab_jax import gapg
from collab_jax.gapg import FilterState


def grpo_advantage(r: jax.Array) -> jax.Array:
    """GRPO's advantage f32[Q, G]: (r_i - mean) / (std + 1e-6) over the group (arXiv 2402.03300).

    The advantage alone, in GAPG's loss, so that its effect is seen apart: with one update for each fresh batch GRPO's ratio
    is 1 and its clip idle, but its mean over each response's tokens and its KL term are left out.
    """
    return (r - r.mean(axis=1, keepdims=True)) / (r.std(axis=1, keepdims=True) + 1e-6)


def no_filter(
    state: FilterState, correct: jax.Array, cloud_correct: jax.Array, cloud_known: jax.Array, key: jax.Array
) -> tuple[jax.Array, FilterState]:
    """Keeps every prompt whose verdicts are known; the totals go on, so that runs compare."""
    del key
    d1, d2 = gapg.classes(correct, cloud_correct, cloud_known)
    keep = jnp.broadcast_to(cloud_known, d1.shape)
    return keep, gapg.tally(state, d1, d2, keep)


ADVANTAGES = {"gapg": gapg.advantage, "grpo": grpo_advantage}
FILTERS = {"d1d2": gapg.prompt_filter, "none": no_filter}
