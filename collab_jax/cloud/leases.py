"""Who buys what: a key is leased before it is bought, so that all who want it make one call.

A lease lasts some seconds and is extended while its holder lives; that of a killed process runs
out. A process may also be stopped for longer (SIGSTOP, a laptop that sleeps), so `extend` tells it
right before each call whether it still holds the key.
"""

import sqlite3
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
        """Leases those of `keys` that nobody holds, and returns them.

        Look into the store after it: the last holder may have bought them.
        """
        taken = set()
        with self.store.transaction(durable=False) as db:
            now = time.time()  # read inside: another's write may have been waited for
            db.execute("DELETE FROM leases WHERE expires < ?", (now,))
            for key in keys:
                values = key, self.owner, now + self.seconds
                if db.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?)", values).rowcount:
                    taken.add(key)
        with self._lock:
            self._held |= taken
        return taken

    def extend(self, db: sqlite3.Connection, keys: Iterable[str]) -> set[str]:
        """Extends the leases on `keys` inside a transaction; returns those that are still held.

        The others ran out and were taken by somebody, who may have bought them by now.
        """
        expires = time.time() + self.seconds
        sql = "UPDATE leases SET expires = ? WHERE key = ? AND owner = ?"
        return {key for key in keys if db.execute(sql, (expires, key, self.owner)).rowcount}

    def renew(self) -> None:
        """Extends every lease of this object; to be called a few times in `seconds`."""
        with self._lock:
            held = list(self._held)  # not all of its rows: one may have failed to be given back
        if held:
            with self.store.transaction(durable=False) as db:
                self.extend(db, held)

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
