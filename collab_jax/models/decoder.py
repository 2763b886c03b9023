"""The decoder: Llama, Qwen2.5 and Qwen3 behind one pure `forward`, with an explicit KV cache.

The cache comes in segments. Linen declares names and shapes of a block only; callers see functions
of (params, cfg, ...). Parameters of all blocks are stacked, and a program has one loop over them
(`blocks.py`). Names mirror Hugging Face's (`layers/self_attn/q_proj/kernel`), so that import
and export are one rename rule (`hf.py`). The three families differ in three switches of
`DecoderConfig`: `qkv_bias` (Qwen2.5), `qk_norm` (Qwen3) and `rope_scaling` (Llama 3.x).

Axis letters are those of `gapg.py`: B rows, S columns of the cache, t new columns of one call, N
query heads, K kv heads, H head, E width, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from collab_jax.models import attention, blocks
from collab_jax.models.attention import KV, Sight
from collab_jax.models.decoder_config import DecoderConfig, Params
from collab_jax.models.layers import Dense, RMSNorm, product
from collab_jax.runtime import split


class Segment(flax.struct.PyTreeNode):
    """Keys and values of some columns in all layers: stacked, [layers, R, K, H, S], or a tuple.

    R divides the rows B of whatever attends to the segment: row r serves the B / R rows from
    r * B / R on, so that a group holds its prompt once. Or B divides R, and each row looks at R / B
    of them, beside each other. Keys lie with their columns last: then both products of one query
    with a cache run along memory (three times as fast on a CPU).
    """

    k: blocks.Layers  # [R, K, H, S] of a layer
    v: blocks.Layers  # [R, K, S, H]

    @property
    def rows(self) -> int:
        """R."""
        return jax.tree.leaves(self.k)[0].shape[ROWS]

    @property
    def columns(self) -> int:
        """S."""
        return jax.tree.leaves(self.k)[0].shape[-1]


ROWS = -4  # the axis R of every leaf of a Segment
TURNED = "turned_head"  # among the parameters, see `with_ends`


def empty_segment(cfg: DecoderConfig, rows: int, columns: int, dtype: str) -> Segment:
    """A segment of zeros for `rows` = R and `columns` = S."""
    K, H = cfg.num_kv_heads, cfg.head_dim
    zeros = lambda *shape: blocks.zeros(cfg, shape, dtype)  # noqa: E731
    return Segment(k=zeros(rows, K, H, columns), v=zeros(rows, K, columns, H))


def take_rows(segment: Segment, index: jax.Array, rows: int) -> Segment:
    """The segment's rows that serve rows `index` i32[n] of B = `rows`: R becomes n."""
    shared = rows // segment.rows
    return jax.tree.map(lambda x: jnp.take(x, index // shared, axis=ROWS), segment)


def rope_frequencies(cfg: DecoderConfig) -> jax.Array:
    """Inverse wavelengths f32[H/2] in radians per position, with Llama 3's scaling applied.

    (Llama 3.1 report; transformers' `llama3`.)
    """
    freq = cfg.rope_theta ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq
    wavelength = 2 * jnp.pi / freq
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0: long waves, which are scaled; 1: short ones, which are kept.
    smooth = jnp.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return freq * (smooth + (1 - smooth) / scaling.factor)


def _rope_angles(cfg: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sin, cos) f32[B, t, 1, 1, H/2] of the rotations at positions i32[B, t]."""
    angle = positions[:, :, None, None, None].astype(jnp.float32) * rope_frequencies(cfg)
    return jnp.sin(angle), jnp.cos(angle)


def _rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """x [B, t, heads, H] rotated by the angles of sin, cos f32[B, t, 1, 1, H/2].

    The two halves of H are the pairs (Hugging Face's layout).
    """
    halves = x.reshape(*x.shape[:-1], 2, -1).astype(jnp.float32)
    signed = jnp.concatenate([-sin, sin], axis=-2)
    # A reversal, unlike a concatenation of the rotated halves, becomes one loop along memory with
    # what surrounds it.
    return (halves * cos + jnp.flip(halves, axis=-2) * signed).reshape(x.shape).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention of one layer."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: jax.Array | Sight,
        past: Sequence[KV],
        open: Segment | None,
        layer: int | jax.Array,
        index: int | jax.Array,
    ) -> tuple[jax.Array, KV | Segment]:
        """What x [B, t, E] attends to, [B, t, E], and the keys and values of its t columns.

        rope is (sin, cos), mask bool[B, t, S] or a Sight; past has this layer's keys and values of
        each segment. With `open`, one more segment of all layers, the t columns are written to it
        at `layer` and `index`, and it is returned.
        """
        cfg = self.cfg
        B, t, _ = x.shape
        N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        q = Dense(cfg, N * H, cfg.qkv_bias, name="q_proj")(x).reshape(B, t, N, H)
        k = Dense(cfg, K * H, cfg.qkv_bias, name="k_proj")(x).reshape(B, t, K, H)
        v = Dense(cfg, K * H, cfg.qkv_bias, name="v_proj")(x).reshape(B, t, K, H)
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.dtype, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.dtype, name="k_norm")(k)
        q, k = _rope(q, *rope), _rope(k, *rope)
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, t], [B, K, t, H]
        if open is not None:
            k, all_k = blocks.written(open.k, layer, k, index, axis=-1)
            v, all_v = blocks.written(open.v, layer, v, index, axis=-2)
            open = Segment(k=all_k, v=all_v)
        q = q.reshape(B, t, K, N // K, H)
        y = attention.attend(q, (*past, (k, v)), mask, blocks.platform(cfg))
        y = y.reshape(B, t, N * H)
        return Dense(cfg, cfg.hidden_size, cfg.output_bias, name="o_proj")(y), (
            k,
            v,
        ) if open is None else open


class MLP(nn.Module):
    """The gated feed-forward part of a layer, [..., E] -> [..., E]."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        gate = Dense(cfg, cfg.intermediate_size, cfg.mlp_bias, name="gate_proj")(x)
        up = Dense(cfg, cfg.intermediate_size, cfg.mlp_bias, name="up_proj")(x)
        return Dense(cfg, cfg.hidden_size, cfg.mlp_bias, name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One layer; arguments and results are those of `Attention`."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: jax.Array | Sight,
        past: Sequence[KV],
        open: Segment | None,
        layer: int | jax.Array,
        index: int | jax.Array,
    ) -> tuple[jax.Array, KV | Segment]:
        norm = functools.partial(RMSNorm, self.cfg.norm_eps, self.cfg.dtype)
        attend = Attention(self.cfg, name="self_attn")
        y, kept = attend(norm(name="input_layernorm")(x), rope, mask, past, open, layer, index)
        x = x + y
        x = x + MLP(self.cfg, name="mlp")(norm(name="post_attention_layernorm")(x))
        return x, kept


def init(cfg: DecoderConfig, key: jax.Array) -> Params:
    """Random f32 parameters, normal with standard deviation `cfg.initializer_range`.

    Those of all blocks are stacked: the leaves of `layers` have an axis of layers in front.
    """
    embed_key, head_key, blocks_key = jax.random.split(key, 3)
    normal = nn.initializers.normal(cfg.initializer_range)
    x, position = jnp.zeros((1, 1, cfg.hidden_size)), jnp.zeros((1, 1), jnp.int32)
    inputs = x, _rope_angles(cfg, position), jnp.ones((1, 1, 1), bool), (), None, 0, 0

    def block(key: jax.Array) -> Params:
        return cast(Params, Block(cfg).init(key, *inputs)["params"])

    params = {
        "embed_tokens": {"embedding": normal(embed_key, (cfg.vocab_size, cfg.hidden_size))},
        blocks.LAYERS: jax.vmap(block)(jax.random.split(blocks_key, cfg.num_layers)),
        "norm": {"scale": jnp.ones(cfg.hidden_size)},
    }
    if not cfg.tied:
        params["lm_head"] = {"kernel": normal(head_key, (cfg.hidden_size, cfg.vocab_size))}
    return params


def _embed(params: Params, cfg: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """The embeddings [B, t, E] of tokens i32[B, t]."""
    module = params["embed_tokens"]
    x = jnp.take(module["embedding"].astype(cfg.dtype), tokens, axis=0)
    if "lora_row" in module:
        row = module["lora_row"].astype(cfg.dtype)
        x += jnp.where(tokens[..., None] == cfg.lora_token, row, 0)
    return x


def forward(
    params: Params,
    cfg: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array | Sight,
    past: tuple[Segment, ...] = (),
    open: Segment | None = None,
    index: int | jax.Array = 0,
) -> tuple[jax.Array, Segment]:
    """(hidden [B, t, E] of `tokens` after the last norm, the segment with their keys and values).

    tokens, positions: i32[B, t]. mask: bool[B, t, S] (or [1, t, S]), which columns each token sees:
    those of `past`, in order, then those of `open`, to whose columns index .. index + t - 1 this
    call writes; without `open`, these t themselves, and then mask may be a Sight. The segment is
    `open` after that, or one of the t columns. A loop that calls this takes `blocks.unfolded`
    params.
    """
    params = with_ends(params, cfg)
    rope = _rope_angles(cfg, positions)
    if isinstance(mask, Sight) and tokens.shape[1] <= attention.LONG:
        mask = mask.mask()  # once for all layers

    def block(weights: Params, *inputs):
        return Block(cfg).apply({"params": split.whole(weights, cfg.dtype)}, *inputs)

    if open is None:  # else nothing is differentiated
        if cfg.remat:
            block = jax.checkpoint(block)
        elif split.over(params[blocks.LAYERS]) is not None:  # gathered again for the backward pass
            block = jax.checkpoint(block, policy=split.all_but_gathered)

    def layer(carry, i: int | jax.Array, of_layer):
        x, open = carry
        weights, layer_past = of_layer
        inputs = x, rope, mask, layer_past, open, i, index
        x, kept = block(weights, *inputs)
        return ((x, None), kept) if open is None else ((x, kept), None)

    of_layers = params[blocks.LAYERS], [(segment.k, segment.v) for segment in past]
    carry = _embed(params, cfg, tokens), open
    (x, written), kept = blocks.over_layers(cfg, layer, carry, of_layers)
    x = RMSNorm(cfg.norm_eps, cfg.dtype).apply({"params": params["norm"]}, x)
    return cast(jax.Array, x), Segment(*kept) if written is None else written


def with_ends(params: Params, cfg: DecoderConfig) -> Params:
    """The parameters with all but those of the blocks as `forward` and `logits` want them.

    Gathered, where devices have parts of them. And on a CPU that computes in bf16 with the
    embedding for a head too, turned: XLA has no fast product with it as it lies. Whoever calls both
    of the two, or one of them in a loop, calls this first.
    """
    ends = {name: leaf for name, leaf in params.items() if name != blocks.LAYERS}
    params = params | split.whole(ends, cfg.dtype)
    if not cfg.tied or cfg.dtype == "float32" or blocks.is_looped(cfg) or TURNED in params:
        return params
    turned = params["embed_tokens"]["embedding"].astype(cfg.dtype).T
    return params | {TURNED: with_layout_constraint(turned, Layout((0, 1)))}


def whole(params: Params, cfg: DecoderConfig) -> Params:
    """The parameters with all that devices have parts of gathered, to sample with.

    One layer at a time: the parts that devices send lie in memory before they are in their places.
    """
    layers = jax.lax.map(functools.partial(split.whole, dtype=cfg.dtype), params[blocks.LAYERS])
    return with_ends(params, cfg) | {blocks.LAYERS: layers}


def logits(params: Params, cfg: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Logits f32[..., V] from hidden [..., E]."""
    module = params["embed_tokens" if cfg.tied else "lm_head"]
    if TURNED in params:
        out = _turned_product(hidden, params[TURNED], module["embedding"].astype(hidden.dtype))
    else:
        head = module["embedding"].T if cfg.tied else module["kernel"]
        out = product(hidden, head.astype(hidden.dtype))
    if "lora_row" not in module:
        return out
    assert cfg.lora_token is not None
    own = out[..., cfg.lora_token] + product(hidden, module["lora_row"].astype(hidden.dtype))
    return jax.lax.dynamic_update_slice_in_dim(out, own[..., None], cfg.lora_token, axis=-1)


def token_logits(
    params: Params, cfg: DecoderConfig, hidden: jax.Array, token: int | jax.Array
) -> jax.Array:
    """The logits f32[...] of one token, as `logits` has them, from hidden [..., E].

    Where an adapter moves a token, it is that one.
    """
    module = params["embed_tokens" if cfg.tied else "lm_head"]
    row = module["embedding"][token] if cfg.tied else module["kernel"][:, token]
    out = product(hidden, row.astype(hidden.dtype))
    if "lora_row" not in module:
        return out
    return out + product(hidden, module["lora_row"].astype(hidden.dtype))


@jax.custom_vjp
def _turned_product(hidden: jax.Array, head: jax.Array, embedding: jax.Array) -> jax.Array:
    """hidden [..., E] @ head [E, V], f32; the embedding [V, E] is the same the other way round.

    The gradient goes to the embedding.
    """
    return product(hidden, head)


def _turned_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    hidden, embedding = saved
    dy = dy.astype(hidden.dtype)
    rows, drows = hidden.reshape(-1, hidden.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dembedding = product(drows.T, rows).astype(embedding.dtype)
    return product(dy, embedding).astype(hidden.dtype), None, dembedding


_turned_product.defvjp(
    lambda hidden, head, embedding: (product(hidden, head), (hidden, embedding)), _turned_backward
)


def positions_of(real: jax.Array) -> jax.Array:
    """i32[B, S]: the count of real columns before each column; padding gets 0."""
    return jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)


def prefill(
    params: Params, cfg: DecoderConfig, prompts: jax.Array, prompt_mask: jax.Array
) -> tuple[jax.Array, Segment]:
    """(hidden state of each prompt's last token [P, E], segment of the prompts).

    prompts i32[P, L] are padded on the left, where prompt_mask bool[P, L] is False.
    """
    hidden, segment = forward(
        params, cfg, prompts, positions_of(prompt_mask), attention.causal(prompt_mask)
    )
    return hidden[:, -1], segment
