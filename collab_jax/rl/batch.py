"""The prompts of one step, before hosts share them out and devices answer them."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from collab_jax.tasks import Example


class Batch(NamedTuple):
    """The prompts of one step: the examples, and their tokens, padded on the left."""

    examples: Sequence[Example]  # Q
    prompts: np.ndarray  # i32[Q, L]
    mask: np.ndarray  # bool[Q, L]
    earlier: Sequence[int]  # Q, how often the step has the same prompt before, on whatever host


def make_batch(examples: Sequence[Example], prompts: np.ndarray, mask: np.ndarray) -> Batch:
    """The batch of a whole step."""
    seen: Counter[str] = Counter()
    earlier = []
    for example in examples:
        earlier.append(seen[example.id])
        seen[example.id] += 1
    return Batch(examples, prompts, mask, earlier)
