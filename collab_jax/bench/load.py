"""Clients of a server that streams as OpenAI's API does, in a process of their own.

    python -m collab_jax.bench.load < PLAN

PLAN is a JSON object of the fields of `Plan`; what the clients saw is one, of the fields of
`Report`, on the standard output. Every server meets the same clients, which keep their connections
for the next request, as the clients of SDKs do, where the server does. They import nothing heavy,
so that the cores are the server's; `Report.busy` says what share of one core they took all the
same.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

SECONDS = 120.0  # of a request, at most
IDLE_SECONDS = 2.0  # of a connection, at most: servers close theirs after some five


class Plan(NamedTuple):
    """Whom to ask, what, and how much of it. Times are in seconds.

    bodies: of the requests, which are streams; they are sent in turn, from the start again after
    the last. clients: each sends a request once its last one has ended; 0: requests come at `rate`
    a second, whether others have ended or not. seconds: no request begins after them. count: of
    requests, at most; 0: as many as there is time for. keep: whether the server keeps connections.
    """

    address: tuple[str, int]
    bodies: Sequence[dict[str, Any]]
    clients: int
    seconds: float
    rate: float = 0.0
    count: int = 0
    keep: bool = True


class Seen(NamedTuple):
    """What a client saw of one request; times are in seconds.

    body: its number. status: 0 where there was no response. began: since the first request.
    arrivals: of each event with text, since this one. took: until its end. tokens: by the
    response's usage. about: its object `collab`, if any. problem: what was wrong, "": nothing.
    """

    body: int
    status: int
    began: float
    arrivals: list[float]
    took: float
    tokens: int = 0
    about: dict[str, Any] | None = None
    problem: str = ""


class Report(NamedTuple):
    """What all clients saw, in how many seconds, and the share of a core that they took."""

    seen: list[Seen]
    seconds: float
    busy: float


class Response:
    """A response that is read off a connection. `kept`: another one may follow there."""

    def __init__(self, reader: asyncio.StreamReader):
        self._reader = reader
        self.status, self.kept = 0, False
        self._chunked, self._length = False, -1

    async def read_head(self) -> None:
        """Reads the status and the headers."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        self.status = int(head.split(b" ", 2)[1])
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        _, named, rest = head.partition(b"\r\ncontent-length:")
        self._length = int(rest.split(b"\r\n", 1)[0]) if named else -1
        self.kept = (self._chunked or bool(named)) and b"\r\nconnection: close" not in head

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the data of each server-sent event; of another body, its lines."""
        rest = b""
        async for part in self._parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line := line.strip():
                    yield line.removeprefix(b"data: ")
        if rest:
            yield rest

    async def _parts(self) -> AsyncIterator[bytes]:
        """Yields the body as it comes."""
        if self._chunked:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            self.kept &= await self._reader.readuntil(b"\r\n") == b"\r\n"  # no trailers
        elif self._length >= 0:
            yield await self._reader.readexactly(self._length)
        else:
            while part := await self._reader.read(1 << 16):
                yield part


def has_text(event: dict[str, Any], prompt: str) -> bool:
    """Whether an event brings content or thinking; some servers begin with the prompt itself."""
    deltas = (choice["delta"] for choice in event.get("choices") or ())
    texts = (delta.get("content") or delta.get("reasoning_content") for delta in deltas)
    return any(text and text != prompt for text in texts)


class Clients:
    """Clients of one plan, and the connections that none of them uses at the moment."""

    def __init__(self, plan: Plan):
        self.plan, self.zero = plan, time.perf_counter()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []
        self._opened = 0
        self._requests = [self._request(body) for body in plan.bodies]

    def _request(self, fields: dict[str, Any]) -> bytes:
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.plan.address[0]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Connection: {'keep-alive' if self.plan.keep else 'close'}\r\n\r\n"
        )
        return head.encode() + body

    async def ask(self, number: int) -> Seen:
        """Makes request `number`."""
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(SECONDS):
                return await self._ask(number, begin)
        except (OSError, EOFError, ValueError, TimeoutError, RuntimeError) as error:
            # RuntimeError: uvloop's, of a connection that was reset while nobody used it.
            took, problem = time.perf_counter() - begin, str(error) or type(error).__name__
            return Seen(number, 0, begin - self.zero, [], took, problem=problem)

    async def _ask(self, number: int, begin: float) -> Seen:
        """Makes a request. Raises what a broken connection, or a server's nonsense, causes."""
        which = number % len(self._requests)
        reader, writer = await self._connected()
        response = Response(reader)
        prompt = self.plan.bodies[which]["messages"][-1]["content"]
        arrivals, tokens, about, problem, ended = [], 0, None, "", False
        whole = False
        try:
            writer.write(self._requests[which])
            await response.read_head()
            async for data in response.events():
                if ended := data == b"[DONE]":
                    continue
                event = json.loads(data)
                if has_text(event, prompt):
                    arrivals.append(time.perf_counter() - begin)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                about, problem = event.get("collab", about), str(event.get("error", problem))
            whole = True
        finally:
            if whole and response.kept and self.plan.keep:
                self._idle.append((reader, writer, time.perf_counter()))
            else:
                writer.close()
        status, took = response.status, time.perf_counter() - begin
        if status == 200 and not (problem or ended or tokens):
            problem = "a stream without an end"
        return Seen(number, status, begin - self.zero, arrivals, took, tokens, about, problem)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that was used lately, or a new one."""
        while self._idle:
            reader, writer, since = self._idle.pop()
            lately = time.perf_counter() - since < IDLE_SECONDS
            if lately and not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        # A port stays taken for a minute, and a loopback address has some 28,000: Linux has many.
        self._opened += 1
        local = (f"127.0.0.{2 + self._opened % 8}", 0) if sys.platform == "linux" else None
        return await asyncio.open_connection(*self.plan.address, local_addr=local)

    def close(self) -> None:
        """Closes the connections."""
        for _, writer, _ in self._idle:
            writer.close()


async def load(plan: Plan) -> Report:
    """Carries out a plan."""
    clients, seen = Clients(plan), list[Seen]()
    zero, cpu, sent = clients.zero, time.process_time(), 0

    def may_send() -> bool:
        return time.perf_counter() - zero < plan.seconds and not 0 < plan.count <= sent

    async def one() -> None:
        nonlocal sent
        sent += 1
        seen.append(await clients.ask(sent - 1))

    async def client() -> None:
        while may_send():
            await one()

    async with asyncio.TaskGroup() as group:
        for _ in range(plan.clients):
            group.create_task(client())
        while not plan.clients and may_send():
            group.create_task(one())
            await asyncio.sleep(max(0.0, zero + sent / plan.rate - time.perf_counter()))
    seconds = time.perf_counter() - zero
    clients.close()
    return Report(seen, seconds, (time.process_time() - cpu) / seconds)


def start(plan: Plan) -> subprocess.Popen[str]:
    """Starts to carry out a plan, in a process of its own."""
    command = [sys.executable, "-m", "collab_jax.bench.load"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin  # it is a pipe
    process.stdin.write(json.dumps(plan._asdict()))
    process.stdin.close()
    return process


def finish(process: subprocess.Popen[str]) -> Report:
    """Returns the report of a plan that was started, once it is carried out."""
    assert process.stdout  # it is a pipe
    with process:
        report = json.load(process.stdout)
    return Report([Seen(*row) for row in report["seen"]], report["seconds"], report["busy"])


def run(plan: Plan) -> Report:
    """Carries out a plan in a process of its own."""
    return finish(start(plan))


if __name__ == "__main__":
    given = json.load(sys.stdin)
    plan = Plan(**given | {"address": tuple(given["address"])})
    try:
        from uvloop import run as run_loop
    except ImportError:  # on Windows
        from asyncio import run as run_loop
    json.dump(run_loop(load(plan))._asdict(), sys.stdout)
