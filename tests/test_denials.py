"""Words that take back the number of an answer, make another one of it, or leave open which."""

import pytest

from collab_jax.tasks import denials, math

# One class a line: (what it is, gold, right predictions, wrong ones).
CLASSES = {
    "denials": (
        "9",
        [
            "it is not 8, it is 9",
            "9, not 8",
            "The answer is 9. Not 8.",
            "9 is the answer",
            "$9$ is the total",
            "The answer is 9 rather than 8.",
            "That is not right, so the answer is 9",
            "9 children who did not go",
        ],
        [
            "The answer is not $9$",
            "The answer cannot be 9",
            "The answer isn't 9",
            "The answer does not equal 9",
            "The answer is anything but 9",
            "The wrong answer is 9",
            "9 is wrong",
            "9 was wrong",
            "9 is not the answer",
            "The answer is 9. That is wrong.",
            "The answer used to be 9",
            "9 is too small",
            "9 is half of it",
            "$9$ was only the first step",
            "all numbers but 9",
            "9? No.",
        ],
    ),
    "other numbers before it": (
        "9",
        [
            "Half of 18 is 9.",
            "The sum of 4 and 5 is 9",
            "She has 9 more apples than Bob.",
            "The third number is 9",
        ],
        [
            "The answer is greater than $9$",
            "a third of 9",
            "half of 9",
            "twice 9",
            "the square root of 9",
            "The answer is the sum of 9 and 9",
            "The answer is over 9",
            "up to 9",
            "around $9$",
            "near 9",
            "log 9",
            "root 9",
        ],
    ),
    "other numbers after it": (
        "9",
        ["9 points", "9 third graders", "9 months", "He went there 9 times.", "nine apples"],
        [
            "9 or more",
            "The answer is $9$ or more",
            "9 at most",
            "9 below zero",
            "9 thirds",
            "nine tenths",
            "$9$ thirds",
            r"9\text{ thirds}",
            "9 and three quarters",
            "9 apples and a half",
            "9 point 5",
            "9 squared",
            "The answer is 9 factorial",
            "9 tens",
            "9 pairs",
            "9 score",
            "9 bn",
            "9 grand",
            "9 dozen",
            "9 times as many",
            "9 less",
            "9 negative",
            "The answer is 9 pi",
            "9 in binary",
            "9 more than 20",
        ],
    ),
    "taken back": (
        "9",
        ["The answer is 9. It took a while."],
        [
            "The answer is 9. Wait, I forgot the 3. So 12 apples.",
            "The answer is 9. Correction: 12",
            "The answer is 9.\n\nActually, it is 12.",
            "9. Hmm, 12",
        ],
    ),
    "numerals": ("20", ["twenty", "twenty apples"], ["twenty one", "twenty-one", "twenty thirds"]),
    "hedges": (
        "7",
        ["If $x=3$, then the value is $7$", "The answer is 7, maybe.", "He could buy 7 pens."],
        [
            "The answer is 7, or possibly 12",
            "The answer is 7. It could be 12",
            "The answer is 7 in one reading and 12 in another",
            "The answer is 7, though 12 is possible",
            "The answer is 7. Or 12",
            "$7$, or possibly $12$",
            "7 or twelve",
            "The answer is 7 or twelve",
            "It is 12 if even; it is 7 if odd",
            "The result is 12 or the result is 7",
        ],
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_number_counts_only_where_it_is_claimed(name):
    gold, right, wrong = CLASSES[name]
    predictions = right + wrong
    equal = math.equal_all([(gold, prediction) for prediction in predictions])
    verdicts = dict(zip(predictions, equal, strict=True))
    expected = dict.fromkeys(right, True) | dict.fromkeys(wrong, False)
    assert verdicts == expected


def test_an_answer_in_words_may_deny():
    pairs = [
        (r"\text{not possible}", "The answer is not possible."),
        (r"\text{no solution}", "The answer is no solution."),
        ("none of them", "None of them"),
        ("x \\ne 3", r"We find that $x \neq 3$."),
    ]
    assert math.equal_all(pairs) == [True] * len(pairs)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("It is 9, because 4 + 5 = 9", "It is 9"),
        ("9, since 4.5 + 4.5 = 9. Or 8", "9. Or 8"),
        ("It is not $8$, it is $9$", "It is it is $9$"),
        ("9 and 8", "9 and 8"),
        ("Because I say so", "Because I say so"),
        ("5 is not 8", "5 is not 8"),
    ],
)
def test_asides(text, rest):
    assert denials.without_asides(text) == rest


def test_numbers_that_are_the_same_leave_nothing_open():
    assert not denials.undecided("7 or 7")
    assert not denials.undecided("7, and 12")
    assert not denials.undecided("if 3, it is 7")
    assert not denials.undecided("3 + 4 = 7, or so")
    assert denials.undecided("7, or 12 in May")
