"""The quickstart: our recipe on Countdown, with the embedded model, budget 30 %.

    python -m collab_jax.train --config configs/countdown_tiny_ours.py --workdir runs/countdown

The paper's reward and gradient for the attempts, the decision scored, with 64 prompts x 4 responses
a step (as many responses as 32 x 8) sampled at temperature 0.5, without a filter, and with averaged
weights. Expected after 160 steps (2 minutes 40 seconds of training; seed 0, 4,096 validation
prompts; two cores of an AMD EPYC, 2026-11-28): accuracy on the device 47.1 -> 58.3 %; by itself the
model calls on 2.7 -> 30.3 % of the prompts, with which 49.5 -> 85.1 % end up right. The learning
rate is that of docs/results/countdown/search.json.

The reasoning. At temperature 1 the model that the run starts from solves 31 % of what it samples,
and 47 % of what it decodes greedily. A short run is used up by closing that gap: it makes sampling
do what the greedy policy does already. The policy that is deployed is greedy, so the policy to
train is a sharp one. pi_t = softmax(logits / t) is a policy like any other: the log-probabilities
of its samples are taken at the same t, and so the gradient estimates that of its own expected
reward without bias; an update takes its direction. Its samples then make the mistakes that the
deployed model makes.

Many prompts in small groups help for a similar reason: most of the eight responses of a group say
the same. A larger batch of prompts needs no filter. The averaged weights remove the noise of the
last steps.

The decision is scored: no response of a rollout calls, the verdict on each attempt says whether it
should have, at the price of a call that holds the budget (collab_jax/rl/scoring.py). The attempts
are learnt by the policy gradient, as ever. Adam's momentum is lower than usual, since what a step
does to calls has to be seen by the next ones.

The simulated cloud errs on 1.7 % of the problems with three numbers and 7.1 % of those with four,
5.5 % in all. An attempt ends with what it reached, so whoever reads it can tell whether it is the
target. chain_tiny.py has a task where nothing shows.
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
    config.cloud.error_skew = 3.0
    config.algorithm.filter = "none"
    config.algorithm.decision = "scored"
    config.optim.learning_rate = 5e-5
    config.optim.momentum = 0.5
    config.optim.average = 0.95
    return config
