"""Tasks that are code: rows made into problems, splits, what is run of a response, verdicts; and
all reference solutions, and mutations of them, on the real data.
"""

import ast
import itertools
import json
import random
import runpy
import string
import subprocess
import sys

import pytest
from conftest import ROOT
from fakes import write_rows

from collab_jax import sft, train
from collab_jax.cloud import make_cloud
from collab_jax.models.text import TAGS
from collab_jax.rl import rollout
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import base, code, make_task, sandbox

DATA = ROOT.parent / "shared" / "data"
MARKER = "<unknown> I need external assistance </unknown>"


def config(folder, name="mbpp", **changes):
    config = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    changes = {"unsafe_code": True} | changes  # these tests' own code, on any machine
    config.task.update(name=name, data_dir=str(folder), prompt="{problem}", **changes)
    return config


def mbpp_row(number, **changes):
    row = {
        "id": f"mbpp/{number}",
        "problem": f"Add {number}.",
        "answer": f"def add(x):\n    return x + {number}",
        "test_list": [f"assert add({x}) == {x + number}" for x in (1, 2, 0)],
    }
    return row | changes


@pytest.fixture
def folder(tmp_path):
    """Three problems for validation, six for training, two for the test."""
    numbers = [5, 11, 510, *range(511, 514), *range(601, 607)]
    write_rows(tmp_path / "mbpp.jsonl", map(mbpp_row, numbers))
    return tmp_path


def ids(task, split):
    return sorted(int(e.id.removeprefix("mbpp/")) for e in task.load(split))


def verdicts(task, *responses, split="test", place=0):
    example = task.load(split)[place]
    return task.verify([example] * len(responses), responses)


# ---- rows and splits


def test_the_number_is_the_split(folder):
    task = make_task(config(folder))
    assert ids(task, "test") == [11, 510]
    assert ids(task, "validation") == [511, 512, 513]
    assert ids(task, "train") == [601, 602, 603, 604, 605, 606]
    assert [e.id for e in task.load("train")] != [f"mbpp/{n}" for n in range(601, 607)]


def test_a_training_problem_of_the_test_is_left_out(folder):
    """Equal are those whose whole text is."""
    rows = [*map(mbpp_row, (512, 601)), mbpp_row(11, problem="Write this.\nAdd 11.")]
    rows += [mbpp_row(602, problem="Write this.\nAdd 602.")]
    rows += [mbpp_row(603, problem="Write this.\nAdd 11.")]
    write_rows(folder / "mbpp.jsonl", rows)
    assert ids(make_task(config(folder)), "train") == [601, 602]


def test_the_prompt_shows_one_test_and_no_solution(folder):
    task = make_task(config(folder))
    (message,) = task.prompt(next(e for e in task.load("train") if e.id == "mbpp/601"))
    assert message["content"] == (
        "Add 601.\nThe code must pass tests such as\nassert add(1) == 602"
    )


def test_what_a_test_takes_from_the_solution():
    def problem(answer, *tests, **fields):
        return code._mbpp({"problem": "p", "answer": answer, "test_list": list(tests)} | fields)

    own = problem("def sum(a): return a", "assert sum(1) == len([1])")
    assert (own.names, own.prelude) == (("sum",), "")
    imported = problem("import sys, re\ndef f(): return 1", "assert f() == sys.maxsize")
    assert (imported.names, imported.prelude) == (("f",), "import sys, re")
    extra = problem("def f(): pass", "assert math.isclose(f(), 1)", test_imports=["import math"])
    assert (extra.names, extra.prelude) == (("f",), "import math")
    setup = problem("class N: pass\ndef f(n): pass", "assert f(n)", test_setup_code="n = N()")
    assert (setup.names, setup.tests) == (("N", "f"), ("n = N()", "assert f(n)"))
    every = problem("from math import *\ndef f(): return 1", "assert f() == floor(1.5)")
    assert (every.names, every.prelude) == (("f",), "from math import *")
    assert problem("def f(): return 1", " ", "assert f()").text.endswith("\nassert f()")
    unused = problem("from math import *\ndef f(): return 1", "assert f() == max(1, 1)")
    assert unused.prelude == ""
    tried = "try:\n    from math import tau\nexcept ImportError: pass\ndef f(): return tau"
    assert problem(tried, "assert f() == tau").prelude == "from math import tau"


@pytest.mark.parametrize(
    "answer",
    [
        "add: object = lambda x: x + 11",
        "add, y = (lambda x: x + 11), 1",
        "if True:\n    def add(x): return x + 11",
        "try:\n    nothing\nexcept NameError:\n    def add(x): return x + 11",
        "    def add(x): return x + 11",
        "from __future__ import annotations\ndef add(x: y): return x + 11",
    ],
)
def test_a_reference_solution_binds_its_names_in_many_ways(folder, answer):
    row = mbpp_row(11, answer=answer.strip())
    write_rows(folder / "mbpp.jsonl", [row])
    task = make_task(config(folder))
    wrong = "<answer>def add(x): return 12</answer>"
    got = verdicts(task, f"<answer>{answer}</answer>", wrong)
    assert [v.correct for v in got] == [True, False]


NOT_PYTHON = "its tests, or its reference solution, are not Python"
TOO_DEEP = "its tests, or its reference solution, are nested too deeply"


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("it has no tests", {"test_list": [""]}),
        ("it has no tests", {"test_list": ["  "]}),
        ("it has no tests", {"test_list": ["# todo"]}),
        ("it has no tests", {"test_list": ["pass"], "test_setup_code": "print(1)"}),
        ("its tests use nothing of its reference solution", {"test_list": ["assert len([1])"]}),
        ("its test_list is no list of texts", {"test_list": "assert add(1) == 12"}),
        ("its test_list is no list of texts", {"test_list": [1]}),
        ("its test_imports is no list of texts", {"test_imports": "import math"}),
        ("its test_setup_code is no text", {"test_setup_code": 5}),
        (
            "its tests use plus, which its reference solution does not define",
            {"test_list": ["assert plus(add(1)) == 12"]},
        ),
        ("its tests cannot await add", {"answer": "async def add(x): return x + 11"}),
        ("its tests need the module os.nothing", {"test_imports": ["import os.nothing"]}),
        ("its tests need the module .", {"test_imports": ["from . import x"]}),
        (NOT_PYTHON, {"test_list": ["for x in [1]:", "    assert add(x) == 12"]}),
        (NOT_PYTHON, {"answer": "def add(x): return x\nreturn"}),
        (TOO_DEEP, {"test_list": ["assert add(1) == " + "-" * 5000 + "12"]}),
        (TOO_DEEP, {"answer": "add = lambda x: " + "-" * 5000 + "x"}),
        ("its tests are too long", {"test_list": ["assert add(1) == 12 #" + "x" * (4 << 20)]}),
        (
            "its reference solution is too long",
            {"answer": "def add(x): return x + 11" + "\n" * (64 << 10) + "0"},
        ),
        ("it has no tests", {"test": ""}),
        ("it has no tests", {"test": None}),
        ("it has no tests", {"test": ["x"]}),
        ("it has no tests", {"test": "print(1)\ndef check(c): pass"}),
        ("its tests do not define check", {"test": "METADATA = {}"}),
        ("its reference solution does not define its entry_point, None", {"entry_point": None}),
        ("its reference solution does not define its entry_point, 5", {"entry_point": 5}),
        ("its reference solution does not define its entry_point, 'x'", {"entry_point": "x"}),
    ],
)
def test_what_nobody_can_pass_or_fail_is_left_out_with_the_reason(folder, caplog, reason, changes):
    human_eval = {"test", "entry_point"} & changes.keys()
    name, row = ("humaneval", HUMAN_EVAL) if human_eval else ("mbpp", mbpp_row(11))
    write_rows(folder / f"{name}.jsonl", [row | changes])
    assert code._read(str(folder), name) == ()
    (record,) = caplog.records
    assert record.getMessage().endswith(f": {row['id']} ({reason})")


def test_what_cannot_be_judged_is_left_out_and_told_once(folder, caplog):
    broken = {
        602: {"test_list": []},
        603: {"test_list": ["import numpy", "assert add(1) == numpy.ones(1)"]},
        604: {"test_list": ["assert add(1"]},
        605: {"test_imports": ["import msvcrt"]},  # of Windows
        606: {"test_imports": ["from os.path import join", "import torch.nn as nn"]},
        607: {"test_list": None},
    }
    write_rows(
        folder / "mbpp.jsonl", [mbpp_row(n, **broken.get(n, {})) for n in (11, *range(601, 608))]
    )
    task = make_task(config(folder))
    assert ids(task, "train") == [601] and ids(task, "test") == [11]
    (record,) = caplog.records
    assert record.getMessage() == (
        "mbpp: left out 6 problems that cannot be judged: mbpp/602 (it has no tests), "
        "mbpp/603 (its tests need the module numpy), "
        "mbpp/604 (its tests, or its reference solution, are not Python), "
        "mbpp/605 (its tests need the module msvcrt), "
        "mbpp/606 (its tests need the module torch.nn), ..."
    )
    with pytest.raises(UserError, match="has no problem for validation"):
        task.load("validation")


def test_ids_without_a_number_are_refused(folder):
    write_rows(folder / "mbpp.jsonl", [mbpp_row(601, id="first")])
    with pytest.raises(UserError, match="'first' of mbpp must end in its number"):
        make_task(config(folder)).load("train")


def test_without_a_sandbox_the_task_is_refused(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox.shared.cache_clear()
    with pytest.raises(UserError, match="install bubblewrap.*config.task.unsafe_code=True"):
        make_task(config(folder, unsafe_code=False))


# ---- responses

CODE = "def f():\n    return 1\n"
DOCUMENTED = 'def f():\n    """One.\n    ```\n    f()\n    ```\n    """\n    return 1'


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (f"<answer>{CODE}</answer>", CODE.strip()),
        (f"<think>so</think>\n<answer>\n```python\n{CODE}```\n</answer>", CODE),
        (f"```\nx\n```\n<answer>Try\n```\ny\n```\nor\n```python\n{CODE}```</answer>", CODE),
        (f"First:\n```py\nx = 1\n```\nThen:\n```python\n{CODE}```\nDone.", CODE),
        (f"```\nx\n```<answer>{CODE}</answer>```\ny\n```", CODE.strip()),
        ("<answer></answer>", ""),
        (CODE, None),
        (f"```python\n{CODE}", None),  # cut off
        ("", None),
        ("```" * 10_000, None),
        ("<answer>    return 1\n</answer>", "    return 1"),  # a body alone
        (f"<answer>{DOCUMENTED}</answer>", DOCUMENTED),
        (f"<answer>\n```python\n{DOCUMENTED}\n```\n</answer>", f"{DOCUMENTED}\n"),
        (f"<answer>\n```python\n{CODE}</answer>", CODE),  # never closed
        (f"<answer>\n```python\n{CODE}```\n```\n</answer>", CODE),
        (f"<answer>\n~~~python\n{CODE}~~~\n</answer>", CODE),
        (f"<answer>\n````python\n{CODE}````\n</answer>", CODE),
        ("<answer>\n  ```python\n  def f():\n      return 1\n  ```\n</answer>", CODE),
        ("<answer>```\nf = 1```</answer>", "f = 1"),
    ],
)
def test_the_code_of_a_response(response, found):
    assert code.extract(response) == found


def test_verdicts(folder):
    task = make_task(config(folder))
    (example,) = [e for e in task.load("test") if e.id == "mbpp/11"]
    right = "def add(x): return 11 + x"
    responses = [
        f"<think>so</think><answer>{right}</answer>",
        f"Well:\n```python\n{right}\n```",
        "<think>so</think><answer>def add(x): return 12</answer>",  # right on the test it saw
        f"<think>\n```python\n{right}\n```\n{MARKER}",  # knowing the answer is not giving it
        right,
        "<answer>import os; os._exit(0)</answer>",
    ]
    got = task.verify([example] * len(responses), responses)
    assert [v.correct for v in got] == [True, True, False, False, False, False]
    assert [v.formatted for v in got] == [True, False, True, False, False, False]
    assert [v.called for v in got] == [False, False, False, True, False, False]
    assert not any(v.timed_out or v.unjudged for v in got)


def test_equal_responses_are_run_once(folder, monkeypatch):
    task, asked = make_task(config(folder)), []
    box = sandbox.shared(True)
    monkeypatch.setattr(box, "judge", lambda jobs: asked.extend(jobs) or [True] * len(jobs))
    task = make_task(config(folder))
    assert all(v.correct for v in verdicts(task, *["<answer>x</answer>"] * 5, "```\nx```"))
    assert len(asked) == 1


HUMAN_EVAL = {
    "id": "HumanEval/0",
    "problem": (
        "import math\n\ndef area(r):\n    return r * r\n\n"
        'def double(x: int):\n    """Twice x.\n    >>> double(2)\n    4\n    """\n'
    ),
    "answer": "    return 2 * x\n",
    "entry_point": "double",
    "test": (
        "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4, 'two'\n"
        "    assert area(candidate(1)) == 4\n    assert double(3) == 6\n"
    ),
}


def test_human_eval(tmp_path):
    write_rows(tmp_path / "humaneval.jsonl", [HUMAN_EVAL])
    task = make_task(config(tmp_path, "humaneval"))
    assert task.splits == ("test",) and task.demonstrations is None
    whole, helper = "def double(x):\n    return x + x", "def area(r): return 4\n"
    responses = [
        f"<answer>{task.gold(task.load('test')[0])}</answer>",
        f"<answer>{whole}</answer>",
        f"<answer> {whole}</answer>",
        f"<answer>from __future__ import annotations\n{whole}</answer>",
        f"<answer>{HUMAN_EVAL['problem']}    return x + x</answer>",
        "```python\n    return x + x\n```",  # the body alone, as the problem asks
        "<answer>    return x + x</answer>",
        "<answer>\n    y = x\n    return x + y\n</answer>",
        f"<answer>{helper}def double(x): return 4 if x == 2 else 6</answer>",  # no helper counts
        "<answer>pass</answer>",
        "<answer>    pass</answer>",
    ]
    got = [v.correct for v in verdicts(task, *responses)]
    assert got == [True] * 8 + [False] * 3
    (example,) = task.load("test")  # its answer is closed, but the response is cut off
    (lenient,) = base.lenient_verdicts(task, [example], [f"{responses[6]}x"], [False], [False])
    assert lenient and lenient.correct


# ---- what training and a cloud need


def test_demonstrations_answer_or_call(folder):
    task = make_task(config(folder, demo_give_up=0.5))
    pairs = list(itertools.islice(task.demonstrations(0), 60))
    got = task.verify([e for e, _ in pairs], [r for _, r in pairs])
    assert all(v.called != (v.correct and v.formatted) for v in got)
    assert 15 < sum(v.called for v in got) < 45
    assert len({e.id for e, _ in pairs[:6]}) == 6
    assert pairs == list(itertools.islice(task.demonstrations(0), 60))
    assert all(r.startswith("<think>add(x)</think>\n") for _, r in pairs)


def test_the_simulated_cloud_solves_it(folder, tmp_path):
    of = config(folder)
    of.cloud.update(error_rate=0, error_skew=3.0)
    task = make_task(of)
    examples = task.load("train")
    answers = make_cloud(of, task, tmp_path / "cloud.sqlite").answer(
        *rollout.cloud_prompts(task, examples)
    )
    texts = [reply.text for reply in answers.replies]
    assert all(v.correct for v in task.verify(examples, texts))


@pytest.mark.slow
@pytest.mark.long
def test_warm_starts_with_and_without_relabelling_then_training(small, tmp_path, capsys):
    """A model of characters, made from nothing: what it writes is nonsense, and is judged."""
    write_rows(
        tmp_path / "mbpp.jsonl",
        map(mbpp_row, [*range(11, 15), *range(511, 515), *range(601, 625)]),
    )
    characters = sorted(set(string.printable) - set("\r\x0b\x0c"))
    words = (*TAGS, "<unknown>", " I need external assistance ", "</unknown>", *characters)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "vocab_size": len(words) + 3,
    }
    start = small("countdown_tiny_sft.py")
    settings = {
        "task__name": "mbpp",
        "task__data_dir": str(tmp_path),
        "task__prompt": "{problem}",
        "task__unsafe_code": True,
        "prompt_length": 96,
        "max_new_tokens": 80,
        "eval__prompts": 4,
        "eval__batch_size": 4,
        "train__steps": 1,
        "decode__segments": 1,
        "decode__slot_counts": 1,
        "text__pad": "<pad>",
        "text__eos": ("<eos>",),
    }
    words_and_sizes = {
        "sft__words": words,
        "sft__architecture": dict(start.sft.architecture) | sizes,
    }
    relabelling = small(
        "countdown_tiny_sft.py", sft__relabel_steps=1, **words_and_sizes, **settings
    )
    with pytest.raises(UserError, match="no response to any of 24 training prompts was right"):
        sft.run(relabelling, tmp_path / "relabelled")  # tuned on each half, then judged
    warm = small("countdown_tiny_sft.py", sft__check_prompts=4, **words_and_sizes, **settings)
    assert sft.run(warm, tmp_path / "start") == 0
    assert "demonstrations: " in capsys.readouterr().out
    run = small(model__path=str(tmp_path / "start"), **settings)
    assert train.main(run, tmp_path / "run") == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Code was judged without a sandbox (config.task.unsafe_code)." in report


# ---- the real data

real = pytest.mark.skipif(
    not (DATA / "mbpp.jsonl.gz").exists(), reason=f"no mbpp.jsonl.gz in {DATA}"
)
PATIENCE = 300.0  # seconds: a busy machine is no reason to fail


@pytest.fixture(scope="module")
def patient():
    """A sandbox that waits long, in the place of the shared one; else the reason there is none."""
    sandbox.shared.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sandbox.LIMITS["solution"], "CPU", 30)
        try:
            box = sandbox.Sandbox(deadline=PATIENCE)
        except UserError as error:
            pytest.skip(str(error))
        patch.setattr(sandbox, "shared", lambda unsafe: box)
        yield box
        box.close()


def problems(name, share=1.0):
    """The real problems of a task, all, or a share of them drawn at random."""
    read = code._read(str(DATA), name)
    return read if share == 1 else random.Random(0).sample(read, int(share * len(read)))


def jobs_of(problems):
    return [code._job(problem, problem.reference) for _, problem in problems]


@real
@pytest.mark.parametrize(("name", "count"), [("mbpp", 48), ("humaneval", 16)])
def test_some_reference_solutions_pass(patient, name, count):
    some = problems(name, share=count / 970 if name == "mbpp" else count / 160)
    assert len(some) == count and patient.judge(jobs_of(some)) == [True] * count


@real
def test_some_bodies_alone_pass(patient):
    some = problems("humaneval", share=0.05)
    bodies = [problem.reference.removeprefix(problem.context) for _, problem in some]
    codes = [code.extract(f"<answer>\n{body}</answer>") for body in bodies]
    jobs = [code._job(problem, body) for (_, problem), body in zip(some, codes, strict=True)]
    assert patient.judge(jobs) == [True] * 8


@real
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "count"), [("mbpp", 974), ("mbpp_sanitized", 257), ("humaneval", 164)]
)
def test_every_reference_solution_passes(patient, name, count):
    everything = problems(name)
    verdicts = patient.judge(jobs_of(everything))
    assert [key for (key, _), v in zip(everything, verdicts, strict=True) if v is not True] == []
    assert len(everything) == count  # none has tests that cannot be judged


@real
def test_the_splits_of_the_real_data(patient):
    task = make_task(config(DATA, unsafe_code=False))
    assert [len(task.load(split)) for split in task.splits] == [371, 90, 500]
    used = {e.id for split in task.splits for e in task.load(split)}
    left_out = {f"mbpp/{n}" for n in range(11, 975)} - used
    assert left_out == {"mbpp/602", "mbpp/704", "mbpp/872"}


# ---- mutations

SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE}
SWAPPED |= {ast.Eq: ast.NotEq, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.And: ast.Or, ast.Or: ast.And}


def mutations(source):
    """(kind, the source with another operator, constant or return), of each kind that it has."""
    places = {"operator": [], "constant": [], "return": []}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
            places["operator"].append(node)
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            places["operator"].append(node)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            places["constant"].append(node)
        elif isinstance(node, ast.Return) and node.value:
            places["return"].append(node)
    for kind, nodes in places.items():
        if not nodes:
            continue
        node = random.Random(source).choice(nodes)
        before = dict(vars(node))
        if kind == "operator" and isinstance(node, ast.Compare):
            node.ops = [SWAPPED[type(node.ops[0])](), *node.ops[1:]]
        elif kind == "operator":
            node.op = SWAPPED[type(node.op)]()
        elif kind == "constant":
            node.value += 1
        else:
            node.value = ast.Constant(None)
        yield kind, ast.unparse(tree)
        vars(node).update(before)


IN_ONE_SCOPE = """
import io, json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
def stop(*_): raise TimeoutError
signal.signal(signal.SIGVTALRM, stop)
out, sys.stdout = sys.stdout, io.StringIO()
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_VIRTUAL, 4, 0.1)
    try:
        exec(json.loads(line), {"__name__": "mutated"})
        holds = True
    except BaseException:
        holds = False
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    out.write(f"{int(holds)}\\n")
"""


def seen_by_tests(mutated):
    """Whether the tests of each (problem, source) fail in one scope with it, as is common."""
    programs = ["\n".join([p.prelude, source, *p.tests]) for p, source in mutated]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", IN_ONE_SCOPE],
        input="".join(json.dumps(program) + "\n" for program in programs),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [line == "0" for line in done.stdout.splitlines()]


def test_mutations_by_hand():
    source = "def f(x):\n    return x + 1"
    assert dict(mutations(source)) == {
        "operator": "def f(x):\n    return x - 1",
        "constant": "def f(x):\n    return x + 2",
        "return": "def f(x):\n    return None",
    }


def _check_mutations(patient, some, monkeypatch):
    """Whether a verdict on a mutated solution is that of its tests; returns how many they see."""
    monkeypatch.setitem(sandbox.LIMITS["solution"], "CPU", 2)  # of some the loops are endless
    mutated = [
        (f"{key}, {kind}", problem, source)
        for key, problem in some
        for kind, source in mutations(problem.reference)
    ]
    verdicts = patient.judge([code._job(problem, source) for _, problem, source in mutated])
    seen = seen_by_tests([(problem, source) for _, problem, source in mutated])
    through = [what for (what, _, _), v, s in zip(mutated, verdicts, seen, strict=True) if v and s]
    assert through == []
    return sum(seen)


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_some_mutated_solutions_fail(patient, monkeypatch, name):
    some = problems(name, share=0.02 if name == "mbpp" else 0.1)
    assert _check_mutations(patient, some, monkeypatch) > 20


@real
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_every_mutated_solution_fails(patient, monkeypatch, name):
    assert _check_mutations(patient, problems(name), monkeypatch) > 300
