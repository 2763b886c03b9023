"""GGUF files: the model, the tokenizer and the template that a file holds, and each way it fails.

Files are written here, by the `gguf` package's writer and names; what is expected is worked out
here, apart from what is tested.
"""

import gzip
import json
import math
import re
import resource
import tempfile

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
from conftest import ROOT
from gguf import GGMLQuantizationType as Q
from transformers import AutoTokenizer

from collab_jax import export
from collab_jax.models import attention, bpe, decoder, hf, shards
from collab_jax.models import gguf as gguf_lib
from collab_jax.models.blocks import empty, unstacked
from collab_jax.models.decoder_config import RopeScaling
from collab_jax.rl import experiment
from collab_jax.runtime.errors import UserError

DATA = ROOT.parent / "shared" / "data"
SIZES = dict(
    num_hidden_layers=2,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Converted models lie in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "collab_jax" / "models"


# ---------------------------------------------------------------- a vocabulary to write


def byte_letters():
    """GPT-2's letter for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


LETTERS = byte_letters()
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "12 3", "Ġ 1", "Ã ©", "Ċ Ċ", "a n", "an d", "' s"]
TOKENS = [
    *LETTERS.values(),
    *(merge.replace(" ", "") for merge in MERGES),
    "whole",  # no merges lead here
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "[PAD0]",
]
KINDS = [1] * (len(TOKENS) - 4) + [3, 3, 4, 5]
START, END, THINK, PAD = range(len(TOKENS) - 4, len(TOKENS))


def reference_ids(text, pieces_of):
    """The tokens of a text without added tokens: the merge of lowest rank first, in each piece."""
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(MERGES)}
    return bpe_ids(text, pieces_of, {t: i for i, t in enumerate(TOKENS)}, rank)


def bpe_ids(text, pieces_of, vocabulary, rank):
    ids = []
    for piece in pieces_of(text):
        parts = [LETTERS[b] for b in piece.encode()]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda p: rank.get(p, math.inf))
            if best not in rank:
                break
            joined, i = [], 0
            while i < len(parts):
                n = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + n]))
                i += n
            parts = joined
        ids += [vocabulary[part] for part in parts]
    return ids


# ---------------------------------------------------------------- a file to write


def hf_config(kind, **changes):
    rope = dict(rope_type="default", rope_theta=5e5)
    tied = kind != "qwen2"
    return (
        SIZES
        | dict(model_type=kind, vocab_size=len(TOKENS), rms_norm_eps=1e-5)
        | dict(rope_parameters=rope, tie_word_embeddings=tied, max_position_embeddings=512)
        | changes
    )


def hf_weights(config):
    """Random weights by their name in a Hugging Face folder, [out, in]."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: decoder.init(hf.config_from_hf(config), jax.random.key(0)))
    weights = {}
    for names, leaf in unstacked(empty(shapes, "float32")).items():
        shape = leaf.shape[::-1] if names[-1] == "kernel" else leaf.shape
        stem = ".".join(names[:-1])
        prefix = "" if stem == "lm_head" else "model."
        leaf_name = "bias" if names[-1] == "bias" else "weight"
        value = draw.standard_normal(shape) / 8
        weights[f"{prefix}{stem}.{leaf_name}"] = value.astype(np.float32)
    return weights


def permuted(weight, heads):
    """Rows of a head in llama.cpp's order: 0, H/2, 1, H/2 + 1, ..."""
    H = len(weight) // heads
    order = [
        h * H + half * H // 2 + i for h in range(heads) for i in range(H // 2) for half in (0, 1)
    ]
    return weight[order]


def quantized(weight, kind):
    """The bytes of a matrix in this type; K-quants, which the package only reads, by chance."""
    try:
        return gguf.quantize(weight, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*weight.shape[:-1], weight.shape[-1] // block, size)
        data = np.random.default_rng(weight.size).integers(0, 256, shape, np.uint8)
        scale = np.frombuffer(np.array([3e-4, 2e-4], "<f2").tobytes(), np.uint8)
        data[..., :4] = data[..., -4:] = scale  # a block's scales are its first bytes or its last
        return data.reshape(*weight.shape[:-1], -1)


def write(file, config, weights, quant=Q.F32, tensors=None, **metadata):
    """Writes a GGUF file of a model; tensors and metadata are added, or taken away by None."""
    kind = config["model_type"]
    writer = gguf.GGUFWriter(file, kind)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind),
        config["num_hidden_layers"],
    )
    values = {
        f"{kind}.context_length": 512,
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": config["head_dim"],
        f"{kind}.attention.value_length": config["head_dim"],
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{kind}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if kind == "llama" else "qwen2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": START,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.chat_template": TEMPLATE,
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int) and value < 0:
            writer.add_int32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    all_tensors = {}
    for name, weight in weights.items():
        stem, _, leaf = name.rpartition(".")
        if kind == "llama" and ".q_proj" in name:
            weight = permuted(weight, config["num_attention_heads"])
        if kind == "llama" and ".k_proj" in name:
            weight = permuted(weight, config["num_key_value_heads"])
        all_tensors[f"{names.get_name(stem)}.{leaf}"] = weight
    for name, weight in (all_tensors | (tensors or {})).items():
        if weight is None:
            continue
        if weight.ndim == 2 and quant != Q.F32:
            writer.add_tensor(name, quantized(weight, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read(folder):
    cfg = hf.config_from_hf(hf.read_config(folder))
    return cfg, hf.load(folder, cfg, "float32")


def logits(cfg, params):
    tokens = jnp.arange(24).reshape(2, 12) % len(TOKENS)
    real = jnp.ones(tokens.shape, bool)
    hidden, _ = decoder.forward(
        params, cfg, tokens, decoder.positions_of(real), attention.causal(real)
    )
    return np.asarray(decoder.logits(params, cfg, hidden))


def write_folder(folder, config, weights):
    """The same weights as a Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {name: weight.nbytes for name, weight in weights.items()}
    shards.write(folder, sizes, lambda name: weights[name])
    return folder


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "config",
    [
        hf_config("llama"),
        hf_config("llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        hf_config("qwen2"),
        hf_config("qwen3"),
    ],
    ids=["llama", "llama-untied-biases", "qwen2-untied", "qwen3"],
)
def test_the_model_is_that_of_a_hugging_face_folder(config, tmp_path):
    weights = hf_weights(config)
    cfg, params = read(hf.locate(str(write(tmp_path / "a.gguf", config, weights))))
    want_cfg, want = read(write_folder(tmp_path / "folder", config, weights))
    assert cfg == want_cfg
    jax.tree.map(np.testing.assert_array_equal, params, want)
    np.testing.assert_array_equal(logits(cfg, params), logits(want_cfg, want))


def dequantized(data, kind):
    """Values of rows of bytes, by the definition of the format; K-quants by the package."""
    half = lambda b: np.ascontiguousarray(b).view("<f2").astype(np.float32)  # noqa: E731
    nibbles = lambda b: np.concatenate([b & 15, b >> 4], -1).astype(np.float32)  # noqa: E731
    if kind == Q.F32:
        return data
    if kind == Q.F16:
        return data.astype(np.float32)
    if kind == Q.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(*data.shape[:-1], -1, gguf.GGML_QUANT_SIZES[kind][1])
    if kind == Q.Q8_0:
        values = half(blocks[..., :2]) * blocks[..., 2:].view(np.int8).astype(np.float32)
    elif kind == Q.Q4_0:
        values = half(blocks[..., :2]) * (nibbles(blocks[..., 2:]) - 8)
    elif kind == Q.Q4_1:
        values = half(blocks[..., :2]) * nibbles(blocks[..., 4:]) + half(blocks[..., 2:4])
    else:
        return gguf.dequantize(data, kind)
    return values.reshape(*data.shape[:-1], -1)


@pytest.mark.parametrize(
    "quant",
    [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K],
    ids=lambda quant: quant.name,
)
def test_quantized_weights_are_their_values_bit_for_bit(quant, tmp_path):
    config = hf_config("qwen2")  # whose rows are in one order everywhere
    weights = hf_weights(config)
    _, params = read(hf.locate(str(write(tmp_path / "a.gguf", config, weights, quant))))
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
        want = dequantized(quantized(weights[f"{name}.weight"], quant), quant)
        path = (*name.removeprefix("model.").split("."), "kernel")
        np.testing.assert_array_equal(unstacked(params)[path], want.T)
        assert np.isfinite(want).all() and want.std() > 1e-3
    norm = params["layers"]["input_layernorm"]["scale"][0]
    np.testing.assert_array_equal(norm, weights["model.layers.0.input_layernorm.weight"])


def llama3_factors(factor, low=1.0, high=4.0, context=8192):
    """What Llama 3 divides its 32 frequencies by, as Meta words it: by wavelength."""
    factors = []
    for i in range(0, 64, 2):
        wavelength = 2 * math.pi * 5e5 ** (i / 64)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3s_rope_scaling_is_read_from_its_tensor_and_another_refused(tmp_path):
    config = hf_config("llama")
    weights = hf_weights(config)
    scaled = {"rope_freqs.weight": llama3_factors(32.0)}
    cfg, _ = read(hf.locate(str(write(tmp_path / "a.gguf", config, weights, tensors=scaled))))
    assert cfg.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    for factors in (
        llama3_factors(8.0, context=4096),
        np.full(32, 4, np.float32),
        np.ones(8, "f4"),
    ):
        other = {"rope_freqs.weight": factors}
        file = write(tmp_path / "b.gguf", config, weights, tensors=other)
        with pytest.raises(UserError, match="rope_freqs.weight is not Llama 3's rope scaling"):
            hf.locate(str(file))


# ---------------------------------------------------------------- the tokenizer

TEXT = "I'LL say 1234  x\n\n y!"
PIECES = {
    "gpt-2": ["I", "'", "LL", " say", " 1234", " ", " x", "\n\n", " y", "!"],
    "smollm": ["I", "'", "LL", " say", " ", *"1234", " ", " x", "\n\n", " y", "!"],
    "llama-bpe": ["I", "'LL", " say", " ", "123", "4", " ", " x", "\n\n", " y", "!"],
    "qwen2": ["I", "'LL", " say", " ", *"1234", " ", " x", "\n\n", " y", "!"],
    "default": ["I", "'", "LL", " say", " ", "123", "4", " ", " x", "\n\n", " y", "!"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_each_pre_tokenizer_cuts_as_its_model_did(pre):
    made = bpe.make(TOKENS, KINDS, MERGES, pre, bos=None, adds_bos=None)
    cut = [TEXT[start:end] for _, (start, end) in made.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert cut == PIECES[pre]


def tokenizer_of(tmp_path, kind="llama", **metadata):
    config = hf_config(kind, num_hidden_layers=1)
    file = write(tmp_path / "t.gguf", config, hf_weights(config), **metadata)
    return AutoTokenizer.from_pretrained(hf.locate(str(file)))


def smollm_pieces(text):
    """Each digit alone, and between digits as GPT-2 cuts."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return [
        piece
        for part in regex.findall(r"\p{N}|[^\p{N}]+", text)
        for piece in regex.findall(gpt2, part)
    ]


def qwen2_pieces(text):
    """As in Qwen2's tokenizer.json."""
    return regex.findall(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        text,
    )


@pytest.mark.parametrize(
    ("kind", "pieces_of"),
    [("llama", smollm_pieces), ("qwen2", qwen2_pieces), ("qwen3", qwen2_pieces)],
)
def test_ids_are_those_of_the_merges_and_decode_to_the_text(tmp_path, kind, pieces_of):
    tokenizer = tokenizer_of(tmp_path, kind)
    draw = np.random.default_rng(0)
    alphabet = ["the", " the", "and", "12", "3", " 1", "é", "'s", "\n\n", " ", "  ", "ß", "数", "³"]
    for _ in range(200):
        text = "".join(draw.choice(alphabet, 12))
        ids = tokenizer.encode(text)
        assert ids == reference_ids(text, pieces_of), text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_added_tokens_template_and_special_tokens_are_the_files(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("<|im_start|>a<think>") == [START, TOKENS.index("a"), THINK]
    assert tokenizer.decode([END, THINK], skip_special_tokens=True) == "<think>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (START, END)
    assert tokenizer.pad_token_id is None
    assert tokenizer.chat_template == TEMPLATE
    assert PAD not in tokenizer.get_vocab().values()  # a row of the model, and no token
    messages = [{"role": "user", "content": "the"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == [START, TOKENS.index("t"), TOKENS.index("he"), TOKENS.index("Ċ")]


def test_bos_begins_a_text_where_the_file_or_else_its_pre_tokenizer_says_so(tmp_path):
    letter = TOKENS.index("a")
    for pre, adds, want in (
        ("smollm", None, [letter]),
        ("smollm", True, [START, letter]),
        ("llama-bpe", None, [START, letter]),
        ("llama-bpe", False, [letter]),
    ):
        changes = {"tokenizer__ggml__pre": pre, "tokenizer__ggml__add_bos_token": adds}
        assert tokenizer_of(tmp_path, **changes).encode("a") == want, (pre, adds)


def test_llama3_takes_a_piece_that_is_a_token_whole_and_qwen_composes(tmp_path):
    encoded = {
        pre: tokenizer_of(tmp_path, tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=False)
        for pre in ("llama-bpe", "qwen2")
    }
    assert encoded["llama-bpe"].encode("whole") == [TOKENS.index("whole")]
    assert encoded["qwen2"].encode("whole") == [TOKENS.index(letter) for letter in "whole"]
    composed = [TOKENS.index("Ã©")]
    assert encoded["qwen2"].encode("e\u0301") == composed
    assert encoded["llama-bpe"].encode("e\u0301") != composed


def test_every_token_that_ends_a_response_is_in_the_generation_config(tmp_path):
    config = hf_config("llama", num_hidden_layers=1)
    more = {"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": END}
    folder = hf.locate(str(write(tmp_path / "a.gguf", config, hf_weights(config), **more)))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [END, 7]


# ---------------------------------------------------------------- a run from a file


def test_a_run_from_a_file_exports_a_model_or_an_adapter_that_names_the_file(small, tmp_path):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config), Q.Q4_1)
    settings = small(
        model__path=str(file),
        lora__rank=2,
        text__pad="<think>",
        text__eos=("<|im_end|>",),
        text__decision_token="<|im_start|>",
        prompt_length=512,
    )
    run = experiment.prepare(settings, tmp_path / "run")
    state = experiment.load_state(run)
    run.checkpoints.save(1, state.replace(frozen=None))
    export.export_checkpoint(run, tmp_path / "merged", adapter=False)
    _, merged = read(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, merged, state.frozen)  # an adapter begins at zero
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("the<think>") == run.text.tokenizer.encode("the<think>")
    export.export_checkpoint(run, tmp_path / "adapter", adapter=True)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == (str(file), None)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'gguf_file="a.gguf"' in card and "PeftModel.from_pretrained(base" in card
    assert "gguf_file" not in (tmp_path / "merged" / "README.md").read_text()


# ---------------------------------------------------------------- the cache


def test_a_file_is_converted_once_and_another_file_gets_another_folder(
    cache, tmp_path, monkeypatch
):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    folder = hf.locate(str(file))
    assert folder.parent == cache and [*cache.iterdir()] == [folder]
    with monkeypatch.context() as patch:
        patch.setattr(gguf_lib, "_write_folder", None)  # nothing is made again
        assert hf.locate(str(file)) == folder
        file.rename(tmp_path / "moved.gguf")
        assert hf.locate(str(tmp_path / "moved.gguf")) == folder
    write(file, config, hf_weights(config), tokenizer__chat_template=TEMPLATE + " ")
    assert hf.locate(str(file)) != folder


@pytest.mark.parametrize(
    "lost",
    ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"],
)
def test_a_folder_that_lost_a_file_is_made_again(cache, tmp_path, lost):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    folder = hf.locate(str(file))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / lost).unlink()
    assert hf.locate(str(file)) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert [*cache.iterdir()] == [folder]


def test_a_folder_that_lost_a_shard_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    folder = hf.locate(str(file))
    for lost in (*folder.glob("model-00002-*"), folder / shards.INDEX):
        lost.unlink()
        assert hf.locate(str(file)) == folder and lost.is_file()


def test_a_conversion_that_was_killed_is_told_by_its_name(cache, tmp_path, monkeypatch):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    names = []
    monkeypatch.setattr(shards, "write", lambda *_: names.extend(p.name for p in cache.iterdir()))
    hf.locate(str(file))
    assert len(names) == 1 and names[0].startswith("unfinished-")


def test_a_conversion_that_stops_leaves_nothing(cache, tmp_path, monkeypatch):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            hf.locate(str(file))
    assert [*cache.iterdir()] == []
    assert (hf.locate(str(file)) / "config.json").is_file()


def test_of_two_processes_that_convert_one_file_either_is_first(cache, tmp_path, monkeypatch):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    write_folder_once = gguf_lib._write_folder

    def beaten(folder, contents):
        monkeypatch.setattr(gguf_lib, "_write_folder", write_folder_once)
        hf.locate(str(file))  # the other process, in the meantime
        write_folder_once(folder, contents)

    monkeypatch.setattr(gguf_lib, "_write_folder", beaten)
    folder = hf.locate(str(file))
    assert [*cache.iterdir()] == [folder] and (folder / "config.json").is_file()


@pytest.mark.parametrize("size", [100, 8_000, 200_000])  # config.json, tokenizer.json, weights
def test_a_disk_that_is_full_is_told_and_leaves_nothing(cache, tmp_path, size):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # no file may be larger
    try:
        with pytest.raises(UserError, match="cannot write to .*too large.*: free space") as caught:
            hf.locate(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and [*cache.iterdir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(UserError, match="cannot write to .*taken.*XDG_CACHE_HOME"):
        hf.locate(str(file))


# ---------------------------------------------------------------- files that cannot be used


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        UserError, match="a.gguf: not readable as GGUF .*cut short; fetch"
    ) as caught:
        hf.locate(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general__architecture": "gemma3"}, "architecture 'gemma3' is not supported: only llama"),
        ({"tokenizer__chat_template": None}, "a.gguf: there is no chat template: use the file of"),
        (
            {"tokenizer__ggml__model": "llama"},
            "tokenizer 'llama' is not supported: only byte-level",
        ),
        ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer 'tekken' is not supported: only gpt-2"),
        ({"tokenizer__ggml__merges": ["q q"]}, "the merges do not fit the vocabulary"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-5], *"aaaaa"]}, "a token stands twice"),
        ({"tokenizer__ggml__eos_token_id": 9999}, "the eos token 9999 is none of the "),
        ({"tokenizer__ggml__bos_token_id": "a"}, "the bos token 'a' is none of the "),
        ({"tokenizer__ggml__eot_token_id": 9999}, "the eot token 9999 is none of the "),
        ({"tokenizer__ggml__bos_token_id": -1}, "the bos token -1 is none of the "),
        ({"tokenizer__ggml__token_type": [*KINDS, 1]}, "there are .* tokens, but types of "),
        ({"tokenizer__ggml__token_type": KINDS[:-1]}, "there are .* tokens, but types of "),
        ({"tokenizer__ggml__bos_token_id": PAD}, r"BOS token '\[PAD0\]' is marked as unused"),
        ({"tokenizer__ggml__tokens": [*TOKENS, "b c"]}, "is no embedding of .* tokens: fetch"),
        ({"tokenizer__ggml__merges": [1, 2]}, "cannot be .AttributeError.*: fetch it again"),
        ({"split__count": "two"}, "cannot be .TypeError: .*: fetch it again"),
        ({"llama__rope__freq_base": math.nan}, "llama.rope.freq_base is nan, no positive"),
        ({"llama__rope__freq_base": math.inf}, "llama.rope.freq_base is inf, no positive"),
        ({"llama__block_count": 1.5}, "llama.block_count is 1.5, no positive"),
        ({"llama__block_count": 2}, "no weight 'model.layers.1.* of 2 layers: fetch the"),
        ({"tensors": {"output_norm.weight": None}}, "no weight 'model.norm.weight' in a mod"),
        (
            {"tensors": {"blk.7.attn_q.weight": np.ones((4, 4), "f4")}},
            "an unknown weight 'model.layers.7.self_attn.q_proj.weight' in a model of 1 layers",
        ),
        (
            {"tensors": {"blk.0.attn_q.weight": np.ones((250, 256), "f4")}},
            "cannot be .ValueError: .*reshape.*: fetch it again",
        ),
        ({"tensors": {"token_embd.weight": np.ones(256, "f4")}}, "is no embedding of .* tokens"),
        ({"llama__block_count": None}, "llama.block_count is None, no positive"),
        ({"llama__attention__head_count": 0}, "llama.attention.head_count is 0, no positive"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn' is not supported: only Ll"),
        ({"llama__rope__dimension_count": 16}, "llama.rope.dimension_count differs from the 64"),
        ({"split__count": 3}, "this is one of 3 parts of a model: join"),
        (
            {"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((4, 4), "f4")}},
            "unknown tensor 'blk.0",
        ),
        ({"tensors": {"token_embd.weight": None}}, "there is no tensor token_embd.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_decoder_or_the_tokenizer_does_not_know_is_refused(tmp_path, changes, says):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config), **changes)
    with pytest.raises(UserError, match=says) as caught:
        hf.locate(str(file))
    assert "\n" not in str(caught.value) and "a.gguf" in str(caught.value)


def test_a_pre_tokenizer_that_transformers_would_replace_is_refused(tmp_path):
    config = hf_config("qwen2", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config), tokenizer__ggml__pre="smollm")
    with pytest.raises(UserError, match="'smollm' is not supported with architecture 'qwen2'"):
        hf.locate(str(file))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (int(Q.Q8_1), "'blk.0.ffn_up.weight' is Q8_1, which is not read"),
        (4711, "type 4711: use"),
    ],
)
def test_a_quantization_that_is_unknown_is_named(tmp_path, number, says):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    contents, name = file.read_bytes(), b"blk.0.ffn_up.weight"
    at = contents.index(name) + len(name) + 4 + 2 * 8  # behind the number of sides and both sides
    file.write_bytes(contents[:at] + number.to_bytes(4, "little") + contents[at + 4 :])
    with pytest.raises(UserError, match=says):
        hf.locate(str(file))


def test_a_text_in_the_metadata_that_is_damaged(tmp_path):
    config = hf_config("llama", num_hidden_layers=1)
    file = write(tmp_path / "a.gguf", config, hf_weights(config))
    file.write_bytes(file.read_bytes().replace(b"<think>", b"<th\xffnk>"))
    with pytest.raises(UserError, match="a.gguf: not readable as GGUF .*utf-8"):
        hf.locate(str(file))


def test_a_file_that_is_absent_or_something_else(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.gguf .No such file"):
        hf.locate(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("not a model, by any means")
    with pytest.raises(UserError, match="text.gguf: not readable as GGUF .GGUF magic"):
        hf.locate(str(tmp_path / "text.gguf"))


# ---------------------------------------------------------------- SmolLM2 itself


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    """(file, folder) of the packaged model, converted in a cache of its own."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", scratch)
        yield smollm2_file, hf.locate("smollm2-135m")


@pytest.mark.slow
def test_smollm2s_weights_are_the_files_bit_for_bit(smollm2):
    file, folder = smollm2
    cfg = hf.config_from_hf(hf.read_config(folder))
    assert cfg == hf.config_from_hf(hf.architecture("smollm2-135m"))
    params, seen = hf.load(folder, cfg, "float32"), 0
    places = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    places |= {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"}
    places |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    places |= {"attn_output": "self_attn.o_proj"}
    for tensor in gguf.GGUFReader(file).tensors:
        want = dequantized(np.asarray(tensor.data), tensor.tensor_type)
        if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            at = jax.tree.map(lambda x, i=int(block[1]): x[i], params["layers"])
            for part in places[block[2]].split("."):
                at = at[part]
            (got,) = at.values()
            got = got.T if got.ndim == 2 else got
            if block[2] in ("attn_q", "attn_k"):
                got = permuted(got, cfg.num_heads if block[2] == "attn_q" else cfg.num_kv_heads)
        else:
            got = params["norm"]["scale"]
            if tensor.name == "token_embd.weight":
                got = params["embed_tokens"]["embedding"]
        np.testing.assert_array_equal(got, want, err_msg=tensor.name)
        seen += want.size
    assert seen == 134_515_008 == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_smollm2s_ids_of_a_thousand_real_texts_and_its_template(smollm2):
    file, folder = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = gguf.GGUFReader(file).fields
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    messages = [{"role": "user", "content": "How many are 2 and 3?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHow many are 2 and 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    if not DATA.exists():
        pytest.skip("no real texts: shared/data is absent")
    texts = []
    for name in ("gsm8k_train", "math_test", "mmlu_test", "svamp_test", "humaneval"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        step = max(1, len(rows) // 220)
        texts += ["\n".join(v for v in row.values() if isinstance(v, str)) for row in rows[::step]]
    texts = texts[:1000]
    assert len(texts) == 1000
    vocabulary = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = fields["tokenizer.ggml.merges"].contents()
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    for text in texts:
        assert tokenizer.encode(text) == bpe_ids(text, smollm_pieces, vocabulary, rank)
