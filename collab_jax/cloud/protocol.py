"""What a cloud is to the rest of the program: chat messages in, replies with their cost out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError


class CloudError(UserError):
    """The cloud cannot be used as configured, its budget is spent, or an answer is missing."""


@dataclass(frozen=True)
class Reply:
    """One answer of a cloud, with what it cost when it was bought."""

    text: str
    input_tokens: int
    output_tokens: int
    seconds: float  # wall time of the call
    usd: float  # price of the call
    reasoning: str = ""  # of a reasoning model, kept apart from the answer
    finish_reason: str = "stop"  # as the provider names it


@dataclass(frozen=True)
class Failure:
    """One call without an answer. `reason` is short and holds neither prompt nor key."""

    reason: str
    retry: bool = False  # the same call may succeed later
    retry_after: float | None = None  # seconds the provider wants us to wait
    usd: float | None = 0.0  # what it cost; None: not known, and booked at the highest price
    outage: bool = False  # the provider does not work at all, as far as one can see
    fix: str = ""  # what the user has to mend, where every other call must fail too


class Cloud(Protocol):
    """A source of answers that may cost money and may fail."""

    @property
    def model(self) -> str:
        """Name of the model that answers."""
        ...

    @property
    def provider(self) -> str:
        """Name of who serves the model; "" where model and parameters say it all."""
        ...

    @property
    def parameters(self) -> dict:
        """What else changes an answer; JSON-able, without secrets."""
        ...

    @property
    def batch(self) -> int:
        """Prompts of one call of `answer`; what it returned is stored before the next call."""
        ...

    @property
    def workers(self) -> int:
        """Threads that may be in `answer` at the same time."""
        ...

    def highest_usd(self, messages: Messages) -> float:
        """Returns a price that one call on this prompt does not exceed."""
        ...

    def answer(self, prompts: Sequence[Messages]) -> Sequence[Reply | Failure]:
        """Asks once for each prompt, in order, without retries.

        A failed call is a Failure and never raises, but for a UserError: what the user must mend.
        """
        ...
