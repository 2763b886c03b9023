"""Answers compared by math-verify (sympy) in worker processes, each pair with a deadline: a stuck
worker is killed.

math-verify's own time-outs need the main thread and trust the parser; a process that can be killed
needs neither.
"""

import atexit
import collections
import functools
import json
import os
import pathlib
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence

from collab_jax.tasks.base import TaskError

WORKER = pathlib.Path(__file__).with_name("math_worker.py")
DEADLINE = 5.0  # seconds a pair may take
START = 60.0  # seconds a worker may take to start, on a busy machine


class _Worker:
    """One process; `pair` is what it works on."""

    def __init__(self):
        # -P: the folder of the script, which holds a math.py, must not come before the standard
        # library. Unbuffered: a line that were read ahead would never be waited for.
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
            "bufsize": 0,
        }
        pipes["start_new_session"] = (
            True  # Ctrl-C is not for it: a run that saves itself still compares
        )
        self.process = subprocess.Popen([sys.executable, "-P", str(WORKER)], **pipes)
        self.pair: int | None = None
        self.ready = False  # it has said so; until then START counts, from then on the deadline
        self.until = time.monotonic() + START

    def send(self, index: int, pair: tuple[str, str], deadline: float) -> None:
        self.process.stdin.write((json.dumps(pair) + "\n").encode())
        self.pair = index
        if self.ready:
            self.until = time.monotonic() + deadline

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Verifier:
    """`equal(pairs)` over some worker processes, which are started when first needed and live as
    long as this process.
    """

    def __init__(self, workers: int | None = None, deadline: float = DEADLINE):
        self._size, self._deadline = workers or min(os.cpu_count() or 1, 8), deadline
        self._workers: list[_Worker] = []
        atexit.register(self.close)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether gold and prediction are equal, for each pair; None where that took longer than
        the deadline.
        """
        found: list[bool | None] = [None] * len(pairs)
        waiting = collections.deque(range(len(pairs)))
        while len(self._workers) < min(self._size, len(pairs)):
            self._workers.append(_Worker())
        with selectors.DefaultSelector() as ready:

            def give(worker: _Worker) -> None:
                worker.pair = None
                if not waiting:
                    return
                if worker.process.poll() is not None:  # killed from outside since its last pair
                    worker = self._replace(worker)
                worker.send(index := waiting.popleft(), pairs[index], self._deadline)
                ready.register(worker.process.stdout, selectors.EVENT_READ, worker)

            for worker in self._workers:
                give(worker)
            while any(worker.pair is not None for worker in self._workers):
                soonest = min(worker.until for worker in self._workers if worker.pair is not None)
                for key, _ in ready.select(max(soonest - time.monotonic(), 0)):
                    worker, line = key.data, key.data.process.stdout.readline()
                    if line == b"ready\n":
                        worker.ready, worker.until = True, time.monotonic() + self._deadline
                        continue
                    ready.unregister(key.fileobj)
                    if line:
                        found[worker.pair] = line == b"1\n"
                        give(worker)
                    elif not worker.ready:
                        raise TaskError(
                            f"the verifier does not start: run {sys.executable} -P {WORKER} to see why"
                        )
                    else:  # it died, of memory or in a library: not equal, as far as anybody can tell
                        found[worker.pair] = False
                        give(self._replace(worker))
                for worker in [
                    w for w in self._workers if w.pair is not None and w.until <= time.monotonic()
                ]:
                    ready.unregister(worker.process.stdout)
                    give(self._replace(worker))
        return found

    def _replace(self, worker: _Worker) -> _Worker:
        worker.kill()
        new = _Worker()
        self._workers[self._workers.index(worker)] = new
        return new

    def close(self) -> None:
        """Ends the workers; the next call starts others."""
        while self._workers:
            self._workers.pop().kill()


@functools.cache
def shared() -> Verifier:
    """The verifier of this process."""
    return Verifier()
