"""A mix: one task made of several, each with a weight.

`config.task.name = "mix"`, and `config.task.mix` has its parts. A weight is a part's share of the
training prompts, whatever the size of its data: `pattern` deals the places of the training sequence
out to the parts, and each part goes through its own prompts in its own epochs (`indices`). The test
split has the prompts of every part, dealt out by weight too, so that its beginning is a small mix.
Every part has the same `config.task.prompt`. An example says which part it belongs to, and its id
and stratum begin with that. Demonstrations are dealt out by weight as well.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from collab_jax.models.text import Messages
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError, Verdict

Answer = TypeVar("Answer")

SLOTS = 1000  # places of a pattern: weights are met to a thousandth


def shares(pairs: Any) -> dict[str, float]:
    """The share of each part, by name, from the pairs of `config.task.mix`; they add up to 1.

    Raises TaskError for what is not a mix.
    """
    try:
        weights = {str(name): float(weight) for name, weight in pairs}
    except (TypeError, ValueError):
        weights = {}
    usable = all(weight > 0 and math.isfinite(weight) for weight in weights.values())
    if not weights or len(weights) < len(pairs) or not usable:
        raise TaskError(
            f"config.task.mix={pairs!r} must be (task, weight) pairs, weights above 0, "
            "as (('math', 3), ('gsm8k', 1))"
        )
    total = sum(weights.values())
    if min(weights.values()) * SLOTS < total:
        raise TaskError(
            f"config.task.mix={pairs!r}: a weight must be at least a {SLOTS}th of their sum"
        )
    return {name: weight / total for name, weight in weights.items()}


def pattern(weights: Sequence[float]) -> np.ndarray:
    """The part that each of SLOTS places belongs to, i64[SLOTS].

    Each part has as many places as its weight says, evenly spread.
    """
    exact = np.array(weights) / sum(weights) * SLOTS
    counts = np.floor(exact).astype(int)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: SLOTS - counts.sum()]
    counts[largest_remainders] += 1
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


def indices(
    seed: int,
    place: np.ndarray,
    pools: Sequence[np.ndarray],
    weights: Sequence[float],
    draw: Callable[[int, np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """The indices of the examples at these places of the training sequence, i64[n].

    place: i64[n]. pools: the indices of each part's examples. draw(seed, place [m], total) ->
    i64[m]: which of one pool's `total` examples stand at places of that pool's own sequence.
    """
    deal = pattern(weights)
    # How many of the places up to and with this one each part has, [SLOTS, parts].
    counts = (deal[:, None] == np.arange(len(pools))).cumsum(0)
    turn, slot = place // SLOTS, place % SLOTS
    chosen = np.empty(len(place), np.int64)
    for part, pool in enumerate(pools):
        here = deal[slot] == part
        own_place = turn[here] * counts[-1, part] + counts[slot[here], part] - 1
        chosen[here] = pool[draw(seed, own_place, len(pool))]
    return chosen


def pools(task: Task, examples: Sequence[Example]) -> list[np.ndarray]:
    """The indices of the examples of each part of a mix, in the order of `task.weights`.

    Raises TaskError for a part that has none.
    """
    names = np.array([example.task for example in examples])
    by_part = {name: np.flatnonzero(names == name) for name in task.weights or ()}
    if empty := [name for name, pool in by_part.items() if not pool.size]:
        raise TaskError(
            f"no training prompt of {empty[0]!r} is left: "
            "raise config.prompt_length, or take it out of the mix"
        )
    return list(by_part.values())


def _of_whose_prompt(
    functions: Mapping[str, Callable[[Messages], Answer] | None],
) -> Callable[[Messages], Answer] | None:
    """A function of cloud prompts made of each part's, by its name; None where a part has none."""
    known = {name: function for name, function in functions.items() if function}

    def answer(messages: Messages) -> Answer:
        for function in known.values():
            try:
                return function(messages)
            except TaskError:
                continue
        raise TaskError(f"not a prompt of {' or '.join(known)}")

    return answer if len(known) == len(functions) else None


def make_task(parts: Mapping[str, Task], weights: Mapping[str, float]) -> Task:
    """The task made of `parts`, by name, with these weights."""

    def load(split: str) -> list[Example]:
        examples, places = [], []
        for name, task in parts.items():
            for i, e in enumerate(task.load(split)):
                stratum = f"{name}, {e.stratum}" if e.stratum else name
                examples.append(dataclasses.replace(e, id=f"{name}/{e.id}", stratum=stratum))
                places.append((i + 0.5) / weights[name])
        return [examples[i] for i in np.argsort(places, kind="stable")]

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        # One batch for each part, for the sake of its worker processes.
        for name in dict.fromkeys(example.task for example in examples):
            rows = [i for i, example in enumerate(examples) if example.task == name]
            judged = parts[name].verify([examples[i] for i in rows], [responses[i] for i in rows])
            verdicts.update(zip(rows, judged, strict=True))
        return [verdicts[i] for i in range(len(examples))]

    def read_answer(example: Example, response: str) -> str | None:
        read = parts[example.task].read_answer
        return read(example, response) if read else None

    def gold(example: Example) -> str | None:
        task = parts[example.task]
        return task.gold(example) if task.gold else None

    def demonstrations(seed: int) -> Iterator[tuple[Example, str]]:
        streams, names = {name: make(seed) for name, make in makers.items() if make}, list(weights)
        for part in itertools.cycle(pattern(list(weights.values()))):
            example, response = next(streams[names[part]])
            yield dataclasses.replace(example, task=names[part]), response

    def template(prompt: str) -> str:
        """What is alike under the template of any part, since a prompt does not say which it is."""
        return functools.reduce(lambda text, task: task.template(text), parts.values(), prompt)

    makers = {name: task.demonstrations for name, task in parts.items()}
    return Task(
        name="mix",
        load=load,
        prompt=lambda example: parts[example.task].prompt(example),
        cloud_prompt=lambda example: parts[example.task].cloud_prompt(example),
        verify=verify,
        splits=tuple(s for s in SPLITS if all(s in task.splits for task in parts.values())),
        solve_prompt=_of_whose_prompt({name: task.solve_prompt for name, task in parts.items()}),
        difficulty=_of_whose_prompt({name: task.difficulty for name, task in parts.items()}),
        gold=gold,
        weights=weights,
        read_answer=read_answer,
        demonstrations=demonstrations if all(makers.values()) else None,
        template=template,
    )
