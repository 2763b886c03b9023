"""GGUF files: each is converted, once, into a Hugging Face folder that all else reads.

The folder lies in the user's cache under the SHA-256 of the file. It has config.json, the tokenizer
with its chat template, generation_config.json, and the weights in float32, which holds every value
of a quantized one exactly. What a file says is read with the `gguf` package.
"""

import hashlib
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterable
from types import UnionType
from typing import Any, NamedTuple

import gguf
import numpy as np

from collab_jax.models import bpe, shards
from collab_jax.models.decoder_config import RopeScaling
from collab_jax.models.gguf_layout import (
    ARCHITECTURES,
    BLOCK,
    END_TOKENS,
    ROPE_FREQS,
    SPECIAL_TOKENS,
    TOP,
    rope_factors,
    unpermute,
)
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.files import cache_folder, write_text

FILES = (  # of a converted folder, beside its weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SCRATCH = "unfinished-"  # how a folder's name begins while it is made; a kill leaves it
CONVERSION = 1  # raised when the same file gives another folder, so that no old one is read
# All published models that are scaled so differ in their factor alone.
LLAMA3_ROPE: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OTHER = "use a file of another quantization (F16, Q8_0, Q4_K_M, ...)"


class GGUFError(UserError):
    """A GGUF file that cannot be used; the message says what to do."""


class Contents(NamedTuple):
    """What a file holds: metadata and tensors by their names."""

    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]


def convert(file: pathlib.Path) -> pathlib.Path:
    """The Hugging Face folder of a GGUF file; made at the first call, whole or not at all.

    It is made again where a file of it is missing, as after a cleaning of the cache. Raises
    GGUFError where the GGUF file is damaged, or holds what the decoder does not compute.
    """
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise GGUFError(f"cannot read {file} ({error.strerror}): give another file") from None
    cache = cache_folder() / "models"
    folder = cache / f"gguf-{CONVERSION}-{digest[:16]}"
    if _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=cache) as scratch:
            made = pathlib.Path(scratch) / "model"
            contents = _read(file)
            print(f"converting {file} into {folder}, once")
            _write_folder(made, contents)
            if folder.exists() and not _is_whole(folder):
                folder.rename(pathlib.Path(scratch) / "incomplete")
            made.rename(folder)
    except UserError as error:
        raise GGUFError(f"{file}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GGUFError(
            f"{file}: what it says of the model cannot be ({reason}): fetch it again"
        ) from None
    except OSError as error:
        if _is_whole(folder):  # another process was faster
            return folder
        raise GGUFError(
            f"cannot write to {cache} ({error}): free space there, "
            "or choose another place by XDG_CACHE_HOME"
        ) from None
    return folder


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder has all that `_write_folder` writes."""
    return all((folder / name).is_file() for name in FILES) and shards.are_whole(folder)


def _read(file: pathlib.Path) -> Contents:
    """What the file holds. Raises GGUFError where it is damaged, or a part of a model."""
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises what numpy does at the bytes that are missing
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", reason):
            raise GGUFError(
                f"there are tensors of the unknown type {unknown[1]}: {OTHER}"
            ) from None
        raise GGUFError(
            f"not readable as GGUF ({reason}): it may be cut short; fetch it again"
        ) from None
    if (parts := metadata.get("split.count", 1)) > 1:
        raise GGUFError(
            f"this is one of {parts} parts of a model: join them with `llama-gguf-split --merge`"
        )
    return Contents(metadata, {tensor.name: tensor for tensor in reader.tensors})


def _write_folder(folder: pathlib.Path, contents: Contents) -> None:
    """Writes the Hugging Face folder of what a file holds."""
    tensors = contents.tensors
    config = _config(contents)
    names = _weight_names(tensors)
    _check_names(names, config)
    folder.mkdir()
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(contents.metadata))
    _write_tokenizer(folder, contents.metadata)
    sizes = {name: 4 * int(tensors[source].n_elements) for name, source in names.items()}
    shards.write(folder, sizes, lambda name: _weight(tensors[names[name]], config))


def _weight(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> np.ndarray:
    """The values of a tensor, f32[out, in], in the order that Hugging Face has."""
    try:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise GGUFError(f"tensor {tensor.name!r} is {kind}, which is not read: {OTHER}") from None
    if config["model_type"] == "llama" and ".attn_q." in tensor.name:
        return unpermute(value, config["num_attention_heads"])
    if config["model_type"] == "llama" and ".attn_k." in tensor.name:
        return unpermute(value, config["num_key_value_heads"])
    return value


def _weight_names(tensors: dict[str, gguf.ReaderTensor]) -> dict[str, str]:
    """The name of each tensor by that of the weight in a Hugging Face folder."""
    names = {}
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if block and block[2] in BLOCK:
            names[f"model.layers.{block[1]}.{BLOCK[block[2]]}.{leaf}"] = name
        elif stem in TOP:
            names[f"{TOP[stem]}.{leaf}"] = name
        elif name != ROPE_FREQS:
            raise GGUFError(f"unknown tensor {name!r}: the decoder has no such weight")
    return names


def _check_names(names: Iterable[str], config: dict[str, Any]) -> None:
    """Raises GGUFError unless the names are those of the decoder's matrices and norms."""
    of_layer = set(BLOCK.values())
    if config["model_type"] != "qwen3":
        of_layer -= {BLOCK["attn_q_norm"], BLOCK["attn_k_norm"]}
    layers = config["num_hidden_layers"]
    wanted = {f"model.layers.{i}.{stem}.weight" for i in range(layers) for stem in of_layer}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    found = {name for name in names if name.endswith(".weight")} - {"lm_head.weight"}
    for what, some in (("no", wanted - found), ("an unknown", found - wanted)):
        if some:
            raise GGUFError(
                f"there is {what} weight {min(some)!r} in a model of {layers} layers: "
                "fetch the file again"
            )


# ---- config.json


def _config(contents: Contents) -> dict[str, Any]:
    """The contents of config.json; refuses what the decoder does not compute."""
    metadata, tensors = contents.metadata, contents.tensors
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise GGUFError(
            f"architecture {kind!r} is not supported: only {', '.join(ARCHITECTURES)} are"
        )

    def number(key: str, default: float | None = None, of: type | UnionType = int) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if not isinstance(value, of) or not 0 < value < math.inf:
            raise GGUFError(f"{kind}.{key} is {value}, no positive number: fetch the file again")
        return value

    if "token_embd.weight" not in tensors:
        raise GGUFError("there is no tensor token_embd.weight: fetch the file again")
    width, *rows = map(int, tensors["token_embd.weight"].shape)
    tokens = len(metadata.get("tokenizer.ggml.tokens", []))
    if len(rows) != 1 or width != number("embedding_length") or rows[0] < tokens:
        raise GGUFError(
            f"the tensor token_embd.weight is no embedding of {tokens} tokens: fetch the file again"
        )
    heads = number("attention.head_count")
    head_dim = number("attention.key_length", width // heads)
    epsilon = number("attention.layer_norm_rms_epsilon", of=int | float)
    theta = number("rope.freq_base", 1e4, of=int | float)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise GGUFError(f"{kind}.{key} differs from the {head_dim} of a key: not supported")
    special = _special_ids(metadata)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": rows[0],
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        # Stored as float32: the shortest number that it stands for (1e-5, not 9.99999974e-6).
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_parameters": _rope(contents, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "dtype": "float32",
    }


def _rope(contents: Contents, theta: float, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json. Raises GGUFError for a scaling other than Llama 3's."""
    metadata, tensors = contents.metadata, contents.tensors
    kind = metadata["general.architecture"]
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or metadata.get(f"{kind}.rope.scale_linear", 1.0) != 1.0:
        raise GGUFError(f"rope scaling {scaling!r} is not supported: only Llama 3's is")
    if ROPE_FREQS not in tensors:
        return {"rope_type": "default", "rope_theta": theta}
    stored = np.asarray(tensors[ROPE_FREQS].data, np.float64)
    factor = float(stored.max())
    expected = rope_factors(theta, head_dim, RopeScaling(factor, **LLAMA3_ROPE))
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise GGUFError(f"the tensor {ROPE_FREQS} is not Llama 3's rope scaling: not supported")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}


# ---- the tokenizer


def _write_tokenizer(folder: pathlib.Path, metadata: dict[str, Any]) -> None:
    """Writes the tokenizer with its special tokens and chat template."""
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise GGUFError(
            f"tokenizer {model!r} is not supported: only byte-level BPE ('gpt2') is; "
            "use the model's Hugging Face folder"
        )
    template = metadata.get("tokenizer.chat_template")
    if not template:
        raise GGUFError(
            "there is no chat template: use the file of an instruct model, "
            "or a Hugging Face folder with a chat_template.jinja"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if metadata["general.architecture"] == "qwen2" and pre not in bpe.QWEN2:
        # transformers reads the tokenizer of every such folder with Qwen2's.
        raise GGUFError(f"pre-tokenizer {pre!r} is not supported with architecture 'qwen2'")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = _special_ids(metadata)
    special = {
        f"{name}_token": tokens[ids[key]] for name, key in SPECIAL_TOKENS.items() if key in ids
    }
    tokenizer = bpe.make(
        tokens,
        metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)),
        metadata.get("tokenizer.ggml.merges", []),
        pre,
        bos=special.get("bos_token"),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token"),
    )
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "chat_template.jinja", template)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
            **special,
        },
    )


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of the special tokens that a file has, by GGUF's names."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    found = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in (*SPECIAL_TOKENS.values(), *END_TOKENS)
    }
    ids = {name: i for name, i in found.items() if i is not None}
    for name, i in ids.items():
        if i not in range(len(tokens)):
            raise GGUFError(
                f"the {name} token {i!r} is none of the {len(tokens)} tokens: fetch the file again"
            )
    return ids


def _write_json(file: pathlib.Path, contents: dict[str, Any]) -> None:
    write_text(file, json.dumps(contents, indent=2, sort_keys=True) + "\n")


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The contents of generation_config.json, with every token that ends a response."""
    ids = _special_ids(metadata)
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": list(dict.fromkeys(ids[name] for name in END_TOKENS if name in ids)),
        "pad_token_id": ids.get("padding"),
    }
