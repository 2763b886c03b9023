"""Tuning: packed rows cost and teach what single ones do; a killed tuning goes on with its bits."""

import functools
import itertools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT
from scipy import special

from collab_jax.models import attention, decoder, hf, logprobs, lora
from collab_jax.models import text as text_lib
from collab_jax.rl import demonstrations
from collab_jax.rl.demonstrations import Demonstration
from collab_jax.rl.tuning import Tuner
from collab_jax.runtime import metrics, parallel
from collab_jax.runtime.checkpoint import Checkpoints
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.process import STOPPED, GracefulStop

FOLDER = ROOT / "collab_jax" / "assets" / "countdown-tiny"
MARKER = "<unknown> I need external assistance </unknown>"
SHOWN = [
    ("3 4 5=12", "<think>3+4=7,7+5=12</think><answer>3+4+5</answer>"),
    ("1 2 3 4=10", "<think>1+2=3,3+3=6,6+4=10</think><answer>1+2+3+4</answer>"),
    ("6 7=42", "<think>6*7=42</think><answer>6*7</answer>"),
    ("9 8 7=24", "<think>9+8=17,17+7=24</think><answer>9+8+7</answer>"),
    ("50 2=25", "<think>50/2=25</think><answer>50/2</answer>"),
]
GIVEN = [Demonstration([{"role": "user", "content": p}], r) for p, r in SHOWN]
CALL = Demonstration(GIVEN[0].prompt, f"<think>3*4=12,12+5=17\n</think>{MARKER}", True)


class Stop(GracefulStop):
    """A GracefulStop that handles no signal."""

    def __init__(self):
        self.requested = self._in_block = False


@pytest.fixture(scope="module")
def make(small):
    """make(**overrides) -> (config, cfg, text, host params, frozen or None)."""

    def parts(**overrides):
        defaults = {"sft__micro_rows": 1, "sft__batch_size": 4, "sft__warmup_steps": 1}
        config = small(**(defaults | overrides))
        cfg = hf.config_from_hf(hf.read_config(FOLDER))
        text = text_lib.load(FOLDER, config.text)
        cfg = lora.configure(cfg, config.lora, text.decision_id)
        whole = hf.load(FOLDER, cfg, "float32")
        if not config.lora.rank:
            return config, cfg, text, whole, None
        return config, cfg, text, lora.start(cfg, whole, config.lora, 0, "float32"), whole

    return parts


def shown(items):
    return lambda: itertools.cycle(items)


@functools.partial(jax.jit, static_argnums=1)
def single_rows(params, cfg, prompts, mask, responses, taught):
    def loss(params):
        logp = logprobs.response_logprobs(params, cfg, prompts, mask, responses, 1.0, 64)
        return -(logp * taught).sum() / taught.sum()

    return jax.value_and_grad(loss)(params)


def reference(params, cfg, text, config, batch):
    """(mean loss, gradient) of demonstrations in rows of their own, in nats a taught token."""
    L, T = config.prompt_length, config.max_new_tokens
    prompts, mask = text.prompt_batch([one.prompt for one in batch], L)
    encoded = [demonstrations.encode(one, text) for one in batch]
    responses = np.zeros((len(batch), T), np.int32)
    taught = np.zeros((len(batch), T), bool)
    for i, one in enumerate(encoded):
        responses[i, : len(one.response)] = one.response
        taught[i, len(one.response) - one.learnt : len(one.response)] = True
    return single_rows(params, cfg, prompts, mask, responses, taught)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [GIVEN[:4], [*GIVEN[:3], CALL]], ids=["answers", "a call"])
def test_a_packed_step_is_that_of_single_rows(make, tmp_path, batch):
    config, cfg, text, params, _ = make()
    tuner = Tuner(cfg, None, text, config, Stop())
    sums = tuner._zero(parallel.replicate(params))
    parts = tuner.micro_batches([demonstrations.encode(one, text) for one in batch])
    for rows in parts:
        sums = tuner._add(sums, parallel.replicate(params), None, rows)
    assert len(parts) == 1  # four demonstrations in two rows, one on each device
    loss, grads, taught = jax.tree.map(lambda x: np.asarray(x).sum(0), tuple(sums))
    value, want = reference(params, cfg, text, config, batch)
    np.testing.assert_allclose(loss / taught, value, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got / taught, wanted, atol=1e-5 * largest)


def test_of_a_call_the_marker_alone_is_taught(make):
    _, _, text, _, _ = make()
    one = demonstrations.encode(CALL, text)
    assert one.response[-one.learnt :] == [*text.marker_ids, text.eos_ids[0]]
    assert one.response == text.response_ids(CALL.response)  # a word tokenizer cuts it the same


def test_decision_states_end_where_the_answer_opens_or_the_call_begins(make):
    _, _, text, _, _ = make()
    count = lambda one: demonstrations.encode(one, text).states  # noqa: E731
    told = "<think>3+4=7,7+5=12</think>"
    assert count(GIVEN[0]) == len(text.response_ids(told + "<answer>")) - 1  # less EOS
    called = Demonstration(GIVEN[0].prompt, told + MARKER)
    assert count(called) == len(text.response_ids(told)) - 1 + 1
    assert count(Demonstration(GIVEN[0].prompt, told)) == len(text.response_ids(told))
    assert count(CALL) == 0


CHANCE = 0.02
CALLED = Demonstration(GIVEN[1].prompt, f"<think>1+2=3{MARKER}")


def odds_and_losses(params, cfg, text, one):
    """(log-odds of the call at decision states, -log p of what is taught) from plain logits."""
    encoded = demonstrations.encode(one, text)
    ids = np.array([[*encoded.prompt, *encoded.response[:-1]]])
    real = np.ones(ids.shape, bool)
    hidden, _ = decoder.forward(
        params, cfg, ids, decoder.positions_of(real), attention.causal(real)
    )
    logits = np.asarray(decoder.logits(params, cfg, hidden)[0], np.float64)[-encoded.learnt :]
    odds, losses = [], []
    for i, (row, token) in enumerate(zip(logits, encoded.response, strict=True)):
        if i < encoded.states:
            odds.append(row[text.decision_id] - special.logsumexp(np.delete(row, text.decision_id)))
            row[text.decision_id] = -np.inf
        if i >= encoded.states or token != text.decision_id:
            losses.append(special.logsumexp(row) - row[token])
    return np.array(odds), np.array(losses)


def test_the_chance_of_a_call_is_taught_by_itself(make):
    """One demonstration that answers and one that calls, of which the marker's rest is taught."""
    chance = 0.0005  # which the model is near at some states
    config, cfg, text, params, _ = make(sft__call_chance=chance)
    tuner = Tuner(cfg, None, text, config, Stop())
    shown = [GIVEN[0], CALLED]
    (rows,) = tuner.micro_batches([demonstrations.encode(one, text) for one in shown])
    sums = tuner._add(
        tuner._zero(parallel.replicate(params)), parallel.replicate(params), None, rows
    )
    parts = [odds_and_losses(params, cfg, text, one) for one in shown]
    off = np.abs(np.concatenate([odds for odds, _ in parts]) - np.log(chance / (1 - chance)))
    huber = np.where(off < 1, off**2 / 2, off - 0.5)
    assert (off < 1).any() and (off > 1).any()
    want = huber.sum() + sum(losses.sum() for _, losses in parts)
    assert float(np.sum(sums.loss)) == pytest.approx(want, rel=1e-4)
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(sums.grads)])).all()


@pytest.mark.slow
def test_the_odds_become_those_of_the_chance_wherever_a_call_can_be(make, tmp_path):
    settings = dict(sft__call_chance=CHANCE, sft__learning_rate=3e-4, sft__warmup_steps=5)
    config, cfg, text, params, _ = make(**settings)
    before = np.concatenate([odds_and_losses(params, cfg, text, one)[0] for one in GIVEN])
    tuned = Tuner(cfg, None, text, config, Stop()).tune(tmp_path, params, shown(GIVEN), 60)
    after = np.concatenate([odds_and_losses(tuned, cfg, text, one)[0] for one in GIVEN])
    aim = np.log(CHANCE / (1 - CHANCE))
    assert np.abs(after - aim).max() < 0.5 < 2 < np.abs(before - aim).mean()


@pytest.mark.slow
def test_updates_are_those_of_the_optimizer(make, tmp_path):
    """Two steps by hand: mean gradient, clipped, AdamW at the schedule's rate."""
    config, cfg, text, params, _ = make()
    tuner = Tuner(cfg, None, text, config, Stop())
    got = tuner.tune(tmp_path, params, shown(GIVEN), 2)
    optimizer, want = tuner._optimizer(2), params
    state = optimizer.init(want)
    for start in (0, 4):
        batch = list(itertools.islice(itertools.cycle(GIVEN), start, start + 4))
        _, grads = reference(want, cfg, text, config, batch)
        updates, state = optimizer.update(grads, state, want)
        want = optax.apply_updates(want, updates)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, params)), strict=True):
        # As a whole: where a gradient is next to nothing, Adam makes a step of its rounding.
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b - c)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["loss"] > 0


@pytest.mark.slow
def test_divided_parameters_are_tuned_as_whole_ones(make, tmp_path):
    def tuned(sharded):
        config, cfg, text, params, _ = make(train__sharded=sharded)
        tuner = Tuner(cfg, None, text, config, Stop())
        return params, tuner.tune(tmp_path / str(sharded), params, shown(GIVEN), 2)

    (start, want), (_, got) = tuned(False), tuned(True)
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, start)), strict=True):
        # As a whole: where a gradient is next to nothing, Adam makes a step of its rounding.
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b - c)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"lora__rank": 2, "lora__targets": ("q_proj", "up_proj")}], ids=["all", "lora"]
)
def test_what_a_kill_or_a_signal_ends_goes_on_with_the_same_bits(make, tmp_path, settings, capsys):
    config, cfg, text, params, whole = make(sft__checkpoint_every=2, **settings)
    frozen = None if whole is None else parallel.replicate(whole)
    tuner = Tuner(cfg, frozen, text, config, Stop())
    straight = tuner.tune(tmp_path / "straight", params, shown(GIVEN), 5)

    class Killed(BaseException):
        pass

    def dying(after):
        for number, one in enumerate(itertools.cycle(GIVEN)):
            if number == after:
                raise Killed
            yield one

    with pytest.raises(Killed):  # in step 4: the state of step 2 is saved
        tuner.tune(tmp_path / "other", params, lambda: dying(14), 5)
    assert Checkpoints(tmp_path / "other" / "checkpoints").latest() == 2

    stop = Stop()
    stopped = Tuner(cfg, frozen, text, config, stop)

    def asking():
        for number, one in enumerate(itertools.cycle(GIVEN)):
            stop.requested |= number == 12  # read while step 3 runs
            yield one

    with pytest.raises(SystemExit) as ended:
        stopped.tune(tmp_path / "other", params, asking, 5)
    assert ended.value.code == STOPPED and "goes on from there" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "other" / "checkpoints").latest() == 3

    resumed = tuner.tune(tmp_path / "other", params, shown(GIVEN), 5)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    losses = [
        [row["loss"] for row in metrics.read(tmp_path / name / "metrics.jsonl")]
        for name in ("straight", "other")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5

    def nothing():
        raise AssertionError("a finished tuning needs no demonstration")

    again = tuner.tune(tmp_path / "other", params, nothing, 5)
    jax.tree.map(np.testing.assert_array_equal, again, straight)


def test_the_plan_is_printed_before_the_first_step(make, tmp_path, capsys):
    config, cfg, text, params, _ = make()
    Tuner(cfg, None, text, config, Stop()).tune(tmp_path / "tuning", params, shown(GIVEN), 1)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("tuning: 1 steps of 4 demonstrations (")
    assert "in 1 micro-batches" in line and "minutes to go" in line


@pytest.mark.slow
def test_a_signal_in_the_last_step_ends_the_process_as_in_any_other(make, tmp_path, capsys):
    config, cfg, text, params, _ = make()
    stop = Stop()

    def asking():
        for number, one in enumerate(itertools.cycle(GIVEN)):
            stop.requested |= number == 4  # read for step 2, the last
            yield one

    with pytest.raises(SystemExit) as ended:
        Tuner(cfg, None, text, config, stop).tune(tmp_path, params, asking, 2)
    assert ended.value.code == STOPPED
    stop.requested = False
    Tuner(cfg, None, text, config, stop).tune(tmp_path, params, shown(GIVEN), 2)
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_loss_that_is_not_finite_ends_it(make, tmp_path):
    config, cfg, text, params, _ = make()
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(UserError, match="not finite in step 1: .* lower config.sft.learning_rate"):
        Tuner(cfg, None, text, config, Stop()).tune(tmp_path, broken, shown(GIVEN), 2)
    assert Checkpoints(tmp_path / "checkpoints").latest() is None


def test_what_is_too_long_is_no_part_of_a_step(make, tmp_path):
    config, cfg, text, _, _ = make()
    long = Demonstration(GIVEN[0].prompt, SHOWN[1][1] * 4)
    tuner = Tuner(cfg, None, text, config, Stop())
    with_long = tuner._batches(shown([GIVEN[0], long, *GIVEN[1:]]), 0)
    without = tuner._batches(shown(GIVEN), 0)
    assert [next(with_long) for _ in range(3)] == [next(without) for _ in range(3)]
    assert next(tuner._batches(shown(GIVEN), 3)) == next(without)


def test_sigterm_in_a_step_is_waited_for():
    stop = GracefulStop()
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    with pytest.raises(SystemExit):
        stop.exit("saved")
