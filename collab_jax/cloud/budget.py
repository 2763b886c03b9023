"""A budget that cannot be overrun: a call is booked at its highest price, then at what it cost.

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
    """No call is left in config.cloud.max_calls or max_usd, and the config says to stop then."""


class Spent(NamedTuple):
    """What a store's answers have cost since it was made, imported answers excepted."""

    calls: int  # requests sent, those that failed included
    usd: float


@dataclass(frozen=True)
class Budget:
    """Limits of what a store has ever spent; None: no limit."""

    store: Store
    max_calls: int | None = None
    max_usd: float | None = None

    def spent(self) -> Spent:
        """Returns calls and USD so far, calls in flight at their highest price."""
        [(calls, usd)] = self.store.query("SELECT calls, usd FROM spent")
        return Spent(calls, usd)

    def reserve(self, db: sqlite3.Connection, prices: Sequence[float]) -> int:
        """Books calls at these highest prices inside a transaction; returns how many it could book.

        They are the first of `prices`, as many as the limits allow.
        """
        calls, usd = db.execute("SELECT calls, usd FROM spent").fetchone()
        granted = 0
        for price in prices:
            if self.max_calls is not None and calls + 1 > self.max_calls:
                break
            # Sums are rounded, hence the factor.
            if self.max_usd is not None and usd + price > self.max_usd * (1 + 1e-12):
                break
            calls, usd, granted = calls + 1, usd + price, granted + 1
        if granted:
            db.execute("UPDATE spent SET calls = ?, usd = ?", (calls, usd))
        return granted

    def message(self) -> str:
        """Returns what was spent of what, and how to go on."""
        spent = self.spent()
        return (
            f"the cloud's budget is spent: {spent.calls} calls of config.cloud.max_calls="
            f"{self.max_calls}, {spent.usd:.4f} USD of max_usd={self.max_usd}, calls that may be "
            "charged at their highest price; raise it, and the same command goes on"
        )


def settle(db: sqlite3.Connection, booked: float, usd: float, unsent: int = 0) -> None:
    """Books what calls cost in place of what was reserved for them, inside a transaction.

    booked: USD reserved. unsent: calls that were reserved and not made.
    """
    db.execute("UPDATE spent SET calls = calls - ?, usd = MAX(0, usd + ?)", (unsent, usd - booked))
