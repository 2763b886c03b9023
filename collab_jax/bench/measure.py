"""How a bench measures: timed runs in turn, the machine's ceilings, the useful work of a model."""

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from collab_jax import gapg
from collab_jax.models.decoder import DecoderConfig
from collab_jax.runtime import parallel

PAUSE = 0.3  # seconds between runs: threads of one that spin after its end must not slow the next


class Timing(NamedTuple):
    """The times of one function.

    first: seconds of the first call, compilation included; seconds, work: of each timed run.
    """

    first: float
    seconds: list[float]
    work: list[float]

    @property
    def median(self) -> float:
        """The median of the timed runs' seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """The work a second, over all timed runs."""
        return sum(self.work) / sum(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Returns the figures in seconds, for --json."""
        low, _, high = (
            statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        )
        return {
            "median_s": self.median,
            "quartiles_s": [low, high],
            "min_s": min(self.seconds),
            "first_call_s": self.first,
            "seconds": self.seconds,
        }


def interleaved(
    runs: Mapping[str, Callable[[], float]], repeats: int, say: Callable[[str], None] = print
) -> dict[str, Timing]:
    """Returns the timing of each function, by name. A function returns its work when that is done.

    Each is called twice to settle; then follow `repeats` rounds of one call of each in turn, so
    that all share whatever the machine's speed does.
    """
    firsts = {}
    for name, run in runs.items():
        started = time.perf_counter()
        run()
        firsts[name] = time.perf_counter() - started
        run()
        say(f"  {name}: first call {firsts[name]:.1f} s")
    seconds, work = {name: [] for name in runs}, {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            work[name].append(float(run()))
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(firsts[name], seconds[name], work[name]) for name in runs}


def ratio(a: Timing, b: Timing) -> dict[str, Any]:
    """Returns how many times the work a second of `b` is done by `a`.

    "median" and "quartiles" are over the ratios of each round.
    """
    ratios = [
        (wa / sa) / (wb / sb)
        for wa, sa, wb, sb in zip(a.work, a.seconds, b.work, b.seconds, strict=True)
    ]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "quartiles": [low, high]}


# --------------------------------------------------------------------------------------- ceilings


def matmul_ceiling(dtype: str, size: int = 0, repeats: int = 8) -> float:
    """Returns FLOP/s of one large matrix product on every device at once, the best of `repeats`."""
    n = size or (8192 if jax.default_backend() != "cpu" else 1536)
    product = parallel.pmap(lambda x: x @ x)
    x = parallel.replicate(np.ones((n, n), jnp.dtype(dtype)))
    return jax.local_device_count() * 2 * n**3 / _best(lambda: product(x), repeats)


def copy_ceiling(megabytes: int = 0, repeats: int = 8) -> float:
    """Returns bytes/s read and written by one large copy on every device, the best of `repeats`."""
    n = (megabytes or (1024 if jax.default_backend() != "cpu" else 128)) * 2**20 // 4
    copy = parallel.pmap(lambda x: x + 1)
    x = parallel.replicate(np.ones(n, np.float32))
    return jax.local_device_count() * 8 * n / _best(lambda: copy(x), repeats)


def _best(run: Callable[[], jax.Array], repeats: int) -> float:
    """Returns the seconds of the quickest of `repeats` calls."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# ------------------------------------------------------------------------------------ useful work


def forward_flop(cfg: DecoderConfig, start: ArrayLike, count: ArrayLike, logits: bool) -> float:
    """Returns the FLOP of a forward pass over rows of `count` tokens after `start` others each.

    logits: the head's product is included.
    """
    start, count = np.asarray(start), np.asarray(count)
    E, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    token = 2 * cfg.num_layers * (E * H * (2 * N + 2 * K) + 3 * E * cfg.intermediate_size)
    token += 2 * E * cfg.vocab_size if logits else 0
    seen = count * start + count * (count + 1) / 2  # each token sees those before it and itself
    return float(np.sum(count) * token + np.sum(seen) * 4 * cfg.num_layers * N * H)


def rollout_flop(cfg: DecoderConfig, batch: gapg.Rollout) -> float:
    """Returns the FLOP of a forward pass over a rollout: each prompt once, and its responses.

    The rollout is on the host, with or without axis D.
    """
    G = batch.tokens.shape[-2]
    lengths, real = batch.mask.sum(-1).reshape(-1, G), batch.prompt_mask.sum(-1).reshape(-1)
    start = np.repeat(real[:, None], G, axis=1) - 1
    prompts = forward_flop(cfg, np.zeros(len(real)), real, False)
    return prompts + forward_flop(cfg, start, lengths, True)


def update_flop(cfg: DecoderConfig, prompt_length: int, lengths: np.ndarray) -> float:
    """Returns the FLOP of a forward and a backward pass over groups of responses.

    lengths: i[Q, G] tokens of the responses; a prompt counts once.
    """
    L = prompt_length
    prompts = forward_flop(cfg, np.zeros(len(lengths)), np.full(len(lengths), L), False)
    return 3 * (prompts + forward_flop(cfg, L - 1.0, lengths, True))


def parameters(cfg: DecoderConfig) -> int:
    """Returns the number of parameters that a decoded token reads: all but an untied embedding."""
    E, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    return (
        cfg.num_layers * (E * H * (2 * N + 2 * K) + 3 * E * cfg.intermediate_size)
        + E * cfg.vocab_size
    )


def decode_bytes(
    cfg: DecoderConfig,
    prompts: int,
    length: int,
    lengths: np.ndarray,
    cache_bytes: int,
    itemsize: int,
) -> float:
    """Returns the bytes that decoding must read.

    These are the parameters, once a column, and the keys and values, once for each useful token.
    lengths: i[B] tokens of each response of `prompts` groups, whose prompt of `length` tokens is
    read once a column. cache_bytes, itemsize: bytes of a number of the cache and of a parameter.
    """
    kv = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * cache_bytes
    columns = int(lengths.max())
    own = np.sum(lengths * (lengths + 1) / 2) * kv
    return columns * parameters(cfg) * itemsize + own + columns * prompts * length * kv


def peak_memory() -> float:
    """Returns bytes: the process's largest resident set, or the first accelerator's largest use."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


# ----------------------------------------------------------------------------------------- output


def number(x: float) -> str:
    """Returns three significant digits of x, with a k, M, G or T."""
    if not x:
        return "0"
    power = min(int(math.log10(abs(x)) // 3), 4) if abs(x) >= 1000 else 0
    return f"{x / 1000**power:.3g}{['', 'k', 'M', 'G', 'T'][power]}"
