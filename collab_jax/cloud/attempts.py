"""When to call again, and when not to: pauses that double, and a circuit breaker.

What `config.cloud.retries` survives: an outage is waited out with as many probes as there are
retries, the k-th 2^k - 1 seconds after the outage was noticed (at most 60 s apart). A provider that
comes back before the last probe costs no prompt its answer:

    retries             1    2    3    5     8    10    20
    seconds of outage   1    3    7   31   183   303   903

A provider that stays away fails every prompt at that time, with its reason.
"""

import math
import random
import threading
import time
from typing import Literal

BACKOFF_SECONDS = 1.0, 60.0  # longest pause after the first attempt, and after any; it doubles
OUTAGE_FAILURES = 8  # failures in a row that look like an outage, at least

Admission = Literal["call", "probe"]


def longest_pause(attempt: int) -> float:
    """Returns the most seconds to wait after attempt number `attempt`, from 0."""
    first, most = BACKOFF_SECONDS
    return min(most, first * 2.0 ** min(attempt, 60))


def pause(attempt: int, retry_after: float | None) -> float:
    """Returns the seconds to wait after attempt number `attempt`, from 0.

    That is what the provider asks for (plus at most one second, so that threads part), else a
    uniform draw up to `longest_pause` ("full jitter").
    """
    jitter = random.uniform(0, longest_pause(attempt))
    return jitter if retry_after is None else retry_after + min(jitter, 1.0)


class Breaker:
    """A circuit breaker: after some failures in a row, only one call at a time may probe.

    Closed, every call may be made. It opens after max(OUTAGE_FAILURES, 2 * workers) failures in a
    row, as whatever is in flight in one bad moment fails together. Open, one call may be made after
    longest_pause(0), the next after longest_pause(1), and so on; any sign of life closes it.
    Threads may share it.
    """

    def __init__(self, workers: int):
        self._lock = threading.Lock()
        self._limit = max(OUTAGE_FAILURES, 2 * workers)
        self._failures = 0  # in a row
        self._probes, self._failed_probes = 0, 0.0  # since it opened
        self._next_probe = 0.0  # on the monotonic clock

    @property
    def is_open(self) -> bool:
        return self._failures >= self._limit

    def admit(self) -> Admission | None:
        """Returns whether a call may be made now, and whether as the probe of an open circuit."""
        with self._lock:
            now = time.monotonic()
            if not self.is_open:
                return "call"
            if now < self._next_probe:
                return None
            self._probes += 1
            self._next_probe = now + longest_pause(self._probes)
            return "probe"

    def gave_up(self, retries: int) -> bool:
        """Returns whether the circuit is open and that many probes have failed."""
        return self.is_open and self._failed_probes >= retries

    def note_outage(self, probe: bool, final: bool = False) -> None:
        """Counts a call that failed as all others may; final: as all others must, until mended."""
        with self._lock:
            was_open = self.is_open
            self._failures = self._limit if final else self._failures + 1
            if self.is_open and not was_open:
                self._next_probe = time.monotonic() + longest_pause(0)
            if final:
                self._failed_probes = math.inf
            elif probe:
                self._failed_probes += 1

    def note_life(self) -> None:
        """Closes the circuit: the provider answered, if only to refuse one request."""
        with self._lock:
            self._failures, self._probes, self._failed_probes = 0, 0, 0.0

    def seconds_left(self) -> float:
        """Returns how long until a call is admitted."""
        return max(0.0, self._next_probe - time.monotonic()) if self.is_open else 0.0
