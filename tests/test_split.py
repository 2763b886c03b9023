"""Arrays divided over devices: gathered, summed, and a step against one with whole parameters."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_gapg import CFG, assert_close, body, rollout, start

from collab_jax.models import blocks, decoder
from collab_jax.rl import experiment, optim, training
from collab_jax.runtime import parallel, split
from collab_jax.runtime.split import Split

D = 2


def test_what_is_divided_by_hand():
    tree = {
        "embed_tokens": {"embedding": np.arange(12.0).reshape(6, 2)},
        "layers": {"scale": np.ones((3, 4)), "kernel": np.arange(24.0).reshape(2, 3, 4)},
        "odd": np.ones((3, 5)),
        "count": np.zeros(()),
    }
    cut = blocks.divided(tree, D, "d")
    embedding, kernel = cut["embed_tokens"]["embedding"], cut["layers"]["kernel"]
    assert (embedding.axis, kernel.axis, embedding.over) == (-2, -1, "d")
    np.testing.assert_array_equal(embedding.part, np.arange(12.0).reshape(2, 3, 2))
    want = np.arange(24.0).reshape(2, 3, 2, 2).transpose(2, 0, 1, 3)  # [D, layers, 3, 2]
    np.testing.assert_array_equal(kernel.part, want)
    odd = cut["odd"]  # no side that two divides: the longer one is filled up
    assert (odd.axis, odd.size, odd.part.shape) == (-1, 5, (2, 3, 3))
    assert odd.part[:, 0].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert cut["count"] is tree["count"]  # no matrix
    assert cut["layers"]["scale"] is tree["layers"]["scale"]  # a vector for each layer
    assert blocks.divided(tree, 1, "d") == tree
    shapes = jax.eval_shape(lambda tree: blocks.divided(tree, D, "d"), tree)
    assert shapes["layers"]["kernel"].part.shape == (2, 2, 3, 2)


def test_to_the_devices_and_back():
    tree = {"a": np.arange(24.0).reshape(4, 6), "b": np.ones(3), "c": np.arange(15.0).reshape(5, 3)}
    there = parallel.replicate(blocks.divided(tree, D, parallel.AXIS))
    assert there["a"].part.shape == (D, 4, 3)
    jax.tree.map(np.testing.assert_array_equal, parallel.unreplicate(there), tree)


def test_parts_that_hosts_have_come_together_piece_by_piece(monkeypatch):
    """Five rows, two at a time: the last piece has one again."""
    monkeypatch.setattr(parallel, "PIECE", 2 * D * 3 * 4)
    part = np.arange(D * 5 * 3, dtype=np.int32).reshape(D, 5, 3)
    np.testing.assert_array_equal(parallel._parts_of_all_hosts(jnp.asarray(part)), part)
    assert parallel._gathered_rows.cache_info().currsize == 1
    parallel._gathered_rows.cache_clear()


@pytest.mark.parametrize("shape", [(2, 4), (3, 5)])
def test_a_gradient_through_whole_is_this_devices_part_of_the_sum(shape):
    """Each device weighs the array by its own numbers; what fills up the last part has none."""
    n = shape[1]
    x = np.arange(3.0 * n)[: shape[0] * n].reshape(shape)
    w = np.random.default_rng(0).normal(size=(D, *shape))
    parts = blocks.divided({"x": x}, D, "d")["x"]

    def of_device(part, w):
        return jax.grad(lambda p: jnp.sum(jnp.sin(split.whole(p, "float32")) * w))(part)

    got = jax.pmap(of_device, axis_name="d", devices=jax.devices()[:D])(parts, w)
    want = np.cos(x) * w.sum(0)
    got = np.concatenate(list(got.part), axis=parts.axis)
    np.testing.assert_allclose(got[:, :n], want, rtol=1e-5)
    assert not got[:, n:].any()


def test_norms_and_sums_are_of_whole_arrays():
    tree = {"x": np.arange(8.0, dtype=np.float32).reshape(2, 4), "y": np.ones(3, np.float32)}
    cut = blocks.divided(tree, D, "d")
    axes = {"x": Split(0, -1, 4, "d"), "y": None}  # of an argument that has an axis D, or has not

    def of_device(tree):
        scaled, _ = optim.unit_norm().update(tree, optax.EmptyState())
        return split.norm(tree), split.norm(scaled), split.summed(tree, "d")

    norm, one, total = jax.pmap(
        of_device, axis_name="d", in_axes=(axes,), devices=jax.devices()[:D]
    )(cut)
    np.testing.assert_allclose(norm, optax.tree.norm(tree), rtol=1e-6)
    np.testing.assert_allclose(one, 1, rtol=1e-6)
    np.testing.assert_array_equal(total["x"].part, cut["x"].part)  # it is a sum already
    np.testing.assert_array_equal(total["y"][0], D * tree["y"])


@pytest.mark.parametrize("remat", [False, True])
def test_no_gathered_matrix_is_kept_for_the_backward_pass(remat):
    """Each of a block's seven is gathered on the way forward and again on the way back."""
    cfg = dataclasses.replace(CFG, platform="gpu", remat=remat)
    params = parallel.replicate(blocks.divided(start().params, D, parallel.AXIS))
    tokens = jnp.ones((D, 2, 3), jnp.int32)

    def of_device(params, tokens):
        def loss(params):
            last, _ = decoder.prefill(params, cfg, tokens, tokens > 0)
            return last.sum()

        return jax.grad(loss)(params)

    text = parallel.pmap(of_device).lower(params, tokens).as_text()
    assert text.count("stablehlo.all_gather") == 2 * 7 + 1  # and the embedding


@functools.cache
def stepped(sharded, **changes):
    """(state, metrics) after two steps on two devices, on the host; changes: of the model."""
    adam = optim.make_optimizer(optax.constant_schedule(1e-2), 0.1, optim.unit_norm())
    state = start(optimizer=adam).replace(average=start().params)
    if sharded:
        cut = functools.partial(blocks.divided, devices=D, over=parallel.AXIS)
        state = state.replace(
            params=cut(state.params), opt_state=cut(state.opt_state), average=cut(state.average)
        )
    cfg = dataclasses.replace(CFG, **changes)
    step = body(cfg=cfg, axis=parallel.AXIS, optimizer=adam, average=0.5, micro_rows=2)
    run = parallel.pmap(lambda state, batch: step(state, batch, jax.random.key(5)))
    state, shards = parallel.replicate(state), parallel.shard(rollout(), D)
    for _ in range(2):
        state, metrics = run(state, shards)
    return parallel.unreplicate((state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"platform": "gpu"}, {"platform": "gpu", "remat": True}])
def test_a_step_with_divided_parameters_equals_one_with_whole_ones(changes):
    (want, want_metrics), (got, metrics) = stepped(sharded=False), stepped(sharded=True, **changes)
    assert_close(got.params, want.params, rtol=1e-3, atol=2e-5)
    assert_close(got.average, want.average, rtol=1e-3, atol=2e-5)
    assert_close(metrics, want_metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "alone"),
    [pytest.param(r, False, marks=pytest.mark.long) for r in (0, 2)] + [(0, True)],
)
def test_a_run_with_divided_parameters_equals_one_with_whole_ones(small, tmp_path, rank, alone):
    """Its checkpoints too: each goes on from the other's. alone: it learns the decision alone."""
    fewer = {"train__checkpoint_every": 1, "eval__prompts": 0, "decode__slot_counts": 1}
    if alone:
        fewer |= {"algorithm__decision": "scored", "algorithm__advantage": "none"}
    config = {
        sharded: small(train__sharded=sharded, train__steps=2, lora__rank=rank, **fewer)
        for sharded in (False, True)
    }

    def trained(sharded, workdir):
        state = training.train(experiment.prepare(config[sharded], workdir))
        assert (split.over(state.params) is None) != sharded
        assert (split.over(state.frozen) is None) != (sharded and rank > 0)
        return parallel.unreplicate(state.params)

    want, got = (trained(sharded, tmp_path / str(sharded)) for sharded in (False, True))
    assert_close(got, want, rtol=1e-3, atol=1e-5)
    if alone:
        begun = experiment.load_state(experiment.prepare(config[False], tmp_path / "begun")).params
        moved = np.asarray(want["embed_tokens"]["embedding"] != begun["embed_tokens"]["embedding"])
        assert moved.any(axis=1).sum() == 1  # the call's row
        others = [dict(tree, embed_tokens=None) for tree in (want, begun)]
        jax.tree.map(np.testing.assert_array_equal, *others)
    for sharded in (False, True):
        workdir = tmp_path / str(sharded)
        shutil.rmtree(workdir / "checkpoints" / "2")
        assert_close(trained(not sharded, workdir), want, rtol=1e-3, atol=1e-5)
