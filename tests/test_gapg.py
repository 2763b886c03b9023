"""The method by hand numbers, symmetries and enumeration."""

import itertools
from fractions import Fraction
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from collab_jax import gapg
from collab_jax.models import decoder, logprobs
from collab_jax.models.decoder import DecoderConfig
from collab_jax.rl import algorithms, gradient, optim, step

T, F = True, False
KEY = jax.random.key(0)
NO_REWARD, NO_MASK = jnp.nan, None  # where the paper's own parts do not look

# ------------------------------------------------------------------------------------------- reward


def test_reward_table_by_hand():
    state = gapg.init_reward(2.0, 0.5, 0.2)
    correct = jnp.array([[T, T, F], [F, F, F], [F, F, F]])
    called = jnp.array([[F, F, T], [T, F, F], [T, T, F]])
    formatted = jnp.array([[T, F, F], [F, T, F], [F, F, T]])
    r, state = gapg.reward(state, correct, called, formatted, cloud_correct=jnp.array([T, T, F]))
    np.testing.assert_allclose(r, [[2.2, 2.0, 0.5], [0.5, 0.2, 0.0], [0.0, 0.0, 0.2]], rtol=1e-6)
    assert dict(zip(gapg.OUTCOMES, state.counts.tolist(), strict=True)) == {
        "correct_formatted": 1, "correct": 1, "called_right": 2, "wrong_formatted": 2, "nothing": 3
    }  # fmt: skip
    _, state = gapg.reward(state, correct, called, formatted, jnp.array([T, T, F]))
    assert state.counts.sum() == 18


# ------------------------------------------------------------------------------------------- filter


def filter_batch(state, d1, d2, lost=0, unknown=0, seed=0):
    """Filters a batch: d1 solved, d2 cloud-only, `lost` unsolvable, `unknown` prompts, in order."""
    correct = np.zeros((d1 + d2 + lost + unknown, 2), bool)
    correct[:d1, 1] = True
    cloud = np.array([F] * d1 + [T] * d2 + [F] * (lost + unknown))
    known = np.array([T] * (d1 + d2 + lost) + [F] * unknown)
    return gapg.prompt_filter(
        state,
        NO_REWARD,
        jnp.array(correct),
        jnp.array(cloud),
        jnp.array(known),
        jax.random.key(seed),
    )


def test_budget_is_a_share_and_rho_a_ratio():
    assert gapg.rho_of(0.3) == Fraction(3, 7)
    assert gapg.rho_of(0.0) == 0
    assert gapg.rho_of(1 / 3) == Fraction(1, 2)
    assert gapg.rho_of(0.999) == 999


def test_filter_counts_and_carry_by_hand():
    state = gapg.init_filter(0.3)  # rho = 3 / 7
    keep, state = filter_batch(state, d1=4, d2=5, lost=2)  # 12/7: one, 5/7 carried
    assert keep[:4].all() and keep[4:9].sum() == 1 and not keep[9:].any() and state.carry == 5
    keep, state = filter_batch(state, d1=3, d2=5)  # 9/7 + 5/7: two, nothing carried
    assert keep[3:].sum() == 2 and state.carry == 0
    keep, state = filter_batch(
        state, d1=8, d2=1
    )  # 24/7: three, but one D2 prompt: the quota is lost, 3/7 carried
    assert keep.all() and state.carry == 3
    keep, state = filter_batch(
        state, d1=0, d2=4
    )  # nothing solved: nothing kept, the fraction stays
    assert not keep.any() and state.carry == 3 and state.empty_d1_streak == 1
    keep, state = filter_batch(state, d1=2, d2=4, seed=1)  # 6/7 + 3/7: one, 2/7 carried
    assert keep[2:].sum() == 1 and state.carry == 2 and state.empty_d1_streak == 0
    assert (state.prompts, state.d1, state.d2, state.kept, state.kept_d2) == (38, 17, 19, 22, 5)


def test_unknown_verdicts_and_cloud_errors_are_in_neither_class():
    state = gapg.init_filter(0.9)
    keep, state = filter_batch(state, d1=2, d2=0, lost=3, unknown=3)
    assert keep.tolist() == [T, T] + [F] * 6
    solved_but_unknown = gapg.prompt_filter(
        state, NO_REWARD, jnp.ones((1, 2), bool), jnp.array([F]), jnp.array([F]), jax.random.key(0)
    )
    assert not solved_but_unknown[0].any()


def test_solved_prompts_without_a_verdict_neither_count_as_an_empty_d1_step_nor_end_the_streak():
    def streak_after(state, correct, known):
        cloud = jnp.zeros(len(known), bool)
        filters = gapg.prompt_filter, *algorithms.PARTS["filter"].values()
        states = [
            f(state, jnp.zeros((2, 2)), jnp.array(correct), cloud, jnp.array(known), KEY)[1]
            for f in filters
        ]
        assert len({int(s.empty_d1_streak) for s in states}) == 1
        return states[0]

    unsolved, solved = [[F, F], [F, F]], [[F, F], [T, F]]
    state = streak_after(gapg.init_filter(0.3), unsolved, [T, T])
    assert state.empty_d1_streak == 1
    state = streak_after(state, solved, [F, F])  # an outage: it would be in D1 had it a verdict
    assert state.empty_d1_streak == 1 and state.d1 == 0
    state = streak_after(state, unsolved, [T, F])  # nothing solved, whatever the cloud would say
    assert state.empty_d1_streak == 2
    assert streak_after(state, solved, [F, T]).empty_d1_streak == 0


def test_budget_zero_keeps_no_d2():
    keep, _ = filter_batch(gapg.init_filter(0.0), d1=6, d2=6)
    assert keep.sum() == 6


@pytest.mark.parametrize("budget", [0.1, 0.3, 1 / 3, 0.7])
def test_bound_holds_over_any_run(budget):
    rng, state, rho = np.random.default_rng(0), gapg.init_filter(budget), gapg.rho_of(budget)
    run = jax.jit(
        lambda s, c, k: gapg.prompt_filter(s, NO_REWARD, c, ~c.any(1), jnp.ones(16, bool), k)[1]
    )
    for i in range(100):
        correct = rng.random((16, 2)) < rng.random()
        state = run(state, jnp.array(correct), jax.random.key(i))
        assert int(state.kept_d2) <= rho * int(state.d1)
    assert int(state.kept_d2) > 0


def test_every_d2_prompt_is_equally_likely():
    correct = jnp.array([[T]] * 7 + [[F]] * 6)
    args = (
        gapg.init_filter(0.3),
        NO_REWARD,
        correct,
        ~correct[:, 0],
        jnp.ones(13, bool),
    )  # quota 3 of 6
    keep = jax.vmap(lambda key: gapg.prompt_filter(*args, key)[0])(
        jax.random.split(jax.random.key(0), 2000)
    )
    np.testing.assert_allclose(keep[:, 7:].mean(0), 0.5, atol=5 * (0.25 / 2000) ** 0.5)


def test_membership_is_by_correctness_not_by_reward():
    """A group that earned reward by calls and by form alone is D2, and dropped at budget 0."""
    correct, called = jnp.array([[F, F]]), jnp.array([[T, F]])
    r, _ = gapg.reward(gapg.init_reward(2.0, 0.5, 0.2), correct, called, ~called, jnp.array([T]))
    assert (r > 0).all()
    keep, _ = gapg.prompt_filter(
        gapg.init_filter(0.0), r, correct, jnp.array([T]), jnp.array([T]), jax.random.key(0)
    )
    assert not keep.any()


# --------------------------------------------------------------------------- advantage and gradient


def test_advantage_is_leave_one_out():
    r = jax.random.normal(jax.random.key(0), (5, 4))
    others = (r.sum(1, keepdims=True) - r) / 3
    np.testing.assert_allclose(gapg.advantage(r, NO_MASK), r - others, rtol=1e-5, atol=1e-6)


def test_advantage_by_hand():
    np.testing.assert_allclose(
        gapg.advantage(jnp.array([[2.2, 0.0], [0.5, 0.5]]), NO_MASK),
        [[2.2, -2.2], [0, 0]],
        rtol=1e-6,
    )


def group_gradient(theta, group, rewards, r_state=None):
    """Gradient of `loss` for one group of one-token responses, whose tokens index theta."""
    group = jnp.array(group)

    def objective(theta):
        logp = jax.nn.log_softmax(theta)[group][None, :, None]
        return gapg.loss(
            logp,
            jnp.ones((1, len(group), 1), bool),
            gapg.advantage(rewards[group][None], NO_MASK),
            len(group),
        )

    return jax.grad(objective)(theta)


def test_gradient_equals_the_papers_sum():
    theta, rewards, group = jnp.array([0.3, -0.2, 0.5]), jnp.array([2.2, 0.5, 0.0]), [0, 2, 1, 2]
    r = rewards[jnp.array(group)]
    direct = sum(
        jax.grad(lambda t, y=y: jax.nn.log_softmax(t)[y])(theta) * (r[i] - r.mean())
        for i, y in enumerate(group)
    ) / (len(group) - 1)
    np.testing.assert_allclose(group_gradient(theta, group, rewards), -direct, rtol=1e-5)


def test_gradient_is_unbiased_by_enumeration():
    theta, rewards, G = jnp.array([0.3, -0.2, 0.5]), jnp.array([2.2, 0.5, 0.1]), 3
    p = jax.nn.softmax(theta)
    expected = sum(
        jnp.prod(p[jnp.array(g)]) * group_gradient(theta, g, rewards)
        for g in itertools.product(range(3), repeat=G)
    )
    exact = jax.grad(lambda t: -jnp.dot(jax.nn.softmax(t), rewards))(theta)
    np.testing.assert_allclose(expected, exact, rtol=1e-4, atol=1e-6)


def test_filter_changes_the_expected_gradient_by_a_hand_value():
    """The filter takes 2/9 * (-1/4) = -1/18 away from the logit of `called`.

    Responses: right (r 2), called (r 1/2), wrong (r 0), 1/3 each; G = 2, budget 0. The filter drops
    the groups without a right response. Among these only {called, wrong} has a gradient: it is 2/9
    of all groups, each with -(1/2)(1/2 * 2/3 + 1/2 * 1/3) = -1/4 on that logit.
    """
    theta, rewards = jnp.zeros(3), jnp.array([2.0, 0.5, 0.0])

    def expected(filtered):
        total = jnp.zeros(3)
        for group in itertools.product(range(3), repeat=2):
            correct = jnp.array(group)[None] == 0
            keep, _ = gapg.prompt_filter(
                gapg.init_filter(0.0),
                NO_REWARD,
                correct,
                jnp.array([T]),
                jnp.array([T]),
                jax.random.key(0),
            )
            total += group_gradient(theta, group, rewards) / 9 * (keep[0] if filtered else 1)
        return total

    np.testing.assert_allclose(expected(False)[1] - expected(True)[1], -1 / 18, rtol=1e-5)
    np.testing.assert_allclose(
        expected(True)[0], expected(False)[0], rtol=1e-5
    )  # what is dropped has no `right` in it


def test_off_mask_log_probabilities_do_not_count():
    logp, mask = jnp.array([[[1.0, 5.0], [2.0, 7.0]]]), jnp.array([[[T, F], [T, T]]])
    assert gapg.loss(logp, mask, jnp.array([[1.0, -1.0]]), 2) == -(1.0 - 9.0) / 2


# --------------------------------------------------------------------------------------------- step

CFG = DecoderConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=4, rope_theta=100.0, norm_eps=1e-5, tied=True, initializer_range=0.5,
)  # fmt: skip
Q, G, L, NEW = 8, 3, 3, 4
SGD = optax.sgd(1.0)


def rollout(seed=0):
    """A batch with D1 and D2 prompts, groups without signal, and one the cloud gets wrong."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, NEW + 1, (Q, G, 1))
    correct = rng.random((Q, G)) < 0.4
    correct[:3], correct[3] = F, T
    called = ~correct & (rng.random((Q, G)) < 0.5)
    formatted = ~called & (rng.random((Q, G)) < 0.5)
    formatted[3] = T
    cloud = np.ones(Q, bool)
    cloud[2] = F
    return gapg.Rollout(
        prompts=rng.integers(0, 11, (Q, L)).astype(np.int32),
        prompt_mask=np.arange(L) >= rng.integers(0, L, (Q, 1)),
        tokens=rng.integers(0, 11, (Q, G, NEW)).astype(np.int32),
        logp=np.zeros((Q, G, NEW), np.float32),
        mask=np.arange(NEW) < length,
        correct=correct,
        called=called,
        formatted=formatted,
        cloud_correct=cloud,
        cloud_known=np.ones(Q, bool),
    )


def start(budget=0.3, params=None, optimizer=SGD):
    params = decoder.init(CFG, jax.random.key(1)) if params is None else params
    return jax.device_get(
        gapg.init_state(
            params, optimizer, gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(budget)
        )
    )


def batch_logprobs(params, batch):
    """f32[Q, G, T], every row with a prompt of its own."""
    prompts = np.repeat(batch.prompts, G, 0), np.repeat(batch.prompt_mask, G, 0)
    rows = batch.tokens.reshape(-1, NEW)
    return logprobs.response_logprobs(params, CFG, *prompts, rows, 1.0, NEW).reshape(Q, G, NEW)


def body(micro_rows=4, algorithm=gapg.GAPG, average=0.0, optimizer=SGD, axis="d", cfg=CFG, **more):
    settings = dict(micro_rows=micro_rows, temperature=1.0, chunk=2, average=average) | more
    return step.make_step(cfg, optimizer, algorithm, axis=axis, **settings)


def one_step(batch, devices=2, state=None, **settings):
    """(state, metrics) after one step on that many devices, on the host."""
    run = jax.pmap(
        body(**settings), axis_name="d", in_axes=(None, 0, None), devices=jax.devices()[:devices]
    )
    shards = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    out = run(start() if state is None else state, shards, jax.random.key(5))
    return jax.device_get(jax.tree.map(lambda x: x[0], out))


def assert_close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


@pytest.fixture(scope="module")
def stepped():
    return one_step(rollout())


@pytest.mark.slow
def test_step_is_the_gradient_of_the_kept_prompts(stepped):
    """SGD with rate 1 shows the gradient: that of the loss over the kept prompts, per prompt."""
    new, metrics = stepped
    old, batch = start(), rollout()
    keep, _ = gapg.prompt_filter(
        old.filter,
        NO_REWARD,
        batch.correct,
        batch.cloud_correct,
        batch.cloud_known,
        jax.random.key(5),
    )
    r, _ = gapg.reward(
        old.reward, batch.correct, batch.called, batch.formatted, batch.cloud_correct
    )

    def objective(params):
        logp = batch_logprobs(params, batch)
        return (
            gapg.loss(logp, batch.mask, gapg.advantage(r, NO_MASK) * keep[:, None], G) / keep.sum()
        )

    grads = jax.grad(objective)(old.params)
    assert_close(jax.tree.map(jnp.subtract, old.params, new.params), grads, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert (
        0 < metrics["kept"] < Q
        and metrics["kept"] + metrics["dropped"] == Q
        and metrics["no_signal"] >= 1
    )
    assert new.step == 1


@pytest.mark.slow
def test_one_device_equals_two(stepped):
    one, metrics = one_step(rollout(), devices=1)
    assert_close(one.params, stepped[0].params, rtol=1e-4, atol=1e-6)
    assert_close(one.filter, stepped[0].filter)
    assert_close(metrics, stepped[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_rows", [1, 5])
@pytest.mark.slow
def test_micro_batches_change_nothing(stepped, micro_rows):
    other, metrics = one_step(rollout(), micro_rows=micro_rows)
    assert_close(other.params, stepped[0].params, rtol=1e-4, atol=1e-6)
    assert_close(metrics, stepped[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_averaged_weights_by_hand():
    """With a decay of 1/2, step 1 weighs 1/3 of the average, step 2 2/3, and the start nothing."""
    averaged = start().replace(average=start().params)
    one, _ = one_step(rollout(), state=averaged, average=0.5)
    two, _ = one_step(rollout(), state=one, average=0.5)
    assert_close(one.final_model, one.params, rtol=1e-6, atol=1e-7)
    assert_close(
        two.final_model,
        jax.tree.map(lambda a, b: a / 3 + 2 * b / 3, one.params, two.params),
        rtol=1e-5,
        atol=1e-6,
    )
    plain, _ = one_step(rollout())
    assert_close(one.params, plain.params, rtol=0)  # what is learnt from does not change
    assert plain.average is None and plain.final_model is plain.params


def test_packed_rows_by_hand():
    """The longest first, each into the first row with room for it; one of length 0 into none."""
    rows, count = gradient.packed(jnp.array([3, 0, 5, 2, 1, 6]), 6)
    assert count == 3
    places = [
        [(int(b), int(start), int(n)) for b, start, n in zip(*row, strict=True) if n]
        for row in zip(*rows, strict=True)
    ]
    assert places == [[(5, 0, 6)], [(2, 0, 5), (4, 5, 1)], [(0, 0, 3), (3, 3, 2)], [], [], []]
    rows, count = gradient.packed(jnp.ones(6, jnp.int32), 100)  # no more than four in a row
    assert count == 2 and (rows.length > 0).sum(1).tolist() == [4, 2, 0, 0, 0, 0]


def test_columns_by_hand():
    rows = gradient.Rows(
        jnp.zeros((1, 4), int), jnp.array([[0, 3, 0, 0]]), jnp.array([[3, 2, 0, 0]])
    )
    at = gradient.columns(rows, 6)
    assert at.place[0].tolist() == [0, 0, 0, 1, 1, 0]
    assert at.token[0].tolist() == [0, 1, 2, 0, 1, 0]
    assert at.real[0].tolist() == [T, T, T, T, T, F]


@pytest.mark.parametrize("micro_rows, passes", [(1, 2), (2, 1)])
@pytest.mark.slow
def test_work_is_that_of_the_responses_that_have_a_gradient(micro_rows, passes):
    """Counted in micro-batches by what a spy on the decoder is given, at run time."""
    seen = []
    real = gradient.packed_hidden

    def spy(params, cfg, kv, prompt_mask, inputs, at):
        jax.debug.callback(lambda _: seen.append(inputs.shape), inputs[0, 0])
        return real(params, cfg, kv, prompt_mask, inputs, at)

    batch = rollout()
    length = np.full((Q, G), 1)
    length[4, 0], length[5, 1] = NEW, 2
    batch = batch.replace(mask=np.arange(NEW) < length[..., None])
    batch.correct[:], batch.called[:], batch.formatted[:] = F, F, T
    batch.correct[4, 0] = batch.correct[5] = T  # only prompt 4 has both kinds; all of 5 are right
    with mock.patch.object(gradient, "packed_hidden", spy):
        _, metrics = one_step(batch, devices=1, micro_rows=micro_rows)
    jax.effects_barrier()
    assert metrics["kept"] - metrics["no_signal"] == 1
    assert seen == [(micro_rows, NEW)] * passes  # the long one fills a row, the others one more


def test_dropped_prompts_and_pad_columns_change_nothing(stepped):
    batch, old = rollout(), start()
    keep, _ = gapg.prompt_filter(
        old.filter,
        NO_REWARD,
        batch.correct,
        batch.cloud_correct,
        batch.cloud_known,
        jax.random.key(5),
    )
    tokens = np.where(np.asarray(keep)[:, None, None] & batch.mask, batch.tokens, 7)
    assert (tokens != batch.tokens).any()
    other, _ = one_step(batch.replace(tokens=tokens))
    assert_close(other.params, stepped[0].params, rtol=1e-5, atol=1e-7)


def test_no_kept_prompt_is_no_update():
    nothing = rollout().replace(correct=np.zeros((Q, G), bool), cloud_correct=np.zeros(Q, bool))
    new, metrics = one_step(nothing)
    assert_close(new.params, start().params, rtol=0)
    assert new.empty_updates == 1 and metrics["empty_d1_streak"] == 1 and metrics["kept"] == 0


def test_non_finite_gradient_is_skipped_and_counted():
    old = start()
    old.params["norm"]["scale"] = np.full_like(old.params["norm"]["scale"], np.nan)
    new, metrics = one_step(rollout(), state=old)
    new, metrics = one_step(rollout(), state=new)
    assert not np.isfinite(metrics["grad_norm"])
    assert new.nonfinite_updates == 2 and new.nonfinite_streak == 2
    np.testing.assert_array_equal(
        new.params["embed_tokens"]["embedding"], start().params["embed_tokens"]["embedding"]
    )
    healed = new.replace(params=start().params)
    assert one_step(rollout(), state=healed)[0].nonfinite_streak == 0


@pytest.mark.slow
@pytest.mark.slow
def test_algorithms_with_parallel_gradients_make_the_same_update():
    """The size of a sum or a mean is no difference between algorithms."""
    optimizer = optim.make_optimizer(lambda _: 1e-2, 0.0, optim.unit_norm())
    unfiltered = gapg.GAPG._replace(prompt_filter=algorithms.no_filter)
    same = {"state": start(optimizer=optimizer), "optimizer": optimizer, "devices": 1}
    sums, of_sums = one_step(rollout(), algorithm=unfiltered, **same)
    dr_grpo = unfiltered._replace(advantage=algorithms.dr_grpo_advantage)
    means, of_means = one_step(rollout(), algorithm=dr_grpo, **same)
    scale = (G - 1) / (G * NEW)
    np.testing.assert_allclose(of_means["grad_norm"], of_sums["grad_norm"] * scale, rtol=1e-4)
    # Adam's first step is of 1e-2 in every weight, whatever the gradient.
    assert_close(means.params, sums.params, atol=1e-4)


def test_equal_rewards_are_no_signal_whatever_rounding_makes_of_their_mean():
    """GRPO's division once made an advantage of -0.015 of a rounded mean of eight times 0.2."""
    same = rollout().replace(
        correct=np.zeros((Q, G), bool),
        called=np.zeros((Q, G), bool),
        formatted=np.ones((Q, G), bool),
    )
    grpo = gapg.GAPG._replace(
        advantage=algorithms.grpo_advantage, prompt_filter=algorithms.no_filter
    )
    run = jax.pmap(
        body(algorithm=grpo), axis_name="d", in_axes=(None, 0, None), devices=jax.devices()[:1]
    )
    new, metrics = jax.device_get(
        run(start(), jax.tree.map(lambda x: x[None], same), jax.random.key(5))
    )
    assert metrics["no_signal"][0] == metrics["kept"][0] == Q and metrics["grad_norm"][0] == 0


@pytest.mark.slow
def test_drift_is_measured_against_the_sampled_log_probabilities(stepped):
    batch = rollout()
    exact = batch_logprobs(start().params, batch)
    _, metrics = one_step(batch.replace(logp=np.asarray(exact)))
    assert metrics["drift_max"] < 1e-5 and stepped[1]["drift"] > 0.1


def test_step_lowers_for_tpu_and_gpu():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    d, same = PartitionSpec("d"), PartitionSpec()
    step = jax.jit(
        jax.shard_map(
            body(), mesh=mesh, in_specs=(same, d, same), out_specs=(same, same), check_vma=False
        )
    )
    exported = jax.export.export(step, platforms=["tpu", "cuda"])(
        start(), rollout(), jax.random.key(0)
    )
    assert set(exported.platforms) == {"tpu", "cuda"}
