"""LoRA: what it computes, what it trains, what a checkpoint holds, and what is exported."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.flax import save_file
from safetensors.numpy import load_file

from collab_jax import export
from collab_jax.models import attention, decoder, hf, lora
from collab_jax.rl import experiment, training
from collab_jax.runtime import parallel, process
from collab_jax.runtime.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOKENS = np.random.default_rng(0).integers(48, size=(2, 9))


def settings(rank=2, alpha=3.0, targets=("q_proj", "v_proj", "down_proj")):
    return ConfigDict({"rank": rank, "alpha": alpha, "targets": targets})


TOKEN = 7  # the decision token


def read(kind, chosen):
    folder = GOLDEN / kind
    cfg = lora.configure(hf.config_from_hf(hf.read_config(folder)), chosen, TOKEN)
    return cfg, hf.load(folder, cfg, "float32")


def random_adapter(cfg, chosen):
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: lora.init(cfg, chosen, jax.random.key(0), "float32"))
    return jax.tree.map(lambda x: 0.3 * draw.standard_normal(x.shape).astype(np.float32), shapes)


@functools.partial(
    jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)
def logits(params, cfg, tokens):
    real = np.ones(tokens.shape, bool)
    with jax.default_matmul_precision("highest"):
        hidden, _ = decoder.forward(
            params, cfg, tokens, decoder.positions_of(real), attention.causal(real)
        )
        return decoder.logits(params, cfg, hidden)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # a tied head; one of its own
def test_a_new_adapter_changes_nothing_and_the_merged_model_equals_base_and_adapter(kind):
    chosen = settings()
    cfg, base = read(kind, chosen)
    assert cfg.lora_scale == 1.5
    plain = logits(base, cfg, TOKENS)
    fresh = lora.init(cfg, chosen, jax.random.key(0), "float32")
    np.testing.assert_array_equal(logits(lora.join(base, fresh), cfg, TOKENS), plain)
    adapter = random_adapter(cfg, chosen)
    adapted = logits(lora.join(base, adapter), cfg, TOKENS)
    assert np.abs(adapted - plain).max() > 0.1
    merged = lora.merge(base, adapter, cfg)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(logits(merged, cfg, TOKENS), adapted, atol=2e-5)


def test_an_adapter_holds_its_targets_in_every_block_and_nothing_else():
    chosen = settings(targets=("o_proj",))
    cfg, base = read("llama", chosen)  # 2 blocks, 4 heads of 8, 16 wide
    adapter = flat(lora.init(cfg, chosen, jax.random.key(0), "float32"))
    shapes = {name: x.shape for name, x in adapter.items()}
    assert shapes == {
        "layers/self_attn/o_proj/lora_a": (2, 32, 2),
        "layers/self_attn/o_proj/lora_b": (2, 2, 16),
        "embed_tokens/lora_row": (16,),
    }
    a, again = adapter["layers/self_attn/o_proj/lora_a"]
    assert np.abs(a).max() <= 32**-0.5 and not np.array_equal(a, again)
    assert lora.join(None, base) is base


def test_merging_by_hand():
    base = {
        "layers": {
            "q_proj": {"kernel": np.ones((2, 2, 2), np.float32), "bias": np.zeros((2, 2))},
        }
    }
    a, b = np.array([[[1.0], [2.0]], [[0.0], [2.0]]]), np.array([[[3.0, 4.0]], [[6.0, 0.0]]])
    adapter = {"layers": {"q_proj": {"lora_a": a, "lora_b": b}}}
    base["embed_tokens"] = {"embedding": np.arange(6, dtype=np.float32).reshape(3, 2)}
    adapter["embed_tokens"] = {"lora_row": np.array([10.0, 20.0])}
    cfg = dataclasses.replace(read("llama", settings())[0], lora_scale=0.5, lora_token=1)
    merged = lora.merge(base, adapter, cfg)
    kernel = merged["layers"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, [[[2.5, 3.0], [4.0, 5.0]], [[1.0, 1.0], [7.0, 1.0]]])
    np.testing.assert_array_equal(merged["embed_tokens"]["embedding"], [[0, 1], [12, 23], [4, 5]])
    assert base["embed_tokens"]["embedding"][1, 0] == 2  # the base stays what it was


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_token_with_a_twin_can_be_told_from_it(kind):
    """Two tokens that are alike to the bit have the same logit, whatever other weights learn."""
    chosen, twin = settings(), TOKEN + 1
    cfg, base = read(kind, chosen)
    for path, value in traverse_util.flatten_dict(base).items():
        if path[0] in ("embed_tokens", "lm_head"):
            rows = value if path[-1] == "embedding" else value.T
            rows[twin] = rows[TOKEN]
    adapter = random_adapter(cfg, chosen)
    without = {k: v for k, v in adapter.items() if k.startswith("layers")}
    alike = logits(lora.join(base, without), cfg, TOKENS)
    np.testing.assert_array_equal(alike[..., TOKEN], alike[..., twin])
    parted = logits(lora.join(base, adapter), cfg, TOKENS)
    assert (parted[..., TOKEN] != parted[..., twin]).all()
    plain = logits.__wrapped__  # gradients do not go through a compilation with options
    gradient = jax.grad(lambda a: plain(lora.join(base, a), cfg, TOKENS)[..., TOKEN].sum())(adapter)
    rows = [x for name, x in flat(gradient).items() if name.endswith("lora_row")]
    assert len(rows) == (1 if cfg.tied else 2) and np.abs(rows[-1]).max() > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"targets": ("q_proj", "w_q")},
            "'w_q': this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        ({"targets": ("lm_head",)}, "names 'lm_head': this model has"),
        ({"targets": ()}, "empty: name some of down_proj"),
        ({"rank": -1}, r"rank=-1 must lie in 0 \(off\) to 16"),
        (
            {"rank": 17, "targets": ("gate_proj",)},
            r"rank=17 .* 16, the smaller side of gate_proj \[16, 24\]",
        ),
        ({"alpha": 0.0}, "alpha=0.0 must be finite and above 0"),
    ],
)
def test_bad_settings_name_what_there_is(change, says):
    cfg = hf.config_from_hf(hf.read_config(GOLDEN / "llama"))
    with pytest.raises(UserError, match=says):
        lora.configure(cfg, settings(**change), TOKEN)


def test_off_is_off():
    cfg = hf.config_from_hf(hf.read_config(GOLDEN / "llama"))
    assert lora.configure(cfg, settings(rank=0, targets=("whatever",)), TOKEN) is cfg


# ---------------------------------------------------------------- what it trains


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """(config, workdir, final state on the host) of a small run."""
    config = small(
        lora__rank=4,
        lora__targets=("q_proj", "up_proj"),
        optim__learning_rate=1e-2,
        optim__average=0.5,
        decode__slot_counts=1,
    )
    workdir = tmp_path_factory.mktemp("lora")
    return (
        config,
        workdir,
        parallel.unreplicate(
            training.train(experiment.prepare(config, workdir), process.GracefulStop())
        ),
    )


@pytest.mark.slow
def test_gradient_optimizer_average_and_checkpoint_hold_the_adapter_alone(trained):
    config, workdir, state = trained
    run = experiment.prepare(config, workdir)
    base = hf.load(run.folder, run.cfg, "float32")
    jax.tree.map(np.testing.assert_array_equal, state.frozen, base)
    leaves = set(flat(state.params))
    rows = {name for name in leaves if name.endswith("lora_row")}
    assert rows == {"embed_tokens/lora_row"}
    assert len(leaves) == 2 * 2 + 1  # the layers are stacked
    assert all(name.endswith(("lora_a", "lora_b")) for name in leaves - rows)
    sizes = sum(x.size for x in jax.tree.leaves(state.params))
    assert (
        sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * sizes + 2
    )  # two moments, two counts
    assert set(flat(state.average)) == leaves and all(
        np.abs(x).max() > 0 for x in jax.tree.leaves(state.params)
    )
    stored = sum(
        p.stat().st_size for p in (workdir / "checkpoints" / "4").rglob("*") if p.is_file()
    )
    assert stored < 0.5 * sum(x.nbytes for x in jax.tree.leaves(base))
    assert experiment.load_state(run).final_model["layers"]["self_attn"]["q_proj"].keys() == {
        "kernel",
        "lora_a",
        "lora_b",
    }


@pytest.mark.slow
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(trained, tmp_path):
    config, workdir, straight = trained
    shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "4")
    run = experiment.prepare(config, tmp_path / "copy")
    assert run.checkpoints.latest() == 2
    jax.tree.map(
        np.testing.assert_array_equal,
        parallel.unreplicate(training.train(run, process.GracefulStop())),
        straight,
    )


def test_the_frozen_model_comes_in_the_computations_type_and_the_adapter_in_its_own(
    small, tmp_path
):
    state = experiment.load_state(
        experiment.prepare(small(lora__rank=2, model__dtype="bfloat16"), tmp_path)
    )
    assert {str(x.dtype) for x in jax.tree.leaves(state.frozen)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}


# ---------------------------------------------------------------- an adapter to begin with


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_saved_adapter_is_read_back(kind, tmp_path):
    chosen = settings()
    cfg, base = read(kind, chosen)
    adapter = random_adapter(cfg, chosen)
    lora.save(tmp_path / "adapter", adapter, cfg, base, chosen, name="base")
    back = lora.load(str(tmp_path / "adapter"), cfg, base, chosen, "float32")
    for name, value in flat(adapter).items():
        if name.endswith("lora_row"):  # PEFT's file has the whole row
            np.testing.assert_allclose(flat(back)[name], value, atol=1e-6)
        else:
            np.testing.assert_array_equal(flat(back)[name], value)


def test_an_adapter_is_saved_in_the_type_that_it_is_computed_in(tmp_path):
    chosen = settings()
    cfg, base = read("llama", chosen)
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    adapter = random_adapter(cfg, chosen)
    lora.save(tmp_path, adapter, cfg, base, chosen, name="base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(x.dtype) for k, x in stored.items() if "lora_" in k} == {"bfloat16"}
    assert {str(x.dtype) for k, x in stored.items() if "lora_" not in k} == {"float32"}
    for name, value in flat(lora.load(str(tmp_path), cfg, base, chosen, "float32")).items():
        if not name.endswith("lora_row"):
            computed = np.asarray(jax.numpy.asarray(flat(adapter)[name], "bfloat16"), np.float32)
            np.testing.assert_array_equal(value, computed)


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "alpha_pattern"])
def test_an_adapter_that_computes_otherwise_is_refused(tmp_path, key):
    chosen = settings()
    cfg, base = read("llama", chosen)
    lora.save(tmp_path, random_adapter(cfg, chosen), cfg, base, chosen, name="base")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    value = {"q_proj": 8} if key == "alpha_pattern" else True
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {key: value}))
    with pytest.raises(UserError, match=f"has {key}, which is not known here"):
        lora.load(str(tmp_path), cfg, base, chosen, "float32")


def test_an_adapter_without_a_rank_is_no_setting(small, tmp_path):
    with pytest.raises(UserError, match="lora.rank=0 trains none: set the rank to its own"):
        experiment.prepare(small(lora__start="smollm2-svamp"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_begins_with_the_adapter_that_is_named(small, tmp_path):
    targets = ("q_proj", "up_proj")
    config = small(lora__rank=2, lora__targets=targets)
    first = experiment.prepare(config, tmp_path / "first")
    state = experiment.load_state(first)
    start = jax.tree.map(lambda x: x + 1, state.params)
    lora.save(tmp_path / "start", start, first.cfg, state.frozen, config.lora, name="x")
    config = small(lora__rank=2, lora__targets=targets, lora__start=str(tmp_path / "start"))
    state = experiment.load_state(experiment.prepare(config, tmp_path / "second"))
    compare = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(compare, state.params, start)


def test_an_adapter_that_moves_no_token_begins_with_the_models_own(tmp_path):
    """As PEFT writes one, in bfloat16."""
    chosen = settings()
    cfg, base = read("llama", chosen)
    adapter = random_adapter(cfg, chosen)
    lora.save(tmp_path, adapter, cfg, base, chosen, name="base")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {lora.TOKENS: None}))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    halved = {k: jax.numpy.asarray(x, "bfloat16") for k, x in stored.items() if "lora_" in k}
    save_file(halved, tmp_path / "adapter_model.safetensors")
    back = flat(lora.load(str(tmp_path), cfg, base, chosen, "float32"))
    assert not back.pop("embed_tokens/lora_row").any()
    for name, value in back.items():
        np.testing.assert_allclose(value, flat(adapter)[name], rtol=0.01)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token": 9}, "moves the tokens .*7.* decision token is .*9"),
        ({"rank": 1}, "has rank 2: set config.lora.rank to it .now 1."),
        ({"alpha": 4.0}, "has alpha 3.0: set config.lora.alpha"),
        ({"targets": ("q_proj",)}, "has .*down_proj.*: set config.lora.targets"),
        ({"targets": ("q_proj", "v_proj", "down_proj", "o_proj")}, "lacks .*o_proj"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(tmp_path, change, says):
    cfg, base = read("llama", settings())
    adapter = random_adapter(cfg, settings())
    lora.save(tmp_path, adapter, cfg, base, settings(), name="base")
    token = change.get("token", TOKEN)
    chosen = settings(**{key: value for key, value in change.items() if key != "token"})
    with pytest.raises(UserError, match=says):
        lora.load(
            str(tmp_path), dataclasses.replace(cfg, lora_token=token), base, chosen, "float32"
        )


def test_an_adapter_of_another_model_or_none_is_refused(tmp_path):
    cfg, base = read("llama", settings())
    with pytest.raises(UserError, match="has no adapter_config.json: name an adapter's folder"):
        lora.load(str(tmp_path), cfg, base, settings(), "float32")
    adapter = random_adapter(cfg, settings())
    lora.save(tmp_path, adapter, cfg, base, settings(), name="base")
    wider = dataclasses.replace(cfg, hidden_size=2 * cfg.hidden_size)
    with pytest.raises(UserError, match="is config.model.path its model"):
        lora.load(str(tmp_path), wider, base, settings(), "float32")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read the adapter"):
        lora.load(str(tmp_path), cfg, base, settings(), "float32")


# ---------------------------------------------------------------- what is exported


@pytest.mark.slow
def test_export_writes_the_merged_model_or_the_adapter(trained, tmp_path):
    config, workdir, state = trained
    run = experiment.prepare(config, workdir)
    assert export.export_checkpoint(run, tmp_path / "merged", adapter=False) == 4
    merged = hf.load(tmp_path / "merged", run.cfg, "float32")
    want = lora.merge(state.frozen, state.final_params, run.cfg)
    assert run.cfg.lora_scale == 8.0
    jax.tree.map(np.testing.assert_array_equal, merged, want)
    assert export.export_checkpoint(run, tmp_path / "adapter", adapter=True) == 4
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (
        4,
        32.0,
        ["q_proj", "up_proj"],
    )
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 17 and said["trainable_token_indices"] == {"embed_tokens": [27]}
    b = weights["base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"]
    np.testing.assert_array_equal(b, state.final_params["layers"]["mlp"]["up_proj"]["lora_b"][3].T)
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    } <= files and "model.safetensors" not in files
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_of_a_run_without_one_is_refused(small, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no checkpoint"):
        export.main(small(), tmp_path / "none", tmp_path / "out", adapter=True)
    assert not list(tmp_path.iterdir())  # settings that were forgotten may follow
    run = experiment.prepare(small(), tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        export.export_checkpoint(run, tmp_path / "out", adapter=True)
    monkeypatch.setattr(run.checkpoints, "latest", lambda: 1)
    with pytest.raises(UserError, match="is the run's own folder"):
        export.export_checkpoint(run, tmp_path / "out" / "..", adapter=False)
    with pytest.raises(UserError, match="lora.rank=0"):
        export.export_checkpoint(run, tmp_path / "out", adapter=True)


def test_the_adapter_that_a_run_would_begin_with_is_exported(small, tmp_path, capsys):
    chosen = {"lora__rank": 2, "lora__targets": ("q_proj",)}
    run = experiment.prepare(small(**chosen), tmp_path / "a")
    state = experiment.load_state(run)
    start = jax.tree.map(lambda x: x + 0.01, state.params)
    given = tmp_path / "given"
    lora.save(given, start, run.cfg, state.frozen, run.config.lora, name="x")
    (given / "collab_config.json").write_text("{}")
    config = small(**chosen, lora__start=str(given))
    for adapter in (False, True):
        out = tmp_path / f"out-{adapter}"
        assert export.main(config, tmp_path / "empty", out, adapter) == 0
        assert "wrote step 0" in capsys.readouterr().out
        assert (out / "collab_config.json").read_text() == "{}"
        assert "as it was given" in (out / "README.md").read_text()
    again = load_file(tmp_path / "out-True" / "adapter_model.safetensors")
    for name, value in load_file(given / "adapter_model.safetensors").items():
        np.testing.assert_allclose(again[name], value, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_peft_computes_the_same(kind, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    chosen = settings(
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    cfg, base = read(kind, chosen)
    adapter = random_adapter(cfg, chosen)
    lora.save(tmp_path, adapter, cfg, base, chosen, name=str(GOLDEN / kind))
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / kind, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(TOKENS)).logits.tolist()
    np.testing.assert_allclose(logits(lora.join(base, adapter), cfg, TOKENS), theirs, atol=1e-4)
