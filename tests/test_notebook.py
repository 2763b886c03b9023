"""The notebooks: kept without outputs, and executed from a clean kernel; the quickstart with small
settings.
"""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
from conftest import ROOT, SMALL

from collab_jax.routing import collab_config

NOTEBOOK = ROOT / "notebooks" / "01_quickstart_colab.ipynb"


def cells():
    """The quickstart's cells by id."""
    return {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}


def execute(*ids, **names):
    """The names that the given code cells leave, executed here, after `names`."""
    for name in ids:
        exec(compile("".join(cells()[name]["source"]), name, "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.mark.parametrize(
    "path", sorted(NOTEBOOK.parent.glob("*.ipynb")), ids=lambda path: path.stem
)
def test_is_committed_without_outputs(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_its_settings_are_those_of_the_config():
    ours = execute("settings")
    config = runpy.run_path(str(ROOT / "configs" / "countdown_tiny_ours.py"))["get_config"]()
    assert (ours.STEPS, ours.BUDGET, ours.DATA_DIR) == (
        config.train.steps,
        config.budget,
        config.task.data_dir,
    )
    assert ours.PROMPTS <= config.task.test_examples


@pytest.fixture(scope="module")
def run_notebook(tmp_path_factory):
    """run_notebook(path, **environment): outputs by cell of the whole notebook, in a kernel of this
    very Python, from notebooks/.
    """
    nbformat = pytest.importorskip(
        "nbformat", reason="nbformat is not installed: pip install '.[test]'"
    )
    nbclient = pytest.importorskip(
        "nbclient", reason="nbclient is not installed: pip install '.[test]'"
    )
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[test]'")
    tmp = tmp_path_factory.mktemp("jupyter")
    spec = tmp / "jupyter" / "kernels" / "this-python" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "this Python", "language": "python"}))

    def run(path, **environment):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setenv("JAX_PLATFORMS", "cpu")
            patch.setenv("JUPYTER_PATH", str(tmp / "jupyter"))
            patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp / "runtime"))
            patch.setenv("IPYTHONDIR", str(tmp / "ipython"))
            where = {"metadata": {"path": str(NOTEBOOK.parent)}}
            nbclient.NotebookClient(
                notebook, timeout=1800, kernel_name="this-python", resources=where
            ).execute()
        outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
        assert not any(
            output.output_type == "error" for cell in outputs.values() for output in cell
        )
        return {
            key: [o.get("text") or o.get("data", {}) for o in cell] for key, cell in outputs.items()
        }

    return run


@pytest.fixture(scope="module")
def executed(run_notebook, data_dir, tmp_path_factory):
    """(outputs by cell, workdir) of the quickstart notebook."""
    workdir = tmp_path_factory.mktemp("notebook") / "run"
    own = {"train.steps": "STEPS", "eval.prompts": "PROMPTS"}
    settings = {name: str(SMALL[key]) for key, name in own.items()}
    settings |= {"WORKDIR": str(workdir), "DATA_DIR": str(data_dir)}
    settings["FLAGS"] = " ".join(
        f"--config.{key}={value}" for key, value in SMALL.items() if key not in own
    )
    return run_notebook(
        NOTEBOOK, **{f"COLLAB_JAX_NOTEBOOK_{name}": x for name, x in settings.items()}
    ), workdir


def rows(cell):
    """The cells of the Markdown table that a notebook's cell shows last."""
    shown = [output["text/markdown"] for output in cell if "text/markdown" in output]
    lines = shown[-1].splitlines()[2:]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.slow
@pytest.mark.long
def test_one_step_by_hand_has_the_numbers_that_it_tells(run_notebook):
    out = run_notebook(NOTEBOOK.parent / "02_one_step_by_hand.ipynb")
    assert rows(out["reward"])[0][2] == "2.2, 2.2, 0.2, 0.5"
    assert out["filter"] == [
        "batch 1: keep [True, True, False, False], carried 6/7\n"
        "batch 2: keep [True, True, True, False], carried 5/7\n"
    ]
    assert rows(out["advantage"])[0][2].startswith("1.23, 1.23")
    assert rows(out["gradient"])[0][1] == "0.62"  # 2 * 1.233 / 4
    learnt = [(float(row[-2]), float(row[-1])) for row in rows(out["step"]) if row[1] == "True"]
    assert len(learnt) >= 8 and sum(a * gained > 0 for a, gained in learnt) >= 0.8 * len(learnt)


def test_results_are_read_as_they_were_published(run_notebook):
    out = run_notebook(NOTEBOOK.parent / "03_read_results.ipynb")
    result = json.loads((ROOT / "docs" / "results" / "chain" / "compare.json").read_text())
    assert [row[0] for row in rows(out["table"])[::2]] == list(result["models"])
    by_hand, replayed = re.search(
        r"calls: ([\d.]+)%, by measures.replay ([\d.]+)%", out["replay"][0]
    ).groups()
    assert abs(float(by_hand) - float(replayed)) < 0.05
    for budget, _, calls, safe in rows(out["calibration"]):
        assert (
            abs(float(calls.split()[0]) - float(budget[:-1])) < 5
            and float(safe.split()[0]) < float(budget[:-1]) + 3
        )
    fixed, online = map(
        float, re.search(r"fixed bias ([\d.]+)%, online rule ([\d.]+)%", out["stream"][-1]).groups()
    )
    assert fixed > 35 and abs(online - 30) < 3


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("smollm2_file")
def test_a_pretrained_model_goes_from_its_weights_to_a_calibrated_export(run_notebook, tmp_path):
    """Each stage leaves what the next one and a server need."""
    out = run_notebook(
        NOTEBOOK.parent / "04_bring_your_model.ipynb", COLLAB_JAX_NOTEBOOK_WORKDIR=str(tmp_path)
    )
    printed = {key: "".join(x for x in cell if isinstance(x, str)) for key, cell in out.items()}
    assert re.findall(r"(\d+) for (\w+)", printed["data"]) == [
        ("80", "train"),
        ("16", "validation"),
        ("12", "test"),
    ]
    assert "`<jupyter_script>`" in rows(out["text-settings"])[2]
    assert printed["text-settings"].endswith("<jupyter_script> <|im_end|>\n")
    assert "on each of 1 device" in printed["memory"]
    shown = re.findall("^'<think>.*$", printed["warm"], re.MULTILINE)
    assert len(shown) == 8 and {"<answer>" in one for one in shown} == {True, False}
    assert dict(rows(out["reach"]))["prompts"] == "4"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert "| accuracy on the device" in out["train"][-1]["text/markdown"]
    config = collab_config.read(tmp_path / "model")
    assert config["decision_token"] == "<jupyter_script>"
    assert (config["target"], config["value"]) == ("rate", 0.3)
    assert len(rows(out["use"])) == len(config["biases"])
    for folder, weights in (("model", "model"), ("adapter", "adapter_model")):
        card = (tmp_path / folder / "README.md").read_text()
        assert "The call begins with one token, `<jupyter_script>`" in card
        assert f"{weights}.safetensors" in printed["use"]


@pytest.mark.slow
@pytest.mark.long
def test_runs_the_checkout_around_it_and_shows_the_command(executed):
    texts, workdir = executed
    assert texts["checkout"] == ["code: the checkout around this notebook\n"]
    assert (
        len(texts["install"]) == 1
        and texts["install"][0].startswith("jax ")
        and " on CPU: " in texts["install"][0]
    )
    printed = texts["train"][0]
    assert printed.startswith(
        "$ python -m collab_jax.train --config configs/countdown_tiny_ours.py --workdir "
    )
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == SMALL["train.steps"]


@pytest.mark.slow
@pytest.mark.long
def test_status_and_curves_are_refreshed_in_place(executed):
    printed, status, plot = executed[0]["train"]
    assert "report:" in status["text/plain"] and "image/png" in plot


@pytest.mark.slow
@pytest.mark.long
def test_examples_show_questions_and_responses_of_each_kind(executed):
    text = "".join(executed[0]["examples"])
    counts = [
        int(n)
        for n in re.findall(rf"^=== .*: ([0-9]+) of {SMALL['eval.prompts']}$", text, re.MULTILINE)
    ]
    assert len(counts) == 4 and sum(counts) == SMALL["eval.prompts"]
    assert text.count("question  ") == text.count("wrote  ") == sum(min(n, 2) for n in counts)
    assert text.count("unaided  ") == text.count("cloud  ") == sum(min(n, 2) for n in counts[1:3])
    assert re.search(r"question  [0-9]+( [0-9]+){2,3}=[0-9]+\n", text) and "<think>" in text


@pytest.mark.slow
@pytest.mark.long
def test_table_and_frontier_are_those_of_the_report(executed):
    texts, workdir = executed
    table = texts["table"][0]["text/markdown"]
    assert "| accuracy on the device" in table and "perfect router" in table and "![" not in table
    assert table in (workdir / "report.md").read_text()
    assert "image/png" in texts["frontier"][0]


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"])
def test_finds_its_checkout(monkeypatch, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = execute("settings", "checkout")
    assert found.ROOT == ROOT and not found.CLONED and found.WORKDIR == ROOT / "runs" / "notebook"


def test_without_a_checkout_it_asks_for_an_address_and_clones_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        execute("settings", "checkout")
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setenv("COLLAB_JAX_NOTEBOOK_REPOSITORY", "https://example.org/collab_jax")
    found = execute("settings", "checkout")
    assert found.CLONED and found.ROOT == pathlib.Path.cwd() / "collab_jax"
    assert calls == [
        ["git", "clone", "--depth", "1", "https://example.org/collab_jax", str(found.ROOT)]
    ]


@pytest.mark.parametrize("recent", [True, False])
def test_installs_around_the_jax_that_is_there(monkeypatch, tmp_path, recent, capsys):
    """pip is a stand-in; `recent`: whether it finds a solution with the jax that came with the
    machine.
    """
    site = {"jax": "0.10.1", "jaxlib": "0.10.1", "jax_cuda12_plugin": "0.10.1", "numpy": "2.0"}
    packages = [
        types.SimpleNamespace(metadata={"Name": name}, version=version)
        for name, version in site.items()
    ]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: packages)
    pip = []

    def stand_in(command, **_):
        code, out = 0, "0.10.1|gpu|1|A card\n"
        if "pip" in command:
            held = (
                pathlib.Path(command[-1]).read_text().split() if "--constraint" in command else None
            )
            pip.append((command[command.index("-e") + 1], held))
            code = int(held is not None and not recent)
        return subprocess.CompletedProcess(command, code, out, "")

    monkeypatch.setattr(subprocess, "run", stand_in)
    names = {
        "subprocess": subprocess,
        "sys": sys,
        "os": os,
        "pathlib": pathlib,
        "ROOT": tmp_path,
        "CLONED": True,
    }
    execute("install", **names)
    held = ["jax==0.10.1", "jaxlib==0.10.1", "jax-cuda12-plugin==0.10.1"]
    assert pip == [(str(tmp_path), held)] + ([] if recent else [(f"{tmp_path}[gpu]", None)])
    assert capsys.readouterr().out.endswith("jax 0.10.1 on GPU: 1 x A card\n")
