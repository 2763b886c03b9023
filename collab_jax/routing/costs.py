"""What routing costs, from records alone: device tokens, money and latency. No jax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from collab_jax.records import Records, outcomes, require
from collab_jax.routing.curves import GRID
from collab_jax.routing.measures import calls, rank, sent, sent_of

# What a router has read when it decides; see `device_tokens`.
Reads = Literal["prompt", "response", "trace"]


def device_tokens(records: Records, score: np.ndarray, budget: float, reads: Reads) -> np.ndarray:
    """Expected device tokens f64[n] at a budget, without what the router itself spends.

    That is in the column `tokens_<router>`. A router that reads the "prompt" spends none on what it
    sends. One that reads the "response" spends all of `tokens` on everything. One that reads the
    "trace" (the trained marker) stops at the first token whose margin reaches the lowest score that
    is still sent, that token included, else at the end: its score must be max_t m_t, in the units
    of `margins`. A response without an answer may rank above all margins; it runs to the end unless
    its trace crosses.
    """
    return _device_tokens(records, score, reads)(sent(score, budget))


def _device_tokens(
    records: Records, score: np.ndarray, reads: Reads
) -> Callable[[np.ndarray], np.ndarray]:
    """Device tokens f64[n] as a function of the probabilities f64[n] of being sent."""
    require(records, ["tokens"] + ["margins"] * (reads == "trace"), "device tokens")
    tokens = records["tokens"].astype(float)
    if reads == "prompt":
        return lambda p: (1 - p) * tokens
    if reads == "response":
        return lambda p: tokens
    lengths = np.array([len(trace) for trace in records["margins"]])
    starts = np.cumsum(lengths) - lengths
    margins = np.concatenate(records["margins"]).astype(float)  # one flat array: [sum of lengths]

    def spent(p: np.ndarray) -> np.ndarray:
        if not p.any():
            return tokens
        crossings = np.append(np.flatnonzero(margins >= score[p > 0].min()), len(margins))
        first = crossings[np.searchsorted(crossings, starts)] - starts  # may lie in a later row
        return np.where(first < lengths, p * (first + 1) + (1 - p) * tokens, tokens)

    return spent


@dataclass(frozen=True)
class Prices:
    """What calls and device tokens cost.

    None means as recorded: in `cloud_usd` (of each call) and `ms` (of each response). A call costs
    usd_per_call + usd_per_million_tokens * cloud_tokens / 1e6; giving either replaces `cloud_usd`.
    """

    cloud_seconds: float  # latency of a call, on top of the device's time before it
    usd_per_call: float | None = None
    usd_per_million_tokens: float | None = None  # input and output alike
    device_ms_per_token: float | None = None

    def call_usd(self, records: Records) -> np.ndarray:
        """Price f64[n] of sending each prompt."""
        if self.usd_per_call is None and self.usd_per_million_tokens is None:
            require(records, ["cloud_usd"], "cost without usd_per_call or usd_per_million_tokens")
            return records["cloud_usd"]
        usd = np.full(len(records["id"]), self.usd_per_call or 0.0)
        if self.usd_per_million_tokens is None:
            return usd
        require(records, ["cloud_tokens"], "cost by usd_per_million_tokens")
        return usd + self.usd_per_million_tokens * records["cloud_tokens"] / 1e6

    def token_ms(self, records: Records) -> np.ndarray:
        """Device milliseconds f64[n] for each token of a prompt's response."""
        if self.device_ms_per_token is not None:
            return np.full(len(records["id"]), float(self.device_ms_per_token))
        require(records, ["ms", "tokens"], "latency without device_ms_per_token")
        return records["ms"] / np.maximum(records["tokens"], 1)


class CostFrontier(NamedTuple):
    """Means over all prompts at each of K budgets: plot accuracy against usd or seconds."""

    budgets: np.ndarray  # f64[K]
    accuracy: np.ndarray  # f64[K]
    usd: np.ndarray  # f64[K], a prompt
    seconds: np.ndarray  # f64[K], a prompt: the device's time, then the call's
    device_tokens: np.ndarray  # f64[K], a prompt, the router's own included


def cost_frontier(
    records: Records,
    score: np.ndarray,
    prices: Prices,
    reads: Reads,
    own_tokens: np.ndarray | float = 0.0,
    budgets: Sequence[float] | np.ndarray = GRID,
) -> CostFrontier:
    """What each budget costs and brings, with a router that `reads` so much (`device_tokens`).

    own_tokens f64[n]: device tokens the router itself spends on every prompt (column
    `tokens_<router>`), which take as long as those of the response. Raises UserError where a column
    is absent that `prices` or `reads` needs.
    """
    ranking, spent = rank(score), _device_tokens(records, score, reads)
    usd, seconds_a_token = prices.call_usd(records), prices.token_ms(records) / 1e3
    means = np.empty((4, len(budgets)))  # of accuracy, USD, seconds, tokens
    for i, budget in enumerate(budgets):
        p = sent_of(ranking, int(calls(budget, len(score))))
        tokens = spent(p) + own_tokens
        right = p * outcomes(records, "cloud") + (1 - p) * outcomes(records, "local")
        seconds = tokens * seconds_a_token + p * prices.cloud_seconds
        means[:, i] = right.mean(), (p * usd).mean(), seconds.mean(), tokens.mean()
    accuracy, mean_usd, mean_seconds, mean_tokens = means
    return CostFrontier(
        budgets=np.asarray(budgets, float),
        accuracy=accuracy,
        usd=mean_usd,
        seconds=mean_seconds,
        device_tokens=mean_tokens,
    )
