"""What a router that needs the device model is given."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from collab_jax.models.decoder import Params
from collab_jax.records import Records
from collab_jax.rl.experiment import Run
from collab_jax.runtime import parallel
from collab_jax.tasks import Example


class Device(NamedTuple):
    """A trained model and the prompts its records are of."""

    run: Run
    params: Params  # with axis D
    examples: dict[str, Example]  # by id

    def of(self, records: Records) -> list[Example]:
        """The examples of the rows."""
        return [self.examples[key] for key in records["id"]]


def batches(rows: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(row numbers i64[size], how many of them count) that go through all rows; the last batch is
    filled up with row 0.
    """
    for start in range(0, rows, size):
        found = np.arange(start, min(start + size, rows))
        yield np.pad(found, (0, size - len(found))), len(found)


def by_batch(body, inputs: tuple[np.ndarray, ...], size: int) -> np.ndarray:
    """body(*arrays with axis D) -> array with axis D, over all rows of `inputs`, `size` at a time:
    [n, ...] on the host.
    """
    D, found = jax.local_device_count(), []
    for rows, count in batches(len(inputs[0]), size):
        found.append(
            parallel.gather(body(*parallel.shard(tuple(x[rows] for x in inputs), D)))[:count]
        )
    return np.concatenate(found)
