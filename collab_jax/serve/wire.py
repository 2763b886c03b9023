"""Responses as OpenAI's clients read them: whole ones, chunks of a stream, usage, headers."""

import json
import math
from collections.abc import Sequence
from typing import Any

from collab_jax.serve.answer import Outcome
from collab_jax.serve.reader import CUT
from collab_jax.serve.response import Said, Token
from collab_jax.serve.telemetry import margins, summary

DONE = "data: [DONE]\n\n"
BOTH = "collab"  # the model of a response whose choices are of both


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


def usage(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Tokens of whoever answered, and what the answers cost; the sums over all choices."""
    prompt = sum(outcome.prompt_tokens for outcome in outcomes)
    completion = sum(outcome.completion_tokens for outcome in outcomes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "cost": math.fsum(outcome.usd for outcome in outcomes),
        "cost_details": {
            "currency": "USD",
            "device_tokens": sum(outcome.device_tokens for outcome in outcomes),
            "cloud_tokens": sum(outcome.cloud_tokens for outcome in outcomes),
        },
    }


def headers(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """What is known, of all choices, when headers leave: of a stream, little."""
    known = {"x-request-id": outcomes[0].request_id}
    if all(outcome.finish for outcome in outcomes):  # content has begun: nobody else will answer
        for name in ("answered_by", "reason"):
            values = {getattr(outcome, name) for outcome in outcomes}
            if len(values) == 1:
                known[f"x-collab-{name.replace('_', '-')}"] = values.pop()
    if all(outcome.finish in ("stop", "length") for outcome in outcomes):
        known["x-collab-usd"] = f"{math.fsum(outcome.usd for outcome in outcomes):.9f}"
    return known


class Format:
    """The objects of one request, of chat or of plain completions."""

    def __init__(self, outcomes: Sequence[Outcome], chat: bool):
        self._outcomes, self._chat = outcomes, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{outcomes[0].request_id}"
        self._begun: set[int] = set()  # choices

    @property
    def _model(self) -> str:
        """Whose text it is; of several models with one choice each, none of them."""
        models = {outcome.model for outcome in self._outcomes}
        return models.pop() if len(models) == 1 else BOTH

    def _frame(self, model: str, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        return {
            "id": self._id,
            "object": f"{kind}.chunk" if chunk and self._chat else kind,
            "created": int(self._outcomes[0].began),
            "model": model,
            "choices": choices,
        }

    def whole(self, said: Sequence[Sequence[Said]], budget: dict[str, Any]) -> dict[str, Any]:
        """A response that is not streamed, from what was said of each choice."""
        choices = [self._choice(index, parts) for index, parts in enumerate(said)]
        whole = self._frame(self._model, choices, chunk=False)
        if len(choices) == 1:
            whole["collab"] = collab(self._outcomes[0], budget)
        else:
            for choice, outcome in zip(choices, self._outcomes, strict=True):
                choice |= {"model": outcome.model, "collab": collab(outcome, budget)}
        return whole | {"usage": usage(self._outcomes)}

    def _choice(self, index: int, said: Sequence[Said]) -> dict[str, Any]:
        outcome, texts = self._outcomes[index], {"content": "", "reasoning": ""}
        tokens: list[Token] | None = None
        if outcome.ask.logprobs and outcome.answered_by == "device":
            tokens = [token for part in said for token in part.tokens or ()]
        for part in said:
            texts[part.kind] += part.text
        choice = self._empty(index, outcome.finish, tokens)
        if not self._chat:
            return choice | {"text": texts["content"]}
        message = {"role": "assistant", "content": texts["content"]}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        return choice | {"message": message}

    def _empty(
        self, index: int, finish: str | None = None, tokens: Sequence[Token] | None = None
    ) -> dict[str, Any]:
        """A choice without text."""
        known = self._logprobs(tokens) if tokens is not None else None
        return {"index": index, "finish_reason": finish, "logprobs": known}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if not self._chat:
            return {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": None,
                "text_offset": [token.start for token in tokens],
            }
        rows = [
            {
                "token": token.text,
                "logprob": token.logprob,
                # A token that is a part of a character has no text of its own.
                "bytes": None if CUT in token.text else list(token.text.encode()),
                "top_logprobs": [],
            }
            for token in tokens
        ]
        return {"content": rows, "refusal": None}

    def chunk(self, index: int, said: Said) -> str:
        """An event of a stream; a plain completion has none for thinking ("")."""
        choice = self._empty(index, tokens=said.tokens)
        if self._chat:
            name = "content" if said.kind == "content" else "reasoning_content"
            role = {} if index in self._begun else {"role": "assistant"}
            choice["delta"] = role | {name: said.text}
        elif said.kind == "content":
            choice["text"] = said.text
        else:
            return ""
        self._begun.add(index)
        return event(self._with_usage(self._frame(said.model, [choice], chunk=True)))

    def end(self, index: int, budget: dict[str, Any]) -> str:
        """The event that ends a choice of a stream."""
        outcome = self._outcomes[index]
        choice = self._empty(index, outcome.finish) | (
            {"delta": {}} if self._chat else {"text": ""}
        )
        final = self._frame(outcome.model, [choice], chunk=True)
        return event(self._with_usage(final) | {"collab": collab(outcome, budget)})

    def _with_usage(self, frame: dict[str, Any]) -> dict[str, Any]:
        """A chunk, with the usage so far where that is asked for."""
        asked = self._outcomes[0].ask.usage_so_far
        return frame | {"usage": usage(self._outcomes)} if asked else frame

    def usage(self) -> str:
        """The event with the usage of a stream, which has ended; "" where nobody asked for it."""
        if not self._outcomes[0].ask.include_usage:
            return ""
        alone = self._frame(self._model, [], chunk=True)
        return event(alone | {"usage": usage(self._outcomes)})


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
