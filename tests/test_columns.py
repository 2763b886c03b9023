"""Sums in columns: by hand, each line right, and the value to be read from the lines alone."""

import random
import re

import pytest

from collab_jax.tasks import columns


@pytest.mark.parametrize(
    ("step", "lines"),
    [
        ("82-37=45", ["82-37:", "12-7=5", "8-3-1=4", "=45"]),
        ("47+38=85", ["47+38:", "7+8=15", "4+3+1=8", "=85"]),
        ("95+7=102", ["95+7:", "5+7=12", "9+0+1=10", "=102"]),
        ("532-178=354", ["532-178:", "12-8=4", "13-7-1=5", "5-1-1=3", "=354"]),
        ("100-1=99", ["100-1:", "10-1=9", "10-0-1=9", "1-0-1=0", "=99"]),
        ("24*7=168", ["24*7:", "4*7=28", "2*7+2=16", "=168"]),
        ("7*24=168", ["7*24:", "4*7=28", "2*7+2=16", "=168"]),
        ("96/4=24", ["96/4:", "9=4*2+1", "16=4*4+0", "=24"]),
        ("180/3=60", ["180/3:", "18=3*6+0", "0=3*0+0", "=60"]),
    ],
)
def test_by_hand(step, lines):
    assert columns.worked(step) == lines


@pytest.mark.parametrize(
    "step",
    [
        *("12+7=19", "18-9=9", "8*9=72", "63/7=9", "100/10=10"),  # known by heart
        *("34*12=408", "408/12=34", "7/2=3.5", "25/4=6", "12-34=-22", "2.5+30=32.5"),  # no columns
        *("20+30=60", "50%40=20", "(20+30)*2=100"),  # not a sum, or not its value
    ],
)
def test_what_stays_as_it_is(step):
    assert columns.worked(step) == [step]


def worth(side):
    """The value of a side of an equation, such as 2*7+2."""
    products = re.findall(r"([+-])(\d+)(?:\*(\d+))?", f"+{side}")
    return sum(int(f"{sign}1") * int(a) * int(b or 1) for sign, a, b in products)


def test_every_line_is_right_and_the_columns_have_the_value():
    rng, seen = random.Random(0), set()
    for _ in range(2_000):
        operator = rng.choice("+-*/")
        left, right = rng.randrange(1, 10 ** rng.randint(1, 4)), rng.randrange(2, 10)
        if operator in "+-":
            right = rng.randrange(1, 10 ** rng.randint(1, 4))
            left, right = max(left, right), min(left, right)
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left}[operator]
        if operator == "/":
            left = left * right
        step = f"{left}{operator}{right}={value}"
        shown = columns.worked(step)
        if shown == [step]:
            continue
        seen.add(operator)
        head, *lines, last = shown
        assert (head, last) == (f"{left}{operator}{right}:", f"={value}")
        assert all(len({worth(side) for side in line.split("=")}) == 1 for line in lines)
        if operator == "/":
            digits = [re.search(r"\*(\d)\+", line)[1] for line in lines]
        else:
            # The last digit of each column, and all of the last column.
            values = [line.rpartition("=")[2] for line in reversed(lines)]
            digits = [values[0], *(v[-1] for v in values[1:])]
        assert int("".join(digits)) == value
    assert seen == set("+-*/")
