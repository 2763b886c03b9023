"""Python code that is judged by running it: MBPP, its sanitized test, and HumanEval.

MBPP (Austin et al., 2021) is split by its numbers: 11 to 510 are the test, 511 to 600 validation,
601 to 974 training, but for training problems whose text a test problem has too. The other two are
for evaluation. A prompt shows one of MBPP's tests, for names and types; that a solution merely
lists what is asked for shows in the others. The tests run in a sandbox (`sandbox.py`).

What a test takes by name comes from the solution where the reference solution defines it, else from
the tests' own imports and Python. Problems that cannot be judged are left out, and told once.
"""

import ast
import builtins
import functools
import importlib.util
import itertools
import json
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from collab_jax.tasks import base, code_worker, rows, sandbox, splits
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError

log = logging.getLogger(__name__)

_CLOUD_PROMPT = (
    "Solve this problem in Python. End with the whole code, its imports included, between <answer> "
    "and </answer>.\n\n{problem}"
)
_SHOWN = "\nThe code must pass tests such as\n"
# A fence opens at the start of a line (one in a docstring is indented); what is closed ends at the
# start of a line too, or behind code at the end of one.
_FENCED = re.compile(
    r"^(`{3,}|~{3,})[^\n`]*\n(.*?)(?:(?P<closed>^\1|(?<=[^\s`])\1[ \t]*$)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)


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
    A fence that is never closed counts in an `<answer>` block alone: elsewhere the code is cut off.
    """
    block = base.block_of(response)
    text = response if block is None else block
    if text.lstrip().startswith(("```", "~~~")):  # it may be indented as a whole
        text = textwrap.dedent(text.lstrip("\n")).lstrip()
    found = list(_FENCED.finditer(text))
    fenced = [match[2] for match in found if match["closed"]]
    if block is not None and not fenced:
        fenced = [match[2] for match in found] or [block.strip("\n")]
    return fenced[-1] if fenced else None


# ---- problems


class _Flaw(Exception):
    """Why a problem cannot be judged."""


def _parse(code: str) -> ast.Module:
    """The syntax tree of code, without the warnings that an escape in it may cause."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(code)


def _bindings(code: str) -> dict[str, ast.AST]:
    """The names that code binds at its top level, each with the node that does.

    Under "*" and its module stands an import of all of a module's names.
    """
    return dict(_bound(_parse(code)))


def _bound(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node binds in the scope that it stands in, whatever `if` or `try` is around it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name, node
    elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        yield f"*{node.module}", node
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((a.asname or a.name.partition(".")[0], node) for a in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node
    elif not isinstance(
        node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    ):
        for child in ast.iter_child_nodes(node):
            yield from _bound(child)


def _names(code: str) -> tuple[set[str], set[str]]:
    """(read, bound): the names that code reads anywhere, and those that it binds anywhere."""
    read, bound = set[str](), set[str]()
    for node in ast.walk(_parse(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif name := getattr(node, "name", None):  # of a definition, a handler, a pattern
            bound.add(name)
    return read, bound


def _texts(row: dict[str, Any], field: str) -> list[str]:
    """A row's list of texts, empty where there is none. Raises _Flaw for something else."""
    texts = row.get(field) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _Flaw(f"its {field} is no list of texts")
    return texts


def _require_tests(tree: ast.AST) -> None:
    """Raises _Flaw where nothing in a tree can fail."""
    if not any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in ast.walk(tree)):
        raise _Flaw("it has no tests")


def _mbpp(row: dict[str, Any]) -> Problem:
    """The problem of a row of MBPP."""
    own = [test for test in _texts(row, "test_list") if test.strip()]
    set_up = row.get("test_setup_code") or ""
    if not isinstance(set_up, str):
        raise _Flaw("its test_setup_code is no text")
    _require_tests(_parse("\n".join(own)))
    tests = [test for test in (set_up, *own) if test]
    used = {node.id for node in ast.walk(_parse("\n".join(tests))) if isinstance(node, ast.Name)}
    found = _bindings(row["answer"])
    bound = {name: node for name, node in found.items() if name in used}
    imports = {name: n for name, n in bound.items() if isinstance(n, ast.Import | ast.ImportFrom)}
    if used - bound.keys() - set(dir(builtins)):
        imports |= {name: node for name, node in found.items() if name.startswith("*")}
    return Problem(
        text=f"{row['problem']}{_SHOWN}{own[0]}",
        reference=row["answer"],
        context="",
        prelude="\n".join([*_texts(row, "test_imports"), *map(ast.unparse, imports.values())]),
        names=tuple(sorted(bound.keys() - imports.keys())),
        tests=tuple(tests),
    )


def _human_eval(row: dict[str, Any]) -> Problem:
    """The problem of a row of HumanEval: its text is code, with helpers that tests use too."""
    name, test, reference = row.get("entry_point"), row.get("test"), row["problem"] + row["answer"]
    if not isinstance(test, str) or not test:
        raise _Flaw("it has no tests")
    if not isinstance(name, str) or name not in _bindings(reference):
        raise _Flaw(f"its reference solution does not define its entry_point, {name!r}")
    check = _bindings(test).get("check")
    if check is None:
        raise _Flaw("its tests do not define check")
    _require_tests(check)
    return Problem(
        text=row["problem"],
        reference=reference,
        context=row["problem"],
        prelude=row["problem"],
        names=(name,),
        tests=(test, f"check({name})"),
    )


FILES: dict[str, tuple[str, Callable[[dict[str, Any]], Problem]]] = {  # task -> (file, its rows)
    "mbpp": ("mbpp", _mbpp),
    "mbpp_sanitized": ("mbpp_sanitized_test", _mbpp),
    "humaneval": ("humaneval", _human_eval),
}


def _require_judgeable(problem: Problem) -> None:
    """Raises _Flaw, or what compiling it does, for a problem that no solution can pass or fail."""
    source = _source(problem, problem.reference)
    if len(source) > sandbox.MAX_SOURCE:
        raise _Flaw("its reference solution is too long")
    message = len(json.dumps(sandbox.Job("", *problem[3:])._asdict()))
    if message + 12 * sandbox.MAX_SOURCE > code_worker.MAX_MESSAGE:  # a character takes up to 12
        raise _Flaw("its tests are too long")
    with warnings.catch_warnings(action="ignore"):
        for part in (source, problem.prelude, *problem.tests):
            compile(part, "row", "exec")
    tests = "\n".join((problem.prelude, *problem.tests))
    for node in ast.walk(_parse(tests)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules.append("." * node.level + (node.module or ""))
        for module in modules:
            if not _in_standard_library(module):
                raise _Flaw(f"its tests need the module {module}")
    read, bound = _names(tests)
    missing = read - bound - set(problem.names) - set(dir(builtins))
    if missing and "*" not in bound:
        raise _Flaw(f"its tests use {min(missing)}, which its reference solution does not define")
    functions = _bindings(problem.reference)
    for name in problem.names:
        if isinstance(functions[name], ast.AsyncFunctionDef):  # it stays in the other process
            raise _Flaw(f"its tests cannot await {name}")
    if not read & set(problem.names):
        raise _Flaw("its tests use nothing of its reference solution")


def _in_standard_library(module: str) -> bool:
    """Whether Python's own library has a module on this system: it names those of others too."""
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # what it would be a part of has no parts
        return False


@functools.lru_cache(8)
def _read(folder: str, name: str) -> tuple[tuple[str, Problem], ...]:
    """(id, problem) of each row of a task's file that can be judged; warns of the others."""
    file, problem_of = FILES[name]
    found, flaws = [], {}
    for row in rows.read(folder, file):
        try:
            problem = problem_of(row)
            _require_judgeable(problem)
            found.append((row["id"], problem))
        except _Flaw as flaw:
            flaws[row["id"]] = str(flaw)
        except (SyntaxError, ValueError):
            flaws[row["id"]] = "its tests, or its reference solution, are not Python"
        except (RecursionError, MemoryError):
            flaws[row["id"]] = "its tests, or its reference solution, are nested too deeply"
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
    return example.problem.text.partition(_SHOWN)[0]


# ---- demonstrations


def _solution(example: Example) -> tuple[str, str]:
    """The functions that are to be written, and their arguments; and the reference solution."""
    return _outline(example.problem), f"\n{example.problem.reference.strip()}\n"


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
            lambda seed: rows.demonstrations(
                seed,
                load(config.task, "train"),
                _solution,
                config.task.demo_give_up,
                config.text.marker,
            )
        )
        if can_train
        else None,
    )


def _job(problem: Problem, code: str | None) -> sandbox.Job | None:
    """What the sandbox is to judge; None where there is no code."""
    if code is None:
        return None
    return sandbox.Job(_source(problem, code), problem.prelude, problem.names, problem.tests)


def _source(problem: Problem, code: str) -> str:
    """What is run of code: behind the context of its problem, if it has one.

    Only where the code is the body of the function that the context opens is its indentation kept.
    """
    whole = textwrap.dedent(code).strip()
    if not problem.context:
        return whole
    if re.search(rf"^(async )?def {problem.names[0]}\b", whole, re.MULTILINE):
        code = whole
    future = "".join(line.rstrip() + "\n" for line in _FUTURE.findall(code))  # has to come first
    return f"{future}{problem.context}\n{_FUTURE.sub('', code)}"
