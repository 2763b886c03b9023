"""The report of a sweep: every cell's figures, its routers, training curves, examples and costs.

It consists of report.md, report.html (one file, figures inside) and training.png in the sweep's
folder, beside what `compare` writes. No jax.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports import comparison, figures, findings, page
from collab_jax.reports import run as run_report
from collab_jax.reports.comparison import Model
from collab_jax.reports.findings import BUDGET
from collab_jax.rl import cloud_columns, experiment, search, sweeps
from collab_jax.rl.search import Search
from collab_jax.rl.sweeps import Job, Sweep
from collab_jax.routing.routers import ROUTERS
from collab_jax.runtime import markdown, metrics
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent, points
from collab_jax.tasks import make_task


class Finished(NamedTuple):
    """A finished run."""

    report: dict[str, Any]  # report.json
    rows: list[dict[str, Any]]  # of metrics.jsonl
    folder: pathlib.Path


def read(folder: pathlib.Path) -> Finished:
    """The finished run in `folder`. Raises UserError where its metrics are missing."""
    if not (rows := metrics.read(folder / "metrics.jsonl")):
        raise UserError(
            f"{folder} has a report, but no rows in metrics.jsonl: restore it, or move that folder "
            "away"
        )
    return Finished(json.loads((folder / "report.json").read_text()), rows, folder)


# ---- what is compared


def models(
    sweep: Sweep, done: Mapping[str, Sequence[Job]], store: pathlib.Path
) -> dict[str, Model]:
    """The records of finished runs by cell, after those of the model they start from.

    With `sweep.serve`, each cell stands there under those clouds as well. store: SQLite file of the
    other clouds' answers.
    """
    runs = [job for jobs in done.values() for job in jobs]
    paths = [
        path
        for job in runs
        for path in (job.folder / f"{name}.parquet" for name in ("before", "after", "fit"))
        if path.exists()
    ]
    read = [records.read(path) for path in paths]
    known = {}
    if not sweep.prompts and any("prompt" not in table for table in read):
        known = _prompts_of(sweep)
    tables = dict(zip(paths, _with_prompts(read, known), strict=True))
    start = next((path for path in paths if path.name == "before.parquet"), None)
    compared = {"start": Model([tables[start]], [None])} if start else {}
    for name, jobs in done.items():
        after = [tables[job.folder / "after.parquet"] for job in jobs]
        fit_on = [tables.get(job.folder / "fit.parquet") for job in jobs]
        compared[name] = Model(after, fit_on)
        for cloud, changes in sweep.serve.items():
            compared[f"{name}, served by {cloud}"] = Model(
                [
                    served(sweep, job, changes, table, store)
                    for job, table in zip(jobs, after, strict=True)
                ],
                fit_on,
            )
    return compared


def _prompts_of(sweep: Sweep) -> dict[str, str]:
    """The prompts of all examples, by id, of a sweep whose records are published without them."""
    task = make_task(sweeps.config_of(sweep, sweep.overrides))
    examples = [example for split in task.splits for example in task.load(split)]
    return {example.id: task.prompt(example)[-1]["content"] for example in examples}


def _with_prompts(tables: Sequence[Records], known: Mapping[str, str]) -> list[Records]:
    """The tables, each with the prompts that it lacks and others have or are known, by id.

    A published sweep has each prompt once. A table with a prompt that none has is left as it is.
    """
    prompts = dict(known)
    for table in tables:
        pairs = zip(table["id"], table.get("prompt", ()), strict=False)
        prompts |= {key: prompt for key, prompt in pairs if prompt}
    completed = []
    for table in tables:
        own = table.get("prompt", [""] * len(table["id"]))
        whole = [
            prompt or prompts.get(key, "") for key, prompt in zip(table["id"], own, strict=True)
        ]
        if all(whole):
            table = table | {"prompt": np.array(whole, object)}
        completed.append(table)
    return completed


def served(
    sweep: Sweep, job: Job, changes: Mapping[str, Any], table: Records, store: pathlib.Path
) -> Records:
    """A run's records with the answers of another cloud, which `changes` describe.

    They show what the run's margins, which do not depend on a cloud, are worth with that one.
    """
    config = sweeps.config_of(sweep, {**job.changes, **changes})
    task, cloud = experiment.task_and_cloud(config, store)
    examples = {e.id: e for e in task.load(config.eval.split)}
    rows = cloud_columns.cloud_answers(task, cloud, [examples[key] for key in table["id"]])
    answers = {column: [row[column] for row in rows] for column in rows[0]}
    return records.check(table | answers, str(job.folder))


# ---- the report


def write_report(sweep: Sweep, out: pathlib.Path, config_file: pathlib.Path) -> bool:
    """Writes the report of what is finished in `out`; returns False where nothing is.

    config_file: the sweep's file, for the command line in the report.
    """
    if not (done := sweeps.finished(sweep, out)):
        return False
    reference = f"{next(iter(done))}: margin"
    result = comparison.compare(models(sweep, done, out / "serve.sqlite"), reference=reference)
    print(comparison.write(out, result))
    runs = {name: [read(job.folder) for job in jobs] for name, jobs in done.items()}
    command = f"python -m collab_jax.sweep --config {config_file} --out {out}"
    searched = search_section(sweep.search, search.read(out)) if sweep.search else ""
    learnt = findings.findings(result, task_tuned(sweep, done), budgets(sweep, done))
    write(out, sweep.about, command, result, runs, learnt, searched, sweep.prompts)
    print(f"report: {out / 'report.html'}")
    return True


def task_tuned(sweep: Sweep, done: Mapping[str, Sequence[Job]]) -> str | None:
    """The first finished cell that was never rewarded for a call; None where there is none."""
    return next(
        (name for name, jobs in done.items() if _config(sweep, jobs).algorithm.reward == "task"),
        None,
    )


def budgets(sweep: Sweep, done: Mapping[str, Sequence[Job]]) -> dict[str, float]:
    """The budget of each finished cell that was rewarded for calls."""
    configs = {name: _config(sweep, jobs) for name, jobs in done.items()}
    return {
        name: config.budget for name, config in configs.items() if config.algorithm.reward != "task"
    }


def _config(sweep: Sweep, jobs: Sequence[Job]) -> ConfigDict:
    return sweeps.config_of(sweep, jobs[0].changes)


def write(
    out: pathlib.Path,
    about: str,
    command: str,
    result: dict[str, Any],
    cells: Mapping[str, Sequence[Finished]],
    learnt: str = "",
    searched: str = "",
    prompts: bool = True,
) -> None:
    """Writes the report of `cells` to `out`, where frontier.png must be already.

    about: what the sweep is, in Markdown. result: from `comparison.compare`. The first cell is the
    one that the others are compared with. learnt: from `findings`. searched: the section about the
    search, if there was one. prompts: whether to show some, with what was answered.
    """
    figures.sweep_training(
        out / "training.png", {name: [run.rows for run in runs] for name, runs in cells.items()}
    )
    page.save(out, "report", render(about, command, result, cells, learnt, searched, prompts))


def render(
    about: str,
    command: str,
    result: dict[str, Any],
    cells: Mapping[str, Sequence[Finished]],
    learnt: str = "",
    searched: str = "",
    prompts: bool = True,
) -> str:
    """report.md, from the same arguments as `write`."""
    machines = {
        ", ".join(f"{key} {value}" for key, value in run.report["machine"].items())
        for runs in cells.values()
        for run in runs
    }
    seeds = ", ".join(f"{name} {len(runs)}" for name, runs in cells.items())
    reference = result["reference"]
    sections = [
        about.strip(),
        *(["## What was learnt", learnt] if learnt else []),
        "## At a glance",
        findings.headline_table(result),
        "## How it was measured",
        f"Command: {markdown.code(command)}. {result['prompts']} {result['split']} prompts, "
        f"the same for all. Seeds: {seeds}. Figures in percent of all prompts, with 95 % "
        f"intervals: t over seeds and, at once, {result['resamples']} resamples of the prompts; "
        f"with one seed over prompts alone. Machine: {'; '.join(sorted(machines))}.",
        "## The trained marker",
        cell_table(result),
        f"## {reference} against the others' margin, points",
        ahead_table(result),
        "![accuracy against call rate](frontier.png)",
        f"## Every router at {100 * BUDGET:g} % calls",
        "Rows: how it is decided what goes to the cloud; columns: the model that answers.",
        router_table(result, "accuracy", percent),
        f"{reference} is ahead of each by so many points:",
        router_table(result, "reference_minus_this", points),
        *([searched] if searched else []),
        "## Training",
        "![training](training.png)",
        cost_table(cells),
    ]
    first_cell, first_runs = next(iter(cells.items()))
    after = records.read(first_runs[0].folder / "after.parquet")
    if prompts and {"prompt", "natural_text"} <= after.keys():
        sections += [
            f"## Examples: {first_cell}, its first seed, natural decoding",
            run_report.examples_list(after),
        ]
    return "\n\n".join([*sections, "All figures: compare.md, compare.json."]) + "\n"


# ---- its tables


def search_section(searched: Search, found: Mapping[str, search.Found]) -> str:
    """What was tried for each cell, the accuracy of each value in percent, and what was chosen."""
    values = sorted({value for cell in found.values() for value in search.tried(cell)})
    rows = []
    for name, cell in found.items():
        of = search.tried(cell)
        shown = [f"{100 * of[value]:.1f}" if value in of else "" for value in values]
        rows.append([name, *shown, f"{cell['chosen']:g}" if "chosen" in cell else "-", _end(cell)])
    tried = [row for cell in found.values() for row in cell["tried"]]
    minutes = sum(row["seconds"] for row in tried) / 60
    return "\n\n".join(
        [
            f"## Search: {searched.key}",
            "Overall accuracy on the validation split by natural calls, cut to those of highest "
            f"margin where they are more than {100 * searched.budget:g} %, in percent, mean of "
            f"{len(searched.seeds)} seed(s); of a cell that stands for a router, by that router at "
            "this share. The best value of each cell is the one of its runs above. "
            f"{len(tried)} values, {minutes:.0f} minutes of training.",
            markdown.table(["", *(f"{value:g}" for value in values), "chosen", ""], rows),
        ]
    )


def _end(cell: search.Found) -> str:
    """Says so where nothing beyond the chosen value was tried; "" where both sides were."""
    values = search.tried(cell)
    if len(values) < 2 or "chosen" not in cell:
        return ""
    ends = {min(values): "the smallest tried", max(values): "the largest tried"}
    return ends.get(cell["chosen"], "")


def cell_table(result: dict[str, Any]) -> str:
    """A row a cell: the device alone, natural decoding, the margin at each budget, its ranking."""
    head = [
        "",
        "device alone",
        "natural calls / overall",
        *_budget_titles(result),
        f"of the reachable gain at {100 * BUDGET:g} %",
        "AUC",
        "AUC of log-probability",
    ]
    rows = []
    for name in findings.models_with_margin(result):
        alone, method = result["models"][name], result["methods"][f"{name}: margin"]
        natural = f"{percent(alone['natural_call_rate'])} / {percent(alone['natural_accuracy'])}"
        share = method["at_budget"][str(BUDGET)]["reachable_share"]["value"]
        rows.append(
            [
                name,
                percent(alone["local_accuracy"]),
                natural,
                *(percent(at["accuracy"]) for at in method["at_budget"].values()),
                "-" if share is None else f"{share:.0%}",
                _three_digits(method["auc"]),
                _three_digits(result["methods"][f"{name}: logprob"]["auc"]),
            ]
        )
    return markdown.table(head, rows)


def ahead_table(result: dict[str, Any]) -> str:
    """A row a cell: the lead of the reference at each budget, and on the device alone."""
    rows = []
    for name in findings.models_with_margin(result):
        method = f"{name}: margin"
        if method != result["reference"]:
            at_budget = result["methods"][method]["at_budget"].values()
            alone = points(result["models"][name]["reference_minus_this"])
            rows.append([name, alone, *(points(at["reference_minus_this"]) for at in at_budget)])
    return markdown.table(["", "device alone", *_budget_titles(result)], rows)


def router_table(result: dict[str, Any], figure: str, show: Callable[[dict], str]) -> str:
    """Routers x models: `figure` of each method at BUDGET, as `show` writes it."""
    names = list(dict.fromkeys(method.partition(": ")[2] for method in result["methods"]))
    rows = []
    for name in names:
        methods = [result["methods"].get(f"{model}: {name}") for model in result["models"]]
        cells = [show(m["at_budget"][str(BUDGET)][figure]) if m else "-" for m in methods]
        rows.append([ROUTERS[name].title if name in ROUTERS else name, *cells])
    return markdown.table(["", *result["models"]], rows)


def cost_table(cells: Mapping[str, Sequence[Finished]]) -> str:
    """A row a cell: what a run cost in training, mean over its seeds.

    The cloud calls of the evaluation are not in it.
    """
    head = [
        "",
        "steps",
        "minutes",
        "response tokens",
        "cloud answers bought",
        "filter dropped",
        "calls in training, last 10 steps",
    ]
    rows = [
        [
            name,
            f"{np.mean([len(run.rows) for run in runs]):.0f}",
            f"{_mean_total(runs, 'seconds') / 60:.1f}",
            f"{_mean_total(runs, 'tokens') / 1e6:.2f} M",
            f"{_mean_total(runs, 'cloud_bought'):.0f}",
            f"{np.mean([run.report['filter_dropped'] for run in runs]):.1%}",
            f"{np.mean([row['call_rate'] for run in runs for row in run.rows[-10:]]):.1%}",
        ]
        for name, runs in cells.items()
    ]
    return markdown.table(head, rows)


def _mean_total(runs: Sequence[Finished], key: str) -> float:
    """A metric's sum over all steps, mean over runs."""
    return float(np.mean([sum(row[key] for row in run.rows) for run in runs]))


def _budget_titles(result: dict[str, Any]) -> list[str]:
    return [f"{100 * budget:g} % calls" for budget in result["budgets"]]


def _three_digits(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"
