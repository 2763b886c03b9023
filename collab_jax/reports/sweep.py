"""The report of a sweep: every cell's figures, its routers, training curves, examples and costs. No
jax.

Written to the sweep's folder: report.md, report.html (one file, figures inside), training.png,
beside what `compare` writes.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports import comparison, figures, page
from collab_jax.reports import run as run_report
from collab_jax.rl import evaluation, experiment, sweeps
from collab_jax.rl.sweeps import Job, Sweep
from collab_jax.routing.routers import ROUTERS
from collab_jax.runtime import markdown, metrics
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent, points

BUDGET = 0.3  # at which routers are shown, one figure each


class Finished(NamedTuple):
    """A finished run: its report.json, the rows of its metrics.jsonl, its folder."""

    report: dict[str, Any]
    rows: list[dict]
    folder: pathlib.Path


def read(folder: pathlib.Path) -> Finished:
    """The finished run in `folder`."""
    if not (rows := metrics.read(folder / "metrics.jsonl")):
        raise UserError(
            f"{folder} has a report, but no rows in metrics.jsonl: restore it, or move that folder away"
        )
    return Finished(json.loads((folder / "report.json").read_text()), rows, folder)


def write(
    out: pathlib.Path,
    about: str,
    command: str,
    result: dict,
    cells: Mapping[str, Sequence[Finished]],
) -> None:
    """Writes the report of `cells` to `out`, from `comparison.compare`'s result; frontier.png is there
    already.

    about: what the sweep is, Markdown. The first cell is the one that the others are compared with.
    """
    figures.sweep_training(
        out / "training.png", {name: [run.rows for run in runs] for name, runs in cells.items()}
    )
    first = next(iter(cells.values()))[0]
    told = lambda machine: ", ".join(f"{key} {value}" for key, value in machine.items())  # noqa: E731
    machines = {told(run.report["machine"]) for runs in cells.values() for run in runs}
    seeds = ", ".join(f"{name} {len(runs)}" for name, runs in cells.items())
    after = records.read(first.folder / "after.parquet")
    examples = (
        f"## Examples: {result['reference'].partition(': ')[0]}, its first seed, natural decoding\n\n{run_report.examples_list(after)}\n\n"
        if "natural_text" in after
        else ""
    )
    page.save(
        out,
        "report",
        f"{about.strip()}\n\nCommand: {markdown.code(command)}. {result['prompts']} held-out prompts, the same for all. Seeds: {seeds}. "
        f"Figures in percent of all prompts, with 95 % intervals from {result['resamples']} resamples of seeds and prompts; with "
        "five seeds they cover some 88 %, with two about half. Machine: "
        + "; ".join(sorted(machines))
        + ".\n\n"
        f"## The trained marker\n\n{cell_table(result)}\n\n"
        f"## {result['reference']} against the others' margin, points\n\n{ahead_table(result)}\n\n"
        "![accuracy against call rate](frontier.png)\n\n"
        f"## Every router at {100 * BUDGET:g} % calls\n\nRows: how it is decided what goes to the cloud; columns: the model that "
        f"answers.\n\n{router_table(result, 'accuracy', percent)}\n\n"
        f"{result['reference']} is ahead of each by so many points:\n\n"
        f"{router_table(result, 'reference_minus_this', points)}\n\n"
        f"## Training\n\n![training](training.png)\n\n{cost_table(cells)}\n\n{examples}"
        "All figures: comparison.md, comparison.json.\n",
    )


def headline_table(result: dict) -> str:
    """A row a model, short enough for a front page: everything at BUDGET."""
    budget = f"{100 * BUDGET:g} % calls"
    ahead = f"{result['reference'].partition(': ')[0]} ahead by"
    head = [
        "",
        "seeds",
        "device alone",
        f"{budget}: margin",
        f"{budget}: log-probability gate",
        ahead,
    ]
    rows = []
    for name in _models(result):
        margin, gate = (
            result["methods"][f"{name}: {r}"]["at_budget"][str(BUDGET)]
            for r in ("margin", "logprob")
        )
        is_reference = f"{name}: margin" == result["reference"]
        rows.append(
            [
                name,
                str(result["seeds"][name]),
                percent(result["models"][name]["local_accuracy"]),
                percent(margin["accuracy"]),
                percent(gate["accuracy"]),
                "" if is_reference else points(margin["reference_minus_this"]),
            ]
        )
    return markdown.table(head, rows)


def cell_table(result: dict) -> str:
    """A row a cell: the device alone, natural decoding, the margin at each budget, its ranking."""
    shares = [f"{100 * b:g} % calls" for b in result["budgets"]]
    head = [
        "",
        "device alone",
        "natural calls / overall",
        *shares,
        f"of the perfect router's gain at {100 * BUDGET:g} %",
        "AUC",
        "AUC of log-probability",
    ]
    rows = []
    for name in _models(result):
        alone, method = result["models"][name], result["methods"][f"{name}: margin"]
        at = method["at_budget"]
        natural = f"{100 * alone['natural_call_rate']:.1f} / {100 * alone['natural_accuracy']:.1f}"
        share = at[str(BUDGET)]["perfect_share"]["value"]
        rows.append(
            [
                name,
                percent(alone["local_accuracy"]),
                natural,
                *(percent(figure["accuracy"]) for figure in at.values()),
                "-" if share is None else f"{share:.0%}",
                _three(method["auc"]),
                _three(result["methods"][f"{name}: logprob"]["auc"]),
            ]
        )
    return markdown.table(head, rows)


def ahead_table(result: dict) -> str:
    """A row a cell: by how much the reference is ahead of its margin at each budget, and of the
    device alone.
    """
    head = ["", "device alone", *(f"{100 * b:g} % calls" for b in result["budgets"])]
    rows = [
        [
            name,
            points(result["models"][name]["reference_minus_this"]),
            *(
                points(f["reference_minus_this"])
                for f in result["methods"][f"{name}: margin"]["at_budget"].values()
            ),
        ]
        for name in _models(result)
        if f"{name}: margin" != result["reference"]
    ]
    return markdown.table(head, rows)


def router_table(result: dict, figure: str, show) -> str:
    """Routers x models: `figure` of each method at BUDGET, by `show`."""
    models = list(result["models"])
    routers = list(dict.fromkeys(name.partition(": ")[2] for name in result["methods"]))
    cell = lambda method: show(method["at_budget"][str(BUDGET)][figure]) if method else "-"  # noqa: E731
    rows = [
        [
            ROUTERS[r].title if r in ROUTERS else r,
            *(cell(result["methods"].get(f"{m}: {r}")) for m in models),
        ]
        for r in routers
    ]
    return markdown.table(["", *models], rows)


def cost_table(cells: Mapping[str, Sequence[Finished]]) -> str:
    """A row a cell: what a run cost in training, mean over its seeds; the evaluation's cloud calls
    are not in it.
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
    rows = []
    for name, runs in cells.items():
        total = lambda key, runs=runs: np.mean([sum(row[key] for row in run.rows) for run in runs])  # noqa: E731
        rows.append(
            [
                name,
                f"{np.mean([len(run.rows) for run in runs]):.0f}",
                f"{total('seconds') / 60:.1f}",
                f"{total('tokens') / 1e6:.2f} M",
                f"{total('cloud_bought'):.0f}",
                f"{np.mean([run.report['filter_dropped'] for run in runs]):.1%}",
                f"{np.mean([row['call_rate'] for run in runs for row in run.rows[-10:]]):.1%}",
            ]
        )
    return markdown.table(head, rows)


def _models(result: dict) -> list[str]:
    """The models with a margin."""
    return [name for name in result["models"] if f"{name}: margin" in result["methods"]]


def _three(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def served(
    sweep: Sweep, job: Job, changes: Mapping[str, Any], table: Records, store: pathlib.Path
) -> Records:
    """A run's test records with the answers of another cloud: what its margins, which know no
    cloud, are worth with that one.
    """
    config = sweeps.config_of(sweep, {**job.changes, **changes})
    task, cloud = experiment.task_and_cloud(config, store)
    examples = {e.id: e for e in task.load("test")}
    rows = evaluation.cloud_answers(task, cloud, [examples[key] for key in table["id"]])
    return records.check(
        table | {column: [row[column] for row in rows] for column in rows[0]}, str(job.folder)
    )


def models(
    sweep: Sweep, done: Mapping[str, Sequence[Job]], store: pathlib.Path
) -> dict[str, comparison.Model]:
    """The records of finished runs by cell, after those of their start; with `sweep.serve`, under
    those clouds as well.

    store: SQLite file of the other clouds' answers.
    """
    starts = [job.folder / "before.parquet" for of in done.values() for job in of]
    start = next((path for path in starts if path.exists()), None)
    found = {"start": comparison.Model([records.read(start)], [None])} if start else {}
    for name, found_jobs in done.items():
        fits = [job.folder / "fit.parquet" for job in found_jobs]
        found[name] = comparison.Model(
            [records.read(job.folder / "after.parquet") for job in found_jobs],
            [records.read(fit) if fit.exists() else None for fit in fits],
        )
        for cloud, changes in sweep.serve.items():
            pairs = zip(found_jobs, found[name].seeds, strict=True)
            tables = [served(sweep, job, changes, table, store) for job, table in pairs]
            found[f"{name}, served by {cloud}"] = comparison.Model(tables, found[name].fit_on)
    return found


def write_report(sweep: Sweep, out: pathlib.Path, path: pathlib.Path) -> bool:
    """Writes the report of what is finished; False where nothing is."""
    if not (done := sweeps.finished(sweep, out)):
        return False
    result = comparison.compare(
        models(sweep, done, out / "serve.sqlite"), reference=f"{next(iter(done))}: margin"
    )
    print(comparison.write(out, result))
    runs = {name: [read(job.folder) for job in found] for name, found in done.items()}
    write(out, sweep.about, f"python -m collab_jax.sweep --config {path} --out {out}", result, runs)
    print(f"report: {out / 'report.html'}")
    return True


KEPT = ("report.json", "config.json", "metrics.jsonl")  # of a run, when it is published


TOP = (
    "report.md",
    "report.html",
    "comparison.md",
    "comparison.json",
    "frontier.png",
    "training.png",
)


HEAVY = ("margins", "text", "natural_text")  # columns


def publish(sweep: Sweep, out: pathlib.Path, to: pathlib.Path) -> None:
    """Copies the report of `out`, and of each finished run what it was made of, to `to`."""
    for i, job in enumerate(job for job in sweeps.jobs(sweep, out) if job.done):
        target = to / job.folder.relative_to(out)
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(job.folder / name, target / name)
        for name in ("before", "after", "fit"):
            source = job.folder / f"{name}.parquet"
            if source.exists() and (name != "before" or i == 0):
                drop = HEAVY[:1] if i == 0 and name == "after" else HEAVY
                table = records.read(source)
                records.write(
                    target / source.name,
                    {c: values for c, values in table.items() if c not in drop},
                )
    for name in TOP:
        shutil.copy(out / name, to / name)
