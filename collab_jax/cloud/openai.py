"""A cloud behind an OpenAI-compatible API: OpenAI, DeepSeek, OpenRouter, vLLM, llama.cpp, Ollama.

The official client makes the requests, one attempt each: what is tried again, and for what price,
is decided in `buyer.py`, which must book every request. Neither the client nor the key is needed
before the first call.
"""

import asyncio
import concurrent.futures
import datetime
import email.utils
import json
import math
import os
import re
import threading
import time
import urllib.parse
import weakref
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ml_collections import ConfigDict

from collab_jax.cloud.protocol import CloudError, Failure, Reply
from collab_jax.models.text import Messages

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

LONGEST_NAME = 40  # characters of an environment variable that is not set; a key may be longer
LONGEST_WAIT = 120.0  # seconds; a call whose provider asks for more has failed
CLOSING_SECONDS = 5.0  # how long a process that ends waits for its connections to be closed
SET_BY_CLIENT = {"model", "messages", "stream", "n"}  # fields of a request, not the user's
RETRIED = {408, 409, 429}  # and 5xx
# Reasons by which providers and servers say that they have broken an answer off themselves.
BROKEN_OFF = {"insufficient_system_resource", "error", "abort", "aborted", "cancelled"}
FRAME_TOKENS = 32  # at most, that a chat template puts around a message

T = TypeVar("T")


class Session:
    """A client with an event loop in a thread of its own, in which it is made, used and closed.

    That happens when the object is collected, or when the process ends.
    """

    def __init__(self, client: "AsyncOpenAI"):
        self.client = client
        started: concurrent.futures.Future = concurrent.futures.Future()
        thread = threading.Thread(target=_serve, args=(self.client, started), daemon=True)
        thread.start()
        self._loop, closing = started.result()
        self._closed = threading.Event()
        weakref.finalize(self, _close, self._closed, self._loop, closing, thread)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` in the session's loop; raises CloudError once that is closed."""
        if self._closed.is_set():  # the process ends while threads still buy
            coroutine.close()
            raise CloudError("the connections to the cloud are closed: start again")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _serve(client: "AsyncOpenAI", started: concurrent.futures.Future) -> None:
    """Runs a loop until it is told to close; what is in flight then is cancelled."""

    async def until_closing() -> None:
        closing = asyncio.Event()
        async with client:
            started.set_result((asyncio.get_running_loop(), closing))
            await closing.wait()

    asyncio.run(until_closing())


def _close(
    closed: threading.Event,
    loop: asyncio.AbstractEventLoop,
    closing: asyncio.Event,
    thread: threading.Thread,
) -> None:
    """Ends a session's thread; it may be called in that thread, which then ends by itself."""
    closed.set()
    loop.call_soon_threadsafe(closing.set)
    if thread is not threading.current_thread():
        thread.join(CLOSING_SECONDS)


@dataclass(frozen=True)
class OpenAICloud:
    """One model of one provider.

    prices: USD per million input and output tokens. timeouts: seconds to connect, between bytes,
    and of a whole call. Raises CloudError at the first call where the environment variable of the
    key is not set.
    """

    model: str
    parameters: dict  # of the request, as the provider names them
    base_url: str
    key_env: str  # name of the environment variable that holds the key; "": none is sent
    prices: tuple[float, float]
    timeouts: tuple[float, float, float]
    workers: int
    provider: str  # part of the key of each stored answer
    batch: int = 1
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )
    # The session, once it is made.
    _sessions: list[Session] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of one answer, reasoning included; None: the provider's limit."""
        limits = [self.parameters.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((int(n) for n in limits if n), default=None)

    def highest_usd(self, messages: Messages) -> float:
        # A token has at least one byte.
        tokens = sum(len(m["content"].encode("utf-8", "replace")) + FRAME_TOKENS for m in messages)
        return self._usd(tokens, self.max_tokens or 0)

    def answer(self, prompts: Sequence[Messages]) -> list[Reply | Failure]:
        session = self._session()
        return session.run(self._answer_all(session.client, prompts))

    def _usd(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.prices[0] + output_tokens * self.prices[1]) / 1e6

    def make_client(self) -> "AsyncOpenAI":
        """Returns a new client, without retries. Raises CloudError where there is no key."""
        from openai import AsyncOpenAI, Timeout

        key = os.environ.get(self.key_env, "") if self.key_env else "none"
        if not key.strip():
            raise CloudError(
                f"the environment variable {self.key_env}, which config.cloud.key_env names, is "
                "not set: put the provider's key there, or name another"
            )
        connect, read, _ = self.timeouts
        timeout = Timeout(read, connect=connect)
        return AsyncOpenAI(
            api_key=key.strip(), base_url=self.base_url, max_retries=0, timeout=timeout
        )

    def _session(self) -> Session:
        """Returns the session, made at the first call."""
        with self._lock:
            if not self._sessions:
                self._sessions.append(Session(self.make_client()))
            return self._sessions[0]

    async def _answer_all(
        self, client: "AsyncOpenAI", prompts: Sequence[Messages]
    ) -> list[Reply | Failure]:
        return await asyncio.gather(*(self._answer_one(client, messages) for messages in prompts))

    async def _answer_one(self, client: "AsyncOpenAI", messages: Messages) -> Reply | Failure:
        import openai

        start = time.monotonic()
        create: Any = client.chat.completions.with_raw_response.create  # takes dicts as messages
        try:
            async with asyncio.timeout(self.timeouts[2]):
                response = await create(
                    model=self.model, messages=messages, extra_body=self.parameters
                )
                data = json.loads(response.http_response.content)
                return self.reply(messages, data, time.monotonic() - start)
        except (TimeoutError, ValueError, openai.APIError) as error:
            return self.failure(error)

    def failure(self, error: Exception) -> Failure:
        """Returns the failure of a call that raised a TimeoutError, ValueError or APIError."""
        import openai

        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            return Failure("timeout", retry=True, usd=_charge(error), outage=True)
        if isinstance(error, openai.APIStatusError):
            return self._refused(error)
        if isinstance(error, openai.APIConnectionError):
            return Failure("no connection", retry=True, usd=_charge(error), outage=True)
        return Failure("broken JSON", retry=True, usd=None)

    def reply(self, messages: Messages, data: Any, seconds: float) -> Reply | Failure:
        """Returns what a complete response holds; anything in it may be missing or misshapen."""
        usage = _get(data, "usage", dict, {})
        input_tokens, output_tokens = (
            n if n is not None and 0 <= n < 2**40 else None  # no count otherwise
            for n in (_get(usage, f"{kind}_tokens", int, None) for kind in ("prompt", "completion"))
        )
        usd = None
        if input_tokens is not None and output_tokens is not None:
            usd = self._usd(input_tokens, output_tokens)
        choice = next(iter(_get(data, "choices", list, [])), None)
        message = _get(choice, "message", dict, None)
        if message is None:
            return Failure("no choices", retry=True, usd=usd)
        finish_reason = _get(choice, "finish_reason", str, "")
        text = _text(message.get("content"))
        if text is None:  # the next one would be as unreadable
            return Failure("an answer that is no text", usd=usd)
        if finish_reason in BROKEN_OFF:
            return Failure(finish_reason, retry=True, usd=usd)
        reasoning = _get(message, "reasoning_content", str, "")
        reasoning = reasoning or _get(message, "reasoning", str, "")
        if input_tokens is None or output_tokens is None or usd is None:
            # A server that does not count: our estimate, and no less than the highest price.
            input_tokens = sum(len(m["content"]) for m in messages) // 4 + 1
            output_tokens = len(reasoning + text) // 4 + 1
            usd = max(self.highest_usd(messages), self._usd(input_tokens, output_tokens))
        return Reply(
            text=text,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seconds=seconds,
            usd=usd,
            reasoning=reasoning,
            finish_reason=finish_reason,
        )

    def _refused(self, error: "APIStatusError") -> Failure:
        """Returns the failure of a response of status 4xx or 5xx; it is not charged."""
        status, headers = error.status_code, error.response.headers
        where = f"model {self.model!r} at {self.base_url}"
        fixes = {
            402: "the account has no credit left",
            401: f"the key in the environment variable {self.key_env or '(none)'} was refused",
            403: f"this key may not use {where}",
            404: f"there is no {where}: check config.cloud.model and base_url",
        }
        if status in fixes:
            return Failure(str(status), fix=fixes[status])
        if error.code == "insufficient_quota":
            return Failure("429 insufficient_quota", fix="the account has no credit left")
        after = _retry_after(headers.get("retry-after"))
        retry = (status in RETRIED or status >= 500) and (after or 0.0) <= LONGEST_WAIT
        return Failure(str(status), retry, after, outage=status >= 500)


def _text(content: Any) -> str | None:
    """What a message says, also where it comes in parts; None for what is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [_get(part, "text", str, None) for part in content] if isinstance(content, list) else []
    return None if not texts or None in texts else "".join(filter(None, texts))


def _charge(error: Exception) -> float | None:
    """Returns what a call without a response cost: 0 if no connection was made, else not known."""
    not_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
    return 0.0 if not_sent else None


def _retry_after(value: str | None) -> float | None:
    """Returns the seconds of a Retry-After header, a number or a date; None where it says none."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _get(data: Any, name: str, kind: type, default: Any) -> Any:
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else default


def from_config(config: ConfigDict, task: Any) -> OpenAICloud:
    """Returns the client of `config`, which is the part `cloud`.

    Raises CloudError, naming the key, for what cannot be used.
    """
    prices = _prices(config)
    timeouts = _timeouts(config)
    try:
        datetime.date.fromisoformat(config.prices_date)
    except ValueError:
        raise CloudError(
            f"config.cloud.prices_date={config.prices_date!r} must be a date as 2026-01-31"
        ) from None
    # What may be the key itself is not shown.
    name, there = config.key_env, config.key_env in os.environ
    if not re.fullmatch(r"(?a:[A-Za-z_]\w*)?", name) or not (
        there or (name == name.upper() and len(name) <= LONGEST_NAME)
    ):
        raise CloudError(
            "config.cloud.key_env must be the name of an environment variable (letters, digits, "
            "_; capitals alone where it is not set), never the key itself"
        )
    _check_base_url(config.base_url)
    parameters = config.parameters.to_dict()
    if fields := sorted(SET_BY_CLIENT & parameters.keys()):
        raise CloudError(
            f"config.cloud.parameters may not hold {', '.join(fields)}, which the client sets"
        )
    cloud = OpenAICloud(
        model=config.model,
        parameters=parameters,
        base_url=config.base_url,
        key_env=config.key_env,
        prices=prices[config.model],
        timeouts=timeouts,
        workers=config.concurrency,
        provider=config.provider.rstrip("/"),
    )
    if not cloud.provider:
        raise CloudError("config.cloud.provider must name who serves the model: leave it out")
    if config.max_usd is not None and cloud.max_tokens is None:
        raise CloudError(
            "config.cloud.max_usd needs parameters.max_tokens: without it a call has no highest "
            "price"
        )
    return cloud


def _prices(config: ConfigDict) -> dict[str, tuple[float, float]]:
    """Returns config.cloud.prices by model, with a row for config.cloud.model; else raises."""
    try:
        prices = {model: (float(i), float(o)) for model, i, o in config.prices}
        possible = all(0 <= price < math.inf for pair in prices.values() for price in pair)
    except (TypeError, ValueError):
        prices, possible = {}, False
    if not possible:
        raise CloudError(
            f"config.cloud.prices={config.prices!r} must be (model, USD per million input tokens, "
            "USD per million output tokens) rows, as (('m', 0.5, 2),)"
        )
    if config.model not in prices:
        raise CloudError(
            f"config.cloud.prices has no row for config.cloud.model={config.model!r}: add "
            f"({config.model!r}, USD per million input tokens, USD per million output tokens); "
            "zeros for a server of your own"
        )
    return prices


def _timeouts(config: ConfigDict) -> tuple[float, float, float]:
    """Returns config.cloud.timeouts; raises CloudError unless they are three, above 0."""
    try:
        connect, read, whole = map(float, config.timeouts)
        possible = connect > 0 and read > 0 and whole > 0
    except (TypeError, ValueError):
        connect, read, whole, possible = 0.0, 0.0, 0.0, False
    if not possible:
        raise CloudError(
            f"config.cloud.timeouts={config.timeouts} must be three numbers of seconds above 0"
        )
    return connect, read, whole


def _check_base_url(base_url: str) -> None:
    """Raises CloudError, without showing it, for an address that cannot be one, or holds a key."""
    try:
        url = urllib.parse.urlsplit(base_url)
        named = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # brackets, or a port that is none
        url, named = urllib.parse.urlsplit(""), False
    if not named:
        raise CloudError(
            "config.cloud.base_url must begin with http:// or https:// and name a host, and a "
            "port if any"
        )
    if url.username or url.password or url.query:
        raise CloudError(
            "config.cloud.base_url holds more than an address: a key belongs into the environment "
            "(key_env)"
        )
