"""Drills in arithmetic: three sums in a row, for a small model that knows what to do, but errs.

A drill is a row as those of SVAMP: its `problem` is "98-73, 45+27, 12*4", its `solution` shows the
sums with their values, and its `answer` is the last value. Numbers are as long as those of word
problems, values are whole and not below 0.
"""

import random
from typing import Any

SUMS = 3


def drill(rng: random.Random) -> dict[str, Any]:
    """A row of SUMS sums drawn at random; four in ten subtract, three add."""
    sums = [_sum(rng) for _ in range(SUMS)]
    problem = ", ".join(asked for asked, _ in sums)
    return {
        "id": f"drill/{problem}",
        "problem": problem,
        "solution": ", ".join(f"{asked}={value}" for asked, value in sums),
        "answer": str(sums[-1][1]),
    }


def _sum(rng: random.Random) -> tuple[str, int]:
    """A sum as it is asked, such as 98-73, and its value."""
    operator = rng.choices("-+*/", (4, 3, 1.5, 1.5))[0]
    if operator in "+-":
        left, right = (_number(rng, rng.choices((1, 2, 3), (2, 5, 3))[0]) for _ in range(2))
        if operator == "+":
            return f"{left}+{right}", left + right
        left, right = max(left, right), min(left, right)
        return f"{left}-{right}", left - right
    short, other = _number(rng, 1), _number(rng, rng.choices((1, 2), (1, 2))[0])
    if operator == "*":
        left, right = rng.sample((short, other), 2)
        return f"{left}*{right}", left * right
    divisor, quotient = rng.sample((short, other), 2)
    return f"{divisor * quotient}/{divisor}", quotient


def _number(rng: random.Random, digits: int) -> int:
    """A number of so many digits; of one digit, at least 2."""
    return rng.randrange(max(2, 10 ** (digits - 1)), 10**digits)
