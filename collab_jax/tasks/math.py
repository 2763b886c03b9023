"""Mathematics with a final answer: MATH, GSM8K and the benchmarks that are only for evaluation.

How an answer is found in a response (`extract`), when two answers are the same (`equal`), and the
tasks. An answer is taken out of its sentence (`prose.py`), unless this does not claim it
(`denials.py`), and written in one spelling (`spelling.py`), in which most can be compared
(`free_form.py`). What that does not settle goes to math-verify (`verifier.py`).
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from collab_jax.tasks import base, free_form, prose, rows, splits, verifier
from collab_jax.tasks.base import SPLITS, Example, Task

MAX_ANSWER = 500  # characters; a longer prediction is wrong, unread

# ---- the answer of a response, and whether it is the right one


def extract(response: str) -> str | None:
    """The answer that a response gives: what its `<answer>` block has in a box, or the block.

    Of a block longer than MAX_ANSWER it is what follows the last "the answer is", if anything does:
    the rest is no final answer, and nothing to spend time on. None where there is no answer.
    """
    block = base.answer_of(response)
    if block is None:
        return None
    answer = prose.boxed(block[-4 * MAX_ANSWER :])
    if answer is None:
        answer = block if len(block) <= MAX_ANSWER else prose.after_cue(block[-MAX_ANSWER:]) or ""
    answer = answer.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def equal_all(pairs: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Whether gold and prediction are the same answer, for each pair.

    None where the verifier ran out of time.
    """
    results: list[bool | None] = [False] * len(pairs)
    unsettled: dict[int, tuple[str, str]] = {}
    for i, (gold, prediction) in enumerate(pairs):
        if prediction is None or len(prediction) > MAX_ANSWER:
            continue
        settled = free_form.settled(gold, prediction)
        if isinstance(settled, bool):
            results[i] = settled
        else:
            unsettled[i] = settled
    if unsettled:
        distinct = list(dict.fromkeys(unsettled.values()))  # the responses of a group often agree
        verified = dict(zip(distinct, verifier.shared().equal(distinct), strict=True))
        for i, pair in unsettled.items():
            results[i] = verified[pair]
    return results


def equal(gold: str, prediction: str) -> bool:
    """Whether a prediction is the gold answer; False where the verifier ran out of time."""
    return equal_all([(gold, prediction)])[0] is True


# ---- the tasks

FILES = {  # task -> (training split, test split): names of files in config.task.data_dir
    "math": ("math_train", "math_test"),
    "gsm8k": ("gsm8k_train", "gsm8k_test"),
    "math500": (None, "math500"),
    "amc23": (None, "amc23"),
    "aime24": (None, "aime24"),
    "minerva_math": (None, "minerva_math"),
    "agieval_math": (None, "agieval_math"),
}
_CLOUD_PROMPT = (
    "Solve this problem. End with the final answer alone between <answer> and </answer>.\n\n"
    "{problem}"
)


def load(task: ConfigDict, split: str) -> list[Example]:
    """The examples of a split of `config.task.name`; `example.problem` is (problem, answer).

    Of the training file a tenth of the templates is for validation (`splits.py`), and rows whose
    gold answer has several boxed values are left out.
    """
    name = FILES[task.name][split == "test"]
    assert name  # `make_task` names no other splits
    examples = [
        Example(row["id"], rows.stratum(row), (row["problem"], row["answer"]))
        for row in rows.read(task.data_dir, name)
        if split == "test" or not row.get("boxed_all")
    ]
    return splits.of_split(examples, split, _problem)


def _problem(example: Example) -> str:
    return example.problem[0]


def make_task(config: ConfigDict) -> Task:
    """The task of FILES that `config.task.name` names.

    `config.task.prompt` has {problem} where the problem goes.
    """
    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=_problem,
        gold=lambda example: example.problem[1],
        compare=lambda examples, responses: equal_all(
            [(e.problem[1], extract(r)) for e, r in zip(examples, responses, strict=True)]
        ),
        cloud_prompt=_CLOUD_PROMPT,
        read_answer=lambda _, response: prose.last_answer(response),
        splits=SPLITS if FILES[config.task.name][0] else ("test",),
    )
