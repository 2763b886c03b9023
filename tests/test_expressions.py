"""Expressions: the checker against an independent reading, the solver against brute force.

Over 400 lines long because of the tables of cases.
"""

import functools
import itertools
import math
import random
import re
import time
from collections import Counter
from fractions import Fraction

import pytest

from collab_jax.tasks import expressions
from collab_jax.tasks.expressions import is_solution, solve

# ---- is_solution: by hand


RIGHT = [
    ((49, 9, 37), 95, "49+9+37"),
    ((2, 3, 4), 14, "2+3*4"),  # precedence
    ((2, 3, 4), 20, "(2+3)*4"),
    ((9, 4, 3), 2, "9-4-3"),  # from the left
    ((9, 4, 3), 8, "9-(4-3)"),
    ((24, 4, 3), 2, "24/4/3"),
    ((24, 4, 3), 18, "24/(4/3)"),
    ((24, 4, 3), 18, "24/4*3"),
    ((20, 6, 3, 2), 16, "20-6/3*2"),
    ((3, 3, 8, 8), 24, "8/(3-8/3)"),  # through 1/3
    ((1, 5, 5, 5), 24, "5*(5-1/5)"),
    ((3, 3, 7, 7), 24, "7*(3+3/7)"),
    ((1, 3, 4, 6), 24, "6/(1-3/4)"),
    ((1, 49, 49), 1, "1/49*49"),  # 0.9999999999999999 in floats
    ((3, 8, 5), 0, "3-8+5"),  # through a negative number
    ((3, 8), -5, "3-8"),
    ((2, 2, 2), 2, "2*2/2"),  # duplicates
    ((7,), 7, "7"),
    ((7,), 7, "((7))"),
    ((1, 2), 3, " ( 1  + 2 ) "),
    ((1, 2), 3, "1+2\n"),  # white space of any kind is free
    ((1, 2), 3, "\n1+2"),
    ((1, 2), 3, "\r\n1 +\r\n2\r\n"),
    ((1, 2), 3, "1+\t2"),
    ((1, 2), 3, "1+2\x0b"),
    ((1, 2), 3, "1+\xa02\u2003"),
    ((0, 5), 0, "0/5"),
    ((7, 1), 8, "007+1"),  # leading zeros: the same number
    ((10**30, 1), 10**30 + 1, f"{10**30}+1"),
]

WRONG = [  # each would be right to a reader that overlooks what the comment says
    ((1, 2), 4, "1+2"),  # the value
    ((3, 2), 1, "3/2"),  # no rounding
    ((10**17, 1), 10**17, f"{10**17}+1"),  # no floats
    ((1, 2), 6, "1+2+1+2"),  # numbers used twice
    ((1, 2), 4, "2+2"),  # used twice instead of another
    ((2, 2, 3), 8, "2+3+3"),
    ((1, 2, 3), 3, "1+2"),  # one left out
    ((2, 2), 2, "2"),
    ((1, 2), 6, "1+2+3"),  # one too many
    ((1, 2), 12, "12"),  # digits joined
    ((1, 2), 12, "1 2"),
    ((12,), 12, "1 2"),
    ((12, 3), 15, "1 2+3"),
    ((3, 8), 5, "-3+8"),  # signs
    ((3, 8), 11, "+3+8"),
    ((3, 8), -5, "3+-8"),
    ((3, 8), 5, "(-3)+8"),
    ((3, 8), 11, "3--8"),
    ((3,), -3, "-3"),
    ((-3, 8), 5, "-3+8"),
    ((3, 8), 11, "3+8+"),  # operators without operands
    ((3, 8), 11, "+3+8-"),
    ((3, 8), 24, "*3*8"),
    ((3, 8), 11, "3++8"),
    ((3, 8), 11, "3 8+"),
    ((2, 3), 8, "2**3"),  # other operators
    ((8, 3), 2, "8//3"),
    ((8, 3), 2, "8%3"),
    ((2, 3), 8, "2^3"),
    ((2, 3), 6, "2(3)"),  # nothing is implied
    ((2, 3), 6, "(2)(3)"),
    ((2, 3), 6, "(2)3"),
    ((3, 8), 11, "(3+8"),  # parentheses
    ((3, 8), 11, "3+8)"),
    ((3, 8), 11, ")3+8("),
    ((3, 8), 11, "3)+(8"),
    ((3, 8), 11, "(3+)8"),
    ((3, 8), 11, "()3+8"),
    ((3, 8), 11, "3+8()"),
    ((3, 8), 11, "[3+8]"),
    ((), 0, ""),
    ((), 0, " "),
    ((), 0, "()"),
    ((0,), 0, ""),
    ((5, 3, 3), 0, "5/(3-3)"),  # division by zero
    ((0, 5, 3, 3), 0, "0*(5/(3-3))"),
    ((0, 5), 0, "5/0"),
    ((0, 0), 0, "0/0"),
    ((1, 2), 3, "1.0+2"),  # other notations
    ((1, 2), 3, "1+2."),
    ((1, 2), 3, "1e0+2"),
    ((1, 2), 3, "0x1+2"),
    ((10, 2), 12, "1_0+2"),
    ((1, 2), 3, "1+2=3"),
    ((1, 2), 3, "1+2;"),
    ((1, 2), 3, "abs(1+2)"),
    ((1, 2), 3, "1+2#"),
    ((1, 2), 2, "1×2"),
    ((1, 2), -1, "1−2"),
    ((2, 1), 2, "2÷1"),
    ((12,), 12, "1\n2"),  # white space joins no digits
    ((12,), 12, "1\t2"),
    ((12, 3), 15, "1\r\n2+3"),
    ((12, 3), 15, "3+1\xa02"),
    ((1, 2, 3), 6, "1 2+3"),
    ((1, 2), 3, "1+2\x00"),  # other characters that are not seen
    ((1, 2), 3, "1+2\u200b"),
    ((1, 2), 3, "1\x00+2"),
    ((1, 2), 3, "1+２"),  # digits of other scripts; int() reads most of them
    ((1, 2), 3, "١+٢"),
    ((1, 2), 3, "१+२"),
    ((1, 2), 3, "1+𝟐"),
    ((1, 2), 3, "1+²"),
    ((1,), 1, "1²"),
    ((1, 2), 3, "1+②"),
    ((1, 2), 3, "1+Ⅱ"),
    ((1, 2), 3, "1+2\ud800"),
]


@pytest.mark.parametrize("numbers, target, expression", RIGHT)
def test_right(numbers, target, expression):
    assert is_solution(numbers, target, expression) is True
    assert is_solution(numbers[::-1], target, expression) is True  # the numbers' order is nothing
    assert is_solution(numbers, target + 1, expression) is False
    assert is_solution((*numbers, 1), target, expression) is False
    assert is_solution(numbers[1:], target, expression) is False


@pytest.mark.parametrize("numbers, target, expression", WRONG)
def test_wrong(numbers, target, expression):
    assert is_solution(numbers, target, expression) is False


@pytest.mark.parametrize(
    "expression",
    [None, b"1+2", bytearray(b"1+2"), 3, 3.0, True, ["1+2"], ("1", "+", "2"), object()],
)
def test_not_a_string(expression):
    assert is_solution((1, 2), 3, expression) is False


def test_length_limit_counts_every_character():
    limit = expressions.MAX_EXPRESSION
    assert is_solution((1, 2), 3, "1+2".ljust(limit)) is True
    assert is_solution((1, 2), 3, "1+2".ljust(limit + 1)) is False
    deep = (limit - 2) // 2
    assert is_solution((7,), 7, "(" * deep + "7" + ")" * deep) is True
    assert is_solution((7,), 7, "(" * deep + "7" + ")" * (deep - 1)) is False
    assert is_solution((10**limit - 1,), 10**limit - 1, "9" * limit) is True


HOSTILE = {
    "digits": "1" * 200_000,
    "sum": "1+" * 100_000 + "1",
    "spaces": "1+2" + " " * 200_000,
    "spaces between digits": "1" + " " * 200_000 + "2",
    "nested": "(" * 10_000 + "1+2" + ")" * 10_000,
    "open": "(" * 10_000,
    "closed": ")" * 10_000,
    "minus": "-" * 200_000 + "1+2",
    "nothing": "\x00" * 200_000,
    "arabic": "١" * 200_000,
    "tower": "9**9**9",
    "long tower": "**".join(["9"] * 80),
    "products": "*".join(["99999999"] * 28),
    "quotients": "/".join(["99999999"] * 28),
    "nested quotients": "1/(" * 60 + "1+2" + ")" * 60,
    "call": "__import__('os').system('exit 1')",
    "format": "{0.__class__}%s%n",
    "not a character": "\ud800" * 100,
}


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(expression):
    uses_all = [int(n) for n in re.findall("[0-9]+", expression[: expressions.MAX_EXPRESSION])]
    start = time.process_time()
    for numbers in [(1, 2), (9, 9, 9), tuple(uses_all)]:
        assert is_solution(numbers, 77, expression) is False
    assert time.process_time() - start < 0.5


# ---- is_solution: against an independent reading


SIGNS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": Fraction,
}


class Refused(Exception):
    pass


def reading(text):
    """(value, numbers) of a short text by recursive descent, or None where it has no value.

    sum: product (('+' | '-') product)*; product: atom (('*' | '/') atom)*; atom: digit+ | '(' sum
    ')'; white space between.
    """
    assert len(text) <= 120  # the recursion is as deep as the parentheses
    numbers, at = [], 0

    def peek():
        nonlocal at
        while text[at : at + 1].isspace():
            at += 1
        return text[at : at + 1]

    def chain(signs, operand):
        nonlocal at
        value = operand()
        while (sign := peek()) and sign in signs:
            at += 1
            other = operand()
            if sign == "/" and other == 0:
                raise Refused
            value = SIGNS[sign](value, other)
        return value

    def product():
        return chain("*/", atom)

    def atom():
        nonlocal at
        if peek() == "(":
            at += 1
            value = chain("+-", product)
            if peek() != ")":
                raise Refused
            at += 1
            return value
        start = at
        while text[at : at + 1] and text[at] in "0123456789":
            at += 1
        if at == start:
            raise Refused
        numbers.append(int(text[start:at]))
        return Fraction(numbers[-1])

    try:
        value = chain("+-", product)
        return None if peek() else (value, numbers)
    except Refused:
        return None


def reference(numbers, target, text):
    found = reading(text)
    return found is not None and found[0] == target and sorted(found[1]) == sorted(numbers)


def test_reference_by_hand():
    for numbers, target, text in RIGHT:
        assert reference(numbers, target, text), text
    for numbers, target, text in WRONG:
        assert not reference(numbers, target, text), text


def random_expression(rng, numbers):
    parts = [str(n) for n in numbers]
    while len(parts) > 1:
        i = rng.randrange(len(parts) - 1)
        joined = parts[i] + rng.choice("+-*/") + parts[i + 1]
        parts[i : i + 2] = [f"({joined})" if rng.random() < 0.6 else joined]
    spaced = "".join(c + " " * (rng.random() < 0.1) if c in "+-*/()" else c for c in parts[0])
    return f"({spaced})" if rng.random() < 0.1 else spaced


def mutated(rng, text):
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    strange = " .\n\t\r\xa0\x00^%eE_,=x×÷−²١１"
    piece = rng.choice(
        [*"0123456789", *"+-*/()" * 3, *strange, "()", "00", "-(", ")*(", "**", "//"]
    )
    return rng.choice(
        [
            text[:i] + piece + text[i:],
            text[:i] + piece + text[i + 1 :],
            text[:i] + text[i + 1 :],
            text[:j] + text[i:j] + text[j:],
            text[:i] + text[i:j][::-1] + text[j:],
            text[:i] + "(" + text[i:j] + ")" + text[j:],
        ]
    )


def fuzz_cases(n):
    """(numbers, target, text): expressions with up to three mutations, mostly with their values."""
    rng = random.Random(20)
    for _ in range(n):
        numbers = [rng.randint(0, rng.choice((3, 12, 99))) for _ in range(rng.randint(1, 5))]
        text = random_expression(rng, numbers)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            text = mutated(rng, text)[:120]
        if rng.random() < 0.6:
            numbers = [int(n) for n in re.findall("[0-9]+", text)]
        found = reading(text)
        other = found is None or rng.random() < 0.1
        target = rng.randint(-5, 100) if other else math.floor(found[0])
        rng.shuffle(numbers)
        yield tuple(numbers), target, text


def test_fuzz_agrees_with_the_reference():
    outcomes = Counter()
    for numbers, target, text in fuzz_cases(15_000):
        expected = reference(numbers, target, text)
        assert is_solution(numbers, target, text) is expected, (numbers, target, text)
        found = reading(text)
        outcomes[expected, found is not None, found is not None and found[0] == target] += 1
    # right; no expression; another value (a fraction, mostly); other numbers: none of them is rare
    kinds = [(True, True, True), (False, False, False), (False, True, False), (False, True, True)]
    assert set(outcomes) == set(kinds) and all(outcomes[k] > 300 for k in kinds), outcomes


def test_fuzz_of_random_characters():
    rng = random.Random(21)
    for i in range(5_000):
        n = rng.randint(0, 40)
        text = "".join(rng.choices("1234 \n+-*/()", k=n))
        if i % 2:
            text = rng.randbytes(n).decode("latin-1")
        found = reading(text)
        numbers, target = (found[1], math.floor(found[0])) if found else ((1, 2), 3)
        assert is_solution(tuple(numbers), target, text) is reference(numbers, target, text), text


# ---- solve


@functools.cache
def reachable(numbers):
    """Every value of every expression of the sorted numbers, by all ways to part them in two."""
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    found = set()
    for chosen in itertools.product((False, True), repeat=len(numbers)):
        left = tuple(n for n, c in zip(numbers, chosen, strict=True) if c)
        right = tuple(n for n, c in zip(numbers, chosen, strict=True) if not c)
        if left and right:
            for a, b in itertools.product(reachable(left), reachable(right)):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return frozenset(found)


def assert_solved(numbers, target):
    expression = solve(numbers, target)
    right = is_solution(numbers, target, expression) and reference(numbers, target, expression)
    assert right, (numbers, target, expression)


@pytest.mark.parametrize(
    "numbers, target",
    [
        ((3, 3, 8, 8), 24),  # only through fractions
        ((1, 5, 5, 5), 24),
        ((3, 3, 7, 7), 24),
        ((1, 3, 4, 6), 24),
        ((3, 8), -5),  # only negative
        ((2, 3, 20), -34),
        ((5, 5), 0),
        ((2, 3, 3), 2),
        ((7,), 7),
    ],
)
def test_solves(numbers, target):
    for order in set(itertools.permutations(numbers)):
        assert_solved(order, target)


@pytest.mark.parametrize(
    "numbers, target", [((1, 1, 1, 1), 24), ((1, 1, 2), 50), ((4, 6), 3), ((7,), 8), ((), 0)]
)
def test_no_solution(numbers, target):
    assert solve(numbers, target) is None


def test_solves_exactly_what_brute_force_does():
    rng = random.Random(1)
    solved = unsolved = 0
    for count in (1, 2, 2, 3, 3, 3) * 5:
        numbers = tuple(rng.randint(1, rng.choice((6, 15))) for _ in range(count))
        for target in range(-4, 28):
            if target in reachable(tuple(sorted(numbers))):
                assert_solved(numbers, target)
                solved += 1
            else:
                assert solve(numbers, target) is None, (numbers, target)
                unsolved += 1
    assert min(solved, unsolved) > 150


def test_solves_exactly_what_brute_force_does_with_four_numbers():
    rng = random.Random(2)
    for _ in range(6):
        numbers = tuple(rng.randint(1, 9) for _ in range(4))
        values = reachable(tuple(sorted(numbers)))
        for target in rng.sample([t for t in range(1, 300) if t in values], 4):
            assert_solved(numbers, target)
        for target in rng.sample([t for t in range(1, 300) if t not in values], 2):
            assert solve(numbers, target) is None, (numbers, target)
