"""Drills in arithmetic, for a small model that knows what to do, but errs.

A drill has no problem: asked for sums, the response is SUMS of them, worked out as the steps of a
solution are (`columns.py`), with numbers as long as those of word problems. Values are whole and
not below 0.
"""

import random

from collab_jax.tasks import columns

ASKED = "Sums."  # the problem of each
SUMS = 2


def drill(rng: random.Random) -> str:
    """The lines of one drill, such as "18-9=9" and what `columns.worked` makes of longer sums.

    Four in ten subtract and three add: these are most of what word problems ask for.
    """
    return "\n".join(line for _ in range(SUMS) for line in columns.worked(_sum(rng)))


def _sum(rng: random.Random) -> str:
    """A sum with its value, such as 98-73=25."""
    operator = rng.choices("-+*/", (4, 3, 1.5, 1.5))[0]
    if operator in "+-":
        left, right = (_number(rng, rng.choices((1, 2, 3), (3, 5, 2))[0]) for _ in range(2))
        if operator == "+":
            return f"{left}+{right}={left + right}"
        left, right = max(left, right), min(left, right)
        return f"{left}-{right}={left - right}"
    short, other = _number(rng, 1), _number(rng, rng.choices((1, 2), (1, 2))[0])
    if operator == "*":
        left, right = rng.sample((short, other), 2)
        return f"{left}*{right}={left * right}"
    divisor, quotient = rng.sample((short, other), 2)
    return f"{divisor * quotient}/{divisor}={quotient}"


def _number(rng: random.Random, digits: int) -> int:
    """A number of so many digits; of one digit, at least 2."""
    return rng.randrange(max(2, 10 ** (digits - 1)), 10**digits)
