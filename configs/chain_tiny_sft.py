r"""Warm start of a model of 0.79 M parameters for chains (`tasks/chain.py`), from random weights.

    python -m collab_jax.sft --config configs/chain_tiny_sft.py --workdir runs/chain-tiny

Two to five steps of arithmetic modulo 1,000 with numbers to 50, each step on a line. A model of
this size slips at some of them, mostly at products, and nothing in its response shows where:
whether to call has to come from how sure it was. One demonstration in seven stops on the way and
calls, at a place and for a problem drawn by chance. What can be learnt of it is to call with the
same small probability everywhere, and so the margin is highest where the model is least sure of
what comes next: that alone ranks its responses (AUC 0.81), before anything has been rewarded.

The shape is that of the embedded model (configs/countdown_tiny_sft.py), with other words. 2,400
steps of 128 demonstrations took 20 minutes on two cores of an AMD EPYC that did some other work;
the model, which is in docs/results/chain/start, solves 70.0 % of 4,096 validation problems in
greedy decoding (68.6 to 71.4) and calls on one of them, seed 0, 2026-11-27:

    python -m collab_jax.evaluate --config configs/chain_tiny.py --workdir runs/chain-start
"""

import pathlib
import runpy

from ml_collections import ConfigDict

here = pathlib.Path(__file__)
chain = runpy.run_path(str(here.with_name("chain_tiny.py")))
countdown = runpy.run_path(str(here.with_name("countdown_tiny_sft.py")))

NOT_IN_CHAINS = {"/", "(", ")", ",", " ", " ok", " no"}  # of Countdown's words


def get_config() -> ConfigDict:
    config = chain["get_config"]()
    config.model.path = "countdown-tiny"  # as common.py has it: the warm start makes its own
    config.text.pad, config.text.eos = "<pad>", ("<eos>",)  # the first two of its vocabulary
    config.sft.steps = 3600
    config.sft.batch_size = 128
    config.sft.call_chance = 0.05
    sft = countdown["get_config"]().sft
    config.sft.words = tuple(word for word in sft.words if word not in NOT_IN_CHAINS)
    words = len(config.sft.words) + 3  # pad, eos and unk come first
    config.sft.architecture = sft.architecture | {"vocab_size": words}
    return config
