"""The cloud as training, evaluation and serving see it: store first, and every new answer stored before it is used."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from collab_jax.cloud.protocol import Cloud, Messages, Reply
from collab_jax.cloud.store import Store, key

log = logging.getLogger(__name__)


class Answers(NamedTuple):
    """Replies in the order of the prompts (None: failed), and how many distinct prompts were bought and failed."""

    replies: list[Reply | None]
    bought: int
    failed: int


@dataclass(frozen=True)
class CachedCloud:
    """A cloud that is asked at most once for each distinct (model, prompt, parameters).

    Threads may share one. Separate processes on one store that want the same new prompt in the same moment may both
    ask; the first stored answer is then the answer for both.
    """

    cloud: Cloud
    store: Store
    _buying: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def answer(self, prompts: Sequence[Messages]) -> Answers:
        """Answers each prompt. A failed call is None, is not stored, and is asked again next time.

        Raises StoreError when the store fails: what cannot be stored must not be bought on.
        """
        keys = [key(self.cloud.model, messages, self.cloud.parameters) for messages in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        found = self.store.get_many(distinct)
        bought = 0
        if len(found) < len(distinct):
            with self._buying:  # look again inside: another thread may just have bought them
                found |= self.store.get_many(distinct.keys() - found.keys())
                missing = [messages for name, messages in distinct.items() if name not in found]
                new = [pair for pair in zip(missing, self._ask(missing), strict=True) if pair[1] is not None]
                found |= self.store.put_many(self.cloud.model, self.cloud.parameters, new) if new else {}
                bought = len(new)
        return Answers([found.get(name) for name in keys], bought, len(distinct) - len(found))

    def _ask(self, prompts: list[Messages]) -> list[Reply | None]:
        """The cloud's replies; a cloud that breaks its promise not to raise fails the batch, not the run."""
        if not prompts:
            return []
        try:
            replies = self.cloud.answer(prompts)
            if len(replies) != len(prompts):
                raise ValueError("as many replies as prompts are needed")
            return replies
        except Exception as error:
            # The type alone: an exception's text may hold a prompt or a key.
            log.warning("cloud %s: %d prompts unanswered (%s)", self.cloud.model, len(prompts), type(error).__name__)
            return [None] * len(prompts)
