"""A budget that cannot be overrun: the highest price of a call is booked before it, and what it
cost after it.

What is booked lies in the store, for all threads and processes that share it. A call that was in
flight when its process was killed stays booked at its highest price, since the provider may have
charged it.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from collab_jax.cloud.protocol import CloudError
from collab_jax.cloud.store import Store


class BudgetSpent(CloudError):
    """No call is left in `config.cloud.max_calls` or `max_usd`, and the config says to stop then."""


class Spent(NamedTuple):
    """Of a store, since it was made. Imported answers are not in it."""

    calls: int  # requests sent, those that failed included
    usd: float


@dataclass(frozen=True)
class Budget:
    """Limits of what a store has ever spent; None: no limit."""

    store: Store
    max_calls: int | None = None
    max_usd: float | None = None

    def spent(self) -> Spent:
        """Calls and USD so far, calls in flight at their highest price."""
        return Spent(*self.store.query("SELECT calls, usd FROM spent")[0])

    def reserve(self, prices: Sequence[float]) -> int:
        """Books as many calls, from the first on, as the limits allow, at these highest prices; how
        many.
        """
        with self.store.transaction() as db:
            calls, usd = db.execute("SELECT calls, usd FROM spent").fetchone()
            granted = 0
            for price in prices:
                if self.max_calls is not None and calls + 1 > self.max_calls:
                    break
                if self.max_usd is not None and usd + price > self.max_usd * (
                    1 + 1e-12
                ):  # sums are rounded
                    break
                calls, usd, granted = calls + 1, usd + price, granted + 1
            if granted:
                db.execute("UPDATE spent SET calls = ?, usd = ?", (calls, usd))
        return granted

    def message(self) -> str:
        """What was spent of what, and how to go on."""
        calls, usd = self.spent()
        return (
            f"the cloud's budget is spent: {calls} calls of config.cloud.max_calls={self.max_calls}, {usd:.4f} USD of "
            f"max_usd={self.max_usd}, calls that may be charged at their highest price; raise it, and the same command goes on"
        )


def settle(db: sqlite3.Connection, booked: float, usd: float, unsent: int = 0) -> None:
    """Puts what calls cost in the place of what was booked for them, and takes `unsent` calls back;
    inside a transaction.
    """
    db.execute("UPDATE spent SET calls = calls - ?, usd = MAX(0, usd + ?)", (unsent, usd - booked))
