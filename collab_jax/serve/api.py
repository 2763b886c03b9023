"""The HTTP application: OpenAI's chat and completions, models, health, metrics, and the budget."""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from collab_jax.serve import body, openapi, playground, wire
from collab_jax.serve.answer import Outcome, Service, outcomes
from collab_jax.serve.body import MODELS, Ask
from collab_jax.serve.engine import Broken, Busy
from collab_jax.serve.response import Said
from collab_jax.serve.schema import Refused
from collab_jax.serve.telemetry import Telemetry
from collab_jax.serve.upstream import CloudFailed

log = logging.getLogger(__name__)

SAVE_SECONDS = 1.0  # between two looks whether the budget's state has changed
LEFT = 499  # the status on record where the client left
CLOUD = b"cloud"  # is in the body of whoever asks for the cloud first, by mode or by model
T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody reads the response any longer."""


class Api:
    """The handlers of a server. operator_key: of what is the operator's; "": nobody has it."""

    def __init__(self, service: Service, operator_key: str):
        self.service, self.telemetry = service, Telemetry()
        self._operator_key = operator_key

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", playground.page),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/budget", self.read_budget, methods=["GET"]),
            Route("/budget", self.set_budget, methods=["PUT"]),
            Route("/requests/{request_id}", self.request),
            Route("/openapi.json", self.openapi),
        ]
        handlers: dict[Any, Any] = {
            Refused: lambda _, error: refusal(error),
            HTTPException: lambda _, error: refusal(
                Refused(str(error.detail), status=error.status_code, headers=error.headers)
            ),
            ClientDisconnect: lambda *_: Response(status_code=LEFT),  # before all was sent
            Exception: lambda _, error: refusal(Refused("an error in the server", status=500)),
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        saving = asyncio.create_task(self._save())
        try:
            yield
        finally:
            saving.cancel()
            await asyncio.to_thread(self.service.engine.close)
            self.service.controller.save()
            await self.service.upstream.close()

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            try:
                await asyncio.to_thread(self.service.controller.save)
            except OSError as error:
                log.error("the budget's state cannot be saved: %s", error)

    # ------------------------------------------------------------------------- answers

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, body.read_chat, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, body.read_completion, chat=False)

    async def _answer(
        self, request: Request, read: Callable[[bytes], Ask], *, chat: bool
    ) -> Response:
        request_id = uuid.uuid4().hex
        raw, engine = await read_body(request), self.service.engine
        try:
            # Before it is read: a flood must cost as little as it can.
            place = None if CLOUD in raw else engine.hold_place()
        except (Busy, Broken) as error:
            refused = as_refusal(error, request_id)
            self.telemetry.count_error(refused.status)
            return refusal(refused)
        try:
            choices = outcomes(request_id, read(raw))
        except BaseException as error:
            if place is not None:
                engine.leave_place(place)
            if isinstance(error, Refused):
                error.headers["x-request-id"] = request_id
            raise
        choices[0].place = place
        format = wire.Format(choices, chat)
        if choices[0].ask.stream:
            return Stream(self, choices, format)
        whole: list[list[Said]] = [[] for _ in choices]
        status = 500
        try:
            await until_left(request.receive, self._compute(choices, whole))
            status = 200
            content = format.whole(whole, self.service.controller.report())
            return JSONResponse(content, headers=wire.headers(choices))
        except ClientLeft:
            status = LEFT
            return Response(status_code=LEFT)
        except Exception as error:
            refused = as_refusal(error, request_id, choices)
            status = refused.status
            return refusal(refused)
        finally:
            self.note(choices, status)

    async def _compute(self, choices: Sequence[Outcome], whole: Sequence[list[Said]]) -> None:
        """Fills `whole` with what is said of each choice."""

        async def one(outcome: Outcome, said: list[Said]) -> None:
            async def say(more: Sequence[Said]) -> None:
                said.extend(more)

            await self.service.answer(outcome, say)

        await together(one(outcome, said) for outcome, said in zip(choices, whole, strict=True))

    def note(self, choices: Sequence[Outcome], status: int) -> None:
        """Puts a request that has ended on record."""
        for outcome in choices:
            self.service.leave_place(outcome)
            self.telemetry.note(outcome, status)

    # ------------------------------------------------------------------------- everything else

    async def models(self, _: Request) -> Response:
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "collab_jax"}
            for name in MODELS
        ]
        return JSONResponse({"object": "list", "data": rows})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(openapi.DOCUMENT)

    async def health(self, _: Request) -> Response:
        broken = self.service.engine.broken
        status = 503 if broken else 200
        return JSONResponse({"status": broken or "ok"}, status)

    async def ready(self, _: Request) -> Response:
        engine = self.service.engine
        state = engine.broken or ("ready" if engine.ready.is_set() else "starting")
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        text = self.telemetry.page(self.service)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def read_budget(self, request: Request) -> Response:
        self._check_operator(request)
        return JSONResponse(self.service.controller.report())

    async def set_budget(self, request: Request) -> Response:
        self._check_operator(request)
        self.service.controller.set_target(body.read_target(await read_body(request)))
        return JSONResponse(self.service.controller.report())

    async def request(self, request: Request) -> Response:
        self._check_operator(request)
        record = self.telemetry.request(request.path_params["request_id"])
        if record is None:
            raise Refused("no such request among the last ones", "request_id", status=404)
        return JSONResponse(record)

    def _check_operator(self, request: Request) -> None:
        """Refuses whoever does not have the operator's key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not self._operator_key:
            raise Refused("this server has no operator's key: start it with one", status=403)
        if not hmac.compare_digest(given.encode(), self._operator_key.encode()):
            raise Refused("the operator's key is needed: Authorization: Bearer KEY", status=401)


class Stream(Response):
    """A response of server-sent events; an error before the first is a response of its own."""

    media_type = "text/event-stream"

    def __init__(self, api: Api, choices: Sequence[Outcome], format: wire.Format):
        self._api, self._choices, self._format = api, choices, format
        self._begun = False  # the headers have left
        self._unended, self._end = len(choices), ""  # choices; the end of the last one
        self._writing = asyncio.Lock()
        self.background, self.status_code = None, 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500
        try:
            status = await until_left(receive, self._answer(scope, receive, send))
        except ClientLeft:
            status = LEFT
        finally:
            self._api.note(self._choices, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Sends all of it, and returns the status for the record."""
        status = 200
        try:
            await together(self._choice(index, send) for index in range(len(self._choices)))
            last = self._end + self._format.usage()
        except Exception as error:
            refused = as_refusal(error, self._choices[0].request_id, self._choices)
            status = refused.status
            if not self._begun:
                await refusal(refused)(scope, receive, send)
                return status
            last = wire.event(refused.body())
        await self._write(last + wire.DONE, send, more=False)
        return status

    async def _choice(self, index: int, send: Send) -> None:
        """Sends all of a choice."""

        async def say(said: Sequence[Said]) -> None:
            if chunks := "".join(self._format.chunk(index, one) for one in said):
                await self._write(chunks, send)

        await self._api.service.answer(self._choices[index], say)
        end = self._format.end(index, self._api.service.controller.report())
        self._unended -= 1
        if self._unended:
            await self._write(end, send)
        else:
            self._end = end

    async def _write(self, text: str, send: Send, more: bool = True) -> None:
        """Sends events, and before the first of them the headers. more: others follow."""
        async with self._writing:
            if not self._begun:
                self.init_headers({"cache-control": "no-store", **wire.headers(self._choices)})
                start = {"status": self.status_code, "headers": self.raw_headers}
                await send({"type": "http.response.start", **start})
                self._begun = True
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs all of it. Raises the first error, and ends the rest then."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def read_body(request: Request) -> bytes:
    """The body, of at most a byte more than is allowed."""
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > body.LARGEST_BODY:
            break
    return raw


async def until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Raises ClientLeft, and ends it, where the client leaves before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return await task
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_refusal(error: Exception, request_id: str, choices: Sequence[Outcome] = ()) -> Refused:
    """What a client is told of an error, which goes on record with the choices."""
    name = type(error).__name__
    wait: float | None = None
    match error:
        case Refused():
            refused = error
        case Busy():
            refused, wait = Refused(str(error), code="busy", status=429), error.retry_after
        case CloudFailed():
            name = error.reason
            refused = Refused(f"the cloud has no answer ({error.reason})", None, "cloud", 503)
            wait = error.retry_after
        case Broken():
            refused = Refused("the device has failed", code="device", status=503)
        case _:
            log.exception("request %s failed", request_id, exc_info=error)
            refused = Refused("an error in the server", status=500)
    for outcome in choices:
        outcome.error = name
    refused.headers["x-request-id"] = request_id
    if wait is not None:
        refused.headers["retry-after"] = str(math.ceil(wait))
        refused.headers["retry-after-ms"] = str(math.ceil(1000 * wait))
    return refused


def refusal(refused: Refused) -> Response:
    """The response of an error."""
    content = json.dumps(refused.body(), ensure_ascii=True)
    return Response(content, refused.status, refused.headers, "application/json")
