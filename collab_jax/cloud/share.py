"""Handing over work: the device's reasoning up to its call goes along, so that the cloud need not
begin anew.
"""

from collab_jax.cloud.protocol import Messages

NOTE = (
    "A smaller model began as follows, and gave up. It may be wrong; use what is right of it.\n\n"
)


def with_attempt(messages: Messages, attempt: str) -> Messages:
    """A cloud prompt with the device's attempt below it; without one, the prompt itself. Its answer
    has another key.
    """
    if not attempt.strip():
        return messages
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n\n{NOTE}{attempt.strip()}"}]
