r"""Warm start of a model of 0.79 M parameters for chains (`tasks/chain.py`), from random weights.

    python -m collab_jax.sft --config configs/chain_tiny_sft.py --workdir runs/chain-tiny

Two to six steps of arithmetic modulo 1,000 with numbers to 20, each step on a line. A model of this
size slips at some of them, mostly at products, and nothing in its response shows where: whether to
call has to come from how sure it was. One demonstration in seven stops on the way and calls, at a
place and for a problem drawn by chance.

The shape is that of the embedded model (configs/countdown_tiny_sft.py), with other words. 2,400
steps of 128 demonstrations, some 45 minutes on two cores by its first steps; no result of it is
published yet.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

here = pathlib.Path(__file__)
chain = runpy.run_path(str(here.with_name("chain_tiny.py")))
countdown = runpy.run_path(str(here.with_name("countdown_tiny_sft.py")))

_WORDS = [
    *"0123456789+-*=\n",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<unknown>",
    " I need external assistance ",
    "</unknown>",
]


def get_config() -> ConfigDict:
    config = chain["get_config"]()
    config.model.path = "countdown-tiny"  # as common.py has it: the warm start makes its own
    config.text.pad, config.text.eos = "<pad>", ("<eos>",)  # the first two of its vocabulary
    config.sft.steps = 2400
    config.sft.batch_size = 128
    config.sft.words = tuple(_WORDS)
    shape = countdown["get_config"]().sft.architecture
    config.sft.architecture = shape | {"vocab_size": len(_WORDS) + 3}
    return config
