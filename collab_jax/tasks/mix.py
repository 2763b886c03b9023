"""A mix: one task made of several, each with a weight; `config.task.name = "mix"` and
`config.task.mix` its parts.

A weight is a part's share of the training prompts, whatever the size of its data: `pattern` deals
the places of the training sequence out to the parts, and each part goes through its own prompts in
its own epochs (`indices`). The test split has every part's, dealt out by weight too, so that its
beginning is a small mix. Every part has the same `config.task.prompt`. An example says which part
it belongs to, and its id and stratum begin with that.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from collab_jax.tasks.base import Example, Messages, Task, TaskError, Verdict

SLOTS = 1000  # places of a pattern: weights are met to a thousandth


def check(pairs) -> dict[str, float]:
    """`config.task.mix` as name -> share, shares adding up to 1. Raises TaskError for what is not a
    mix.
    """
    try:
        weights = {str(name): float(weight) for name, weight in pairs}
    except (TypeError, ValueError):
        weights = {}
    total = sum(weights.values())
    if (
        not weights
        or len(weights) < len(pairs)
        or not all(w > 0 and math.isfinite(w) for w in weights.values())
    ):
        raise TaskError(
            f"config.task.mix={pairs!r} must be (task, weight) pairs, weights above 0, as (('math', 3), ('gsm8k', 1))"
        )
    if min(weights.values()) * SLOTS < total:
        raise TaskError(
            f"config.task.mix={pairs!r}: a weight must be at least a {SLOTS}th of their sum"
        )
    return {name: weight / total for name, weight in weights.items()}


def pattern(weights: Sequence[float]) -> np.ndarray:
    """Which part each of SLOTS places belongs to, i64[SLOTS]: as many as its weight says, evenly
    spread.
    """
    exact = np.array(weights) / sum(weights) * SLOTS
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: SLOTS - counts.sum()]] += (
        1  # the largest remainders
    )
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


def indices(
    seed: int,
    place: np.ndarray,
    pools: Sequence[np.ndarray],
    weights: Sequence[float],
    draw: Callable,
) -> np.ndarray:
    """The examples at these places of the training sequence, [n]. pools: indices of each part's
    examples.

    draw(seed, place [m], total) -> i64[m]: which of one pool's `total` examples stand at places of
    its own sequence.
    """
    deal = pattern(weights)
    before = (deal[:, None] == np.arange(len(pools))).cumsum(
        0
    )  # [SLOTS, parts], this place included
    found = np.empty(len(place), np.int64)
    for part, pool in enumerate(pools):
        mine = deal[place % SLOTS] == part
        own = place[mine] // SLOTS * before[-1, part] + before[place[mine] % SLOTS, part] - 1
        found[mine] = pool[draw(seed, own, len(pool))]
    return found


def pools(task: Task, examples: Sequence[Example]) -> list[np.ndarray]:
    """Indices of the examples of each part, in the order of `task.weights`. Raises TaskError for a
    part that has none.
    """
    names = np.array([example.task for example in examples])
    found = {name: np.flatnonzero(names == name) for name in task.weights}
    if empty := [name for name, pool in found.items() if not pool.size]:
        raise TaskError(
            f"no training prompt of {empty[0]!r} is left: raise config.prompt_length, or take it out of the mix"
        )
    return list(found.values())


def make_task(parts: Mapping[str, Task], weights: Mapping[str, float]) -> Task:
    """The task made of `parts`, by name, with these weights."""

    def load(split: str) -> list[Example]:
        loaded = {
            name: [
                dataclasses.replace(
                    e, id=f"{name}/{e.id}", stratum=f"{name}, {e.stratum}" if e.stratum else name
                )
                for e in task.load(split)
            ]
            for name, task in parts.items()
        }
        places = [
            (i + 0.5) / weights[name]
            for name, examples in loaded.items()
            for i in range(len(examples))
        ]
        flat = [example for examples in loaded.values() for example in examples]
        return [flat[i] for i in np.argsort(places, kind="stable")]

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        found: list = [None] * len(examples)
        for name in dict.fromkeys(
            example.task for example in examples
        ):  # one batch a part, for its worker processes
            mine = [i for i, example in enumerate(examples) if example.task == name]
            verdicts = parts[name].verify([examples[i] for i in mine], [responses[i] for i in mine])
            for i, verdict in zip(mine, verdicts, strict=True):
                found[i] = verdict
        return found

    def solve_prompt(messages: Messages) -> str:
        for task in parts.values():
            try:
                return task.solve_prompt(messages)
            except TaskError:
                continue
        raise TaskError(f"not a prompt of {' or '.join(parts)}")

    def gold(example: Example) -> str | None:
        task = parts[example.task]
        return task.gold(example) if task.gold else None

    return Task(
        name="mix",
        load=load,
        prompt=lambda example: parts[example.task].prompt(example),
        cloud_prompt=lambda example: parts[example.task].cloud_prompt(example),
        verify=verify,
        solve_prompt=solve_prompt if all(task.solve_prompt for task in parts.values()) else None,
        gold=gold,
        weights=weights,
    )
