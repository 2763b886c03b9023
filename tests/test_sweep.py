"""Sweeps, with a stand-in for training: order, what is kept, failures, a stop, the report, what is
published; and that the shipped ones can run.
"""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from fakes import make_table as make
from PIL import Image

from collab_jax import records, sweep
from collab_jax.reports import publish
from collab_jax.reports import sweep as sweep_report
from collab_jax.rl import search, sweeps
from collab_jax.rl.claims import claim, make_workdir
from collab_jax.rl.sweeps import Cell, Sweep
from collab_jax.runtime import metrics
from collab_jax.runtime.errors import UserError

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
TWO = Sweep(
    "configs/countdown_tiny.py",
    {"train.steps": 3},
    {"b": Cell({}, (0, 1)), "a": Cell({"algorithm.filter": "none"}, (5,))},
)


def test_order_and_command_line(tmp_path):
    found = sweeps.jobs(TWO, tmp_path)
    assert [str(job.folder.relative_to(tmp_path)) for job in found] == [
        "b/seed-0",
        "a/seed-5",
        "b/seed-1",
    ]
    words = sweeps.command(TWO, found[1])
    assert words[1:5] == ["-m", "collab_jax.train", "--config", str(ROOT / TWO.config)]
    assert words[5:] == [
        "--workdir",
        str(found[1].folder),
        "--config.train.steps=3",
        "--config.algorithm.filter=none",
        "--config.seed=5",
    ]


def test_a_sweep_of_several_hosts_tells_each_run_where_they_are(tmp_path):
    places = ["--config", "x", "--out", str(tmp_path)]
    second = ["--hosts=2", "--host=1", "--coordinator=10.0.0.1:8476"]
    here = sweeps.Here(1, ("--hosts", "2", "--host", "1", "--coordinator", "10.0.0.1:8476"))
    words = sweeps.command(TWO, sweeps.jobs(TWO, tmp_path)[0], here)
    joined = ["--hosts", "2", "--host", "1", "--coordinator", "10.0.0.1:8476"]
    assert words[7:13] == joined
    for one in ([], ["--hosts=1", "--host=0", "--coordinator=10.0.0.1:8476"]):
        with sweep.joined(sweep.parse([*places, *one])) as here:
            assert here == sweeps.ALONE
    for wrong in (second[:1], second[:2], [*second[:1], "--host=2", second[2]]):
        with (
            pytest.raises(UserError, match="needs --hosts=N, --host=0 to N - 1"),
            sweep.joined(sweep.parse([*places, *wrong])),
        ):
            pass


TRAIN = """
import json, pathlib, shutil, sys, time
folder, table, kind = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
folder.mkdir(parents=True, exist_ok=True)
if kind == "fail":
    sys.exit(3)
if kind == "slow":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("saved").touch(), sys.exit(0)))
    folder.joinpath("started").touch()
    time.sleep(60)
if not (folder / "before.parquet").exists():
    shutil.copy(table, folder / "before.parquet")
    (folder / "evaluated").touch()
shutil.copy(table, folder / "after.parquet")
shutil.copy(pathlib.Path(table).with_name("fit.parquet"), folder)
row = dict(local_accuracy=0.5, call_rate=0.25, reward=0.625, cloud_bought=2)
row |= dict(seconds=30.0, tokens=500000, entropy=1.5)
with (folder / "metrics.jsonl").open("w") as file:
    for i in range(3):
        file.write(json.dumps({"step": i + 1} | row) + "\\n")
(folder / "checkpoints").mkdir(exist_ok=True)
machine = {"date": "today", "devices": "2 x abacus"}
report = {"machine": machine, "filter_dropped": 0.125, "config": {"seed": 0}}
(folder / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces training: stand_in[cell] is "fail" or "slow"."""
    columns = dict(
        prompt=[f"{i} {i % 7}" for i in range(40)],
        natural_text=["<answer> 1 </answer>"] * 40,
        text=["x"] * 40,
        margins=[[0.5]] * 40,
        tokens=[9] * 40,
    )
    records.write(tmp_path / "table.parquet", make(40, **columns))
    fit = make(60, 1, id=[f"fit-{i}" for i in range(60)], prompt=[f"{i} 1" for i in range(60)])
    records.write(tmp_path / "fit.parquet", fit)
    kinds = {}

    def command(of, job, here):
        make_workdir(job.folder)
        claim(
            sweeps.config_of(of, job.changes), job.folder
        )  # as training does at first: it writes config.json
        return [
            sys.executable,
            "-c",
            TRAIN,
            str(job.folder),
            str(tmp_path / "table.parquet"),
            kinds.get(job.cell, "ok"),
        ]

    monkeypatch.setattr(sweeps, "command", command)
    return kinds


def test_finished_runs_are_kept_and_failed_ones_told(tmp_path, stand_in, capsys):
    stand_in["a"] = "fail"
    out = tmp_path / "out"
    assert [job.cell for job in sweeps.run(TWO, out)] == ["a"]
    assert "failed with status 3" in capsys.readouterr().out
    first = (out / "b" / "seed-0" / "report.json").stat().st_mtime_ns
    stand_in.clear()
    assert sweeps.run(TWO, out) == []
    with pytest.raises(UserError, match="train.steps=3 then, 4 now"):
        sweeps.run(TWO._replace(overrides={"train.steps": 4}), out)
    config = out / "b" / "seed-0" / "config.json"
    older = {
        key: value for key, value in json.loads(config.read_text()).items() if key != "routers"
    }
    config.write_text(json.dumps(older))
    assert sweeps.run(TWO, out) == []  # a run from before a key was there is still that run
    config.unlink()
    with pytest.raises(UserError, match="no config.json"):
        sweeps.run(TWO, out)
    assert (out / "b" / "seed-0" / "report.json").stat().st_mtime_ns == first
    models = sweep_report.models(TWO, sweeps.finished(TWO, out), out / "serve.sqlite")
    assert list(models) == ["start", "b", "a"] and len(models["b"].seeds) == 2


def test_the_start_is_evaluated_once_where_it_is_the_same(tmp_path, stand_in):
    cells = {
        "b": Cell({}, (0, 1)),
        "c": Cell({"eval.prompts": 7}, (0,)),
        "d": Cell({"lora.start": "elsewhere"}, (0,)),
    }
    other = Sweep(TWO.config, {}, cells)
    sweeps.run(other, tmp_path / "out")
    evaluated = {
        path.parent.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("evaluated")
    }
    assert evaluated == {"b/seed-0", "c/seed-0", "d/seed-0"}


@pytest.mark.slow
def test_the_table_is_of_all_cells_against_the_first(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "load", lambda path: TWO)
    assert sweep.main(["--config", "x.py", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["seeds"] == {"start": 1, "b": 2, "a": 1} and result["reference"] == "b: margin"
    assert "a: logprob" in capsys.readouterr().out


def test_the_report_by_hand(tmp_path, stand_in):
    out = tmp_path / "out"
    sweeps.run(TWO, out)
    sweep_report.write_report(
        TWO._replace(about="# Two `cells`\n\nTold."), out, pathlib.Path("two.py")
    )
    text = (out / "report.md").read_text()
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert (
        text.startswith("# Two `cells`")
        and "date today, devices 2 x abacus" in text
        and "Seeds: b 2, a 1" in text
    )
    assert lines["b"] == [
        "3",
        "1.5",
        "1.50 M",
        "6",
        "12.5%",
        "25.0%",
    ]  # the last table: what training cost
    assert "stayed, and was wrong" in text and "random" in lines
    page = (out / "report.html").read_text()
    assert (
        page.count("data:image/svg+xml;base64,") == 2
        and 'src="frontier' not in page
        and "<table>" in page
    )


def test_every_cell_is_measured_with_other_clouds(tmp_path, data_dir):
    """Records of ours, whose ids the task knows, under a cloud that is always wrong."""
    changes = {"task.data_dir": str(data_dir), "task.train_examples": 64, "task.test_examples": 32}
    one = Sweep(
        TWO.config,
        changes,
        {"b": Cell({}, (0,))},
        {"none": {"cloud.error_rate": 1.0}, "all": {"cloud.error_rate": 0.0}},
    )
    (job,) = sweeps.jobs(one, tmp_path)
    job.folder.mkdir(parents=True)
    records.write(job.folder / "after.parquet", make(32, id=[f"validation-{i}" for i in range(32)]))
    found = sweep_report.models(one, {"b": [job]}, tmp_path / "serve.sqlite")
    assert list(found) == ["b", "b, served by none", "b, served by all"]
    right = {name: model.seeds[0]["cloud_correct"].mean() for name, model in found.items()}
    assert right["b, served by none"] == 0 and right["b, served by all"] == 1 and 0 < right["b"] < 1
    same = found["b, served by all"].seeds[0]
    assert (same["margin"] == found["b"].seeds[0]["margin"]).all() and same["cloud_usd"].min() > 0


def columns_of(to, name):
    """The columns of each published NAME.parquet, by cell and seed."""
    return {
        path.parent.relative_to(to).as_posix(): set(records.read(path))
        for path in sorted(to.rglob(f"{name}.parquet"))
    }


@pytest.mark.slow
def test_a_sweep_continues_from_what_is_published_with_the_same_figures(
    tmp_path, stand_in, monkeypatch
):
    monkeypatch.setattr(sweeps, "load", lambda path: TWO)
    out, to = tmp_path / "out", tmp_path / "published"
    flags = ["--config", "x.py", "--out"]
    assert sweep.main([*flags, str(out), "--publish", str(to)]) == 0
    stand_in.update(a="fail", b="fail")  # nothing is run again
    assert sweep.main([*flags, str(to)]) == 0
    for name in ("compare.json", "compare.md", "frontier.svg", "training.svg"):
        assert (to / name).read_text() == (out / name).read_text(), name
    result = json.loads((to / "compare.json").read_text())
    assert "a: features_trees" in result["methods"]  # fitted on prompts that "b" alone has
    said = (out / "report.md").read_text().replace(str(out), str(to))
    assert "## Examples" in said
    assert (to / "report.md").read_text() == said


@pytest.mark.slow
def test_what_is_published_has_each_text_once_and_nothing_that_is_remade(
    tmp_path, stand_in, monkeypatch
):
    monkeypatch.setattr(sweeps, "load", lambda path: TWO)
    out, to = tmp_path / "out", tmp_path / "published"
    sweep.main(["--config", "x.py", "--out", str(out), "--publish", str(to)])
    top = {path.name for path in to.iterdir() if path.is_file()}
    assert top == {"report.md", "compare.md", "compare.json", "frontier.png", "training.png"}
    run = {"after.parquet", "fit.parquet", "config.json", "report.json", "metrics.jsonl.gz"}
    assert {path.name for path in (to / "b" / "seed-1").iterdir()} == run
    assert {path.name for path in (to / "b" / "seed-0").iterdir()} == run | {"before.parquet"}
    after, fit = columns_of(to, "after"), columns_of(to, "fit")
    assert {name for name, columns in after.items() if "prompt" in columns} == {"b/seed-0"}
    assert {name for name, columns in fit.items() if "prompt" in columns} == {"b/seed-0"}
    assert {"natural_text", "tokens"} <= after["b/seed-0"] and "margins" not in after["b/seed-0"]
    assert "tokens" in columns_of(to, "before")["b/seed-0"]  # a run that starts there reports it
    assert not {"natural_text", "margins", "tokens"} & after["a/seed-5"]
    assert all("text" in columns for columns in after.values())
    assert not any("text" in columns for columns in fit.values())
    rows = metrics.read(to / "b" / "seed-0" / "metrics.jsonl")
    assert len(rows) == 3 and rows[0].keys() == set(publish.METRICS) and rows[0]["reward"] == 0.625
    drawn = json.loads((to / "compare.json").read_text())["methods"]
    shown = {name for name, method in drawn.items() if "frontier" in method}
    assert "b: random" in shown and "a: margin" in shown and "a: random" not in shown


def test_prompts_that_are_not_to_be_copied_are_read_from_the_data_again(
    tmp_path, stand_in, monkeypatch
):
    monkeypatch.setattr(sweeps, "load", lambda path: TWO._replace(prompts=False))
    out, to = tmp_path / "out", tmp_path / "published"
    flags = ["--config", "x.py", "--out"]
    assert sweep.main([*flags, str(out), "--publish", str(to)]) == 0
    assert not any("prompt" in columns for columns in columns_of(to, "after").values())
    assert "## Training" in (report := (to / "report.md").read_text()) and "## Exam" not in report
    tables = [records.read(path) for path in sorted(out.rglob("*.parquet"))]
    prompts = {k: p for table in tables for k, p in zip(table["id"], table["prompt"], strict=True)}
    monkeypatch.setattr(sweep_report, "_prompts_of", lambda sweep: prompts)
    assert sweep.main([*flags, str(to)]) == 0
    assert (to / "compare.json").read_text() == (out / "compare.json").read_text()


def test_figures_are_published_in_few_colours(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(sweeps, "load", lambda path: TWO)
    out, to = tmp_path / "out", tmp_path / "published"
    sweep.main(["--config", "x.py", "--out", str(out), "--publish", str(to)])
    for name in ("frontier.png", "training.png"):
        with Image.open(to / name) as small, Image.open(out / name) as whole:
            assert small.size == whole.size and small.mode == "P"
            difference = np.array(small.convert("RGB"), int) - np.array(whole.convert("RGB"), int)
        assert np.abs(difference).mean() < 2  # of 255
        assert (to / name).stat().st_size < 0.6 * (out / name).stat().st_size


def test_of_tables_with_some_prompts_in_common_each_prompt_is_kept_once():
    first = make(4, id=list("abcd"), prompt=["A", "B", "C", "D"])
    second = make(4, id=list("cdef"), prompt=["C", "D", "E", "F"])
    kept = publish._without_prompts(second, {"a", "b", "c", "d"})
    assert kept["prompt"].tolist() == ["", "", "E", "F"]
    assert "prompt" not in publish._without_prompts(second, set("cdef"))
    tables = sweep_report._with_prompts([kept, first], {})
    assert [table["prompt"].tolist() for table in tables] == [list("CDEF"), list("ABCD")]
    (alone,) = sweep_report._with_prompts([kept], {})
    assert alone["prompt"].tolist() == ["", "", "E", "F"]  # as far as it is known
    (fetched,) = sweep_report._with_prompts([kept], {"c": "C", "d": "D"})
    assert fetched["prompt"].tolist() == list("CDEF")


def test_metrics_are_rounded_and_counts_are_not():
    row = {"step": 3, "reward": 1 / 3, "tokens": 1234567, "seconds": 0.1234567, "entropy": 1.5}
    kept = {"step": 3, "reward": 0.333333, "tokens": 1234567, "seconds": 0.123457}
    assert publish._rounded([publish._only(publish.METRICS, row)]) == [kept]


def test_numbers_become_narrow_only_where_nothing_is_lost():
    exact, inexact = np.array([0.5, np.inf, -np.inf]), np.array([1 / 3, 0.0, 1.0])
    assert publish._narrow(exact).dtype == np.float32 and publish._narrow(inexact) is inexact


@pytest.mark.slow
def test_a_stop_lets_the_run_save(tmp_path, stand_in):
    script = (
        "import sys; sys.path.insert(0, 'tests'); import test_sweep as t\n"
        "from collab_jax import sweep\n"
        "from collab_jax.rl import sweeps\n"
        "sweeps.load = lambda path: t.TWO\n"
        "words = [sys.executable, '-c', t.TRAIN]\n"
        "sweeps.command = lambda _, job, here: [*words, str(job.folder), 'none', 'slow']\n"
        f"sys.exit(sweep.main(['--config', 'x', '--out', {str(tmp_path / 'out')!r}]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    folder = tmp_path / "out" / "b" / "seed-0"
    for _ in range(600):
        if (folder / "started").exists():
            break
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 75 and "stopped and saved" in out and (folder / "saved").exists()


def test_refusals(tmp_path):
    def load(text):
        path = tmp_path / "sweep.py"
        path.write_text("from collab_jax.rl.sweeps import Cell, Sweep\n" + text)
        return sweeps.load(path)

    with pytest.raises(UserError, match="cannot read"):
        sweeps.load(tmp_path / "none.py")
    with pytest.raises(UserError, match=r"no get_sweep\(\)"):
        load("")
    make_one = (
        "def get_sweep():\n"
        "    cell = Cell({{}}, {seeds}, {like!r}, '', {values})\n"
        "    return Sweep({config!r}, {{}}, {{{name!r}: cell}}, {serve})"
    )
    good = dict(config=TWO.config, name="a", seeds=(0,), like="", values="()", serve="{}")
    assert load(make_one.format(**good)).cells["a"].seeds == (0,)
    for change, message in (
        ({"config": "configs/none.py"}, "no file configs/none.py"),
        ({"seeds": (1, 1)}, "seeds, each once"),
        ({"seeds": ()}, "seeds, each once"),
        ({"like": "b"}, "like 'b', which is no cell"),
        ({"like": "a"}, "like 'a', which is no cell with its own"),
        ({"values": (1.0, 2.0)}, "has values, but no search"),
        ({"name": "a/b"}, "folder's name"),
        ({"name": "a: b"}, "folder's name"),
        ({"serve": '{"poor": {"cloud.eror_rate": 0.5}}'}, "cannot have .*eror_rate"),
    ):
        with pytest.raises(UserError, match=message):
            load(make_one.format(**good | change))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_have_known_keys_and_names(path):
    from collab_jax.rl import experiment

    found = sweeps.load(path)
    for job in sweeps.jobs(found, pathlib.Path("out")):
        config = runpy.run_path(str(ROOT / found.config))["get_config"]().lock()
        config.update_from_flattened_dict(job.changes)
        experiment.check_config(config)


@pytest.mark.parametrize(
    ("sweep", "file"), [("chain", "chain_tiny.py"), ("countdown", "countdown_tiny_ours.py")]
)
def test_a_config_has_the_learning_rate_that_its_sweep_has_found(sweep, file):
    found = search.read(ROOT / "docs" / "results" / sweep)["ours"]["chosen"]
    config = runpy.run_path(str(ROOT / "configs" / file))["get_config"]()
    assert config.optim.learning_rate == found


@pytest.mark.parametrize(
    "folder",
    sorted({run.parents[1] for run in (ROOT / "docs" / "results").glob("*/*/seed-*")}),
    ids=lambda folder: folder.name,
)
def test_what_is_published_is_known_as_the_runs_of_its_sweep(folder):
    sweep = sweeps.load(ROOT / "configs" / "sweeps" / f"{folder.name}.py")
    done = [job for jobs in sweeps.finished(sweep, folder).values() for job in jobs]
    assert done
    for job in done:
        sweeps.check_same(sweep, job)
