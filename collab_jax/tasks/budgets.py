"""Prompts that show their budget, so that one model learns to keep to several.

Where `config.task.prompt` has {budget}, a percentage stands there, one of `config.task.budgets`.
Each training prompt shows one of them, in turn; a problem of the validation or the test split is
asked once with each, so that budgets are compared on the same problems.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from collab_jax.tasks.base import Example, Task, TaskError

PLACE = "{budget}"


def are_shown(config: ConfigDict) -> bool:
    """Whether prompts show a budget.

    Raises TaskError where the prompt and the budgets do not go together.
    """
    shown, shares = PLACE in config.task.prompt, tuple(config.task.budgets)
    if shown != bool(shares):
        raise TaskError(
            f"config.task.budgets={shares} and prompt={config.task.prompt!r}: budgets are shown "
            f"where the prompt has {PLACE}, so set both or neither"
        )
    in_range = all(isinstance(b, float) and 0 < b < 1 for b in shares)
    if not in_range or len(set(map(percent, shares))) < len(shares):
        raise TaskError(f"config.task.budgets={shares} must be different shares in (0, 1)")
    return shown


def percent(budget: float) -> str:
    """How a budget is written: 0.3 as 30."""
    return f"{100 * budget:g}"


def levels(examples: Sequence[Example], budgets: Sequence[float]) -> np.ndarray | None:
    """Which of the budgets each example's prompt shows, i32[n]; None where none is shown."""
    if not budgets:
        return None
    return np.array([tuple(budgets).index(example.budget) for example in examples], np.int32)


def shown(make: Callable[[ConfigDict], Task], config: ConfigDict) -> Task:
    """The task that `make` makes of a config, with prompts that show their budgets."""
    shares = tuple(config.task.budgets)

    def made(budget: float) -> Task:
        written = config.copy_and_resolve_references()
        written.task.prompt = config.task.prompt.replace(PLACE, percent(budget))
        return make(written)

    by_budget = {budget: made(budget) for budget in shares}
    task = by_budget[shares[0]]
    demonstrations = task.demonstrations

    def load(split: str) -> list[Example]:
        loaded = task.load(split)
        return _in_turn(loaded, shares) if split == "train" else _each(loaded, shares)

    def demonstrated(seed: int) -> Iterator[tuple[Example, str]]:
        assert demonstrations
        pairs = zip(itertools.cycle(shares), demonstrations(seed), strict=False)
        return ((dataclasses.replace(e, budget=b), response) for b, (e, response) in pairs)

    return dataclasses.replace(
        task,
        load=load,
        prompt=lambda example: by_budget[example.budget].prompt(example),
        demonstrations=demonstrated if demonstrations else None,
    )


def _in_turn(examples: Sequence[Example], shares: Sequence[float]) -> list[Example]:
    pairs = zip(examples, itertools.cycle(shares), strict=False)
    return [dataclasses.replace(example, budget=budget) for example, budget in pairs]


def _each(examples: Sequence[Example], shares: Sequence[float]) -> list[Example]:
    """Every example with every budget, the same problem's side by side."""
    return [
        dataclasses.replace(example, id=f"{example.id}@{percent(budget)}", budget=budget)
        for example in examples
        for budget in shares
    ]
