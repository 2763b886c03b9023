"""What every task shares: the types, and how a response is read (paper, section 3)."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from collab_jax.models.text import TAGS, UNKNOWN_TOKEN, Messages
from collab_jax.runtime.errors import UserError

SPLITS = ("train", "validation", "test")


class TaskError(UserError):
    """A task or its data cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Example:
    """The problem of one prompt.

    id: unique in its split. stratum: the difficulty class. problem: the task's own data.
    task: the name of its task, in a mix the part's. split: one of SPLITS. seen: the training task
    that holds the same problem, if one does. difficulty: how hard it is among the task's problems,
    as a rank from 0 to 1 whose mean is 1/2; None where the task does not say. budget: the share of
    calls that the prompt shows (`budgets.py`), if it does.
    """

    id: str
    stratum: str
    problem: Any
    task: str = ""
    split: str = ""
    seen: str = ""
    difficulty: float | None = None
    budget: float | None = None


class Verdict(NamedTuple):
    """What a response is. A response that called is neither correct nor formatted.

    Where `timed_out` or `unjudged` is set, nobody knows whether the response is correct, and
    `correct` is False. A graded one is correct where its grade reaches `config.task.right_from`.
    """

    correct: bool
    called: bool
    formatted: bool
    timed_out: bool = False  # the comparison was stopped at its deadline
    unjudged: bool = False  # a judge's call failed, a reward returned None, or there is no answer
    grade: float | None = None  # in [0, 1]; None: the response is right or wrong, no more

    @property
    def value(self) -> float:
        """How right the response is, in [0, 1]."""
        return float(self.correct) if self.grade is None else self.grade


Verify = Callable[[Sequence[Example], Sequence[str]], list[Verdict]]
ReadAnswer = Callable[[Example, str], str | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions of a task.

    load(split) -> the examples of one of `splits`. prompt(example) -> the device model's chat
    messages; cloud_prompt(example) -> the cloud's. verify(examples, responses) -> a Verdict of each
    *finished* response, and of each of the cloud's answers.
    splits: those of SPLITS that the task has: one that can be trained has all.
    solve_prompt(messages) -> a right response to a cloud prompt; None: there is no exact solver.
    difficulty(messages) -> that of a cloud prompt's example; None: no example has one.
    gold(example) -> the right answer, None where the example has none; None: the task keeps none.
    graded: whether verdicts have grades.
    weights: of a mix, each part's share of the training prompts.
    read_answer(example, response) -> the answer of a response without tags, None where there is
    none; None: the task reads nothing without tags. Evaluation alone uses it (`lenient_verdicts`).
    demonstrations(seed) -> endless (example, response) pairs for the warm start; None: there are
    none. template(prompt) -> what problems have in common that are alike but for details, such as
    their numbers.
    """

    name: str
    load: Callable[[str], list[Example]]
    prompt: Callable[[Example], Messages]
    cloud_prompt: Callable[[Example], Messages]
    verify: Verify
    splits: Sequence[str] = SPLITS
    solve_prompt: Callable[[Messages], str] | None = None
    difficulty: Callable[[Messages], float | None] | None = None
    gold: Callable[[Example], str | None] | None = None
    graded: bool = False
    weights: Mapping[str, float] | None = None
    read_answer: ReadAnswer | None = None
    demonstrations: Callable[[int], Iterator[tuple[Example, str]]] | None = None
    template: Callable[[str], str] = str


_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def called(response: str, marker: str) -> bool:
    """True where the marker is the terminal action of a response.

    Nothing but white space follows it, and no answer was opened.
    """
    return response.rstrip().endswith(marker.rstrip()) and "<answer>" not in response


def taken_back(response: str, marker: str) -> str:
    """A response without its answer where a call comes after it; else as it is."""
    if not response.rstrip().endswith(marker.rstrip()) or "<answer>" not in response:
        return response
    return response[: response.index("<answer>")] + marker


def formatted(response: str) -> bool:
    """True for just `<think> ... </think><answer> ... </answer>`, each tag once, all of it tokens.

    White space around the two blocks is free.
    """
    return (
        all(response.count(tag) == 1 for tag in TAGS)
        and _FORMAT.fullmatch(response) is not None
        and UNKNOWN_TOKEN.search(response) is None
    )


def answer_of(response: str) -> str | None:
    """The text of `block_of`, without white space around it, or None."""
    block = block_of(response)
    return None if block is None else block.strip()


def block_of(response: str) -> str | None:
    """All of the last closed `<answer>` block, white space included, or None.

    None too where it contains an id that is no token (`Text.decode`).
    """
    start = response.rfind("<answer>", 0, max(response.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    end = response.find("</answer>", start)  # a later, stray closing tag closes nothing
    block = response[start:end]
    return None if UNKNOWN_TOKEN.search(block) else block


def lenient_verdicts(
    task: Task,
    examples: Sequence[Example],
    responses: Sequence[str],
    correct: Sequence[bool],
    ended: Sequence[bool],
) -> list[Verdict | None]:
    """The verdict on the answer of each response that is without tags or cut off.

    None where nothing else than what `task.verify` has seen is read. correct: what that says of the
    responses, False where one was cut off. A response with a closed `<answer>` block has its answer
    there; where it ended, `verify` has compared it already.
    """
    read: dict[int, str] = {}
    for i, response in enumerate(responses):
        answer = block_of(response)
        if correct[i] or (ended[i] and answer is not None):
            continue
        if answer is None and task.read_answer:
            answer = task.read_answer(examples[i], response)
        if answer and not answer.isspace():
            read[i] = f"<answer>{answer}</answer>"
    judged = task.verify([examples[i] for i in read], list(read.values())) if read else []
    verdicts = dict(zip(read, judged, strict=True))
    return [verdicts.get(i) for i in range(len(responses))]
