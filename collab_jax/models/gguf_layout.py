"""What GGUF and Hugging Face call the same things, and where they order numbers differently.

`gguf.py` reads files by it, `gguf_export.py` writes them.
"""

import numpy as np

from collab_jax.models.decoder_config import RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"  # what Llama 3 divides each rotary frequency by
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # as GGUF has it
END_TOKENS = ("eos", "eot", "eom")  # of a text, a turn, a message: each ends a response


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """A Llama projection to queries or keys, [out, in] or a bias [out], as GGUF has it.

    GGUF interleaves the two halves of each head, which rotary embeddings pair.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`: as Hugging Face has it."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def rope_factors(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by, f64[H/2].

    It leaves fast rotations, divides slow ones by the factor, and goes over in between.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - kept) / scaling.factor + kept)
