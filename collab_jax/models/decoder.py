"""The decoder: Llama, Qwen2.5 and Qwen3 behind one pure `forward` with an explicit KV cache.

Linen declares names and shapes only; callers see functions of (params, cfg, ...). Submodule names mirror Hugging Face's
(`layers_3/self_attn/q_proj/kernel`), so that import and export are one rename rule (`hf.py`). The three families differ
in three switches of `DecoderConfig`: `qkv_bias` (Qwen2.5), `qk_norm` (Qwen3) and `rope_scaling` (Llama 3.x).

Axis letters are those of `gapg.py`: B rows, S columns of the cache, t new columns of one call, N query heads,
K kv heads, H head, E width, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling, as `rope_type: llama3` of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder; hashable, so it is a static argument of jitted functions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False  # bias of o_proj (Llama's and Qwen3's `attention_bias`)
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    initializer_range: float = 0.02
    remat: bool = False  # recompute each block in the backward pass
    dtype: str = "float32"  # of the computation and the cache; params keep the dtype they come in


@flax.struct.dataclass
class Cache:
    """Keys and values by layer, head-major so that attention is a plain batched matrix product.

    k, v: one [B, K, S, H] a layer; index: i32[], the next column to be written (the same for every row).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    index: jax.Array


def init_cache(cfg: DecoderConfig, rows: int, columns: int) -> Cache:
    """An empty cache of `columns` = S positions for `rows` = B rows."""
    shape = (rows, cfg.num_kv_heads, columns, cfg.head_dim)
    zeros = tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_layers))
    return Cache(k=zeros, v=tuple(jnp.zeros_like(z) for z in zeros), index=jnp.zeros((), jnp.int32))


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Each row `times` times, neighbours together: [P, ...] -> [P * times, ...]."""
    rows = functools.partial(jnp.repeat, repeats=times, axis=0)
    return cache.replace(k=tuple(map(rows, cache.k)), v=tuple(map(rows, cache.v)))


def rope_frequencies(cfg: DecoderConfig) -> jax.Array:
    """Inverse wavelengths f32[H/2] in radians per position, Llama-3 scaling applied (Llama 3.1 report; transformers' `llama3`)."""
    freq = cfg.rope_theta ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq
    wavelength = 2 * jnp.pi / freq
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = jnp.clip((context / wavelength - low) / (high - low), 0.0, 1.0)  # 0: long waves, scaled; 1: short, kept
    return freq * (smooth + (1 - smooth) / scaling.factor)


def _rope(x: jax.Array, positions: jax.Array, freq: jax.Array) -> jax.Array:
    """Rotates x [B, t, heads, H] by positions [B, t]; the two halves of H are the pairs (Hugging Face's layout)."""
    angle = positions[:, :, None, None].astype(jnp.float32) * freq  # [B, t, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return scale.astype(self.dtype) * y.astype(self.dtype)


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O]."""
    return x @ kernel


def _project_backward(saved, dy):
    x, kernel = saved
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # The kernel's gradient needs one of the two transposed in memory. XLA's CPU compiler fuses what made that operand
    # into the strided copy; left to itself it picks the wide one (the MLP's), which cost a sixth of an update.
    if rows.shape[1] <= drows.shape[1]:
        dkernel = rows.T @ drows
    else:
        dkernel = (drows.T @ rows).T
    return dy @ kernel.T, dkernel


_project.defvjp(lambda x, kernel: (_project(x, kernel), (x, kernel)), _project_backward)


class Dense(nn.Module):
    cfg: DecoderConfig
    features: int
    bias: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.cfg.initializer_range)
        y = _project(x, self.param("kernel", init, (x.shape[-1], self.features)).astype(self.cfg.dtype))
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.cfg.dtype)
        return y


class Attention(nn.Module):
    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, mask, cached):
        """x [B, t, E], mask bool[B, t, S], cached (k, v, index) or None -> [B, t, E], (k, v) [B, K, S, H]."""
        cfg = self.cfg
        B, t, _ = x.shape
        N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        q = Dense(cfg, N * H, cfg.qkv_bias, name="q_proj")(x).reshape(B, t, N, H)
        k = Dense(cfg, K * H, cfg.qkv_bias, name="k_proj")(x).reshape(B, t, K, H)
        v = Dense(cfg, K * H, cfg.qkv_bias, name="v_proj")(x).reshape(B, t, K, H)
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.dtype, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.dtype, name="k_norm")(k)
        freq = rope_frequencies(cfg)
        q, k = _rope(q, positions, freq), _rope(k, positions, freq)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, t, H]
        if cached is not None:
            keys, values, index = cached
            k = jax.lax.dynamic_update_slice(keys, k, (0, 0, index, 0))
            v = jax.lax.dynamic_update_slice(values, v, (0, 0, index, 0))
        S = k.shape[2]
        # Query heads that share a kv head become rows of one product: no copy of the cache for grouped queries.
        q = q.reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, (N // K) * t, H)
        scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * (H**-0.5)
        scores = scores.reshape(B, K, N // K, t, S)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(cfg.dtype).reshape(B, K, (N // K) * t, S)
        y = jnp.einsum("bkqs,bksh->bkqh", weights, v)
        y = y.reshape(B, K, N // K, t, H).transpose(0, 3, 1, 2, 4).reshape(B, t, N * H)
        return Dense(cfg, cfg.hidden_size, cfg.output_bias, name="o_proj")(y), (k, v)


class MLP(nn.Module):
    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        gate = Dense(cfg, cfg.intermediate_size, cfg.mlp_bias, name="gate_proj")(x)
        up = Dense(cfg, cfg.intermediate_size, cfg.mlp_bias, name="up_proj")(x)
        return Dense(cfg, cfg.hidden_size, cfg.mlp_bias, name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, mask, cached):
        norm = functools.partial(RMSNorm, self.cfg.norm_eps, self.cfg.dtype)
        y, cached = Attention(self.cfg, name="self_attn")(norm(name="input_layernorm")(x), positions, mask, cached)
        x = x + y
        x = x + MLP(self.cfg, name="mlp")(norm(name="post_attention_layernorm")(x))
        return x, cached


class Decoder(nn.Module):
    cfg: DecoderConfig

    @nn.compact
    def __call__(self, tokens, positions, mask, cache):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        x = nn.Embed(cfg.vocab_size, cfg.hidden_size, dtype=cfg.dtype, embedding_init=init, name="embed_tokens")(tokens)
        block = nn.remat(Block) if cfg.remat else Block
        kv = []
        for i in range(cfg.num_layers):
            cached = None if cache is None else (cache.k[i], cache.v[i], cache.index)
            x, layer_kv = block(cfg, name=f"layers_{i}")(x, positions, mask, cached)
            kv.append(layer_kv)
        x = RMSNorm(cfg.norm_eps, cfg.dtype, name="norm")(x)
        if self.is_initializing() and not cfg.tied:
            self.param("lm_head", lambda key: {"kernel": init(key, (cfg.hidden_size, cfg.vocab_size))})
        if cache is not None:
            k, v = zip(*kv, strict=True)
            cache = Cache(k=k, v=v, index=cache.index + tokens.shape[1])
        return x, cache


def init(cfg: DecoderConfig, key: jax.Array) -> Params:
    """Random f32 parameters, normal with standard deviation `cfg.initializer_range`."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(cfg).init(key, one, one, jnp.ones((1, 1, 1), bool), None)["params"]


def forward(
    params: Params,
    cfg: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Final hidden states of `tokens`, and the cache with their keys and values.

    tokens, positions: i32[B, t]. mask: bool[B, t, S], which columns each token sees; S = t without a cache, else the
    cache's width, where this call writes columns index .. index + t - 1. Returns hidden [B, t, E] after the last norm.
    """
    return Decoder(cfg).apply({"params": params}, tokens, positions, mask, cache)


def logits(params: Params, cfg: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """f32[..., V] from hidden [..., E]."""
    head = params["embed_tokens"]["embedding"].T if cfg.tied else params["lm_head"]["kernel"]
    return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def token_logprobs(
    params: Params, cfg: DecoderConfig, hidden: jax.Array, targets: jax.Array, temperature: float, chunk: int
) -> jax.Array:
    """log p(target) f32[B, T] from hidden [B, T, E], `chunk` columns at a time.

    The chunks are rematerialised in the backward pass, so that at most [B, chunk, V] logits ever exist.
    """

    @jax.checkpoint
    def one(hidden, targets):
        scaled = logits(params, cfg, hidden) / temperature
        chosen = jnp.take_along_axis(scaled, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(scaled, axis=-1)

    T = targets.shape[1]
    parts = [one(hidden[:, i : i + chunk], targets[:, i : i + chunk]) for i in range(0, T, chunk)]
    return jnp.concatenate(parts, axis=1)


def causal_mask(real: jax.Array) -> jax.Array:
    """bool[B, S, S] from real bool[B, S]: each column sees itself and the real columns before it."""
    S = real.shape[1]
    return jnp.tril(jnp.ones((S, S), bool)) & real[:, None, :] | jnp.eye(S, dtype=bool)


def positions_of(real: jax.Array) -> jax.Array:
    """i32[B, S]: the count of real columns before each column; padding gets 0."""
    return jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)


def response_logprobs(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    responses: jax.Array,
    response_mask: jax.Array,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """log pi(token | what came before) f32[B, T] of each response token by teacher forcing; off the mask, anything.

    prompts i32[B, L] padded on the left, prompt_mask bool[B, L]; responses i32[B, T], response_mask bool[B, T].
    """
    L = prompts.shape[1]
    tokens = jnp.concatenate([prompts, responses[:, :-1]], axis=1)
    real = jnp.concatenate([prompt_mask, response_mask[:, :-1]], axis=1)
    hidden, _ = forward(params, cfg, tokens, positions_of(real), causal_mask(real))
    return token_logprobs(params, cfg, hidden[:, L - 1 :], responses, temperature, chunk)


def group_logprobs(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """`response_logprobs` of groups, f32[P, G, T]: a prompt is computed once and its keys and values shared by its group.

    prompts i32[P, L] padded on the left, prompt_mask bool[P, L]; tokens i32[P, G, T], mask bool[P, G, T]. Off the mask, anything.
    """
    P, L = prompts.shape
    _, G, T = tokens.shape
    pad = ((0, 0), (0, 0), (0, T - 1))
    cache = init_cache(cfg, P, L + T - 1)
    head, cache = forward(
        params, cfg, prompts, positions_of(prompt_mask), jnp.pad(causal_mask(prompt_mask), pad), cache
    )
    real = jnp.concatenate([jnp.repeat(prompt_mask, G, axis=0), mask.reshape(P * G, T)[:, :-1]], axis=1)
    body, _ = forward(
        params,
        cfg,
        tokens.reshape(P * G, T)[:, :-1],
        positions_of(real)[:, L:],
        causal_mask(real)[:, L:],
        repeat_cache(cache, G),
    )
    hidden = jnp.concatenate([jnp.repeat(head[:, -1:], G, axis=0), body], axis=1)
    return token_logprobs(params, cfg, hidden, tokens.reshape(P * G, T), temperature, chunk).reshape(P, G, T)
