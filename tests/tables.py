"""Small records for tests: five prompts by hand, or n random ones."""

import numpy as np

from collab_jax import records

T, F = True, False


def make(n=None, seed=0, **columns):
    """Records with the columns that summaries and routers read."""
    if n is None:
        base = dict(
            local_correct=[T, F, F, T, F],
            cloud_correct=[T, T, F, F, T],
            margin=[-3.0, 2.0, 1.0, -1.0, -2.0],
            logp=[-0.1, -5.0, -0.2, -0.3, -4.0],
            ended=[T, T, T, T, F],
        )
    else:
        rng = np.random.default_rng(seed)
        base = dict(
            local_correct=rng.random(n) < 0.5,
            cloud_correct=rng.random(n) < 0.9,
            margin=rng.normal(size=n),
            logp=-rng.exponential(size=n),
            ended=rng.random(n) < 0.95,
        )
    size = len(base["margin"])
    base |= dict(
        id=[f"p{i}" for i in range(size)], prompt=[f"{i} and {i % 7}" for i in range(size)], stratum=["a"] * size,
        formatted=base["ended"], tokens=[10] * size, natural_tokens=[5] * size,
        natural_called=[T] * 2 + [F] * (size - 2), natural_completed=[T] + [F] * (size - 1),
        natural_correct=base["local_correct"], natural_ended=base["ended"],
    )  # fmt: skip
    return records.check(
        {name: list(column) for name, column in (base | columns).items()}, "a test's table"
    )
