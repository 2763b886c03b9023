"""The optimizer: parameters of few bits follow those of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax.rl import optim


def trajectory(optimizer, dtype, steps, lr_free_grads):
    """(params, state) after `steps` updates of weights around 0.02."""
    params = {"w": jnp.linspace(-0.04, 0.04, 64).reshape(8, 8).astype(dtype)}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, {"w": lr_free_grads[t]})
    return np.asarray(params["w"], np.float32), state


@pytest.fixture(scope="module")
def grads():
    """Gradients with a direction of their own in each weight, and noise: what RL has."""
    draw = np.random.default_rng(0)
    return (np.sign(draw.standard_normal((8, 8))) + draw.standard_normal((300, 8, 8))).astype(
        np.float32
    )


def test_bfloat16_parameters_take_small_steps_that_plain_rounding_loses(grads):
    schedule = lambda _: 5e-6  # noqa: E731
    start = np.asarray(jnp.linspace(-0.04, 0.04, 64).reshape(8, 8).astype(jnp.bfloat16), np.float32)
    half, state = trajectory(
        optim.make_optimizer(schedule, 0.0, optim.clipped(), "bfloat16"), "bfloat16", 300, grads
    )
    full, _ = trajectory(
        optim.make_optimizer(schedule, 0.0, optim.clipped()), "float32", 300, grads
    )
    plain, _ = trajectory(optax.adamw(schedule, weight_decay=0.0), "bfloat16", 300, grads)
    moved = full - np.linspace(-0.04, 0.04, 64, dtype=np.float32).reshape(8, 8)
    paid = (
        half + np.asarray(state.owed["w"], np.float32) - start
    )  # what the weights would be without rounding
    np.testing.assert_allclose(paid, moved, atol=0.03 * np.abs(moved).max())
    assert (
        np.mean(np.sign(half - start) == np.sign(moved)) > 0.9
    )  # and they are there themselves, within their last bit
    assert np.mean(plain == start) > 0.8  # while without compensation most weights never moved


def test_rounding_is_an_operation_that_no_compiler_leaves_out():
    """A conversion to bfloat16 and back would not do: XLA may drop it, and nothing would be owed.

    (xla_allow_excess_precision, on accelerators.)
    """
    optimizer = optim.make_optimizer(lambda _: 1e-3, 0.0, optim.unit_norm(), "bfloat16")
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    assert "reduce_precision" in lowered.as_text() and "e8m7" in lowered.as_text()


def test_bfloat16_state_is_bfloat16_but_for_the_second_moment():
    optimizer = optim.make_optimizer(lambda _: 1e-3, 0.0, optim.unit_norm(), "bfloat16")
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    state = optimizer.init(params)
    kinds = sorted(str(x.dtype) for x in jax.tree.leaves(state) if x.ndim)
    assert kinds == ["bfloat16", "bfloat16", "float32"]  # owed, mu, nu
    updates, after = optimizer.update({"w": jnp.ones((2, 3))}, state, params)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_size_of_a_policy_gradient_changes_no_update(grads, scale):
    optimizer = optim.make_optimizer(lambda _: 1e-3, 0.0, optim.unit_norm())
    moved, _ = trajectory(optimizer, "float32", 20, grads)
    scaled, _ = trajectory(optimizer, "float32", 20, grads * np.float32(scale))
    np.testing.assert_allclose(scaled, moved, atol=1e-7)


def test_a_gradient_of_zeros_stays_one_and_any_other_has_norm_1():
    bound = optim.unit_norm()
    of = lambda w: bound.update({"w": jnp.array(w)}, bound.init({}))[0]["w"]  # noqa: E731
    assert of([0.0, 0.0]).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(of([3e-12, -4e-12]), [0.6, -0.8], rtol=1e-6)
    assert optim.clipped().update({"w": jnp.array([0.3, 0.4])}, None)[0]["w"].tolist() == [
        jnp.float32(0.3),
        jnp.float32(0.4),
    ]


def test_the_first_update_has_a_share_of_the_learning_rate_and_the_warm_up_ends_at_its_peak():
    rates = lambda schedule, steps: [float(schedule(jnp.int32(i))) for i in steps]  # noqa: E731
    constant = optim.make_schedule(8.0, 4, decay_steps=None)
    assert rates(constant, range(6)) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    cosine = optim.make_schedule(8.0, 4, decay_steps=8)
    assert rates(cosine, range(9)) == pytest.approx(
        [2, 4, 6, 8, 8, 4 + 2 * 2**0.5, 4, 4 - 2 * 2**0.5, 0], abs=1e-6
    )
    for warmup_steps in (0, 1):
        assert rates(optim.make_schedule(8.0, warmup_steps, None), range(3)) == [8.0] * 3


def test_weight_decay_is_of_matrices():
    """Without a gradient only decay moves a weight; a norm's of all layers is one array."""
    params = {
        "embed_tokens": {"embedding": jnp.ones((5, 4))},
        "layers": {"norm": {"scale": jnp.ones((3, 4))}, "proj": {"kernel": jnp.ones((3, 4, 2))}},
        "norm": {"scale": jnp.ones(4)},
    }
    adam = optim.make_optimizer(optax.constant_schedule(0.1), 0.5, optim.unit_norm())
    grads = jax.tree.map(jnp.zeros_like, params)
    moved, _ = adam.update(grads, adam.init(params), params)
    moved = jax.tree.map(lambda x: float(np.unique(x).item()), moved)
    assert moved["embed_tokens"]["embedding"] == moved["layers"]["proj"]["kernel"] < 0
    assert moved["layers"]["norm"]["scale"] == moved["norm"]["scale"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_begins_on_the_host_as_that_of_optax_does(dtype):
    params = {"layers": {"w": np.ones((2, 3, 4), dtype), "b": np.ones((2, 3), dtype)}}
    optimizer = optim.make_optimizer(lambda _: 1e-3, 0.1, optim.unit_norm(), dtype)
    adamw = optax.adamw(lambda _: 1e-3, weight_decay=0.1, mask=optim._matrices, mu_dtype=dtype)
    chain = optax.chain(optim.unit_norm(), adamw)
    want = chain if dtype == "float32" else optim.compensated(chain)
    got = optimizer.init(params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))
    jax.tree.map(np.testing.assert_array_equal, got, want.init(jax.tree.map(jnp.asarray, params)))
