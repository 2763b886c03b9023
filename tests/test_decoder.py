"""The decoder: caching, padding, chunks, remat and number formats never change what it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.models import attention, decoder, layers, logprobs
from collab_jax.models.blocks import empty, unstacked
from collab_jax.models.decoder import DecoderConfig
from collab_jax.models.decoder_config import RopeScaling

# Compiling is most of the time here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PAD = 0
LLAMA = DecoderConfig(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, rope_theta=100.0, norm_eps=1e-5, tied=True,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
)  # fmt: skip
QWEN2 = dataclasses.replace(LLAMA, rope_scaling=None, qkv_bias=True, tied=False, num_kv_heads=1)
QWEN3 = dataclasses.replace(LLAMA, rope_scaling=None, qk_norm=True, head_dim=6, num_kv_heads=4)
VARIANTS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


@functools.cache
def random_params(cfg):
    """Every parameter far from its initial value, norms and biases too."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))

    def one(path, leaf):
        noise = draw.standard_normal(leaf.shape).astype(np.float32)
        return {
            "scale": lambda: 1 + 0.3 * noise,
            "bias": lambda: 0.3 * noise,
            "embedding": lambda: noise,
            "kernel": lambda: 1.5 * noise / leaf.shape[0] ** 0.5,
        }[path[-1]]()

    params = empty(shapes, "float32")
    for path, leaf in sorted(unstacked(params).items()):
        leaf[...] = one(path, leaf)
    return params


def random_tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(1, LLAMA.vocab_size, shape).astype(np.int32)


def padded(length, pads):
    """real bool[B, length], with pads[b] columns of padding on the left of row b."""
    return np.arange(length) >= np.array(pads)[:, None]


@functools.partial(jit, static_argnums=1)
def logits_at(params, cfg, tokens, positions, mask, past=(), open=None, index=0):
    hidden, segment = decoder.forward(params, cfg, tokens, positions, mask, past, open, index)
    return decoder.logits(params, cfg, hidden), segment


def uncached(params, cfg, tokens, real):
    return np.asarray(
        logits_at(params, cfg, tokens, decoder.positions_of(real), attention.causal(real))[0]
    )


# ------------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached_under_ragged_left_padding(variant):
    cfg, L, S = VARIANTS[variant], 6, 9
    K, H = cfg.num_kv_heads, cfg.head_dim
    params = random_params(cfg)
    tokens, real = random_tokens(3, S), padded(S, [0, 2, 5])
    want = uncached(params, cfg, tokens, real)

    # A segment of what is computed at once, one that is full, one that is being filled and has room
    # to spare.
    mask, positions = (
        np.asarray(attention.causal(real).mask()),
        np.asarray(decoder.positions_of(real)),
    )
    got, prompt = logits_at(params, cfg, tokens[:, :L], positions[:, :L], mask[:, :L, :L])
    assert (
        prompt.k[0].shape == (3, K, H, L)
        and prompt.v[0].shape == (3, K, L, H)
        and len(prompt.k) == cfg.num_layers
    )
    steps, past, open = [got], (prompt,), decoder.empty_segment(cfg, 3, 2, "float32")
    for t in range(L, S):
        if t == L + 2:
            past, open = (prompt, open), open  # its content is stale from here on
        before = L + 2 * (len(past) - 1)
        seen = np.concatenate([mask[:, t : t + 1, :before], np.zeros((3, 1, 2), bool)], axis=2)
        seen[:, :, before : t + 1] = mask[:, t : t + 1, before : t + 1]
        at = tokens[:, t : t + 1], positions[:, t : t + 1]
        got, open = logits_at(params, cfg, *at, seen, past, open, t - before)
        steps.append(got)
    np.testing.assert_allclose(np.concatenate(steps, axis=1)[real], want[real], atol=2e-5)


def test_rows_that_share_a_segment_equal_rows_with_their_own():
    cfg, L = QWEN2, 6
    params = random_params(cfg)
    tokens, real = random_tokens(2, L), padded(L, [0, 3])
    prompt_mask, positions = (
        np.asarray(attention.causal(real).mask()),
        np.asarray(decoder.positions_of(real)),
    )
    _, prompt = logits_at(params, cfg, tokens, positions, prompt_mask)
    more = random_tokens(6, 2, seed=7)  # three rows for each prompt, two tokens each
    seen = np.repeat(real, 3, axis=0)[:, None]
    mask = np.concatenate(
        [np.repeat(seen, 2, axis=1), np.tile(np.tril(np.ones((2, 2), bool)), (6, 1, 1))], axis=2
    )
    at = more, seen[:, 0].sum(1, keepdims=True) + np.arange(2), mask
    shared = logits_at(params, cfg, *at, (prompt,))[0]
    index = np.arange(6)
    own = decoder.take_rows(prompt, index, 6)
    np.testing.assert_array_equal(own.k[0], np.repeat(prompt.k[0], 3, axis=0))
    np.testing.assert_allclose(logits_at(params, cfg, *at, (own,))[0], shared, atol=2e-5)
    some = decoder.take_rows(own, index[[4, 1]], 6)
    np.testing.assert_array_equal(some.v[1], np.asarray(prompt.v[1])[[1, 0]])


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_in_a_loop_equal_straight_code(remat):
    """The gradient, that through a prompt's keys and values too, and tokens that are cached."""
    tokens, real = random_tokens(2, 7), padded(7, [0, 3])
    first, rest = attention.causal(real[:, :4]), attention.causal(real).mask()[:, 4:]
    at = decoder.positions_of(real)

    def outcome(params, cfg):
        def loss(params):
            _, prompt = decoder.forward(params, cfg, tokens[:, :4], at[:, :4], first)
            inputs = params, cfg, tokens[:, 4:], at[:, 4:], rest, (prompt,)
            hidden, _ = decoder.forward(*inputs)
            open = decoder.empty_segment(cfg, 2, 5, "float32")
            mask = np.concatenate([rest, np.zeros((2, 3, 2), bool)], axis=2)
            cached, open = decoder.forward(*inputs[:4], mask, (prompt,), open)
            return jnp.sum(hidden**2), (hidden, cached, jax.tree.map(jnp.stack, open.k))

        return jax.value_and_grad(loss, has_aux=True)(params)

    def of(platform):
        cfg = dataclasses.replace(QWEN2, num_layers=3, remat=remat, platform=platform)
        (_, (hidden, cached, keys)), grads = jit(functools.partial(outcome, cfg=cfg))(
            random_params(dataclasses.replace(cfg, platform=None, remat=False))
        )
        np.testing.assert_allclose(cached, hidden, atol=2e-5)
        return np.stack(keys), hidden, grads

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), of("gpu"), of("cpu")
    )


@pytest.mark.parametrize(
    "platform, t, kernels",
    [("tpu", attention.LONG, 0), ("tpu", attention.LONG + 1, 1), ("gpu", 600, 0)],
)
def test_long_rows_on_a_tpu_take_the_kernel(platform, t, kernels):
    """One in the program, whatever the number of blocks."""
    cfg = dataclasses.replace(QWEN2, num_layers=3, platform=platform)
    real = jnp.ones((1, t), bool)
    program = jax.make_jaxpr(lambda params: decoder.prefill(params, cfg, real * 1, real))
    assert str(program(random_params(cfg))).count("pallas_call[") == kernels


def test_padding_never_matters():
    cfg, S = LLAMA, 9
    params = random_params(cfg)
    tokens, real = random_tokens(3, S), padded(S, [0, 2, 5])
    want = uncached(params, cfg, tokens, real)
    other = np.where(real, tokens, random_tokens(3, S, seed=2))
    assert (other != tokens).any()
    np.testing.assert_array_equal(
        uncached(params, cfg, other, real)[real], want[real]
    )  # its content
    alone = uncached(params, cfg, tokens[1:2, 2:], real[1:2, 2:])
    np.testing.assert_allclose(alone[0], want[1, 2:], atol=2e-5)  # its amount, and the other rows


def test_a_token_sees_only_what_came_before():
    cfg, S = LLAMA, 9
    params, real = random_params(cfg), padded(S, [0, 0, 0])
    tokens = random_tokens(3, S)
    changed = tokens.copy()
    changed[:, 5] = tokens[:, 5] % 20 + 1
    before, after = uncached(params, cfg, tokens, real), uncached(params, cfg, changed, real)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(-1) > 1e-3).all()


def test_positions_are_relative():
    cfg, S = LLAMA, 9
    params, tokens = random_params(cfg), random_tokens(3, S)
    mask, positions = attention.causal(np.ones((3, S), bool)), np.tile(np.arange(S), (3, 1))
    want = logits_at(params, cfg, tokens, positions, mask)[0]
    shifted = logits_at(params, cfg, tokens, positions + 37, mask)[0]
    np.testing.assert_allclose(shifted, want, atol=1e-4)
    stretched = logits_at(params, cfg, tokens, positions * 2, mask)[0]
    assert np.abs(stretched - want).max() > 0.1


def test_positions_and_masks_by_hand():
    real = jnp.array([[False, True, True, False, True]])
    assert decoder.positions_of(real).tolist() == [[0, 0, 1, 1, 2]]
    mask = attention.causal(real).mask()[0].astype(int).tolist()
    assert mask == [
        [1, 0, 0, 0, 0],  # padding sees itself, so that no softmax is empty
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 1, 1, 0, 1],
    ]


def test_llama3_frequencies_by_hand():
    cfg = dataclasses.replace(
        LLAMA, head_dim=8, rope_theta=10_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 1024)
    )
    # Unscaled 1, .1, .01, .001: wavelengths 6.28, 62.8, 628, 6283. Below 1024 / 4 = 256: kept.
    # Above 1024 / 1: over 8. Between, at 628.3185: smooth = (1024 / 628.3185 - 1) / (4 - 1) =
    # .2099153; .01 * (smooth + (1 - smooth) / 8)
    np.testing.assert_allclose(
        decoder.rope_frequencies(cfg), [1.0, 0.1, 0.003086759, 0.000125], rtol=1e-6
    )
    plain = dataclasses.replace(cfg, rope_scaling=None)
    np.testing.assert_allclose(decoder.rope_frequencies(plain), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_bfloat16_is_close():
    real = padded(9, [0, 2, 5])
    tokens = random_tokens(3, 9)
    want = uncached(random_params(LLAMA), LLAMA, tokens, real)[real]
    half = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(LLAMA))
    got = uncached(params, half, tokens, real)[real]
    assert got.dtype == np.float32
    difference = got - want
    assert 0 < difference.std() < 0.03 * want.std() and np.abs(difference).max() < 0.15 * want.std()


def test_a_turned_head_changes_neither_logits_nor_gradients():
    """It is made on a CPU that computes in bf16 with tied embeddings, and only there."""
    half = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = random_params(LLAMA)
    looped, untied = (
        dataclasses.replace(half, **x) for x in ({"platform": "gpu"}, {"tied": False})
    )
    for cfg in (LLAMA, looped, untied):
        assert decoder.TURNED not in decoder.with_ends(params, cfg)
    hidden = np.random.default_rng(3).standard_normal((2, 3, LLAMA.hidden_size))
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def outcome(params, hidden):
        params = decoder.with_ends(params, half)
        out = decoder.logits(params, half, hidden)
        return jnp.sin(out / 4).sum(), (out, decoder.TURNED in params)

    def plain(params, hidden):
        return jnp.sin(decoder.logits(params, half, hidden) / 4).sum()

    run = jax.value_and_grad(outcome, argnums=(0, 1), has_aux=True)
    (_, (out, turned)), got = run(params, hidden)
    assert turned and out.dtype == jnp.float32
    np.testing.assert_allclose(out, decoder.logits(params, half, hidden), atol=1e-5)
    for own, other in zip(
        jax.tree.leaves(got), jax.tree.leaves(jax.grad(plain, (0, 1))(params, hidden)), strict=True
    ):
        own, other = np.asarray(own, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(own, other, atol=2e-2 * max(np.abs(other).max(), 1e-3))


# -------------------------------------------------------------------------------- log-probabilities


def batch():
    """Two prompts of 4 columns with three responses of 5 each, ragged on the left and the right."""
    prompt_mask = padded(4, [0, 3])
    mask = np.arange(5) < np.array([[5, 1, 3], [2, 5, 4]])[..., None]
    return (
        random_tokens(2, 4),
        prompt_mask,
        np.where(mask, random_tokens(2, 3, 5, seed=3), PAD),
        mask,
    )


def direct_logprobs(params, cfg, prompts, prompt_mask, tokens, mask, temperature):
    """Log-softmax of the logits before each token: one response at a time, no padding, no cache.

    NaN off the mask.
    """
    want = np.full(tokens.shape, np.nan, np.float32)
    for p, g in np.ndindex(tokens.shape[:2]):
        n = mask[p, g].sum()
        row = np.concatenate([prompts[p, prompt_mask[p]], tokens[p, g, :n]])
        # The row in a frame of one shape for all: padding on the right is invisible to what stands
        # before it.
        frame = np.full((1, 9), PAD, np.int32)
        frame[0, : len(row)] = row
        logits = uncached(params, cfg, frame, np.ones((1, 9), bool))[0] / temperature
        logp = np.asarray(jax.nn.log_softmax(logits))
        start = len(row) - n - 1
        want[p, g, :n] = logp[np.arange(start, start + n), row[start + 1 :]]
    return want


response_logprobs = jit(logprobs.response_logprobs, static_argnums=(1, 6))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_group_equals_its_rows_equal_direct_logprobs(temperature):
    cfg, params = QWEN2, random_params(QWEN2)
    prompts, prompt_mask, tokens, mask = batch()
    want = direct_logprobs(params, cfg, prompts, prompt_mask, tokens, mask, temperature)[mask]
    assert want.min() < -3
    grouped = response_logprobs(
        params, cfg, prompts, prompt_mask, tokens.reshape(6, 5), temperature, 2
    )
    np.testing.assert_allclose(grouped.reshape(mask.shape)[mask], want, atol=2e-5)
    rows = [np.repeat(x, 3, axis=0) for x in (prompts, prompt_mask)]
    by_row = response_logprobs(params, cfg, *rows, tokens.reshape(6, 5), temperature, 64)
    np.testing.assert_allclose(by_row.reshape(mask.shape)[mask], want, atol=2e-5)


def test_responses_of_one_token():
    cfg, params = QWEN2, random_params(QWEN2)
    prompts, prompt_mask, tokens, mask = batch()
    tokens, mask = tokens[:, :, :1], mask[:, :, :1]
    got = response_logprobs(
        params, cfg, prompts, prompt_mask, tokens.reshape(6, 1), 1.0, 64
    ).reshape(2, 3, 1)
    np.testing.assert_allclose(
        got, direct_logprobs(params, cfg, prompts, prompt_mask, tokens, mask, 1.0), atol=2e-5
    )


def test_chunk_size_changes_neither_value_nor_gradient():
    cfg = LLAMA  # tied: the head is the embedding
    params = {"embed_tokens": random_params(cfg)["embed_tokens"]}
    hidden = np.random.default_rng(4).standard_normal((2, 5, cfg.hidden_size)).astype(np.float32)
    targets, weight = random_tokens(2, 5), np.random.default_rng(5).standard_normal((2, 5))

    @functools.partial(jit, static_argnums=2)
    def value_and_gradient(params, hidden, chunk):
        loss = lambda p, h: (logprobs.token_logprobs(p, cfg, h, targets, 1.3, chunk) * weight).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)

    whole = value_and_gradient(params, hidden, 5)
    for chunk in (1, 2, 100):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            value_and_gradient(params, hidden, chunk),
            whole,
        )


@pytest.mark.parametrize("T, chunk", [(7, 2), (3, 2)])
def test_a_chunk_bars_its_own_tokens(T, chunk):
    cfg = LLAMA
    params = {"embed_tokens": random_params(cfg)["embed_tokens"]}
    hidden = np.random.default_rng(4).standard_normal((2, T, cfg.hidden_size)).astype(np.float32)
    targets = random_tokens(2, T)
    barred = np.where(np.arange(2 * T).reshape(2, T) % 3 == 0, (targets + 1) % cfg.vocab_size, -1)
    got, odds, margin = logprobs.barred_scores(
        params, cfg, hidden, targets, jnp.asarray(barred), 1.3, chunk
    )
    scaled = np.array(decoder.logits(params, cfg, hidden)) / 1.3
    rows, columns = np.nonzero(barred >= 0)
    p = jax.nn.softmax(scaled)[rows, columns, barred[rows, columns]]
    np.testing.assert_allclose(odds[rows, columns], np.log(p / (1 - p)), atol=2e-5)
    assert (np.asarray(odds)[barred < 0] == -np.inf).all()
    own = scaled[rows, columns, barred[rows, columns]]
    scaled[rows, columns, barred[rows, columns]] = -np.inf
    ahead = (own - scaled.max(-1)[rows, columns]) * 1.3
    np.testing.assert_allclose(margin[rows, columns], ahead, atol=2e-5)
    assert (np.asarray(margin)[barred < 0] == -np.inf).all()
    want = jax.nn.log_softmax(scaled)
    want = np.take_along_axis(np.asarray(want), np.asarray(targets)[..., None], 2)[..., 0]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_program_does_not_grow_with_the_number_of_chunks():
    cfg = LLAMA
    params = {"embed_tokens": random_params(cfg)["embed_tokens"]}

    def lines(T):
        loss = lambda p, h, t: logprobs.token_logprobs(p, cfg, h, t, 1.0, 4).sum()  # noqa: E731
        hidden = jax.ShapeDtypeStruct((2, T, cfg.hidden_size), jnp.float32)
        targets = jax.ShapeDtypeStruct((2, T), jnp.int32)
        return jit(jax.grad(loss)).lower(params, hidden, targets).as_text().count("\n")

    assert lines(8) == lines(64)


# ---------------------------------------------------------------------------------------- gradients


def test_remat_changes_no_gradient_and_padding_has_none():
    prompts, prompt_mask, tokens, mask = batch()
    tokens, mask = tokens[:, 0], mask[:, 0]

    def gradient(cfg):
        def loss(params):
            logp = logprobs.response_logprobs(
                params, cfg, prompts * prompt_mask, prompt_mask, tokens, 1.0, 64
            )
            return jnp.where(mask, logp, 0.0).sum()

        return jit(jax.grad(loss))(random_params(QWEN2))

    plain, remat = gradient(QWEN2), gradient(dataclasses.replace(QWEN2, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)
    sizes = jax.tree.map(lambda g: float(np.abs(g).max()), plain)
    assert all(0 < s < np.inf for s in jax.tree.leaves(sizes))
    embedding = np.asarray(plain["embed_tokens"]["embedding"])
    assert (embedding[PAD] == 0).all() and np.abs(embedding[1:]).max() > 0


@pytest.mark.parametrize("features", [3, 16], ids=["narrow", "wide"])
def test_gradient_of_dense_is_that_of_a_matrix_product(features):
    """Both ways of the backward pass: a kernel with fewer and with more columns than rows."""
    layer = layers.Dense(LLAMA, features, bias=True)
    draw = np.random.default_rng(6)
    x, kernel, bias = (
        draw.standard_normal(s).astype(np.float32) for s in ((2, 5, 8), (8, features), (features,))
    )
    ours = lambda x, kernel, bias: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)  # noqa: E731
    plain = lambda x, kernel, bias: jnp.einsum("bti,io->bto", x, kernel) + bias  # noqa: E731
    np.testing.assert_allclose(ours(x, kernel, bias), plain(x, kernel, bias), atol=1e-5)
    gradient = lambda f: jax.grad(lambda *a: jnp.sin(f(*a)).sum(), argnums=(0, 1, 2))  # noqa: E731
    got, want = gradient(ours)(x, kernel, bias), gradient(plain)(x, kernel, bias)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
