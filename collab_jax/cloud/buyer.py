"""Buys missing answers in background threads: each prompt once, whoever wants it.

Each prompt goes through these steps: lease its key; see that the lease is still held and book the
call, in one transaction; ask; then, in one transaction, store the answer and book what it cost;
give the key back. A process killed between any two of them has lost at most the calls in flight.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

from collab_jax.cloud.attempts import Admission, Breaker, pause
from collab_jax.cloud.budget import Budget, BudgetSpent, settle
from collab_jax.cloud.leases import Leases
from collab_jax.cloud.protocol import Cloud, CloudError, Failure, Reply
from collab_jax.cloud.store import Store, insert, row
from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how often to look for what another process, or another thread, brings about
SPENT = Failure("budget")
CANCELLED = Failure("cancelled")

Outcome = Reply | Failure


class Policy(NamedTuple):
    """How answers are bought; the defaults: without limits, and with one attempt.

    mode: "live" buys what is missing, and what fails is unknown; "record" is the same, but a
    failure is an error, so that the store ends whole; "replay" buys nothing, and what is missing is
    an error.
    """

    mode: str = "live"
    retries: int = 0  # attempts after the first
    max_calls: int | None = None
    max_usd: float | None = None
    stop_when_spent: bool = False  # a spent budget is an error, else it leaves prompts unknown


class Tally(NamedTuple):
    """What a process bought."""

    bought: int = 0  # answers
    failed: int = 0  # prompts whose attempts were used up
    tokens: int = 0  # input + output
    usd: float = 0.0


class Delivery(NamedTuple):
    """How an order ended."""

    outcome: Outcome
    bought: bool  # whether this process paid for it


class Order(NamedTuple):
    """One prompt to buy."""

    key: str
    messages: Messages
    delivery: Future[Delivery]


class Buyer:
    """Buys answers of one cloud into one store. Threads may share it."""

    def __init__(self, cloud: Cloud, store: Store, policy: Policy):
        self.cloud, self.store, self.policy = cloud, store, policy
        self.budget = Budget(store, policy.max_calls, policy.max_usd)
        self.breaker = Breaker(cloud.workers)
        self.reasons: Counter[str] = Counter()  # why calls failed, retried ones included
        self._leases = Leases(store)
        self._lock = threading.Lock()
        self._chunks: queue.SimpleQueue[list[Order]] = queue.SimpleQueue()
        self._in_progress: dict[str, Future[Delivery]] = {}
        self._threads, self._renewing = 0, False
        self._cancelled = threading.Event()
        self._tally = Tally()
        self._succeeded = False
        self._outage = ""  # reason of the last failure that looked like one

    def order(
        self, prompts: dict[str, Messages]
    ) -> tuple[dict[str, Future[Delivery]], frozenset[str]]:
        """Orders prompts, by key, that are not on order already.

        Returns the deliveries to come, by key, and the keys that were not on order before.
        """
        with self._lock:
            new = [
                Order(name, messages, Future())
                for name, messages in prompts.items()
                if name not in self._in_progress
            ]
            self._in_progress |= {order.key: order.delivery for order in new}
            deliveries = {name: self._in_progress[name] for name in prompts}
            for start in range(0, len(new), self.cloud.batch):
                self._chunks.put(new[start : start + self.cloud.batch])
                if self._threads < self.cloud.workers:
                    self._start_thread()
        return deliveries, frozenset(order.key for order in new)

    def take_tally(self) -> Tally:
        """Returns what was bought since the last call of this method."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def cancel(self) -> None:
        """Makes no more calls: prompts that wait fail; calls in flight, being paid for, end."""
        self._cancelled.set()

    # ---------------------------------------------------------------- in the background

    def _start_thread(self) -> None:
        # Daemons: a process that ends does not wait for a slow cloud.
        if not self._renewing:
            self._renewing = True
            threading.Thread(target=self._renew, daemon=True).start()
        self._threads += 1
        threading.Thread(target=self._work, daemon=True).start()

    def _renew(self) -> None:
        """Extends the leases while there is work."""
        while True:
            time.sleep(self._leases.seconds / 5)
            with self._lock:
                self._renewing = self._threads > 0
                if not self._renewing:
                    return
            try:
                self._leases.renew()
            except Exception as error:  # the threads that buy will meet it themselves
                log.warning("leases not renewed (%s)", type(error).__name__)

    def _work(self) -> None:
        """Buys chunks until there are none."""
        while True:
            with self._lock:
                try:
                    chunk = self._chunks.get_nowait()
                except queue.Empty:
                    self._threads -= 1
                    return
            try:
                self._buy(chunk)
            except BaseException as error:  # raised where the answers are wanted
                for order in chunk:
                    self._fail(order, error)

    def _buy(self, chunk: list[Order]) -> None:
        """Delivers the answers of a chunk, bought here or by whoever has leased them."""
        left = {order.key: order for order in chunk}
        while left and not self._cancelled.is_set():
            leased = self._leases.take(left)
            try:
                for name, reply in self.store.get_many(left).items():
                    self._deliver(left.pop(name), reply)
                # What is not delivered was leased by somebody else in the meantime: once more.
                for order, outcome in self._ask([left[name] for name in left if name in leased]):
                    self._deliver(left.pop(order.key), outcome, isinstance(outcome, Reply))
            finally:
                # Not the whole chunk: one that failed may be another thread's by now.
                self._leases.release(leased)
            if left:
                self._cancelled.wait(POLL_SECONDS)
        for order in left.values():
            self._deliver(order, CANCELLED)

    def _ask(self, orders: list[Order]) -> Iterator[tuple[Order, Outcome]]:
        """Yields each order with its outcome, once that is stored; not those whose lease ran out.

        orders: all leased by us. An attempt that fails while the circuit is open does not count
        against the order: the outage as a whole is given `retries` probes.
        """
        attempt = 0
        while orders:
            admission = self._admission()
            if isinstance(admission, Failure):
                yield from ((order, admission) for order in orders)
                return
            prices = {order.key: self.cloud.highest_usd(order.messages) for order in orders}
            # Right before the call, as this process may have been stopped for any time by now.
            with self.store.transaction() as db:
                held = self._leases.extend(db, prices)
                orders = [order for order in orders if order.key in held]
                granted = self.budget.reserve(db, [prices[order.key] for order in orders])
            sent, refused = orders[:granted], orders[granted:]
            outcomes = self._call(sent, prices, admission == "probe") if sent else []
            outage = self.breaker.is_open
            again: list[tuple[Order, Failure]] = []
            for order, outcome in outcomes:
                if isinstance(outcome, Failure) and self._may_try_again(outcome, attempt, outage):
                    again.append((order, outcome))
                else:
                    yield order, outcome
            if refused and self.policy.stop_when_spent:
                raise BudgetSpent(self.budget.message())
            self.reasons.update([SPENT.reason] * len(refused))
            yield from ((order, SPENT) for order in refused)
            if again:
                asked_for = [f.retry_after for _, f in again if f.retry_after is not None]
                self._cancelled.wait(pause(attempt, max(asked_for, default=None)))
                attempt += not (outage and all(failure.outage for _, failure in again))
            orders = [order for order, _ in again]

    def _admission(self) -> Admission | Failure:
        """Waits until a call may be made; returns a Failure where the outage outlasts the retries.

        That takes at most `retries` probes; see `attempts.py` for the seconds.
        """
        while not self._cancelled.is_set():
            if admission := self.breaker.admit():
                return admission
            if self.breaker.gave_up(self.policy.retries):
                return Failure(f"given up in an outage: {self._outage}")
            self._cancelled.wait(min(POLL_SECONDS, self.breaker.seconds_left()))
        return CANCELLED

    def _may_try_again(self, failure: Failure, attempt: int, outage: bool) -> bool:
        """Returns whether attempt number `attempt`, from 0, is to be followed by another."""
        if outage and failure.outage:
            return failure.retry and not self.breaker.gave_up(self.policy.retries)
        return failure.retry and attempt < self.policy.retries

    def _call(
        self, orders: list[Order], prices: dict[str, float], probe: bool
    ) -> list[tuple[Order, Outcome]]:
        """Makes one attempt; its answers are stored and its cost is booked when it returns.

        prices: highest USD, by key; they are reserved.
        """
        booked = sum(prices[order.key] for order in orders)
        try:
            outcomes: list[Outcome] = list(self.cloud.answer([order.messages for order in orders]))
            if len(outcomes) != len(orders):
                raise ValueError("as many replies as prompts are needed")
        except UserError:  # with what to mend, which another prompt does not change
            with self.store.transaction() as db:
                settle(db, booked, 0.0, unsent=len(orders))
            raise
        except Exception as error:  # a cloud that breaks its promise fails the chunk, not the run
            # The type alone: an exception's text may hold a prompt or a key.
            outcomes = [Failure(type(error).__name__, usd=None)] * len(orders)
        pairs = list(zip(orders, outcomes, strict=True))
        replies = [(order, reply) for order, reply in pairs if isinstance(reply, Reply)]
        cost = sum(prices[o.key] if r.usd is None else r.usd for o, r in pairs)
        with self.store.transaction() as db:
            insert(db, [self._row(order, reply) for order, reply in replies])
            settle(db, booked, cost)
        # Should another process have been quicker, its answer is the stored one.
        stored = self.store.get_many(order.key for order, _ in replies)
        self._succeeded |= bool(replies)
        with self._lock:
            bought, failed, tokens, usd = self._tally
            tokens += sum(reply.input_tokens + reply.output_tokens for _, reply in replies)
            self._tally = Tally(bought + len(replies), failed, tokens, usd + cost)
        self._note_failures((r for r in outcomes if isinstance(r, Failure)), probe)
        if replies:
            self.breaker.note_life()
        return [(order, stored.get(order.key, outcome)) for order, outcome in pairs]

    def _row(self, order: Order, reply: Reply) -> tuple:
        cloud = self.cloud
        return row(cloud.model, cloud.parameters, order.messages, reply, cloud.provider)

    def _note_failures(self, failures: Iterable[Failure], probe: bool) -> None:
        """Counts failures and tells the circuit breaker.

        Raises CloudError for what the user must mend, unless a call has succeeded before.
        """
        for failure in failures:
            self.reasons[failure.reason] += 1
            if self.reasons[failure.reason] == 1:
                log.warning(
                    "cloud %s: a call failed (%s); more of these are only counted",
                    self.cloud.model,
                    failure.reason,
                )
            if failure.outage or failure.fix:
                self._outage = failure.reason
                self.breaker.note_outage(probe, final=bool(failure.fix))
            else:
                self.breaker.note_life()
            if failure.fix and not self._succeeded:
                raise CloudError(f"cloud {self.cloud.model}: {failure.reason}: {failure.fix}")

    def _deliver(self, order: Order, outcome: Outcome, bought: bool = False) -> None:
        with self._lock:
            self._in_progress.pop(order.key, None)
            if isinstance(outcome, Failure) and outcome is not SPENT:
                self._tally = self._tally._replace(failed=self._tally.failed + 1)
        order.delivery.set_result(Delivery(outcome, bought))

    def _fail(self, order: Order, error: BaseException) -> None:
        """Raises `error` where the answer is wanted, unless it was delivered."""
        if not order.delivery.done():
            with self._lock:
                self._in_progress.pop(order.key, None)
            order.delivery.set_exception(error)
