"""Which training prompts a step uses, and which none does."""

from collections.abc import Callable

import numpy as np

from collab_jax.rl import experiment
from collab_jax.rl.experiment import Run
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, mix


def prompt_indices(seed: int, step: int, count: int, total: int) -> np.ndarray:
    """Returns which of `total` training prompts step number `step` uses, i64[count].

    A function of (seed, step): each epoch goes through all prompts, in a new order.
    """
    return shuffled_epochs(seed, np.arange(step * count, (step + 1) * count), total)


def shuffled_epochs(seed: int, places: np.ndarray, total: int) -> np.ndarray:
    """Returns which of `total` prompts stand at these places of an endless sequence, i64[n].

    The sequence consists of epochs; each has all prompts, in an order of its own.
    """
    orders = {
        epoch: np.random.default_rng([seed, int(epoch)]).permutation(total)
        for epoch in np.unique(places // total)
    }
    return np.array([orders[p // total][p % total] for p in places], np.int64)


def chooser(run: Run, examples: list[Example]) -> Callable[[int, int], np.ndarray]:
    """Returns choose(step, count): which of the training examples a step uses, i64[count].

    The examples of a mix are chosen by the weights of its parts.
    """
    seed, task = run.config.seed, run.task
    if task.weights is None:
        return lambda step, count: prompt_indices(seed, step, count, len(examples))
    pools, weights = mix.pools(task, examples), list(task.weights.values())

    def choose(step: int, count: int) -> np.ndarray:
        places = np.arange(step * count, (step + 1) * count)
        return mix.indices(seed, places, pools, weights, shuffled_epochs)

    return choose


def fit_examples(run: Run) -> list[Example]:
    """Returns training prompts that no step of this run uses, for routers that are learned.

    As many as `config.eval.fit_prompts`; a warm start before it may have learnt from them. Raises
    UserError where training leaves fewer.
    """
    config = run.config
    if not config.eval.fit_prompts:
        return []
    examples = experiment.examples(run, "train")
    used = chooser(run, examples)(0, config.prompts_per_step * config.train.steps)
    unused = np.setdiff1d(np.arange(len(examples)), used)
    if len(unused) < config.eval.fit_prompts:
        raise UserError(
            f"config.eval.fit_prompts={config.eval.fit_prompts}, but training leaves "
            f"{len(unused)} of {len(examples)} training prompts unused: lower it, or raise "
            "config.task.train_examples"
        )
    return [examples[i] for i in unused[: config.eval.fit_prompts]]
