"""Prompts of your own, from JSON lines. Copy this file to write a task.

`config.task.data_dir` has train.jsonl, test.jsonl and, if wanted, validation.jsonl (or .jsonl.gz),
without which a tenth of the training problems is for validation (`splits.py`). A line is an object
with `id`, `problem` and `answer` (which `config.task.reward` or `judge` can do without); a response
is right where its answer is that one but for case and white space. The rest of a line is yours, in
`example.problem`; `level` or `type` is the stratum. `TASKS` names all tasks.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from collab_jax.tasks import base, prose, rows, splits
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError

CLOUD_PROMPT = "{problem}\n\nEnd with the final answer alone between <answer> and </answer>."


def same(gold: str, answer: str | None) -> bool:
    """Whether an answer is the gold one but for case and white space."""
    return answer is not None and answer.casefold().split() == gold.casefold().split()


def load(folder: str, split: str, fields: Sequence[str], prefix: str = "") -> list[Example]:
    """The examples of a split; `example.problem` is the row, which has these fields at least.

    prefix: what the names of the files begin with. Raises TaskError where the split has none.
    """
    own_file = split == "test" or rows.find(folder, f"{prefix}validation") is not None
    name = prefix + (split if own_file else "train")
    found = rows.read(folder, name, fields)
    examples = [Example(row["id"], rows.stratum(row), row) for row in found]
    if own_file:
        return splits.shuffled(examples, _problem)
    of_split = splits.of_split(examples, split, _problem)
    if not of_split:
        raise TaskError(
            f"none of the {len(examples)} rows of {name} is for {split}: "
            f"write a {prefix}validation.jsonl"
        )
    return of_split


def _problem(example: Example) -> str:
    return example.problem["problem"]


def make_task(config: ConfigDict) -> Task:
    """The task of the files; `config.task.prompt` has {problem} where the problem goes."""
    fields = () if config.task.reward or config.task.judge else ("answer",)
    return rows.make_task(
        config,
        load=lambda split: load(config.task.data_dir, split, fields),
        problem=_problem,
        gold=lambda example: example.problem.get("answer"),
        compare=lambda examples, responses: [
            same(e.problem["answer"], base.answer_of(r))
            for e, r in zip(examples, responses, strict=True)
        ],
        cloud_prompt=CLOUD_PROMPT,
        splits=SPLITS,
        read_answer=lambda _, response: prose.last_line(response),
    )
