"""What a router that needs the device model is given."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax.models.decoder import Params
from collab_jax.records import Records
from collab_jax.rl.experiment import Run
from collab_jax.runtime import parallel
from collab_jax.tasks import Example


class Device(NamedTuple):
    """A trained model, and the examples that its records are about."""

    run: Run
    params: Params  # of the whole model, with axis D
    examples: dict[str, Example]  # by id

    def examples_of(self, records: Records) -> list[Example]:
        """The examples of the rows."""
        return [self.examples[key] for key in records["id"]]

    def prompts_of(self, records: Records) -> tuple[np.ndarray, np.ndarray]:
        """(prompts i32[n, L], mask bool[n, L]) of the rows."""
        messages = [self.run.task.prompt(example) for example in self.examples_of(records)]
        return self.run.text.prompt_batch(messages, self.run.config.prompt_length)

    def responses_of(self, records: Records) -> tuple[np.ndarray, np.ndarray]:
        """(responses i32[n, T], tokens of each i32[n]) of the rows, EOS in.

        The recorded text is tokenized again; a response that was cut off counts up to the cut.
        """
        text, T = self.run.text, self.run.config.max_new_tokens
        responses = np.full((len(records["text"]), T), text.pad_id, np.int32)
        length = np.zeros(len(responses), np.int32)
        for i, written in enumerate(records["text"]):
            ids = text.response_ids(written)[:T]
            responses[i, : len(ids)], length[i] = ids, len(ids)
        return responses, length


def batches(rows: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(row numbers i64[size], how many of them count) for all rows, in order.

    The last batch is filled up with row 0, which does not count there.
    """
    for start in range(0, rows, size):
        numbers = np.arange(start, min(start + size, rows))
        yield np.pad(numbers, (0, size - len(numbers))), len(numbers)


def by_batch(body: Callable[..., Any], inputs: tuple[np.ndarray, ...], size: int) -> np.ndarray:
    """The rows [n, ...], on the host, that body gives for the rows of `inputs`, `size` at a time.

    body: (*arrays with axis D) -> array with axis D. inputs: arrays [n, ...]; D must divide size.
    """
    D, outputs = jax.local_device_count(), []
    for rows, count in batches(len(inputs[0]), size):
        shares = parallel.shard(tuple(x[rows] for x in inputs), D)
        outputs.append(parallel.gather(body(*shares))[:count])
    return np.concatenate(outputs)
