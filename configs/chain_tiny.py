"""Our recipe on chains, whose answers cannot be checked by looking at them; budget 30 %.

    python -m collab_jax.train --config configs/chain_tiny.py --workdir runs/chain

It starts from docs/results/chain/start, which configs/chain_tiny_sft.py made. A response is a step
a line and the last result as the answer, so that the decision to call can only come from the
model's own uncertainty, and the log-probability of a response is the rival (`tasks/chain.py`). The
simulated cloud errs on 6 % of the problems, with odds that are nine times as high on the longest
chains as on the shortest.

Batches, temperature, momentum and averaged weights are those of configs/countdown_tiny_ours.py,
which says why. The decision is scored, and all that is learnt: the call's row of the head moves,
and nothing else does (collab_jax/rl/scoring.py). So the model solves what the start solves. A row
alone takes a higher learning rate than a model.

Results: docs/results.md, and docs/results/chain, whose search the learning rate comes from.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

ours = runpy.run_path(str(pathlib.Path(__file__).with_name("countdown_tiny_ours.py")))


def get_config() -> ConfigDict:
    config = ours["get_config"]()
    config.model.path = "docs/results/chain/start"
    config.prompt_length = 24
    config.max_new_tokens = 64
    config.task.name = "chain"
    config.task.prompt = "{problem}"
    config.task.numbers = (1, 50)
    config.task.steps = (2, 5)
    config.algorithm.advantage = "none"
    config.optim.learning_rate = 5e-4
    return config
