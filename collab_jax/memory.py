"""Memory of a run, estimated from its config before anything is allocated; a run that does not fit is refused.

The estimate is meant to be right within a third; it was so against the compiler's own on a CPU (tests). Counted, on one device: parameters, Adam's moments and the gradients; while sampling the KV cache and the logits; in the
update what one micro-batch keeps for its backward pass. Sampling and update do not overlap, so the larger of both counts.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from collab_jax.errors import UserError
from collab_jax.models import decoder
from collab_jax.models.decoder import DecoderConfig

GIB = 2**30
FIXES = {
    "weights": "a smaller model, or config.model.param_dtype=bfloat16",
    "sampling": "a smaller config.group, config.prompts_per_step or config.max_new_tokens, or config.decode.cache_dtype=bfloat16",
    "update": "a smaller config.train.micro_rows, config.train.remat=True, or a smaller config.train.logprob_chunk",
}


def plan(cfg: DecoderConfig, config: ConfigDict, devices: int) -> dict[str, float]:
    """Bytes of one device by purpose: "weights" (optimizer and gradients in), "sampling", "update"."""
    L, T, G, V = config.prompt_length, config.max_new_tokens, config.group, cfg.vocab_size
    P = -(-config.prompts_per_step // devices)
    m, c = config.train.micro_rows, min(config.train.logprob_chunk, T)
    E, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    compute, kept = jnp.dtype(cfg.dtype).itemsize, jnp.dtype(config.model.param_dtype).itemsize
    kv = 2 * cfg.num_layers * K * H  # numbers a token

    cached = kv * jnp.dtype(config.decode.cache_dtype).itemsize
    slots = P * G
    sampling = cached * (P * L + slots * T + slots // 2 * (L + T)) + 3 * 4 * slots * V
    sampling += compute * slots * (4 * E + 3 * cfg.intermediate_size)

    # Of a block, by token: what its matrix products read, and the activations between them; then its attention's weights.
    block = compute * (5 * E + 4 * cfg.intermediate_size + 4 * (N + K) * H) + 2 * 4 * N * (L + T)
    tokens = m * max(L, T)
    blocks = tokens * (cfg.num_layers * compute * E + block) if cfg.remat else tokens * cfg.num_layers * block
    update = blocks + 3 * 4 * m * c * V + kv * P * L * (compute + 4)
    cast = count * compute if compute != kept else 0  # the parameters again, in the computation's type
    average = 4 * count if config.optim.average else 0
    # Parameters, two moments, the gradient's sum and a micro-batch's own.
    return {"weights": 5.0 * count * kept + cast + average, "sampling": float(sampling), "update": float(update)}


def limit() -> float:
    """Bytes that one device may use: an accelerator's own, or this machine's, shared by the host devices."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = pathlib.Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total / jax.local_device_count()


def check(cfg: DecoderConfig, config: ConfigDict) -> None:
    """Raises UserError with the figures and the fix where the run will not fit."""
    parts, have = plan(cfg, config, jax.local_device_count()), limit()
    need = parts["weights"] + max(parts["sampling"], parts["update"])
    if need <= have:
        return
    worst = max(parts, key=parts.get)
    figures = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    raise UserError(
        f"this run needs about {need / GIB:.1f} GiB on each of {jax.local_device_count()} devices, which have {have / GIB:.1f} "
        f"({figures}): use {FIXES[worst]}, or more devices"
    )
