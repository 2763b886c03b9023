"""Odd clients of a server: bodies that are mangled, wrong and huge, and connections that are cut.

`cases` draws their requests, `send` makes one over a socket of its own; `Books` and `verdict` say
whether the server told the truth to all of them: who produced a text, and what it cost.
"""

import copy
import http.client
import json
import math
import random
import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from collab_jax.bench.faults import FaultServer
from collab_jax.cloud import ledger
from collab_jax.serve.answer import Outcome
from collab_jax.serve.api import Api
from collab_jax.serve.telemetry import Telemetry

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
CLOUD = "\u2601"  # what every text of the cloud begins with, and none of the device has
ALLOWED = {200, 400, 413, 429}
SECONDS = 120.0  # of a request, at most
SETTLING_SECONDS = 20.0
ODD: list[Any] = [
    None, True, False, -1, 0, 0.5, 1e400, -1e308, 10**300, 2**63, "", " ", "x" * 3000, "\ud800",
    "\u0000", "\U0001f600" * 9, "{}", [], {}, [[]], [None], [{}], {"a": {}}, {"": None},
    {"role": "user"}, [{"role": "user", "content": None}], [{"role": "x", "content": "y"}],
]  # fmt: skip
DEEP = b'{"messages": ' + b"[" * 50_000


class Case(NamedTuple):
    """A request: its body, how many bytes of it are sent, and of the response read; None: all."""

    path: str
    body: bytes
    sent: int | None = None
    read: int | None = None


class Seen(NamedTuple):
    """What a client saw of a response that it read whole: its objects, or those of its events."""

    status: int
    request_id: str
    objects: list[dict[str, Any]]
    cost: float  # USD, of all choices
    faults: list[str]  # what was wrong with it


class Books(Telemetry):
    """Telemetry that forgets no request."""

    def __init__(self) -> None:
        super().__init__()
        self.usd: defaultdict[str, float] = defaultdict(float)  # by request, of all choices

    def note(self, outcome: Outcome, status: int) -> None:
        super().note(outcome, status)
        self.usd[outcome.request_id.partition("-")[0]] += outcome.usd


def cases(count: int, seed: int) -> Iterator[Case]:
    """Yields requests: a third as they should be, a third mangled, a third cut."""
    draw = random.Random(seed)
    for i in range(count):
        path, body = _good(draw, f"{draw.randrange(max(4, count // 10))} 9 37=95")
        raw = json.dumps(body).encode()
        match i % 3:
            case 0:
                yield Case(path, raw)
            case 1:
                yield Case(path, _mangled(draw, body))
            case 2 if draw.random() < 0.2:
                yield Case(path, raw, sent=draw.randrange(len(raw)), read=0)
            case _:
                yield Case(path, raw, read=int(10 ** draw.uniform(0, 4)))


def _good(draw: random.Random, prompt: str) -> tuple[str, dict[str, Any]]:
    """A request that is served."""
    path = draw.choice((CHAT, CHAT, PLAIN))
    body: dict[str, Any] = {"prompt": prompt}
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": prompt}]}
    options: dict[str, Any] = {
        "stream": True,
        "n": draw.randint(1, 3),
        "logprobs": True if path == CHAT else 0,
        "temperature": draw.choice((0, 0.7, 2)),
        "seed": draw.getrandbits(40),
        "stop": draw.choice((["+"], "9", [])),
        "max_tokens": draw.choice((1, 20, 10**6)),
        "stream_options": {"include_usage": True},
        "collab": {
            draw.choice(("strict", "share_attempt")): draw.random() < 0.5,
            "threshold": draw.choice((-100, 0, 100)),
            "mode": draw.choice(("prefer_device", "prefer_device", "only_device")),
        },
    }
    body |= {name: value for name, value in options.items() if draw.random() < 0.5}
    if "logprobs" not in body and draw.random() < 0.2:
        body["collab"] = {"mode": draw.choice(("prefer_cloud", "only_cloud"))}
    return path, body


def _mangled(draw: random.Random, body: dict[str, Any]) -> bytes:
    """A body with odd values, or one that is no JSON."""
    if draw.random() < 0.01:
        return draw.choice((DEEP, b"1" * ((1 << 20) + 9), b"", bytes(range(256))))
    names = [*body, "messages", "logit_bias", "colour", "top_p", "user", "n", "\u00fc"]
    for _ in range(draw.randint(1, 3)):
        target = body
        while (inner := target.get(draw.choice(sorted(target)))) and isinstance(inner, dict):
            target = inner
        target[draw.choice(names)] = copy.deepcopy(draw.choice(ODD))
    raw = bytearray(json.dumps(body).encode())
    if draw.random() < 0.3:
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw)


def send(address: tuple[str, int], case: Case, models: dict[str, bool]) -> Seen | None:
    """Makes a request; returns what was seen of a response read whole, None where it was cut.

    models: whether each model's text is the cloud's.
    """
    head = f"POST {case.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(case.body)}\r\n\r\n"
    with socket.create_connection(address, timeout=SECONDS) as connection:
        connection.sendall(head.encode() + case.body[: case.sent])
        if case.read is not None:
            left = case.read
            while left and (part := connection.recv(min(left, 4096))):
                left -= len(part)
            # Half of them reset the connection.
            linger = struct.pack("ii", len(case.body) % 2, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return None
        with http.client.HTTPResponse(connection, method="POST") as response:
            response.begin()
            text = response.read().decode()
    request_id = response.headers.get("x-request-id", "")
    if response.status != 200:
        data = json.loads(text)
        faults = [] if response.status in ALLOWED else [f"{response.status} {data['error']}"]
        return Seen(response.status, request_id, [data], 0.0, faults)
    if response.headers["content-type"].startswith("text/event-stream"):
        return _streamed(request_id, text, models)
    return _whole(request_id, json.loads(text), models)


def _whole(request_id: str, data: dict[str, Any], models: dict[str, bool]) -> Seen:
    """What a response says that is not streamed."""
    faults: list[str] = []
    for choice in data["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        about = choice.get("collab") or data["collab"]
        model = choice.get("model") or data["model"]
        faults += _wrong_model(model, text, about["answered_by"], models)
    return Seen(200, request_id, [data], data["usage"]["cost"], faults)


def _streamed(request_id: str, text: str, models: dict[str, bool]) -> Seen:
    """What a stream says: its events, and its end."""
    *events, done, end = text.split("\n\n")
    faults = [] if (done, end) == ("data: [DONE]", "") else ["a stream does not end with [DONE]"]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    said: dict[int, list[tuple[str, str]]] = {}  # (model, content) by choice
    cost = 0.0
    for data in chunks:
        faults += [f"in a stream: {data['error']}"] if "error" in data else []
        for choice in data.get("choices", []):
            content = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            parts = said.setdefault(choice["index"], [])
            parts.append((data["model"], content))
            if about := data.get("collab"):
                cost += about["usd"]
                whole = "".join(content for _, content in parts)
                faults += _wrong_model(data["model"], whole, about["answered_by"], models)
                if len({model for model, content in parts if content}) > 1:
                    faults.append("two models in one answer")
    return Seen(200, request_id, chunks, cost, faults)


def _wrong_model(model: str, text: str, answered_by: str, models: dict[str, bool]) -> list[str]:
    """What is wrong with the name under which a text came."""
    of_cloud = answered_by == "cloud"
    good = models.get(model) == of_cloud and (not text or text.startswith(CLOUD) == of_cloud)
    return [] if good else [f"{model} ({answered_by}) said {text[:40]!r}"]


def fuzz(
    address: tuple[str, int], models: dict[str, bool], requests: Sequence[Case], clients: int
) -> list[Seen | None]:
    """Makes requests, that many at a time; returns what was seen, in their order."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda case: send(address, case, models), requests))


def verdict(
    api: Api, books: Books, provider: FaultServer, price: float, seen: Sequence[Seen | None]
) -> list[str]:
    """What does not hold, once what was under way has ended, for which there is some time.

    price: USD, of an answer of the provider.
    """
    end = time.monotonic() + SETTLING_SECONDS
    while (faults := judge(api, books, provider, price, seen)) and time.monotonic() < end:
        time.sleep(0.2)
    return faults


def judge(
    api: Api, books: Books, provider: FaultServer, price: float, seen: Sequence[Seen | None]
) -> list[str]:
    """What does not hold at this moment; see `verdict`."""
    upstream, store = api.service.upstream, api.service.upstream.cloud.store
    faults = [fault for one in seen if one for fault in one.faults]
    for one in filter(None, seen):
        recorded = books.usd[one.request_id]
        if not math.isclose(one.cost, recorded, abs_tol=1e-12):
            faults.append(f"a client saw {one.cost} USD, and {recorded} is on record")
    requested = math.fsum(books.usd.values()) + upstream.abandoned_usd
    booked, stored = upstream.cloud.budget.spent().usd, ledger(store).usd
    pairs = [
        ("requests", requested, "booked", booked),
        ("the ledger", stored, "the provider's count", provider.whole.total() * price),
    ]
    if not ended(provider):  # else those are booked, at their highest price, and no answer
        pairs.append(("booked", booked, "the ledger", stored))
    for one_name, one_usd, other_name, other_usd in pairs:
        if not math.isclose(one_usd, other_usd, abs_tol=1e-9):
            faults.append(f"{one_name}: {one_usd} USD, {other_name}: {other_usd}")
    if twice := [prompt for prompt, times in provider.whole.items() if times > 1]:
        faults.append(f"bought twice: {twice[:3]}, {len(twice)} in all")
    if api.service.engine.busy != (0, 0) or upstream.pending:
        faults.append(f"in use: {api.service.engine.busy}, {upstream.pending} calls")
    return faults


def ended(provider: FaultServer) -> int:
    """How many calls were ended since nobody waited for them any longer."""
    return provider.requests - provider.whole.total()


def statuses(seen: Sequence[Seen | None]) -> Counter[str]:
    """How many responses there were of each status; "cut" are those that nobody read whole."""
    return Counter(str(one.status) if one else "cut" for one in seen)
