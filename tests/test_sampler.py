"""The sampler: what it draws and reports equals what the decoder says.

One pass with the marker disallowed holds the decision at every budget.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.models import attention, decision, decoder, logprobs, sampler
from collab_jax.models.blocks import empty, unstacked
from collab_jax.models.decision import NEVER, Marker, PlainMarker, opening
from collab_jax.models.decoder import DecoderConfig
from collab_jax.models.sampler import SamplerSettings
from collab_jax.rl import sampling

# Compiling is most of the time here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def wrap(body, donate=()):
    return jit(body, donate_argnums=donate)


PAD, EOS, OTHER_EOS, DECISION, ANSWER, _, A, B = range(8)
V, L, T, G = 20, 5, 12, 3
DISALLOWED = np.float32(-np.inf)
CFG = DecoderConfig(
    vocab_size=V, hidden_size=16, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, rope_theta=100.0, norm_eps=1e-5, tied=False,
)  # fmt: skip
OPENING = opening(["<answer>" if token == ANSWER else "." for token in range(V)])
GREEDY = dict(
    group=1, max_new=T, temperature=0.0, top_p=1.0, eos_ids=(EOS, OTHER_EOS), pad_id=PAD,
    marker=Marker(DECISION, OPENING), segments=2, slot_counts=2, cache_dtype="float32",
)  # fmt: skip
SAMPLED = {**GREEDY, "group": G, "temperature": 0.8}


def run(params, cfg, prompts, real, keys, beta=0.0, **settings):
    return sampler.sample(
        params, cfg, prompts, real, keys, beta, settings=SamplerSettings(**settings), wrap=wrap
    )


def random_params(cfg, seed):
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))

    def one(path, leaf):
        noise = draw.standard_normal(leaf.shape).astype(np.float32)
        return {
            "scale": 1 + 0.3 * noise,
            "embedding": noise,
            "kernel": 1.5 * noise / leaf.shape[0] ** 0.5,
        }[path[-1]]

    params = empty(shapes, "float32")
    for path, leaf in sorted(unstacked(params).items()):
        leaf[...] = one(path, leaf)
    return params


PARAMS = random_params(CFG, seed=0)


@functools.cache
def prompts(count=8):
    """(tokens, real) [count, L] with 0 to L - 1 columns of padding."""
    tokens = np.random.default_rng(1).integers(5, V, (count, L)).astype(np.int32)
    real = np.arange(L) >= (np.arange(count) % L)[:, None]
    return np.where(real, tokens, PAD), real


def keys(count=8, seed=0, step=0, start=0):
    return sampling.prompt_keys(seed, step, np.arange(start, start + count))


@functools.cache
def greedy(beta=float(DISALLOWED)):
    """Greedy responses of all prompts, on the host, without the axis of groups."""
    samples = run(PARAMS, CFG, *prompts(), keys(), np.float32(beta), **GREEDY)
    return jax.tree.map(lambda x: np.asarray(x)[:, 0], samples)


@functools.cache
def sampled(beta=0.0):
    return jax.tree.map(
        np.asarray, run(PARAMS, CFG, *prompts(), keys(), np.float32(beta), **SAMPLED)
    )


@functools.partial(jit, static_argnums=1)
def _forward(params, cfg, tokens, real):
    hidden, _ = decoder.forward(
        params, cfg, tokens, decoder.positions_of(real), attention.causal(real)
    )
    return decoder.logits(params, cfg, hidden)


def recomputed_logits(samples):
    """f32[P, G, T, V] before each token, without a cache."""
    P, group, _ = samples.tokens.shape
    tokens, real = (np.repeat(x, group, axis=0) for x in prompts(P))
    tokens = np.concatenate([tokens, samples.tokens.reshape(P * group, T)], axis=1)[:, :-1]
    real = np.concatenate([real, samples.mask.reshape(P * group, T)], axis=1)[:, :-1]
    return np.array(_forward(PARAMS, CFG, tokens, real))[:, L - 1 :].reshape(P, group, T, V)


def opened_before(samples):
    """bool[..., T], a single-token answer opened before this column."""
    seen = (samples.tokens == ANSWER) & samples.mask
    return np.cumsum(seen, axis=-1) - seen > 0


# A decoder with nothing but the last token: logits after token i are row i of a table.
CHAIN = DecoderConfig(
    vocab_size=16, hidden_size=16, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=2, rope_theta=100.0, norm_eps=0.0, tied=False,
)  # fmt: skip


def chain_params(table):
    """table f32[16, 16]: the norm of a one-hot row of width 16 is 4."""
    shapes = jax.eval_shape(lambda: decoder.init(CHAIN, jax.random.key(0)))
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    params["norm"]["scale"] += 1
    params["embed_tokens"]["embedding"] = np.eye(16, dtype=np.float32)
    params["lm_head"]["kernel"] = np.asarray(table, np.float32) / 4
    return params


SPELT = {A: "so <ans", B: "wer>", ANSWER: ".<answer>."}
CHAIN_SETTINGS = {
    **GREEDY,
    "eos_ids": (EOS, PAD),
    "marker": Marker(DECISION, opening([SPELT.get(token, ".") for token in range(16)])),
}


def chain_run(table, starts, beta=0.0, **changes):
    """Greedy responses to prompts of one token each, on the host, [P, T]."""
    tokens = np.array([*starts, *starts * 5][:5], np.int32)[:, None]  # one shape for all
    settings = CHAIN_SETTINGS | changes
    samples = run(chain_params(table), CHAIN, tokens, tokens >= 0, keys(5), beta, **settings)
    return jax.tree.map(lambda x: np.asarray(x)[: len(starts), 0], samples)


def walk(**steps):
    """The table of the walk given as _from=to, by a logit of 10.

    The decision token has 1 everywhere.
    """
    table = np.zeros((16, 16))
    table[:, DECISION] = 1.0
    for start, end in steps.items():
        table[int(start[1:]), end] = 10.0
    return table


# ------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("beta", [0.0, 1.5, float(DISALLOWED)])
@pytest.mark.slow
def test_sampled_logp_is_that_of_the_sampling_distribution(beta):
    samples = sampled(beta)
    scaled = recomputed_logits(samples)
    scaled[..., DECISION] += np.where(opened_before(samples), 0.0, beta)
    logp = np.asarray(jax.nn.log_softmax(scaled / SAMPLED["temperature"]))
    want = np.take_along_axis(logp, samples.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(samples.logp[samples.mask], want[samples.mask], atol=5e-5)


@pytest.mark.slow
def test_sampled_logp_is_the_teacher_forced_one():
    samples = sampled()
    forced = jit(logprobs.response_logprobs, static_argnums=(1, 5, 6))(
        PARAMS, CFG, *prompts(), samples.tokens.reshape(-1, T), SAMPLED["temperature"], 5
    )
    mask = samples.mask.reshape(-1, T)
    np.testing.assert_allclose(samples.logp.reshape(-1, T)[mask], forced[mask], atol=5e-5)


@pytest.mark.slow
def test_eos_is_inside_the_mask_and_nothing_after_it():
    samples = sampled()
    length = samples.mask.sum(-1)
    np.testing.assert_array_equal(samples.mask, np.arange(T) < length[..., None])  # no hole
    last = np.take_along_axis(samples.tokens, length[..., None] - 1, axis=-1)[..., 0]
    is_eos = np.isin(samples.tokens, GREEDY["eos_ids"]) & samples.mask
    np.testing.assert_array_equal(
        is_eos.sum(-1), samples.ended
    )  # one where it ended, none where it was cut off
    np.testing.assert_array_equal(np.isin(last, GREEDY["eos_ids"]), samples.ended)
    assert (length[~samples.ended] == T).all()
    assert (samples.tokens[~samples.mask] == PAD).all() and (samples.logp[~samples.mask] == 0).all()
    assert (samples.margins[~samples.mask] == -np.inf).all()
    assert (
        0 < samples.ended.mean() < 1 and len(set(last[samples.ended])) == 2
    )  # both ends, and cut-off rows, occur


@pytest.mark.slow
def test_greedy_alone_is_greedy_in_a_batch():
    whole = greedy(0.0)
    for i in range(4):
        tokens, real = (x[i : i + 1] for x in prompts())
        alone = run(
            PARAMS, CFG, tokens, real, keys(1, seed=9), np.float32(0.0), **GREEDY
        )  # greedy ignores the keys
        for name in ("tokens", "mask", "ended"):
            np.testing.assert_array_equal(getattr(alone, name)[0, 0], getattr(whole, name)[i])
        np.testing.assert_allclose(alone.logp[0, 0], whole.logp[i], atol=5e-5)
        np.testing.assert_allclose(alone.margins[0, 0], whole.margins[i], atol=5e-5)


def test_greedy_takes_the_best_token():
    samples = jax.tree.map(lambda x: x[:, None], greedy(0.0))
    best = recomputed_logits(samples).argmax(-1)
    np.testing.assert_array_equal(samples.tokens[samples.mask], best[samples.mask])


@pytest.mark.slow
def test_samples_depend_on_the_global_index_alone():
    whole = sampled()
    for start in (0, 4):
        tokens, real = (x[start : start + 4] for x in prompts())
        half = run(PARAMS, CFG, tokens, real, keys(4, start=start), np.float32(0.0), **SAMPLED)
        for name in ("tokens", "mask", "ended"):
            np.testing.assert_array_equal(
                getattr(half, name), getattr(whole, name)[start : start + 4]
            )
    wrong = run(PARAMS, CFG, tokens, real, keys(4, start=0), np.float32(0.0), **SAMPLED)
    assert (np.asarray(wrong.tokens) != whole.tokens[4:]).any((1, 2)).all()


def test_seed_step_index_and_group_member_each_change_the_samples():
    drawn = sampled().tokens

    def most_differ(a, b) -> bool:  # two short responses may well be the same
        return (a != b).reshape(len(a), -1).any(-1).mean() > 0.7

    assert most_differ(drawn[:, 0], drawn[:, 1]) and most_differ(drawn[:, 1], drawn[:, 2])
    for other in (keys(seed=1), keys(step=1)):
        tokens = np.asarray(run(PARAMS, CFG, *prompts(), other, np.float32(0.0), **SAMPLED).tokens)
        assert most_differ(tokens, drawn)
    everyone = [
        jax.random.key_data(keys(3, seed, step)).tolist() for seed in (0, 1) for step in (0, 1)
    ]
    assert len({tuple(key) for some in everyone for key in some}) == 12


def check_frequencies(drawn, logp, scaled, top_p) -> int:
    """Tokens [n] come as often as the softmax of scaled [V], cut at top_p, says; returns its size.

    Within 5 standard deviations.
    """
    p = np.asarray(jax.nn.softmax(scaled)).astype(np.float64)
    order = np.argsort(-p)
    inside = order[: 1 + np.searchsorted(np.cumsum(p[order]), top_p)]
    p = np.where(np.isin(np.arange(V), inside), p, 0.0)
    p /= p.sum()
    n = len(drawn)
    frequency = np.bincount(drawn, minlength=V) / n
    assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n) + 2 / n * (p > 0)).all()
    np.testing.assert_allclose(logp, np.log(p[drawn]), atol=5e-5)
    return len(inside)


def first_logits(beta):
    """f32[P, V] at temperature 1, for the first token, with the bias on the decision token."""
    logits = recomputed_logits(sampled())[:, 0, 0]
    logits[:, DECISION] += beta
    return logits


def test_first_token_frequencies_over_steps_and_rows():
    tokens, real = (np.repeat(x[2:3], 8, axis=0) for x in prompts())
    found = [
        run(PARAMS, CFG, tokens, real, keys(step=step), np.float32(1), **SAMPLED)
        for step in range(80)
    ]
    drawn, logp = (
        np.ravel([getattr(s, name)[..., 0] for s in found]) for name in ("tokens", "logp")
    )
    assert check_frequencies(drawn, logp, first_logits(1.0)[2] / SAMPLED["temperature"], 1.0) == V


def test_first_token_frequencies_of_a_nucleus():
    settings = {**SAMPLED, "group": 2048, "max_new": 1, "temperature": 0.7, "top_p": 0.75}
    samples = run(PARAMS, CFG, *(x[:2] for x in prompts()), keys(2), np.float32(1), **settings)
    drawn, logp = (np.asarray(x[..., 0]) for x in (samples.tokens, samples.logp))
    sizes = [
        check_frequencies(drawn[i], logp[i], first_logits(1.0)[i] / 0.7, 0.75) for i in range(2)
    ]
    assert 1 < max(sizes) < V


def test_nucleus_by_hand():
    p = np.array([[0.15, 0.5, 0.05, 0.3]])
    logits = jnp.log(p) + 7
    kept = lambda top_p: np.flatnonzero(np.isfinite(decision.nucleus(logits, top_p)[0])).tolist()  # noqa: E731
    assert kept(0.45) == [1]
    assert kept(0.6) == kept(0.79) == [1, 3]
    assert kept(0.81) == kept(0.94) == [0, 1, 3]
    assert kept(0.96) == [0, 1, 2, 3]
    assert kept(1e-9) == kept(0.0) == [1]  # the best always stays
    np.testing.assert_array_equal(
        decision.nucleus(logits, 0.6)[0, jnp.array([1, 3])], logits[0, jnp.array([1, 3])]
    )


def test_nucleus_with_disallowed_tokens_and_large_logits():
    logits = jnp.array(
        [[-jnp.inf, 80.0, 79.0, -1e30, -jnp.inf], [1e4, 0.0, -1e4, -jnp.inf, 9999.0]]
    )
    kept = np.isfinite(decision.nucleus(logits, 0.9))
    np.testing.assert_array_equal(
        kept, [[False, True, True, False, False], [True, False, False, False, True]]
    )


# ------------------------------------------------------------------------------------- when it ends


def recording(ran):
    """A `wrap` whose `advance` appends (slots, columns so far) to `ran`."""

    def recorder(body, donate=()):
        program = wrap(body, donate)

        def lower(*shapes):
            lowered = program.lower(*shapes)
            compiled = lowered.compile()

            def noted(*args):
                out = compiled(*args)
                if donate:
                    ran.append((len(out.token), int(out.t)))
                return out

            return types.SimpleNamespace(compile=lambda: noted, out_info=lowered.out_info)

        call = lambda *args: program(*args)  # noqa: E731
        call.lower = lower
        return call

    return recorder


CLOCK = dict(_8=9, _9=10, _10=EOS)  # from 8: over after three tokens


@pytest.mark.parametrize(
    "long, last",
    [(dict(_5=5), T), (dict(_5=6, _6=7, _7=11, _11=12, _12=13, _13=EOS), 7)],
    ids=["cut off", "over"],
)
@pytest.mark.slow
def test_columns_end_with_the_last_row_and_slots_with_most_rows(long, last):
    """Of 32 rows, 28 are over after three tokens: a quarter of the slots holds the other four."""
    tokens = np.array([8] * 13 + [5] * 4 + [8] * 15, np.int32)[:, None]
    settings = SamplerSettings(**{**CHAIN_SETTINGS, "slot_counts": 3})
    ran, reported = [], []
    begin = lambda params, *inputs: sampler.start(params, CHAIN, *inputs, settings)  # noqa: E731
    one = sampler.Sampler(CHAIN, settings, begin, recording(ran))

    def finished(tokens, mask, ended, now):
        reported.append((now[:, 0], mask[:, 0].sum(-1), ended[:, 0]))

    samples = one(
        chain_params(walk(**CLOCK, **long)),
        tokens,
        tokens >= 0,
        keys(32),
        bias=np.float32(0),
        finished=finished,
    )
    length = np.where(tokens[:, 0] == 5, 6 if last == 7 else T, 3)
    np.testing.assert_array_equal(np.asarray(samples.mask[:, 0]).sum(-1), length)
    np.testing.assert_array_equal(samples.ended[:, 0], length < T)
    assert (
        ran == [(32, 3), (8, 5), (8, 7)]
        if last == 7
        else [(32, 3)] + [(8, t) for t in (5, 7, 9, 11, 12)]
    )
    # Each row is handed over once, when it is whole.
    times = np.sum([now for now, _, _ in reported], axis=0)
    assert (times == 1).all()
    for now, lengths, ended in reported:
        np.testing.assert_array_equal(lengths[now], length[now])
        np.testing.assert_array_equal(ended[now], length[now] < T)


@pytest.mark.slow
def test_slots_and_segments_change_no_sample():
    """Rows that end are overtaken by others in their slots, keys and values in other segments."""
    whole = sampled()
    for change in (
        dict(slot_counts=1),
        dict(slot_counts=3, segments=1),
        dict(slot_counts=1, segments=1),
    ):
        other = run(PARAMS, CFG, *prompts(), keys(), **{**SAMPLED, **change})
        for name in ("tokens", "mask", "ended"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
        np.testing.assert_allclose(other.logp, whole.logp, atol=5e-5)
        np.testing.assert_allclose(other.margins, whole.margins, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_hidden_state_of_the_highest_margin_is_handed_over(tied):
    """Where slots go away too; it is the one at which the logits say that margin."""
    cfg = dataclasses.replace(CFG, tied=tied)
    params = random_params(cfg, 3)
    tokens, real = prompts()
    plain = run(params, cfg, tokens, real, keys(), DISALLOWED, **SAMPLED)
    samples = run(params, cfg, tokens, real, keys(), DISALLOWED, **SAMPLED, keep_hidden=True)
    assert plain.hidden is None
    np.testing.assert_array_equal(samples.tokens, plain.tokens)
    last, segment = decoder.prefill(params, cfg, tokens, real)
    rows = samples.tokens.reshape(-1, T)
    hidden = logprobs.continued_hidden(params, cfg, last, segment, real, rows)
    at = np.asarray(samples.margins).reshape(-1, T).argmax(-1)
    assert len(set(at.tolist())) > 3
    np.testing.assert_allclose(
        samples.hidden.reshape(len(rows), -1), hidden[np.arange(len(rows)), at], atol=1e-4
    )
    every = decoder.logits(params, cfg, samples.hidden)
    called = decoder.token_logits(params, cfg, samples.hidden, DECISION)
    np.testing.assert_allclose(called, every[..., DECISION], atol=1e-4)
    best = np.delete(every, DECISION, axis=-1).max(-1)
    np.testing.assert_allclose(called - best, samples.margins.max(-1), atol=1e-3)


@pytest.mark.slow
def test_half_precision_cache_is_close():
    whole, half = (
        sampled(),
        run(PARAMS, CFG, *prompts(), keys(), **{**SAMPLED, "cache_dtype": "bfloat16"}),
    )
    np.testing.assert_array_equal(half.tokens[:, :, 0], whole.tokens[:, :, 0])
    difference = np.abs(np.asarray(half.logp) - whole.logp)[:, :, 1]
    same = np.asarray(half.tokens[:, :, 1] == whole.tokens[:, :, 1])
    assert same.mean() > 0.8 and 0 < difference[same].max() < 0.3


@pytest.mark.slow
def test_pad_that_is_also_an_eos():
    samples = chain_run(walk(_5=6, _6=PAD, _7=EOS), [5, 7])
    assert (
        samples.tokens[:, :3].tolist() == [[6, PAD, PAD], [EOS, PAD, PAD]]
        and not samples.tokens[:, 3:].any()
    )
    assert samples.mask.sum(-1).tolist() == [2, 1] and samples.ended.all()


# ----------------------------------------------------------------------- the marker and its margins


def test_disallowed_marker_is_never_written_at_a_decision_state():
    natural, without = sampled(), sampled(float(DISALLOWED))
    at_decision = lambda s: (s.tokens == DECISION) & s.mask & ~opened_before(s)  # noqa: E731
    assert at_decision(natural).any() and not at_decision(without).any()
    assert not at_decision(jax.tree.map(lambda x: x[:, None], greedy())).any()


def test_log_probs_of_responses_that_could_not_call_are_the_sampled_ones():
    samples = sampled(float(DISALLOWED))
    barred = np.where(samples.margins > -np.inf, DECISION, -1).reshape(-1, T)

    @jit
    def forced(barred):
        last, prompt = decoder.prefill(PARAMS, CFG, *prompts())
        rows = samples.tokens.reshape(-1, T)
        hidden = logprobs.continued_hidden(PARAMS, CFG, last, prompt, prompts()[1], rows)
        return logprobs.barred_scores(PARAMS, CFG, hidden, rows, barred, SAMPLED["temperature"], 5)[
            0
        ]

    mask = samples.mask.reshape(-1, T)
    np.testing.assert_allclose(samples.logp.reshape(-1, T)[mask], forced(barred)[mask], atol=5e-5)
    assert np.abs(samples.logp.reshape(-1, T) - forced(np.full_like(barred, -1)))[mask].max() > 1e-2


@pytest.mark.parametrize("which", ["greedy", "natural", "disallowed"])
def test_margins_are_those_of_the_uncached_logits(which):
    samples = {
        "greedy": lambda: jax.tree.map(lambda x: x[:, None], greedy()),
        "natural": sampled,
        "disallowed": lambda: sampled(float(DISALLOWED)),
    }[which]()
    logits = recomputed_logits(samples)
    margins = logits[..., DECISION] - np.delete(logits, DECISION, axis=-1).max(
        -1
    )  # before any bias
    state = samples.mask & ~opened_before(samples)
    np.testing.assert_allclose(samples.margins[state], margins[state], atol=5e-5)
    assert (samples.margins[~state] == -np.inf).all()
    assert (samples.mask & opened_before(samples)).any()  # rows with an open answer occur


def test_answer_of_several_tokens_opens_at_its_last():
    table = walk(_5=A, _6=B, _7=9, _9=9, _10=B, _11=ANSWER, _4=9, _12=13, _13=A)
    # From 5: A B opens. From A, in the prompt: B opens nothing. From 10: B alone neither. Then the
    # other opening; A B, late.
    samples = chain_run(table, [5, A, 10, 11, 12])
    assert samples.tokens[:, :4].tolist() == [
        [A, B, 9, 9],
        [B, 9, 9, 9],
        [B, 9, 9, 9],
        [ANSWER, 9, 9, 9],
        [13, A, B, 9],
    ]
    state = np.isfinite(samples.margins)
    assert state.sum(-1).tolist() == [2, T, T, 1, 3]
    np.testing.assert_allclose(samples.margins[state], 1.0 - 10.0, rtol=1e-6)


def test_after_the_answer_opened_the_bias_is_off_and_the_marker_is_a_word():
    for beta in (-np.inf, -50.0, 0.0, 8.0):
        samples = chain_run(walk(_5=ANSWER, _4=DECISION, _3=EOS), [5], beta)
        assert samples.tokens[0, :3].tolist() == [ANSWER, DECISION, EOS]
        assert np.isfinite(samples.margins).sum() == 1
    assert chain_run(walk(_5=ANSWER), [5], 10.0).tokens[0, 0] == DECISION


def test_where_no_opening_ends_them_all_steps_are_decision_states():
    marker = {"marker": Marker(DECISION, NEVER)}
    table = walk(_5=ANSWER, _4=9, _9=EOS)
    table[9, DECISION] = 9.0
    assert chain_run(table, [5]).margins[0, :4].tolist() == [-9.0] + [-np.inf] * 3
    samples = chain_run(table, [5], **marker)
    assert samples.tokens[0, :3].tolist() == [ANSWER, 9, EOS]
    np.testing.assert_allclose(samples.margins[0, :4], [-9, -9, -1, -np.inf], rtol=1e-6)
    assert chain_run(table, [5], 1.5, **marker).tokens[0, :3].tolist() == [ANSWER, 9, DECISION]


def test_call_at():
    margins = np.array(
        [[-3.0, -1.0, -2.0, -np.inf], [-np.inf] * 4, [-5.0, -9.0, -4.0, -0.5]], np.float32
    )
    for array in (margins, jnp.asarray(margins)):
        assert decision.call_at(array, 0.0).tolist() == [-1, -1, -1]
        assert decision.call_at(array, 1.0).tolist() == [
            -1,
            -1,
            3,
        ]  # a margin of exactly -beta does not call
        assert decision.call_at(array, 2.5).tolist() == [1, -1, 3]
        assert decision.call_at(array, 4.5).tolist() == [0, -1, 2]
        assert decision.call_at(array, np.inf).tolist() == [0, -1, 0]
        assert decision.call_at(array, -np.inf).tolist() == [-1, -1, -1]


# ------------------------------------------------------------------------------------- the frontier


def check_frontier(base, decoded, beta):
    """What the disallowed pass says of each row at `beta` is what decoding does; returns bool[P].

    These are the calls.
    """
    crossing = decision.call_at(base.margins, beta)
    at_decision = (decoded.tokens == DECISION) & decoded.mask & ~opened_before(decoded)
    called = at_decision.any(-1)
    np.testing.assert_array_equal(called, crossing >= 0)
    np.testing.assert_array_equal(at_decision.argmax(-1)[called], crossing[called])
    for i, t in enumerate(crossing):
        if t >= 0:
            np.testing.assert_array_equal(decoded.tokens[i, :t], base.tokens[i, :t])
            np.testing.assert_array_equal(decoded.margins[i, : t + 1], base.margins[i, : t + 1])
        else:
            for name in ("tokens", "mask", "ended", "margins"):
                np.testing.assert_array_equal(getattr(decoded, name)[i], getattr(base, name)[i])
    return called


def test_one_disallowed_pass_holds_the_decision_at_every_bias():
    base = greedy()
    steps = np.unique(base.margins[np.isfinite(base.margins)])
    between = (steps[1:] + steps[:-1])[:: len(steps) // 8] / 2
    shares, crossings = [], set()
    for beta in [0.0, 1e9, -1e9, *(-between).tolist()]:
        shares.append(check_frontier(base, greedy(beta), beta).mean())
        crossings |= set(decision.call_at(base.margins, beta).tolist())
    assert {0.0, 1.0} < set(shares) and len(
        set(shares)
    ) >= 4  # nobody, everybody, and some shares between
    assert len(crossings) >= 5  # never, at once, and later
    assert base.ended.any() and (base.tokens == ANSWER).any()


def test_the_decision_at_the_very_edge():
    """At a bias of minus a margin that occurred there is no call; one float higher there is."""
    base = greedy()
    for i, margin in enumerate(base.margins.max(-1)):
        below, above = -margin, np.nextafter(-margin, np.float32(np.inf))
        assert not check_frontier(base, greedy(float(below)), below)[i]
        assert check_frontier(base, greedy(float(above)), above)[i]


def test_a_tie_does_not_call_whichever_token_comes_first():
    """The decision token comes before its rival: the first of two equal logits would be a call."""
    table = np.zeros((16, 16))
    table[:, 9] = 8.0
    base = chain_run(table, [5], DISALLOWED)
    beta = -base.margins[0, 0]
    assert decision.call_at(base.margins, beta).tolist() == [-1]
    assert (chain_run(table, [5], beta).tokens == 9).all()


def test_call_at_holds_the_bias_as_the_device_does():
    """0.7 as float64 is above float32's 0.7, which is what the device adds."""
    margins = np.array([[-0.7]], np.float32)
    assert (
        decision.call_at(margins, 0.7).tolist()
        == decision.call_at(margins, np.float64(0.7)).tolist()
        == [-1]
    )


# --------------------------------------------------------------------------- a marker in plain text

STEMS, AFTER = (8, 9, 10, A, 12), (B, 13, 14, 15)
PLAIN = Marker(None, OPENING, PlainMarker(anywhere=(DECISION,), stems=STEMS, after=AFTER))


@functools.cache
def plain(beta=float(DISALLOWED)):
    samples = run(PARAMS, CFG, *prompts(), keys(), np.float32(beta), **{**GREEDY, "marker": PLAIN})
    return jax.tree.map(lambda x: np.asarray(x)[:, 0], samples)


def deciding(samples):
    """bool[P, T, V]: by hand, from the definition."""
    table = np.zeros((*samples.tokens.shape, V), bool)
    table[..., DECISION] = True
    after = np.isin(samples.tokens[:, :-1], STEMS)
    table[:, 1:, list(AFTER)] = after[..., None]
    return table & ~opened_before(samples)[..., None]


def test_plain_margins_are_of_the_best_continuing_token_against_the_best_other():
    samples = plain()
    logits = recomputed_logits(jax.tree.map(lambda x: x[:, None], samples))[:, 0]
    table = deciding(samples)
    margins = np.where(table, logits, -np.inf).max(-1) - np.where(table, -np.inf, logits).max(-1)
    state = samples.mask & table.any(-1)
    np.testing.assert_allclose(samples.margins[state], margins[state], atol=5e-5)
    assert (samples.margins[~state] == -np.inf).all()
    assert (np.isin(samples.tokens, STEMS) & samples.mask).any()
    chosen = np.take_along_axis(table, samples.tokens[..., None], -1)[..., 0]
    assert not (
        chosen & samples.mask
    ).any()  # disallowed: no continuing token is ever written where it would decide


def test_one_disallowed_pass_holds_the_plain_decision_at_every_bias():
    base = plain()
    steps = np.unique(base.margins[np.isfinite(base.margins)])
    called_after, shares = set(), set()
    for beta in [0.0, 1e9, *(-steps[:: len(steps) // 6] + 1e-4).tolist()]:
        decoded, crossing = plain(beta), np.asarray(decision.call_at(base.margins, beta))
        table = (
            np.take_along_axis(deciding(decoded), decoded.tokens[..., None], -1)[..., 0]
            & decoded.mask
        )
        np.testing.assert_array_equal(np.where(table.any(-1), table.argmax(-1), -1), crossing)
        for i, t in enumerate(crossing):
            np.testing.assert_array_equal(
                decoded.tokens[i, :t], base.tokens[i, :t]
            )  # all but the last where it never calls
            called_after |= {int(decoded.tokens[i, t])} if t >= 0 else set()
        shares.add((crossing >= 0).mean())
    assert len(shares) >= 3 and DECISION in called_after and called_after & set(AFTER)


@pytest.mark.slow
def test_plain_marker_without_a_token_that_decides_at_once():
    """Where no token decides, there is no decision state, and no bias brings a call."""
    marker = Marker(None, OPENING, PlainMarker((), (9,), (10, 11)))
    tokens = np.array([[5]], np.int32)
    table = walk(_5=9, _9=12, _12=13, _13=EOS)
    table[9, 11] = 4.0
    for beta, want in (
        (-np.inf, [9, 12, 13, EOS]),
        (5.0, [9, 12, 13, EOS]),
        (6.5, [9, 11]),
        (np.inf, [9, 11]),
    ):
        settings = {**CHAIN_SETTINGS, "marker": marker}
        samples = run(chain_params(table), CHAIN, tokens, tokens >= 0, keys(1), beta, **settings)
        assert samples.tokens[0, 0, : len(want)].tolist() == want
        np.testing.assert_allclose(samples.margins[0, 0, :3], [-np.inf, 4.0 - 10.0, -np.inf])


# ----------------------------------------------------------------------------------- other machines


@pytest.mark.parametrize("settings", [GREEDY, {**SAMPLED, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_lowers_for_tpu_and_cuda(settings):
    s = SamplerSettings(**settings)

    def program(params, tokens, real, step, beta):
        keys = sampling.prompt_keys(0, step, jnp.arange(8))
        context, state = sampler.start(params, CFG, tokens, real, keys, beta, s)
        context = context.replace(past=(state.open,))
        context, state = sampler.compact(context, state, 8)
        return sampler.advance(params, CFG, context, state, jnp.int32(T), beta, s).samples.tokens

    exported = jax.export.export(jax.jit(program), platforms=["tpu", "cuda"])(
        PARAMS, *prompts(), np.int32(0), np.float32(0)
    )
    assert exported.platforms == ("tpu", "cuda")
    assert exported.out_avals[0].shape == (8, settings["group"], T)
