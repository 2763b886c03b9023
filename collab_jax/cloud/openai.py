"""A cloud behind an OpenAI-compatible API: OpenAI, DeepSeek, OpenRouter, vLLM, llama.cpp, Ollama
and others.

The official client makes the requests, one attempt each: what is tried again, and for what price,
is decided in `cached.py`, which must book every request. Neither the client nor the key is needed
before the first call.
"""

import asyncio
import datetime
import email.utils
import json
import math
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field

from collab_jax.cloud.protocol import CloudError, Failure, Messages, Reply

LONGEST_WAIT = 120.0  # seconds; a provider that asks for more has no room for us
OURS = {"model", "messages", "stream", "n"}  # fields of a request that are not the user's
RETRIED = {408, 409, 429}  # and 5xx
FRAME_TOKENS = 32  # at most, that a chat template puts around a message


@dataclass(frozen=True)
class OpenAICloud:
    """One model of one provider; raises CloudError at the first call where the key's environment
    variable is not set.

    prices: USD per million input and output tokens. timeouts: seconds to connect, between bytes,
    and of a whole call.
    """

    model: str
    parameters: dict  # of the request, as the provider names them
    base_url: str
    key_env: str  # name of the environment variable that holds the key; "": none is sent
    prices: tuple[float, float]
    timeouts: tuple[float, float, float]
    workers: int
    batch: int = 1
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )
    _started: list = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # [loop, client]

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of one answer, reasoning included; None: the provider's limit."""
        found = [self.parameters.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return next((int(n) for n in found if n), None)

    def highest_usd(self, messages: Messages) -> float:
        """A token has at least one byte."""
        tokens = sum(len(m["content"].encode("utf-8", "replace")) + FRAME_TOKENS for m in messages)
        return self._usd(tokens, self.max_tokens or 0)

    def answer(self, prompts: Sequence[Messages]) -> list[Reply | Failure]:
        loop, client = self._start()
        return asyncio.run_coroutine_threadsafe(self._all(client, prompts), loop).result()

    def _usd(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.prices[0] + output_tokens * self.prices[1]) / 1e6

    def _start(self) -> list:
        """[event loop, client]; made at the first call. The loop has a thread of its own, which
        ends with the process.
        """
        with self._lock:
            if not self._started:
                import openai

                key = os.environ.get(self.key_env, "") if self.key_env else "none"
                if not key.strip():
                    raise CloudError(
                        f"the environment variable {self.key_env}, which config.cloud.key_env names, is not set: put the "
                        "provider's key there, or name another"
                    )
                connect, read, _ = self.timeouts
                timeout = openai.Timeout(read, connect=connect)
                client = openai.AsyncOpenAI(
                    api_key=key.strip(), base_url=self.base_url, max_retries=0, timeout=timeout
                )
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, daemon=True).start()
                self._started[:] = loop, client
            return self._started

    async def _all(self, client, prompts: Sequence[Messages]) -> list[Reply | Failure]:
        return await asyncio.gather(*(self._one(client, messages) for messages in prompts))

    async def _one(self, client, messages: Messages) -> Reply | Failure:
        import openai

        start = time.monotonic()
        create = client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.timeouts[2]):
                response = await create(
                    model=self.model, messages=messages, extra_body=self.parameters
                )
                return self._reply(
                    messages, json.loads(response.http_response.content), time.monotonic() - start
                )
        except (TimeoutError, openai.APITimeoutError) as error:
            return Failure("timeout", retry=True, usd=_charge(error), outage=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            return Failure("no connection", retry=True, usd=_charge(error), outage=True)
        except (ValueError, openai.APIResponseValidationError):
            return Failure("broken JSON", retry=True, usd=None)

    def _reply(self, messages: Messages, data, seconds: float) -> Reply | Failure:
        """What a complete response holds; anything in it may be missing or of another kind."""
        usage = _get(data, "usage", dict, {})
        counts = [_get(usage, name, int, None) for name in ("prompt_tokens", "completion_tokens")]
        counts = [
            n if n is not None and 0 <= n < 2**40 else None for n in counts
        ]  # no count otherwise
        usd = self._usd(*counts) if None not in counts else None
        choice = next(iter(_get(data, "choices", list, [])), None)
        message = _get(choice, "message", dict, None)
        if message is None:
            return Failure("no choices", retry=True, usd=usd)
        text = _get(message, "content", str, "")
        reasoning = _get(message, "reasoning_content", str, "") or _get(
            message, "reasoning", str, ""
        )
        if usd is None:  # a server that does not count: our estimate, and the highest price
            counts = [
                sum(len(m["content"]) for m in messages) // 4 + 1,
                len(reasoning + text) // 4 + 1,
            ]
            usd = self.highest_usd(messages)
        return Reply(text, *counts, seconds, usd, reasoning, _get(choice, "finish_reason", str, ""))

    def _refused(self, error) -> Failure:
        """A response of status 4xx or 5xx; it is not charged."""
        status, headers = error.status_code, error.response.headers
        where = f"model {self.model!r} at {self.base_url}"
        if status == 401:
            return Failure(
                "401",
                fix=f"the key in the environment variable {self.key_env or '(none)'} was refused",
            )
        if status == 403:
            return Failure("403", fix=f"this key may not use {where}")
        if status == 404:
            return Failure("404", fix=f"there is no {where}: check config.cloud.model and base_url")
        if error.code == "insufficient_quota":
            return Failure("429 insufficient_quota", fix="the account has no credit left")
        after = _retry_after(headers.get("retry-after"))
        retry = (status in RETRIED or status >= 500) and (after or 0.0) <= LONGEST_WAIT
        return Failure(str(status), retry, after, outage=status >= 500)


def _charge(error: Exception) -> float | None:
    """What a call without a response cost: nothing where no connection was made, else not known."""
    return (
        0.0
        if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
        else None
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date; None where there is none or it is
    garbled.
    """
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _get(data, name: str, kind: type, default):
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else default


def from_config(config, task) -> OpenAICloud:
    """Builds the client of `config` (the `cloud` part). Raises CloudError, naming the key, for what
    cannot be used.
    """
    try:
        prices = {model: (float(i), float(o)) for model, i, o in config.prices}
        possible = all(0 <= price < math.inf for pair in prices.values() for price in pair)
    except (TypeError, ValueError):
        possible = False
    if not possible:
        raise CloudError(
            f"config.cloud.prices={config.prices!r} must be (model, USD per million input tokens, USD per million output "
            "tokens) rows, as (('m', 0.5, 2),)"
        )
    if config.model not in prices:
        raise CloudError(
            f"config.cloud.prices has no row for config.cloud.model={config.model!r}: add ({config.model!r}, USD per million "
            "input tokens, USD per million output tokens); zeros for a server of your own"
        )
    try:
        datetime.date.fromisoformat(config.prices_date)
    except ValueError:
        raise CloudError(
            f"config.cloud.prices_date={config.prices_date!r} must be a date as 2026-01-31"
        ) from None
    try:
        timeouts = tuple(map(float, config.timeouts))
    except (TypeError, ValueError):
        timeouts = ()
    if len(timeouts) != 3 or not all(seconds > 0 for seconds in timeouts):
        raise CloudError(
            f"config.cloud.timeouts={config.timeouts} must be three numbers of seconds above 0"
        )
    if not re.fullmatch(
        r"(?a:[A-Za-z_]\w*)?", config.key_env
    ):  # it may be the key itself: not shown
        raise CloudError(
            "config.cloud.key_env must be the name of an environment variable (letters, digits, _), never the key itself"
        )
    cloud = OpenAICloud(
        model=config.model,
        parameters=config.parameters.to_dict(),
        base_url=config.base_url,
        key_env=config.key_env,
        prices=prices[config.model],
        timeouts=timeouts,
        workers=config.concurrency,
    )
    try:
        url = urllib.parse.urlsplit(config.base_url)
        named = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # brackets, or a port that is none
        named = False
    if not named:
        raise CloudError(
            "config.cloud.base_url must begin with http:// or https:// and name a host, and a port if any"
        )
    if url.username or url.password or url.query:
        raise CloudError(
            "config.cloud.base_url holds more than an address: a key belongs into the environment (key_env)"
        )
    if ours := sorted(OURS & cloud.parameters.keys()):
        raise CloudError(
            f"config.cloud.parameters may not hold {', '.join(ours)}, which the client sets"
        )
    if config.max_usd is not None and cloud.max_tokens is None:
        raise CloudError(
            "config.cloud.max_usd needs parameters.max_tokens: without it a call has no highest price"
        )
    return cloud
