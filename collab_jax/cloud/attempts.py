"""When to call again, and when not to: backoff and a circuit breaker."""

import random
import threading
import time

BACKOFF_SECONDS = 1.0, 60.0  # before the second attempt, and at most; doubled each time
OUTAGE = 8  # failures in a row that look like an outage before the circuit opens, at least
COOL_SECONDS = 15.0  # how long it stays open before one call may try


def pause(attempt: int, retry_after: float | None) -> float:
    """Seconds to wait after attempt number `attempt`, from 0: what the provider asks for, else full
    jitter.
    """
    first, most = BACKOFF_SECONDS
    jitter = random.uniform(0, min(most, first * 2**attempt))
    return jitter if retry_after is None else retry_after + min(jitter, 1.0)


class Breaker:
    """Open after some failures in a row: calls fail at once, but for one each COOL_SECONDS, whose
    success closes it.

    Some: OUTAGE, or twice the `workers`, as what is in flight in one bad moment all fails.
    """

    def __init__(self, workers: int):
        self._lock, self._limit = threading.Lock(), max(OUTAGE, 2 * workers)
        self._failures, self._next_try = 0, 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Whether a call may be made now."""
        with self._lock:
            now = time.monotonic()
            if self.is_open and now < self._next_try:
                return False
            if self.is_open:
                self._next_try = now + COOL_SECONDS  # this one tries
            return True

    def note(self, outage: bool, at_once: bool = False) -> None:
        """A call came to its end; at_once: every other call must fail too."""
        with self._lock:
            self._failures = (self._limit if at_once else self._failures + 1) if outage else 0
            self._next_try = time.monotonic() + COOL_SECONDS

    def seconds_left(self) -> float:
        """How long until a call is allowed."""
        return max(0.0, self._next_try - time.monotonic()) if self.is_open else 0.0
