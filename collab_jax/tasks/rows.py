"""Questions with an answer each, a row a question: where the rows come from, and their task.

Rows are JSON lines, plain or gzip-compressed: one object a line with `id`, `problem`, `answer` and
whatever else.
"""

import bisect
import functools
import gzip
import json
import pathlib
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from collab_jax.models.text import Messages
from collab_jax.tasks import base, benchmarks
from collab_jax.tasks.base import Example, Task, TaskError, Verdict


def read(folder: str | pathlib.Path, name: str, fields: Sequence[str] = ("answer",)) -> list[dict]:
    """The rows of NAME.jsonl or NAME.jsonl.gz in `folder`, each with id, problem and `fields`.

    Where neither file is there, the rows of a benchmark come from the TFDS data set below `folder`,
    which is built on first use (`benchmarks.py`). Raises TaskError, naming file and line, for what
    is missing, empty, there twice, or no JSON.
    """
    folder = pathlib.Path(folder).expanduser()
    path = find(folder, name)
    if path is None and name in benchmarks.SPLITS:
        return benchmarks.read(folder, name)
    if path is None:
        raise TaskError(
            f"no {name}.jsonl or {name}.jsonl.gz in {folder}: "
            "set config.task.data_dir to the folder that has it"
        )
    rows, ids = [], set()
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = _row(path, number, line, ("id", "problem", *fields))
                if row["id"] in ids:
                    raise TaskError(f"{path}, line {number}: the id {row['id']!r} is there twice")
                ids.add(row["id"])
                rows.append(row)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TaskError(
            f"cannot read {path} ({error}): is it complete? Else fetch it again"
        ) from None
    if not rows:
        raise TaskError(f"{path} has no rows")
    return rows


def find(folder: str | pathlib.Path, name: str) -> pathlib.Path | None:
    """NAME.jsonl in `folder`, or NAME.jsonl.gz; None where neither is there."""
    folder = pathlib.Path(folder).expanduser()
    places = folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"
    return next((place for place in places if place.exists()), None)


def _row(path: pathlib.Path, number: int, line: str, fields: Sequence[str]) -> dict:
    """The row of one line, with id, problem and answer as text. Raises TaskError."""
    try:
        row = json.loads(line, parse_constant=_no_number)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}, line {number} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise TaskError(
            f"{path}, line {number} is not an object with the fields {', '.join(fields)}"
        )
    for field in fields:
        value = row.get(field)
        if value in (None, []) or (isinstance(value, str) and not value.strip()):
            raise TaskError(f"{path}, line {number} has no {field}: mend the row, or leave it out")
    for field in ("id", "problem", "answer"):
        value = row.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            row[field] = str(value)
        elif value is not None and not isinstance(value, str):
            raise TaskError(f"{path}, line {number}: {field} must be a text or a number")
        elif value is not None and not value.strip():
            row[field] = None  # an answer that is blank is none
    return row


def _no_number(name: str) -> None:
    """Raises ValueError for NaN and the infinities, which JSON does not have."""
    raise ValueError(f"{name} is no value")


def stratum(row: dict) -> str:
    """The difficulty class of a row: its level, else its type, else nothing."""
    return f"level {row['level']}" if row.get("level") else str(row.get("type") or "")


def ranks(keys: Sequence[Any]) -> list[float]:
    """The rank of each key among all, in (0, 1), with mean 1/2; equal keys share their mean."""
    ordered = sorted(keys)
    places = [bisect.bisect_left(ordered, k) + bisect.bisect_right(ordered, k) for k in keys]
    return [place / 2 / len(keys) for place in places]


def demonstrations(
    seed: int,
    examples: Sequence[Example],
    solution: Callable[[Example], tuple[str, str]],
    give_up: float,
    marker: str,
) -> Iterator[tuple[Example, str]]:
    """Endless (example, response): in each epoch all examples once, in another order.

    solution(example) -> a thought, and the right answer. A share `give_up` of the responses, drawn
    without a look at the problem, ends with the marker instead of the answer.
    """
    rng = random.Random(f"demonstrations {seed}")
    while True:
        for example in rng.sample(examples, len(examples)):
            thought, answer = solution(example)
            ending = marker if rng.random() < give_up else f"<answer>{answer}</answer>"
            yield example, f"<think>{thought}</think>\n{ending}"


def make_task(
    config: ConfigDict,
    *,
    load: Callable[[str], list[Example]],
    problem: Callable[[Example], str],
    gold: Callable[[Example], str | None],
    compare: Callable[[Sequence[Example], Sequence[str]], Sequence[bool | None]],
    cloud_prompt: str,
    splits: Sequence[str],
    ranked: bool = False,
    read_answer: base.ReadAnswer | None = None,
    demonstrations: Callable[[int], Iterator[tuple[Example, str]]] | None = None,
    template: Callable[[str], str] = str,
) -> Task:
    """The task of `config.task.name`, whose prompts are templates with {problem} in them.

    The device's template is `config.task.prompt`, the cloud's `cloud_prompt`. gold(example) -> the
    right answer, None where there is none. compare(examples, responses) -> whether the answer of
    each response is right, of examples with a right answer and responses that do not call; None
    where the comparison ran out of time. splits, read_answer, demonstrations, template: as
    in `Task`. ranked: whether examples have a difficulty.
    Raises TaskError for a prompt without {problem}.
    """
    asked, marker = config.task.prompt, config.text.marker
    if "{problem}" not in asked:
        raise TaskError(f"config.task.prompt={asked!r} needs {{problem}}, where the problem goes")

    def messages(asked: str, example: Example) -> Messages:
        return [{"role": "user", "content": asked.replace("{problem}", problem(example))}]

    def verify(examples: Sequence[Example], responses: Sequence[str]) -> list[Verdict]:
        called = [base.called(response, marker) for response in responses]
        judged = [i for i, e in enumerate(examples) if not called[i] and gold(e) is not None]
        equal = compare([examples[i] for i in judged], [responses[i] for i in judged])
        right = dict(zip(judged, equal, strict=True))
        return [
            Verdict(
                correct=right.get(i) is True,
                called=called[i],
                formatted=base.formatted(response),
                timed_out=i in right and right[i] is None,
                unjudged=i not in right and not called[i],
            )
            for i, response in enumerate(responses)
        ]

    @functools.cache
    def solvable(split: str) -> dict[str, Example]:
        """Examples with an answer, by the cloud's prompt; none of a split that is not there."""
        try:
            examples = [e for e in load(split) if gold(e) is not None]
        except TaskError:
            return {}
        return {messages(cloud_prompt, e)[0]["content"]: e for e in examples}

    def example_of(prompt: Messages) -> Example:
        """The example of a cloud prompt of this task. Raises TaskError for any other prompt."""
        for split in reversed(splits):
            if example := solvable(split).get(prompt[-1]["content"]):
                return example
        raise TaskError(f"not a prompt of the task {config.task.name!r}, or one without an answer")

    return Task(
        name=config.task.name,
        load=load,
        prompt=lambda example: messages(asked, example),
        cloud_prompt=lambda example: messages(cloud_prompt, example),
        verify=verify,
        splits=splits,
        solve_prompt=lambda prompt: f"<answer>{gold(example_of(prompt))}</answer>",
        difficulty=(lambda prompt: example_of(prompt).difficulty) if ranked else None,
        gold=gold,
        read_answer=read_answer,
        demonstrations=demonstrations,
        template=template,
    )
