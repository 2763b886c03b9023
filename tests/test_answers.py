"""Answers as models write them, judged as a fair human grader would; and read without tags."""

import gzip
import json
import random
import time

import pytest
from conftest import ROOT

from collab_jax.tasks import (
    Example,
    Task,
    Verdict,
    base,
    free_form,
    math,
    mix,
    prose,
    spelling,
    verifier,
)

DATA = ROOT.parent / "shared" / "data"


def tagged(text):
    return f"<think> so </think><answer>{text}</answer>"


def judged(gold, predictions):
    return math.equal_all([(gold, math.extract(tagged(text))) for text in predictions])


# One class a line: (what it is, gold, right predictions, wrong ones).
CLASSES = {
    "sentences": (
        "9",
        [
            "The answer is $9$",
            "The answer is 9.",
            "So, the final answer is: 9",
            r"Answer: \( 9 \)",
            "She has 9 apples left.",
            "There are 9 apples in 3 boxes.",
            "He needs 9 more apples.",
            "The total is 9, because 4 + 5 = 9.",
            "The largest $n$ is 9.",
            "If $x=3$, then the value is $9$.",
            "it is not 8, it is 9",
        ],
        [
            "The answer is $8$",
            "The answer is not 9",
            "either 8 or 9",
            "at least 9",
            "between 3 and 9",
            "9 out of 10",
            "The answer is 9x.",
            "We get x + y = 9 and more",
        ],
    ),
    "signs": (
        "-9",
        ["negative $9$", "The answer is minus $9$", "It is -$9$.", "minus 9", "-9 degrees"],
        ["9", "The answer is 9", "negative $8$"],
    ),
    "no sign": (
        "9",
        ["The answer is $9$"],
        ["negative $9$", "It is minus 9", "-$9$", "$18$ - $9$"],
    ),
    "sums in place of a number": (
        "13",
        ["13", "26/2", "25 - 12 = 13", "x = 25 - 12 = 13"],
        ["25-12", "25000-1500*8-12987", "x = 25-12", "2.5+10.5", r"$13 \cdot 1$", "(2)(6.5)"],
    ),
    "factorials": ("24", ["24"], ["4!", "The answer is 4!"]),
    "powers": ("1024", ["2^{10}", r"1.024 \times 10^3"], ["2^{9}", r"2 \cdot 2^{9}"]),
    "pairs": ("(1,2)", ["x=1, y=2", "y=2, x=1", "(x,y)=(1,2)"], ["y=1, x=2", "(y,x)=(1,2)"]),
    "emphasis and lines": (
        "9",
        ["**9**", "**Answer:** 9", "`9`", "The answer is\n\n9", "4 + 5 = 9\nAnswer: 9", "\n9\n"],
        ["**8**", "Answer: 8\n\n"],
    ),
    "names": (
        "9",
        ["x = 9 apples", "$$x = 9$$", "total = 9", "Total cost: $9", r"x \approx 9", "= 9"],
        ["x = 8 apples", "2x = 9"],
    ),
    "arithmetic": ("9", ["5 + 4 = 9", r"3 \times 3 = 9", "x = 5 + 4 = 9"], ["5 + 3 = 9", "5+4=8"]),
    "units": (
        "9",
        ["9 apples", "9 cm", "9cm", "9 cm^2", "9 square feet", "9 m²", "9 km per hour", "9 m/s"],
        ["9 million", "9 thousand apples", "9 feet 4 inches", "9th", "9 boys and 3 girls"],
    ),
    "money": ("9.5", ["$9.50", r"\$9.5", "9.50 dollars", "£9.50", "9,50 €", "9.5 USD"], ["$9"]),
    "thousands": (
        "1234567",
        ["1,234,567", "1 234 567", r"1{,}234{,}567", r"1,\!234,\!567", "$1,234,567.00"],
        ["1,234", "1, 234, 567", "1.234567"],
    ),
    "percent": ("25", ["25%", r"25\%", "25 percent", "25 percentage points"], ["0.25", "2.5%"]),
    "fractions": (
        r"\frac{3}{2}",
        ["3/2", "1.5", "1½", "1 1/2", r"1\frac12", r"Answer: \( \frac32 \)", "3/2 cups"],
        ["2/3", "11/2", r"\frac{1}{2}"],
    ),
    "rounded": (r"\frac{1}{12}", ["0.0833333", "0.083333333"], ["0.083", "0.0833334"]),
    "sets": (
        "-2, 1",
        [
            "1; -2",
            r"\{1, -2\}",
            "x = -2 or x = 1",
            r"$x=-2$ and $x=1$",
            "The solutions are -2 and 1.",
            r"$x = -2 \text{ or } x = 1$",
            "x_1 = -2, x_2 = 1",
            "x = -2, 1",
        ],
        ["-2", "2, 1", "-2, 1, 3"],
    ),
    "several boxes": (
        "-2, 1",
        [r"\boxed{-2} and $\boxed{1}$", r"\boxed{-2}, \boxed{1}", r"\boxed{1} \quad \boxed{-2}"],
        [r"\boxed{-2} so \boxed{1}"],
    ),
    "the same box twice": ("9", [r"\boxed{9}, so \boxed{9}", r"\boxed{9} \boxed{9}"], []),
    "named values": ("x=3, y=4", ["y = 4, x = 3", "x = 3 and y = 4"], ["x=4, y=3", "3"]),
    "solutions": ("(1,2),(3,4)", ["x=1, y=2 or x=3, y=4", "(3, 4); (1, 2)"], ["x=1,y=2"]),
    "inequalities": (
        r"x \ge 5",
        ["x>=5", r"5 \leq x", "x ≥ 5", r"[5, \infty)", r"x \in [5,∞)", r"We get $x \geq 5$."],
        ["x>5", "x<=5", r"(5,\infty)", "5"],
    ),
    "intervals": (r"(2,5]", ["2 < x <= 5", r"5 \ge x > 2", r"x\in(2,5]"], ["(2,5)", "2<x<5"]),
    "unions": (
        r"(-\infty,2)\cup(5,\infty)",
        ["x < 2 or x > 5", "(5,∞) ∪ (-∞,2)", r"x<2 \text{ or } x>5"],
        ["x < 2", "x > 2 or x < 5"],
    ),
    "matrices": (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [
            r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
            r"\left[\begin{array}{cc}1 & 2\\ 3& 4\end{array}\right]",
            "The matrix is $\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}$.",
        ],
        [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"],
    ),
    "letters": (
        r"\text{(C)}",
        [
            "C",
            "(C)",
            "C.",
            "The answer is C",
            "Option C",
            r"\textbf{(C)}",
            "(C) 12",
            "C) 12 apples",
        ],
        [
            "B",
            "12",
            "(B) C",
            "(C) and (D)",
            "C, D",
            "C) D)",
            "C or D",
            "C. is wrong, so D",
            "The wrong option is C",
            "C: incorrect",
            "C - wrong",
            "C (wrong)",
            "C isn't right",
            "C. 3 or D. 4",
            "C) 3 D) 4",
            "C / D",
            "not C",
        ],
    ),
    "letters before words": (
        "A",
        [
            "A. Not enough is known",
            "A. Wrong, Wrong",
            "A. I and II",
            "A) A train",
            "A. none of the above",
            "A. 9, without a remainder",
            "A. B and C",
            "A. bacteria such as E. coli",
            "A, not B",
            "The answer is A, because 2 + 2 = 4",
        ],
        [],
    ),
    "words": (
        r"\text{Monday}",
        ["Monday", "monday.", "It is Monday.", "**Monday**", r"\boxed{\text{Monday}}"],
        ["Friday", "It is not Monday", "5"],
    ),
    "points": (r"\frac{1}{3}", ["|AB| = 1/3", "AB:CD = 1/3", r"\frac{AB}{CD}=\frac13"], ["AB=3"]),
    "commands": (r"2\sqrt{3}", ["2√3", r"2\\sqrt{3}", r"The area is 2\sqrt{3} cm."], ["2", "3"]),
    "formulas": ("2x+3", ["y = 2x+3", r"$f(x) = 2x + 3$", "It is $2x+3$."], ["2x", "3"]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_answers_as_models_write_them(name):
    gold, right, wrong = CLASSES[name]
    verdicts = dict(zip(right + wrong, judged(gold, right + wrong), strict=True))
    assert verdicts == dict.fromkeys(right, True) | dict.fromkeys(wrong, False)


def test_what_a_spelling_settles_needs_no_worker(monkeypatch):
    def no_worker():
        raise AssertionError("a pair went to the verifier")

    monkeypatch.setattr(verifier, "shared", no_worker)
    for name in ("emphasis and lines", "money", "percent", "sets", "fractions", "words", "letters"):
        gold, right, wrong = CLASSES[name]
        assert judged(gold, right + wrong) == [True] * len(right) + [False] * len(wrong)


@pytest.mark.parametrize(
    "part",
    [
        "(",
        "_A",
        "A_{a}",
        "x=",
        "9 apples and ",
        "is ",
        "$9$ and ",
        r"\boxed{1} and ",
        r"\boxed{",
        "1 000 ",
    ],
)
def test_reading_an_answer_costs_little_whatever_it_is(part):
    text = (part * 500)[: math.MAX_ANSWER]
    started = time.monotonic()
    free_form.same(spelling.normal("9"), spelling.normal(prose.answer_in(text)))
    prose.last_answer(part * 5000)
    prose.last_letter(part * 5000)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{1} \boxed{2}", ["1", "2"]),
        (r"\boxed{\boxed{1}}", [r"\boxed{1}"]),
        (r"\boxed{\frac{1}{2}}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1\}}", [r"\{1\}"]),
        (r"{ \boxed{\fbox{2}", ["2"]),
        (r"\boxed{" * 3000, []),
    ],
)
def test_boxes_that_close(text, contents):
    assert [content for _, _, content in prose.boxes(text)] == contents


# ---- golds that are not the answer

SENTENCES = {
    "alone": "{}",
    "is": "The answer is ${}$.",
    "colon": r"Answer: \( {} \)",
    "reason": "First we add. Then the total is {}, because 2 + 2 = 4.",
    "box": r"Thus it is \boxed{{{}}}.",
}


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("name", ["math500", "gsm8k_test", "svamp_test"])
def test_in_a_sentence_the_gold_is_accepted_and_no_other_one(name, sentence):
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: benchmark data is not part of the repository")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        golds = [json.loads(line)["answer"] for line in lines]
    golds = random.Random(0).sample(golds, 400)
    written = [tagged(SENTENCES[sentence].format(gold)) for gold in golds]
    answers = [math.extract(text) for text in written]
    own = math.equal_all(list(zip(golds, answers, strict=True)))
    assert own.count(True) >= 0.99 * len(golds)
    others = [
        (gold, answer)
        for i, gold in enumerate(golds)
        if spelling.normal(gold) != spelling.normal(golds[i - 7]) and (answer := answers[i - 7])
    ]
    assert len(others) > 300 and math.equal_all(others).count(True) <= 0.001 * len(others)


# ---- responses without tags


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("5 + 4 = 9\n#### 9", "9"),
        (r"So it is \boxed{9}, and not 8.", "9"),
        ("First 4. The answer is 9 apples. Then she eats 2.", "9 apples"),
        ("Answer: 9", "9"),
        ("She has 5 and 4, so she has 9.", "9"),
        ("It costs $1,234.50 in all", "1,234.50"),
        ("<answer>9", "9"),
        ("no number", None),
        ("", None),
    ],
)
def test_an_answer_without_tags(response, answer):
    assert prose.last_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A. 4", "A"),
        ("(A)", "A"),
        ("A) four", "A"),
        ("The answer is A", "A"),
        ("The correct answer is (A) 4 apples.", "A"),
        ("Let us see: 2 + 2 = 4.\nSo we choose it.\nA. 4", "A"),
        ("<think> 4 </think> A", "A"),
        ("**A**", "A"),
        ("A. 4\nIt is 2 + 2.", "A"),
        ("A. 3\nB. 4\nC. 5\nI cannot tell.", None),
        ("A. 3\nB. 4\nC. 5", None),
        ("A. 3\nB. 4\nC. 5\nThe answer is B", "B"),
        ("A. 3\nB. 4\nC. 5\nB", "B"),
        ("It is hard. " * 200 + "\nA. 4\nIt is 2 + 2." + " Or so." * 270, None),
        ("The wrong option is A", None),
        ("A good question", None),
        ("42", None),
        ("", None),
    ],
)
def test_a_letter_without_tags(response, letter):
    assert prose.last_letter(response) == letter


def test_the_last_line_where_nothing_is_stated():
    assert prose.last_line("Let me think.\nParis\n") == "Paris"
    assert prose.last_line("The answer is Paris.\nI am sure.") == "Paris"
    assert prose.last_line("  ") is None


def lenient_task(read_answer, asked):
    def verify(examples, responses):
        asked.extend(responses)
        return [Verdict("<answer>9</answer>" in r, False, False) for r in responses]

    ask = lambda example: []  # noqa: E731
    return Task("t", lambda split: [], ask, ask, verify, read_answer=read_answer)


def test_lenient_verdicts_compare_only_what_the_verifier_has_not_seen():
    asked = []
    task = lenient_task(lambda example, response: prose.last_answer(response), asked)
    responses = ["<answer>9</answer>", "it is 9", "<answer>8</answer> 9", "it is 8", "none", ""]
    cut_off = ["<answer>9</answer> and so on and", "so 9 and"]
    examples = [Example(str(i), "", None) for i in range(8)]
    correct, ended = [True] + [False] * 7, [True] * 6 + [False] * 2
    found = base.lenient_verdicts(task, examples, responses + cut_off, correct, ended)
    assert [v and v.correct for v in found] == [None, True, None, False, None, None, True, True]
    assert asked == [f"<answer>{n}</answer>" for n in (9, 8, 9, 9)]


def test_a_task_that_reads_nothing_without_tags_is_as_strict_as_its_verifier():
    asked = []
    examples = [Example("a", "", None), Example("b", "", None)]
    task = lenient_task(None, asked)
    found = base.lenient_verdicts(task, examples, ["it is 9", "9"], [True, False], [True] * 2)
    assert found == [None, None] and not asked


def test_each_part_of_a_mix_reads_in_its_own_way():
    readers = {
        "numbers": lambda example, response: prose.last_answer(response),
        "letters": lambda example, response: prose.last_letter(response),
        "tagged": None,
    }
    parts = {name: lenient_task(read, []) for name, read in readers.items()}
    task = mix.make_task(parts, dict.fromkeys(parts, 1 / 3))
    assert task.read_answer
    read = {name: task.read_answer(Example("a", "", None, task=name), "B. 42") for name in parts}
    assert read == {"numbers": "42", "letters": "B", "tagged": None}
