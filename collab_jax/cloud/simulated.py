"""A cloud without a network: the task's exact solver, wrong on a fixed share of the prompts."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from collab_jax.cloud.protocol import Reply
from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError


@dataclass(frozen=True)
class SimulatedCloud:
    """Answers with `solve(messages)`, and with `wrong` on a share `error_rate` of all prompts.

    Which prompts those are depends on model name and messages alone: no seed, no state, the same on
    every machine; a higher rate only adds prompts. It is also wrong where `solve` raises ValueError
    (a prompt that it cannot solve). It neither sleeps nor pays: `seconds` (per call) and the prices
    (USD per million tokens) only enter the replies. It has no provider: model and parameters say
    what it answers.

    Raises UserError for an error rate outside [0, 1].
    """

    model: str
    solve: Callable[[Messages], str]
    error_rate: float
    seconds: float
    usd_per_million_input: float
    usd_per_million_output: float
    wrong: str = "<answer>0</answer>"  # must be wrong for every prompt of the task
    batch: int = 4096
    workers: int = 1
    provider: str = ""
    # Replies of prompts whose price was asked, by the prompt: each is solved once.
    _priced: dict[str, Reply] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not 0 <= self.error_rate <= 1:
            raise UserError(
                f"config.cloud.error_rate={self.error_rate} must be a share between 0 and 1"
            )

    @property
    def parameters(self) -> dict:
        return {"error_rate": self.error_rate, "wrong": self.wrong}

    def highest_usd(self, messages: Messages) -> float:
        reply = self._priced[json.dumps(messages)] = self._reply(messages)
        return reply.usd

    def answer(self, prompts: Sequence[Messages]) -> list[Reply]:
        return [
            self._priced.pop(json.dumps(messages), None) or self._reply(messages)
            for messages in prompts
        ]

    def _reply(self, messages: Messages) -> Reply:
        text = self._text(messages)
        input_tokens = _estimate_tokens(sum(len(message["content"]) for message in messages))
        output_tokens = _estimate_tokens(len(text))
        usd = (
            input_tokens * self.usd_per_million_input + output_tokens * self.usd_per_million_output
        ) / 1e6
        return Reply(text, input_tokens, output_tokens, self.seconds, usd)

    def _text(self, messages: Messages) -> str:
        if unit_hash(self.model, messages) < self.error_rate:
            return self.wrong
        try:
            return self.solve(messages)
        except ValueError:
            return self.wrong


def unit_hash(model: str, messages: Messages) -> float:
    """Returns a fixed number in [0, 1) for (model, messages), uniform over prompts.

    53 bits of BLAKE2b.
    """
    canonical = json.dumps([model, messages], sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(canonical.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def from_config(config: ConfigDict, task: Any) -> SimulatedCloud:
    """Returns the simulated cloud of `config`, which is the part `cloud`, for a task with a solver.

    Raises UserError when `task.solve_prompt` is None.
    """
    if task.solve_prompt is None:
        raise UserError(
            f"task {task.name!r} has no exact solver, which config.cloud.kind='simulated' needs"
        )
    return SimulatedCloud(
        model=config.model,
        solve=task.solve_prompt,
        error_rate=float(config.error_rate),  # 1 and 1.0 would be different keys of the store
        seconds=float(config.seconds),
        usd_per_million_input=float(config.usd_per_million_input),
        usd_per_million_output=float(config.usd_per_million_output),
        # A question's gold answer may be 0; no answer at all is wrong for each.
        wrong="<answer></answer>" if task.gold else SimulatedCloud.wrong,
    )


def _estimate_tokens(characters: int) -> int:
    return characters // 4 + 1
