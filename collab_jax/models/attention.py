"""Attention: what a token sees, and the weighted sum over it.

Up to LONG tokens all scores are made at once. Beyond that memory grows with the number of columns
and not with its square, and what each token sees is said by a `Sight`: on a TPU the kernel that jax
ships takes over (splash attention); elsewhere scores are made for BLOCK tokens at a time, and again
in the backward pass, and so are masks. (cuDNN's kernel wants the keys of a document in one place,
and here those of its prompt lie apart from its own.) Axis letters: see `gapg.py`; n query heads
share a kv head, R rows of keys serve B rows of queries.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

KV = tuple[jax.Array, jax.Array]  # k [R, K, H, S] and v [R, K, S, H] of one layer, of one segment
LONG, BLOCK = 512, 128  # tokens
LEAST, MOST = 256, 512  # tokens, and columns, of a block of the kernel


class Sight(NamedTuple):
    """The columns that t tokens see: those of their own document, and none after themselves.

    The last t columns are the tokens' own. A document is what a row holds beside others; its number
    is -1 for columns that nobody sees.
    """

    document: jax.Array  # i32[B, t], of the tokens
    columns: jax.Array  # i32[B, S], the documents of what they look at

    def mask(self) -> jax.Array:
        """bool[B, t, S]: whether a token sees a column."""
        return self.mask_of(self.document, jnp.arange(self.document.shape[1]))

    def mask_of(self, document: jax.Array, number: jax.Array) -> jax.Array:
        """`mask` of some of the tokens, by their documents i32[B, b] and their numbers i32[b]."""
        before = self.columns.shape[1] - self.document.shape[1]
        reached = jnp.arange(self.columns.shape[1]) <= before + number[:, None]
        return (document[:, :, None] == self.columns[:, None]) & reached


def causal(real: jax.Array) -> Sight:
    """That of columns real bool[B, S]: a column sees itself and the real columns before it."""
    document = real.astype(jnp.int32) - 1
    return Sight(document, document)


def attend(
    q: jax.Array, pieces: Sequence[KV], mask: jax.Array | Sight, platform: str = "cpu"
) -> jax.Array:
    """Softmax attention of q [B, t, K, n, H] over all columns of `pieces` -> [B, t, K, n, H].

    A piece with fewer than B rows R serves B / R rows with each; of one with more, each row looks
    at R / B beside each other. mask: bool[B, t, S] or bool[1, t, S] over the columns of the pieces
    in order; or a Sight, for which not all scores are in memory at once. platform: for what devices
    the program is, as jax calls them.
    """
    pieces = [(_beside(k, len(q), -1), _beside(v, len(q), -2)) for k, v in pieces]
    if not isinstance(mask, Sight):
        return _at_once(q, pieces, mask)
    return (splash if platform == "tpu" else _by_blocks)(q, pieces, mask)


def _by_blocks(q: jax.Array, pieces: Sequence[KV], sight: Sight) -> jax.Array:
    """`attend` for BLOCK tokens at a time."""
    t = q.shape[1]

    def blocks(x: jax.Array) -> jax.Array:  # [B, t, ...] -> [blocks, B, BLOCK, ...]
        x = jnp.pad(x, ((0, 0), (0, -t % BLOCK), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)

    # Their gradients are summed over the blocks, in this type.
    wide = [(k.astype(jnp.float32), v.astype(jnp.float32)) for k, v in pieces]

    def one(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        own, document, number = block
        return _at_once(own, wide, sight.mask_of(document, number))

    # Nothing outside a loop's body can take the place of what is computed in it again.
    again = jax.checkpoint(one, prevent_cse=False)
    number = jnp.arange(t + -t % BLOCK).reshape(-1, BLOCK)
    y = jax.lax.map(again, (blocks(q), blocks(sight.document), number))
    return jnp.moveaxis(y, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, :t]


def splash(q: jax.Array, pieces: Sequence[KV], sight: Sight, interpret: bool = False) -> jax.Array:
    """`attend` by the kernel for TPUs. interpret: step by step on any device, for tests."""
    # jax calls it experimental: where it is not needed, nothing shall break without it.
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, t, K, n, H = q.shape
    S = sight.columns.shape[1]
    for_each = lambda x: jnp.repeat(x, B // len(x), axis=0)  # noqa: E731
    k = jnp.concatenate([for_each(k) for k, _ in pieces], axis=-1).swapaxes(-1, -2)
    v = jnp.concatenate([for_each(v) for _, v in pieces], axis=-2)
    rows, columns = -(-t // LEAST) * LEAST, -(-S // LEAST) * LEAST
    # Of one kv head after the other; what fills up a block is seen by nobody. The kernel does not
    # scale, and a scaled query in bf16 may be rounded.
    heads = jnp.moveaxis((q * H**-0.5).reshape(B, t, K * n, H), 1, 2)
    heads = jnp.pad(heads, ((0, 0), (0, 0), (0, rows - t), (0, 0)))
    k, v = (jnp.pad(x.astype(q.dtype), ((0, 0), (0, 0), (0, columns - S), (0, 0))) for x in (k, v))
    documents = splash_attention.SegmentIds(
        jnp.pad(sight.document, ((0, 0), (0, rows - t)), constant_values=-1),
        jnp.pad(sight.columns, ((0, 0), (0, columns - S)), constant_values=-1),
    )
    seen = splash_attention.CausalMask((rows, columns), offset=S - t)
    b, c = math.gcd(rows, MOST), math.gcd(columns, MOST)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([seen] * (K * n)),
        block_sizes=splash_attention.BlockSizes(
            block_q=b,
            block_kv=c,
            block_q_dkv=b,
            block_kv_dkv=c,
            block_q_dq=b,
            block_kv_dq=c,
        ),
        interpret=interpret,
    )
    y: Any = jax.vmap(kernel)(heads, k, v, segment_ids=documents)
    return jnp.moveaxis(y[:, :, :t], 1, 2).reshape(q.shape)


def _beside(x: jax.Array, B: int, axis: int) -> jax.Array:
    """[R, K, S, H], or H before S, as [B, K, c * S, H] where R = c B is more; axis is that of S."""
    if len(x) <= B:
        return x
    _, K, *inner = x.shape
    apart = jnp.moveaxis(x.reshape(B, -1, K, *inner), 1, axis - 1)
    inner[axis] *= len(x) // B
    return apart.reshape(B, K, *inner)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of x and y, f32; `spec` is as "rkqh,rkhs->rkqs", each letter in two of the three.

    Its gradients are products in the type of x and y too, summed in f32. JAX would take them from
    the f32 gradient as it is, and so in f32, which bf16 hardware does at a fraction of the speed.
    """
    return cast(jax.Array, _einsum(spec, x, y))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _backward(
    spec: str, saved: tuple[jax.Array, jax.Array], dz: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (x, y), (a, b, c) = saved, spec.replace("->", ",").split(",")
    dz = dz.astype(x.dtype)
    dx, dy = _product(f"{c},{b}->{a}", dz, y), _product(f"{a},{c}->{b}", x, dz)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_einsum.defvjp(lambda spec, x, y: (_product(spec, x, y), (x, y)), _backward)


def _at_once(q: jax.Array, pieces: Sequence[KV], mask: jax.Array) -> jax.Array:
    """`attend` with a mask bool[B, t, S] or bool[1, t, S], all scores in memory.

    Query heads that share a kv head, and rows that share a segment's row, become rows of one
    product: nothing is copied for them.
    """
    B, t, K, n, H = q.shape

    def scores(k: jax.Array, mask: jax.Array) -> jax.Array:
        """f32[R, K, g, n, t, S], for the g = B / R rows of each row of the segment."""
        R, _, _, S = k.shape
        rows = q.reshape(R, B // R, t, K, n, H).transpose(0, 3, 1, 4, 2, 5).reshape(R, K, -1, H)
        s = _product("rkqh,rkhs->rkqs", rows, k.astype(q.dtype))
        s = s.reshape(R, K, B // R, n, t, S) * H**-0.5
        mask = (
            mask.reshape(R, 1, B // R, 1, t, S) if mask.shape[0] == B else mask[:, None, None, None]
        )
        return jnp.where(mask, s, jnp.finfo(jnp.float32).min)

    def by_row(x: jax.Array) -> jax.Array:
        """[R, K, g, n, t, ...] -> [B, K, n, t, ...]."""
        R, _, g = x.shape[:3]
        return jnp.moveaxis(x, 2, 1).reshape(R * g, K, n, *x.shape[4:])

    stops = np.cumsum([k.shape[3] for k, _ in pieces])
    masks = jnp.split(mask, stops[:-1], axis=2)
    all_scores = [scores(k, part) for (k, _), part in zip(pieces, masks, strict=True)]
    best = functools.reduce(jnp.maximum, (by_row(s.max(-1)) for s in all_scores))  # [B, K, n, t]
    best = jax.lax.stop_gradient(best)
    total: Any = 0.0
    y: Any = 0.0
    for s, (_, v) in zip(all_scores, pieces, strict=True):
        R, _, g = s.shape[:3]
        w = jnp.exp(s - jnp.moveaxis(best.reshape(R, g, K, n, t), 1, 2)[..., None])
        total += by_row(w.sum(-1))
        weights = w.astype(q.dtype).reshape(R, K, g * n * t, -1)
        part = _product("rkqs,rksh->rkqh", weights, v.astype(q.dtype))
        y += by_row(part.reshape(R, K, g, n, t, H))
    return (y / total[..., None]).astype(q.dtype).transpose(0, 3, 1, 2, 4)
