"""Python code that is judged by running it: MBPP, its sanitized test, and HumanEval.

MBPP (Austin et al., 2021) is split by its numbers: 11 to 510 are the test, 511 to 600 validation,
601 to 974 training, but for training problems whose text a test problem has too. The other two are
for evaluation. A prompt shows one of MBPP's tests, for names and types; that a solution merely
lists what is asked for shows in the others. The tests run in a sandbox (`sandbox.py`).

What a test takes by name comes from the solution where the reference solution defines it, else from
the tests' own imports and Python. Problems that cannot be judged are left out, and told once.
"""

import ast
import functools
import importlib.util
import itertools
import logging
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from collab_jax.tasks import base, rows, sandbox, splits
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError

log = logging.getLogger(__name__)

_CLOUD_PROMPT = (
    "Solve this problem in Python. End with the whole code, its imports included, between <answer> "
    "and </answer>.\n\n{problem}"
)
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


class Problem(NamedTuple):
    """A problem. text: as it is asked. reference: a whole solution. context: stands before every
    solution. prelude, names, tests: as in `sandbox.Job`.
    """

    text: str
    reference: str
    context: str
    prelude: str
    names: tuple[str, ...]
    tests: tuple[str, ...]


def extract(response: str) -> str | None:
    """The code of a response: the last fenced block of its `<answer>` block, or all of that.

    Where there is no such block, it is the last fenced block of the response; None if it has none.
    """
    block = base.answer_of(response)
    fenced = _FENCED.findall(response if block is None else block)
    return fenced[-1] if fenced else block


# ---- problems


def _parse(code: str) -> ast.Module:
    """The syntax tree of code, without the warnings that an escape in it may cause."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(code)


def _bindings(code: str) -> dict[str, ast.stmt]:
    """The names that code binds at its top level, each with the statement that does."""
    bound: dict[str, ast.stmt] = {}
    for node in _parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {a.asname or a.name.partition(".")[0]: node for a in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return bound


def _mbpp(row: dict[str, Any]) -> Problem:
    """The problem of a row of MBPP."""
    tests = [test for test in (row.get("test_setup_code"), *row["test_list"]) if test]
    used = {node.id for node in ast.walk(_parse("\n".join(tests))) if isinstance(node, ast.Name)}
    bound = {name: node for name, node in _bindings(row["answer"]).items() if name in used}
    imports = {name: n for name, n in bound.items() if isinstance(n, ast.Import | ast.ImportFrom)}
    return Problem(
        text=f"{row['problem']}\nThe code must pass tests such as\n{row['test_list'][0]}",
        reference=row["answer"],
        context="",
        prelude="\n".join([*row.get("test_imports", ()), *map(ast.unparse, imports.values())]),
        names=tuple(sorted(bound.keys() - imports.keys())),
        tests=tuple(tests),
    )


def _human_eval(row: dict[str, Any]) -> Problem:
    """The problem of a row of HumanEval: its text is code, with helpers that tests use too."""
    name = row["entry_point"]
    return Problem(
        text=row["problem"],
        reference=row["problem"] + row["answer"],
        context=row["problem"],
        prelude=row["problem"],
        names=(name,),
        tests=(row["test"], f"check({name})"),
    )


FILES: dict[str, tuple[str, Callable[[dict[str, Any]], Problem]]] = {  # task -> (file, its rows)
    "mbpp": ("mbpp", _mbpp),
    "mbpp_sanitized": ("mbpp_sanitized_test", _mbpp),
    "humaneval": ("humaneval", _human_eval),
}


def _flaw(problem: Problem) -> str:
    """Why a problem cannot be judged; "" where it can."""
    for node in ast.walk(_parse("\n".join((problem.prelude, *problem.tests)))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.partition(".")[0]  # the standard library names those of other systems too
            if top not in sys.stdlib_module_names or importlib.util.find_spec(top) is None:
                return f"its tests need the module {module}"
    return ""


@functools.lru_cache(8)
def _read(folder: str, name: str) -> tuple[tuple[str, Problem], ...]:
    """(id, problem) of each row of a task's file that can be judged; warns of the others."""
    file, problem_of = FILES[name]
    found, flaws = [], {}
    for row in rows.read(folder, file):
        try:
            problem = problem_of(row)
            flaw = _flaw(problem)
        except (KeyError, IndexError, TypeError):
            flaw = "it has no tests"
        except (SyntaxError, ValueError):
            flaw = "its tests, or its reference solution, are not Python"
        if flaw:
            flaws[row["id"]] = flaw
        else:
            found.append((row["id"], problem))
    if flaws:
        told = ", ".join(f"{key} ({flaw})" for key, flaw in itertools.islice(flaws.items(), 5))
        told += ", ..." * (len(flaws) > 5)
        log.warning("%s: left out %d problems that cannot be judged: %s", file, len(flaws), told)
    return tuple(found)


def _split_of(key: str) -> str:
    """The split of a row of MBPP by its number; "" of the first ten, which are for prompts."""
    number = key.rpartition("/")[2]
    if not number.isdecimal():
        raise TaskError(f"the id {key!r} of mbpp must end in its number there, as mbpp/601")
    if int(number) <= 10:
        return ""
    return "test" if int(number) <= 510 else "validation" if int(number) <= 600 else "train"


def load(task: ConfigDict, split: str) -> list[Example]:
    """The examples of a split; `example.problem` is a Problem.

    The difficulty is the rank of the reference solution's length, in parts of its syntax, among the
    file's. Raises TaskError where the split has none.
    """
    read = _read(task.data_dir, task.name)
    sizes = [sum(1 for _ in ast.walk(_parse(problem.reference))) for _, problem in read]
    examples = [
        Example(key, "", problem, difficulty=rank)
        for (key, problem), rank in zip(read, rows.ranks(sizes), strict=True)
    ]
    if task.name == "mbpp":
        by_split = {s: [e for e in examples if _split_of(e.id) == s] for s in SPLITS}
        tested = {_asked(e) for e in by_split["test"]}
        examples = [e for e in by_split[split] if split == "test" or _asked(e) not in tested]
    if not examples:
        raise TaskError(f"{FILES[task.name][0]} in {task.data_dir} has no problem for {split}")
    return splits.shuffled(examples, lambda example: example.problem.text)


def _asked(example: Example) -> str:
    """The text of a problem of MBPP without its test."""
    return example.problem.text.partition("\n")[0]


# ---- demonstrations


def demonstrations(
    seed: int, examples: Sequence[Example], give_up: float, marker: str
) -> Iterator[tuple[Example, str]]:
    """Endless (example, response): in each epoch all examples once, in another order.

    The thought names the functions that are to be written, and their arguments; the answer is the
    reference solution. A share `give_up` of the responses, drawn without a look at the problem,
    ends with the marker instead.
    """
    rng = random.Random(f"demonstrations {seed}")
    while True:
        for example in rng.sample(examples, len(examples)):
            thought = f"<think>{_outline(example.problem)}</think>\n"
            answer = f"<answer>\n{example.problem.reference.strip()}\n</answer>"
            yield example, thought + (marker if rng.random() < give_up else answer)


def _outline(problem: Problem) -> str:
    """The heads of the functions that tests take from the reference solution, a line each."""
    bound = _bindings(problem.reference)
    functions = [bound[name] for name in problem.names]
    return "\n".join(
        f"{f.name}({ast.unparse(f.args)})" for f in functions if isinstance(f, ast.FunctionDef)
    )


# ---- the tasks


def make_task(config: ConfigDict) -> Task:
    """The task of FILES that `config.task.name` names.

    `config.task.prompt` has {problem} where the problem goes. Raises TaskError where there is no
    sandbox, unless `config.task.unsafe_code` does without.
    """
    judge = sandbox.shared(config.task.unsafe_code).judge

    def compare(examples: Sequence[Example], responses: Sequence[str]) -> list[bool | None]:
        codes = map(extract, responses)
        jobs = [_job(e.problem, code) for e, code in zip(examples, codes, strict=True)]
        distinct = list(dict.fromkeys(job for job in jobs if job))  # those of a group often agree
        verdicts = dict(zip(distinct, judge(distinct), strict=True))
        return [verdicts[job] if job else False for job in jobs]

    can_train = config.task.name == "mbpp"
    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=lambda example: example.problem.text,
        gold=lambda example: example.problem.reference,
        compare=compare,
        cloud_prompt=_CLOUD_PROMPT,
        read_answer=lambda _, response: extract(response),
        splits=SPLITS if can_train else ("test",),
        ranked=True,
        demonstrations=(
            lambda seed: demonstrations(
                seed, load(config.task, "train"), config.task.demo_give_up, config.text.marker
            )
        )
        if can_train
        else None,
    )


def _job(problem: Problem, code: str | None) -> sandbox.Job | None:
    """What the sandbox is to judge; None where there is no code."""
    if code is None:
        return None
    source = f"{problem.context}\n{code}" if problem.context else code
    return sandbox.Job(source, problem.prelude, problem.names, problem.tests)
