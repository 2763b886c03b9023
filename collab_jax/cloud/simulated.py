"""A cloud without a network: the task's exact solver, wrong on a fixed share of the prompts."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from collab_jax.cloud.protocol import Reply
from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError

MAX_SKEW = 100.0  # far beyond use; its exponential is a float


@dataclass(frozen=True)
class SimulatedCloud:
    """Answers with `solve(messages)`, and with `wrong` on a share `error_rate` of all prompts.

    Which prompts those are depends on model name and messages alone: no seed, no state, the same on
    every machine; a higher rate only adds prompts. With an `error_skew` hard prompts are wrong more
    often, and easy ones less (`skewed_rate`); where `difficulty(messages)` is None, the rate holds.
    It is also wrong where `solve` or `difficulty` raises ValueError (a prompt that it does not
    know). It neither sleeps nor pays: `seconds` (per call) and the prices (USD per million tokens)
    only enter the replies. It has no provider: model and parameters say what it answers.

    Raises UserError for an error rate outside [0, 1], or a skew outside [0, MAX_SKEW].
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
    error_skew: float = 0.0
    difficulty: Callable[[Messages], float | None] | None = None
    # Replies of prompts whose price was asked, by the prompt: each is solved once.
    _priced: dict[str, Reply] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not 0 <= self.error_rate <= 1:
            raise UserError(
                f"config.cloud.error_rate={self.error_rate} must be a share between 0 and 1"
            )
        if not 0 <= self.error_skew <= MAX_SKEW:
            raise UserError(
                f"config.cloud.error_skew={self.error_skew} must lie between 0 and {MAX_SKEW}"
            )

    @property
    def parameters(self) -> dict:
        skew = {"error_skew": self.error_skew} if self.error_skew else {}
        return {"error_rate": self.error_rate, "wrong": self.wrong, **skew}

    def highest_usd(self, messages: Messages) -> float:
        if len(self._priced) >= self.batch:  # of prompts that were never asked for
            self._priced.clear()
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
        try:
            if unit_hash(self.model, messages) < self._error_rate_of(messages):
                return self.wrong
            return self.solve(messages)
        except ValueError:
            return self.wrong

    def _error_rate_of(self, messages: Messages) -> float:
        difficulty = self.difficulty(messages) if self.error_skew and self.difficulty else None
        if difficulty is None:
            return self.error_rate
        return skewed_rate(self.error_rate, self.error_skew, difficulty)


def skewed_rate(rate: float, skew: float, difficulty: float) -> float:
    """Returns the chance of an error at a difficulty in [0, 1]; `rate` is its mean over [0, 1].

    The odds of an error are c exp(skew * difficulty): the hardest problem's are exp(skew) times the
    easiest one's. The mean is the integral of odds / (1 + odds) from 0 to 1, and for the rate that
    is c = (exp(skew * rate) - 1) / (exp(skew) - exp(skew * rate)). skew: above 0, however small.
    """
    wrong = math.expm1(skew * rate) * math.exp(skew * difficulty)
    right = math.exp(skew * rate) * math.expm1(skew * (1 - rate))
    return wrong / (wrong + right)


def unit_hash(model: str, messages: Messages) -> float:
    """Returns a fixed number in [0, 1) for (model, messages), uniform over prompts.

    53 bits of BLAKE2b.
    """
    canonical = json.dumps([model, messages], sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(canonical.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def from_config(config: ConfigDict, task: Any) -> SimulatedCloud:
    """Returns the simulated cloud of `config`, which is the part `cloud`, for a task with a solver.

    Raises UserError when `task.solve_prompt` is None, or `task.difficulty` where it is needed.
    """
    if task.solve_prompt is None:
        raise UserError(
            f"task {task.name!r} has no exact solver, which config.cloud.kind='simulated' needs"
        )
    if config.error_skew and task.difficulty is None:
        raise UserError(
            f"task {task.name!r} does not say how hard its problems are, which "
            f"config.cloud.error_skew={config.error_skew} needs: set it to 0"
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
        error_skew=float(config.error_skew),
        difficulty=task.difficulty,
    )


def _estimate_tokens(characters: int) -> int:
    return characters // 4 + 1
