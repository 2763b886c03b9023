"""What a client may ask for: the schemas of request bodies, and what is made of a good one.

A field that is not known, or not served, is refused by its name. null is the same as left out.
"""

import dataclasses
import json
import secrets
from dataclasses import dataclass
from typing import Any

from collab_jax.models.text import Messages
from collab_jax.serve.schema import (
    BOOL,
    TEXT,
    Refused,
    Schema,
    checked,
    fields,
    number,
    one_of,
    only,
    whole,
)
from collab_jax.serve.slots import LOGIT_BIASES

MODES = ("prefer_device", "only_device", "prefer_cloud", "only_cloud")
CLOUD_FIRST = ("prefer_cloud", "only_cloud")
# The models that a client may name, and the mode that each stands for.
MODELS = {"collab": "prefer_device", "collab-device": "only_device", "collab-cloud": "only_cloud"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_CHOICES = 16
MOST_STOPS = 4
LARGEST_BODY = 1 << 20  # bytes
SEEDS = 0xFFFFFFFF  # the bits of one

TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": only("text"), "text": TEXT},
    "required": ["type", "text"],
}
MESSAGE = fields(
    {
        "role": one_of(ROLES),
        "content": {
            "anyOf": [TEXT, {"type": "array", "minItems": 1, "items": TEXT_PART}],
            "description": "a string, or a list of text parts",
        },
        "name": TEXT,
        "reasoning_content": TEXT,  # of an earlier answer; no part of the prompt
    },
    required=["role", "content"],
)
STOP: Schema = {"type": "string", "minLength": 1}
COLLAB = fields(
    {
        "mode": one_of(MODES),
        "threshold": number(-1e4, 1e4),
        "target_call_rate": number(0, 1),
        "max_usd": number(0),
        "share_attempt": BOOL,
        "allow_fallback": BOOL,
        "strict": BOOL,
        "trace": BOOL,
    }
)
# Of both kinds of completions.
COMMON: dict[str, Schema] = {
    "model": one_of(MODELS),
    "n": whole(1, MOST_CHOICES),
    "max_completion_tokens": whole(1),
    "max_tokens": whole(1),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "seed": whole(-(2**63)),
    "stop": {
        "anyOf": [STOP, {"type": "array", "maxItems": MOST_STOPS, "items": STOP}],
        "description": f"a string, or a list of at most {MOST_STOPS}, none of them empty",
    },
    "logit_bias": {
        "type": "object",
        "maxProperties": LOGIT_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": number(-100, 100),
        "description": f"an object of at most {LOGIT_BIASES} token ids and numbers, -100 to 100",
    },
    "stream": BOOL,
    "stream_options": fields({"include_usage": BOOL, "continuous_usage_stats": BOOL}),
    "user": TEXT,  # clients name theirs; nothing is done with it
    "collab": COLLAB,
    "frequency_penalty": only(0),
    "presence_penalty": only(0),
}
CHAT = fields(
    {
        "messages": {"type": "array", "minItems": 1, "items": MESSAGE},
        "logprobs": BOOL,
        "top_logprobs": only(0),
        "response_format": only({"type": "text"}),
        "tools": only([]),
        **COMMON,
    },
    required=["messages"],
)
COMPLETION = fields(
    {
        "prompt": TEXT,
        "logprobs": only(0),  # those of the tokens themselves, and of no others
        "echo": only(False),
        "best_of": only(1),
        "suffix": only(""),
        **COMMON,
    },
    required=["prompt"],
)
TARGET = fields({"target_call_rate": number(0, 1)}, required=["target_call_rate"])


@dataclass(frozen=True)
class Ask:
    """A request that is served.

    choices: responses to it, each of which is computed and decided on its own. logprobs: whether
    the device's text comes with them. limit: tokens of a device response, None: as many as the
    server gives. usage_so_far: each chunk of a stream has it, as vLLM's do. threshold: the margin
    above which the cloud is called; rate: the share of such requests that shall be; at most one of
    the two. max_usd: the most that the cloud may cost, attempts that failed included. strict: a
    stream sends content only when no more can go wrong. trace: the device's tokens and margins come
    with the answer.
    """

    model: str
    messages: Messages
    mode: str
    choices: int
    logprobs: bool
    stream: bool
    include_usage: bool
    usage_so_far: bool
    limit: int | None
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    logit_bias: dict[int, float]
    threshold: float | None
    rate: float | None
    max_usd: float | None
    share_attempt: bool
    allow_fallback: bool
    strict: bool
    trace: bool

    @property
    def buffered(self) -> bool:
        """Whether content is sent only once it is whole."""
        return self.strict or not self.stream

    def choice(self, index: int) -> "Ask":
        """What choice number `index` asks for: the same, drawn with the seed that many higher."""
        return dataclasses.replace(self, seed=(self.seed + index) & SEEDS)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    if len(raw) > LARGEST_BODY:
        raise Refused(f"the body has more than {LARGEST_BODY} bytes", status=413)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body


def read_chat(raw: bytes) -> Ask:
    """The Ask of a body of /v1/chat/completions."""
    body = checked(CHAT, read_object(raw))
    messages = [
        {"role": ROLES[message["role"]], "content": _clean(_joined(message["content"]))}
        for message in body["messages"]
    ]
    return _ask(body, messages, logprobs=body.get("logprobs", False))


def read_completion(raw: bytes) -> Ask:
    """The Ask of a body of /v1/completions; its prompt is one message of the user."""
    body = checked(COMPLETION, read_object(raw))
    messages = [{"role": "user", "content": _clean(body["prompt"])}]
    return _ask(body, messages, logprobs="logprobs" in body)


def read_target(raw: bytes) -> float:
    """The call rate of a body of PUT /budget."""
    return float(checked(TARGET, read_object(raw))["target_call_rate"])


def _ask(body: dict[str, Any], messages: Messages, logprobs: bool) -> Ask:
    model, own = body.get("model", "collab"), body.get("collab", {})
    mode = own.get("mode", MODELS[model])
    if "threshold" in own and "target_call_rate" in own:
        raise Refused("give collab.threshold or collab.target_call_rate, not both", "collab")
    if logprobs and mode in CLOUD_FIRST:
        raise Refused(
            "logprobs: the cloud's answers have none; those of collab-device do",
            "logprobs",
            "unsupported",
        )
    stops, options = body.get("stop", []), body.get("stream_options", {})
    return Ask(
        model=model,
        messages=messages,
        mode=mode,
        choices=body.get("n", 1),
        logprobs=logprobs,
        stream=body.get("stream", False),
        include_usage=options.get("include_usage", False),
        usage_so_far=options.get("continuous_usage_stats", False),
        limit=min(
            (body[name] for name in ("max_completion_tokens", "max_tokens") if name in body),
            default=None,
        ),
        temperature=float(body.get("temperature", 0)),
        top_p=float(body.get("top_p", 1)),
        seed=body.get("seed", secrets.randbits(32)) & SEEDS,
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
        logit_bias={int(token): float(v) for token, v in body.get("logit_bias", {}).items()},
        threshold=own.get("threshold"),
        rate=own.get("target_call_rate"),
        max_usd=own.get("max_usd"),
        share_attempt=own.get("share_attempt", False),
        allow_fallback=own.get("allow_fallback", True),
        strict=own.get("strict", False),
        trace=own.get("trace", False),
    )


def _joined(content: str | list[dict[str, str]]) -> str:
    """The text of a message, whose parts it may come in."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _clean(text: str) -> str:
    """The text with a question mark for each lone surrogate, which has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()
