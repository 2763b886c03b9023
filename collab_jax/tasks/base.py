"""What every task shares: the types, and how a response is read (paper section 3, the response
format).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError


class TaskError(UserError):
    """A task or its data cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt's problem. id: unique in its split; stratum: its difficulty class; problem: the
    task's own data.

    task: the name of its task, in a mix the part's. seen: the training task that holds the same
    problem, if one does.
    """

    id: str
    stratum: str
    problem: Any
    task: str = ""
    seen: str = ""


class Verdict(NamedTuple):
    """What a response is. `called` and `correct` exclude each other, and so do `called` and
    `formatted`.
    """

    correct: bool
    called: bool
    formatted: bool
    timed_out: bool = False  # the verifier did not get to an end, and `correct` is False for that
    unjudged: bool = False  # nor is it known: a judge's call failed, or a reward said None


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions of a task.

    load(split) -> list[Example], split "train" or "test"; prompt(example) -> the device model's
    chat messages; cloud_prompt(example) -> the cloud's; verify(examples, responses) -> a Verdict of
    each *finished* response; solve_prompt(messages) -> a right response to a cloud prompt (None:
    the task has no exact solver); gold(example) -> its right answer, or None where it has none
    (None: the task keeps no answers);
    weights: of a mix, each part's share of the training prompts; demonstrations(seed) -> endless
    (example, response) pairs for the warm start (None: the task makes none).
    """

    name: str
    load: Callable[[str], list[Example]]
    prompt: Callable[[Example], Messages]
    cloud_prompt: Callable[[Example], Messages]
    verify: Callable[[Sequence[Example], Sequence[str]], list[Verdict]]
    solve_prompt: Callable[[Messages], str] | None = None
    gold: Callable[[Example], str | None] | None = None
    weights: Mapping[str, float] | None = None
    demonstrations: Callable[[int], Iterator[tuple[Example, str]]] | None = None


_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def called(response: str, marker: str) -> bool:
    """True where the marker is the terminal action: nothing but white space follows it, and no
    answer was opened.
    """
    return response.rstrip().endswith(marker.rstrip()) and "<answer>" not in response


def formatted(response: str) -> bool:
    """True for just `<think> ... </think><answer> ... </answer>`, each tag once; white space around
    blocks is free.
    """
    return (
        all(response.count(tag) == 1 for tag in _TAGS) and _FORMAT.fullmatch(response) is not None
    )


def answer_of(response: str) -> str | None:
    """The text of the last closed `<answer>` block, or None."""
    start = response.rfind("<answer>", 0, max(response.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return response[
        start : response.find("</answer>", start)
    ]  # a later, stray closing tag closes nothing
