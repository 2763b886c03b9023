"""Countdown: reach a target with the given numbers, each exactly once, and + - * / ( ).

Holds the generator (a TFDS builder over array_record, no TensorFlow), the expression checker, the
exact solver, the demonstrations for the warm start, and `make_task`. Train and test are disjoint as
(sorted numbers, target): a hash of that pair decides the side it belongs to, whatever the seed or
the size of a split.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import operator
import pathlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from collab_jax.tasks import base
from collab_jax.tasks.base import Example, Messages, Task, TaskError, Verdict

# ------------------------------------------------------------------------------------------------- checking

MAX_EXPRESSION = (
    256  # characters; longer ones are refused unread, which bounds the work for any input
)
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


def check(numbers: tuple[int, ...], target: int, expression: str) -> bool:
    """True where `expression` uses exactly `numbers`, each once, and equals `target` in exact
    rational arithmetic.

    Grammar: non-negative ASCII integers, binary + - * /, parentheses, spaces. Anything else is
    False, and so is a division by zero or more than MAX_EXPRESSION characters; no input raises.
    Iterative, so nesting costs no stack.
    """
    if (
        not isinstance(expression, str)
        or len(expression) > MAX_EXPRESSION
        or not expression.isascii()
    ):
        return False
    text = expression.replace(" ", "")
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text or re.search(r"[0-9] +[0-9]", expression):
        return False
    if Counter(int(t) for t in tokens if t.isdigit()) != Counter(numbers):
        return False
    values: list[Fraction] = []
    pending: list[str] = []

    def reduce_top() -> None:
        b, a = values.pop(), values.pop()
        values.append(_APPLY[pending.pop()](a, b))

    operand = True  # what the grammar wants next: an operand, or else an operator
    try:
        for token in tokens:
            if operand != (token.isdigit() or token == "("):
                return False
            if token.isdigit():
                values.append(Fraction(int(token)))
                operand = False
            elif token == "(":
                pending.append(token)
            elif token == ")":
                while pending and pending[-1] != "(":
                    reduce_top()
                if not pending:
                    return False
                pending.pop()
            else:
                while pending and _PRECEDENCE.get(pending[-1], 0) >= _PRECEDENCE[token]:
                    reduce_top()
                pending.append(token)
                operand = True
        if operand:  # empty, or an operator is last
            return False
        while pending and pending[-1] != "(":
            reduce_top()
    except ZeroDivisionError:
        return False
    return not pending and values[0] == target


# ------------------------------------------------------------------------------------- expressions and solver


class _Term(NamedTuple):
    """A value with the expression that made it; rank: 1 a sum, 2 a product, 3 a number (for minimal
    parentheses).
    """

    value: int | Fraction
    text: str
    rank: int


def _join(a: _Term, sign: str, b: _Term, value: int | Fraction) -> _Term:
    rank = _PRECEDENCE[sign]
    left = f"({a.text})" if a.rank < rank else a.text
    right = f"({b.text})" if b.rank < rank or (b.rank == rank and sign in "-/") else b.text
    return _Term(value, left + sign + right, rank)


def _results(a: _Term, b: _Term, exact: bool) -> Iterator[tuple[str, _Term, _Term, int | Fraction]]:
    """Every (sign, left, right, value) of two terms, the larger on the left where order is free:
    one way to write each.

    With `exact`, all rationals; else positive integers only.
    """
    a, b = (a, b) if a.value >= b.value else (b, a)
    yield "+", a, b, a.value + b.value
    yield "*", a, b, a.value * b.value
    for x, y in ((a, b), (b, a)):
        if exact or x.value > y.value:
            yield "-", x, y, x.value - y.value
        if y.value and (exact or x.value % y.value == 0):
            yield "/", x, y, Fraction(x.value) / y.value if exact else x.value // y.value


def _search(terms: list[_Term], target: int, exact: bool) -> _Term | None:
    if len(terms) == 1:
        return terms[0] if terms[0].value == target else None
    for i, j in itertools.combinations(range(len(terms)), 2):
        rest = [t for k, t in enumerate(terms) if k not in (i, j)]
        for sign, x, y, value in _results(terms[i], terms[j], exact):
            if not rest and value != target:
                continue
            if found := _search([*rest, _join(x, sign, y, value)], target, exact):
                return found
    return None


def solve(numbers: tuple[int, ...], target: int) -> str | None:
    """An expression that `check`s, or None where none exists: positive integers first (quick), then
    all rationals.
    """
    terms = [_Term(n, str(n), 3) for n in numbers]
    found = _search(terms, target, exact=False) or _search(terms, target, exact=True)
    return found.text if found else None


# ----------------------------------------------------------------------------------------------- generating


class _Attempt(NamedTuple):
    steps: str  # '49+9=58,58+37=95'
    expression: str  # '49+9+37'
    value: int


def _attempt(rng: random.Random, numbers: tuple[int, ...]) -> _Attempt:
    """A random way to combine all the numbers through positive integers."""
    terms = [_Term(n, str(n), 3) for n in numbers]
    steps = []
    while len(terms) > 1:
        a, b = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        sign, x, y, value = rng.choice(list(_results(a, b, exact=False)))
        steps.append(f"{x.value}{sign}{y.value}={value}")
        terms.append(_join(x, sign, y, value))
    return _Attempt(",".join(steps), terms[0].text, terms[0].value)


def split_of(numbers: tuple[int, ...], target: int) -> str:
    """'train' or 'test' (one pair in eight), fixed by a hash of (sorted numbers, target)."""
    digest = hashlib.blake2b(f"{sorted(numbers)}={target}".encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest) % 8 == 0 else "train"


MAX_TRIES = (
    300_000  # random expressions in a row that may miss split and targets (some ten seconds)
)


def generate(
    split: str, seed: int | str, config, seen: set | None = None
) -> Iterator[tuple[tuple[int, ...], int, _Attempt]]:
    """Endless (numbers, target, a solution) of a split.

    config: share_of_three (share of prompts with 3 numbers, the rest have 4), numbers (lowest,
    highest), targets alike.
    seen: collects (sorted numbers, target), and none comes twice. Raises TaskError where (next to)
    nothing is left.
    """
    rng = random.Random(
        f"{split} {seed}"
    )  # a string seed is hashed, so that neighbouring seeds share nothing
    low, high = config.targets
    while True:
        count = 3 if rng.random() < config.share_of_three else 4
        for _ in range(
            MAX_TRIES
        ):  # keeps the drawn count, so that the mix is the configured one, whatever the odds
            numbers = tuple(rng.randint(*config.numbers) for _ in range(count))
            attempt = _attempt(rng, numbers)
            pair = (tuple(sorted(numbers)), attempt.value)
            if (
                low <= attempt.value <= high
                and split_of(*pair) == split
                and (seen is None or pair not in seen)
            ):
                break
        else:
            raise TaskError(
                f"no {split} example with {count} numbers in {config.numbers} and a target in {config.targets} in "
                f"{MAX_TRIES} tries{f' after {len(seen)} different ones' if seen else ''}: ask for fewer "
                f"config.task.{split}_examples, or widen config.task.numbers or targets"
            )
        if seen is not None:
            seen.add(pair)
        yield numbers, attempt.value, attempt


@dataclasses.dataclass(eq=False)
class Settings(tfds.core.BuilderConfig):
    """What decides the data: the same settings give the same examples, and another name on disk for
    any other.
    """

    share_of_three: float = 0.5
    numbers: tuple[int, int] = (1, 50)
    targets: tuple[int, int] = (10, 99)
    train_examples: int = 0
    test_examples: int = 0
    data_seed: int = 0


def settings(config) -> Settings:
    """Settings from `config.task`. Raises TaskError for ranges that cannot be met."""
    fields = (
        "share_of_three",
        "numbers",
        "targets",
        "train_examples",
        "test_examples",
        "data_seed",
    )
    values = {name: getattr(config, name) for name in fields}
    values |= {name: tuple(values[name]) for name in ("numbers", "targets")}
    if not 0 <= values["share_of_three"] <= 1:
        raise TaskError("config.task.share_of_three must lie in [0, 1]")
    for name in ("numbers", "targets"):
        whole = all(isinstance(v, int) for v in values[name])
        if len(values[name]) != 2 or not whole or not 1 <= values[name][0] <= values[name][1]:
            raise TaskError(
                f"config.task.{name}={values[name]} must be two integers, 1 <= lowest <= highest"
            )
    if min(values["train_examples"], values["test_examples"]) < 1:
        raise TaskError("config.task.train_examples and test_examples must be at least 1")
    name = "three{share_of_three}-n{numbers[0]}to{numbers[1]}-t{targets[0]}to{targets[1]}"
    name += "-{train_examples}+{test_examples}-seed{data_seed}"
    return Settings(name=name.format(**values), **values)


class Countdown(tfds.core.GeneratorBasedBuilder):
    """The data set as TFDS: `train` and `test`; no (sorted numbers, target) stands twice, in one
    split or in both.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "numbers": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "target": np.int32,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description=__doc__
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        config = self.builder_config
        wanted = getattr(config, f"{split}_examples")
        # Another stream than the demonstrations', so that no prompt was shown with its solution on
        # purpose.
        examples = generate(split, f"data {config.data_seed}", config, seen=set())
        for i, (numbers, target, _) in enumerate(itertools.islice(examples, wanted)):
            yield i, {"numbers": np.array(numbers, np.int32), "target": target}


def _prepared(config, data_dir: pathlib.Path) -> Countdown:
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # TFDS announces a download; nothing is downloaded
        builder = Countdown(config=settings(config), data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    return builder


def load(split: str, config) -> list[Example]:
    """All examples of a split in a fixed order; builds the data set on first use (seconds) in
    `task.data_dir`.
    """
    data_dir = pathlib.Path(config.data_dir).expanduser()
    tfds.disable_progress_bar()
    try:
        try:
            builder = _prepared(config, data_dir)
        except OSError:  # perhaps another process was first: its data set is there now
            builder = _prepared(config, data_dir)
        rows = [
            (tuple(map(int, row["numbers"])), int(row["target"]))
            for row in builder.as_data_source(split)
        ]
    except TaskError:
        raise
    except OSError as error:
        raise TaskError(
            f"cannot write the data set below {data_dir} ({error}): set config.task.data_dir"
        ) from None
    except Exception as error:  # damaged files raise many kinds
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        folder = data_dir / "countdown" / settings(config).name
        raise TaskError(
            f"cannot read the data set in {folder} ({cause}): delete the folder to rebuild it"
        ) from error
    return [Example(f"{split}-{i}", f"{len(row[0])} numbers", row) for i, row in enumerate(rows)]


# ------------------------------------------------------------------------------------------- demonstrations


NEAR = 10  # how far from the target a demonstrator that guesses still takes its result for right


def demonstrations(seed: int, config, marker: str) -> Iterator[tuple[Example, str]]:
    """Endless (example, response) of the train side: failed attempts, then a found solution, the
    marker, or a guess.

    A demonstrator gives up or guesses (`config.demo_give_up`, `demo_guess`: shares of
    demonstrations) without a look at the problem, and how many attempts fail before is drawn so
    too, as far as they fit: with four numbers a failure leaves no room for a solution. A guess
    answers with an attempt that failed, and claims that it is right where it came within NEAR of
    the
    target: so a model that imitates is wrong at times without a word of doubt, as real ones are.
    `config.demo_length` bounds a response's length (in characters; a tag, a verdict or a part of
    the marker counts one).
    """
    rng = random.Random(f"demonstrations {seed}")

    def fail(numbers: tuple[int, ...], target: int) -> _Attempt | None:
        found = min(
            (_attempt(rng, numbers) for _ in range(3)), key=lambda a: abs(a.value - target)
        )  # a fair try
        return found if found.value != target else None

    for i, (numbers, target, solution) in enumerate(generate("train", seed, config)):
        example = Example(f"demonstration-{i}", f"{len(numbers)} numbers", (numbers, target))
        draw = rng.random()
        gives_up, guesses = (
            draw < config.demo_give_up,
            0 <= draw - config.demo_give_up < config.demo_guess,
        )
        last = (fail(numbers, target) or solution) if guesses else solution  # a guess may hit
        claims = abs(last.value - target) <= NEAR
        ending = 0 if gives_up else len(last.steps) + 2 + len(last.expression) + (not claims)
        room = config.demo_length - 5 - ending
        parts = []
        for _ in range(rng.choice((0, 1, 2, 2) if gives_up else (0, 0, 0, 1))):
            failed = fail(numbers, target)
            room -= len(failed.steps) + 2 if failed else 0
            if room < 0:
                break
            if failed:
                parts.append(f"{failed.steps} no")
        if gives_up:
            yield example, "<think>" + "\n".join([*parts, ""]) + marker
        else:
            steps = "\n".join([*parts, last.steps + (" ok" if claims else " no\n")])
            yield example, f"<think>{steps}</think><answer>{last.expression}</answer>"


# ------------------------------------------------------------------------------------------------- the task

_CLOUD_PROMPT = (
    "Using the numbers {numbers}, each exactly once, and the operators + - * / and parentheses, write an expression "
    "that equals {target}. Think first, then give the expression alone as <answer>expression</answer>."
)
_CLOUD_PATTERN = re.compile(
    r"Using the numbers ([0-9 ]+), each .* equals ([0-9]+)\. Think first.*", re.DOTALL
)


def solve_prompt(messages: Messages) -> str:
    """The right response to a cloud prompt of this task, by the exact solver.

    Raises TaskError for any other prompt, and where no expression reaches the target.
    """
    found = _CLOUD_PATTERN.fullmatch(messages[-1]["content"])
    if not found:
        raise TaskError("not a Countdown prompt")
    numbers, target = tuple(map(int, found[1].split())), int(found[2])
    expression = solve(numbers, target)
    if expression is None:
        raise TaskError(f"no expression of {numbers} equals {target}")
    return f"<answer>{expression}</answer>"


def make_task(config) -> Task:
    """Countdown by `config.task` (`prompt` is a format string of numbers and target) and
    `config.text.marker`.
    """
    task, marker = config.task, config.text.marker
    settings(task)  # refuses bad settings now rather than at the first load
    try:
        task.prompt.format(numbers="1 2 3", target=6)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise TaskError(
            f"config.task.prompt={task.prompt!r} may hold {{numbers}} and {{target}} only: write other braces twice"
        ) from None

    def messages(template: str, example: Example) -> Messages:
        numbers, target = example.problem
        return [
            {
                "role": "user",
                "content": template.format(numbers=" ".join(map(str, numbers)), target=target),
            }
        ]

    def verdict(example: Example, response: str) -> Verdict:
        answer = base.answer_of(response)
        correct = answer is not None and check(*example.problem, answer.strip())
        return Verdict(correct, base.called(response, marker), base.formatted(response))

    return Task(
        name="countdown",
        load=lambda split: load(split, task),
        prompt=lambda example: messages(task.prompt, example),
        cloud_prompt=lambda example: messages(_CLOUD_PROMPT, example),
        verify=lambda examples, responses: list(map(verdict, examples, responses)),
        solve_prompt=solve_prompt,
        demonstrations=lambda seed: demonstrations(seed, task, marker),
    )
