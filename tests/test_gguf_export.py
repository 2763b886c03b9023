"""GGUF files that are written: read again they are the model, its tokenizer and its template."""

import functools
import json
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from ml_collections import ConfigDict
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocabularies import TEMPLATE, byte_level

from collab_jax import export
from collab_jax.models import attention, bpe, decoder, gguf_export, gguf_tokenizer, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.models.gguf_layout import permute, unpermute
from collab_jax.rl import experiment
from collab_jax.routing import calibration, collab_config
from collab_jax.runtime.errors import UserError

MARKER = "<unknown> I need external assistance </unknown>"
SPECIAL = ["<|pad|>", "<|end|>", "<|eot|>", "<|reserved_5|>", "<|begin|>"]
PAD, END, EOT, RESERVED, BEGIN = range(len(SPECIAL))
CORPUS = ["<think> we answer 12 </think><answer> 3 </answer>\n", "so it is.\n\n<unknown> .<"] * 9
SETTINGS = dict(
    marker=MARKER,
    decision_token="<|reserved_5|>",
    pad="<|pad|>",
    eos=("<|end|>", "<|eot|>"),
    decide_after_answer=False,
)
ROWS = 320  # of the embedding, some without a token
DEFAULT = dict(rope_type="default", rope_theta=5e5)
LLAMA3 = DEFAULT | dict(
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
CONFIGS = {
    "llama": dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-biases": dict(
        rope_parameters=DEFAULT, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "qwen2": dict(rope_parameters=DEFAULT, tie_word_embeddings=False),
    "qwen3": dict(rope_parameters=DEFAULT, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Converted models lie in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tokenizer_for(kind, **changes):
    """A small tokenizer that cuts as the family does."""
    cut = "smollm2" if kind == "llama" else "qwen2.5"
    inner = byte_level(cut, CORPUS, 300, SPECIAL)
    if kind != "llama":
        inner.normalizer = normalizers.NFC()
    return wrapped(inner, pad_token="<|pad|>", eos_token="<|end|>", **changes)


def wrapped(inner, **special):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model(name, **changes):
    """(config.json's contents, config, random parameters) of a tiny model."""
    config = dict(
        model_type=name.partition("-")[0],
        vocab_size=ROWS,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=3e-5,
        max_position_embeddings=512,
    )
    config |= CONFIGS[name] | changes
    cfg = hf.config_from_hf(config)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0))))
    draw = np.random.default_rng(0)
    values = [draw.standard_normal(leaf.shape).astype(np.float32) / 8 for leaf in leaves]
    return config, cfg, jax.tree.unflatten(tree, values)


def of_layer(params, i):
    return jax.tree.map(lambda x: x[i], params["layers"])


def text_of(tokenizer, folder, **settings):
    tokenizer.save_pretrained(folder)
    return text_lib.load(folder, ConfigDict(SETTINGS | settings))


def written(tmp_path, name, kind, **changes):
    """(config, cfg, params, text, file) of a tiny model that was written."""
    config, cfg, params = model(name, **changes)
    text = text_of(tokenizer_for(config["model_type"]), tmp_path / "tokenizer")
    file = tmp_path / "a.gguf"
    gguf_export.write(file, params, cfg, config, text, kind=kind, name="a")
    return config, cfg, params, text, file


def read(file):
    """(cfg, params, text) by our own reader."""
    folder = hf.locate(str(file))
    cfg = hf.config_from_hf(hf.read_config(folder))
    return cfg, hf.load(folder, cfg, "float32"), text_lib.load(folder, ConfigDict(SETTINGS))


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@functools.partial(jax.jit, static_argnums=1)
def logits(params, cfg, ids):
    real = jnp.ones(ids.shape, bool)
    hidden, _ = decoder.forward(
        params, cfg, ids, decoder.positions_of(real), attention.causal(real)
    )
    return decoder.logits(params, cfg, hidden)


def greedy(cfg, params, text, prompt, steps=6):
    """The text that a model goes on with."""
    written = text.prompt_ids([{"role": "user", "content": prompt}])
    ids = np.array([written + [text.pad_id] * steps])  # what comes later is not seen
    for at in range(len(written), ids.shape[1]):
        ids[0, at] = logits(params, cfg, ids)[0, at - 1].argmax()
    response = ids[:, len(written) :]
    return text.decode(response, np.ones(response.shape, bool))


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_in_f32_is_the_model_bit_for_bit(name, tmp_path):
    _, cfg, params, text, file = written(tmp_path, name, "f32")
    again_cfg, again, again_text = read(file)
    assert again_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for sample in ("so it is. 1234\n\n <think>é e\u0301</think>", "<|begin|> x<|reserved_5|>"):
        ids = text.tokenizer.encode(sample)
        assert again_text.tokenizer.encode(sample) == ids
    assert again_text.tokenizer.chat_template == text.tokenizer.chat_template
    for of in ("eos_ids", "pad_id", "decision_id", "marker_ids"):
        assert getattr(again_text, of) == getattr(text, of)
    assert greedy(again_cfg, again, again_text, "so 12") == greedy(cfg, params, text, "so 12")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_matrices_are_rounded_to_the_type_and_nothing_else_is(kind, tmp_path):
    """down_proj has rows of 40, which are no whole blocks of 32."""
    _, cfg, params, _, file = written(tmp_path, "qwen2", kind, intermediate_size=40)
    _, again, _ = read(file)
    block = of_layer(again, 1)

    def rounded(weight, kind):
        return gguf.dequantize(gguf.quantize(np.ascontiguousarray(weight.T), kind), kind).T

    of = Q[kind.upper()]
    for module, name in (("self_attn", "k_proj"), ("mlp", "up_proj")):
        weight = of_layer(params, 1)[module][name]["kernel"]
        np.testing.assert_array_equal(block[module][name]["kernel"], rounded(weight, of))
    embedding = params["embed_tokens"]["embedding"]
    want = rounded(embedding.T, of).T
    np.testing.assert_array_equal(again["embed_tokens"]["embedding"], want)
    head = Q.Q8_0 if of == Q.Q4_0 else of
    want = rounded(params["lm_head"]["kernel"], head)
    np.testing.assert_array_equal(again["lm_head"]["kernel"], want)
    down = of_layer(params, 1)["mlp"]["down_proj"]["kernel"]
    want = rounded(down, Q.F16 if of in (Q.Q8_0, Q.Q4_0) else of)
    np.testing.assert_array_equal(block["mlp"]["down_proj"]["kernel"], want)
    for module, leaf in (("input_layernorm", "scale"), ("post_attention_layernorm", "scale")):
        np.testing.assert_array_equal(block[module][leaf], of_layer(params, 1)[module][leaf])
    bias = of_layer(params, 1)["self_attn"]["q_proj"]["bias"]
    np.testing.assert_array_equal(block["self_attn"]["q_proj"]["bias"], bias)
    assert fields(file)["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}[kind]


def test_roundings_have_the_size_that_their_type_says(tmp_path):
    _, _, params, _, file = written(tmp_path, "qwen3", "q8_0")
    _, again, _ = read(file)
    weight = of_layer(params, 0)["mlp"]["up_proj"]["kernel"].T.reshape(-1, 32)
    error = of_layer(again, 0)["mlp"]["up_proj"]["kernel"].T.reshape(-1, 32) - weight
    steps = np.abs(weight).max(1, keepdims=True) / 127
    assert (np.abs(error) <= 0.51 * steps + 127 * steps * 2**-11).all() and np.abs(error).max() > 0


def test_a_tied_head_is_not_in_four_bits(tmp_path):
    *_, file = written(tmp_path, "qwen3", "q4_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == Q.Q8_0 and "output.weight" not in kinds
    assert kinds["blk.0.ffn_up.weight"] == Q.Q4_0 and kinds["blk.1.attn_q_norm.weight"] == Q.F32


def test_llamas_queries_and_keys_are_interleaved_and_no_others(tmp_path):
    """Rows of a head go 0, H/2, 1, H/2 + 1, ... as llama.cpp rotates neighbours."""
    np.testing.assert_array_equal(permute(np.arange(12), 2), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])
    np.testing.assert_array_equal(unpermute(permute(np.arange(12), 2), 2), np.arange(12))
    for name, first in (("llama-biases", [0, 32, 1, 33]), ("qwen2", [0, 1, 2, 3])):
        _, _, params, _, file = written(tmp_path, name, "f32")
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        for theirs, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
            leaves = of_layer(params, 0)["self_attn"][ours]
            stored = tensors[f"blk.0.{theirs}.weight"]
            np.testing.assert_array_equal(stored[:4], leaves["kernel"].T[first])
            np.testing.assert_array_equal(
                tensors[f"blk.0.{theirs}.bias"][:4], leaves["bias"][first]
            )
        value = of_layer(params, 0)["self_attn"]["v_proj"]["kernel"].T
        np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], value)


def test_llama3s_rope_scaling_is_a_tensor_of_divisors(tmp_path):
    *_, file = written(tmp_path, "llama", "f16")
    (tensor,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    wavelength = 2 * math.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    assert tensor.tensor_type == Q.F32
    assert (tensor.data[wavelength < 8192 / 4] == 1).all()
    np.testing.assert_allclose(tensor.data[wavelength > 8192], 32, rtol=1e-6)
    between = tensor.data[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(between) and ((between > 1) & (between < 32)).all()


# ---------------------------------------------------------------- the metadata


def test_the_metadata_say_all_that_llama_cpp_asks_for(tmp_path):
    *_, text, file = written(tmp_path, "llama", "q8_0")
    found = fields(file)
    tokens, kinds = (found.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    merges = found.pop("tokenizer.ggml.merges")
    assert {key: value for key, value in found.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 96,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(3e-5)),
        "llama.rope.freq_base": 5e5,
        "llama.rope.dimension_count": 64,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.eot_token_id": EOT,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    known = text.tokenizer.get_vocab()
    assert len(tokens) == len(kinds) == ROWS > len(known)
    assert {token: i for i, token in enumerate(tokens) if i < len(known)} == known
    assert kinds[len(known) :] == [bpe.UNUSED] * (ROWS - len(known))
    assert len(set(tokens)) == ROWS
    assert kinds[:6] == [bpe.CONTROL] * 3 + [bpe.USER_DEFINED, bpe.CONTROL, bpe.NORMAL]
    inner = json.loads(text.tokenizer.backend_tokenizer.to_str())["model"]
    assert merges == [" ".join(pair) for pair in inner["merges"]]


def test_bos_is_the_tokenizers_or_the_configs_and_is_added_where_the_tokenizer_does(tmp_path):
    plain = text_of(tokenizer_for("llama"), tmp_path / "plain")
    assert "tokenizer.ggml.bos_token_id" not in gguf_tokenizer.metadata(plain, ROWS, None)
    found = gguf_tokenizer.metadata(plain, ROWS, BEGIN)
    assert found["tokenizer.ggml.bos_token_id"] == BEGIN
    assert found["tokenizer.ggml.add_bos_token"] is False
    inner = bpe.make(*vocabulary(), "llama-bpe", "<|begin|>", None)
    adding = wrapped(inner, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|begin|>")
    found = gguf_tokenizer.metadata(text_of(adding, tmp_path / "adding"), ROWS, None)
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.bos_token_id"] == BEGIN
    assert found["tokenizer.ggml.add_bos_token"] is True


def vocabulary():
    """(tokens, types, merges) of a tokenizer."""
    inner = tokenizer_for("llama").backend_tokenizer
    tokens = sorted(inner.get_vocab(), key=inner.get_vocab().__getitem__)
    kinds = [bpe.CONTROL] * len(SPECIAL) + [bpe.NORMAL] * (len(tokens) - len(SPECIAL))
    return tokens, kinds, [" ".join(p) for p in json.loads(inner.to_str())["model"]["merges"]]


@pytest.mark.parametrize("name", bpe.PRE_TOKENIZERS)
def test_a_pre_tokenizer_is_known_by_how_it_cuts(name):
    found = bpe.name_of(bpe.make(*vocabulary(), name, None, None))
    assert found == ("qwen2" if name in bpe.QWEN2 else name)


def test_it_does_not_matter_how_a_pre_tokenizer_is_worded():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert bpe.name_of(inner) == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, inner.pre_tokenizer])
    assert bpe.name_of(inner) == "smollm"


# ---------------------------------------------------------------- what cannot be written


def unigram():
    inner = Tokenizer(models.Unigram([("<|pad|>", 0.0), ("<|end|>", 0.0), ("a", -1.0)], 0))
    inner.decoder = decoders.Fuse()
    return inner


def whitespace():
    inner = byte_level("smollm2", CORPUS, 300, SPECIAL)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return inner


def stripping():
    inner = byte_level("smollm2", CORPUS, 300, SPECIAL)
    inner.add_special_tokens([AddedToken("<|mask|>", lstrip=True)])
    return inner


@pytest.mark.parametrize(
    ("make", "rows", "says"),
    [
        (unigram, ROWS, "it is of the kind Unigram"),
        (whitespace, ROWS, "its pre-tokenizer is none of those that are known: gpt-2, smollm"),
        (stripping, ROWS, "it does more than its vocabulary and merges say"),
        (lambda: byte_level("smollm2", CORPUS, 300, SPECIAL), 100, "the model has 100 rows, none"),
    ],
    ids=["unigram", "whitespace", "stripping", "rows"],
)
def test_a_tokenizer_that_llama_cpp_has_no_form_for_is_refused(make, rows, says):
    with pytest.raises(bpe.TokenizerError, match=says):
        gguf_tokenizer._vocabulary(make(), rows, None, None)


def test_a_refusal_is_one_line_that_says_what_to_do_and_leaves_nothing(tmp_path):
    config, cfg, params = model("llama")
    text = text_of(wrapped(whitespace(), pad_token="<|pad|>"), tmp_path / "tokenizer")
    with pytest.raises(
        UserError, match="no form for this tokenizer .*export --out FOLDER"
    ) as error:
        gguf_export.write(tmp_path / "a.gguf", params, cfg, config, text, kind="f16", name="a")
    assert "\n" not in str(error.value) and not [*tmp_path.glob("a.gguf*")]


def test_more_ends_than_gguf_has_places_for_are_refused(tmp_path):
    ends = ("<|end|>", "<|eot|>", "<|begin|>", "<think>")
    inner = byte_level("smollm2", CORPUS, 300, [*SPECIAL, "<think>"])
    text = text_of(wrapped(inner, pad_token="<|pad|>"), tmp_path / "tokenizer", eos=ends)
    with pytest.raises(UserError, match="eos names 4 tokens, and GGUF has places for 3"):
        gguf_tokenizer.metadata(text, ROWS, None)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen2", dict(rope_parameters=LLAMA3), "no Llama 3 rope scaling for 'qwen2'"),
        ("qwen3", dict(attention_bias=True), r"no 'blk.0.attn_\w+.bias' in a 'qwen3'"),
        ("llama", dict(max_position_embeddings=None), "lacks max_position_embeddings"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute_is_refused(name, changes, says, tmp_path):
    with pytest.raises(UserError, match=says):
        written(tmp_path, name, "f16", **changes)
    assert not [*tmp_path.glob("a.gguf*")]


def test_a_value_that_f16_cannot_hold_is_refused(tmp_path):
    config, cfg, params = model("llama")
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 0, 0] = 7e4
    text = text_of(tokenizer_for("llama"), tmp_path / "tokenizer")
    with pytest.raises(UserError, match="'blk.1.ffn_up.weight' has values that f16 cannot hold"):
        gguf_export.write(tmp_path / "a.gguf", params, cfg, config, text, kind="f16", name="a")
    assert not [*tmp_path.glob("a.gguf*")]
    gguf_export.write(tmp_path / "a.gguf", params, cfg, config, text, kind="bf16", name="a")


# ---------------------------------------------------------------- word tokenizers


def longest_first(text, words):
    """The ids of a text, of which llama.cpp cuts user-defined tokens, the longest everywhere."""
    pieces = [text]
    for word in sorted(words, key=lambda word: -len(word)):
        cut = []
        for piece in pieces:
            if isinstance(piece, int):
                cut.append(piece)
                continue
            first, *rest = piece.split(word)
            cut.append(first)
            for part in rest:
                cut += [words[word], part]
        pieces = cut
    assert not any(piece for piece in pieces if isinstance(piece, str))  # nothing is left
    return [piece for piece in pieces if isinstance(piece, int)]


def test_a_word_tokenizer_is_a_vocabulary_of_user_defined_tokens(tmp_path):
    words = [*text_lib.TAGS, "<unknown>", " I need external assistance ", "</unknown>", "="]
    words += [" ", "\n", "+", *"0123456789"]
    tokenizer = text_lib.word_tokenizer(words, "<pad>", "<eos>", "<unk>")
    settings = dict(decision_token="<unknown>", pad="<pad>", eos=("<eos>",))
    text = text_of(tokenizer, tmp_path / "tokenizer", **settings)
    found = gguf_tokenizer.metadata(text, ROWS, None)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[: 3 + len(words)] == ["<pad>", "<eos>", "<unk>", *words]
    assert kinds[: 3 + len(words)] == [bpe.CONTROL] * 3 + [bpe.USER_DEFINED] * len(words)
    assert found["tokenizer.ggml.unknown_token_id"] == 2
    again = bpe.make(tokens, kinds, found["tokenizer.ggml.merges"], "gpt-2", None, False)
    draw = np.random.default_rng(0)
    ids = {token: i for i, token in enumerate(tokens[: 3 + len(words)])}
    for _ in range(200):
        sample = "".join(draw.choice(words, 20))
        want = text.tokenizer.encode(sample)
        assert again.encode(sample).ids == longest_first(sample, ids) == want


def test_words_that_llama_cpp_would_cut_otherwise_are_refused():
    for words in (["ab", "bcd", "a"], ["12", "23"]):
        inner = text_lib.word_tokenizer(words, "<pad>", "<eos>", "<unk>").backend_tokenizer
        says = f"its word {words[0]!r} may end where {words[1]!r} begins"
        with pytest.raises(bpe.TokenizerError, match=says):
            gguf_tokenizer._vocabulary(inner, ROWS, None, None)
    inner = text_lib.word_tokenizer(["abc", "cd"], "<pad>", "<eos>", "<unk>").backend_tokenizer
    assert gguf_tokenizer._vocabulary(inner, ROWS, None, None)["pre"] == "gpt-2"


# ---------------------------------------------------------------- the command


def calibrated(folder, token):
    margins = np.linspace(-2, 2, 41)
    found = calibration.bias_for_rate(margins, np.ones(41, bool), 0.3, None)
    config = collab_config.to_config(found, margins, np.ones(41, bool), decision_token=token)
    collab_config.write(folder, config)
    return config["bias"]


def test_a_run_is_exported_merged_and_its_card_has_the_calibrated_bias(small, tmp_path, capsys):
    run = experiment.prepare(small(lora__rank=2, lora__targets=("q_proj",)), tmp_path / "run")
    state = experiment.load_state(run)
    trained = jax.tree.map(lambda x: x + 0.01, state.params)
    run.checkpoints.save(3, state.replace(params=trained, frozen=None))
    out = tmp_path / "out"
    bias = calibrated(out, "<unknown>")
    config, workdir = run.config, run.workdir
    assert export.main_gguf(config, workdir, out / "tiny.gguf", "f32") == 0
    assert "wrote step 3 to " in capsys.readouterr().out
    folder = hf.locate(str(out / "tiny.gguf"))
    again = hf.load(folder, hf.config_from_hf(hf.read_config(folder)), "float32")
    want = lora.merge(state.frozen, experiment.load_state(run).final_params, run.cfg)
    jax.tree.map(np.testing.assert_array_equal, again, want)
    difference = want["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (difference != state.frozen["layers"]["self_attn"]["q_proj"]["kernel"]).all()
    card = (out / "tiny.md").read_text()
    assert f'"logit_bias": {{"27": {bias}}}' in card and f"The bias {bias} is that of" in card
    assert "llama-server -m tiny.gguf --jinja\n" in card and "FROM ./tiny.gguf\n" in card
    calibrated(out, None)  # as `calibrate` writes it where it is not told the token
    export.export_gguf(run, out / "tiny.gguf", "q4_0")
    assert f'"logit_bias": {{"27": {bias}}}' in (out / "tiny.md").read_text()
    calibrated(out, "<another>")
    export.export_gguf(run, out / "tiny.gguf", "q4_0")
    card = (out / "tiny.md").read_text()
    assert '"logit_bias"' not in card and "another export has it here" in card


def test_the_adapter_that_a_run_would_begin_with_is_exported_with_its_bias(small, tmp_path):
    chosen = {"lora__rank": 2, "lora__targets": ("q_proj",)}
    run = experiment.prepare(small(**chosen), tmp_path / "a")
    state = experiment.load_state(run)
    given = tmp_path / "given"
    lora.save(given, state.params, run.cfg, state.frozen, run.config.lora, name="x")
    bias = calibrated(given, "<unknown>")
    config = small(**chosen, lora__start=str(given))
    assert export.main_gguf(config, tmp_path / "empty", tmp_path / "b.gguf", "f16") == 0
    card = (tmp_path / "b.md").read_text()
    assert f'"logit_bias": {{"27": {bias}}}' in card and "as it was given" in card
    own = tmp_path / collab_config.NAME  # found by this file's records
    own.write_text((given / collab_config.NAME).read_text().replace(f"{bias}", "-1.25", 1))
    assert export.main_gguf(config, tmp_path / "empty", tmp_path / "b.gguf", "f16") == 0
    assert '"logit_bias": {"27": -1.25}' in (tmp_path / "b.md").read_text()


def test_what_cannot_be_exported_as_gguf_is_told(small, tmp_path):
    with pytest.raises(UserError, match="a.bin does not end in .gguf"):
        export.main_gguf(small(), tmp_path, tmp_path / "a.bin", "f16")
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        export.main_gguf(small(), tmp_path / "run", tmp_path / "a.gguf", "f16")
    (tmp_path / "taken").write_text("a file")
    run = experiment.prepare(small(), tmp_path / "run")
    run.checkpoints.save(1, experiment.load_state(run))
    with pytest.raises(UserError, match="cannot write .*taken.*: choose another --gguf"):
        export.export_gguf(run, tmp_path / "taken" / "a.gguf", "f16")


# ---------------------------------------------------------------- others' reading and writing


@pytest.mark.slow
@pytest.mark.long
def test_smollm2_is_written_as_llama_cpp_wrote_it(smollm2_file, tmp_path):
    """Its file was made by llama.cpp's own converter: each value, and all that is said of it."""
    folder = hf.locate("smollm2-135m")
    config = hf.read_config(folder)
    cfg = hf.config_from_hf(config)
    auto = dict.fromkeys(SETTINGS, "auto") | {"marker": MARKER, "decide_after_answer": False}
    text = text_lib.load(folder, ConfigDict(auto))
    file, params = tmp_path / "again.gguf", hf.load(folder, cfg, "float32")
    gguf_export.write(file, params, cfg, config, text, kind="f32", name="again")
    theirs, ours = fields(smollm2_file), fields(file)
    types = theirs.pop("tokenizer.ggml.token_type")
    types[text.decision_id] = bpe.USER_DEFINED
    assert ours["tokenizer.ggml.token_type"] == types
    chosen = ("general.name", "general.file_type", "tokenizer.ggml.padding_token_id")
    for key in (theirs.keys() & ours.keys()) - {*chosen}:
        if not key.startswith("GGUF."):
            assert ours[key] == theirs[key], key
    missing = theirs.keys() - ours.keys() - {"tokenizer.ggml.add_space_prefix"}
    assert all(key.startswith("general.") for key in missing)
    again = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for tensor in gguf.GGUFReader(smollm2_file).tensors:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(again.pop(tensor.name).data, want, err_msg=tensor.name)
    assert not again


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(name, tmp_path):
    """It reads no rope factors, no biases of a Llama, and no head size where that is a default."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = dict(rope_parameters=DEFAULT, head_dim=dict(llama=64, qwen2=24, qwen3=128)[name])
    _, cfg, params, text, file = written(tmp_path, name, "f32", **changes)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, attn_implementation="eager", dtype=torch.float32
    )
    ids = np.arange(12)[None] % ROWS
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        ours = logits(params, cfg, ids)
    np.testing.assert_allclose(ours, want, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    sample = "so it is. 12 <think>é</think>"
    if name.startswith("qwen"):  # Llama's files are read with SentencePiece's rules or Llama 3's
        assert tokenizer.encode(sample) == text.tokenizer.encode(sample)
    assert tokenizer.chat_template == text.tokenizer.chat_template
