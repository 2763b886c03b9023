"""Prompts of your own, from JSON lines. Copy this file to write a task.

`config.task.data_dir` has train.jsonl, test.jsonl and, if wanted, validation.jsonl (or .jsonl.gz).
A line is an object with `id`, `problem` and `answer` (which `config.task.reward` or `judge` can do
without); a response is right where its answer is that one but for case and white space. The rest of
a line is yours, in `example.problem`; `level` or `type` is the stratum. `TASKS` names all tasks.
"""

from ml_collections import ConfigDict

from collab_jax.tasks import base, prose, rows
from collab_jax.tasks.base import Example, Task

CLOUD_PROMPT = "{problem}\n\nEnd with the final answer alone between <answer> and </answer>."


def same(gold: str, answer: str | None) -> bool:
    """Whether an answer is the gold one but for case and white space."""
    return answer is not None and answer.casefold().split() == gold.casefold().split()


def make_task(config: ConfigDict) -> Task:
    """The task of the two files; `config.task.prompt` has {problem} where the problem goes."""
    fields = () if config.task.reward or config.task.judge else ("answer",)
    return rows.make_task(
        config,
        load=lambda split: [
            Example(row["id"], rows.stratum(row), row)
            for row in rows.read(config.task.data_dir, split, fields)
        ],
        problem=lambda example: example.problem["problem"],
        gold=lambda example: example.problem.get("answer"),
        compare=lambda golds, responses: [
            same(gold, base.answer_of(r)) for gold, r in zip(golds, responses, strict=True)
        ],
        cloud_prompt=CLOUD_PROMPT,
        splits=rows.splits_in(config.task.data_dir),
        read_answer=lambda _, response: prose.last_line(response),
    )
