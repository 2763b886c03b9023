r"""Warm start of a model of 0.79 M parameters for chains (`tasks/chain.py`), from random weights.

    python -m collab_jax.sft --config configs/chain_tiny_sft.py --workdir runs/chain-tiny

Two to five steps of arithmetic modulo 1,000 with numbers to 50, each step on a line. A model of
this size slips at some of them, mostly at products, and nothing in its response shows where:
whether to call has to come from how sure it was. The warm start teaches no more of calls than that
one may come anywhere, with the same small probability (`config.sft.call_chance`; the demonstrations
of which one in seven calls only teach how the marker goes on). So the margin is highest where the
model is least sure of what comes next, and that alone ranks its responses before anything has been
rewarded: AUC 0.961, where the log-probability's is 0.972. Demonstrations alone leave a chance that
varies from state to state, by as much as the margin does with how sure the model is.

The shape is that of the embedded model (configs/countdown_tiny_sft.py), with other words. 3,600
steps of 128 demonstrations took 32 minutes on two cores of an AMD EPYC that did some other work;
the model, which is in docs/results/chain/start, solves 76.3 % of 4,096 validation problems in
greedy decoding (75.0 to 77.6) and calls on none; at 30 % calls its margin brings 95.9 % (95.1 to
96.6) and its log-probability 96.6 (95.7 to 97.2), seed 0, 2026-11-27:

    python -m collab_jax.evaluate --config configs/chain_tiny.py --workdir runs/chain-start
"""

import pathlib
import runpy

from ml_collections import ConfigDict

here = pathlib.Path(__file__)
chain = runpy.run_path(str(here.with_name("chain_tiny.py")))
countdown = runpy.run_path(str(here.with_name("countdown_tiny_sft.py")))

NOT_IN_CHAINS = {"/", "(", ")", ",", " "}  # of Countdown's words


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
