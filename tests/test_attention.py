"""Attention: masks by hand, and long rows against all scores at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.models import attention
from collab_jax.models.attention import Sight

B, R, K, n, H, L = 4, 2, 2, 3, 8, 5  # two rows of prompts, each for two rows of queries


def test_a_sight_by_hand():
    """Two documents beside each other, behind the columns of their prompts and one of nobody's."""
    sight = Sight(jnp.array([[0, 0, 1]]), jnp.array([[1, -1, 0, 0, 0, 1]]))
    mask = sight.mask()[0].astype(int).tolist()
    assert mask == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1]]
    second = sight.mask_of(jnp.array([[0]]), jnp.array([1]))[0].astype(int).tolist()
    assert second == mask[1:2]


def inputs(t, dtype):
    """Queries, a segment of prompts and one of their own, and a Sight: two documents in a row."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q = normal(B, t, K, n, H)
    pieces = [
        (normal(R, K, H, L), normal(R, K, L, H)),
        (normal(B, K, H, t), normal(B, K, t, H)),
    ]
    half = rng.integers(1, t, (B, 1))
    document = (np.arange(t) >= half).astype(np.int32)
    of_prompts = np.where(np.arange(L) >= rng.integers(0, L, (B, 1)), np.arange(L) % 2, -1)
    columns = np.concatenate([of_prompts, document], 1)
    return q, pieces, Sight(jnp.asarray(document, jnp.int32), jnp.asarray(columns, jnp.int32))


BY_KERNEL = functools.partial(attention.splash, interpret=True)


@pytest.mark.parametrize(
    "attend, t, dtype, atol",
    [
        (attention.attend, 300, "float32", 1e-5),  # two blocks and a part
        (attention.attend, 256, "float32", 1e-5),
        (attention.attend, 300, "bfloat16", 2e-2),
        (BY_KERNEL, 300, "float32", 1e-5),
        (BY_KERNEL, 128, "float32", 1e-5),  # less than a block
        (BY_KERNEL, 200, "bfloat16", 2e-2),
    ],
)
def test_no_way_differs_from_all_scores_at_once(attend, t, dtype, atol):
    """The sum and its gradients by queries, keys and values."""
    q, pieces, sight = inputs(t, dtype)

    def outcome(mask, q, pieces):
        def loss(q, pieces):
            y = (attend if isinstance(mask, Sight) else attention.attend)(q, pieces, mask)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(q, pieces)

    (_, want), want_grads = jax.jit(outcome)(sight.mask(), q, pieces)
    (_, got), grads = jax.jit(outcome)(sight, q, pieces)
    wide = lambda x: np.asarray(x, np.float32)  # noqa: E731
    np.testing.assert_allclose(wide(got), wide(want), atol=atol)
    for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        scale = np.abs(wide(other)).max()
        np.testing.assert_allclose(wide(own) / scale, wide(other) / scale, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_s_gradients_are_in_the_type_of_its_factors(dtype):
    """Whatever the type of the gradient that comes in; they are those of a plain product."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 3, 5, 4), (2, 3, 4, 6)))
    dz = jnp.asarray(rng.normal(size=(2, 3, 5, 6)), jnp.float32)
    z, back = jax.vjp(lambda x, y: attention._product("rkqh,rkhs->rkqs", x, y), x, y)
    assert z.dtype == jnp.float32
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    want = dz @ wide_y.swapaxes(2, 3), wide_x.swapaxes(2, 3) @ dz
    atol = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(z, wide_x @ wide_y, atol=1e-5)
    for own, other in zip(back(dz), want, strict=True):
        assert own.dtype == dtype
        np.testing.assert_allclose(np.asarray(own, np.float32), other, atol=atol)


def test_a_row_looks_at_several_rows_of_a_piece_beside_each_other():
    q, pieces, sight = inputs(6, "float32")
    (k, v), own = pieces
    rows = [
        (k.repeat(2 * B // R, axis=0) * factor, v.repeat(2 * B // R, axis=0)) for factor in (1, 2)
    ]
    k, v = rows[0][0].at[1::2].set(rows[1][0][1::2]), rows[0][1]
    beside = [
        (jnp.concatenate([k[::2], k[1::2]], axis=-1), jnp.concatenate([v[::2], v[1::2]], axis=-2))
    ]
    mask = sight.mask()
    mask = jnp.concatenate([mask[..., :L], mask[..., :L], mask[..., L:]], axis=-1)
    got = attention.attend(q, [(k, v), own], mask)
    np.testing.assert_allclose(got, attention.attend(q, [*beside, own], mask), atol=1e-6)


def test_long_rows_never_hold_all_scores(monkeypatch):
    """By the largest array of the program: with blocks it grows with t, else with its square."""

    def largest(t):
        q, pieces, sight = inputs(t, "float32")
        loss = lambda q: jnp.sum(attention.attend(q, pieces, sight) ** 2)  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis()
        return text.temp_size_in_bytes

    monkeypatch.setattr(attention, "BLOCK", 32)
    assert largest(512) < 2.5 * largest(256)


@pytest.mark.parametrize("heads, width, dtype", [(2, 64, "bfloat16"), (6, 128, "float32")])
def test_a_long_program_for_a_tpu_has_its_kernel_and_no_other_does(heads, width, dtype):
    """Forward and backward, lowered for real."""

    def loss(q, k, v, sight, platform):
        return jnp.sum(attention.attend(q, [(k, v)], sight, platform).astype(jnp.float32) ** 2)

    def exported(t, platform):
        q = jnp.zeros((1, t, heads // 2, 2, width), dtype)
        k, v = (
            jnp.zeros((1, heads // 2, width, t), dtype),
            jnp.zeros((1, heads // 2, t, width), dtype),
        )
        sight = attention.causal(jnp.ones((1, t), bool))
        grad = jax.jit(jax.grad(functools.partial(loss, platform=platform), argnums=(0, 1, 2)))
        return jax.export.export(grad, platforms=[platform])(q, k, v, sight).mlir_module()

    assert exported(1024, "tpu").count("tpu_custom_call") == 3  # the sum, and its two gradients
    assert "tpu_custom_call" not in exported(1024, "cpu")
