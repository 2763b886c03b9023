"""Word problems told in another order: what changes places, what stays, what is left alone."""

import random

import pytest

from collab_jax.tasks import reorder


def orders(problem, solution="9-4=5"):
    """All that a problem becomes, with the solution that it then has."""
    row = {"id": "t1", "problem": problem, "solution": solution, "answer": "5"}
    found = [reorder.reordered(row, random.Random(seed)) for seed in range(20)]
    assert all(new | {"problem": problem, "solution": solution} == row for new in found)
    return {(new["problem"], new["solution"]) for new in found}


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("Ann had 9 red pens and 4 caps. Why?", "Ann had 4 caps and 9 red pens. Why?"),
        ("Ann had 9 pens. Bob had 4. Why?", "Bob had 4. Ann had 9 pens. Why?"),
        ("Ann had 9 pens. She lost 4. Why?", "Ann lost 4. She had 9 pens. Why?"),
        ("ann had 9 pens. he lost $ 4. Why?", "ann lost $ 4. he had 9 pens. Why?"),
        ("Hi. The cat ate 9. A dog ate 4. Why?", "Hi. A dog ate 4. The cat ate 9. Why?"),
    ],
)
def test_two_things_change_places(problem, told):
    assert orders(problem) == {(told, "9-4=5")}
    assert orders(told) == {(problem, "9-4=5")}  # and back again


def test_one_of_several_places_is_drawn():
    problem = "Ann has 2 pens. Bob has 3 pens and 4 caps. Cy has 5. Di has 6. Why?"
    assert {told for told, _ in orders(problem)} == {
        "Ann has 2 pens. Bob has 4 caps and 3 pens. Cy has 5. Di has 6. Why?",
        "Ann has 2 pens. Bob has 3 pens and 4 caps. Di has 6. Cy has 5. Why?",
    }


def test_sums_and_products_follow_the_order_of_the_numbers():
    problem, told = "Ann has 9 pens and 4 caps. Why?", "Ann has 4 caps and 9 pens. Why?"
    for before, after in (
        ("9+4=13", "4+9=13"),
        ("9*4=36", "4*9=36"),
        ("9-4=5", "9-4=5"),
        ("9+4=13, 13*2=26", "4+9=13, 13*2=26"),
        ("9+12=21, 21+4=25", "9+12=21, 21+4=25"),  # 12 and 21 are not in the problem
    ):
        assert orders(problem, before) == {(told, after)}


@pytest.mark.parametrize(
    "problem",
    [
        "Ann had 9 pens. She lost 4 of them. Why?",  # points back
        "Ann had 9 pens. Then Bob had 4. Why?",
        "Ann had 9 pens. 4 more came. Why?",
        "The girl had 9 pens. She lost 4. Why?",  # there is no name to put first
        "Ann had 9 pens. Bob had 4 or 5. Why?",
        "Ann had 9 pens, and Bob has 4 caps. Why?",
        "Ann had 9 pens and 3 times as many caps. Why?",
        "Ann paid $9 bills and 4 coins. Why?",
        "Ann had 1.9 pens and 4 caps. Why?",
        "How many are 9 pens?",
        "",
    ],
)
def test_what_cannot_be_safe_is_left_alone(problem):
    assert orders(problem) == {(problem, "9-4=5")}
