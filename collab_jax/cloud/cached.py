"""The cloud as training, evaluation and serving see it: store first, and every new answer stored
before it is used.

What the store lacks is bought by threads in the background, each prompt in these steps: lease its
key; book the call; ask; then, in one transaction, store the answer and book what it cost; give the
key back. A process killed between any two of them has lost at most the calls in flight.
"""

import concurrent.futures
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from collab_jax.cloud.attempts import Breaker, pause
from collab_jax.cloud.budget import Budget, BudgetSpent, settle
from collab_jax.cloud.leases import Leases
from collab_jax.cloud.protocol import Cloud, CloudError, Failure, Messages, Reply
from collab_jax.cloud.store import Store, insert, key, row
from collab_jax.runtime.errors import UserError

log = logging.getLogger(__name__)

MODES = ("live", "record", "replay")
POLL_SECONDS = 0.2  # how often to look for an answer that another process is buying
SPENT = Failure("budget")
OPEN = Failure("circuit open")
CANCELLED = Failure("cancelled")


class Policy(NamedTuple):
    """How answers are bought. The defaults: without limits, and once.

    mode: "live" buys what is missing, and what fails is unknown; "record" is the same, but a
    failure is an error, so that the store ends whole; "replay" buys nothing, and what is missing is
    an error.
    """

    mode: str = "live"
    retries: int = 0  # attempts after the first
    max_calls: int | None = None
    max_usd: float | None = None
    stop: bool = False  # a spent budget is an error, else it leaves prompts unknown


class Answers(NamedTuple):
    """Replies in the order of the prompts (None: unknown); how many distinct prompts were bought
    for it, and failed.
    """

    replies: list[Reply | None]
    bought: int
    failed: int


class Tally(NamedTuple):
    """What a process bought."""

    bought: int = 0  # answers
    failed: int = 0  # prompts whose attempts were used up
    tokens: int = 0  # input + output
    usd: float = 0.0


class Order(NamedTuple):
    """One prompt to buy. result: (Reply or Failure, whether we paid for it)."""

    key: str
    messages: Messages
    result: Future


class Pending:
    """Answers on their way."""

    def __init__(
        self,
        keys: list[str],
        found: dict[str, Reply],
        orders: dict[str, Future],
        own: set[str],
        strict: bool,
    ):
        self._keys, self._found, self._orders, self._own, self._strict = (
            keys,
            found,
            orders,
            own,
            strict,
        )

    def done(self) -> bool:
        return all(order.done() for order in self._orders.values())

    def answers(self, wait: float | None = None) -> Answers:
        """What is known after at most `wait` seconds (None: everything); the rest is bought in the
        background, and is None.

        Raises StoreError when the store fails; CloudError where the cloud cannot be used, where a
        budget that stops is spent, and in mode "record" for a failure.
        """
        done, _ = concurrent.futures.wait(self._orders.values(), None if self._strict else wait)
        results = {name: order.result() for name, order in self._orders.items() if order in done}
        replies = self._found | {
            name: r for name, (r, _) in results.items() if isinstance(r, Reply)
        }
        if self._strict and (
            failures := [r for r, _ in results.values() if isinstance(r, Failure)]
        ):
            raise CloudError(
                f"config.cloud.mode='record' wants every answer, but {len(failures)} prompts have none ({failures[0].reason}): "
                "start again to buy the rest, or use mode 'live'"
            )
        bought = sum(bought for name, (_, bought) in results.items() if name in self._own)
        failed = sum(isinstance(r, Failure) and r is not SPENT for r, _ in results.values())
        return Answers([replies.get(name) for name in self._keys], bought, failed)


class CachedCloud:
    """A cloud that is asked at most once for each distinct (model, prompt, parameters); threads and
    processes may share it.
    """

    def __init__(self, cloud: Cloud, store: Store, policy: Policy = Policy()):  # noqa: B008 (immutable)
        self.cloud, self.store, self.policy = cloud, store, policy
        self.budget = Budget(store, policy.max_calls, policy.max_usd)
        self.reasons: Counter[str] = Counter()  # why calls failed, retried ones included
        self.breaker = Breaker(cloud.workers)
        self._leases = Leases(store)
        self._lock = threading.Lock()
        self._chunks: queue.SimpleQueue[list[Order]] = queue.SimpleQueue()
        self._flying: dict[str, Future] = {}
        self._threads, self._renewing = 0, False
        self._cancelled = threading.Event()
        self._tally = Tally()
        self._succeeded = False

    def key(self, messages: Messages) -> str:
        """What the answer to `messages` is filed under."""
        return key(self.cloud.model, messages, self.cloud.parameters)

    def answer(self, prompts: Sequence[Messages], names: Sequence[str] | None = None) -> Answers:
        """Answers each prompt. A failed call is None, is not stored, and is asked again next time;
        `Pending` has the errors.
        """
        return self.submit(prompts, names).answers()

    def submit(self, prompts: Sequence[Messages], names: Sequence[str] | None = None) -> Pending:
        """Looks prompts up and starts to buy what is missing. names: of the prompts, for messages.

        Raises StoreError, and CloudError in mode "replay" where an answer is missing.
        """
        keys = [self.key(messages) for messages in prompts]
        names = dict(zip(keys, names or [name[:12] for name in keys], strict=True))
        distinct = dict(zip(keys, prompts, strict=True))
        found = self.store.get_many(distinct)
        missing = [name for name in distinct if name not in found]
        if missing and self.policy.mode == "replay":
            shown = ", ".join(names[name] for name in missing[:3])
            raise CloudError(
                f"config.cloud.mode='replay': {len(missing)} prompts have no answer of {self.cloud.model} in {self.store.path} "
                f"(as {shown}): import it, or use mode 'live'"
            )
        with self._lock:
            new = [Order(n, distinct[n], Future()) for n in missing if n not in self._flying]
            self._flying |= {order.key: order.result for order in new}
            orders = {name: self._flying[name] for name in missing}
            for start in range(0, len(new), self.cloud.batch):
                self._chunks.put(new[start : start + self.cloud.batch])
                if self._threads < self.cloud.workers:
                    self._start_thread()
        return Pending(
            keys, found, orders, {order.key for order in new}, self.policy.mode == "record"
        )

    def take_tally(self) -> Tally:
        """What was bought since the last call of this method."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def cancel(self) -> None:
        """No more calls: prompts that wait fail; calls in flight come to their end, as they are
        paid for.
        """
        self._cancelled.set()

    # ------------------------------------------------------------------------------------- in the background

    def _start_thread(self) -> None:
        # Daemons: a process that ends does not wait for a slow cloud.
        if not self._renewing:
            self._renewing = True
            threading.Thread(target=self._renew, daemon=True).start()
        self._threads += 1
        threading.Thread(target=self._work, daemon=True).start()

    def _renew(self) -> None:
        """Moves the leases on while there is work."""
        while True:
            time.sleep(self._leases.seconds / 5)
            with self._lock:
                self._renewing = self._threads > 0
                if not self._renewing:
                    return
            try:
                self._leases.renew()
            except Exception as error:  # what it means for the answers, their threads will find out
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
                    self._finish(order, error=error)

    def _buy(self, chunk: list[Order]) -> None:
        """Answers of a chunk, by us or by whoever has leased them."""
        left = {order.key: order for order in chunk}
        while left and not self._cancelled.is_set():
            mine = self._leases.take(left)
            try:
                for name, reply in self.store.get_many(left).items():
                    self._finish(left.pop(name), reply)
                for order, outcome in self._ask(
                    [left.pop(name) for name in list(left) if name in mine]
                ):
                    self._finish(order, outcome, bought=isinstance(outcome, Reply))
            finally:
                self._leases.release(
                    mine
                )  # not all of the chunk: one that failed may be another thread's by now
            if left:
                self._cancelled.wait(POLL_SECONDS)
        for order in left.values():
            self._finish(order, CANCELLED)

    def _ask(self, orders: list[Order]):
        """Yields each order and its outcome, once that is stored. All are leased by us."""
        attempt = 0
        while orders:
            if self._cancelled.is_set() or not self.breaker.allows():
                yield from (
                    (order, CANCELLED if self._cancelled.is_set() else OPEN) for order in orders
                )
                return
            prices = [self.cloud.highest_usd(order.messages) for order in orders]
            granted = self.budget.reserve(prices)
            refused, orders = orders[granted:], orders[:granted]
            outcomes = self._call(orders, prices[:granted]) if orders else []
            again = []
            for order, outcome in outcomes:
                if isinstance(outcome, Failure) and outcome.retry and attempt < self.policy.retries:
                    again.append(order)
                else:
                    yield order, outcome
            if refused and self.policy.stop:
                raise BudgetSpent(self.budget.message())
            if refused:
                self.reasons[SPENT.reason] += len(refused)
            yield from ((order, SPENT) for order in refused)
            if again:
                asked_for = [
                    r.retry_after
                    for _, r in outcomes
                    if isinstance(r, Failure) and r.retry_after is not None
                ]
                self._cancelled.wait(pause(attempt, max(asked_for, default=None)))
            orders, attempt = again, attempt + 1

    def _call(
        self, orders: list[Order], prices: list[float]
    ) -> list[tuple[Order, Reply | Failure]]:
        """One attempt; its answers are stored and its cost is booked when it returns."""
        model, parameters = self.cloud.model, self.cloud.parameters
        try:
            outcomes = self.cloud.answer([order.messages for order in orders])
            if len(outcomes) != len(orders):
                raise ValueError("as many replies as prompts are needed")
        except UserError:  # with what to mend, which another prompt does not change
            with self.store.transaction() as db:
                settle(db, sum(prices), 0.0, unsent=len(orders))
            raise
        except Exception as error:  # a cloud that breaks its promise fails the chunk, not the run
            # The type alone: an exception's text may hold a prompt or a key.
            outcomes = [Failure(type(error).__name__, usd=None)] * len(orders)
        pairs = list(zip(orders, outcomes, strict=True))
        rows = [row(model, parameters, o.messages, r) for o, r in pairs if isinstance(r, Reply)]
        cost = sum(
            price if r.usd is None else r.usd for price, r in zip(prices, outcomes, strict=True)
        )
        with self.store.transaction() as db:
            insert(db, rows)
            settle(db, sum(prices), cost)
        stored = self.store.get_many(
            values[0] for values in rows
        )  # should another have been quicker, its answer
        replies = [r for r in outcomes if isinstance(r, Reply)]
        self._succeeded |= bool(replies)
        with self._lock:
            t = self._tally
            tokens = sum(r.input_tokens + r.output_tokens for r in replies)
            self._tally = t._replace(
                bought=t.bought + len(rows), tokens=t.tokens + tokens, usd=t.usd + cost
            )
        for failure in (r for r in outcomes if isinstance(r, Failure)):
            self._note(failure)
        if replies:
            self.breaker.note(outage=False)
        return [(order, stored.get(order.key, outcome)) for order, outcome in pairs]

    def _note(self, failure: Failure) -> None:
        self.reasons[failure.reason] += 1
        if self.reasons[failure.reason] == 1:
            log.warning(
                "cloud %s: a call failed (%s); more of these are only counted",
                self.cloud.model,
                failure.reason,
            )
        self.breaker.note(failure.outage or bool(failure.fix), at_once=bool(failure.fix))
        if failure.fix and not self._succeeded:
            raise CloudError(f"cloud {self.cloud.model}: {failure.reason}: {failure.fix}")

    def _finish(
        self, order: Order, outcome: Reply | Failure | None = None, bought=False, error=None
    ) -> None:
        if order.result.done():
            return
        with self._lock:
            self._flying.pop(order.key, None)
            if isinstance(outcome, Failure) and outcome is not SPENT:
                self._tally = self._tally._replace(failed=self._tally.failed + 1)
        if error:
            order.result.set_exception(error)
        else:
            order.result.set_result((outcome, bought))
