r"""Warm start of the embedded model `countdown-tiny` (0.79 M parameters), from random weights.

    python -m collab_jax.sft --config configs/countdown_tiny_sft.py --workdir runs/countdown-tiny

1,200 steps took 10 minutes on two cores of an AMD EPYC (2026-11-28). Of 4,096 validation prompts,
seed 0, it solves 47.1 % in greedy decoding with the marker disallowed (45.6 to 48.7), and calls on
2.7 % in natural decoding (2.2 to 3.2):

    python -m collab_jax.evaluate --config configs/countdown_tiny.py --workdir runs/as-started

No word says whether an attempt reached the target (`tasks/countdown.py`), and the call may follow
any of them: what to do about a miss is left to what comes after. It makes up to three attempts, few
more, and then answers with the last, right or wrong. Often an attempt that failed is made again,
which demonstrations never show: a model of this size does not learn to look back and do otherwise.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))

_WORDS = [
    *"0123456789+-*/()=, \n",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<unknown>",
    " I need external assistance ",
    "</unknown>",
]


def get_config() -> ConfigDict:
    config = common["get_config"]()
    config.task.share_of_three = 0.5  # more easy ones than training has, to learn arithmetic from
    config.text.pad, config.text.eos = "<pad>", ("<eos>",)  # the first two of its vocabulary
    config.sft.steps = 1200
    config.sft.words = tuple(_WORDS)
    config.sft.architecture = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(_WORDS) + 3,  # pad, eos and unk come first
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "initializer_range": 0.05,
        "hidden_act": "silu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return config
