"""Drills in arithmetic: right, of the promised sizes, and of every kind."""

import random
import re
from collections import Counter

from collab_jax.tasks import drills


def test_a_drill_is_right_and_asks_what_it_solves():
    rng, kinds = random.Random(0), Counter()
    for _ in range(500):
        row = drills.drill(rng)
        steps = row["solution"].split(", ")
        assert [step.partition("=")[0] for step in steps] == row["problem"].split(", ")
        assert len(steps) == drills.SUMS and steps[-1].partition("=")[2] == row["answer"]
        for step in steps:
            left, operator, right, value = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            left, right, value = int(left), int(right), int(value)
            kinds[operator] += 1
            assert right > 0 and max(left, right) < 1000
            assert {
                "+": left + right == value,
                "-": left - right == value,
                "*": left * right == value,
                "/": left == value * right,
            }[operator]
    # 600 and 450 of 1,500 expected, standard deviations 19 and 18
    assert 520 < kinds["-"] < 680 and 370 < kinds["+"] < 530
    assert min(kinds["*"], kinds["/"]) > 150


def test_the_seed_decides():
    assert drills.drill(random.Random(3)) == drills.drill(random.Random(3))
    assert drills.drill(random.Random(3)) != drills.drill(random.Random(4))
