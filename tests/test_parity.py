"""The decoder's numbers are transformers': golden files, and live where torch is installed."""

import functools
import pathlib
import runpy

import jax
import numpy as np
import pytest

from collab_jax.models import attention, decision, decoder, hf, sampler
from collab_jax.rl import sampling

FOLDER = pathlib.Path(__file__).parent / "golden"
KINDS = ("llama", "qwen2", "qwen3", "llama-untied-biases", "qwen2-tied", "qwen3-untied-biases")
TOLERANCE = 1e-4
# Compiling is most of the time here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.partial(jit, static_argnums=1)
def all_logits(params, cfg, tokens, real):
    hidden, _ = decoder.forward(
        params, cfg, tokens, decoder.positions_of(real), attention.causal(real)
    )
    return decoder.logits(params, cfg, hidden)


def read(folder):
    cfg = hf.config_from_hf(hf.read_config(folder))
    return cfg, hf.load(folder, cfg, "float32")


def left_padded(golden):
    """The golden rows, moved to the right edge: tokens and real [R, S]."""
    S = golden["tokens"].shape[1]
    tokens = np.stack(
        [np.roll(row, S - n) for row, n in zip(golden["tokens"], golden["lengths"], strict=True)]
    )
    return tokens, np.arange(S) >= S - golden["lengths"][:, None]


def logit_error(params, cfg, golden) -> float:
    """Largest difference from the golden logits, all rows in one batch, padded on the left."""
    tokens, real = left_padded(golden)
    ours = np.asarray(all_logits(params, cfg, tokens, real))
    error = [
        np.abs(o[-n:] - g[:n]).max()
        for o, g, n in zip(ours, golden["logits"], golden["lengths"], strict=True)
    ]
    return float(max(error))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_golden_logits_and_greedy_continuation(kind):
    cfg, params = read(FOLDER / kind)
    golden = np.load(FOLDER / kind / "golden.npz")
    assert logit_error(params, cfg, golden) <= TOLERANCE

    tokens, real = left_padded(golden)
    keys = sampling.prompt_keys(0, 0, np.arange(len(tokens)))
    settings = sampler.SamplerSettings(
        group=1,
        max_new=golden["greedy"].shape[1],
        temperature=0.0,
        top_p=1.0,
        eos_ids=(-1,),
        pad_id=0,
        marker=decision.Marker(0, decision.opening(["."])),
        segments=1,
        slot_counts=1,
        cache_dtype="float32",
    )
    samples = sampler.sample(params, cfg, tokens, real, keys, settings=settings)
    np.testing.assert_array_equal(samples.tokens[:, 0], golden["greedy"])


def test_golden_files_have_what_is_odd():
    """Each switch of the decoder is on in one of them, and none stands at a value that hides it."""
    llama, qwen2, qwen3, *others = found = [
        hf.config_from_hf(hf.read_config(FOLDER / kind)) for kind in KINDS
    ]
    assert [c.tied for c in found] == [True, False, True, False, True, False]
    assert (
        llama.rope_scaling and others[0].mlp_bias and others[0].output_bias and others[2].qkv_bias
    )
    assert qwen2.qkv_bias and qwen2.num_heads > qwen2.num_kv_heads
    assert qwen3.qk_norm and qwen3.head_dim * qwen3.num_heads != qwen3.hidden_size
    assert len({c.norm_eps for c in found}) == 6
    assert all(p.stat().st_size < 60_000 for kind in KINDS for p in (FOLDER / kind).iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_live_there_and_back(kind, tmp_path):
    """A fresh checkpoint, read and written by us, read by transformers: always the same logits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    make = runpy.run_path(str(FOLDER / "make.py"))
    model = make["random_model"](kind, make["GOLDEN"][kind], seed=7)
    model.save_pretrained(tmp_path / "theirs")
    rows = [
        np.random.default_rng(i).integers(make["VOCAB"], size=n).tolist()
        for i, n in enumerate((11, 6, 1))
    ]
    golden = dict(
        tokens=np.array([row + [0] * (11 - len(row)) for row in rows]),
        lengths=np.array([len(row) for row in rows]),
        logits=[make["logits_of"](model, row) for row in rows],
    )
    cfg, params = read(tmp_path / "theirs")
    error = logit_error(params, cfg, golden)

    hf.save(
        tmp_path / "ours",
        params,
        hf.read_config(tmp_path / "theirs"),
        "float32",
        tokenizer=tmp_path / "theirs",
    )
    back, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    weights = back.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(
        torch.equal(weights[name], value) for name, value in model.state_dict().items()
    )  # bit for bit
    for row, want in zip(
        rows, golden["logits"], strict=True
    ):  # torch rounds by where weights lie in memory
        np.testing.assert_allclose(make["logits_of"](back, row), want, atol=2e-5)
    print(f"{kind}: largest logit error {error:.1e}")
    assert error <= TOLERANCE
