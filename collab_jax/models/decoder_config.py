"""What a decoder is made of: its shape and constants, and the type of its parameters."""

import dataclasses
from typing import Any

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the frequencies: `rope_type: llama3` in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder; hashable, to be a static argument of jitted functions.

    dtype is that of the computation and the cache; params keep the type they come in.
    platform: for what devices programs are, as jax calls them; None: for those that are there.
    lora_scale = alpha / rank multiplies the product of an adapter's matrices, and lora_token is the
    token whose embedding it moves, where params have these (lora.py).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False  # bias of o_proj (Llama's and Qwen3's `attention_bias`)
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    initializer_range: float = 0.02
    remat: bool = False  # recompute each block in the backward pass
    dtype: str = "float32"
    platform: str | None = None
    lora_scale: float = 1.0
    lora_token: int | None = None
