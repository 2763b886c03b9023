"""The cloud as training, evaluation and serving see it: the store first, then whoever sells."""

import concurrent.futures
import dataclasses
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from collab_jax.cloud.attempts import Breaker
from collab_jax.cloud.budget import Budget
from collab_jax.cloud.buyer import SPENT, Buyer, Delivery, Policy, Tally
from collab_jax.cloud.protocol import Cloud, CloudError, Reply
from collab_jax.cloud.redaction import Redact, Redacted, as_it_is
from collab_jax.cloud.store import Store, key
from collab_jax.models.text import Messages

MODES = ("live", "record", "replay")


class Answers(NamedTuple):
    """Replies in the order of the prompts (None: unknown), and what was bought for them."""

    replies: list[Reply | None]
    bought: int  # distinct prompts
    failed: int  # distinct prompts


def restored(query: Redacted, reply: Reply | None) -> Reply | None:
    """Returns an answer with what the query's placeholders stand for."""
    if reply is None or not query.originals:
        return reply
    text, reasoning = query.restore(reply.text), query.restore(reply.reasoning)
    return dataclasses.replace(reply, text=text, reasoning=reasoning)


class Pending:
    """Answers that are being bought: the order of the prompts, what is there, and what will be."""

    def __init__(
        self,
        queries: Sequence[Redacted],
        keys: list[str],
        stored: dict[str, Reply],
        deliveries: dict[str, Future[Delivery]],
        ordered_here: frozenset[str],
        every_answer: bool,
    ):
        self._queries = queries
        self._keys = keys
        self._stored = stored
        self._deliveries = deliveries
        self._ordered_here = ordered_here
        self._every_answer = every_answer

    def done(self) -> bool:
        """Returns whether every order has ended."""
        return all(delivery.done() for delivery in self._deliveries.values())

    def answers(self, wait: float | None = None) -> Answers:
        """Returns what is known after at most `wait` seconds; None waits for every order to end.

        The rest is None, and is bought in the background for whoever asks later. In mode "record"
        it waits in any case. Raises StoreError when the store fails; CloudError where the cloud
        cannot be used, where a budget that stops is spent, and in mode "record" for a failure.
        """
        ended, _ = concurrent.futures.wait(
            self._deliveries.values(), None if self._every_answer else wait
        )
        delivered = {
            k: future.result() for k, future in self._deliveries.items() if future in ended
        }
        replies, failures = dict(self._stored), []
        for name, (outcome, _) in delivered.items():
            if isinstance(outcome, Reply):
                replies[name] = outcome
            else:
                failures.append(outcome)
        if self._every_answer and failures:
            raise CloudError(
                f"config.cloud.mode='record' wants every answer, but {len(failures)} prompts have "
                f"none ({failures[0].reason}): start again to buy the rest, or use mode 'live'"
            )
        asked = zip(self._queries, self._keys, strict=True)
        return Answers(
            [restored(query, replies.get(name)) for query, name in asked],
            bought=sum(d.bought for k, d in delivered.items() if k in self._ordered_here),
            failed=sum(failure is not SPENT for failure in failures),
        )


class CachedCloud:
    """A cloud that is asked at most once for each distinct prompt, whoever asks.

    An answer is filed under (model, prompt, parameters, provider), the prompt being what is left of
    it after `redact`. Threads and processes may share it.
    """

    def __init__(
        self,
        cloud: Cloud,
        store: Store,
        policy: Policy | None = None,
        redact: Redact = as_it_is,
    ):
        self.cloud, self.store, self.policy = cloud, store, policy or Policy()
        self.redact = redact
        if cloud.provider:
            store.adopt(cloud.model, cloud.parameters, cloud.provider)
        self._buyer = Buyer(cloud, store, self.policy)

    @property
    def budget(self) -> Budget:
        """What was spent, and its limits."""
        return self._buyer.budget

    @property
    def breaker(self) -> Breaker:
        """Whether calls are made at present."""
        return self._buyer.breaker

    @property
    def reasons(self) -> Counter[str]:
        """Why calls failed, and how often, retried ones included."""
        return self._buyer.reasons

    def key(self, messages: Messages) -> str:
        """Returns what the answer to `messages`, as they are sent, is filed under."""
        return key(self.cloud.model, messages, self.cloud.parameters, self.cloud.provider)

    def key_of(self, messages: Messages) -> str:
        """Returns what the answer to a prompt is filed under, once that is redacted."""
        return self.key(self.redact(messages).messages)

    def answer(self, prompts: Sequence[Messages], names: Sequence[str] | None = None) -> Answers:
        """Answers each prompt; waits for all of them, and raises as `Pending.answers` does.

        A failed call is None, is not stored, and is made again next time.
        """
        return self.submit(prompts, names).answers()

    def submit(self, prompts: Sequence[Messages], names: Sequence[str] | None = None) -> Pending:
        """Looks prompts up, redacted, and starts to buy what is missing; raises as `order` does."""
        return self.order([self.redact(messages) for messages in prompts], names)

    def order(self, queries: Sequence[Redacted], names: Sequence[str] | None = None) -> Pending:
        """Looks queries up and starts to buy what is missing.

        names: what messages call the queries. Raises StoreError, and CloudError in mode "replay"
        where an answer is missing.
        """
        keys = [self.key(query.messages) for query in queries]
        names_by_key = dict(zip(keys, names or [name[:12] for name in keys], strict=True))
        distinct = {k: query.messages for k, query in zip(keys, queries, strict=True)}
        stored = self.store.get_many(distinct)
        missing = {k: messages for k, messages in distinct.items() if k not in stored}
        if missing and self.policy.mode == "replay":
            raise self._not_stored([names_by_key[name] for name in missing])
        deliveries, ordered_here = self._buyer.order(missing)
        every_answer = self.policy.mode == "record"
        return Pending(queries, keys, stored, deliveries, ordered_here, every_answer)

    def stored(self, queries: Sequence[Redacted]) -> list[Reply | None]:
        """Returns the answers that are there already, by query; None where there is none."""
        keys = [self.key(query.messages) for query in queries]
        replies = self.store.get_many(keys)
        asked = zip(queries, keys, strict=True)
        return [restored(query, replies.get(name)) for query, name in asked]

    def take_tally(self) -> Tally:
        """Returns what was bought since the last call of this method."""
        return self._buyer.take_tally()

    def cancel(self) -> None:
        """Makes no more calls: prompts that wait fail; calls in flight, being paid for, end."""
        self._buyer.cancel()

    def _not_stored(self, names: list[str]) -> CloudError:
        """Returns the error of mode "replay", which tells of answers that other providers gave."""
        cloud = self.cloud
        others = self.store.query(
            "SELECT DISTINCT provider FROM answers WHERE model = ? AND provider <> ?",
            [cloud.model, cloud.provider],
        )
        of_others = f"; it has answers of {', '.join(name for (name,) in others)}" * bool(others)
        return CloudError(
            f"config.cloud.mode='replay': {len(names)} prompts have no answer of {cloud.model}"
            f"{f' by {cloud.provider}' * bool(cloud.provider)} in {self.store.path} (as "
            f"{', '.join(names[:3])}){of_others}: import it, name another config.cloud.provider, "
            "or use mode 'live'"
        )
