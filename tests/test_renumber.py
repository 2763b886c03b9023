"""Other numbers in word problems: what follows from them, what stays, what is left alone."""

import random
import re

import pytest

from collab_jax.tasks import renumber

TEAM = {
    "id": "t1",
    "problem": "A team had 12 members and 4 stayed away. Each other scored 8 points. How many?",
    "solution": "12-4=8, 8*8=64",
    "answer": "64",
}
BOXES = {
    "id": "t2",
    "problem": "Ann fills 3 boxes with 15 pens each and gives 20 pens, not 7, away.",
    "solution": "3*15=45, 45-20=25",
    "answer": "25",
}


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_new_numbers_go_through_all_steps():
    seen = set()
    for seed in range(50):
        new = renumber.renumbered(BOXES, random.Random(seed))
        boxes, pens, given, other = numbers(new["problem"])
        assert new["solution"] == (
            f"{boxes}*{pens}={boxes * pens}, {boxes * pens}-{given}={boxes * pens - given}"
        )
        assert new["answer"] == str(boxes * pens - given) and boxes * pens > given
        assert boxes < other < 10 <= pens < given < 100  # digits and order are kept
        assert re.sub(r"\d+", "#", new["problem"]) == re.sub(r"\d+", "#", BOXES["problem"])
        assert new["id"] == "t2"
        seen.add(new["problem"])
    assert len(seen) > 40


def test_a_number_that_is_not_in_the_problem_stays():
    row = {"problem": "Tim has 13 dozen balls.", "solution": "13*12=156", "answer": "156"}
    new = renumber.renumbered(row, random.Random(0))
    (dozens,) = numbers(new["problem"])
    assert new["solution"] == f"{dozens}*12={12 * dozens}" and dozens != 13


def test_a_division_stays_whole():
    row = {"problem": "Cut 96 pies for 12 guests.", "solution": "96/12=8", "answer": "8"}
    for seed in range(20):
        new = renumber.renumbered(row, random.Random(seed))
        pies, guests = numbers(new["problem"])
        assert pies % guests == 0 and new["answer"] == str(pies // guests)


def test_the_seed_decides():
    first = renumber.renumbered(BOXES, random.Random(1))
    assert first == renumber.renumbered(BOXES, random.Random(1))
    assert first != renumber.renumbered(BOXES, random.Random(2))


@pytest.mark.parametrize(
    ("problem", "solution"),
    [
        (TEAM["problem"], TEAM["solution"]),  # which 8 is meant, that of the text or the result?
        ("He ran 0.5 miles and 3 more.", "0.5+3=3.5"),
        ("It is 10:30; in 5 minutes?", "30+5=35"),
        ("A 1/2 of 8 pies", "8/2=4"),
        ("Off 10% of 50", "50-10=40"),
        ("1,200 seats and 5 more", "1200+5=1205"),
        ("He finds 0 and 7 pens", "0+7=7"),
        ("The 3rd of 9 pens", "9-3=6"),
        ("He has two pens and finds 7", "2+2=4"),  # uses none of the numbers
    ],
)
def test_what_is_not_safe_stays(problem, solution):
    row = {"problem": problem, "solution": solution, "answer": solution.rpartition("=")[2]}
    assert renumber.renumbered(row, random.Random(0)) is row
