"""The cloud of a job of several hosts: host 0 buys for all, from one store and one budget.

On the other hosts a FarCloud stands in the place of a `CachedCloud`: it collects what is asked
while a rollout is sampled. `settle` then brings the questions to host 0 and the answers back.
"""

import dataclasses
import time
from collections.abc import Sequence

from collab_jax.cloud.buyer import Tally
from collab_jax.cloud.cached import Answers, CachedCloud
from collab_jax.cloud.protocol import Reply
from collab_jax.models.text import Messages
from collab_jax.runtime import hosts


class FarPending:
    """Answers that `settle` will bring, in the order of the prompts."""

    def __init__(self, prompts: Sequence[Messages], names: Sequence[str] | None):
        self.prompts, self.names = prompts, names
        self.replies: list[Reply | None] | None = None

    def done(self) -> bool:
        """Returns whether they are there."""
        return self.replies is not None

    def answers(self, wait: float | None = None) -> Answers:
        """Returns the answers; host 0 has waited for them."""
        assert self.replies is not None, "settle comes first"
        return Answers(self.replies, bought=0, failed=0)


class FarCloud:
    """What a host other than the first asks instead of the cloud."""

    def __init__(self):
        self._asked: list[FarPending] = []

    def submit(self, prompts: Sequence[Messages], names: Sequence[str] | None = None) -> FarPending:
        """Returns the answers to come."""
        self._asked.append(FarPending(prompts, names))
        return self._asked[-1]

    def take_asked(self) -> list[FarPending]:
        """Returns what was asked since the last call."""
        asked, self._asked = self._asked, []
        return asked

    def take_tally(self) -> Tally:
        """Returns that nothing was bought here."""
        return Tally()


def settle(cloud: CachedCloud | FarCloud, seconds: float | None) -> None:
    """Answers what the other hosts have asked; every host calls it at the same place.

    seconds: how long host 0 waits for the cloud; what has not come by then is unknown. None: until
    every call has ended.
    """
    asked = cloud.take_asked() if isinstance(cloud, FarCloud) else []
    heard = hosts.gathered("what it asks the cloud", [[p.prompts, p.names] for p in asked])
    said = _bought(cloud, heard, seconds) if isinstance(cloud, CachedCloud) else None
    replies = hosts.gathered("what the cloud said", said, hosts.FOREVER)[0]
    for pending, of_pending in zip(asked, replies[hosts.index()], strict=True):
        pending.replies = [None if reply is None else Reply(**reply) for reply in of_pending]


def _bought(
    cloud: CachedCloud, heard: list[list], seconds: float | None
) -> list[list[list[dict | None]]]:
    """The replies to what each host has asked, as JSON has them."""
    ordered = [[cloud.submit(prompts, names) for prompts, names in of_host] for of_host in heard]
    end = None if seconds is None else time.monotonic() + seconds

    def answers(pending) -> list[dict | None]:
        left = None if end is None else max(0.0, end - time.monotonic())
        replies = pending.answers(left).replies
        return [None if reply is None else dataclasses.asdict(reply) for reply in replies]

    return [[answers(pending) for pending in of_host] for of_host in ordered]
