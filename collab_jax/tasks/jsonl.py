"""Prompts of your own, from JSON lines. Copy this file to write a task.

`config.task.data_dir` has train.jsonl and test.jsonl (or .jsonl.gz). A line is an object with `id`,
`problem` and `answer`; a response is right where its answer is that one but for case and white
space. `answer` may be absent where `config.task.reward` or `task.judge` tells right from wrong.
Other fields are yours, in `example.problem`; `level` or `type` becomes the stratum. A task of
another name than `jsonl` needs a line in `TASKS` (`__init__.py`).
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
        read_answer=lambda _, response: prose.last_line(response),
    )
