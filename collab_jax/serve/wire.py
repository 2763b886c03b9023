"""Responses as OpenAI's clients read them: whole ones, chunks of a stream, usage, headers."""

import json
from collections.abc import Iterable
from typing import Any

from collab_jax.serve.answer import Outcome, Said
from collab_jax.serve.telemetry import margins, summary

DONE = "data: [DONE]\n\n"


def collab(outcome: Outcome, budget: dict[str, Any]) -> dict[str, Any]:
    """The object `collab`: who answered, why, and what it cost."""
    about = {**summary(outcome), "budget": budget, "request_id": outcome.request_id}
    return about | {"trace": trace(outcome)} if outcome.ask.trace else about


def trace(outcome: Outcome) -> dict[str, Any]:
    """The device's response token by token, tags included; see docs/serving.md."""
    return {
        "tokens": outcome.spelt,
        "margins": margins(outcome),
        "decided_at": outcome.decided_at,
    }


def usage(outcome: Outcome) -> dict[str, Any]:
    """Tokens of whoever answered, and what the answer cost."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "cost": outcome.usd,
        "cost_details": {
            "currency": "USD",
            "device_tokens": outcome.device_tokens,
            "cloud_tokens": outcome.cloud_tokens,
        },
    }


def headers(outcome: Outcome) -> dict[str, str]:
    """What is known when headers leave: of a stream, little."""
    known = {"x-request-id": outcome.request_id}
    if outcome.finish:  # its content has begun, so nobody else will answer
        known |= {
            "x-collab-answered-by": outcome.answered_by,
            "x-collab-reason": outcome.reason,
        }
    if outcome.finish in ("stop", "length"):
        known["x-collab-usd"] = f"{outcome.usd:.9f}"
    return known


class Format:
    """The objects of one request, of chat or of plain completions."""

    def __init__(self, outcome: Outcome, chat: bool):
        self._outcome, self._chat = outcome, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{outcome.request_id}"
        self._begun = False

    def _frame(self, model: str, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        return {
            "id": self._id,
            "object": f"{kind}.chunk" if chunk and self._chat else kind,
            "created": int(self._outcome.began),
            "model": model,
            "choices": choices,
        }

    def whole(self, said: Iterable[Said], budget: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        outcome, texts = self._outcome, {"content": "", "reasoning": ""}
        for kind, text, _ in said:
            texts[kind] += text
        choice: dict[str, Any] = {"index": 0, "finish_reason": outcome.finish, "logprobs": None}
        if self._chat:
            message = {"role": "assistant", "content": texts["content"]}
            if texts["reasoning"]:
                message["reasoning_content"] = texts["reasoning"]
            choice["message"] = message
        else:
            choice["text"] = texts["content"]
        whole = self._frame(outcome.model, [choice], chunk=False)
        return whole | {"usage": usage(outcome), "collab": collab(outcome, budget)}

    def chunk(self, said: Said) -> str:
        """An event of a stream; a plain completion has none for thinking ("")."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": None}
        if self._chat:
            name = "content" if said.kind == "content" else "reasoning_content"
            choice["delta"] = ({} if self._begun else {"role": "assistant"}) | {name: said.text}
        elif said.kind == "content":
            choice["text"] = said.text
        else:
            return ""
        self._begun = True
        return event(self._frame(said.model, [choice], chunk=True))

    def last(self, budget: dict[str, Any]) -> str:
        """The events that end a stream, but for [DONE]; usage alone where it was asked for."""
        outcome = self._outcome
        choice: dict[str, Any] = {"index": 0, "finish_reason": outcome.finish, "logprobs": None}
        choice |= {"delta": {}} if self._chat else {"text": ""}
        final = self._frame(outcome.model, [choice], chunk=True)
        events = event(final | {"collab": collab(outcome, budget)})
        if outcome.ask.include_usage:
            alone = self._frame(outcome.model, [], chunk=True)
            events += event(alone | {"usage": usage(outcome)})
        return events


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
