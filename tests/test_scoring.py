"""Decisions that are scored: hand numbers, the minimum, the price, and a step's gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_gapg import CFG, NEW, G, Q, one_step, rollout, start

from collab_jax.models import decoder, logprobs, lora
from collab_jax.rl import algorithms, scoring
from collab_jax.rl.signal import learning_signal

T, F = True, False
CALL = 3  # the decision token of these tests
SCORED = jax.jit(scoring.scored)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def loss(margins, barred, call, answer):
    margins, call, answer = (jnp.array(x, jnp.float32) for x in (margins, call, answer))
    return scoring.loss(margins, jnp.array(barred), call, answer)


def test_the_loss_by_hand():
    # Two decision states and a token between them where no call can be: the first one decides.
    margins, states = [[0.4, 9.0, -1.5]], [[T, F, T]]
    got = loss(margins, states, [0.7], [0.0])
    assert float(got) == pytest.approx(-0.7 * np.log(sigmoid(0.4)), rel=1e-5)
    got = loss(margins, states, [0.0], [0.3])
    assert float(got) == pytest.approx(-0.3 * np.log(sigmoid(-0.4)), rel=1e-5)
    assert float(loss([[0.4, 1.0]], [[F, F]], [0.0], [1.0])) == 0


@pytest.mark.parametrize("margin", [-300.0, -40.0, 0.0, 40.0, 300.0])
def test_the_gradient_is_finite_at_any_margin_and_sees_the_highest_decision_state(margin):
    gradient = jax.grad(loss)(
        jnp.array([[margin, -jnp.inf, margin - 1, 1.0]] * 3),
        [[T, F, T, F]] * 3,
        [1.0, 0, 0],
        [0, 1.0, 0],
    )
    assert np.isfinite(gradient).all() and not gradient[:, 1:].any() and not gradient[2].any()
    assert gradient[0, 0] <= 0 and gradient[1, 0] >= 0
    if margin <= -40:  # a call that has died out is taught as strongly as any
        assert float(gradient[0].sum()) == pytest.approx(-1)


def test_the_least_loss_is_at_the_odds_of_a_wrong_answer_less_those_of_the_price():
    """Three kinds of attempts that go wrong with probabilities 0.1, 0.5 and 0.9; price 0.3."""
    wrong, at = np.array([0.1, 0.5, 0.9]), 0.3

    def expected(margin):
        column = margin[:, None]
        call, answer = jnp.array((1 - at) * wrong), jnp.array(at * (1 - wrong))
        return scoring.loss(column, jnp.ones((3, 1), bool), call, answer)

    margin, gradient = jnp.zeros(3), jax.jit(jax.grad(expected))
    for _ in range(400):
        margin -= 4.0 * gradient(margin)
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    np.testing.assert_allclose(margin, logit(wrong) - logit(at), atol=1e-3)
    assert ((np.asarray(margin) > 0) == (wrong > at)).all()


def batch(seed=0, rows=40):
    draw = np.random.default_rng(seed)
    return {
        "margin": jnp.array(draw.normal(-0.5, 2, (rows, 4)), jnp.float32),
        "correct": jnp.array(draw.random((rows, 4)) < 0.5),
        "cloud_correct": jnp.array(draw.random(rows) < 0.9),
        "keep": jnp.array(draw.random(rows) < 0.9),
    }


def push(margin, scored):
    """By how much the loss moves all margins together, summed over responses of one state each."""
    total = lambda shift: scoring.loss(  # noqa: E731
        margin.reshape(-1, 1) + shift,
        jnp.ones((margin.size, 1), bool),
        scored.call.ravel(),
        scored.answer.ravel(),
    )
    return -jax.jit(jax.grad(total))(0.0)


@pytest.mark.parametrize("budget", [0.3, 0.45])
def test_at_the_price_a_batch_moves_calls_by_their_distance_to_the_budget(budget):
    parts = batch()
    scored, price = SCORED(**parts, budget=jnp.float32(budget), level=None)
    assert 0 < price[0] < 1 and (price == price[0]).all()
    distance = budget - float((parts["margin"] > 0).mean())
    assert float(push(parts["margin"], scored)) == pytest.approx(40 * 4 * distance, rel=1e-4)


def test_the_price_stays_within_0_and_1():
    parts = batch() | {"margin": jnp.full((40, 4), 9.0)}
    assert (SCORED(**parts, budget=jnp.float32(0.0), level=None)[1] == 1).all()
    parts["margin"] = jnp.full((40, 4), -9.0)
    assert (SCORED(**parts, budget=jnp.float32(0.999), level=None)[1] == 0).all()
    nothing = parts | {"keep": jnp.zeros(40, bool)}
    scored, price = SCORED(**nothing, budget=jnp.float32(0.3), level=None)
    assert not scored.call.any() and not scored.answer.any() and np.isfinite(price).all()


def test_each_budget_that_prompts_show_has_its_own_price():
    parts, budgets = batch(), jnp.array([0.1, 0.5])
    level = jnp.arange(40) % 2
    both, prices = SCORED(**parts, budget=budgets, level=level)
    for shown in (0, 1):
        rows = np.flatnonzero(level == shown)
        alone, price = SCORED(
            **{name: x[rows] for name, x in parts.items()}, budget=budgets[shown], level=None
        )
        np.testing.assert_allclose(prices[rows], price, rtol=1e-5)
        np.testing.assert_allclose(both.call[rows], alone.call, rtol=1e-5)
        np.testing.assert_allclose(both.answer[rows], alone.answer, rtol=1e-5)


def test_a_wrong_answer_teaches_the_call_only_where_the_cloud_is_right():
    scored, price = SCORED(
        margin=jnp.array([[-1.0, -0.1]] * 3),
        correct=jnp.array([[T, F]] * 3),
        cloud_correct=jnp.array([T, F, T]),
        keep=jnp.array([T, T, F]),
        budget=jnp.float32(0.01),
        level=None,
    )
    assert (scored.call > 0).tolist() == [[F, T], [F, F], [F, F]]
    assert (scored.answer > 0).tolist() == [[T, F], [T, F], [F, F]]
    assert float(scored.call[0, 1]) == pytest.approx(1 - float(price[0]))


# --------------------------------------------------------------------------------------------- step


def scored_rollout():
    plain = rollout()
    barred = np.where(np.arange(NEW) < 2, CALL, -1) * np.ones((Q, G, 1), np.int32)
    barred = np.where(plain.mask, barred, -1).astype(np.int32)
    tokens = np.where(plain.tokens == CALL, CALL + 1, plain.tokens)
    margin = np.random.default_rng(7).normal(0, 1, (Q, G)).astype(np.float32)
    return plain.replace(tokens=tokens, barred=barred, margin=margin, called=np.zeros((Q, G), bool))


def reference_loss(params, batch, signal, cfg=CFG):
    """The loss of all kept prompts, every row with a prompt of its own."""
    prompts, mask = (jnp.repeat(x, G, 0) for x in (batch.prompts, batch.prompt_mask))
    rows, barred = batch.tokens.reshape(-1, NEW), batch.barred.reshape(-1, NEW)
    last, segment = decoder.prefill(params, cfg, prompts, mask)
    hidden = logprobs.continued_hidden(params, cfg, last, segment, mask, rows)
    logp, _, margins = logprobs.barred_scores(params, cfg, hidden, rows, barred, 1.0, NEW)
    taught = jnp.repeat(signal.keep, G)
    advantages = signal.A.ravel() * taught
    total = -jnp.sum(advantages * jnp.sum(logp * batch.mask.reshape(-1, NEW), axis=1))
    weights = (x.ravel() * taught for x in signal.scored)
    return (total + scoring.loss(margins, barred >= 0, *weights)) / G / signal.keep.sum()


@pytest.mark.slow
def test_a_step_is_the_gradient_of_both_losses():
    batch, old = scored_rollout(), start()
    algorithm = algorithms.gapg.GAPG._replace(prompt_filter=algorithms.no_filter)
    shown = jax.tree.map(jnp.asarray, batch)
    signal = jax.jit(learning_signal, static_argnums=0)(algorithm, old, shown, jax.random.key(5))
    assert (signal.scored.call > 0).any() and (signal.scored.answer > 0).any()
    _, metrics = one_step(batch, algorithm=algorithm, devices=1)
    gradient = jax.jit(jax.grad(reference_loss))(old.params, shown, signal)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert metrics["call_rate"] == pytest.approx(float((batch.margin > 0).mean()))


def alone(batch, params, cfg):
    """The batch as the sampler hands it over, where the decision alone is learnt."""
    prompts, mask = (jnp.repeat(x, G, 0) for x in (batch.prompts, batch.prompt_mask))
    rows, barred = batch.tokens.reshape(-1, NEW), batch.barred.reshape(-1, NEW)
    last, segment = decoder.prefill(params, cfg, prompts, mask)
    hidden = logprobs.continued_hidden(params, cfg, last, segment, mask, rows)
    margins = logprobs.barred_scores(params, cfg, hidden, rows, barred, 1.0, NEW).margin
    highest = hidden[jnp.arange(Q * G), margins.argmax(-1)].reshape(Q, G, -1)
    found = batch.replace(margin=margins.max(-1).reshape(Q, G), hidden=highest)
    return jax.device_get(found)


def place(tree, cfg):
    """What a tree like the model's has for the call's row of the head."""
    module = tree["embed_tokens" if cfg.tied else "lm_head"]
    if "lora_row" in module:
        return module["lora_row"]
    return module["embedding"][CALL] if cfg.tied else module["kernel"][:, CALL]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
def test_alone_a_decision_moves_the_call_s_row_as_its_loss_would_and_nothing_else(
    tied, rank, devices
):
    cfg = dataclasses.replace(CFG, tied=tied)
    params = trained = decoder.init(cfg, jax.random.key(1))
    frozen = None
    if rank:
        settings = ConfigDict({"rank": rank, "alpha": 4.0, "targets": ("q_proj",)})
        cfg = lora.configure(cfg, settings, CALL)
        frozen, trained = params, lora.init(cfg, settings, jax.random.key(2), "float32")
        params = lora.join(frozen, trained)
    batch = alone(scored_rollout(), params, cfg)
    old = start(params=trained).replace(frozen=frozen)
    algorithm = algorithms.gapg.GAPG._replace(
        prompt_filter=algorithms.no_filter, advantage=algorithms.no_advantage
    )
    shown = jax.tree.map(jnp.asarray, batch)
    signal = jax.jit(learning_signal, static_argnums=0)(algorithm, old, shown, jax.random.key(5))

    def head_alone(row):
        """The loss by what is added to the call's row, hidden states as they are."""
        logit = shown.hidden @ row
        margins = (shown.margin + logit).reshape(-1, 1)
        weights = (x.ravel() * jnp.repeat(signal.keep, G) for x in signal.scored)
        every = jnp.ones_like(margins, bool)
        return scoring.loss(margins, every, *weights) / G / signal.keep.sum()

    expected = jax.grad(head_alone)(jnp.zeros(cfg.hidden_size))
    new, metrics = one_step(batch, devices=devices, state=old, algorithm=algorithm, cfg=cfg)
    moved = jax.tree.map(lambda a, b: np.array(a - b), old.params, new.params)
    row = place(moved, cfg)
    np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-6)
    assert metrics["drift_max"] == 0 and np.abs(row).max() > 1e-3
    row[:] = 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(moved))
    if not tied and not rank:  # what a gradient of the whole model has there
        whole = jax.jit(jax.grad(functools.partial(reference_loss, cfg=cfg)))(params, shown, signal)
        np.testing.assert_allclose(place(whole, cfg), expected, rtol=1e-3, atol=1e-6)


def test_groups_of_equal_rewards_still_teach_when_to_call():
    batch = scored_rollout()
    batch = batch.replace(correct=np.ones((Q, G), bool), formatted=np.ones((Q, G), bool))
    signal = learning_signal(
        algorithms.gapg.GAPG, start(), jax.tree.map(jnp.asarray, batch), jax.random.key(5)
    )
    assert not signal.A.any() and signal.learnable.all()
