"""The engine: greedy output is the sampler's, whatever else is in the batch; slots come free."""

import dataclasses
import queue
import threading

import jax
import numpy as np
import pytest
from test_sampler import (
    CFG,
    DISALLOWED,
    GREEDY,
    PARAMS,
    SAMPLED,
    L,
    T,
    V,
    greedy,
    keys,
    prompts,
    run,
)  # fmt: skip

from collab_jax.models import decision, decoder
from collab_jax.serve import slots
from collab_jax.serve.engine import Broken, Busy, Engine, Job, Limits
from collab_jax.serve.slots import LOGIT_BIASES, Request, Round, SlotSettings

LONG = 60
SETTINGS = SlotSettings(
    slots=3,
    columns=L + LONG,
    chunk=4,
    eos_ids=GREEDY["eos_ids"],
    marker=GREEDY["marker"],
    cache_dtype="float32",
)
ENDLESS = SETTINGS._replace(slots=1, eos_ids=(V + 1,))
INF = float("inf")


@pytest.fixture(scope="module")
def engine():
    engine = Engine(PARAMS, CFG, SETTINGS, Limits(requests=64, tokens=1000))
    assert engine.ready.wait(900)
    yield engine
    engine.close()


class Heard:
    """What a job emitted; `wait` returns once it has ended."""

    def __init__(self, engine, prompt, limit=T, bias=-INF, **settings):
        self.tokens, self.logps, self.margins, self.end = [], [], [], None
        self.emissions = queue.Queue()
        self.started = threading.Event()
        self.job = Job(
            prompt=tuple(int(t) for t in prompt), emit=self.hear, limit=limit, bias=bias, **settings
        )
        engine.submit(self.job)

    def hear(self, emission):
        self.tokens += emission.tokens
        self.logps += emission.logps
        self.margins += emission.margins
        self.started.set()
        if emission.end:
            self.end = emission.end
            self.emissions.put(emission.end)

    def wait(self):
        self.emissions.get(timeout=900)
        return self


def plain_prompts():
    tokens, real = prompts()
    return [row[kept] for row, kept in zip(tokens, real, strict=True)]


def expected(samples, row):
    """(tokens without the end token, margins) of the sampler's response `row`."""
    mask = samples.mask[row]
    tokens = samples.tokens[row][mask].tolist()
    margins = samples.margins[row][mask]
    return (tokens[:-1] if samples.ended[row] else tokens), margins


def check(heard, samples, row):
    tokens, margins = expected(samples, row)
    assert heard.tokens == tokens
    np.testing.assert_allclose(heard.margins, margins, rtol=1e-4, atol=1e-4)
    assert heard.end == ("stop" if samples.ended[row] else "length")


def test_alone_it_is_the_samplers(engine):
    for row, prompt in enumerate(plain_prompts()):
        check(Heard(engine, prompt).wait(), greedy(), row)


def test_in_a_full_and_changing_batch_it_is_the_samplers(engine):
    """Also where the ring is written round and round: each response is 12 of 65 columns."""
    order = np.random.default_rng(3).integers(0, 8, 60)
    heard = [Heard(engine, plain_prompts()[row], **other(i)) for i, row in enumerate(order)]
    assert engine.busy[0] <= 3
    for i, row in enumerate(order):
        heard[i].wait()
        if other(i) == {}:
            check(heard[i], greedy(), row)


def other(i):
    """Every third request of the batch asks for something else."""
    drawn = dict(temperature=1.5, top_p=0.7, seed=i, logit_bias={7: 3.0, 9: -5.0})
    return {0: drawn, 1: {}, 2: {}}[i % 3]


def test_a_response_as_long_as_the_ring_sees_all_of_its_prompt(engine):
    """Until the last column the prompt's first tokens count; equal to one long greedy pass."""
    settings = {**GREEDY, "max_new": LONG, "eos_ids": (V + 1,)}
    samples = run(PARAMS, CFG, *prompts(), keys(), DISALLOWED, **settings)
    samples = jax.tree.map(lambda x: np.asarray(x)[:, 0], samples)
    endless = Engine(PARAMS, CFG, ENDLESS, Limits(requests=64, tokens=1000))
    heard = [Heard(endless, prompt, limit=LONG) for prompt in plain_prompts()]
    for row in range(8):
        check(heard[row].wait(), samples, row)
        assert len(heard[row].tokens) == LONG
    endless.close()


def test_the_bias_decides_the_call_as_call_at_does(engine):
    samples = greedy()
    for beta in (-2.0, 0.0, 1.0, 3.0, 8.0):
        at = np.asarray(decision.call_at(samples.margins, beta))
        heard = [Heard(engine, prompt, bias=beta) for prompt in plain_prompts()]
        for row, one in enumerate(heard):
            one.wait()
            if at[row] < 0:
                check(one, samples, row)
            else:
                assert one.end == "call" and one.tokens == samples.tokens[row][: at[row]].tolist()
                assert len(one.margins) == at[row] + 1
        assert beta < 8 or (at >= 0).any()


def test_drawn_responses_are_the_samplers_too(engine):
    """By the same key; a row's randomness depends on nothing else."""
    settings = {**SAMPLED, "group": 1, "top_p": 0.8}
    of_seed = jax.vmap(jax.random.key)(np.arange(8, dtype=np.uint32))
    samples = run(PARAMS, CFG, *prompts(), of_seed, DISALLOWED, **settings)
    samples = jax.tree.map(lambda x: np.asarray(x)[:, 0], samples)
    drawn = dict(temperature=0.8, top_p=0.8)
    heard = [Heard(engine, p, seed=i, **drawn) for i, p in enumerate(plain_prompts())]
    for row, one in enumerate(heard):
        check(one.wait(), samples, row)
        logps = samples.logp[row][samples.mask[row]]
        np.testing.assert_allclose(one.logps, logps, rtol=1e-3, atol=1e-4)


def test_settings_of_one_request_do_not_leak_into_another(engine):
    """Each of a batch equals itself alone: drawn, biased, greedy, calling."""
    asked = [
        dict(temperature=0.8, top_p=0.8, seed=5),
        dict(),
        dict(bias=30.0),
        dict(logit_bias={11: 50.0}),
        dict(temperature=2.0, seed=9),
        dict(limit=2),
        dict(temperature=0.8, top_p=0.8, seed=6),
    ]
    prompt = plain_prompts()[0]
    alone = [Heard(engine, prompt, **one).wait() for one in asked]
    for _ in range(3):
        together = [Heard(engine, prompt, **one) for one in asked]
        for one, other in zip(alone, together, strict=True):
            other.wait()
            assert (one.tokens, one.end) == (other.tokens, other.end)
            np.testing.assert_allclose(one.margins, other.margins, rtol=1e-4, atol=1e-4)
    assert alone[2].end == "call" and alone[5].end == "length" and len(alone[5].tokens) == 2
    assert set(alone[3].tokens) == {11}
    assert len({tuple(one.tokens) for one in alone}) >= 5


def test_a_response_goes_on_from_what_is_written(engine):
    """A call that is taken back continues as the pass without the marker, whatever was before."""
    samples = greedy()
    for row, prompt in enumerate(plain_prompts()):
        tokens, margins = expected(samples, row)
        for cut in {1, len(tokens) // 2, len(tokens) - 1} - {0, -1}:
            heard = Heard(engine, prompt, written=tuple(tokens[:cut])).wait()
            assert tokens[:cut] + heard.tokens == tokens
            np.testing.assert_allclose(heard.margins, margins[cut:], rtol=1e-4, atol=1e-4)


def test_a_cancelled_request_frees_its_slot():
    engine = Engine(PARAMS, CFG, ENDLESS, Limits(requests=2, tokens=1000))
    first = Heard(engine, [6, 7], limit=10**6)
    assert first.started.wait(900)
    waiting, dropped = Heard(engine, [6, 7], limit=4), Heard(engine, [6, 7], limit=4)
    with pytest.raises(Busy) as refused:
        Heard(engine, [6], limit=4)
    assert refused.value.retry_after > 0
    with pytest.raises(Busy):
        engine.hold_place()
    engine.cancel(dropped.job)
    engine.cancel(first.job)
    assert waiting.wait().end == "length"
    written = len(first.tokens)
    assert Heard(engine, [6, 7], limit=4).wait().tokens == waiting.tokens
    assert len(first.tokens) == written < 10**6 and not dropped.tokens
    engine.close()
    assert engine.busy == (0, 0) and engine._waiting_tokens == 0
    with pytest.raises(Broken, match="closed"):
        Heard(engine, [6], limit=4)
    with pytest.raises(Broken, match="closed"):
        engine.hold_place()


def test_a_place_that_is_held_is_taken_until_it_is_left():
    engine = Engine(PARAMS, CFG, ENDLESS, Limits(requests=2, tokens=1000))
    first, second = engine.hold_place(), engine.hold_place()
    with pytest.raises(Busy):
        engine.hold_place()
    with pytest.raises(Busy):
        Heard(engine, [6], limit=4)
    engine.leave_place(first)
    engine.leave_place(first)  # it was one, not two
    assert Heard(engine, [6], limit=4).wait().end == "length"
    engine.leave_place(second)
    engine.close()


def test_places_do_not_stand_in_the_way_of_a_single_long_prompt():
    engine = Engine(PARAMS, CFG, ENDLESS, Limits(requests=9, tokens=4))
    place = engine.hold_place()
    assert Heard(engine, [6] * 5, limit=1).wait().end == "length"
    engine.leave_place(place)
    engine.close()


def test_what_passes_to_the_devices_and_back_is_what_was_packed():
    request = Request(
        token=np.int32(7),
        position=np.int32(-3),
        opening=np.int8(2),
        written=np.int32(1),
        limit=np.int32(2**31 - 1),
        seed=np.uint32(2**32 - 1),
        temperature=np.float32(0.1),
        top_p=np.float32(1 / 3),
        bias=np.float32(-np.inf),
        logit_ids=np.arange(LOGIT_BIASES, dtype=np.int32),
        logit_values=np.linspace(-100, 100, LOGIT_BIASES, dtype=np.float32),
    )
    words = slots.pack_request(request)
    assert words.dtype == np.int32 and words.shape == (slots.REQUEST_WORDS,)
    back = jax.jit(slots.unpack_request)(words)
    jax.tree.map(np.testing.assert_array_equal, back, request)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, np.asarray(b).dtype), back, request)

    draw = np.random.default_rng(0)
    written = Round(
        token=draw.integers(0, 100, (8, 3), np.int32),
        logp=draw.normal(size=(8, 3)).astype(np.float32),
        margin=np.where(draw.random((8, 3)) < 0.5, -np.inf, 1.5).astype(np.float32),
        **{name: draw.random((8, 3)) < 0.5 for name in ("real", "called", "ended")},
    )
    unpacked = slots.unpack_round(np.asarray(jax.jit(slots.pack_round)(written)))
    jax.tree.map(np.testing.assert_array_equal, unpacked, written)


def test_a_round_copies_no_weights():
    wide = dataclasses.replace(CFG, intermediate_size=4096)
    params = decoder.init(wide, jax.random.key(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    step = slots.programs(wide, SETTINGS).step[SETTINGS.slots, 1]
    state, keep = slots.empty(wide, SETTINGS), np.ones(SETTINGS.slots, bool)
    program = step.lower(slots.prepared(params, wide), state, keep).compile()
    assert program.memory_analysis().temp_size_in_bytes < weights / 4


def test_too_many_waiting_prompt_tokens_are_refused_but_never_a_single_prompt():
    engine = Engine(PARAMS, CFG, ENDLESS, Limits(requests=9, tokens=4))
    first = Heard(engine, [6, 7], limit=10**6)
    assert first.started.wait(900)
    alone = Heard(engine, [6] * 5, limit=1)
    with pytest.raises(Busy):
        Heard(engine, [6], limit=1)
    engine.cancel(first.job)
    assert alone.wait().end == "length"
    assert engine._waiting_tokens == 0  # whoever has left the queue, cancelled or served
    engine.close()


def test_the_rest_of_a_response_that_called_at_once_is_let_in_and_comes_first():
    engine = Engine(PARAMS, CFG, ENDLESS, Limits(requests=1, tokens=100))
    first = Heard(engine, [6, 7], limit=10**6)
    assert first.started.wait(900)
    waiting = Heard(engine, [6], limit=1)
    with pytest.raises(Busy):
        Heard(engine, [6], limit=1)
    rest = Heard(engine, [7], limit=1, resumed=True)
    assert engine._waiting[0] is rest.job
    engine.cancel(first.job)
    assert {heard.wait().end for heard in (waiting, rest)} == {"length"}
    engine.close()


def test_a_failure_of_the_devices_ends_every_job(monkeypatch):
    engine = Engine(PARAMS, CFG, SETTINGS, Limits(requests=9, tokens=100))
    assert engine.ready.wait(900)
    broken = engine._programs._replace(admit=lambda *_: 1 / 0)
    monkeypatch.setattr(engine, "_programs", broken)
    assert Heard(engine, [6, 7]).wait().end == "error" and engine.broken == "ZeroDivisionError"
    with pytest.raises(Broken):
        Heard(engine, [6])
