"""The cloud from asyncio: its answers as they come, each bought once however many wait for it.

An answer that is stored costs nothing. A provider's is streamed; a simulated or local cloud's comes
in one piece, as does one that another process buys: a key is leased while it is bought, like those
of training (`cloud/leases.py`). So is a purchase booked (`cloud/budget.py`): at the highest price
before it is made, then at what it cost, and at the highest price for good where nobody knows.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

from collab_jax.cloud import CachedCloud, Failure, Reply, attempts
from collab_jax.cloud.budget import settle
from collab_jax.cloud.buyer import POLL_SECONDS
from collab_jax.cloud.leases import Leases
from collab_jax.cloud.openai import OpenAICloud
from collab_jax.cloud.redaction import Redacted, Restorer, as_it_is
from collab_jax.cloud.store import insert, row
from collab_jax.cloud.streaming import Delta, stream
from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError
from collab_jax.tasks.base import answer_of

log = logging.getLogger(__name__)

THREADS = 16  # that redact, or wait for a cloud that does not stream
BOOK_THREADS = 4  # that read and write the store, for which nobody is to wait behind those
LEAST_SECONDS = 0.05  # before its deadline a call is not begun any more
# How long a call goes on for nobody: one that ends in the meantime need not be paid for again.
GRACE_SECONDS = 1.0
T = TypeVar("T")


class CloudFailed(Exception):
    """There is no answer. `reason` is short and holds neither prompt nor key."""

    def __init__(self, reason: str, retry_after: float | None = None, usd: float = 0.0):
        super().__init__(reason)
        self.reason, self.retry_after, self.usd = reason, retry_after, usd


class _LeaseLost(Exception):
    """Another process may have bought what this one was about to."""


class Bought(NamedTuple):
    """The end of an answer. usd: what this purchase cost, 0 for whoever shares it, or stored."""

    reply: Reply
    usd: float
    attempts: int


class _Purchase:
    """One answer on its way to those who wait for it. seconds: until its deadline."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.deltas: list[Delta] = []
        self.end: Bought | CloudFailed | None = None
        self.usd = 0.0  # booked so far
        self.limits: list[float] = []  # of each listener: USD that it may cost
        self.paid = False  # by the first listener that hears the end, or by nobody
        self.task: asyncio.Task | None = None
        self.booking: Future[None] | None = None  # of the last call
        self._changed = asyncio.Event()

    def tell(self) -> None:
        """Wakes the listeners."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        await self._changed.wait()


class _Restoring:
    """Deltas with what the placeholders of a query stand for."""

    def __init__(self, query: Redacted):
        self._reasoning, self._content = Restorer(query), Restorer(query)

    def feed(self, delta: Delta) -> Delta:
        reasoning = self._reasoning.feed(delta.reasoning)
        if delta.content:  # nothing follows the reasoning
            reasoning += self._reasoning.finish()
        return Delta(reasoning, self._content.feed(delta.content))

    def finish(self) -> Delta:
        return Delta(self._reasoning.finish(), self._content.finish())


class Upstream:
    """The cloud of a server; to be used in one event loop.

    seconds: the deadline of an answer, with its retries.
    """

    def __init__(self, cloud: CachedCloud, seconds: float):
        if isinstance(cloud.cloud, OpenAICloud):
            # Half a second, which the first call would else take from everybody's.
            import openai  # noqa: F401
        self.cloud, self.seconds = cloud, seconds
        self.abandoned_usd = 0.0  # of calls that nobody waited for any longer, at most
        self._client = None
        self._purchases: dict[str, _Purchase] = {}
        self._leases = Leases(cloud.store)
        self._renewing: asyncio.Task | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="cloud")
        self._books = ThreadPoolExecutor(BOOK_THREADS, thread_name_prefix="books")

    @property
    def model(self) -> str:
        return self.cloud.cloud.model

    async def redact(self, messages: Messages) -> Redacted:
        """What leaves the device of a query. Raises CloudFailed where nothing can leave."""
        try:
            return await _in(self._threads, lambda: self.cloud.redact(messages))
        except UserError as error:  # a function of whoever runs the server
            log.error("nothing is sent: %s", error)
            raise CloudFailed("not configured") from None

    def highest_usd(self, query: Redacted) -> float:
        """A price that one answer does not exceed."""
        return self.cloud.cloud.highest_usd(query.messages)

    @property
    def down(self) -> bool:
        """Whether the cloud is taken to be out of order."""
        return self.cloud.breaker.is_open

    @property
    def barred(self) -> bool:
        """Whether no call is admitted now, since the cloud is out of order."""
        return self.cloud.breaker.seconds_left() > 0

    @property
    def pending(self) -> int:
        """Answers that are on their way."""
        return len(self._purchases)

    async def ask(
        self, query: Redacted, most: float = math.inf
    ) -> AsyncGenerator[Delta | Bought, None]:
        """Yields the answer as it comes, restored, then its end. Raises CloudFailed.

        most: USD that all attempts may cost; a single one's highest price is within it. The reply
        of the end is the stored one, with placeholders. Where the iterator is closed, and nobody
        else waits for the answer or comes for it within GRACE_SECONDS, the call is ended.
        """
        key, restoring = self.cloud.key(query.messages), _Restoring(query)
        purchase = self._purchases.get(key)
        if purchase is None:
            purchase = self._purchases[key] = _Purchase(self.seconds)
            purchase.task = asyncio.create_task(self._buy(purchase, key, query.messages))
        elif purchase.usd + self.highest_usd(query) > most:
            raise CloudFailed("max_usd")
        purchase.limits.append(most)
        seen = 0
        try:
            while True:
                while seen < len(purchase.deltas):
                    seen += 1
                    if any(delta := restoring.feed(purchase.deltas[seen - 1])):
                        yield delta
                if (end := purchase.end) is not None:
                    usd, purchase.paid = 0.0 if purchase.paid else end.usd, True
                    if isinstance(end, CloudFailed):
                        raise CloudFailed(end.reason, end.retry_after, usd)
                    if any(delta := restoring.finish()):
                        yield delta
                    yield end._replace(usd=usd)
                    return
                await purchase.change()
        finally:
            purchase.limits.remove(most)
            if not purchase.limits and purchase.task:
                if purchase.task.done():
                    self._abandon(purchase)
                else:
                    loop = asyncio.get_running_loop()
                    loop.call_later(GRACE_SECONDS, self._end_unheard, key, purchase)

    def _end_unheard(self, key: str, purchase: _Purchase) -> None:
        """Ends a call that nobody waits for."""
        if not purchase.limits and purchase.task and not purchase.task.done():
            if self._purchases.get(key) is purchase:
                del self._purchases[key]
            purchase.task.cancel()

    def _abandon(self, purchase: _Purchase) -> None:
        """Notes what was booked for an answer whose listeners have left before its end."""
        if not purchase.limits and not purchase.paid:
            self.abandoned_usd += purchase.usd
            purchase.paid = True

    async def close(self) -> None:
        """Ends what is on its way, and the connections."""
        tasks = [p.task for p in self._purchases.values() if p.task]
        tasks += [self._renewing] if self._renewing else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        self._books.shutdown()  # what was bought is stored
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------- one purchase

    async def _buy(self, purchase: _Purchase, key: str, messages: Messages) -> None:
        try:
            if stored := await self._stored(key):
                purchase.deltas.append(self._whole(stored))
                purchase.end = Bought(stored, 0.0, 0)
            elif isinstance(self.cloud.cloud, OpenAICloud) and self.cloud.policy.mode != "replay":
                purchase.end = await self._leased(purchase, key, self.cloud.cloud, messages)
            else:
                purchase.end = await self._in_one_piece(purchase, messages)
        except CloudFailed as failed:
            purchase.end = failed
        except UserError as error:  # the key, the store, a setting: for whoever runs the server
            log.error("the cloud cannot be used: %s", error)
            purchase.end = CloudFailed("not configured")
        except Exception as error:
            log.exception("a purchase failed")
            purchase.end = CloudFailed(type(error).__name__)
        finally:
            if self._purchases.get(key) is purchase:
                del self._purchases[key]
            self._abandon(purchase)
            purchase.tell()

    async def _in_one_piece(self, purchase: _Purchase, messages: Messages) -> Bought:
        """Buys from a cloud that does not stream."""
        pending = await _in(self._threads, lambda: self.cloud.order([as_it_is(messages)]))
        left = purchase.deadline - time.monotonic()
        answers = await _in(self._threads, lambda: pending.answers(left))
        [reply] = answers.replies
        if reply is None:
            reasons = self.cloud.reasons.most_common(1)
            raise CloudFailed(reasons[0][0] if reasons else "timeout")
        purchase.deltas.append(self._whole(reply))
        purchase.usd = reply.usd if answers.bought else 0.0
        return Bought(reply, purchase.usd, 1)

    def _whole(self, reply: Reply) -> Delta:
        """A reply in one piece; a cloud that answers as a task wants, without the task's tags."""
        text = reply.text
        if not isinstance(self.cloud.cloud, OpenAICloud):
            text = answer_of(text) or text
        return Delta(reply.reasoning, text)

    async def _leased(
        self, purchase: _Purchase, key: str, cloud: OpenAICloud, messages: Messages
    ) -> Bought:
        """Buys a stream once no other process buys the same, or has the answer of that one."""
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        while time.monotonic() < purchase.deadline:
            lease = self._books.submit(self._leases.take, [key])
            try:
                if await asyncio.wrap_future(lease):
                    # The last holder may have bought it.
                    if stored := await self._stored(key):
                        purchase.deltas.append(self._whole(stored))
                        return Bought(stored, purchase.usd, 0)
                    return await self._streamed(purchase, key, cloud, messages)
            except _LeaseLost:
                continue
            finally:
                self._books.submit(self._give_back, lease, purchase)
            await asyncio.sleep(POLL_SECONDS)
        raise CloudFailed("another process has not bought it in time", usd=purchase.usd)

    def _give_back(self, lease: Future[set[str]], purchase: _Purchase) -> None:
        """Ends a lease, if it was granted, once what was bought under it is in the store."""
        if purchase.booking:
            wait([purchase.booking])
        self._leases.release(lease.result())

    async def _renew(self) -> None:
        """Extends the leases for as long as the server runs."""
        while True:
            await asyncio.sleep(self._leases.seconds / 5)
            try:
                await _in(self._books, self._leases.renew)
            except UserError as error:  # whoever buys will meet it
                log.warning("leases not renewed: %s", error)

    async def _stored(self, key: str) -> Reply | None:
        return (await _in(self._books, lambda: self.cloud.store.get_many([key]))).get(key)

    async def _streamed(
        self, purchase: _Purchase, key: str, cloud: OpenAICloud, messages: Messages
    ) -> Bought:
        """Buys a stream, with retries as long as nothing of it was seen."""
        if self._client is None:
            self._client = cloud.make_client()
        breaker, highest = self.cloud.breaker, cloud.highest_usd(messages)
        for attempt in range(self.cloud.policy.retries + 1):
            if purchase.deadline - time.monotonic() < LEAST_SECONDS:
                raise CloudFailed("timeout", usd=purchase.usd)
            admission = breaker.admit()  # a probe that is granted has to be made
            if admission is None:
                raise CloudFailed("down", breaker.seconds_left(), purchase.usd)
            if not await self._reserve(key, highest):
                raise CloudFailed("the cloud's budget is spent", usd=purchase.usd)
            outcome = Failure("cut off", usd=None)
            try:
                left = max(purchase.deadline - time.monotonic(), LEAST_SECONDS)
                calls = stream(cloud, self._client, messages, left)
                async with contextlib.aclosing(calls):
                    async for item in calls:
                        if isinstance(item, Delta):
                            if not purchase.deltas:
                                breaker.note_life()
                            purchase.deltas.append(item)
                            purchase.tell()
                        else:
                            outcome = item
            finally:  # also where the last listener has left
                usd = highest if outcome.usd is None else outcome.usd
                purchase.usd += usd
                purchase.booking = self._books.submit(self._book, messages, outcome, highest, usd)
            # Shielded: what was bought is stored, even if the last listener leaves now.
            await asyncio.shield(asyncio.wrap_future(purchase.booking))
            if isinstance(outcome, Reply):
                breaker.note_life()
                return Bought(outcome, purchase.usd, attempt + 1)
            if purchase.deltas:  # it lives, and is too slow for the deadline
                outcome = dataclasses.replace(outcome, outage=False)
            self._note(outcome, admission == "probe")
            pause = attempts.pause(attempt, outcome.retry_after)
            last = (
                attempt == self.cloud.policy.retries or time.monotonic() + pause > purchase.deadline
            )
            last = last or purchase.usd + highest > min(purchase.limits, default=math.inf)
            if purchase.deltas or last or not outcome.retry:
                raise CloudFailed(outcome.reason, outcome.retry_after, purchase.usd)
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _reserve(self, key: str, usd: float) -> int:
        """Books a call at its highest price; returns 1, or 0 where the budget has no room.

        Raises _LeaseLost where this process has slept through the end of its lease.
        """

        def reserve() -> int:
            with self.cloud.store.transaction() as db:
                if not self._leases.extend(db, [key]):
                    raise _LeaseLost
                return self.cloud.budget.reserve(db, [usd])

        def undo(reserved: Future[int]) -> None:
            if not reserved.exception() and reserved.result():
                with self.cloud.store.transaction() as db:
                    settle(db, usd, 0.0, unsent=1)

        booking = self._books.submit(reserve)
        try:
            return await asyncio.shield(asyncio.wrap_future(booking))
        except asyncio.CancelledError:  # the last listener has left; the thread goes on
            booking.add_done_callback(undo)
            raise

    def _book(
        self, messages: Messages, outcome: Reply | Failure, booked: float, usd: float
    ) -> None:
        cloud = self.cloud.cloud
        with self.cloud.store.transaction() as db:
            if isinstance(outcome, Reply):
                insert(db, [row(cloud.model, cloud.parameters, messages, outcome, cloud.provider)])
            settle(db, booked, usd)

    def _note(self, failure: Failure, probe: bool) -> None:
        """Counts a failure and tells the circuit breaker."""
        self.cloud.reasons[failure.reason] += 1
        if failure.fix:
            log.error("the cloud cannot be used: %s: %s", failure.reason, failure.fix)
        if failure.outage or failure.fix:
            self.cloud.breaker.note_outage(probe, final=bool(failure.fix))
        else:
            self.cloud.breaker.note_life()


async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Waits for what `work` returns in a thread of the pool."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)
