"""Handing over work: the device's reasoning up to its call goes along with the prompt."""

from collab_jax.models.text import Messages

# Part of the stored answers' keys: another wording would buy them again.
NOTE = (
    "A smaller model began as follows, and gave up. It may be wrong; use what is right of it.\n\n"
)


def with_attempt(messages: Messages, attempt: str) -> Messages:
    """Returns a cloud prompt with the device's attempt below it; without one, the prompt itself.

    It is another prompt, so its answer has another key.
    """
    if not attempt.strip():
        return messages
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n\n{NOTE}{attempt.strip()}"}]
