"""What the cloud has cost: a sum over the store, which needs no state and survives any restart."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from collab_jax.cloud.store import Store


class Ledger(NamedTuple):
    """Sums over stored answers."""

    calls: int
    input_tokens: int
    output_tokens: int
    seconds: float
    usd: float


def ledger(store: Store, keys: Iterable[str] | None = None) -> Ledger:
    """Returns the sums over the answers under `keys`, or over the whole store, all models in it.

    The sums are rounded once, hence the same in whatever order the answers were bought. The whole
    store takes two to three seconds for a million answers. Raises StoreError.
    """
    if keys is None:
        rows = store.query("SELECT input_tokens, output_tokens, seconds, usd FROM answers")
    else:
        rows = [
            (reply.input_tokens, reply.output_tokens, reply.seconds, reply.usd)
            for reply in store.get_many(set(keys)).values()
        ]
    inputs, outputs, seconds, usd = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Ledger(len(rows), sum(inputs), sum(outputs), math.fsum(seconds), math.fsum(usd))
