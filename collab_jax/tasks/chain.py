"""Chains: arithmetic from left to right, modulo 1,000, where a step can slip and nothing shows it.

A problem is a number and what is done with it, as `47+38*6-129`: ((47 + 38) * 6 - 129) mod 1000.
Unlike Countdown's, an answer cannot be checked by looking at it: whether to trust it is a matter of
how sure the steps were. The stratum and the difficulty are the number of steps.

Problems are drawn where they are needed, and nothing is on disk. A hash of the problem decides its
split (`splits.py`), whatever the seed or the size of a split.
"""

import functools
import itertools
import operator
import random
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from collab_jax.tasks import base, prose, rows, splits
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError

MODULUS = 1000
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_STEP = re.compile(r"([-+*])(\d+)")
_CLOUD_PROMPT = (
    "Work from left to right, one operation at a time, without precedence, and after each take the "
    "result modulo 1000: {problem}\n\n"
    "End with the last result alone between <answer> and </answer>."
)

# ---- the stream of problems


def steps(problem: str) -> list[str]:
    """The steps of a problem: of `47+38*6-129` they are 47+38=85, 85*6=510, 510-129=381."""
    first = _STEP.search(problem)
    assert first
    value, lines = int(problem[: first.start()]), []
    for sign, number in _STEP.findall(problem):
        before, value = value, _APPLY[sign](value, int(number)) % MODULUS
        lines.append(f"{before}{sign}{number}={value}")
    return lines


def answer(problem: str) -> str:
    """The right answer of a problem."""
    return steps(problem)[-1].partition("=")[2]


def generate(split: str, seed: int | str, task: ConfigDict) -> Iterator[str]:
    """Endless problems of a split, by `task.numbers` and `task.steps`; some may come twice."""
    rng = random.Random(f"chain {split} {seed}")  # a string is hashed: near seeds share nothing
    while True:
        # The number of steps that was drawn is kept, so that all are equally likely.
        length = rng.randint(*task.steps)
        while True:
            parts = [str(rng.randint(*task.numbers))]
            for _ in range(length):
                parts += rng.choice("+-*"), str(rng.randint(*task.numbers))
            problem = "".join(parts)
            # What a simulated cloud says where it errs is 0.
            if splits.side_of(problem) == split and answer(problem) != "0":
                break
        yield problem


def load(split: str, task: ConfigDict) -> list[Example]:
    """The examples of a split, none twice; `example.problem` is the text.

    Raises TaskError where there are not so many.
    """
    wanted = task.train_examples if split == "train" else task.test_examples
    # Another stream than that of the demonstrations.
    stream = generate(split, f"data {task.data_seed}", task)
    found: dict[str, None] = {}  # in their order, none twice
    for problem in itertools.islice(stream, 20 * wanted):
        found.setdefault(problem)
        if len(found) == wanted:
            break
    if len(found) < wanted:
        raise TaskError(
            f"only {len(found)} different {split} problems of {wanted}: widen config.task.numbers "
            "or steps, or ask for fewer config.task.train_examples or test_examples"
        )
    return [_example(f"{split}-{i}", problem, task) for i, problem in enumerate(found)]


def _example(name: str, problem: str, task: ConfigDict) -> Example:
    fewest, most = task.steps
    length = len(_STEP.findall(problem))
    rank = (length - fewest + 0.5) / (most - fewest + 1)
    return Example(name, f"{length}-step", problem, difficulty=rank)


# ---- the task


def demonstrations(seed: int, task: ConfigDict, marker: str) -> Iterator[tuple[Example, str]]:
    """Endless (example, response) of the train side: every step on a line, and the answer.

    A share `task.demo_give_up` stops somewhere, in the middle of a number too, and calls, all of it
    drawn without a look at the problem: that brings the call within reach of sampling, and does not
    say when it pays. Anywhere, since a slip shows where its digits are chosen, and no later.
    """
    rng = random.Random(f"chain demonstrations {seed}")
    for i, problem in enumerate(generate("train", f"demonstrations {seed}", task)):
        lines = steps(problem)
        if rng.random() < task.demo_give_up:
            thought = "".join(f"{line}\n" for line in lines)
            response = "<think>" + thought[: rng.randrange(len(thought) + 1)] + marker
        else:
            thought = "\n".join(lines)
            response = f"<think>{thought}</think><answer>{answer(problem)}</answer>"
        yield _example(f"demonstration-{i}", problem, task), response


def _is_answer(gold: str, response: str) -> bool:
    """Whether the answer of a response is the gold one, in digits alone."""
    found = base.answer_of(response) or ""
    return re.fullmatch("[0-9]{1,20}", found) is not None and int(found) == int(gold)


def make_task(config: ConfigDict) -> Task:
    """Chains by `config.task`; `config.task.prompt` has {problem} where the problem goes.

    Raises TaskError for ranges that cannot be.
    """
    task = config.task
    for name, lowest in (("numbers", 0), ("steps", 1)):
        ends = tuple(task[name])
        whole = all(isinstance(v, int) for v in ends)
        if len(ends) != 2 or not whole or not lowest <= ends[0] <= ends[1]:
            raise TaskError(
                f"config.task.{name}={ends} must be two integers, {lowest} <= lowest <= highest"
            )
    if min(task.train_examples, task.test_examples) < 1:
        raise TaskError("config.task.train_examples and test_examples must be at least 1")
    return rows.make_task(
        config,
        load=functools.cache(lambda split: load(split, task)),  # the cloud's solver loads it too
        problem=lambda example: example.problem,
        gold=lambda example: answer(example.problem),
        compare=lambda examples, responses: [
            _is_answer(answer(e.problem), r) for e, r in zip(examples, responses, strict=True)
        ],
        cloud_prompt=_CLOUD_PROMPT,
        splits=SPLITS,
        ranked=True,
        read_answer=lambda _, response: prose.last_answer(response),
        demonstrations=lambda seed: demonstrations(seed, task, config.text.marker),
    )
