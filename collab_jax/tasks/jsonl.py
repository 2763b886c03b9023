"""Prompts of your own: train.jsonl and test.jsonl (or .jsonl.gz) in `config.task.data_dir`. Copy
this file to write a task.

A line is an object with `id`, `problem` and, unless `config.task.reward` or `task.judge` tells
right from wrong, `answer`, with which a response's answer must agree but for case and white space.
Other fields are yours, in `example.problem`; `level` or `type` becomes the stratum. A task of
another name than `jsonl` needs a line in `TASKS` (`__init__.py`).
"""

import pathlib

from collab_jax.tasks import base, rows
from collab_jax.tasks.base import Example, Task

CLOUD_PROMPT = "{problem}\n\nEnd with the final answer alone between <answer> and </answer>."


def same(gold: str | None, answer: str | None) -> bool | None:
    """Whether an answer is the gold one; None where there is no gold answer."""
    plain = lambda text: " ".join(text.split()).casefold()  # noqa: E731
    return None if gold is None else answer is not None and plain(answer) == plain(gold)


def make_task(config) -> Task:
    """The task of the two files; `config.task.prompt` has {problem} where the problem goes."""
    task = config.task
    fields = () if task.reward or task.judge else ("answer",)

    def load(split: str) -> list[Example]:
        found = rows.read(pathlib.Path(task.data_dir).expanduser(), split, fields)
        return [Example(row["id"], rows.stratum(row), row) for row in found]

    def compare(examples, responses):
        return [same(gold(e), base.answer_of(r)) for e, r in zip(examples, responses, strict=True)]

    gold = lambda example: example.problem.get("answer")  # noqa: E731
    return rows.make_task(config, load, lambda e: e.problem["problem"], gold, compare, CLOUD_PROMPT)
