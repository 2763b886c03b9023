"""What a client may ask for: the body of a request, checked field by field.

A field that is not known, or not served, is refused by its name. null is the same as left out.
"""

import json
import math
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from collab_jax.models.text import Messages
from collab_jax.serve.slots import LOGIT_BIASES

MODES = ("prefer_device", "only_device", "prefer_cloud", "only_cloud")
# The models that a client may name, and the mode that each stands for.
MODELS = {"collab": "prefer_device", "collab-device": "only_device", "collab-cloud": "only_cloud"}
# Fields of which one value alone is served: what clients send that mean nothing by it.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "response_format": {"type": "text"},
    "tools": [],
    "echo": False,
    "best_of": 1,
    "suffix": "",
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS = 4
LARGEST_BODY = 1 << 20  # bytes


class Refused(Exception):
    """A request that is not answered, as OpenAI's errors say it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Ask:
    """A request that is served.

    limit: tokens of a device response, None: as many as the server gives. threshold: the margin
    above which the cloud is called; rate: the share of such requests that shall be; at most one of
    the two. max_usd: the most that this answer may cost. strict: a stream sends content only when
    no more can go wrong. trace: the device's tokens and margins come with the answer.
    """

    model: str
    messages: Messages
    mode: str
    stream: bool
    include_usage: bool
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
    fields = _Fields(read_object(raw))
    return _ask(fields, _messages(fields.take("messages", _is_list)))


def read_completion(raw: bytes) -> Ask:
    """The Ask of a body of /v1/completions; its prompt is one message of the user."""
    fields = _Fields(read_object(raw))
    prompt = fields.take("prompt", _is_text)
    if prompt is None:
        raise Refused("prompt: a string is needed", "prompt")
    return _ask(fields, [{"role": "user", "content": _clean(prompt)}])


def read_target(raw: bytes) -> float:
    """The call rate of a body of PUT /budget."""
    fields = _Fields(read_object(raw))
    target = fields.take("target_call_rate", _number(0, 1))
    fields.none_left()
    if target is None:
        raise Refused("target_call_rate: a number from 0 to 1 is needed", "target_call_rate")
    return float(target)


class _Fields:
    """The fields of an object, taken one by one; `prefix` comes before their names in errors."""

    def __init__(self, fields: dict[str, Any], prefix: str = ""):
        self._left = {name: value for name, value in fields.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str, check: Callable[[Any], str]) -> Any:
        """The field, or None. check(value) says what it must be, or "" where it is."""
        value = self._left.pop(name, None)
        if value is not None and (wanted := check(value)):
            raise Refused(f"{self._prefix}{name} must be {wanted}", self._prefix + name)
        return value

    def none_left(self) -> None:
        """Refuses what was not taken."""
        for name, value in self._left.items():
            if name not in NEUTRAL or self._prefix:
                raise Refused(f"{self._prefix}{name} is unknown", self._prefix + name, "unknown")
            if value != NEUTRAL[name]:
                wanted = json.dumps(NEUTRAL[name])
                raise Refused(f"{name} is not served, but for {wanted}", name, "unsupported")


def _ask(fields: _Fields, messages: Messages) -> Ask:
    model = fields.take("model", _one_of(MODELS)) or "collab"
    fields.take("user", _is_text)  # clients name theirs; nothing is done with it
    stream = bool(fields.take("stream", _is_bool))
    options = _Fields(fields.take("stream_options", _is_object) or {}, "stream_options.")
    include_usage = bool(options.take("include_usage", _is_bool))
    options.none_left()
    limits = [fields.take(name, _whole(1)) for name in ("max_completion_tokens", "max_tokens")]
    temperature = fields.take("temperature", _number(0, 2))
    top_p = fields.take("top_p", _number(0, 1))
    seed = fields.take("seed", _whole(-(2**63)))
    stops = fields.take("stop", _is_stops)
    logit_bias = fields.take("logit_bias", _is_logit_bias) or {}
    own = _Fields(fields.take("collab", _is_object) or {}, "collab.")
    mode = own.take("mode", _one_of(MODES))
    threshold = own.take("threshold", _number(-1e4, 1e4))
    rate = own.take("target_call_rate", _number(0, 1))
    max_usd = own.take("max_usd", _number(0, math.inf))
    share_attempt = own.take("share_attempt", _is_bool)
    allow_fallback = own.take("allow_fallback", _is_bool)
    strict = own.take("strict", _is_bool)
    trace = own.take("trace", _is_bool)
    own.none_left()
    fields.none_left()
    if threshold is not None and rate is not None:
        raise Refused("give collab.threshold or collab.target_call_rate, not both", "collab")
    return Ask(
        model=model,
        messages=messages,
        mode=mode or MODELS[model],
        stream=stream,
        include_usage=include_usage,
        limit=min((limit for limit in limits if limit), default=None),
        temperature=float(temperature or 0),
        top_p=1.0 if top_p is None else float(top_p),
        seed=(secrets.randbits(32) if seed is None else seed) & 0xFFFFFFFF,
        stops=(stops,) if isinstance(stops, str) else tuple(stops or ()),
        logit_bias={int(token): float(value) for token, value in logit_bias.items()},
        threshold=threshold,
        rate=rate,
        max_usd=max_usd,
        share_attempt=bool(share_attempt),
        allow_fallback=allow_fallback is not False,
        strict=bool(strict),
        trace=bool(trace),
    )


def _messages(messages: Any) -> Messages:
    """Messages with text alone."""
    if not messages:
        raise Refused("messages: a list of at least one is needed", "messages")
    read: Messages = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} must be an object", where)
        fields = _Fields(message, f"{where}.")
        role = fields.take("role", _one_of(ROLES))
        content = fields.take("content", _is_content)
        fields.take("name", _is_text)
        fields.take("reasoning_content", _is_text)  # of an earlier answer; no part of the prompt
        fields.none_left()
        if role is None or content is None:
            raise Refused(f"{where} needs role and content", where)
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        read.append({"role": ROLES[role], "content": _clean(content)})
    return read


def _clean(text: str) -> str:
    """The text with a question mark for each lone surrogate, which has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()


# ---- checks: what a value must be, or "" where it is


def _is_bool(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _is_text(value: Any) -> str:
    return "" if isinstance(value, str) else "a string"


def _is_list(value: Any) -> str:
    return "" if isinstance(value, list) else "a list"


def _is_object(value: Any) -> str:
    return "" if isinstance(value, dict) else "an object"


def _is_content(value: Any) -> str:
    parts = value if isinstance(value, list) else []
    text = all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    )
    return "" if isinstance(value, str) or (parts and text) else "a string, or a list of text parts"


def _is_stops(value: Any) -> str:
    strings = [value] if isinstance(value, str) else value
    good = isinstance(strings, list) and len(strings) <= MOST_STOPS
    good = good and all(isinstance(s, str) and s for s in strings)
    return "" if good else f"a string, or a list of at most {MOST_STOPS}, none of them empty"


def _is_logit_bias(value: Any) -> str:
    good = isinstance(value, dict) and len(value) <= LOGIT_BIASES
    good = good and all(
        token.isascii() and token.isdigit() and len(token) < 10 and not _number(-100, 100)(bias)
        for token, bias in value.items()
    )
    return "" if good else f"an object of at most {LOGIT_BIASES} token ids and numbers, -100 to 100"


def _one_of(names: Collection[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        return "" if isinstance(value, str) and value in names else f"one of {', '.join(names)}"

    return check


def _number(low: float, high: float) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = number and low <= value <= high and value != math.inf
        return "" if good else f"a number from {low:g} to {high:g}"

    return check


def _whole(low: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if whole and value >= low else f"a whole number of at least {low}"

    return check
