"""Countdown: reach a target with the given numbers, each exactly once, and + - * / ( ).

The data set (a TFDS builder over array_record, no TensorFlow), the demonstrations for the warm
start, and `make_task`; `expressions.py` checks and solves. The splits are disjoint as (sorted
numbers, target): a hash of that pair decides its side, whatever the seed or the size of a split.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from collab_jax.models.text import Messages
from collab_jax.tasks import base
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError, Verdict
from collab_jax.tasks.expressions import Attempt, is_solution, random_attempt, solve

# ---- the stream of problems


def split_of(numbers: tuple[int, ...], target: int) -> str:
    """The split of a pair, fixed by a hash of (sorted numbers, target).

    Of 16 pairs one is for validation, one for the test.
    """
    digest = hashlib.blake2b(f"{sorted(numbers)}={target}".encode(), digest_size=4).digest()
    return {0: "test", 8: "validation"}.get(int.from_bytes(digest) % 16, "train")


@dataclasses.dataclass(eq=False)
class DataSettings(tfds.core.BuilderConfig):
    """What decides the data: the same settings give the same examples, others another `name`."""

    share_of_three: float = 0.5  # of the prompts, which have 3 numbers; the others have 4
    numbers: tuple[int, ...] = (1, 50)  # lowest, highest
    targets: tuple[int, ...] = (10, 99)  # lowest, highest
    train_examples: int = 0
    test_examples: int = 0  # and as many for validation
    data_seed: int = 0


def data_settings(task: ConfigDict) -> DataSettings:
    """The DataSettings of `config.task`. Raises TaskError for ranges that cannot be met."""
    ranges = {"numbers": tuple(task.numbers), "targets": tuple(task.targets)}
    if not 0 <= task.share_of_three <= 1:
        raise TaskError("config.task.share_of_three must lie in [0, 1]")
    for name, ends in ranges.items():
        whole = all(isinstance(v, int) for v in ends)
        if len(ends) != 2 or not whole or not 1 <= ends[0] <= ends[1]:
            raise TaskError(
                f"config.task.{name}={ends} must be two integers, 1 <= lowest <= highest"
            )
    if min(task.train_examples, task.test_examples) < 1:
        raise TaskError("config.task.train_examples and test_examples must be at least 1")
    (low, high), (lowest, highest) = ranges["numbers"], ranges["targets"]
    name = f"three{task.share_of_three}-n{low}to{high}-t{lowest}to{highest}"
    return DataSettings(
        name=f"{name}-{task.train_examples}+{task.test_examples}-seed{task.data_seed}",
        share_of_three=task.share_of_three,
        numbers=ranges["numbers"],
        targets=ranges["targets"],
        train_examples=task.train_examples,
        test_examples=task.test_examples,
        data_seed=task.data_seed,
    )


MOST_NUMBERS = 5  # of a problem that is solved, in a third of a second at most
MAX_TRIES = 300_000  # random attempts in a row that may miss split and targets: some ten seconds


def generate(
    split: str, seed: int | str, config: ConfigDict | DataSettings, seen: set | None = None
) -> Iterator[tuple[tuple[int, ...], int, Attempt]]:
    """Endless (numbers, target, a solution) of a split.

    config: share_of_three, numbers and targets count. seen: collects (sorted numbers, target), and
    none comes twice. Raises TaskError where nothing, or next to nothing, is left.
    """
    # A string seed is hashed, so that neighbouring seeds share nothing.
    rng = random.Random(f"{split} {seed}")
    low, high = config.targets
    while True:
        # The count that was drawn is kept, so that the mix is the configured one.
        count = 3 if rng.random() < config.share_of_three else 4
        for _ in range(MAX_TRIES):
            numbers = tuple(rng.randint(*config.numbers) for _ in range(count))
            attempt = random_attempt(rng, numbers)
            pair = (tuple(sorted(numbers)), attempt.value)
            fits = low <= attempt.value <= high and split_of(*pair) == split
            if fits and (seen is None or pair not in seen):
                break
        else:
            raise TaskError(
                f"no {split} example with {count} numbers in {config.numbers} and a target in "
                f"{config.targets} in {MAX_TRIES} tries"
                f"{f' after {len(seen)} different ones' if seen else ''}: ask for fewer "
                f"config.task.{'train' if split == 'train' else 'test'}_examples, or widen "
                "config.task.numbers or targets"
            )
        if seen is not None:
            seen.add(pair)
        yield numbers, attempt.value, attempt


# ---- the data set on disk


class Countdown(tfds.core.GeneratorBasedBuilder):
    """The data set as TFDS; no (sorted numbers, target) stands twice."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "A validation split.", "1.0.0": "First release."}
    builder_config: Any  # a DataSettings

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "numbers": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "target": np.int32,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description=__doc__
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        settings = self.builder_config
        # Another stream than that of the demonstrations, so that no prompt was shown with its
        # solution on purpose.
        examples = generate(split, f"data {settings.data_seed}", settings, seen=set())
        wanted = settings.train_examples if split == "train" else settings.test_examples
        for i, (numbers, target, _) in enumerate(itertools.islice(examples, wanted)):
            yield i, {"numbers": np.array(numbers, np.int32), "target": target}


def _prepared(settings: DataSettings, data_dir: pathlib.Path) -> Countdown:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and there is none
        builder = Countdown(config=settings, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    return builder


def load(split: str, task: ConfigDict) -> list[Example]:
    """All examples of a split in a fixed order; `example.problem` is (numbers, target).

    Builds the data set in `task.data_dir` on first use (seconds).
    """
    settings, data_dir = data_settings(task), pathlib.Path(task.data_dir).expanduser()
    tfds.disable_progress_bar()
    try:
        try:
            builder = _prepared(settings, data_dir)
        except OSError:  # perhaps another process was first: its data set is there now
            builder = _prepared(settings, data_dir)
        # A decorator of TFDS hides the signature.
        rows = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
        problems = [(tuple(map(int, row["numbers"])), int(row["target"])) for row in rows]
    except TaskError:
        raise
    except OSError as error:
        raise TaskError(
            f"cannot write the data set below {data_dir} ({error}): set config.task.data_dir"
        ) from None
    except Exception as error:  # damaged files raise many kinds
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        folder = data_dir / "countdown" / settings.name
        raise TaskError(
            f"cannot read the data set in {folder} ({cause}): delete the folder to rebuild it"
        ) from error
    return [
        _example(f"{split}-{i}", numbers, target, task)
        for i, (numbers, target) in enumerate(problems)
    ]


def _example(name: str, numbers: tuple[int, ...], target: int, task: ConfigDict) -> Example:
    stratum, difficulty = f"{len(numbers)} numbers", _difficulty(numbers, task)
    return Example(name, stratum, (numbers, target), difficulty=difficulty)


def _difficulty(numbers: tuple[int, ...], task: ConfigDict) -> float:
    """The mean rank of the problems with so many numbers, among those of `task`."""
    of_three = task.share_of_three
    return of_three / 2 if len(numbers) == 3 else (1 + of_three) / 2


# ---- demonstrations


def _failed_attempt(
    rng: random.Random, numbers: tuple[int, ...], target: int, before: Sequence[str]
) -> Attempt | None:
    """The best of three random attempts, a fair try.

    None where it reaches the target, or is one of those before, by their steps.
    """
    attempts = [random_attempt(rng, numbers) for _ in range(3)]
    best = min(attempts, key=lambda attempt: abs(attempt.value - target))
    return best if best.value != target and best.steps not in before else None


def demonstrations(seed: int, task: ConfigDict, marker: str) -> Iterator[tuple[Example, str]]:
    """Endless (example, response) of the train side: attempts, a line each, and how they end.

    Up to two attempts fail, none of them made twice, as many as fit beside the last one, which is a
    solution; or, in a share `task.demo_guess`, one that failed as well and is answered all the
    same. No word says which of them reached the target: its result stands there, and the reader has
    to compare. A share `task.demo_give_up` stops before or after some attempt, be it the solution,
    and calls. All of this is drawn without a look at the problem or at what was reached, so that
    demonstrations bring a call within reach, and do not say when it pays. `task.demo_length` bounds
    the length of a response (in characters; a tag or a part of the marker counts one).
    """
    rng = random.Random(f"demonstrations {seed}")
    for i, (numbers, target, solution) in enumerate(generate("train", seed, task)):
        example = _example(f"demonstration-{i}", numbers, target, task)
        last = solution
        if rng.random() < task.demo_guess:  # it may hit
            last = _failed_attempt(rng, numbers, target, ()) or solution
        lines = []
        room = task.demo_length - 5 - len(last.steps) - len(last.expression)  # four tags and EOS
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            failed = _failed_attempt(rng, numbers, target, [*lines, last.steps])
            room -= len(failed.steps) + 1 if failed else 0
            if room < 0:
                break
            if failed:
                lines.append(failed.steps)
        lines.append(last.steps)
        if rng.random() < task.demo_give_up:
            lines = lines[: rng.randrange(len(lines) + 1)]
            yield example, "<think>" + "".join(f"{line}\n" for line in lines) + marker
        else:
            thought = "\n".join(lines)
            yield example, f"<think>{thought}</think><answer>{last.expression}</answer>"


# ---- the task

_CLOUD_PROMPT = (
    "Using the numbers {numbers}, each exactly once, and the operators + - * / and parentheses, "
    "write an expression that equals {target}. "
    "Think first, then give the expression alone as <answer>expression</answer>."
)
_CLOUD_PATTERN = re.compile(
    r"Using the numbers ([0-9 ]+), each .* equals ([0-9]+)\. Think first.*", re.DOTALL
)
_DEVICE_PATTERN = re.compile(r"([0-9 ]+)=([0-9]+)\s*")  # as the embedded model is asked


def _problem_of(messages: Messages) -> tuple[tuple[int, ...], int]:
    """(numbers, target) of a prompt of this task; raises TaskError for any other.

    It may be worded for the cloud or for the embedded model, whose questions a server passes on.
    """
    content = messages[-1]["content"]
    match = _CLOUD_PATTERN.fullmatch(content) or _DEVICE_PATTERN.fullmatch(content)
    if not match:
        raise TaskError("not a Countdown prompt")
    numbers = tuple(map(int, match[1].split()))
    if len(numbers) > MOST_NUMBERS:  # a server passes on whatever a client writes
        raise TaskError(f"{len(numbers)} numbers: none has more than {MOST_NUMBERS}")
    return numbers, int(match[2])


def solve_prompt(messages: Messages) -> str:
    """The right response to a prompt of this task, by the exact solver.

    Raises TaskError for any other prompt, and where no expression reaches the target.
    """
    numbers, target = _problem_of(messages)
    expression = solve(numbers, target)
    if expression is None:
        raise TaskError(f"no expression of {numbers} equals {target}")
    return f"<answer>{expression}</answer>"


def _filled(template: str, numbers: str, target: int) -> str:
    return template.format(numbers=numbers, target=target, problem=f"{numbers}={target}")


def _messages(template: str, example: Example) -> Messages:
    numbers, target = example.problem
    content = _filled(template, " ".join(map(str, numbers)), target)
    return [{"role": "user", "content": content}]


def _verdict(example: Example, response: str, marker: str) -> Verdict:
    numbers, target = example.problem
    answer = base.answer_of(response)
    return Verdict(
        correct=answer is not None and is_solution(numbers, target, answer),
        called=base.called(response, marker),
        formatted=base.formatted(response),
    )


_EXPRESSION = re.compile(r"[0-9(][0-9() ]*[-+*/][-+*/()0-9 ]*[0-9)]")


def _last_expression(_: Example, response: str) -> str | None:
    """The last line that is an expression, perhaps before `=` or after a word, or None."""
    for line in reversed(response.splitlines()):
        expression = line.rpartition(":")[2].split("=")[0].strip(" .$`*")
        if _EXPRESSION.fullmatch(expression):
            return expression
    return None


def make_task(config: ConfigDict) -> Task:
    """Countdown by `config.task` and `config.text.marker`.

    `config.task.prompt` is a format string of numbers and target, or of problem, which is
    `{numbers}={target}`, so that a mix can have one prompt. Raises TaskError where it is not, and
    for ranges that cannot be met.
    """
    task, marker = config.task, config.text.marker
    data_settings(task)  # refuses bad settings now rather than at the first load
    try:
        _filled(task.prompt, "1 2 3", 6)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise TaskError(
            f"config.task.prompt={task.prompt!r} may hold {{numbers}}, {{target}} and "
            "{{problem}} only: write other braces twice"
        ) from None
    return Task(
        name="countdown",
        load=lambda split: load(split, task),
        prompt=lambda example: _messages(task.prompt, example),
        cloud_prompt=lambda example: _messages(_CLOUD_PROMPT, example),
        verify=lambda examples, responses: [
            _verdict(example, response, marker)
            for example, response in zip(examples, responses, strict=True)
        ],
        solve_prompt=solve_prompt,
        difficulty=lambda messages: _difficulty(_problem_of(messages)[0], task),
        read_answer=_last_expression,
        demonstrations=lambda seed: demonstrations(seed, task, marker),
    )
