"""The engine: one thread that owns the devices, and a bounded queue in front of it.

Each turn of its loop computes a bounded number of tokens of prompts, starts the next steps, and
then reads what the steps before have written, while the devices work. Callers hand over a `Job` by
`submit` and hear of its tokens by its `emit`, which is called in the engine's thread.
"""

import collections
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from collab_jax.models.decoder import DecoderConfig, Params, empty_segment
from collab_jax.serve import slots
from collab_jax.serve.slots import LOGIT_BIASES, STEPS, Request, SlotSettings

log = logging.getLogger(__name__)

BURST_SECONDS = 0.05  # at most, of the longer round: its tokens reach a client together
TIMED = 5  # longer rounds before the first request; the quickest counts, whatever else runs


class Busy(Exception):
    """The queue is full; `retry_after` is in seconds, from the pace of the last requests."""

    def __init__(self, retry_after: float):
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Broken(Exception):
    """The devices have failed, or the engine is closed."""


class Place:
    """A place in the queue, held for a prompt that is on its way there."""


class Emission(NamedTuple):
    """What a round wrote for one request.

    end: "stop" at an end token, "call" at the decision token, "length" at the limit, "error" where
    the engine broke; None: it goes on. An end token and the decision token are not in `tokens`, but
    their steps are in the other lists.
    """

    tokens: list[int]
    logps: list[float]
    margins: list[float]
    end: str | None


@dataclass(eq=False)
class Job:
    """A response to compute.

    prompt: its tokens. written: tokens of the response that are there already, of which the next
    ones are the continuation. resumed: another job began it, which called, maybe at once. limit:
    tokens of the whole response. bias: see `slots.Request`.
    """

    prompt: tuple[int, ...]
    emit: Callable[[Emission], object]
    limit: int
    bias: float
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    written: tuple[int, ...] = ()
    resumed: bool = False
    cancelled: bool = field(default=False, init=False)


class Limits(NamedTuple):
    """What may wait for a slot, and how many tokens of prompts are computed in one turn."""

    requests: int
    tokens: int  # of their prompts; a single one may have more
    turn: int = 256


@dataclass
class _Prefill:
    """A prompt that is being computed."""

    job: Job
    slot: int
    tokens: tuple[int, ...]  # all but the last
    done: int = 0


class Engine:
    """Slots of one model, and the thread that works on them.

    `ready` is set once every program is compiled. Raises nothing in the thread: where the devices
    fail, every job ends with "error", and `broken` says why.
    """

    def __init__(self, params: Params, cfg: DecoderConfig, settings: SlotSettings, limits: Limits):
        self.cfg, self.settings, self.limits = cfg, settings, limits
        self.ready, self.broken = threading.Event(), ""
        self._params = slots.prepared(params, cfg)
        self._waiting: collections.deque[Job] = collections.deque()
        self._waiting_tokens = 0  # of their prompts
        self._places: set[Place] = set()  # held
        self._changed = threading.Condition()
        self._closing = False
        self._held: list[Job | None] = [None] * settings.slots
        self._prefill: _Prefill | None = None
        self._steps, self._last_end, self._pace = STEPS[-1], 0.0, 0.0
        self._programs = slots.programs(cfg, settings)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- for any thread

    def submit(self, job: Job) -> None:
        """Queues a job, one that goes on before the others.

        Raises Busy where the queue is full, and Broken.
        """
        with self._changed:
            if self.broken:
                raise Broken(self.broken)
            if job.resumed:  # it was let in before
                self._waiting.appendleft(job)
            else:
                self._check_room(len(job.prompt))
                self._waiting.append(job)
            self._waiting_tokens += len(job.prompt)
            self._changed.notify()

    def hold_place(self) -> Place:
        """Holds a place in the queue, before anything is done for the prompt that shall have it.

        Raises Busy where no prompt may wait, and Broken.
        """
        place = Place()
        with self._changed:
            if self.broken:
                raise Broken(self.broken)
            self._check_room(0)
            self._places.add(place)
        return place

    def leave_place(self, place: Place) -> None:
        """Gives up a place that is held: the prompt is about to be queued, or never will be."""
        with self._changed:
            self._places.discard(place)

    def _check_room(self, tokens: int) -> None:
        """Raises Busy where a prompt of so many tokens may not wait; alone, each may."""
        waiting = len(self._waiting) + len(self._places)
        tokens += self._waiting_tokens
        full = waiting >= self.limits.requests or (self._waiting and tokens > self.limits.tokens)
        if full or self._closing:
            raise Busy(max(0.05, waiting * self._pace))

    def cancel(self, job: Job) -> None:
        """Ends a job, whose slot is free at the next round; it emits no more."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    @property
    def busy(self) -> tuple[int, int]:
        """(slots in use, places of the queue that are taken)."""
        waiting = len(self._waiting) + len(self._places)
        return sum(job is not None for job in self._held), waiting

    def close(self) -> None:
        """Refuses new jobs, waits for those there, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # ------------------------------------------------------------------------- in the thread

    def _warm_up(self) -> None:
        """Runs every program once, with all slots in use, and times the longer round."""
        s, everybody = self.settings, np.ones(self.settings.slots, bool)
        self._state = slots.empty(self.cfg, s)
        self._staging = empty_segment(self.cfg, 1, s.staging_columns, s.cache_dtype)
        self._compute(np.zeros(s.chunk, np.int32), 0)
        never = dict.fromkeys(s.eos_ids[:LOGIT_BIASES], -1e9)
        endless = Job((0,), lambda _: None, limit=2**30, bias=-np.inf, logit_bias=never)
        for bucket in s.buckets:
            self._admit(endless, 0, np.zeros(bucket, np.int32), 0)
        for slot in range(s.slots):
            self._admit(endless, slot, np.zeros(s.buckets[0], np.int32), 0)
        for step in self._programs.step.values():
            self._state, _ = step(self._params, self._state, everybody)
        jax.block_until_ready(self._state)
        longest = self._programs.step[s.slots, STEPS[-1]]
        quickest = math.inf
        for _ in range(TIMED):
            begin = time.monotonic()
            self._state, written = longest(self._params, self._state, everybody)
            jax.block_until_ready(written)
            quickest = min(quickest, time.monotonic() - begin)
        if quickest > BURST_SECONDS:
            self._steps = STEPS[0]
        self._state, _ = longest(self._params, self._state, ~everybody)
        self.ready.set()

    def _run(self) -> None:
        try:
            self._warm_up()
            self._work()
            self.broken = "closed"
        except Exception as error:
            log.exception("the engine has failed")
            self.broken = type(error).__name__
            with self._changed:
                self._closing = True
                left = [*self._waiting, *filter(None, self._held)]
                left += [self._prefill.job] if self._prefill else []
                self._waiting.clear()
            for job in dict.fromkeys(left):
                self._emit(job, Emission([], [], [], "error"))

    def _work(self) -> None:
        """Turns until it is closed and nothing is left."""
        started: tuple[list[Job | None], jax.Array] | None = None
        while True:
            with self._changed:
                self._drop_cancelled()
                while not (self._waiting or self._prefill or any(self._held) or started):
                    if self._closing:
                        return
                    self._changed.wait()
                    self._drop_cancelled()
            self._compute_prompts()
            before, started = started, self._start_round()
            if before is not None:
                self._read(*before)

    def _drop_cancelled(self) -> None:
        self._held = [None if job and job.cancelled else job for job in self._held]
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._waiting_tokens -= len(job.prompt)
        if self._prefill and self._prefill.job.cancelled:
            self._prefill = None

    def _compute_prompts(self) -> None:
        """Computes as many prompts as fit in a turn, or a chunk of one; inserts complete ones."""
        room = max(self.limits.turn, self.settings.chunk)
        while self._prefill or self._next_prompt():
            prefill = self._prefill
            assert prefill is not None
            left = prefill.tokens[prefill.done :]
            now = left[: self.settings.chunk]
            bucket = next(b for b in self.settings.buckets if b >= len(now))
            if bucket > room:
                return
            room -= bucket
            tokens = np.zeros(bucket, np.int32)
            tokens[: len(now)] = now
            if len(now) < len(left):
                self._compute(tokens, prefill.done)
                prefill.done += len(now)
            else:
                self._admit(prefill.job, prefill.slot, tokens, prefill.done)
                self._held[prefill.slot] = prefill.job
                self._prefill = None

    def _next_prompt(self) -> bool:
        """Takes the next job that waits, if there is a slot for it."""
        with self._changed:
            if not self._waiting or None not in self._held:
                return False
            job = self._waiting.popleft()
            self._waiting_tokens -= len(job.prompt)
        tokens = (*job.prompt, *job.written)[:-1]
        self._prefill = _Prefill(job, self._held.index(None), tokens)
        return True

    def _compute(self, tokens: np.ndarray, start: int) -> None:
        """Computes a chunk of a prompt, which others follow, from column `start` on."""
        self._staging = self._programs.prefill(
            self._params, self._staging, tokens[None], np.int32(start)
        )

    def _admit(self, job: Job, slot: int, last: np.ndarray, start: int) -> None:
        """Computes the last chunk of a job's prompt, and inserts the job."""
        ids = np.full(LOGIT_BIASES, self.cfg.vocab_size, np.int32)
        values = np.zeros(LOGIT_BIASES, np.float32)
        ids[: len(job.logit_bias)] = list(job.logit_bias)
        values[: len(job.logit_bias)] = list(job.logit_bias.values())
        tokens, opening = (*job.prompt, *job.written), self.settings.marker.answer_open.states
        request = Request(
            token=np.int32(tokens[-1]),
            position=np.int32(len(tokens) - 1),
            opening=np.int8(opening(job.written)[-1] if job.written else 0),
            written=np.int32(len(job.written)),
            limit=np.int32(job.limit),
            seed=np.uint32(job.seed),
            temperature=np.float32(job.temperature),
            top_p=np.float32(job.top_p),
            bias=np.float32(job.bias),
            logit_ids=ids,
            logit_values=values,
        )
        words = slots.pack_last(request, slot, start, last)
        self._state, self._staging = self._programs.admit(
            self._params, self._state, self._staging, words
        )

    def _start_round(self) -> tuple[list[Job | None], jax.Array] | None:
        """Starts the next steps, if anybody needs them; returns whose they are, and their result.

        One token at a time while prompts wait for the devices, else as many as are quick.
        """
        used = [slot for slot, job in enumerate(self._held) if job is not None]
        if not used:
            return None
        rows = next(rows for rows in self.settings.ladder if rows > used[-1])
        count = STEPS[0] if self._prefill else self._steps
        keep = np.array([job is not None for job in self._held])
        self._state, written = self._programs.step[rows, count](self._params, self._state, keep)
        return self._held[:rows], written

    def _read(self, jobs: list[Job | None], written: jax.Array) -> None:
        """Emits what a round wrote, and frees the slots of those that have ended."""
        token, logp, margin, real, called, ended = slots.unpack_round(np.asarray(written))
        for row, job in enumerate(jobs):
            if job is None or job.cancelled or not (n := int(real[:, row].sum())):
                continue
            tokens, end = token[:n, row].tolist(), None
            if ended[n - 1, row]:
                last = tokens[-1]
                stopped = last in self.settings.eos_ids
                end = "call" if called[n - 1, row] else "stop" if stopped else "length"
                tokens = tokens if end == "length" else tokens[:-1]
                self._held = [None if other is job else other for other in self._held]
                self._note_end()
            self._emit(job, Emission(tokens, logp[:n, row].tolist(), margin[:n, row].tolist(), end))

    def _emit(self, job: Job, emission: Emission) -> None:
        """Tells who waits; where nobody can hear it any more, the job is cancelled."""
        try:
            job.emit(emission)
        except Exception:
            job.cancelled = True

    def _note_end(self) -> None:
        """Updates the pace, a running mean of the seconds between two ends."""
        now = time.monotonic()
        if self._last_end:
            self._pace += 0.1 * (min(now - self._last_end, 10.0) - self._pace)
        self._last_end = now
