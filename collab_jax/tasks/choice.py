"""Multiple choice with letters: MMLU, for evaluation."""

import pathlib
import re

from collab_jax.tasks import math, rows
from collab_jax.tasks.base import Example, Task, TaskError

LETTERS = "ABCDEFGHIJ"
_CLOUD_PROMPT = "Answer this question. End with the letter of the right choice between <answer> and </answer>.\n\n{problem}"
_LETTER = re.compile(r"\(?([A-J])\)?(?:[.:)].*)?", re.DOTALL)


def letter(response: str) -> str | None:
    """The letter that a response chooses: its answer, or the beginning of it, as in "B", "(B)" or
    "B. 42".
    """
    answer = math.extract(response)
    match = _LETTER.fullmatch(math.normal(answer)) if answer else None
    return match[1] if match else None


def load(task, split: str) -> list[Example]:
    """The examples of `mmlu_test`; problem: (question, choices, letter). There is no training
    split.

    Some of its high-school mathematics are problems of MATH's training split: these say so
    (`Example.seen`).
    """
    if split != "test":
        raise TaskError(f"task {task.name!r} has no {split} split: it is for evaluation alone")
    name = f"{task.name}_test"
    found = []
    for row in rows.read(pathlib.Path(task.data_dir).expanduser(), name, ("answer", "choices")):
        if row["answer"] not in LETTERS[: len(row["choices"])]:
            raise TaskError(
                f"{name}, row {row['id']}: the answer {row['answer']!r} is not the letter of one of its choices"
            )
        problem = row["problem"], tuple(row["choices"]), row["answer"]
        seen = "math" if row.get("math_train_id") else ""
        found.append(Example(row["id"], rows.stratum(row), problem, seen=seen))
    return found


def make_task(config) -> Task:
    """MMLU; `config.task.prompt` has {problem} where question and choices go."""

    def problem(example: Example) -> str:
        question, choices, _ = example.problem
        return "\n".join(
            [question, *(f"{x}. {choice}" for x, choice in zip(LETTERS, choices, strict=False))]
        )

    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=problem,
        gold=lambda example: example.problem[2],
        compare=lambda examples, responses: [
            letter(r) == e.problem[2] for e, r in zip(examples, responses, strict=True)
        ],
        cloud_prompt=_CLOUD_PROMPT,
    )
