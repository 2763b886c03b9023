"""SVAMP: word problems with one or two steps of arithmetic (Patel et al., NAACL 2021).

As its authors do, training is on MAWPS and ASDiv-A, which come with their steps, and the test is on
SVAMP's 1,000 problems. A tenth of the training templates is for validation (`splits.py`). Training
rows whose last step is not exactly the answer are left out: 48 of 2,814, most of them with an
answer such as 9.555555555555557, which nobody could derive from the step 172/18=9.5556.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from collab_jax.tasks import (
    distract,
    drills,
    math,
    prose,
    renumber,
    reorder,
    rows,
    spelling,
    splits,
)
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError

_CLOUD_PROMPT = (
    "Solve this problem. End with the answer, a number alone, between <answer> and </answer>.\n\n"
    "{problem}"
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
DRILL_EVERY = 3  # problems of demonstrations


def steps(row: dict[str, Any]) -> list[str]:
    """The steps to the answer of a training row, as ["1500*8=12000", "25000-12000=13000"]."""
    return row["solution"].split(", ")


def _count_steps(row: dict[str, Any]) -> int:
    """How many steps a row takes: a test row has no solution, but an equation in infix notation."""
    if "solution" in row:
        return len(steps(row))
    return max(sum(token in "+-*/" for token in row["equation"].split()), 1)


def _ends_in_answer(row: dict[str, Any]) -> bool:
    """Whether the last step of a training row has the answer's very value."""
    _, _, value = steps(row)[-1].rpartition("=")
    return spelling.number(value) == spelling.number(row["answer"])


def _hardness(row: dict[str, Any]) -> tuple[int, int, int]:
    """What orders rows from easy to hard: more steps, then more numbers, then more digits."""
    numbers = _NUMBER.findall(row["problem"])
    return _count_steps(row), len(numbers), sum(map(len, numbers))


def load(task: ConfigDict, split: str) -> list[Example]:
    """The examples of a split; `example.problem` is the row. The stratum counts the steps.

    The difficulty is the rank among the rows of the file that are not left out. Raises TaskError
    where none of them is for the split.
    """
    is_test = split == "test"
    name, needed = ("svamp_test", "equation") if is_test else ("svamp_train", "solution")
    read = rows.read(task.data_dir, name, ("answer", needed))
    kept = [row for row in read if is_test or _ends_in_answer(row)]
    examples = [
        Example(row["id"], f"{_count_steps(row)}-step", row, difficulty=rank)
        for row, rank in zip(kept, rows.ranks([_hardness(row) for row in kept]), strict=True)
    ]
    of_split = splits.of_split(examples, split, _problem)
    if not of_split:
        raise TaskError(
            f"none of the {len(kept)} usable rows of {name} is for {split}: give it more rows"
        )
    return of_split


def _problem(example: Example) -> str:
    return example.problem["problem"]


def demonstrations(
    seed: int, examples: Sequence[Example], give_up: float, marker: str
) -> Iterator[tuple[Example, str]]:
    """Endless (example, response): in each epoch all training examples once, in another order.

    In every second epoch problems have other numbers where that is safe (`renumber.py`), two in
    three are told in another order, where there is one (`reorder.py`), every second one has a
    number that is of no use, where one can be put in (`distract.py`), and after every third comes a
    drill in arithmetic (`drills.py`). A response shows the steps, each on a line. A share `give_up`
    of them stops at random, without a look at the problem, and ends with the marker: before a step,
    after the last one, or where the answer would open.
    """
    rng = random.Random(f"demonstrations {seed}")
    things = distract.things([example.problem for example in examples])
    for epoch in itertools.count():
        for i, example in enumerate(rng.sample(examples, len(examples))):
            row = renumber.renumbered(example.problem, rng) if epoch % 2 else example.problem
            row = reorder.reordered(row, rng) if i % 3 else row
            row = distract.distracted(row, things, rng) if i % 2 else row
            example = dataclasses.replace(example, problem=row)
            yield example, _response(row, give_up, marker, rng)
            if i % DRILL_EVERY == DRILL_EVERY - 1:
                row = drills.drill(rng)
                yield Example(row["id"], "drill", row), _response(row, give_up, marker, rng)


def _response(row: dict[str, Any], give_up: float, marker: str, rng: random.Random) -> str:
    lines = steps(row)
    thought = "<think>" + "\n".join(lines) + "</think>\n"
    if rng.random() >= give_up:
        return f"{thought}<answer>{row['answer']}</answer>"
    stop = rng.randint(0, len(lines) + 1)
    before = "<think>" + "".join(f"{line}\n" for line in lines[:stop])
    return (before if stop <= len(lines) else thought) + marker


def _template(prompt: str) -> str:
    """The words of a problem's question, which stays whatever is put before it; else all words.

    Of a drill, which has none, all of it.
    """
    questions = distract.questions(prompt)
    return splits.template(questions[-1] if questions else prompt) or prompt


def make_task(config: ConfigDict) -> Task:
    """SVAMP; `config.task.prompt` has {problem} where the problem goes."""
    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=_problem,
        gold=lambda example: example.problem["answer"],
        compare=lambda examples, responses: math.equal_all(
            [
                (e.problem["answer"], math.extract(r))
                for e, r in zip(examples, responses, strict=True)
            ]
        ),
        cloud_prompt=_CLOUD_PROMPT,
        read_answer=lambda _, response: prose.last_answer(response),
        splits=SPLITS,
        ranked=True,
        demonstrations=lambda seed: demonstrations(
            seed, load(config.task, "train"), config.task.demo_give_up, config.text.marker
        ),
        template=_template,
    )
