"""Models as one GGUF file, which llama.cpp, Ollama and LM Studio run.

Tensors and metadata are those that llama.cpp's own converter writes. Norms and biases stay f32;
what else is quantized is done by the `gguf` package, a tensor in memory at a time.
"""

import math
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from collab_jax.models import gguf_tokenizer, hf
from collab_jax.models.blocks import unstacked
from collab_jax.models.decoder_config import DecoderConfig, Params
from collab_jax.models.gguf import GGUFError
from collab_jax.models.gguf_layout import BLOCK, ROPE_FREQS, TOP, permute, rope_factors
from collab_jax.models.gguf_tokenizer import INSTEAD
from collab_jax.models.text import Text
from collab_jax.runtime.files import replacing

TYPES = {
    "f32": Type.F32,
    "f16": Type.F16,
    "bf16": Type.BF16,
    "q8_0": Type.Q8_0,
    "q4_0": Type.Q4_0,
}
# The projections whose biases llama.cpp reads, by architecture.
BIASED = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": (),
}


class Tensor(NamedTuple):
    """A tensor of the file: its values, and how they are stored."""

    weight: np.ndarray  # [out, in], a view of the parameters
    type: Type


def write(
    file: pathlib.Path,
    params: Params,
    cfg: DecoderConfig,
    hf_config: dict[str, Any],
    text: Text,
    *,
    kind: str,
    name: str,
) -> None:
    """Writes a model and its tokenizer as a GGUF file, whole or not at all.

    params: without an adapter. hf_config: the contents of config.json. kind: of TYPES, for the
    matrices. name: what programs show as the model's name. Raises GGUFError for what llama.cpp
    does not compute, or a tokenizer that it has no form for, before anything is written.
    """
    architecture = hf_config["model_type"]
    tensors = _tensors(params, cfg, architecture, TYPES[kind])
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(_file_type(TYPES[kind])),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_architecture(cfg, hf_config),
        **gguf_tokenizer.metadata(text, cfg.vocab_size, hf_config.get("bos_token_id")),
    }
    with replacing(file) as scratch:
        writer = gguf.GGUFWriter(scratch, architecture)
        try:
            _write(writer, metadata, tensors, cfg, architecture)
        finally:
            writer.close()


def _write(
    writer: gguf.GGUFWriter,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    cfg: DecoderConfig,
    architecture: str,
) -> None:
    """Writes all that a file holds."""
    for key, value in metadata.items():
        _add(writer, key, value)
    factors = None
    if cfg.rope_scaling is not None:
        factors = rope_factors(cfg.rope_theta, cfg.head_dim, cfg.rope_scaling).astype(np.float32)
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes, Type.F32)
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[tensor.type]
        shape = tensor.weight.shape
        count = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, tensor in tensors.items():
        writer.write_tensor_data(_data(name, tensor, cfg, architecture))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a piece of metadata by the type that GGUF has for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# ---- the weights


def _tensors(
    params: Params, cfg: DecoderConfig, architecture: str, kind: Type
) -> dict[str, Tensor]:
    """The tensors of a model by their names in GGUF. Raises GGUFError for what llama.cpp lacks."""
    if cfg.rope_scaling is not None and architecture != "llama":
        raise GGUFError(f"llama.cpp has no Llama 3 rope scaling for {architecture!r}: {INSTEAD}")
    head = "token_embd.weight" if cfg.tied else "output.weight"
    tensors = {}
    for path, leaf in unstacked(params).items():
        name, weight = _tensor_name(path), hf.out_in(path, leaf)
        stem, _, last = name.rpartition(".")
        if last == "bias" and stem.split(".")[-1] not in BIASED[architecture]:
            raise GGUFError(f"llama.cpp has no {name!r} in a {architecture!r}: {INSTEAD}")
        tensors[name] = Tensor(weight, _type(weight.shape, kind, name == head))
    return tensors


def _tensor_name(path: tuple[str, ...]) -> str:
    """('layers', '3', 'self_attn', 'q_proj', 'kernel') -> 'blk.3.attn_q.weight'."""
    stem, _, leaf = hf.weight_name(path).rpartition(".")
    top = {theirs: ours for ours, theirs in TOP.items()}
    if stem in top:
        return f"{top[stem]}.{leaf}"
    block = {theirs: ours for ours, theirs in BLOCK.items()}
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{block[module]}.{leaf}"


def _type(shape: tuple[int, ...], kind: Type, is_head: bool) -> Type:
    """How a tensor is stored in a file of this kind.

    As llama.cpp does it: a head is not stored in four bits (it takes Q6_K, which the `gguf` package
    does not write; Q8_0 is finer), and rows that are no whole blocks are stored in f16.
    """
    if len(shape) == 1:
        return Type.F32
    if kind == Type.Q4_0 and is_head:
        kind = Type.Q8_0
    return Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _data(name: str, tensor: Tensor, cfg: DecoderConfig, architecture: str) -> np.ndarray:
    """The values of a tensor as they are stored. Raises GGUFError where f16 cannot hold them."""
    weight = tensor.weight.astype(np.float32)
    if architecture == "llama" and ".attn_q." in name:
        weight = permute(weight, cfg.num_heads)
    if architecture == "llama" and ".attn_k." in name:
        weight = permute(weight, cfg.num_kv_heads)
    with np.errstate(over="ignore"):
        data = gguf.quantize(np.ascontiguousarray(weight), tensor.type)
    if tensor.type == Type.F16 and not np.isfinite(data).all():
        raise GGUFError(f"{name!r} has values that f16 cannot hold: use --gguf_type=bf16")
    return data


def _file_type(kind: Type) -> gguf.LlamaFileType:
    """The type of a file, after that of most of its matrices."""
    return gguf.LlamaFileType[f"{'ALL' if kind == Type.F32 else 'MOSTLY'}_{kind.name}"]


# ---- the metadata


def _architecture(cfg: DecoderConfig, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The shape and the constants of a model."""
    if hf_config.get("max_position_embeddings") is None:
        raise GGUFError("config.json lacks max_position_embeddings, the longest text: add it")
    values = {
        "context_length": hf_config["max_position_embeddings"],
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "block_count": cfg.num_layers,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        "rope.freq_base": float(cfg.rope_theta),
        "rope.dimension_count": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
    }
    return {f"{hf_config['model_type']}.{key}": value for key, value in values.items()}
