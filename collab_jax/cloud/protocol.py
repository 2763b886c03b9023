"""What a cloud is to the rest of the program: chat messages in, replies with their cost out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Messages = list[dict[str, str]]
"""One prompt as chat messages: `[{"role": "user", "content": "..."}, ...]`."""


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


class Cloud(Protocol):
    """A source of answers that may cost money and may fail."""

    @property
    def model(self) -> str:
        """Name of the model that answers."""

    @property
    def parameters(self) -> dict:
        """Everything besides model and prompt that changes an answer; JSON-able, without secrets."""

    def answer(self, prompts: Sequence[Messages]) -> list[Reply | None]:
        """Answers each prompt, in order. None is a failed call; a failed call never raises."""
