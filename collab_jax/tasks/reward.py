"""A reward of your own: a Python function that tells right from wrong, for a task's verifier.

`config.task.reward = "path/to/file.py:function"`, a local file that is loaded once. A run does not
go on with another text of that file. The function is called as `function(example,
response)` with the example (`example.problem` is the task's own data, `example.task` its name) and
the whole text of a finished response that did not call the cloud, or of the cloud's answer; an
evaluation also calls it with `<answer>...</answer>` for what it read in a response without tags.
What it returns:

    True, False      right, wrong
    0 ... 1          right from 0.5 on: the method rewards being right, and `config.reward` says
                     how much
    None             cannot be judged: counted as wrong, and among `verifier_failures`
"""

import importlib.util
import numbers
import pathlib
import traceback
from collections.abc import Callable, Sequence

import numpy as np

from collab_jax.tasks import base
from collab_jax.tasks.base import Example, TaskError, Verdict, Verify

Reward = Callable[[Example, str], bool | float | None]


def load(spec: str) -> Reward:
    """The function that "file.py:function" names.

    Raises TaskError, with file and line, where it cannot be had.
    """
    file, _, name = spec.rpartition(":")
    path = pathlib.Path(file).expanduser()
    if not file or path.suffix != ".py" or not path.is_file():
        raise TaskError(
            f"config.task.reward={spec!r} must be path/to/file.py:function, "
            "and the file must be there"
        )
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert module_spec and module_spec.loader  # there is one for every .py file
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # anything that a file may do wrong
        raise TaskError(
            f"config.task.reward: {path} does not load, {_at(path, error)}: mend it"
        ) from error
    function: Reward | None = getattr(module, name, None)
    if not callable(function):
        raise TaskError(f"config.task.reward: {path} has no function {name!r}")
    return function


def verifier(spec: str, marker: str) -> Verify:
    """`Task.verify` by the function that `spec` names, which is loaded now."""
    function, path = load(spec), pathlib.Path(spec.rpartition(":")[0]).expanduser()

    def is_right(example: Example, response: str) -> bool | None:
        where = f"config.task.reward={spec}: example {example.id!r}"
        try:
            value = function(example, response)
        except Exception as error:  # the user's code
            raise TaskError(
                f"{where}, {_at(path, error)}: mend the function, "
                "or let it return None for what it cannot judge"
            ) from error
        if value is None:
            return None
        if not isinstance(value, numbers.Real | np.bool_) or not 0 <= value <= 1:
            raise TaskError(f"{where} got {value!r}: return a bool, a number from 0 to 1, or None")
        return bool(value >= 0.5)

    def verdict(example: Example, response: str) -> Verdict:
        called = base.called(response, marker)
        right = is_right(example, response) if response and not called else False
        return Verdict(
            correct=right is True,
            called=called,
            formatted=base.formatted(response),
            unjudged=right is None,
        )

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        return [verdict(e, response) for e, response in zip(examples, responses, strict=True)]

    return verify


def _at(path: pathlib.Path, error: Exception) -> str:
    """'line 3: KeyError: 'x'', of the last line of this file that the exception came through."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == path]
    cause = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"line {lines[-1]}: {cause}" if lines else cause
