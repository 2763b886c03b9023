"""Sweeps: many training runs from one file, one after the other."""

import itertools
import pathlib
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from collab_jax.rl.experiment import differences
from collab_jax.runtime.errors import UserError

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


class SweepStopped(Exception):
    """SIGTERM or Ctrl-C."""


def run(sweep: Sweep, out: pathlib.Path) -> list[Job]:
    """Runs what is not done; returns what failed. Raises SweepStopped once the run that was going on has
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
            except SweepStopped:
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
