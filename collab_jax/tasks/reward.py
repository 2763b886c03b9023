"""A reward of your own: a Python function that tells right from wrong, for a task's verifier.

`config.task.reward = "path/to/file.py:function"`, a local file that is loaded once. A run does not
go on with another text of that file. The function is called as `function(example,
response)` with the example (`example.problem` is the task's own data, `example.task` its name) and
the whole text of a finished response that did not call the cloud, or of the cloud's answer; an
evaluation also calls it with `<answer>...</answer>` for what it read in a response without tags.
What it returns:

    True, False      right, wrong
    0 ... 1          a grade: it earns this part of what `config.reward` gives for a right answer,
                     and counts as right from `config.task.right_from` on
    None             cannot be judged: counted as wrong, and among `verifier_failures`
"""

import numbers
from collections.abc import Callable, Sequence

import numpy as np

from collab_jax.runtime import functions
from collab_jax.tasks import base
from collab_jax.tasks.base import Example, TaskError, Verdict, Verify

Reward = Callable[[Example, str], bool | float | None]


def verifier(spec: str, marker: str, right_from: float) -> Verify:
    """`Task.verify` by the function that `spec` names, which is loaded now.

    right_from: the lowest grade that is right.
    """
    function: Reward = functions.load(spec, "config.task.reward")
    path = functions.path_of(spec)

    def value_of(example: Example, response: str) -> bool | float | None:
        where = f"config.task.reward={spec}: example {example.id!r}"
        try:
            value = function(example, response)
        except Exception as error:  # the user's code
            raise TaskError(
                f"{where}, {functions.where(path, error)}: mend the function, "
                "or let it return None for what it cannot judge"
            ) from error
        if value is None:
            return None
        if not isinstance(value, numbers.Real | np.bool_) or not 0 <= value <= 1:
            raise TaskError(f"{where} got {value!r}: return a bool, a number from 0 to 1, or None")
        return bool(value) if isinstance(value, bool | np.bool_) else float(value)

    def verdict(example: Example, response: str) -> Verdict:
        called = base.called(response, marker)
        value = value_of(example, response) if response and not called else False
        return Verdict(
            correct=value is not None and value >= right_from,
            called=called,
            formatted=base.formatted(response),
            unjudged=value is None,
            grade=value if isinstance(value, float) else None,
        )

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        return [verdict(e, response) for e, response in zip(examples, responses, strict=True)]

    return verify
