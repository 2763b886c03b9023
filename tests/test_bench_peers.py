"""The PyTorch peers do the work that ours does: the same tokens, rewards, loss and gradient."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax import gapg
from collab_jax.bench import peers
from collab_jax.models import decoder, hf, logprobs
from collab_jax.models import text as text_lib
from collab_jax.tasks import Example, make_task

EXAMPLES = [
    Example("a", "3 numbers", ((3, 4, 5), 12)),
    Example("b", "4 numbers", ((6, 10, 2, 7), 25)),
    Example("c", "3 numbers", ((20, 30, 40), 50)),
]
RIGHT = "<think>4+3=7,7+5=12</think><answer>3+4+5</answer>"
BROKEN = "4+3=7,7+5=12</think><answer>3+4+5</answer>"
WRONG = "<think>4*3=12,12+5=17</think><answer>3*4+5</answer>"
CALL = "<think>4*3=12,12+5=17\n<unknown> I need external assistance </unknown>"


@dataclasses.dataclass
class Parts:
    config: object
    folder: object
    text: text_lib.Text
    task: object
    prompts: np.ndarray
    prompt_mask: np.ndarray


@pytest.fixture(scope="module")
def parts(small):
    config = small()
    folder = hf.locate(config.model.path)
    text, task = text_lib.load(folder, config.text), make_task(config)
    return Parts(
        config, folder, text, task, *text.prompt_batch([task.prompt(e) for e in EXAMPLES], 16)
    )


# ---------------------------------------------------------------------------------- without PyTorch


def test_versions_are_of_what_is_installed():
    found = peers.versions()
    assert set(found) <= set(peers.PACKAGES) and found["transformers"]


def test_rewards_are_the_methods(parts):
    text, task, weights = parts.text, parts.task, parts.config.reward
    rows = [text.response_ids(r) for r in (RIGHT, BROKEN, CALL, WRONG, "3+3", CALL)]
    rows[-1] = rows[-1][:-1]  # cut off
    got = peers.rewards(task, text, weights, EXAMPLES[:1] * len(rows), rows)

    found = task.verify(EXAMPLES[:1] * 5, (RIGHT, BROKEN, CALL, WRONG, "3+3"))
    verdicts = [[[getattr(v, name) for v in found]] for name in ("correct", "called", "formatted")]
    state = gapg.init_reward(weights.alpha_a, weights.alpha_c, weights.alpha_f)
    wanted, _ = gapg.reward(state, *jnp.array(verdicts), jnp.array([True]))
    np.testing.assert_array_equal(got, [*wanted[0], 0.0])
    assert len(set(got)) == 5


# ------------------------------------------------------------------------------------- with PyTorch


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(
        1
    )  # on a busy machine its threads wait for each other, tens of times as long as they work
    return torch


def test_generate_counts_what_it_samples(parts, torch):
    sizes = dict(group=4, max_new=20, dtype="float32")
    endless = peers.generate(parts.folder, parts.prompts, parts.prompt_mask, eos_ids=(), **sizes)
    assert endless() == endless() == 3 * 4 * 20
    ending = peers.generate(
        parts.folder, parts.prompts, parts.prompt_mask, eos_ids=(11, 12), **sizes
    )
    assert 3 * 4 <= ending() < 3 * 4 * 20


@pytest.fixture
def small_model(tmp_path):
    """(folder, DecoderConfig, params) of a Qwen3-type model with one layer and random weights."""
    hf_config = dict(
        model_type="qwen3",
        hidden_act="silu",
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100.0),
        architectures=["Qwen3ForCausalLM"],
    )
    cfg = hf.config_from_hf(hf_config)
    shapes, draw = (
        jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0))),
        np.random.default_rng(0),
    )
    params = jax.tree.map(lambda s: draw.normal(scale=0.5, size=s.shape).astype(np.float32), shapes)
    hf.save(tmp_path, params, hf_config, "float32", tokenizer=tmp_path)
    return tmp_path, cfg, params


def test_update_has_our_loss_and_gradient(small_model, torch, monkeypatch):
    folder, cfg, params = small_model
    P, G, L, T = 3, 4, 5, 6
    draw = np.random.default_rng(0)
    prompts, tokens = (draw.integers(0, 12, shape, dtype=np.int32) for shape in ((P, L), (P, G, T)))
    prompt_mask = np.arange(L) >= np.array([[0], [2], [4]])
    mask = np.arange(T) < draw.integers(1, T + 1, (P, G, 1))
    advantages = draw.standard_normal((P, G), dtype=np.float32)
    gradients = []

    def spy(parameters, limit):
        gradients.append([p.grad.numpy().copy() for p in parameters])
        assert limit == 1.0

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    run = peers.update(
        folder,
        prompts,
        prompt_mask,
        tokens,
        mask,
        advantages,
        micro_rows=5,
        learning_rate=1e-3,
        dtype="float32",
    )  # 12 rows, so a last micro-batch of 2
    first, second = run(), run()

    def objective(params):
        rows = jnp.array(tokens.reshape(P * G, T))
        logp = logprobs.response_logprobs(
            params, cfg, prompts, prompt_mask, rows, temperature=1.0, chunk=T
        )
        return gapg.loss(logp.reshape(P, G, T), mask, advantages, G) / P

    loss, gradient = jax.jit(jax.value_and_grad(objective))(params)
    assert first == pytest.approx(float(loss), abs=1e-4)
    norms = [math.sqrt(sum((g**2).sum() for g in update)) for update in gradients]
    assert norms[0] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    np.testing.assert_allclose(gradients[0][0], gradient["embed_tokens"]["embedding"], atol=1e-4)
    assert second < first and math.isfinite(norms[1])  # a step was taken, downhill


@pytest.fixture
def trl_step(parts, torch):
    pytest.importorskip("trl")
    runs = []

    def make(**sizes):
        sizes = dict(prompts_per_step=2, group=4, max_new=48) | sizes
        runs.append(
            peers.trl_step(
                parts.folder,
                EXAMPLES,
                text=parts.text,
                task=parts.task,
                config=parts.config,
                **sizes,
            )
        )
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def test_trl_takes_one_step_a_call(parts, trl_step, monkeypatch):
    judged, original = [], peers.rewards

    def spy(task, text, alphas, examples, completions):
        got = original(task, text, alphas, examples, completions)
        judged.append((examples, completions, got))
        return got

    monkeypatch.setattr(peers, "rewards", spy)
    run = trl_step(micro_rows=4)
    for step in range(2):
        assert len(judged) == step  # held until it is called
        count = run()
        examples, completions, got = judged[step]
        assert count == sum(map(len, completions)) and len(completions) == 8 <= count <= 8 * 48
        assert [e.id for e in examples] == [
            i for i in dict.fromkeys(e.id for e in examples) for _ in range(4)
        ]
        texts = [parts.text.tokenizer.decode(ids) for ids in completions]
        assert (
            sum(t.startswith("<think>") for t in texts) > 4
            and sum(t.endswith("<eos>") for t in texts) > 4
        )
        assert got.any() and np.isfinite(got).all()


def test_what_the_trainer_raises_the_call_raises(trl_step, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("in the reward")

    monkeypatch.setattr(peers, "rewards", broken)
    run = trl_step()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the reward"):
            run()


def test_too_few_examples_are_an_error(trl_step):
    with pytest.raises(RuntimeError, match="more examples"):
        trl_step(prompts_per_step=4)()
