"""Countdown: the checker against an independent reading, the solver against brute force, data and
demonstrations.
"""

import functools
import hashlib
import itertools
import math
import os
import random
import re
import runpy
import shutil
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from collab_jax.cloud import SimulatedCloud
from collab_jax.models.text import word_tokenizer
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, TaskError, countdown, expressions, make_task
from collab_jax.tasks.countdown import demonstrations, generate, load, split_of
from collab_jax.tasks.expressions import is_solution, solve

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "countdown_tiny_sft.py"


def tiny_config(**changes):
    """The embedded model's config, with changes to its `task` part."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.task.update(changes)
    return config


def take(n, source):
    return list(itertools.islice(source, n))


def within(count, n, share):
    """True where `count` of `n` lies within 4.5 standard deviations of the share."""
    return abs(count - n * share) <= 4.5 * (n * share * (1 - share)) ** 0.5


def pair(numbers, target):
    return tuple(sorted(numbers)), target


# ---------------------------------------------------------------- is_solution: by hand


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
    [
        None,
        b"1+2",
        bytearray(b"1+2"),
        3,
        3.0,
        True,
        ["1+2"],
        ("1", "+", "2"),
        object(),
        float("nan"),
    ],
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


# ---------------------------------------------------------------- is_solution: against an independent reading


class Refused(Exception):
    pass


def reading(text):
    """(value, numbers) of a short text by recursive descent over the grammar, or None where it has
    no value.

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
            value = (
                {"+": value + other, "-": value - other, "*": value * other}[sign]
                if sign != "/"
                else value / other
            )
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
    """(numbers, target, text): expressions with up to three mutations, mostly asked for what they
    hold and are worth.
    """
    rng = random.Random(20)
    for _ in range(n):
        numbers = [rng.randint(0, rng.choice((3, 12, 99))) for _ in range(rng.randint(1, 5))]
        text = random_expression(rng, numbers)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            text = mutated(rng, text)[:120]
        if rng.random() < 0.6:
            numbers = [int(n) for n in re.findall("[0-9]+", text)]
        found = reading(text)
        target = (
            rng.randint(-5, 100) if found is None or rng.random() < 0.1 else math.floor(found[0])
        )
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
        text = (
            rng.randbytes(n).decode("latin-1")
            if i % 2
            else "".join(rng.choices("1234 \n+-*/()", k=n))
        )
        found = reading(text)
        numbers, target = (found[1], math.floor(found[0])) if found else ((1, 2), 3)
        assert is_solution(tuple(numbers), target, text) is reference(numbers, target, text), text


# ---------------------------------------------------------------- solve


@functools.cache
def reachable(numbers):
    """Every value of every expression of the sorted numbers: all ways to part them in two, all
    values of both.
    """
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
    assert is_solution(numbers, target, expression) and reference(numbers, target, expression), (
        numbers,
        target,
        expression,
    )


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


def test_solves_generated_examples():
    for numbers, target, _ in take(150, generate("test", 5, tiny_config().task)):
        assert_solved(numbers, target)


# ---------------------------------------------------------------- the two sides, the stream


def test_split_never_changes():
    # printf '[3, 8]=24' | b2sum -l 32: 8cc5ec38, a multiple of eight; [1, 2, 3]=6: 5cd873a2; [3, 3,
    # 8, 8]=24: 9de0ab9e
    assert split_of((3, 8), 24) == split_of((8, 3), 24) == "test"
    assert split_of((1, 2, 3), 6) == "train"
    assert {split_of(order, 24) for order in itertools.permutations((3, 8, 3, 8))} == {"train"}
    assert {split_of((3, 8), target) for target in range(10, 60)} == {
        "train",
        "test",
    }  # the target counts, too


def test_one_pair_in_eight_is_a_test():
    sides = Counter(split_of(numbers, 24) for numbers in itertools.combinations(range(1, 36), 3))
    assert within(sides["test"], sides.total(), 1 / 8)


def test_stream_is_fixed_by_split_and_seed():
    config = tiny_config().task
    streams = [
        take(200, generate(*key, config))
        for key in [("train", 0), ("train", 0), ("train", 1), ("test", 0)]
    ]
    assert streams[0] == streams[1]
    rows = [{(numbers, target) for numbers, target, _ in stream} for stream in streams]
    assert all(len(a & b) < 5 for a, b in itertools.combinations(rows[1:], 2))
    # what data sets on disk hold: a new stream needs a new Countdown.VERSION
    text = "\n".join(f"{numbers}={target}" for numbers, target, _ in streams[0])
    assert text.startswith("(50, 48, 37)=39\n(37, 35, 16)=14\n")
    assert hashlib.sha256(text.encode()).hexdigest().startswith("91e7a8ca0417c480e5573c1a3b746220")


def test_sides_are_disjoint_whatever_the_seeds():
    config = tiny_config(
        numbers=(1, 9), targets=(10, 30)
    ).task  # few pairs: each side has most of its own
    sides = {
        split: {
            pair(n, t) for seed in (0, 1) for n, t, _ in take(500, generate(split, seed, config))
        }
        for split in ("train", "test")
    }
    assert not sides["train"] & sides["test"] and min(map(len, sides.values())) > 100
    assert all(split_of(*p) == split for split, pairs in sides.items() for p in pairs)


def test_ranges_are_honoured_to_their_ends():
    rows = take(800, generate("train", 3, tiny_config(numbers=(3, 9), targets=(20, 26)).task))
    assert {n for numbers, _, _ in rows for n in numbers} == set(range(3, 10))
    assert {target for _, target, _ in rows} == set(range(20, 27))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mix_is_as_configured(share):
    # 4-number examples from 1 to 50 are less often accepted than 3-number ones: that must not show
    counts = Counter(
        len(n)
        for n, _, _ in take(3_000, generate("train", 4, tiny_config(share_of_three=share).task))
    )
    assert set(counts) <= {3, 4} and within(counts[3], 3_000, share)


def test_solutions_of_the_stream_are_right():
    for numbers, target, found in take(1_000, generate("train", 6, tiny_config().task)):
        assert found.value == target and is_solution(numbers, target, found.expression)


def test_ranges_without_any_example_end(monkeypatch):
    monkeypatch.setattr(countdown, "MAX_TRIES", 3_000)
    with pytest.raises(TaskError, match="widen config.task.numbers or targets"):
        next(generate("train", 0, tiny_config(numbers=(1, 1), targets=(50, 60)).task))


# ---------------------------------------------------------------- the data set on disk


def data_config(folder, **changes):
    return tiny_config(
        **{"data_dir": str(folder), "train_examples": 400, "test_examples": 150, **changes}
    ).task


def files(folder):
    return {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(error):
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = data_config(folder)
    return folder, config, {split: load(split, config) for split in ("train", "test")}


def test_built_without_tensorflow(built):
    assert "tensorflow" not in sys.modules
    assert any("array_record" in name.name for name in files(built[0]))


def test_rows(built):
    _, config, rows = built
    assert {split: len(examples) for split, examples in rows.items()} == {"train": 400, "test": 150}
    for split, examples in rows.items():
        assert len({e.id for e in examples}) == len(examples)
        for example in examples:
            numbers, target = example.problem
            assert (
                all(type(n) is int and 1 <= n <= 50 for n in numbers)
                and type(target) is int
                and 10 <= target <= 99
            )
            assert example.stratum == f"{len(numbers)} numbers" and len(numbers) in (3, 4)
            assert split_of(numbers, target) == split
        assert {e.problem for e in examples} == {
            (n, t) for n, t, _ in take(len(examples), generate(split, "data 0", config, set()))
        }
        shown = {
            (n, t) for n, t, _ in take(300, generate(split, 0, config))
        }  # to the warm start, with solutions
        assert len({e.problem for e in examples} & shown) < 5
    assert within(sum(len(e.problem[0]) == 3 for e in rows["train"]), 400, config.share_of_three)


def test_no_duplicates_in_or_across_splits(tmp_path):
    # small numbers: the stream itself repeats often
    config = data_config(
        tmp_path, numbers=(1, 6), targets=(10, 30), train_examples=400, test_examples=50
    )
    assert len({pair(n, t) for n, t, _ in take(400, generate("train", 0, config))}) < 300
    pairs = [pair(*e.problem) for split in ("train", "test") for e in load(split, config)]
    assert len(pairs) == len(set(pairs)) == 450


def test_mix_on_disk_is_as_configured(tmp_path):
    config = data_config(tmp_path, numbers=(1, 9), targets=(10, 40), train_examples=1_100)
    assert within(
        sum(len(e.problem[0]) == 3 for e in load("train", config)), 1_100, config.share_of_three
    )


def test_same_bytes_and_rows_twice(built, tmp_path):
    folder, _, rows = built
    assert {split: load(split, data_config(tmp_path)) for split in ("test", "train")} == rows
    first, second = files(folder), files(tmp_path)
    assert first.keys() == second.keys() and len(first) >= 4
    for name in first:
        if "array_record" in name.name:
            assert first[name].read_bytes() == second[name].read_bytes()


def test_second_load_builds_nothing(built, monkeypatch, capfd):
    folder, config, rows = built

    def never(*args, **kwargs):
        raise AssertionError("built again")

    monkeypatch.setattr(countdown, "generate", never)
    before = {name: path.stat().st_mtime_ns for name, path in files(folder).items()}
    start = time.process_time()
    assert load("train", config) == rows["train"]
    assert time.process_time() - start < 2
    assert {name: path.stat().st_mtime_ns for name, path in files(folder).items()} == before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"data_seed": 1},
        {"train_examples": 40},
        {"numbers": (1, 40)},
        {"targets": (10, 90)},
        {"share_of_three": 0.6},
    ],
)
def test_other_settings_are_other_data(built, changes):
    folder, _, rows = built
    other = load(
        "train", data_config(folder, **{"train_examples": 50, "test_examples": 20, **changes})
    )
    usual = load("train", data_config(folder, train_examples=50, test_examples=20))
    assert [e.problem for e in other] != [e.problem for e in usual]
    assert load("train", data_config(folder)) == rows["train"]


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("test", data_config("~/data", train_examples=10, test_examples=5))) == 5
    assert (tmp_path / "data").is_dir()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TaskError, match="cannot write.*set config.task.data_dir") as error:
            load("train", data_config(folder))
        assert str(folder) in one_line(error)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_folder_without_permission(tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(TaskError, match="cannot write.*set config.task.data_dir") as error:
        load("train", data_config(tmp_path / "sealed"))
    one_line(error)


def test_more_examples_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "MAX_TRIES", 20_000)
    narrow = {"numbers": (1, 2), "targets": (1, 3), "test_examples": 1}
    with pytest.raises(
        TaskError, match="after [0-9]+ different ones: ask for fewer config.task.train_examples"
    ) as error:
        load("train", data_config(tmp_path, train_examples=500, **narrow))
    possible = int(re.search("after ([0-9]+) different", one_line(error))[1])
    assert len(load("train", data_config(tmp_path, train_examples=possible, **narrow))) == possible


def test_no_example_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "MAX_TRIES", 3_000)
    with pytest.raises(TaskError, match="widen config.task.numbers or targets") as error:
        load("train", data_config(tmp_path, numbers=(1, 1), targets=(50, 60)))
    one_line(error)


def test_another_process_builds_first(tmp_path, monkeypatch):
    config, first = data_config(tmp_path, train_examples=30, test_examples=10), []

    def generate_late(*args, **kwargs):
        monkeypatch.setattr(countdown, "generate", generate)
        first.extend(load("train", config))
        return generate(*args, **kwargs)

    monkeypatch.setattr(countdown, "generate", generate_late)
    assert load("train", config) == first and len(first) == 30


@pytest.mark.parametrize("damage", ["missing", "truncated", "overwritten", "no info"])
def test_damaged_files(tmp_path, damage):
    config = data_config(tmp_path, train_examples=30, test_examples=10)
    rows = load("train", config)
    [records] = tmp_path.rglob("*train.array_record*")
    if damage == "missing":
        records.unlink()
    elif damage == "truncated":
        os.truncate(records, records.stat().st_size // 2)
    elif damage == "overwritten":
        records.write_bytes(b"\xa5" * records.stat().st_size)
    else:
        records.with_name("dataset_info.json").write_text("{")
    with pytest.raises(TaskError, match="delete the folder") as error:
        load("train", config)
    folder = Path(re.search(r"the data set in (\S+)", one_line(error))[1])
    assert folder in records.parents and folder != tmp_path
    shutil.rmtree(folder)  # as the message says
    assert load("train", config) == rows


# ---------------------------------------------------------------- demonstrations


MARKER = tiny_config().text.marker
N = 3_000


@functools.cache
def demonstrated(seed=0, n=N, **changes):
    return take(n, demonstrations(seed, tiny_config(**changes).task, MARKER))


@functools.cache
def tokenizer():
    config = tiny_config()
    return word_tokenizer(config.sft.words, config.text.pad, config.text.eos[0], "<unk>")


def token_count(response):
    """Tokens of a response, EOS included; every piece of it is in the vocabulary."""
    ids = tokenizer().encode(response, add_special_tokens=False)
    assert tokenizer().unk_token_id not in ids and tokenizer().decode(ids) == response
    return len(ids) + 1


def thoughts(response):
    """The lines of the thinking part, without the tags, and what follows it."""
    found = re.fullmatch(f"<think>(.*?)(</think>.*|{re.escape(MARKER)})", response, re.DOTALL)
    return [line for line in found[1].split("\n") if line], found[2]


def value_of(line):
    """Where an attempt's steps end."""
    return int(re.search(r"=(\d+) \w+$", line)[1])


def eval_exact(after):
    """Value of the expression in `</think><answer>...</answer>`, found by `is_solution`."""
    expression = re.fullmatch(r"</think><answer>(.*)</answer>", after)[1]
    numbers = tuple(map(int, re.findall(r"\d+", expression)))
    return next(value for value in range(1, 10**6) if is_solution(numbers, value, expression))


def test_every_demonstration_is_what_its_verdicts_and_its_value_say():
    task = make_task(tiny_config())
    verify = lambda example, response: task.verify([example], [response])[0]  # noqa: E731
    kinds = Counter()
    for example, response in demonstrated():
        called, (lines, _) = response.endswith(MARKER), thoughts(response)
        right = not called and value_of(lines[-1]) == example.problem[1]
        assert verify(example, response)[:3] == (right, called, not called), response
        kinds["call" if called else "right" if right else lines[-1][-2:]] += 1
    assert kinds["right"] > kinds["call"] > 200 and min(kinds["ok"], kinds["no"]) > 100


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_shares_of_give_ups_and_guesses(share):
    found = demonstrated(n=1_500, demo_give_up=share, demo_guess=0.0)
    assert within(sum(MARKER in response for _, response in found), 1_500, share)
    wrong = [value_of(thoughts(r)[0][-1]) != e.problem[1] for e, r in found if MARKER not in r]
    assert not any(wrong)
    found = demonstrated(n=1_500, demo_give_up=0.0, demo_guess=share)
    wrong = [
        value_of(thoughts(response)[0][-1]) != example.problem[1] for example, response in found
    ]
    assert 0.7 * share <= sum(wrong) / 1_500 < share + 0.05  # some guesses hit


def test_give_ups_and_guesses_do_not_depend_on_the_problem():
    task = tiny_config().task
    for count in (3, 4):
        found = [(e, r) for e, r in demonstrated() if len(e.problem[0]) == count]
        assert within(
            sum(MARKER in response for _, response in found), len(found), task.demo_give_up
        )
        wrong = sum(
            MARKER not in r and value_of(thoughts(r)[0][-1]) != e.problem[1] for e, r in found
        )
        assert 0.6 < wrong / len(found) / task.demo_guess < 1.1


def test_arithmetic_of_every_step():
    signs = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": Fraction,
    }
    verdicts = Counter()
    for example, response in demonstrated():
        numbers, target = example.problem
        lines, after = thoughts(response)
        for line in lines:
            steps, verdict = line.rsplit(" ", 1)
            left = Counter(numbers)
            for step in steps.split(","):
                a, sign, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
                assert signs[sign](int(a), int(b)) == int(result) > 0, response
                left.subtract((int(a), int(b)))
                assert min(left.values()) >= 0, response  # only what is given or made
                left[int(result)] += 1
            assert left.total() == 1  # all of it
            assert verdict == "ok" if left[target] else verdict == "no" or line is lines[-1], (
                response
            )
            verdicts[verdict] += 1
            if verdict == "ok":  # followed by the answer, right or not far from it
                assert (
                    line is lines[-1]
                    and after != MARKER
                    and abs(value_of(line) - target) <= countdown.NEAR
                )
        if after != MARKER and lines[-1].endswith("no"):  # a guess that owns up
            assert abs(value_of(lines[-1]) - target) > countdown.NEAR
        assert after == MARKER or eval_exact(after) == value_of(lines[-1]), response
    assert min(verdicts.values()) > 500


def test_calls_and_answers_come_with_and_without_failures():
    kinds = Counter()
    for _, response in demonstrated():
        lines, after = thoughts(response)
        kinds[after == MARKER, sum(line.endswith("no") for line in lines)] += 1
    assert (
        all(kinds[called, failures] > 50 for called in (False, True) for failures in (0, 1))
        and kinds[True, 2] > 50
    )


def test_all_fit_the_token_limit():
    config = tiny_config()
    assert config.task.demo_length <= config.max_new_tokens
    lengths = [token_count(response) for _, response in demonstrated()]
    assert config.task.demo_length - 6 <= max(lengths) <= config.task.demo_length
    # with less room there are fewer failed attempts, and what is too long still is nothing but a
    # solution
    for _, response in demonstrated(n=500, demo_length=32):
        assert token_count(response) <= 32 or len(thoughts(response)[0]) == 1


def test_prompts_fit_the_token_limit():
    config = tiny_config()
    task = make_task(config)
    longest = Example("", "", ((50, 50, 50, 50), 99))
    for example in [longest, *(example for example, _ in demonstrated()[:300])]:
        ids = tokenizer().apply_chat_template(
            task.prompt(example), add_generation_prompt=True, return_dict=False
        )
        assert tokenizer().unk_token_id not in ids and len(ids) <= config.prompt_length


def test_demonstrations_are_of_the_train_side():
    assert {split_of(*example.problem) for example, _ in demonstrated()} == {"train"}


def test_demonstrations_are_fixed_by_the_seed():
    again = take(200, demonstrations(0, tiny_config().task, MARKER))
    assert again == demonstrated()[:200]
    assert (
        len(
            {response for _, response in again}
            & {response for _, response in demonstrated(seed=1, n=200)}
        )
        < 20
    )
    # the embedded model is made from this stream: a new stream needs a new model
    text = "\n".join(f"{example.problem}{response}" for example, response in again)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("896397433a9b6405ab7854ca25404cb0")


# ---------------------------------------------------------------- the cloud's prompt


def test_solve_prompt_answers_every_cloud_prompt():
    task = make_task(tiny_config())
    examples = [
        Example("", "", (n, t)) for n, t, _ in take(100, generate("test", 8, tiny_config().task))
    ]
    examples.append(Example("", "", ((3, 3, 8, 8), 24)))
    for example in examples:
        prompt = task.cloud_prompt(example)
        (verdict,) = task.verify([example], [task.solve_prompt(prompt)])
        assert verdict.correct and not verdict.called
        assert task.solve_prompt(
            [{"role": "system", "content": "Be brief."}, *prompt]
        ) == task.solve_prompt(prompt)
        # an error of the simulated cloud is one for every example
        assert not task.verify([example], [SimulatedCloud.wrong])[0].correct
    assert len({task.cloud_prompt(example)[-1]["content"] for example in examples}) == len(examples)


def test_cloud_prompt_tells_what_is_needed():
    [message] = make_task(tiny_config()).cloud_prompt(Example("", "", ((12, 7, 30), 51)))
    assert (
        message["role"] == "user" and "12 7 30" in message["content"] and "51" in message["content"]
    )
    assert "<answer>" in message["content"]


def test_foreign_prompts():
    task = make_task(tiny_config())
    example = Example("", "", ((1, 2, 3), 6))
    [cloud], [device] = task.cloud_prompt(example), task.prompt(example)
    text = cloud["content"]
    foreign = [
        "",
        device["content"],
        "What is the capital of France?",
        "Please: " + text,
        text.replace("numbers", "digits"),
        text.replace("1 2 3", ""),
        text.replace("1 2 3", "1, 2 and 3"),
        text.replace("1 2 3", "١ ٢ ٣"),
        text.replace("1 2 3", "-1 2 3"),
        text.replace("equals 6", "equals x"),
        text.replace("equals 6", "equals -6"),
        text.replace("equals 6", "equals 6.5"),
        text.partition(" equals")[0],
        "Using the numbers " + "1 " * 100_000,
    ]
    for content in foreign:
        with pytest.raises(TaskError):
            task.solve_prompt([{"role": "user", "content": content}])
    with pytest.raises(TaskError):  # the last message is the one to answer
        task.solve_prompt([cloud, {"role": "user", "content": "Thanks!"}])


def test_prompt_without_a_solution():
    task = make_task(tiny_config())
    prompt = task.cloud_prompt(Example("", "", ((1, 1, 2), 50)))
    with pytest.raises(TaskError, match="no expression"):
        task.solve_prompt(prompt)
    assert (
        SimulatedCloud("sim", task.solve_prompt, 0.0, 1, 1, 1).answer([prompt])[0].text
        == SimulatedCloud.wrong
    )
