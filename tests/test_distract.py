"""Numbers of no use in word problems: where they go, what stays, what is left alone."""

import random

from collab_jax.tasks import distract

PENS = {
    "id": "t1",
    "problem": "Mrs. Hill had 15 red pens. She lost 4. How many pens are left?",
    "solution": "15-4=11",
    "answer": "11",
}
OTHERS = ["caps", "pens", "shells"]


def changed(problem, seed=0, others=OTHERS):
    return distract.distracted(PENS | {"problem": problem}, others, random.Random(seed))["problem"]


def test_a_sentence_comes_again_with_another_number_of_other_things():
    seen = set()
    for seed in range(100):
        new = distract.distracted(PENS, OTHERS, random.Random(seed))
        assert {**new, "problem": PENS["problem"]} == PENS
        told = new["problem"].removesuffix("How many pens are left?")
        assert told != new["problem"]
        first, second, rest = told.partition("Mrs. Hill had 15 red pens. ")
        assert second
        put_in = f"{first}{rest}".replace("She lost 4. ", "")
        words = put_in.split()
        assert words[:3] == ["Mrs.", "Hill", "had"] and words[4] == "red"
        assert 10 <= int(words[3]) < 100 and int(words[3]) != 15
        assert words[5] in ("caps.", "shells.") and len(words) == 6
        assert first in ("", put_in)  # before the sentence, or before the question
        seen.add((first == "", words[5]))
    assert len(seen) == 4


def test_what_points_back_keeps_its_meaning():
    """Where "them" would be the wrong things, the new sentence stands before."""
    problem = "Lori has 30 pens. If she shares them among 5 friends, how many pens has each?"
    for seed in range(20):
        assert changed(problem, seed).endswith(problem)


def test_what_cannot_be_safe_is_left_alone():
    for problem in (
        "Ann had 5 pens. She lost 2. How much did she lose?",
        "Ann had 5 pens. She lost 2. How many things are left?",  # they may be of any kind
        "Ann had 5 pens and lost 2 of them. How many pens are left?",  # two numbers at once
        "Ann had $5 pens. How many pens?",
        "How many pens are 5 pens and 2 pens?",  # no sentence before the question
        "",
    ):
        assert changed(problem) == problem
    assert changed(PENS["problem"], others=["pens"]) == PENS["problem"]


def test_the_new_number_is_not_in_the_problem():
    hours = "".join(f"It took {n} hours. " for n in range(4, 9))
    problem = f"Ann had 2 pens, Bo 3. {hours}Bo had 3 pens. How many pens had Bo?"
    assert "Bo had 9 caps." in changed(problem, others=["caps"])
    none_free = problem.replace("Ann had 2", "Ann had 9").replace("4 hours", "4 or 2 hours")
    assert changed(none_free) == none_free


def test_things_are_counted_and_asked_for():
    rows = [
        PENS,
        {"problem": "Bo has 3 blue caps. How many caps has he?"},
        {"problem": "Bo has caps. How many hats has he?"},
        {"problem": "HOW MANY does he have? He has 3."},
    ]
    assert distract.things(rows) == ["caps", "pens"]


def test_a_problem_keeps_its_question():
    assert distract.questions(PENS["problem"]) == ["How many pens are left?"]
    assert distract.questions("What is it? Say it. Is it 1.5?") == ["What is it? ", "Is it 1.5?"]
    assert distract.questions("Add 2 and 2.") == []
