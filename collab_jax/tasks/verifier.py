"""Answers compared by math-verify (sympy) in worker processes, each pair with a deadline.

A worker that is stuck is killed. math-verify's own time-outs need the main thread and trust the
parser; a process that can be killed needs neither.
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
    """One process, which compares one pair at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            # -P: the folder of the script, which holds a math.py, must not come before the
            # standard library.
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a line that were read ahead would never be waited for
            start_new_session=True,  # Ctrl-C is not for it: a run that saves itself still compares
        )
        assert self.process.stdin and self.process.stdout  # pipes, as asked for
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.index: int | None = None  # of the pair that it works on
        self.ready = False  # it has said so; START counts until then, and then the deadline
        self.until = time.monotonic() + START

    def send(self, index: int, pair: tuple[str, str], deadline: float) -> None:
        self.stdin.write((json.dumps(pair) + "\n").encode())
        self.index = index
        if self.ready:
            self.until = time.monotonic() + deadline

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class _Batch:
    """The comparison of some pairs by `workers`, whose place in that list a new one may take."""

    def __init__(self, workers: list[_Worker], pairs: Sequence[tuple[str, str]], deadline: float):
        self.workers, self.pairs, self.deadline = workers, pairs, deadline
        self.results: list[bool | None] = [None] * len(pairs)
        self.waiting = collections.deque(range(len(pairs)))
        self.selector = selectors.DefaultSelector()

    def run(self) -> list[bool | None]:
        with self.selector:
            for worker in list(self.workers):
                # One that was interrupted in its last pair would answer that one first.
                self._give(worker if worker.index is None else self._replaced(worker))
            while busy := [worker for worker in self.workers if worker.index is not None]:
                soonest = min(worker.until for worker in busy)
                for key, _ in self.selector.select(max(soonest - time.monotonic(), 0)):
                    self._read(key.data)
                for worker in list(self.workers):
                    if worker.index is not None and worker.until <= time.monotonic():
                        self.selector.unregister(worker.stdout)
                        self._give(self._replaced(worker))
        return self.results

    def _give(self, worker: _Worker) -> None:
        """Sends the next pair to a worker that has none, if one waits."""
        worker.index = None
        if not self.waiting:
            return
        if worker.process.poll() is not None:  # killed from outside since its last pair
            worker = self._replaced(worker)
        index = self.waiting.popleft()
        worker.send(index, self.pairs[index], self.deadline)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _read(self, worker: _Worker) -> None:
        """Takes a line of a worker: that it is ready, a result, or its end."""
        line = worker.stdout.readline()
        if line == b"ready\n":
            worker.ready, worker.until = True, time.monotonic() + self.deadline
            return
        self.selector.unregister(worker.stdout)
        assert worker.index is not None  # only workers that have a pair are registered
        if line:
            self.results[worker.index] = line == b"1\n"
            self._give(worker)
        elif not worker.ready:
            raise TaskError(
                f"the verifier does not start: run {sys.executable} -P {WORKER} to see why"
            )
        else:  # it died, of memory or in a library: not equal, as far as anybody can tell
            self.results[worker.index] = False
            self._give(self._replaced(worker))

    def _replaced(self, worker: _Worker) -> _Worker:
        worker.kill()
        new = _Worker()
        self.workers[self.workers.index(worker)] = new
        return new


class Verifier:
    """Some worker processes, which are started when first needed and live as long as this one."""

    def __init__(self, workers: int | None = None, deadline: float = DEADLINE):
        self._size, self._deadline = workers or min(os.cpu_count() or 1, 8), deadline
        self._workers: list[_Worker] = []
        atexit.register(self.close)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether gold and prediction are equal, for each pair; None where the deadline passed."""
        while len(self._workers) < min(self._size, len(pairs)):
            self._workers.append(_Worker())
        return _Batch(self._workers, pairs, self._deadline).run()

    def close(self) -> None:
        """Ends the workers; the next call starts others."""
        while self._workers:
            self._workers.pop().kill()


@functools.cache
def shared() -> Verifier:
    """The verifier of this process."""
    return Verifier()
