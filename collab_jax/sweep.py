"""Sweeps: many training runs from one file, one after the other; a finished run is kept and never
repeated.

    python -m collab_jax.sweep --config configs/sweeps/paper_table.py --out runs/paper_table

Every cell runs with each of its seeds in OUT/CELL/seed-S, all cells' first seeds before any second,
so that a sweep that is stopped has a report of what there is. The same command goes on, also in the
middle of a run. A run that fails is told at the end, and the others go on. Then OUT has the report
of all cells (report.html, report.md) and their comparison (compare.md, compare.json).

`--publish DIR` copies what these are made of to DIR, without the heavy parts (checkpoints, margin
traces, cloud answers, all texts but those that the first run wrote at its end): small enough to
keep in a repository, and a sweep goes on from such a folder too.
"""

import argparse
import itertools
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from collab_jax import compare, evaluate, records
from collab_jax.records import Records
from collab_jax.reports import sweep as sweep_report
from collab_jax.rl import experiment
from collab_jax.rl.experiment import differences
from collab_jax.runtime.errors import UserError, run_command

ROOT = pathlib.Path(__file__).parents[1]
# First parts of the keys that the evaluation before training depends on: runs that agree in these
# share before.parquet.
START = {
    "model",
    "text",
    "task",
    "cloud",
    "eval",
    "decode",
    "prompt_length",
    "max_new_tokens",
    "cpu_devices",
}


class Cell(NamedTuple):
    """One row of a sweep's table: what differs from the sweep's config, by key, and with which
    seeds it runs.
    """

    overrides: Mapping[str, Any]
    seeds: Sequence[int]


class Sweep(NamedTuple):
    """What `get_sweep()` of a sweep's file returns. config: an experiment's file, relative to the
    repository's root.
    """

    config: str
    overrides: Mapping[str, Any]  # of every cell
    cells: Mapping[
        str, Cell
    ]  # the first that has finished runs is what the others are compared with
    serve: Mapping[
        str, Mapping[str, Any]
    ] = {}  # by name, keys of another cloud that every cell is also measured with
    about: str = ""  # Markdown; `load` takes it from the file's docstring


class Job(NamedTuple):
    """One training run."""

    cell: str
    folder: pathlib.Path
    changes: dict[str, Any]  # by key of the config

    @property
    def done(self) -> bool:
        return (self.folder / "report.json").exists()

    @property
    def start(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in self.changes.items()
            if k.split(".")[0] in START and k != "eval.fit_prompts"
        }


def load(path: pathlib.Path) -> Sweep:
    """The sweep of a file. Raises UserError where it holds none, or one that cannot run."""
    try:
        module = runpy.run_path(str(path))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if "get_sweep" not in module:
        raise UserError(f"{path} has no get_sweep(): see configs/sweeps")
    sweep = module["get_sweep"]()
    if not sweep.cells:
        raise UserError(f"{path} has no cells")
    if not (ROOT / sweep.config).exists():
        raise UserError(f"{path}: there is no file {sweep.config} in {ROOT}")
    for name, cell in sweep.cells.items():
        if not cell.seeds or len(set(cell.seeds)) < len(cell.seeds):
            raise UserError(f"{path}: cell {name!r} needs seeds, each once")
        if pathlib.Path(name).name != name or name == "start" or ": " in name:
            raise UserError(
                f"{path}: cell {name!r} must be usable as a folder's name, other than 'start', without ': '"
            )
        for changes in ({}, *sweep.serve.values()):
            config_of(sweep, {**sweep.overrides, **cell.overrides, **changes})
    return sweep._replace(about=module.get("__doc__") or "")


def jobs(sweep: Sweep, out: pathlib.Path) -> list[Job]:
    """The runs in their order."""
    found = []
    for i in range(max(len(cell.seeds) for cell in sweep.cells.values())):
        for name, cell in sweep.cells.items():
            if i < len(cell.seeds):
                changes = {**sweep.overrides, **cell.overrides, "seed": cell.seeds[i]}
                found.append(Job(name, out / name / f"seed-{cell.seeds[i]}", changes))
    return found


def command(sweep: Sweep, job: Job) -> list[str]:
    """The command line of a run."""
    flags = [f"--config.{key}={value}" for key, value in job.changes.items()]
    config = str(ROOT / sweep.config)
    return [
        sys.executable,
        "-m",
        "collab_jax.train",
        "--config",
        config,
        "--workdir",
        str(job.folder),
        *flags,
    ]


def share_start(job: Job, others: Sequence[Job]) -> None:
    """Spares a run the evaluation of its start where a finished one had the same."""
    mine = job.folder / "before.parquet"
    theirs = [
        other.folder / "before.parquet"
        for other in others
        if other.done and other.start == job.start
    ]
    same = [path for path in theirs if path.exists()]  # a published sweep has the first only
    if same and not mine.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(same[0], mine.with_suffix(".tmp"))
        mine.with_suffix(".tmp").replace(mine)


def check_same(sweep: Sweep, job: Job) -> None:
    """Raises UserError, with the difference, where a finished run was of other settings than the
    sweep has now.

    A key that the run's program did not have yet is no difference.
    """
    file = job.folder / "config.json"
    if not file.exists():
        raise UserError(
            f"{job.folder} has a report, but no config.json: restore it, or move that folder away"
        )
    if differing := differences(file, config_of(sweep, job.changes), all_keys=False):
        raise UserError(
            f"{job.folder} holds a run with other settings ({differing}): use the same settings or another --out"
        )


class Stop(Exception):
    """SIGTERM or Ctrl-C."""


def run(sweep: Sweep, out: pathlib.Path) -> list[Job]:
    """Runs what is not done; returns what failed. Raises Stop once the run that was going on has
    saved itself.
    """
    todo, failed = jobs(sweep, out), []
    for number, job in enumerate(todo, 1):
        if job.done:
            check_same(sweep, job)
            continue
        share_start(job, todo)
        log, started = job.folder.with_suffix(".log"), time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{number} of {len(todo)}: {job.folder} ", end="", flush=True)
        with log.open("a") as file:
            child = subprocess.Popen(
                command(sweep, job), stdout=file, stderr=file, start_new_session=True
            )
            try:
                status = child.wait()
            except Stop:
                child.terminate()  # it saves, and the same command goes on from there
                child.wait()
                raise
        if status or not job.done:
            failed.append(job)
            print(f"failed with status {status}, see {log}", flush=True)
        else:
            print(f"{time.monotonic() - started:.0f} s", flush=True)
    return failed


def finished(sweep: Sweep, out: pathlib.Path) -> dict[str, list[Job]]:
    """The finished runs by cell: only whole rounds of seeds (of the first one, what there is), so
    that cells have the same ones.
    """
    cells = {name: [job for job in jobs(sweep, out) if job.cell == name] for name in sweep.cells}
    whole = [len(list(itertools.takewhile(lambda job: job.done, of))) for of in cells.values()]
    begun = [count for count, of in zip(whole, cells.values(), strict=True) if count < len(of)]
    rounds = max(min(begun, default=sys.maxsize), 1)
    found = {name: [job for job in of[:rounds] if job.done] for name, of in cells.items()}
    return {name: done for name, done in found.items() if done}


def config_of(sweep: Sweep, changes: Mapping[str, Any]) -> ConfigDict:
    """The config of a run with these changes. Raises UserError for a key that there is not, or a
    value of another type.
    """
    config = runpy.run_path(str(ROOT / sweep.config))["get_config"]().lock()
    try:
        config.update_from_flattened_dict(changes)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{sweep.config} cannot have {dict(changes)}: {' '.join(str(error).split())}"
        ) from None
    return config


def served(
    sweep: Sweep, job: Job, changes: Mapping[str, Any], table: Records, store: pathlib.Path
) -> Records:
    """A run's test records with the answers of another cloud: what its margins, which know no
    cloud, are worth with that one.
    """
    config = config_of(sweep, {**job.changes, **changes})
    task, cloud = experiment.task_and_cloud(config, store)
    examples = {e.id: e for e in task.load("test")}
    rows = evaluate.cloud_answers(task, cloud, [examples[key] for key in table["id"]])
    return records.check(
        table | {column: [row[column] for row in rows] for column in rows[0]}, str(job.folder)
    )


def models(
    sweep: Sweep, done: Mapping[str, Sequence[Job]], store: pathlib.Path
) -> dict[str, compare.Model]:
    """The records of finished runs by cell, after those of their start; with `sweep.serve`, under
    those clouds as well.

    store: SQLite file of the other clouds' answers.
    """
    starts = [job.folder / "before.parquet" for of in done.values() for job in of]
    start = next((path for path in starts if path.exists()), None)
    found = {"start": compare.Model([records.read(start)], [None])} if start else {}
    for name, found_jobs in done.items():
        fits = [job.folder / "fit.parquet" for job in found_jobs]
        found[name] = compare.Model(
            [records.read(job.folder / "after.parquet") for job in found_jobs],
            [records.read(fit) if fit.exists() else None for fit in fits],
        )
        for cloud, changes in sweep.serve.items():
            pairs = zip(found_jobs, found[name].seeds, strict=True)
            tables = [served(sweep, job, changes, table, store) for job, table in pairs]
            found[f"{name}, served by {cloud}"] = compare.Model(tables, found[name].fit_on)
    return found


def write_report(sweep: Sweep, out: pathlib.Path, path: pathlib.Path) -> bool:
    """Writes the report of what is finished; False where nothing is."""
    if not (done := finished(sweep, out)):
        return False
    result = compare.compare(
        models(sweep, done, out / "serve.sqlite"), reference=f"{next(iter(done))}: margin"
    )
    print(compare.write(out, result))
    runs = {name: [sweep_report.read(job.folder) for job in found] for name, found in done.items()}
    sweep_report.write(
        out, sweep.about, f"python -m collab_jax.sweep --config {path} --out {out}", result, runs
    )
    print(f"report: {out / 'report.html'}")
    return True


KEPT = ("report.json", "config.json", "metrics.jsonl")  # of a run, when it is published
TOP = ("report.md", "report.html", "compare.md", "compare.json", "frontier.png", "training.png")
HEAVY = ("margins", "text", "natural_text")  # columns


def publish(sweep: Sweep, out: pathlib.Path, to: pathlib.Path) -> None:
    """Copies the report of `out`, and of each finished run what it was made of, to `to`."""
    for i, job in enumerate(job for job in jobs(sweep, out) if job.done):
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


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.sweep", description="Many training runs from one file."
    )
    parser.add_argument(
        "--config", type=pathlib.Path, required=True, help="a file of configs/sweeps"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--publish", type=pathlib.Path, help="folder for the report and what it is made of"
    )
    args = parser.parse_args(argv)

    def stop(number, frame):
        raise Stop

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    sweep = load(args.config)
    for folder, flag in ((args.out, "--out"), (args.publish or args.out, "--publish")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror}): choose another {flag}"
            ) from None
    if args.publish and args.publish.resolve() == args.out.resolve():
        raise UserError(f"--publish {args.publish} is --out itself: choose another folder")
    try:
        failed = run(sweep, args.out)
    except Stop:
        failed = []
        print("stopped and saved; the same command goes on")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if write_report(sweep, args.out, args.config) and args.publish:
        publish(sweep, args.out, args.publish)
    return int(bool(failed))


if __name__ == "__main__":
    run_command(main)
