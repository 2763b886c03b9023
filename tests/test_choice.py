"""Multiple choice: letters however they are wrapped, choices shuffled, questions of one's own."""

import gzip
import itertools
import json
from collections import Counter

import pytest
from conftest import ROOT
from fakes import answered, task_config, write_rows

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, choice, make_task, prose

DATA = ROOT.parent / "shared" / "data"

C_IS_CHOSEN = r"""
C | (C) | c | (c) | [C] | {C} | 'C' | "C" | “C” | `C` | **C** | *C* | __C__ | $C$ | \(C\) | C! | C;
\boxed{C} | $\boxed{C}$ | \boxed{\text{C}} | \boxed{(C)} | \boxed{\text{C. 4}} | \mathrm{C} | Ｃ
C: 4 | C) 4 | C. 4 | C - 4 | C – 4 | (C) 4 | C (4) | C = 4 | **C.** 4 | **C. 4** | **(C)** 4 | c) 4
The answer is C. | the answer is (C) | The answer is: C | The answer is **C** | The answer is $C$.
The correct answer is option C. | The correct option is C: 4 | So the answer is \boxed{C}.
Answer: C | ANSWER: C | Answer - C | Final answer: **C** | Correct: C | #### C | Ans: C
Option C | option (C) | Choice C | The correct answer is letter C | The answer must be C.
C is correct | choice C is correct | C is the answer. | Among the choices, C is correct.
I choose C | I would choose C. | I'd go with C | It's C. | Therefore, C | Hence (C) | so C
C, because A is too small | C, not B | Not B, but C | The answer is C because A and B are wrong.
\boxed{\textbf{(C)}\ 42} | \textbf{(C) }42 | \textit{C} | \underline{C} | \mathsf{C} | {\bf C}
C。 | c: | -> C | => C | → C | C. 4, because (A) and (B) are too small
Select C | Pick C | Choose option C. | The answer is option c | option (c)
C (the larger one) | A) 3 B) 4 C) 5. The answer is C. | C. Both A and B
C. bacteria such as E. coli
C: A cat | C. A and B | (C) all of the above | C. Not enough is known | C. I and II | C) A train
"""
NOTHING_IS_CHOSEN = r"""
A cat | A mammal | The answer is a mammal | The answer is A mammal | A good question | I am not sure
vitamin C | Vitamin C | The answer is vitamin C | Hepatitis C | plan B | 25 C | -C | C^2 | 2C | CC
Both A and C | C or D | C, D | A, B and C | A, B, C | C/D | C-D | C? D? | not sure, C or B | C?
C++ | A. 3 B. 4 C. 5 | The answer is either C or D | C or maybe D | The answer could be C or D
Not C | The answer is not C | C is wrong | C is not correct | C isn't right | C: incorrect
C (wrong) | It cannot be C | I would exclude C
I would not choose C | neither C nor D | Anything but C | 4
A is correct. C is correct.
C: wrong. D: right | C. wrong; D. right | C. Actually, the answer is D. | C... wait, D
C, no wait, D | C. No, A. | C, D are correct | C is correct, but so is D | C; D
A; C; D | C; or D | C. Or D.
C (maybe D) | C, then D | A: 3, B: 4 | A. true B. false | C. true D. false
The answer is A. No, B: 4 | The answer is C. D
c) 3, d) 4 | c) or d) | C, no A is right | C; A | So C; D | pick C, then D | ~C | C. That is wrong
"""


def listed(text):
    return [answer.strip() for line in text.strip().split("\n") for answer in line.split(" | ")]


def row(number, choices=("red", "green", "blue"), answer="A", **more):
    problem = f"Which colour has room {'ixvlcdm'[number % 7] * (1 + number // 7)}?"
    return {
        "id": str(number),
        "problem": problem,
        "choices": list(choices),
        "answer": answer,
        **more,
    }


@pytest.mark.parametrize("answer", listed(C_IS_CHOSEN))
def test_a_letter_is_read_however_it_is_wrapped(answer):
    assert prose.letter(answer) == "C"


@pytest.mark.parametrize("answer", listed(NOTHING_IS_CHOSEN))
def test_no_letter_is_read_out_of_prose(answer):
    assert prose.letter(answer) is None


def test_a_letter_on_its_own_line_may_be_explained():
    for more in ("\n42", "\n\nExplanation: it is the largest.", "\r\nA cat", "\nI am sure"):
        assert prose.letter(f"C{more}") == "C"
    for more in ("\nD", "\n\nWait, it is D.", "\nA is right", "\nNo, that is wrong.", "\nor (d)"):
        assert prose.letter(f"C{more}") is None


BOOLEANS = ("True", "False")
POSSIBLE = ("possible", "impossible", "cannot be determined")
VITAMINS = ("Not B", "Vitamin C", "C", "4 A")


@pytest.mark.parametrize(
    ("choices", "answers", "letter"),
    [
        (("3", "4", "5", "6"), ["4", " 4 ", "4.", r"\boxed{4}", "The answer is 4", "B. 4"], "B"),
        (("+", "-", "x", "/"), ["x", "X", "C: x"], "C"),
        (("+", "-", "x", "/"), ["-"], "B"),
        (("+", "*", "..."), ["*", "B. *"], "B"),
        (("+", "*", "..."), ["`", "**", "The answer is 4", "."], None),
        (BOOLEANS, ["B: false", "B. false", "(B) false", "b) False", "false.", "B False"], "B"),
        (BOOLEANS, ["The answer is B. False", "**B.** False", "Option B: False", "B\nFalse"], "B"),
        (BOOLEANS, [r"\boxed{\textbf{(B)}\ \text{False}}", r"\boxed{\text{False}}"], "B"),
        (BOOLEANS, ["A: true", "A. True", "true"], "A"),
        (BOOLEANS, ["A: false", "A. true B. false", "C", "C. False", "B: wrong"], None),
        (POSSIBLE, ["B. impossible", "(B) impossible", "impossible"], "B"),
        (("all", "No answers are right."), ["The answer is B. No answers are right."], "B"),
        (POSSIBLE, ["C. cannot be determined", "cannot be determined", "C - 4"], "C"),
        (VITAMINS, ["B. Vitamin C", "vitamin C", "B\nVitamin C"], "B"),
        (VITAMINS, ["A. Not B", "A) not B"], "A"),
        (VITAMINS, ["D. 4 A", "D"], "D"),
        (VITAMINS, ["C", "C. C"], "C"),
        (VITAMINS, ["A. Vitamin C", "B. Not B, C"], None),
        (("I only", "II only", "I, II, and III"), ["The answer is I, II, and III"], "C"),
        (("I only", "II only", "I and III"), ["I, II, and III", "I"], None),
        (("four", "four", "five"), ["B. four", "B"], "B"),
        (("AB", "BC", "CD"), ["BC"], "B"),
        (("41", "42", "43"), ["B. Wait, the answer is 43.", "B. The answer is C. 43"], None),
        (("41", "42", "43"), ["First 42, but the answer is 43.", "C. The answer is 43."], "C"),
        (("A", "~A", "B", "~B"), ["~A"], "B"),
        (("A", "~A", "B", "~B"), ["B", "(B)", "The answer is B.", r"\text{B}"], "B"),
    ],
)
def test_the_choices_own_text_decides_first(choices, answers, letter):
    example = Example("x", "", ("?", choices, "A"))
    read = {answer: choice.chosen(example, answered(answer)) for answer in answers}
    assert read == dict.fromkeys(answers, letter)


def test_the_choices_are_known_without_tags_too(tmp_path):
    read = make_task(task_config(tmp_path, "choices")).read_answer
    assert read is not None
    example = Example("x", "", ("?", VITAMINS, "B"))
    assert read(example, "It prevents scurvy.\nB. Vitamin C") == "B"
    assert read(example, "So B; C") is None and read(example, "B: wrong. C: right") is None


def test_the_text_of_a_choice_is_its_letter():
    names = Example("x", "", ("?", ("E. coli", "C. elegans", "A", "a worm"), "B"))
    said = ["C. elegans", "c.  Elegans", "C", "A", "a worm", "E. coli", "B. C. elegans", "(d)"]
    letters = [choice.chosen(names, answered(text)) for text in said]
    assert letters == ["B", "B", "C", "A", "D", "A", "B", "D"]
    twice = Example("x", "", ("?", ("four", "four", "five"), "A"))
    assert choice.chosen(twice, answered("four")) is None
    assert choice.chosen(twice, "four") is None  # no tags


def test_a_shuffle_depends_on_the_question_alone_and_the_letter_follows():
    places = Counter()
    for i in range(300):
        question, choices = f"What is {i}+1?", (f"{i + 1}", f"{i}", f"{i - 1}", "more")
        order, answer = choice.shuffled(question, choices, "A")
        assert sorted(order) == sorted(choices) and order["ABCD".index(answer)] == f"{i + 1}"
        turned = choices[1:] + choices[:1]  # the same choices in another order in the file
        assert choice.shuffled(question, turned, "D") == (order, answer)
        places[answer] += 1
    assert all(45 < n < 105 for n in places.values())  # 75 each, with a deviation of 7.5


@pytest.mark.parametrize(
    "last",
    ["A and B", "Both (a) and (b)", "all of the above", "B, C", "A B and C", "B only", "C or D"],
)
def test_choices_that_speak_of_places_stay_in_theirs(last):
    choices = ("1", "2", "3", last)
    for i in range(10):
        assert choice.shuffled(f"Question {i}", choices, "D") == (choices, "D")


def test_questions_of_ones_own_are_trained_on(tmp_path):
    write_rows(tmp_path / "choices_train.jsonl", [row(i, type="rooms") for i in range(100)])
    write_rows(tmp_path / "choices_test.jsonl", [row(i) for i in range(4)])
    task = make_task(task_config(tmp_path, "choices"))
    train, validation, test = (task.load(split) for split in ("train", "validation", "test"))
    assert len(train) + len(validation) == 100 and len(validation) in range(4, 20)
    assert {e.stratum for e in train} == {"rooms"} and {e.task for e in train} == {"choices"}
    assert {e.problem[2] for e in train} == {"A", "B", "C"}  # all are A in the file
    assert all(e.problem[1]["ABC".index(e.problem[2])] == "red" for e in train + validation)
    assert all(e.problem[1:] == (("red", "green", "blue"), "A") for e in test)
    question, choices, letter = train[0].problem
    shown = task.prompt(train[0])[0]["content"]
    assert shown == "\n".join([question, *(f"{x}. {c}" for x, c in zip("ABC", choices))])  # noqa: B905
    responses = [answered(letter), answered(f"({letter}) it is red"), answered("red"), letter]
    verdicts = task.verify([train[0]] * 4, responses)
    assert [v.correct for v in verdicts] == [True, True, True, False]
    assert task.solve_prompt(task.cloud_prompt(train[0])) == f"<answer>{letter}</answer>"


def test_demonstrations_are_right_or_end_with_the_call(tmp_path):
    write_rows(tmp_path / "choices_train.jsonl", [row(i) for i in range(40)])
    task = make_task(task_config(tmp_path, "choices", demo_give_up=0.25))
    assert task.demonstrations
    shown = list(itertools.islice(task.demonstrations(0), 400))
    verdicts = task.verify(*zip(*shown, strict=True))
    assert all(v.called or (v.correct and v.formatted) for v in verdicts)
    assert 60 < sum(v.called for v in verdicts) < 140
    assert sorted(e.id for e, _ in shown[: len(task.load("train"))]) == sorted(
        e.id for e in task.load("train")
    )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"answer": "D"}, "row 0: the answer 'D' is not the letter of one of its choices"),
        ({"answer": "AB"}, "row 0: the answer 'AB' is not the letter"),
        ({"choices": ["one"]}, "row 0: choices must be a list of 2 to 10"),
        ({"choices": list("abcdefghijk")}, "row 0: choices must be a list of 2 to 10"),
        ({"choices": "red"}, "row 0: choices must be a list of 2 to 10"),
        ({"choices": ["red", None]}, "row 0: the choice None is no text or number: write what"),
        ({"choices": ["red", " "]}, "row 0: the choice ' ' is no text or number"),
        ({"choices": ["red", ["blue"]]}, r"row 0: the choice \['blue'\] is no text or number"),
        ({"choices": []}, r"choices_test.jsonl, line 1 has no choices"),
    ],
)
def test_rows_that_are_no_questions_are_named(tmp_path, bad, says):
    write_rows(tmp_path / "choices_test.jsonl", [row(0) | bad])
    with pytest.raises(UserError, match=says):
        make_task(task_config(tmp_path, "choices")).load("test")


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no choices_train.jsonl or choices_train.jsonl.gz"):
        make_task(task_config(tmp_path, "choices")).load("validation")
    with pytest.raises(UserError, match="'mmlu' has no train split"):
        make_task(task_config(tmp_path, "mmlu")).load("train")


@pytest.mark.slow
def test_mmlu_is_shuffled_fairly_as_training_questions(tmp_path):
    """MMLU's own rows in the place of a training file: every letter is as often right."""
    file = DATA / "mmlu_test.jsonl.gz"
    if not file.exists():
        pytest.skip("benchmark data is not part of the repository")
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    write_rows(tmp_path / "choices_train.jsonl", rows)
    task = make_task(task_config(tmp_path, "choices"))
    examples = task.load("train") + task.load("validation")
    assert len(examples) == 14042 and len({e.stratum for e in examples}) == 57
    by_id = {r["id"]: r for r in rows}
    places = Counter()
    for e in examples:
        _, choices, letter = e.problem
        source = by_id[e.id]
        right = str(source["choices"]["ABCD".index(source["answer"])])
        assert choices["ABCD".index(letter)] == right
        places[letter] += 1
    assert all(0.23 < n / 14042 < 0.27 for n in places.values())
    golds = [answered(f"The answer is {e.problem[2]}.") for e in examples[:2000]]
    assert all(v.correct for v in task.verify(examples[:2000], golds))
