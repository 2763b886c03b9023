"""Arithmetic expressions of given numbers, each used once: checked, found and drawn at random."""

import itertools
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_EXPRESSION = 256  # characters; a longer one is refused unread, which bounds the work
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")

Number = int | Fraction

# ---- reading


def is_solution(numbers: Sequence[int], target: int, expression: str) -> bool:
    """True where `expression` uses exactly `numbers`, each once, and equals `target`.

    Exact rational arithmetic. Grammar: non-negative ASCII integers, binary + - * /, parentheses,
    white space of any kind between these. Anything else is False, and so is a division by zero or
    more than MAX_EXPRESSION characters; no input raises.
    """
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION:
        return False
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != "".join(expression.split()):  # there is something else in it
        return False
    if Counter(int(t) for t in tokens if t.isdigit()) != Counter(numbers):
        return False
    return _value(tokens) == target


def value(expression: str) -> Fraction | None:
    """The exact value of an expression in the grammar of `is_solution`; None for any other text."""
    tokens = _TOKEN.findall(expression)
    if len(expression) > MAX_EXPRESSION or "".join(tokens) != "".join(expression.split()):
        return None
    return _value(tokens)


def _value(tokens: Sequence[str]) -> Fraction | None:
    """The value of an expression, or None where it is no expression or divides by zero.

    Dijkstra's two stacks: it is iterative, so nesting costs no stack of Python's.
    """
    values: list[Fraction] = []
    pending: list[str] = []  # operators and opening parentheses
    wants_operand = True  # what the grammar wants next; else an operator
    try:
        for token in tokens:
            if wants_operand != (token.isdigit() or token == "("):
                return None
            if token.isdigit():
                values.append(Fraction(int(token)))
                wants_operand = False
            elif token == "(":
                pending.append(token)
            elif token == ")":
                _apply_pending(values, pending, precedence=1)
                if not pending:
                    return None
                pending.pop()
            else:
                _apply_pending(values, pending, _PRECEDENCE[token])
                pending.append(token)
                wants_operand = True
        if wants_operand:  # empty, or an operator is last
            return None
        _apply_pending(values, pending, precedence=1)
    except ZeroDivisionError:
        return None
    return None if pending else values[0]


def _apply_pending(values: list[Fraction], pending: list[str], precedence: int) -> None:
    """Applies the operators on top of `pending` that bind at least as tightly as `precedence`."""
    while pending and _PRECEDENCE.get(pending[-1], 0) >= precedence:
        b, a = values.pop(), values.pop()
        values.append(_APPLY[pending.pop()](a, b))


# ---- solving


class _Term(NamedTuple):
    """A value with the expression that made it."""

    value: Number
    text: str
    rank: int  # 1: a sum, 2: a product, 3: a number; says where parentheses are needed


def _join(a: _Term, sign: str, b: _Term, value: Number) -> _Term:
    rank = _PRECEDENCE[sign]
    left = f"({a.text})" if a.rank < rank else a.text
    right = f"({b.text})" if b.rank < rank or (b.rank == rank and sign in "-/") else b.text
    return _Term(value, left + sign + right, rank)


def _results(a: _Term, b: _Term, exact: bool) -> Iterator[tuple[str, _Term, _Term, Number]]:
    """Every (sign, left, right, value) that two terms can make, each written in one way only.

    The larger is on the left where order is free. exact: all rationals, else positive integers.
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
            if solution := _search([*rest, _join(x, sign, y, value)], target, exact):
                return solution
    return None


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that `is_solution`, or None where there is none.

    Positive integers are tried first (quick), then all rationals.
    """
    terms = [_Term(n, str(n), 3) for n in numbers]
    solution = _search(terms, target, exact=False) or _search(terms, target, exact=True)
    return solution.text if solution else None


# ---- drawing


class Attempt(NamedTuple):
    """One way to combine the numbers."""

    steps: str  # "49+9=58,58+37=95"
    expression: str  # "49+9+37"
    value: int


def random_attempt(rng: random.Random, numbers: Sequence[int]) -> Attempt:
    """A random way to combine all the numbers through positive integers."""
    terms = [_Term(n, str(n), 3) for n in numbers]
    steps = []
    while len(terms) > 1:
        a, b = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        sign, x, y, value = rng.choice(list(_results(a, b, exact=False)))
        steps.append(f"{x.value}{sign}{y.value}={value}")
        terms.append(_join(x, sign, y, value))
    return Attempt(",".join(steps), terms[0].text, int(terms[0].value))
