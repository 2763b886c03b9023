"""SVAMP's rows, made of the files of its authors' repository.

Their training file has problems with places for numbers, and equations in prefix notation: here the
numbers are put back, and an equation becomes its steps. Rows whose equation misses the answer, and
rows whose text another one has, are left out.
"""

import csv
import json
import operator
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from fractions import Fraction

TRAIN, TEST = "/data/mawps-asdiv-a_svamp/train.csv", "/SVAMP.json"
TOLERANCE = Fraction(1, 1000)  # by how much a rounded answer may miss the value of its equation
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def read(path: pathlib.Path, split: str) -> Iterator[dict]:
    """The rows of a split from the repository, a zip file."""
    with zipfile.ZipFile(path) as archive:
        end = TRAIN if split == "train" else TEST
        [name] = [name for name in archive.namelist() if name.endswith(end)]
        text = archive.read(name).decode()
    if split == "train":
        yield from train_rows(csv.DictReader(text.splitlines()))
    else:
        yield from map(test_row, json.loads(text))


def train_rows(lines: Iterable[dict[str, str]]) -> Iterator[dict]:
    """The training rows of the lines of the authors' table; an id is a line's number."""
    seen = set()
    for i, line in enumerate(lines):
        numbers = [_exact(Fraction(number)) for number in line["Numbers"].split()]
        steps, answer = [], Fraction(line["Answer"])
        value = _evaluate(iter(_with_numbers(line["Equation"], numbers).split()), steps)
        problem = _spaced(_with_numbers(line["Question"], numbers))
        if abs(value - answer) > TOLERANCE or problem.casefold() in seen:
            continue
        seen.add(problem.casefold())
        yield {
            "id": f"mawps-asdiv/{i}",
            "problem": problem,
            "answer": _exact(answer),
            "solution": ", ".join(steps),
            "level": len(steps),
            "source": "MAWPS and ASDiv-A",
        }


def test_row(problem: dict) -> dict:
    """The row of one of the authors' test problems."""
    body = problem["Body"].strip()
    return {
        "id": problem["ID"],
        "problem": f"{body}{'' if body[-1] in '.?!' else '.'} {problem['Question'].strip()}",
        "answer": _exact(Fraction(problem["Answer"])),
        "equation": problem["Equation"],
        "type": problem["Type"],
        "source": "SVAMP",
    }


def _with_numbers(text: str, numbers: list[str]) -> str:
    """A text with the numbers in their places, number0, number1 ..."""
    return re.sub(r"number(\d+)", lambda place: numbers[int(place[1])], text)


def _spaced(text: str) -> str:
    """A text of tokens without the spaces before punctuation."""
    return re.sub(r" +([.,?;:!'])", r"\1", text.replace(" ’ s", "'s"))


def _evaluate(tokens: Iterator[str], steps: list[str]) -> Fraction:
    """The exact value of an equation in prefix notation; its steps are added to `steps`."""
    token = next(tokens)
    if token not in _OPERATORS:
        return Fraction(token)
    left, right = _evaluate(tokens, steps), _evaluate(tokens, steps)
    value = _OPERATORS[token](left, right)
    steps.append(f"{_exact(left)}{token}{_exact(right)}={_rounded(value)}")
    return value


def _exact(value: Fraction) -> str:
    """An integer, or all the digits of a float."""
    return str(value.numerator) if value.denominator == 1 else repr(float(value))


def _rounded(value: Fraction) -> str:
    """A number with at most two decimals in full, any other one with four."""
    return _exact(value) if (100 * value).denominator == 1 else f"{float(value):.4f}"
