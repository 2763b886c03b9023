"""Word problems with other numbers, so that a model learns arithmetic, not the numbers it saw.

A row has its `problem`, its `solution` in steps ("12-4=8, 8*8=64") and its `answer`, the last
step's value. Numbers change alike wherever they stand, in the same order of size and with as many
digits, and every step stays a whole number above 0; what is not in the problem (12 for a dozen)
stays. So 12 members of whom 4 are absent become 37 of whom 9 are absent, never 4 of whom 12 are.
"""

import random
import re
from typing import Any, NamedTuple

_NUMBER = re.compile(r"(?<![\w.,/:%-])\d{1,4}(?![\w/:%]|[.,-]\d)")
_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
_TRIES = 200  # draws until the steps come out whole


class _Step(NamedTuple):
    """left operator right = value; an operand is a number of the row as it was."""

    left: int
    operator: str
    right: int
    value: int


def _steps(solution: str) -> list[_Step] | None:
    """The steps of a solution; None where one is not of two whole numbers."""
    found = [_STEP.fullmatch(step) for step in solution.split(", ")]
    if not all(found):
        return None
    return [_Step(int(m[1]), m[2], int(m[3]), int(m[4])) for m in found if m]


def _computed(left: int, operator: str, right: int) -> int | None:
    """The value of a step, None unless it is a whole number above 0."""
    if operator == "/":
        return left // right if left % right == 0 else None
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return value if value > 0 else None


def _drawn(values: list[int], rng: random.Random) -> dict[int, int] | None:
    """Other numbers for sorted ones, with as many digits each; None unless in the same order."""
    new = [rng.randrange(max(2, 10 ** (len(str(v)) - 1)), 10 ** len(str(v))) for v in values]
    in_order = all(a < b for a, b in zip(new, new[1:], strict=False))
    return dict(zip(values, new, strict=True)) if in_order else None


def _solved(steps: list[_Step], new: dict[int, int]) -> list[str] | None:
    """The steps with other numbers, None unless all values are whole and above 0."""
    lines, values = [], dict(new)
    for step in steps:
        left, right = values.get(step.left, step.left), values.get(step.right, step.right)
        value = _computed(left, step.operator, right)
        if value is None:
            return None
        values[step.value] = value
        lines.append(f"{left}{step.operator}{right}={value}")
    return lines


def renumbered(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The row with other numbers; the row itself where that is not safe, or no draw comes out.

    It is safe where all digits of the problem are plain whole numbers from 1 to 9999, the solution
    uses one of them, and no step has the value of a number of the problem or of another step.
    """
    problem, steps = row["problem"], _steps(row["solution"])
    plain = {int(n) for n in _NUMBER.findall(problem)}
    values = [step.value for step in steps or ()]
    known = {*plain, *values}
    if (
        not steps
        or 0 in plain
        or re.search(r"\d", _NUMBER.sub("", problem))
        or len(known) < len(plain) + len(values)
        or not plain & {n for step in steps for n in (step.left, step.right)}
    ):
        return row
    for _ in range(_TRIES):
        new = _drawn(sorted(plain), rng)
        lines = _solved(steps, new) if new else None
        if new and lines:
            return row | {
                "problem": _NUMBER.sub(lambda m: str(new[int(m[0])]), problem),  # noqa: B023
                "solution": ", ".join(lines),
                "answer": lines[-1].rpartition("=")[2],
            }
    return row
