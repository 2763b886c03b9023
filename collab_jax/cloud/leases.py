"""Who buys what: a key is leased before it is bought, so that two threads or processes that want it
make one call.

A lease lasts some seconds and is moved on while its holder lives; that of a process that was killed
runs out.
"""

import threading
import time
import uuid
from collections.abc import Iterable

from collab_jax.cloud.store import Store

LEASE_SECONDS = 15.0  # how long the keys of a killed process stay barred


class Leases:
    """The keys that this object holds in a store. Threads may share it."""

    def __init__(self, store: Store):
        self.store, self.owner, self.seconds = store, uuid.uuid4().hex, LEASE_SECONDS
        self._held: set[str] = set()
        self._lock = threading.Lock()

    def take(self, keys: Iterable[str]) -> set[str]:
        """Leases those of `keys` that nobody holds. Look into the store after it: the last holder
        may have bought them.
        """
        mine = set()
        with self.store.transaction(durable=False) as db:
            now = time.time()  # not before: another's write may have been waited for
            db.execute("DELETE FROM leases WHERE expires < ?", (now,))
            for key in keys:
                values = key, self.owner, now + self.seconds
                mine |= (
                    {key}
                    if db.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?)", values).rowcount
                    else set()
                )
        with self._lock:
            self._held |= mine
        return mine

    def renew(self) -> None:
        """To be called a few times in `seconds`."""
        if self._held:
            with self.store.transaction(durable=False) as db:
                db.execute(
                    "UPDATE leases SET expires = ? WHERE owner = ?",
                    (time.time() + self.seconds, self.owner),
                )

    def release(self, keys: Iterable[str]) -> None:
        """Gives keys back, bought or not."""
        with self._lock:
            keys = set(keys) & self._held
            self._held -= keys
        if keys:
            with self.store.transaction(durable=False) as db:
                db.executemany(
                    "DELETE FROM leases WHERE key = ? AND owner = ?",
                    [(key, self.owner) for key in keys],
                )
