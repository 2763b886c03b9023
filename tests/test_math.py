"""Mathematics: answers found and compared, by hand and on real golds; rows; multiple choice."""

import gzip
import json
import random
import re
import runpy
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import free_form, make_task, math, rows, spelling, verifier
from collab_jax.tasks.prose import letter
from collab_jax.tasks.verifier import Verifier

DATA = ROOT.parent / "shared" / "data"
MARKER = "<unknown> I need external assistance </unknown>"


def answered(text):
    return f"<think> so </think><answer> {text} </answer>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        (r"It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{\{2, 3\}}", r"\{2, 3\}"),
        (r"\boxed {a} so \fbox{b}", "b"),
        (r"\boxed{3} and $\boxed{5}$", "3, 5"),
        (r"\boxed{3} boys and \boxed{4} girls", "3, 4"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        ("\r\n\t42\u00a0\r\n", "42"),
        ("\n" * 3000 + "\\boxed{ 42\n}" + "\n" * 3000, "42"),
        ("  ", None),
        ("9" * 501, None),
        ("First we add. " * 50 + "So the answer is 9.", "9."),
    ],
)
def test_the_answer_of_a_response(text, answer):
    assert math.extract(answered(text)) == answer
    assert math.extract(f"<think> {text}") is None


@pytest.mark.parametrize(
    ("gold", "same", "other"),
    [
        (
            "5",
            ["5.0", " 5 ", "$5$", r"\boxed{5}", r"5\text{ cm}", "5.", "10/2", r"\frac{10}{2}"],
            ["-5", "55", "5x", "5,6"],
        ),
        (
            r"\frac{1}{2}",
            ["1/2", ".5", "0.50", r"\dfrac12", r"\tfrac{1}{2}", r"\frac 1 2"],
            ["2", "0.51", r"\frac{2}{1}"],
        ),
        (r"-\frac{3}{4}", ["-0.75", r"\frac{-3}{4}", "-3/4", "−0.75"], ["0.75"]),
        (r"11,\!111", ["11111", "11,111"], ["11.111", "11, 112"]),
        (r"45^\circ", ["45", r"45^{\circ}"], ["46"]),
        (r"\$18.90", ["18.9", "18.90"], ["18.91"]),
        (r"50\%", ["50", r"50 \%"], ["51"]),
        (r"\text{Evelyn}", ["Evelyn", "evelyn", r"\mbox{Evelyn}"], ["Eve"]),
        ("1,-2", ["-2, 1", r"\{1, -2\}", r"1 , -2."], ["1,2", "1", "1,-2,3"]),
        ("(1,-2)", [r"\left( 1, -2 \right)", "(1.0, -2)"], ["(-2,1)", "(1,2)"]),
        ("(3,4]", [r"(3, 4]"], ["[3,4)", "(3,4)"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\frac{\pi}2)", r"(3, \pi/2)"], [r"(3,\pi)"]),
        (r"2\sqrt{3}", [r"2 \sqrt3", r"\sqrt{12}", r"\sqrt{3} \cdot 2"], [r"3\sqrt{2}"]),
        ("x^2+2x+1", ["(x+1)^2", "1+2x+x^2"], ["(x-1)^2"]),
        ("12", [r"\ 12\,"], ["1 2", r"1\,2", "1 .2", "1\n2", "1\u00a02", r"1\ 2", "1~2"]),
        ("3", ["03", "1+2=3"], ["1 2", "4=3", "2x=6", r"x^2+2=3", "3.0 0", "3 000", "0 003"]),
        (
            "12000",
            [r"12\,000", r"12\ 000", "12{,}000", r"12,\!000", "12~000", "12 000"],
            ["12, 000", r"12\,00", r"12\,0000", r"1\,2000"],
        ),
        ("1.5", [r"1\frac{1}{2}", r"1 \frac12"], ["1 1/2 0", "1. 5", r"\frac{1}{5}"]),
        ("5.5", ["11/2"], ["1 1/2"]),
        (
            "5",
            ["x = 5", "x=y=5", "f(x) = 5", r"\theta=5", "x_1 = 5", r"x_\text{max} = 5", "AB=5"],
            ["2x=5", "4=5", "x+y=5", "x=2x=5"],
        ),
        (
            "5",
            [
                r"m\angle ABC = 5^\circ",
                r"\text{Area} = 5",
                "P(X>2)=5",
                "f^{-1}(x)=5",
                r"\boxed{x=5}",
            ],
            ["x^2=5", "|x|=5"],
        ),
        ("(3,4)", ["(x,y)=(3,4)", "(x, y) = (3, 4)"], ["(x,2)=(3,4)"]),
        ("3,4", ["x=3, x=4", r"x = 4 , 3"], ["x=3, 2=4"]),
        ("2x+3y=5", ["3y+2x=5"], ["5", "2x+3y"]),
        ("SRAC=LRAC", ["SRAC = LRAC"], ["5"]),
        (
            r"\begin{pmatrix} 1 \\ 4 \\ -3 \end{pmatrix}",
            [r"\begin{pmatrix}1\\4\\-3\end{pmatrix}"],
            [r"\begin{pmatrix} 14 \\ -3 \end{pmatrix}", r"\begin{pmatrix} 1 4 -3 \end{pmatrix}"],
        ),
        ("x\\ge 5", ["x>=5"], ["x>5"]),
    ],
)
def test_equal_and_unequal_answers(gold, same, other):
    pairs = [(gold, prediction) for prediction in same + other]
    assert math.equal_all(pairs) == [True] * len(same) + [False] * len(other)
    assert math.equal(gold, same[0]) and not math.equal(gold, other[0])


HOSTILE = (
    "9^{9^{9^{9^9}}}",
    r"\frac{" * 60 + "1",
    "{" * 400,
    "(" * 400,
    "1" * 400,
    r"\int_0^1 x^{1000000!} dx",
    "\x00\ud800",
    "",
    r"\binom{10^{9}}{5 \cdot 10^{8}}",
    r"\sum_{i=1}^{10^9} i^{i}",
    "(x+1)^{100000}",
    "2" + "^{2" * 120 + "}" * 120,
    "7!" + "!" * 400,
    r"x\in" * 125,
    "x=" * 250,
)


@pytest.mark.slow
def test_a_hostile_answer_costs_its_deadline_at_most():
    short = Verifier(workers=1, deadline=1.0)
    try:
        assert short.equal([("x", "x")]) == [True]  # started
        for hostile in HOSTILE:
            assert not free_form.same("7", spelling.normal(hostile))
            started = time.monotonic()
            assert short.equal([("7", hostile)])[0] in (False, None), hostile
            if not short._workers[
                0
            ].ready:  # it was stuck: to start another is not the answer's cost
                short.equal([("x", "x")])
            else:
                assert time.monotonic() - started < 2.0, hostile  # on a busy machine
        assert short.equal([("x+x", "2x"), ("x", "y")]) == [True, False]  # the next are compared
    finally:
        short.close()


@pytest.mark.parametrize(
    "part",
    [r"\frac{", r"\boxed{", "{", r"\boxed{1}", "</answer>", "<answer>", "9^", " ", r"\sqrt{2}+"],
)
def test_a_hundred_thousand_characters_cost_nothing(part, tmp_path):
    write(tmp_path / "math_test.jsonl", row(3, answer=r"\frac{1}{2}"))
    task = make_task(config("math", tmp_path))
    started = time.monotonic()
    verdicts = task.verify(
        task.load("test") * 2,
        [answered(part * (100_000 // len(part))), part * (100_000 // len(part))],
    )
    assert not any(v.correct for v in verdicts) and time.monotonic() - started < 5


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_a_stuck_or_dead_worker_costs_its_own_answer_alone(monkeypatch, tmp_path, workers):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\n"
        "time.sleep(1.5)\n"  # longer than the deadline, which counts from here on
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if 'stuck' in line: time.sleep(60)\n"
        "    if 'dead' in line: sys.exit(1)\n"
        "    print(1, flush=True)\n"
    )
    monkeypatch.setattr("collab_jax.tasks.verifier.WORKER", worker)
    compare = Verifier(workers=workers, deadline=1.0)
    pairs = [("a", said) for said in ("fine", "dead", "fine", "stuck", "fine")]
    assert compare.equal(pairs) == [True, False, True, None, True]
    assert compare.equal([("a", "fine")] * 3) == [True] * 3
    for one in compare._workers:
        one.process.kill()
        one.process.wait()
    assert compare.equal([("a", "fine")] * 3) == [True] * 3
    compare.close()


def test_an_interrupted_comparison_answers_no_later_one(monkeypatch):
    compare = Verifier(workers=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(verifier._Batch, "_read", interrupted)
        compare.equal([("x", "x"), ("x", "y")])
    assert compare.equal([("x", "y"), ("x+x", "2x")]) == [False, True]
    compare.close()


@pytest.mark.parametrize("cloud", [False, True])
def test_a_comparison_out_of_time_is_told_from_a_wrong_answer(monkeypatch, tmp_path, cloud):
    """Also where the response is the cloud's, and in a mix."""
    write(tmp_path / "math_test.jsonl", row(1, answer="x+1"), row(2, answer="x+2"))
    write(tmp_path / "gsm8k_test.jsonl", row(3))
    slow = lambda pairs: [None if "x+1" in pair else False for pair in pairs]  # noqa: E731
    monkeypatch.setattr(verifier, "shared", lambda: SimpleNamespace(equal=slow))
    settings = config("mix", tmp_path)
    settings.task.mix = (("math", 1), ("gsm8k", 1))
    task = make_task(settings)
    examples = sorted(task.load("test"), key=lambda example: example.id[-1])
    responses = [answered("1+x"), answered("2+x"), answered("6")]
    if cloud:
        responses = [f"So it is <answer>{math.extract(r)}</answer>" for r in responses]
    verdicts = task.verify(examples, responses)
    assert [v.correct for v in verdicts] == [False, False, True]
    assert [v.timed_out for v in verdicts] == [True, False, False]
    assert not any(v.unjudged for v in verdicts)


def test_a_verifier_that_cannot_start_is_told(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("import no_such_module")
    monkeypatch.setattr("collab_jax.tasks.verifier.WORKER", tmp_path / "worker.py")
    compare = Verifier(workers=1)
    with pytest.raises(UserError, match="does not start"):
        compare.equal([("a", "b")])
    compare.close()


# ---- real gold answers


def real(name):
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: benchmark data is not part of the repository")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_number(gold):
    return spelling.number(spelling.normal(gold)) is not None


def spaced(gold):
    return re.sub(r"([-+=,])", r" \1 ", gold.replace(r"\left", "").replace(r"\right", "")) + " "


def otherwise_a_fraction(gold):
    plain = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", gold)
    return plain if is_number(gold) else gold.replace(r"\frac", r"\dfrac")


def with_a_unit(gold):
    return rf"{gold}\text{{ units}}" if is_number(gold) else gold


def reversed_set(gold):
    kind, parts = spelling.list_of(spelling.normal(gold))
    return ", ".join(parts[::-1]) if kind == "set" else gold


def exact_decimal(gold):
    value = spelling.number(spelling.normal(gold))
    exact = value is not None and value.denominator in (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100)
    return str(float(value)) if exact and abs(value) < 10**9 else gold


def boxed(gold):
    return rf"so it is $\boxed{{{gold}}}$."


@pytest.mark.parametrize(
    "rewrite", [spaced, otherwise_a_fraction, with_a_unit, reversed_set, exact_decimal, boxed]
)
def test_rewritten_gold_answers_are_accepted(rewrite):
    golds = [row["answer"] for row in real("math_test") if rewrite(row["answer"]) != row["answer"]]
    golds = random.Random(0).sample(golds, min(len(golds), 150))
    equal = math.equal_all([(gold, math.extract(answered(rewrite(gold)))) for gold in golds])
    assert len(golds) > 20 and equal.count(True) >= 0.98 * len(golds)


def test_other_golds_are_not_accepted():
    golds = [row["answer"] for row in random.Random(0).sample(real("math_test"), 1000)]
    pairs = zip(golds, golds[7:] + golds[:7], strict=True)
    others = [(a, b) for a, b in pairs if spelling.normal(a) != spelling.normal(b)]
    assert math.equal_all(others).count(True) <= 0.001 * len(golds)


# ---- tasks


def config(name, folder, prompt="Solve: {problem}"):
    config = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    config.task.update(name=name, data_dir=str(folder), prompt=prompt)
    return config


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )


def row(i, **changes):
    return {
        "id": f"r{i}",
        "problem": f"What is {i}+{i}?",
        "answer": str(2 * i),
        "level": 3,
        **changes,
    }


def test_a_maths_task_from_files(tmp_path):
    write(tmp_path / "math_train.jsonl", row(1), row(2, boxed_all=["4", "5"]))
    with gzip.open(tmp_path / "math_test.jsonl.gz", "wt") as file:
        file.write(json.dumps(row(3)) + "\n")
    task = make_task(config("math", tmp_path))
    (train,), (test,) = task.load("train"), task.load("test")
    # Rows with several boxed values are not trained on.
    assert (train.id, train.stratum, test.id) == ("r1", "level 3", "r3")
    assert task.prompt(test) == [{"role": "user", "content": "Solve: What is 3+3?"}]
    assert "What is 3+3?" in task.cloud_prompt(test)[0]["content"]
    responses = [answered("6.0"), answered("7"), MARKER, answered(r"\boxed{\sqrt{36}}"), "6"]
    assert [v[:3] for v in task.verify([test] * 5, responses)] == [
        (True, False, True),
        (False, False, True),
        (False, True, False),
        (True, False, True),
        (False, False, False),
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([row(1), row(1)], "line 2: the id 'r1' is there twice"),
        ([row(1), row(2, answer="")], "line 2 has no answer"),
        ([row(1), row(2, answer=" \n")], "line 2 has no answer"),
        ([row(1), row(2, problem=["x"])], "line 2: problem must be a text or a number"),
        ([row(1), row(2, id=["x"])], "line 2: id must be a text or a number"),
        ([row(1), '{"id": '], "line 2 is not JSON"),
        (["[" * 100_000], "line 1 is not JSON"),
        ([r'{"id": "a", "problem": "\ud800", "answer": "1"}'], "line 1 is not JSON"),
        (['{"id": "a", "problem": "x", "answer": NaN}'], "line 1 is not JSON .NaN is no value"),
        (["[1]"], "line 1 is not an object"),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, lines, says):
    write(tmp_path / "x.jsonl", *lines)
    with pytest.raises(UserError, match=says):
        rows.read(tmp_path, "x")


def test_numbers_become_text(tmp_path):
    write(tmp_path / "x.jsonl", {"id": 7, "problem": "6 * 7", "answer": 42})
    assert rows.read(tmp_path, "x") == [{"id": "7", "problem": "6 * 7", "answer": "42"}]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no y.jsonl or y.jsonl.gz .* config.task.data_dir"):
        rows.read(tmp_path, "y")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(json.dumps(row(1)).encode() * 50)[:-9])
    with pytest.raises(UserError, match="fetch it again"):
        rows.read(tmp_path, "y")
    whole = bytearray(gzip.compress(json.dumps(row(1)).encode() * 50))
    whole[20:24] = b"\xff\xff\xff\xff"
    (tmp_path / "y.jsonl.gz").write_bytes(whole)
    with pytest.raises(UserError, match="fetch it again"):
        rows.read(tmp_path, "y")
    with pytest.raises(UserError, match="'amc23' has no train split: it is for evaluation"):
        make_task(config("amc23", tmp_path)).load("train")
    with pytest.raises(UserError, match=r"needs \{problem\}"):
        make_task(config("math", tmp_path, prompt="Solve!"))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D. because", "D"),
        ("\n C:\n1 2\n", "C"),
        (r"\boxed{A}", "A"),
        (r"\text{B}", "B"),
        ("A. 4", "A"),
        ("A) four", "A"),
        ("The answer is (A).", "A"),
        ("The correct answer is A. 4 apples", "A"),
        ("Option A: 4", "A"),
        ("b", "B"),
        ("Both", None),
        ("A cat", None),
        ("42", None),
    ],
)
def test_letters_of_choices(text, chosen):
    assert letter(text) == chosen


def test_multiple_choice_from_files(tmp_path):
    write(tmp_path / "mmlu_test.jsonl", row(1, choices=["1", "2"], answer="B", type="sums"))
    task = make_task(config("mmlu", tmp_path))
    (example,) = task.load("test")
    assert task.prompt(example)[0]["content"] == "Solve: What is 1+1?\nA. 1\nB. 2"
    assert [v.correct for v in task.verify([example] * 2, [answered("B"), answered("A")])] == [
        True,
        False,
    ]
    write(tmp_path / "mmlu_test.jsonl", row(1, choices=["1", "2"], answer="C"))
    with pytest.raises(UserError, match="not the letter of one of its choices"):
        task.load("test")


@pytest.mark.parametrize(
    "name", ["math", "gsm8k", "math500", "amc23", "aime24", "minerva_math", "agieval_math", "mmlu"]
)
def test_the_real_files_load_and_their_golds_are_right(name):
    if not DATA.exists():
        pytest.skip("benchmark data is not part of the repository")
    task = make_task(config(name, DATA))
    examples = task.load("test")[:200]
    golds = [example.problem[-1] for example in examples]
    verdicts = task.verify(examples, [answered(gold) for gold in golds])
    assert all(v.correct and v.formatted for v in verdicts)
