"""Countdown with the embedded model, many prompts and averaged weights, budget 30 %.

    python -m collab_jax.train --config configs/countdown_tiny_ours.py --workdir runs/countdown

The paper's reward and gradient, with 64 prompts x 4 responses a step (as many responses as 32 x 8)
sampled at temperature 0.5, without a filter, and with averaged weights.

The reasoning. At temperature 1 the model that the run starts from solves 22 % of what it samples,
and 41 % of what it decodes greedily. A short run is used up by closing that gap: it makes sampling
do what the greedy policy does already. The policy that is deployed is greedy, so the policy to
train is a sharp one. pi_t = softmax(logits / t) is a policy like any other: the log-probabilities
of its samples are taken at the same t, and so the gradient estimates that of its own expected
reward without bias; an update takes its direction. Its samples then make the mistakes that the
deployed model makes.

Many prompts in small groups help for a similar reason: most of the eight responses of a group say
the same. A larger batch of prompts needs no filter, as enough of them are solved, and the call is
learnt from those that only the cloud solves. The averaged weights remove the noise of the last
steps.

The task shows its answer: a demonstration ends an attempt with `ok` or `no`, and so the trained
model calls where it has written `no`. chain_tiny.py has a task where nothing shows.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
    config = common["get_config"]()
    config.budget = 0.3
    config.temperature = 0.5
    config.prompts_per_step = 64
    config.group = 4
    config.algorithm.filter = "none"
    config.optim.average = 0.95
    return config
