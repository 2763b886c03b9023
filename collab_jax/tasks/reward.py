"""A reward of your own: a Python function that tells right from wrong, in place of a task's
verifier.

`config.task.reward = "path/to/file.py:function"`, a local file that is loaded once. Keep it as it
is while a run goes on: the run knows it by name only. The function is called as `function(example,
response)` with the example (`example.problem` is the task's own data, `example.task` its name) and
the whole text of a finished response that did not call the cloud, or of the cloud's answer. What it
returns:

    True, False      right, wrong
    0 ... 1          right from 0.5 on: the method rewards being right, and how much is `config.reward`'s to say
    None             cannot be judged: counted as wrong, and among `verifier_failures`
"""

import importlib.util
import numbers
import pathlib
import traceback
from collections.abc import Callable, Sequence

import numpy as np

from collab_jax.tasks import base
from collab_jax.tasks.base import Example, TaskError, Verdict

Reward = Callable[[Example, str], bool | float | None]


def load(spec: str) -> Reward:
    """The function that "file.py:function" names. Raises TaskError where it cannot be had, with
    file and line.
    """
    file, _, name = spec.rpartition(":")
    path = pathlib.Path(file).expanduser()
    if not file or path.suffix != ".py" or not path.is_file():
        raise TaskError(
            f"config.task.reward={spec!r} must be path/to/file.py:function, and the file must be there"
        )
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # anything that a file may do wrong
        raise TaskError(
            f"config.task.reward: {path} does not load, {_at(path, error)}: mend it"
        ) from error
    if not callable(function := getattr(module, name, None)):
        raise TaskError(f"config.task.reward: {path} has no function {name!r}")
    return function


def verifier(spec: str, marker: str) -> Callable[[Sequence[Example], Sequence[str]], list[Verdict]]:
    """`Task.verify` by the function that `spec` names, which is loaded now."""
    function, path = load(spec), pathlib.Path(spec.rpartition(":")[0]).expanduser()

    def judged(example: Example, response: str) -> bool | None:
        try:
            value = function(example, response)
        except Exception as error:  # the user's code
            raise TaskError(
                f"config.task.reward={spec}: example {example.id!r}, {_at(path, error)}: mend the function, or let it "
                "return None for what it cannot judge"
            ) from error
        if value is None:
            return None
        if not isinstance(value, numbers.Real | np.bool_) or not 0 <= value <= 1:
            raise TaskError(
                f"config.task.reward={spec}: example {example.id!r} got {value!r}: return a bool, a number from 0 to 1, or None"
            )
        return bool(value >= 0.5)

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        found = []
        for example, response in zip(examples, responses, strict=True):
            called = base.called(response, marker)
            right = judged(example, response) if response and not called else False
            found.append(
                Verdict(right is True, called, base.formatted(response), unjudged=right is None)
            )
        return found

    return verify


def _at(path: pathlib.Path, error: Exception) -> str:
    """'line 3: KeyError: 'x'', of the last line in this file that an exception came through."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(f.filename) == path
    ]
    cause = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"line {lines[-1]}: {cause}" if lines else cause
