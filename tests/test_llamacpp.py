"""`bench gguf`: with a stand-in that computes what ours does, and with llama.cpp where it is."""

import ctypes
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import records
from collab_jax.bench import llamacpp
from collab_jax.models import attention, decoder, hf
from collab_jax.rl import experiment
from collab_jax.routing.calibration import calls
from collab_jax.runtime.errors import UserError

PROMPTS = 8


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """A run with a checkpoint, which is the embedded model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = experiment.prepare(small(eval__prompts=PROMPTS, max_new_tokens=96), tmp_path / "run")
    run.checkpoints.save(1, experiment.load_state(run))
    return run


@functools.partial(jax.jit, static_argnums=1)
def last_logits(params, cfg, ids, n):
    real = jnp.ones(ids.shape, bool)  # what comes after the n tokens is not seen
    hidden, _ = decoder.forward(
        params, cfg, ids, decoder.positions_of(real), attention.causal(real)
    )
    return decoder.logits(params, cfg, hidden)[0, n - 1]


class Llama:
    """As `llama_cpp.Llama`, by our decoder; its tokens are kept as its cache would be."""

    def __init__(self, file, n_ctx, n_threads, verbose):
        folder = hf.locate(file)
        self.cfg = hf.config_from_hf(hf.read_config(folder))
        self.params = hf.load(folder, self.cfg, "float32")
        self.ids, self.n_tokens = np.zeros((1, n_ctx), np.int32), 0
        self.ctx = self

    def close(self):
        self.params = None

    def n_vocab(self):
        return self.cfg.vocab_size

    def eval(self, tokens):
        assert tokens  # llama.cpp has logits for what it has just read alone
        self.ids[0, self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        self.logits = np.array(last_logits(self.params, self.cfg, self.ids, self.n_tokens))

    @staticmethod
    def longest_token_prefix(a, b):
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        return n


@pytest.fixture
def program(monkeypatch, run):
    """Has `import llama_cpp` find the stand-in."""

    class Bias(ctypes.Structure):
        _fields_ = [("token", ctypes.c_int32), ("bias", ctypes.c_float)]

    def sample(chain, llama, i):
        logits = llama.logits.copy()
        [entry], _ = chain
        logits[entry.token] += entry.bias
        return int(logits.argmax())

    encode = run.text.tokenizer.backend_tokenizer.encode
    lib = types.SimpleNamespace(
        Llama=type("L", (Llama,), {"tokenize": lambda self, text, **_: made(text.decode())}),
        llama_get_logits_ith=lambda llama, i: np.ctypeslib.as_ctypes(llama.logits),
        llama_logit_bias=Bias,
        llama_sampler_chain_default_params=lambda: None,
        llama_sampler_chain_init=lambda params: [],
        llama_sampler_chain_add=lambda chain, sampler: chain.append(sampler),
        llama_sampler_init_logit_bias=lambda n_vocab, n, biases: biases,
        llama_sampler_init_greedy=lambda: None,
        llama_sampler_sample=sample,
        llama_sampler_free=lambda chain: chain.clear(),
        __version__="0",
    )
    made = lambda text: encode(text, add_special_tokens=False).ids  # noqa: E731
    monkeypatch.setitem(sys.modules, "llama_cpp", lib)
    return lib


def table(run, out, types=("f32",)):
    """(the table's rows by program, the records of each program)."""
    text = llamacpp.compare(run.config, run.workdir, out, types, PROMPTS, 0.5)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    by_name = {row[0]: row[1:] for row in rows}
    tables = {name: records.read(out / name / "records.parquet") for name in types}
    return by_name, {"ours": records.read(out / "ours.parquet")} | tables


def test_a_program_that_computes_the_same_has_our_responses_and_margins(run, program, tmp_path):
    rows, tables = table(run, tmp_path / "out", ("f32", "q4_0"))
    ours, theirs = tables["ours"], tables["f32"]
    assert list(ours["text"]) == list(theirs["text"])
    assert (ours["ended"] == theirs["ended"]).all() and (ours["tokens"] == theirs["tokens"]).all()
    for column in ("margin", "first_margin", "last_margin", "logp", "answer_logp"):
        np.testing.assert_allclose(theirs[column], ours[column], atol=5e-4, rtol=5e-4)
    for a, b in zip(ours["margins"], theirs["margins"], strict=True):
        np.testing.assert_allclose(b, a, atol=5e-4)  # -inf at the same places
    for column in ("cloud_correct", "cloud_known", "cloud_usd"):
        assert (ours[column] == theirs[column]).all()
    mine, f32 = rows["ours, float32"], rows["f32"]
    assert f32[1] == mine[1] == "100.0" and f32[3:6] == mine[3:6] and f32[7:] == mine[7:]
    assert float(rows["q4_0"][0]) < float(f32[0]) / 5
    assert np.abs(tables["q4_0"]["margin"] - ours["margin"]).max() > 0.01


def test_what_is_sent_is_what_the_margins_and_the_bias_say(run, program, tmp_path):
    rows, tables = table(run, tmp_path / "out")
    _, half = llamacpp.split(tables["f32"], 0.5)
    sent = calls(float(rows["f32"][6]), half["margin"], llamacpp.answered(half, False))
    assert rows["f32"][7].split()[0] == f"{100 * sent.mean():.1f}"
    right = np.where(sent, half["cloud_correct"], half["local_correct"])
    assert rows["f32"][8].split()[0] == f"{100 * right.mean():.1f}"


def test_other_tokens_of_a_prompt_are_an_error(run, program, tmp_path):
    program.Llama.tokenize = lambda self, text, **_: [1, 2]
    with pytest.raises(UserError, match=f"other tokens of {PROMPTS} of {PROMPTS} prompts"):
        table(run, tmp_path / "out")


def test_without_the_package_it_says_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match="pip install"):
        table(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prompts, rate, says",
    [(PROMPTS, 0.0, "between 0 and 1"), (PROMPTS, 2.0, "between 0 and 1"), (-5, 0.5, "at least 4")]
    + [(PROMPTS, 0.1, "at least 20"), (1000, 0.1, "at least 20")],
)
def test_what_cannot_be_compared_is_told_first(run, program, tmp_path, prompts, rate, says):
    with pytest.raises(UserError, match=says):
        llamacpp.compare(run.config, run.workdir, tmp_path / "out", ["f32"], prompts, rate)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_told_first(run, program, tmp_path):
    with pytest.raises(UserError, match="no checkpoint: train first"):
        llamacpp.compare(run.config, tmp_path / "empty", tmp_path / "out", ["f32"], PROMPTS, 0.5)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_first(run, program, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="choose another --out"):
        table(run, tmp_path / "out")


@pytest.mark.slow
def test_llama_cpp_itself_writes_what_we_do(run, tmp_path):
    """Its cache is in f16, so margins differ in the third decimal."""
    pytest.importorskip("llama_cpp", reason='pip install -e ".[llamacpp]"')
    rows, tables = table(run, tmp_path / "out", ("f32", "f16"))
    for name in ("f32", "f16"):
        same = tables[name]["text"] == tables["ours"]["text"]
        assert same.mean() > 0.9
        moved = tables[name]["margin"] - tables["ours"]["margin"]
        assert np.abs(moved[same]).max() < 0.05
