"""Drills in arithmetic: worked out as steps are, right, of the promised sizes, of every kind."""

import random
import re
from collections import Counter

from collab_jax.tasks import columns, drills


def sums_of(drill):
    """The sums of a drill as steps, whether they are worked out in columns or not."""
    asked, sums = "", []
    for line in drill.split("\n"):
        if line.endswith(":"):
            asked = line.removesuffix(":")
        elif not asked or line.startswith("="):
            sums.append(asked + line)
            asked = ""
    return sums


def test_every_sum_is_right_and_no_longer_than_promised():
    rng, kinds = random.Random(0), Counter()
    for _ in range(750):
        drill = drills.drill(rng)
        sums = sums_of(drill)
        assert len(sums) == drills.SUMS
        assert drill.split("\n") == [line for step in sums for line in columns.worked(step)]
        for line in sums:
            left, operator, right, value = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
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
