"""One request from its prompt to its last event: the device, the cloud, and who stands in for whom.

The device begins (unless the client wants the cloud first). Where it decides to call, the cloud's
answer takes the place of its own; where the cloud fails, or the budget is spent, the device goes on
from the token before its decision, with the marker disallowed. Content is final: it is sent once
the answer has opened, after which no call is possible.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from collab_jax.cloud.redaction import Redacted
from collab_jax.cloud.share import with_attempt
from collab_jax.models.text import Messages, Text
from collab_jax.serve.body import CLOUD_FIRST, Ask
from collab_jax.serve.budget import Controller, Ticket
from collab_jax.serve.engine import Emission, Engine, Job, Place
from collab_jax.serve.reader import Stops, spell
from collab_jax.serve.response import Response, Said
from collab_jax.serve.schema import Refused
from collab_jax.serve.upstream import Bought, CloudFailed, Upstream

DISALLOWED = -math.inf  # a bias


Say = Callable[[Sequence[Said]], Awaitable[None]]  # returns once the client can take more


@dataclass
class Outcome:
    """What is known of a request; complete when its last event has come.

    margins: m_t of each step of the device. decided_at: the step at which it called. bias: of the
    decision; None where the device had none to make. spelt: the device's tokens as text, where the
    client wants a trace. place: in the engine's queue, until the prompt is there.
    """

    request_id: str
    ask: Ask
    answered_by: str = ""  # device | cloud
    model: str = ""
    reason: str = ""
    finish: str = ""
    bias: float | None = None
    margins: list[float] = field(default_factory=list)
    decided_at: int | None = None
    spelt: list[str] = field(default_factory=list)
    prompt_tokens: int = 0  # of who answers, as far as it has
    completion_tokens: int = 0
    device_tokens: int = 0
    cloud_tokens: int = 0
    device_ms: float = 0.0
    cloud_ms: float = 0.0
    usd: float = 0.0
    attempts: int = 0
    cloud_prompt: Messages | None = None  # what the cloud was asked, where that is kept
    error: str = ""
    place: Place | None = None
    began: float = field(default_factory=time.time)

    @property
    def margin(self) -> float | None:
        """The largest margin of a decision state; None without one."""
        best = max(self.margins, default=DISALLOWED)
        return best if math.isfinite(best) else None


def outcomes(request_id: str, ask: Ask) -> list[Outcome]:
    """An empty Outcome for each choice of a request; the id of the second one ends with -1."""
    return [
        Outcome(f"{request_id}-{i}" if i else request_id, ask.choice(i)) for i in range(ask.choices)
    ]


def _may_stand_in(outcome: Outcome) -> bool:
    """Whether the device may answer where the cloud has failed: not once content was sent."""
    return outcome.ask.allow_fallback and not outcome.finish


@dataclass(frozen=True)
class Service:
    """The parts of a server that answer.

    model: the device model's name. system: its system prompt, where a client gives none; "": none.
    prompt_length, limit: tokens of a prompt and of a response, at most. call_unanswered: whether a
    response that ends without an answer goes to the cloud. keep_prompts: whether a request's record
    shows what the cloud was asked.
    """

    engine: Engine
    upstream: Upstream
    controller: Controller
    text: Text
    model: str
    system: str
    prompt_length: int
    limit: int
    call_unanswered: bool
    keep_prompts: bool

    async def answer(self, outcome: Outcome, say: Say) -> None:
        """Tells the client all of an answer by `say`, while `outcome` fills.

        Raises Refused for what cannot be served, `engine.Busy` where the queue is full, CloudFailed
        where the cloud fails and the device may not stand in, and `engine.Broken`. Cancelled, it
        ends what it has begun.
        """
        ask, reason = outcome.ask, "only_device" if outcome.ask.mode == "only_device" else "margin"
        bias = self._bias(ask)
        if ask.mode in CLOUD_FIRST:
            self.leave_place(outcome)  # the device may never be asked
            try:
                query = await self.upstream.redact(ask.messages)
                return await self._cloud(outcome, query, ask.mode, say)
            except CloudFailed:
                if ask.mode == "only_cloud" or not _may_stand_in(outcome):
                    raise
                reason = "device_fallback"
        if outcome.place is None:
            outcome.place = self.engine.hold_place()
        response = self._response(ask)
        outcome.bias = bias if math.isfinite(bias) else None
        await self._device(outcome, response, bias, say)
        wanted = self._wants_cloud(ask, response)
        granted, ticket = self._count(ask, wanted)
        if wanted:
            called = "margin" if response.end == "call" else "unanswered"
            try:
                query = await self.upstream.redact(self._for_cloud(ask, response))
                reason = self._refusal(ask, query) or ("" if granted else "budget")
                if not reason:
                    return await self._cloud(outcome, query, called, say)
            except CloudFailed:
                reason = "device_fallback"
                if not _may_stand_in(outcome):
                    raise
            finally:
                if ticket and reason:
                    self.controller.take_back(ticket)
            if response.end == "call":
                outcome.margins.pop()  # that step is computed once more
                outcome.device_tokens -= 1
                await self._device(outcome, response, DISALLOWED, say, resumed=True)
        await say(response.held)
        outcome.answered_by, outcome.model, outcome.reason = "device", self.model, reason
        outcome.finish = "length" if response.end == "length" else "stop"
        # A cloud that failed has none to tell.
        outcome.prompt_tokens = len(response.prompt)
        outcome.completion_tokens = outcome.device_tokens

    def leave_place(self, outcome: Outcome) -> None:
        """Gives up the place in the queue, which the prompt takes now, or may never take."""
        if outcome.place is not None:
            self.engine.leave_place(outcome.place)
        outcome.place = None

    # ------------------------------------------------------------------------- decisions

    def _bias(self, ask: Ask) -> float:
        """The bias of a request: the client's, or the budget's."""
        if ask.mode != "prefer_device":
            return DISALLOWED
        if ask.threshold is not None:
            return -ask.threshold
        if ask.rate is not None:
            bias = self.controller.bias_for(ask.rate)
            if bias is None:
                raise Refused(
                    "collab.target_call_rate: this model was not calibrated; use collab.threshold",
                    "collab.target_call_rate",
                )
            return bias
        return self.controller.bias

    def _wants_cloud(self, ask: Ask, response: Response) -> bool:
        """Whether the device's response asks for the cloud, or is none."""
        if ask.mode != "prefer_device":
            return False
        reader = response.reader
        answered = response.stops.hit or (reader.closed if ask.buffered else reader.opened)
        return response.end == "call" or (self.call_unanswered and not answered)

    def _refusal(self, ask: Ask, query: Redacted) -> str:
        """Why a call that is wanted is not made; "": it is."""
        if ask.max_usd is None or self.upstream.highest_usd(query) <= ask.max_usd:
            return ""
        return "max_usd"

    def _count(self, ask: Ask, wanted: bool) -> tuple[bool, Ticket | None]:
        """(whether a call may be made, the ticket where the budget has booked it).

        Only the budget's own count. While no call is admitted, since the cloud is down, the budget
        stands still; once one is, to see whether it is back, somebody has to want it.
        """
        if ask.mode != "prefer_device" or ask.threshold is not None or ask.rate is not None:
            return True, None
        if self.upstream.barred:
            return True, None
        ticket = self.controller.decide(wanted)
        return ticket is not None, ticket

    # ------------------------------------------------------------------------- the two models

    def _response(self, ask: Ask) -> Response:
        """An empty response to the prompt. Raises Refused where the model cannot take it."""
        messages = ask.messages
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        self._check_size(messages)
        try:
            prompt = self.text.prompt_ids(messages)
        except Exception as error:  # of the template, which may want roles to alternate
            fault = (str(error) or type(error).__name__).splitlines()[0]
            raise Refused(
                f"messages: the chat template refuses them ({fault})", "messages"
            ) from None
        if not 0 < len(prompt) <= self.prompt_length:
            raise Refused(
                f"messages have {len(prompt)} tokens; this server takes 1 to {self.prompt_length}",
                "messages",
                "context_length_exceeded",
            )
        if self.text.decision_id in ask.logit_bias:
            raise Refused("logit_bias may not move the decision to call: use collab", "logit_bias")
        return Response(self.model, self.text, tuple(prompt), ask.stops, ask.logprobs)

    def _check_size(self, messages: Messages) -> None:
        """Raises Refused for a text that cannot fit, before the tokenizer takes long for it."""
        size = sum(len(message["content"]) for message in messages)
        if size > (most := self.prompt_length * self.text.longest_piece):
            raise Refused(
                f"messages have {size} characters; {self.prompt_length} tokens, all that this "
                f"server takes, have at most {most}",
                "messages",
                "context_length_exceeded",
            )

    async def _device(
        self, outcome: Outcome, response: Response, bias: float, say: Say, resumed: bool = False
    ) -> None:
        """Says what the device writes, from what it has written before, until it ends.

        resumed: this is the rest of a response that called.
        """
        ask, loop = outcome.ask, asyncio.get_running_loop()
        emissions: asyncio.Queue[Emission] = asyncio.Queue()
        job = Job(
            prompt=response.prompt,
            written=tuple(response.written),
            resumed=resumed,
            emit=lambda emission: loop.call_soon_threadsafe(emissions.put_nowait, emission),
            limit=min(ask.limit or self.limit, self.limit),
            bias=bias,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed,
            logit_bias=ask.logit_bias,
        )
        begin = time.monotonic()
        self.leave_place(outcome)
        self.engine.submit(job)
        response.end, outcome.prompt_tokens = "", len(response.prompt)
        try:
            while not response.end:
                emission = await emissions.get()
                outcome.margins += emission.margins
                outcome.device_tokens += len(emission.margins)
                outcome.completion_tokens = outcome.device_tokens
                if emission.end == "call":
                    outcome.decided_at = len(outcome.margins) - 1
                now = []
                for said in response.read(emission):
                    held = said.kind == "content" and ask.buffered
                    (response.held if held else now).append(said)
                await say(now)
        finally:
            self.engine.cancel(job)
            outcome.device_ms += 1000 * (time.monotonic() - begin)
        if ask.trace:
            outcome.spelt = spell(self.text, response.written)

    def _for_cloud(self, ask: Ask, response: Response) -> Messages:
        """What the cloud is asked: the client's messages, with the attempt where that is wanted."""
        if not ask.share_attempt:
            return ask.messages
        return with_attempt(ask.messages, self.text.spelt(response.written))

    async def _cloud(self, outcome: Outcome, query: Redacted, reason: str, say: Say) -> None:
        """Says the cloud's answer. `outcome.finish` is set once content was sent."""
        ask, model, begin = outcome.ask, self.upstream.model, time.monotonic()
        if reason in CLOUD_FIRST and (refusal := self._refusal(ask, query)):
            raise CloudFailed(refusal)
        outcome.cloud_prompt = query.messages if self.keep_prompts else None
        stops, held, end = Stops(ask.stops), [], None
        outcome.answered_by, outcome.model, outcome.reason = "cloud", model, reason
        outcome.prompt_tokens = outcome.completion_tokens = 0  # until it has told them
        try:
            most = math.inf if ask.max_usd is None else ask.max_usd
            async with contextlib.aclosing(self.upstream.ask(query, most)) as answer:
                async for item in answer:
                    if isinstance(item, Bought):
                        end = item
                        break
                    if item.reasoning:
                        await say([Said("reasoning", item.reasoning, model)])
                    if not (content := stops.feed(item.content)):
                        continue
                    held.append(Said("content", content, model))
                    if not ask.buffered:
                        outcome.finish = "error"  # until it has ended well
                        await say([held.pop()])
        except CloudFailed as failed:
            outcome.usd += failed.usd
            outcome.answered_by = ""
            raise
        finally:
            outcome.cloud_ms += 1000 * (time.monotonic() - begin)
        assert end is not None, "an answer ends, or raises"
        if rest := stops.finish():
            held.append(Said("content", rest, model))
        reply = end.reply
        outcome.finish = "length" if reply.finish_reason == "length" and not stops.hit else "stop"
        outcome.prompt_tokens, outcome.completion_tokens = reply.input_tokens, reply.output_tokens
        outcome.cloud_tokens = reply.input_tokens + reply.output_tokens
        outcome.usd += end.usd
        outcome.attempts = end.attempts
        await say(held)
