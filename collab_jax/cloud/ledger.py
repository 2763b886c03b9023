"""What the cloud has cost: a sum over the store, so it needs no state of its own and survives any
restart.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from collab_jax.cloud.store import Store


class Ledger(NamedTuple):
    """Sums over every answer that was ever bought."""

    calls: int
    input_tokens: int
    output_tokens: int
    seconds: float
    usd: float


def ledger(store: Store, keys: Iterable[str] | None = None) -> Ledger:
    """Adds up the answers under `keys`, or the whole store (all models in it; two to three seconds
    for a million answers).

    The sums are rounded once, hence the same in whatever order the answers were bought. Raises
    StoreError.
    """
    columns = "input_tokens, output_tokens, seconds, usd"
    if keys is None:
        rows = store.query(f"SELECT {columns} FROM answers")
    else:
        found = store.get_many(set(keys)).values()
        rows = [
            (reply.input_tokens, reply.output_tokens, reply.seconds, reply.usd) for reply in found
        ]
    inputs, outputs, seconds, usd = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Ledger(len(rows), sum(inputs), sum(outputs), math.fsum(seconds), math.fsum(usd))
