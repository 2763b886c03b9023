"""Multiple choice with letters: MMLU, for evaluation."""

from ml_collections import ConfigDict

from collab_jax.tasks import math, prose, rows, splits
from collab_jax.tasks.base import Example, Task, TaskError

LETTERS = "ABCDEFGHIJ"
_CLOUD_PROMPT = (
    "Answer this question. End with the letter of the right choice between <answer> and </answer>."
    "\n\n{problem}"
)


def letter(response: str) -> str | None:
    """The letter that a response chooses: "B", "(B)", "B. 42", "The answer is B"."""
    answer = math.extract(response)
    return prose.letter(answer) if answer else None


def load(task: ConfigDict, split: str) -> list[Example]:
    """The examples of the test, the one split; `example.problem` is (question, choices, letter).

    Some of the high-school mathematics are problems of MATH's training
    split: these say so (`Example.seen`).
    """
    name, examples = f"{task.name}_{split}", []
    for row in rows.read(task.data_dir, name, ("answer", "choices")):
        if row["answer"] not in LETTERS[: len(row["choices"])]:
            raise TaskError(
                f"{name}, row {row['id']}: "
                f"the answer {row['answer']!r} is not the letter of one of its choices"
            )
        problem = row["problem"], tuple(row["choices"]), row["answer"]
        seen = "math" if row.get("math_train_id") else ""
        examples.append(Example(row["id"], rows.stratum(row), problem, seen=seen))
    return splits.shuffled(examples, _question)


def _question(example: Example) -> str:
    question, choices, _ = example.problem
    lines = [f"{x}. {choice}" for x, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines])


def make_task(config: ConfigDict) -> Task:
    """MMLU; `config.task.prompt` has {problem} where question and choices go."""
    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=_question,
        gold=lambda example: example.problem[2],
        compare=lambda examples, responses: [
            letter(r) == e.problem[2] for e, r in zip(examples, responses, strict=True)
        ],
        cloud_prompt=_CLOUD_PROMPT,
        splits=("test",),
        read_answer=lambda _, response: prose.last_letter(response),
    )
