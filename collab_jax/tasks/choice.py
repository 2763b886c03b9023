"""Multiple choice with letters: MMLU, for evaluation."""

import pathlib
import re
from collections.abc import Sequence

from collab_jax.tasks import base, math, rows
from collab_jax.tasks.base import Example, Messages, Task, TaskError, Verdict

LETTERS = "ABCDEFGHIJ"
_CLOUD_PROMPT = (
    "Answer this question. End with the letter of the right choice between <answer> and </answer>.\n\n{problem}"
)
_LETTER = re.compile(r"\(?([A-J])\)?(?:[.:)].*)?", re.DOTALL)


def letter(response: str) -> str | None:
    """The letter that a response chooses: its answer, or the beginning of it, as in "B", "(B)" or "B. 42"."""
    answer = math.extract(response)
    match = _LETTER.fullmatch(math.normal(answer)) if answer else None
    return match[1] if match else None


def load(task, split: str) -> list[Example]:
    """The examples of `mmlu_test`; problem: (question, choices, letter). There is no training split."""
    if split != "test":
        raise TaskError(f"task {task.name!r} has no {split} split: it is for evaluation alone")
    name = f"{task.name}_test"
    found = []
    for row in rows.read(pathlib.Path(task.data_dir).expanduser(), name, ("choices",)):
        if row["answer"] not in LETTERS[: len(row["choices"])]:
            raise TaskError(
                f"{name}, row {row['id']}: the answer {row['answer']!r} is not the letter of one of its choices"
            )
        problem = row["problem"], tuple(row["choices"]), row["answer"]
        found.append(Example(row["id"], math.stratum(row), problem))
    return found


def make_task(config) -> Task:
    """MMLU; `config.task.prompt` has {problem} where question and choices go."""
    task, marker = config.task, config.text.marker
    math.check_prompt(task.prompt)

    def messages(template: str, example: Example) -> Messages:
        question, choices, _ = example.problem
        lines = [question, *(f"{x}. {choice}" for x, choice in zip(LETTERS, choices, strict=False))]
        return [{"role": "user", "content": template.replace("{problem}", "\n".join(lines))}]

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        return [
            Verdict(letter(r) == e.problem[2], base.called(r, marker), base.formatted(r))
            for e, r in zip(examples, responses, strict=True)
        ]

    return Task(
        name=task.name,
        load=lambda split: load(task, split),
        prompt=lambda example: messages(task.prompt, example),
        cloud_prompt=lambda example: messages(_CLOUD_PROMPT, example),
        verify=verify,
    )
