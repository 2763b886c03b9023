"""README, CONTRIBUTING and docs/*.md: what they tell a reader to type runs, what they name exists.

Blocks marked `bash` run, with small settings and their workdirs in a scratch folder; `sh` are those
that cannot run here, and are parsed; `python` is executed in docs, and quoted in CONTRIBUTING.
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL
from fakes import write_rows

from collab_jax import cloud, records, tasks
from collab_jax.bench import peers
from collab_jax.reports import quote
from collab_jax.rl import algorithms, sweeps
from collab_jax.routing import routers
from collab_jax.tasks import Example, Verdict

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, *DOCS]
TEXTS = {page: page.read_text() for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

SCRIPT = re.compile(r"(?:PYTHON=\S+ )?(\./launch/\w+\.sh|\.ci/run)( .*)?")
PATH = re.compile(r"`((?:collab_jax|configs|docs|launch|notebooks|tests)/[\w./-]+\.\w+)`")
# What a command leaves in its --out, or else in its --workdir.
LEAVES = {
    "train": ["report.html", "after.parquet", "metrics.jsonl"],
    "evaluate": ["validation.parquet", "validation.json"],
    "sft": ["model.safetensors", "tokenizer.json"],
    "export": ["model.safetensors", "tokenizer.json", "README.md"],
    "compare": ["compare.json", "compare.md"],
    "calibrate": ["collab_config.json"],
}


def blocks(page, language):
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def commands():
    """The commands of all bash blocks, each once, in the order of the pages."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash"))
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line]


# ------------------------------------------------------------------------------------- commands


def test_the_two_commands_come_first():
    assert commands()[:2] == ["./launch/quickstart.sh", "./launch/test.sh"]


def test_scripts_are_there_and_executable():
    """test_launch.py runs them, with stand-ins for pip and python."""
    scripts = {found[1] for line in commands() if (found := SCRIPT.fullmatch(line))}
    assert scripts == {"./launch/quickstart.sh", "./launch/test.sh", ".ci/run"}
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111


@each_page
def test_blocks_that_cannot_run_here_are_shell(page):
    for block in blocks(page, "sh"):
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def extra_flags(words, data_dir):
    """Flags that make a command small."""
    module = words[1].removeprefix("collab_jax.")
    small = [f"--config.{key}={value}" for key, value in SMALL.items()]
    small.append(f"--config.task.data_dir={data_dir}")
    if module in ("compare", "calibrate"):
        return []
    if module != "bench" or "rehearse" in words:
        return small
    sizes = ["--repeats", "1", "--prompts", "2", "--group", "2"]
    return sizes + (["--max_new", "8"] if "decode" in words else [])


def check_results(words, printed):
    """What a command has left holds what it should."""
    module = words[1].removeprefix("collab_jax.")
    if module == "bench":
        assert "tok/s" in printed or "tokens/s" in printed
        return
    out = "--out" if "--out" in words else "--workdir"
    folder = pathlib.Path(words[words.index(out) + 1])
    for name in LEAVES[module]:
        assert (folder / name).stat().st_size > 0, f"{folder / name}"
    if module == "train":
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, SMALL["train.steps"] + 1))
        glossary = TEXTS[ROOT / "docs" / "metrics.md"]
        assert [name for name in rows[0] if f"`{name}`" not in glossary] == ["step"]
    if module == "evaluate":
        assert len(records.read(folder / "validation.parquet")["id"]) == SMALL["eval.prompts"]
    if module == "calibrate":
        assert json.loads((folder / "collab_config.json").read_text())["value"] == 0.3


@pytest.mark.slow
@pytest.mark.long
def test_every_other_command_runs(tmp_path, data_dir):
    ran = set()
    for line in commands():
        if SCRIPT.fullmatch(line):
            continue
        assert line.startswith("python -m collab_jax."), f"a command that no test runs: {line}"
        words = shlex.split(line.replace("runs/", f"{tmp_path}/"))[1:]
        if "collab_jax.sweep" in words:  # hours of work: test_sweep.py runs sweeps
            sweeps.load(ROOT / words[words.index("--config") + 1])
            continue
        if "peers" in words and set(peers.PACKAGES) - set(peers.versions()):
            continue
        words += extra_flags(words, data_dir)
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        check_results(words, done.stdout)
        ran.add(words[1].removeprefix("collab_jax."))
    assert ran == {*LEAVES, "bench"}


# ---------------------------------------------------------------------------------------- names


@each_page
def test_a_page_says_whom_it_is_for(page):
    assert page == README or TEXTS[page].splitlines()[2].startswith("*For ")


def test_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 120


@each_page
def test_files_that_a_page_names_exist(page):
    text = TEXTS[page]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    paths = [page.parent / link for link in links]
    paths += [ROOT / name for name in PATH.findall(text) if "NAME" not in name]
    assert [path for path in paths if not path.exists()] == []


@each_page
def test_commands_settings_and_modules_that_a_page_names_exist(page):
    common = (ROOT / "configs" / "common.py").read_text()
    settings = re.findall(r"(?:--|`)config\.([\w.]+)", TEXTS[page])
    modules = re.findall(r"python -m collab_jax\.(\w+)", TEXTS[page])
    assert [s for s in settings if not re.search(rf"config\.{re.escape(s)}\b", common)] == []
    for module in set(modules) - {"NAME"}:
        path = ROOT / "collab_jax" / module
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def defines(path, name):
    """Whether a file defines a function, a class, a constant or a class's field of this name."""
    text = (ROOT / "collab_jax" / path).with_suffix(".py").read_text()
    return re.search(rf"^ *(?:(?:def|class) {name}\b|{name}\b.*?[:=])", text, re.MULTILINE)


def test_the_file_map_names_what_its_files_define():
    table = TEXTS[README].split("## File map")[1].split("\n## ")[0]
    named = re.findall(r"\]\((?:collab_jax/)([\w/]+)\.py\): ((?:`\w+`(?:, )?)+)", table)
    found = [(path, name) for path, names in named for name in re.findall(r"`(\w+)`", names)]
    assert len(found) > 12
    assert [x for x in found if not defines(*x)] == []


def test_the_seams_are_those_of_the_code():
    (seams,) = blocks(ROOT / "docs" / "architecture.md", "text")
    module, found = "", []
    for line in seams.splitlines():
        start, name = re.match(r"(\S*) +([A-Za-z_.]+)?", line).groups()
        module = start or module
        if name and line[line.index(name) + len(name)] in "(:":
            found += [(module, part) for part in name.split(".")]
    assert len(found) > 15
    assert [x for x in found if not defines(*x)] == []


RESULTS = ROOT / "docs" / "results.md", ROOT / "docs" / "results" / "svamp.md"


@pytest.mark.parametrize("page", [README, *RESULTS], ids=lambda page: page.name)
def test_figures_are_those_of_the_published_reports(page):
    assert "<!-- headline of docs/results/chain -->" in TEXTS[README]
    text = page.read_text()
    assert quote.quoted(text) == text, f"python -m collab_jax.reports.quote {page}"


def test_style_is_shown_by_real_code():
    files = [*(ROOT / "collab_jax").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    without_space = lambda text: "".join(text.split())  # noqa: E731 (formatted at another depth)
    sources = [without_space(path.read_text()) for path in files]
    examples = blocks(CONTRIBUTING, "python")
    assert len(examples) == 3
    for example in examples:
        assert any(without_space(example) in source for source in sources), example


# --------------------------------------------------------------------------- how to add a part


REGISTRIES = tasks.TASKS, routers.ROUTERS, cloud.KINDS, algorithms.PARTS["advantage"]


@pytest.fixture
def add_part():
    """add_part(heading): runs a part's code of a page; undone after the test."""
    before = [dict(registry) for registry in REGISTRIES]

    def run(heading, page=ROOT / "docs" / "architecture.md", lines=15):
        section = TEXTS[page].split(f"# {heading}\n")[1]
        code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
        assert len([line for line in code.splitlines() if line]) <= lines
        exec(compile(code, heading, "exec"), {})

    yield run
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_every_part_is_tested_below():
    headings = re.findall(r"^### (.*)", TEXTS[ROOT / "docs" / "architecture.md"], re.MULTILINE)
    assert headings == ["A task", "A router", "A cloud", "An algorithm"]
    shown = sum(len(blocks(page, "python")) for page in [README, *DOCS])
    assert shown == len(headings) + 1  # a task of code, in tasks.md


def test_a_task(add_part, small):
    add_part("A task")
    config = small(task__name="backwards")
    task = tasks.make_task(config)
    (example,) = task.load("test")
    assert example == Example("live", "", "live", task="backwards", split="test")
    good = "<think>e v i l</think><answer>evil</answer>"
    assert task.verify([example] * 3, [good, "live", config.text.marker]) == [
        Verdict(correct=True, called=False, formatted=True),
        Verdict(correct=False, called=False, formatted=False),
        Verdict(correct=False, called=True, formatted=False),
    ]


def test_a_task_of_code(add_part, small, tmp_path):
    add_part("A task of your own", page=ROOT / "docs" / "tasks.md", lines=40)
    row = {"id": "k", "problem": "Halve.", "answer": "def half(x): return x / 2", "name": "half"}
    write_rows(tmp_path / "test.jsonl", [row | {"tests": ["assert half(4) == 2"]}])
    settings = {"task__data_dir": str(tmp_path), "task__prompt": "{problem}"}
    task = tasks.make_task(small(task__name="katas", task__unsafe_code=True, **settings))
    examples = task.load("test") * 2
    right, wrong = task.verify(examples, [f"<answer>{row['answer']}</answer>", "```\npass\n```"])
    assert (right.correct, wrong.correct) == (True, False)
    question = {"id": "q", "problem": "Half of 4?", "choices": ["1", "2"], "answer": "B"}
    write_rows(tmp_path / "quiz_test.jsonl", [question])
    quiz = tasks.make_task(small(task__name="quiz", **settings))
    (verdict,) = quiz.verify(quiz.load("test"), ["<answer>(B) 2</answer>"])
    assert verdict.correct


def test_a_router(add_part):
    add_part("A router")
    columns = {"id": ["a", "b"], "local_correct": [True, False], "cloud_correct": [True, True]}
    table = records.check(columns | {"tokens": [7, 90]}, "a test's table")
    assert routers.score("length", table).tolist() == [7, 90]
    assert "length" in routers.possible(table)


def test_a_cloud(add_part, small, tmp_path):
    add_part("A cloud")
    config = small(cloud__kind="clerk")
    clerk = cloud.make_cloud(config, tasks.make_task(config), tmp_path / "cloud.sqlite")
    prompt = [{"role": "user", "content": "What is it?"}]
    first, again = clerk.answer([prompt]), clerk.answer([prompt])
    assert first.replies[0].text == "<answer>42</answer>"
    assert (first.bought, again.bought) == (1, 0)


def test_an_algorithm(add_part, small):
    add_part("An algorithm")
    algorithm = algorithms.make_algorithm(small(algorithm__advantage="above_worst"))
    r = np.array([[2.2, 0.2, 0.5]], np.float32)
    A = algorithm.advantage(r, np.ones((1, 3, 1), bool))
    np.testing.assert_allclose(A, [[2.0, 0.0, 0.3]], rtol=1e-6)
