"""The search before a sweep: which value comes next, by hand; resumed, reported, on validation."""

import json
import re

import pytest

from collab_jax.reports import sweep as sweep_report
from collab_jax.rl import search, sweeps
from collab_jax.rl.search import Search
from collab_jax.rl.sweeps import Cell, Sweep
from collab_jax.runtime.errors import UserError


def accuracies(of, values=(1.0, 2.0, 4.0)):
    """All that is tried where value v has the accuracy of[v], and what is best."""
    tried = {}
    while (value := search.next_value(values, tried)) is not None:
        tried[value] = of(value)
    return tried, search.best_value(tried)


@pytest.mark.parametrize(
    ("of", "tried", "best"),
    [
        (lambda v: -abs(v - 2), [1, 2, 4], 2),
        (lambda v: -abs(v - 8), [1, 2, 4, 8], 8),
        (lambda v: -v, [1, 2, 4, 0.5], 0.5),  # no more than one beyond
        (lambda v: v, [1, 2, 4, 8], 8),
        (lambda v: 0.5, [1, 2, 4, 0.5], 0.5),
    ],
)
def test_an_end_that_is_best_is_passed(of, tried, best):
    found, chosen = accuracies(of)
    assert (list(found), chosen) == (tried, best)


def write_report(folder, calls, natural, margin):
    """What a search reads of a run: 60 seconds of training, and its figures after that."""
    after = {
        "natural": {"call_rate": {"value": calls}, "overall_accuracy": {"value": natural}},
        "at_budget": {"0.3": {"margin": {"value": margin}}},
    }
    (folder / "report.json").write_text(json.dumps({"after": after, "seconds": 60}))


@pytest.mark.parametrize(("calls", "decides"), [(0.0, 0.5), (0.3, 0.5), (0.31, 0.7)])
def test_natural_calls_decide_within_the_budget(calls, decides, tmp_path):
    write_report(tmp_path, calls, natural=0.5, margin=0.7)
    assert search.outcome(Search("lr", (1.0,)), tmp_path) == (decides, calls, 60)
    assert search.outcome(Search("lr", (1.0,)), tmp_path, router="margin") == (0.7, calls, 60)


def run_with(monkeypatch, accuracy_of, ran):
    """Replaces a run by its report.json: accuracy_of(changes) -> accuracy, None for a failure."""

    def done(sweep, job, others, label, here):
        if job.done:
            return True
        ran.append((job.cell, job.changes["seed"], job.changes["lr"], job.changes["eval.split"]))
        accuracy = accuracy_of(job)
        if accuracy is None:
            return False
        job.folder.mkdir(parents=True)
        write_report(job.folder, calls=0.3, natural=accuracy, margin=0.0)
        return True

    monkeypatch.setattr(sweeps, "_is_done_after", done)
    monkeypatch.setattr(sweeps, "check_same", lambda *_: None)  # these runs have no config.json


SEARCHED = Sweep(
    "x.py",
    {"eval.split": "test", "routers.record": ("hidden",)},
    {"a": Cell({}, (0, 1)), "b": Cell({"c": 1}, (0,))},
    search=Search("lr", (1.0, 2.0, 4.0), seeds=(7, 8)),
)


def test_every_cell_is_tuned_on_validation_and_then_run_with_its_own_best(tmp_path, monkeypatch):
    best, ran = {"a": 2.0, "b": 4.0}, []
    run_with(monkeypatch, lambda job: 0.9 - abs(job.changes["lr"] - best[job.cell]) / 100, ran)
    assert sweeps.run(SEARCHED, tmp_path) == []
    searched = [run for run in ran if run[3] == "validation"]
    # b's best of three is at an end, so 8 is tried too
    assert [run[2] for run in searched if run[0] == "a" and run[1] == 7] == [1, 2, 4]
    assert [run[2] for run in searched if run[0] == "b" and run[1] == 8] == [1, 2, 4, 8]
    finals = [run for run in ran if run[3] == "test"]
    assert finals == [("a", 0, 2, "test"), ("b", 0, 4, "test"), ("a", 1, 2, "test")]
    assert all(
        job.changes["routers.record"] == ()
        for job in sweeps.search_jobs(SEARCHED, tmp_path, "a", 1.0)
    )
    before = len(ran)
    assert sweeps.run(SEARCHED, tmp_path) == [] and len(ran) == before  # nothing again
    section = sweep_report.search_section(SEARCHED.search, search.read(tmp_path))
    assert "## Search: lr" in section and "7 values, 14 minutes" in section
    assert re.search(r"\| a \| 89.0 \| 90.0 \| 88.0 \| +\| 2 +\| +\|", section)
    assert re.search(r"\| b \| 87.0 \| 88.0 \| 90.0 \| 86.0 \| 4 +\| +\|", section)


def test_a_best_value_with_nothing_tried_beyond_it_is_marked():
    runs = {1.0: 0.9, 2.0: 0.8, 4.0: 0.7}
    found = None
    for value, accuracy in runs.items():
        found = search.with_row(found, value, [search.Outcome(accuracy, 0.25, 60)])
    assert found["tried"][0] == {"value": 1.0, "accuracy": 0.9, "call_rate": 0.25, "seconds": 60}
    for chosen, said in ((1.0, "the smallest tried"), (2.0, " "), (4.0, "the largest tried")):
        section = sweep_report.search_section(SEARCHED.search, {"a": found | {"chosen": chosen}})
        assert re.search(rf"\| {chosen:g} +\| {said}", section)


def test_a_cell_that_is_like_another_is_run_with_its_value(tmp_path, monkeypatch):
    ran, cells = [], SEARCHED.cells | {"c": Cell({"c": 2}, (0,), like="a")}
    run_with(monkeypatch, lambda job: 0.9 - abs(job.changes["lr"] - 2) / 100, ran)
    assert sweeps.run(SEARCHED._replace(cells=cells), tmp_path) == []
    assert [run for run in ran if run[0] == "c"] == [("c", 0, 2, "test")]


def test_a_cell_may_have_values_of_its_own(tmp_path, monkeypatch):
    ran, cells = [], SEARCHED.cells | {"c": Cell({"c": 2}, (0,), values=(10.0, 20.0))}
    run_with(monkeypatch, lambda job: 0.9 - abs(job.changes["lr"] - 20) / 100, ran)
    assert sweeps.run(SEARCHED._replace(cells=cells), tmp_path) == []
    searched = [run[2] for run in ran if run[0] == "c" and run[1] == 7]
    assert searched == [10, 20, 40]  # one beyond its own end
    assert [run for run in ran if run[0] == "c"][-1] == ("c", 0, 20, "test")


def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    ran = []

    def stopped(job):
        if len(ran) == 4:
            raise sweeps.SweepStopped
        return 0.5 - abs(job.changes["lr"] - 2) / 100

    run_with(monkeypatch, stopped, ran)
    with pytest.raises(sweeps.SweepStopped):
        sweeps.run(SEARCHED, tmp_path)
    assert [row["value"] for row in search.read(tmp_path)["a"]["tried"]] == [1.0]
    assert sweeps.jobs(SEARCHED, tmp_path) == []
    run_with(monkeypatch, lambda job: 0.5 - abs(job.changes["lr"] - 2) / 100, ran)
    sweeps.run(SEARCHED, tmp_path)
    assert len(ran) == len(set(ran)) + 1  # but the run that was stopped


def test_what_was_found_with_other_settings_is_no_find(tmp_path, monkeypatch):
    found = Sweep(
        "configs/chain_tiny.py",
        {},
        {"a": Cell({}, (0,))},
        search=Search("optim.learning_rate", (1e-3,), seeds=(0,)),
    )
    [job] = sweeps.search_jobs(found, tmp_path, "a", 1e-3)
    job.folder.mkdir(parents=True)
    other = sweeps.config_of(found, job.changes | {"algorithm.advantage": "gapg"})
    (job.folder / "config.json").write_text(other.to_json_best_effort())
    (job.folder / "report.json").write_text("{}")
    search.write(
        tmp_path,
        {"a": search.with_row(None, 1e-3, [search.Outcome(0.9, 0.3, 1.0)]) | {"chosen": 1e-3}},
    )
    with pytest.raises(UserError, match="other settings .algorithm.advantage"):
        sweeps.run(found, tmp_path)


def test_a_cell_whose_search_fails_has_no_runs_and_the_others_have(tmp_path, monkeypatch):
    ran = []
    fails = lambda job: None if job.cell == "a" else 0.5 - abs(job.changes["lr"] - 2)  # noqa: E731
    run_with(monkeypatch, fails, ran)
    failed = sweeps.run(SEARCHED, tmp_path)
    assert [job.cell for job in failed] == ["a", "a"]  # both seeds of the first value
    assert [run for run in ran if run[3] == "test"] == [("b", 0, 2, "test")]
