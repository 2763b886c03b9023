"""One streamed call of an OpenAI-compatible cloud: text as it comes, then how it ended.

Like `OpenAICloud.answer` it is one attempt, without a store: `serve/upstream.py` books it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, NamedTuple

from collab_jax.cloud.openai import OpenAICloud
from collab_jax.cloud.protocol import Failure, Reply
from collab_jax.models.text import Messages

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class Delta(NamedTuple):
    """Text that was added."""

    reasoning: str
    content: str


async def stream(
    cloud: OpenAICloud, client: "AsyncOpenAI", messages: Messages, seconds: float
) -> AsyncGenerator[Delta | Reply | Failure, None]:
    """Yields deltas, and at the end a Reply or a Failure.

    seconds: for the whole call. A stream that ends without a reason to end was cut off, which is a
    Failure. The connection is closed when the iterator is.
    """
    import openai

    start = time.monotonic()
    message, usage, reason = {"content": "", "reasoning_content": ""}, None, None
    halves = Delta("", "")
    try:
        async with asyncio.timeout(min(seconds, cloud.timeouts[2])):
            create: Any = client.chat.completions.create
            async with await create(
                model=cloud.model,
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=cloud.parameters,
            ) as chunks:
                async for chunk in chunks:
                    data = chunk.to_dict()
                    usage = data.get("usage") or usage
                    for choice in (data.get("choices") or [])[:1]:
                        delta, halves = _whole(halves, _delta(choice))
                        message["content"] += delta.content
                        message["reasoning_content"] += delta.reasoning
                        reason = choice.get("finish_reason") or reason
                        if delta.content or delta.reasoning:
                            yield delta
    except (TimeoutError, ValueError, openai.APIError) as error:
        yield cloud.failure(error)
        return
    except Exception:  # of the connection, by whatever library carries it
        yield Failure("connection lost", retry=True, usd=None, outage=True)
        return
    if reason is None:
        yield Failure("cut off", retry=True, usd=None)
        return
    data = {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}
    yield cloud.reply(messages, data, time.monotonic() - start)


def _whole(halves: Delta, delta: Delta) -> tuple[Delta, Delta]:
    """(a delta in whole characters, the halves of characters whose rest is to come).

    halves: those of the deltas before. Some providers cut an emoji in the middle of its UTF-16
    form. What has no other half becomes U+FFFD.
    """
    joined = [half + text for half, text in zip(halves, delta, strict=True)]
    open_ = [text[-1] if "\ud800" <= text[-1:] <= "\udbff" else "" for text in joined]
    ready = [text[: len(text) - len(half)] for text, half in zip(joined, open_, strict=True)]
    paired = [text.encode("utf-16-le", "surrogatepass") for text in ready]
    return Delta(*(text.decode("utf-16-le", "replace") for text in paired)), Delta(*open_)


def _delta(choice: dict[str, Any]) -> Delta:
    """The text of one choice of a chunk; anything in it may be missing or misshapen."""
    delta = choice.get("delta")
    delta = delta if isinstance(delta, dict) else {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
    content = delta.get("content")
    return Delta(
        reasoning if isinstance(reasoning, str) else "", content if isinstance(content, str) else ""
    )
