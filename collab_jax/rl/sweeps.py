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

from collab_jax.rl import search
from collab_jax.rl.claims import differences
from collab_jax.rl.search import Search
from collab_jax.runtime import files, process
from collab_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SEARCH = "search"  # the folder of the runs that a search makes
# First parts of the keys that the evaluation before training depends on: runs that agree in these
# share before.parquet.
START_KEYS = {
    "model",
    "lora",
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
    """One row of a sweep's table: how it differs from the sweep's config, and its seeds."""

    overrides: Mapping[str, Any]  # by key of the config
    seeds: Sequence[int]
    like: str = ""  # the cell whose search is this one's too; "": it has its own, if there is one
    router: str = ""  # what decides in its search: see search.outcome
    values: Sequence[float] = ()  # that its search tries; (): those of the search


class Sweep(NamedTuple):
    """What `get_sweep()` of a sweep's file returns."""

    config: str  # an experiment's file, relative to the repository's root
    overrides: Mapping[str, Any]  # of every cell
    cells: Mapping[str, Cell]  # all are compared with the first one that has finished runs
    serve: Mapping[str, Mapping[str, Any]] = {}  # other clouds to measure with: name -> their keys
    # whether records are published with their prompts: no, where the data set has to be fetched
    prompts: bool = True
    search: Search | None = None  # of each cell's best value of one setting, before its runs
    about: str = ""  # Markdown; `load` takes it from the file's docstring


class Job(NamedTuple):
    """One training run."""

    cell: str
    folder: pathlib.Path
    changes: dict[str, Any]  # by key of the config

    @property
    def done(self) -> bool:
        """Whether the run has its report, which it writes last."""
        return (self.folder / "report.json").exists()

    @property
    def start(self) -> dict[str, Any]:
        """The changes that the evaluation before training depends on."""
        return {
            key: value
            for key, value in self.changes.items()
            if key.split(".")[0] in START_KEYS and key != "eval.fit_prompts"
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
        if pathlib.Path(name).name != name or name in ("start", SEARCH) or ": " in name:
            raise UserError(
                f"{path}: cell {name!r} must be usable as a folder's name, other than 'start' and "
                f"{SEARCH!r}, without ': '"
            )
        if cell.like and (cell.like not in sweep.cells or sweep.cells[cell.like].like):
            raise UserError(
                f"{path}: cell {name!r} is like {cell.like!r}, which is no cell with its own search"
            )
        if cell.values and (cell.like or not sweep.search):
            raise UserError(f"{path}: cell {name!r} has values, but no search of its own")
        searched = [{sweep.search.key: v} for v in values_of(sweep, cell)] if sweep.search else [{}]
        for changes in (*searched, *sweep.serve.values()):
            config_of(sweep, {**sweep.overrides, **cell.overrides, **changes})
    return sweep._replace(about=module.get("__doc__") or "")


def values_of(sweep: Sweep, cell: Cell) -> Sequence[float]:
    """The values that the search of a cell tries."""
    assert sweep.search
    return cell.values or sweep.search.values


def jobs(sweep: Sweep, out: pathlib.Path) -> list[Job]:
    """The runs in their order: every cell's first seed, then every cell's second, and so on.

    Where there is a search, those of the cells whose value is chosen.
    """
    found, ordered = search.read(out), []
    for i in range(max(len(cell.seeds) for cell in sweep.cells.values())):
        for name, cell in sweep.cells.items():
            if i >= len(cell.seeds):
                continue
            changes = {**sweep.overrides, **cell.overrides}
            if sweep.search:
                searched = found.get(cell.like or name, {})
                if "chosen" not in searched:
                    continue
                changes[sweep.search.key] = searched["chosen"]
            changes["seed"] = cell.seeds[i]
            ordered.append(Job(name, out / name / f"seed-{cell.seeds[i]}", changes))
    return ordered


def search_jobs(sweep: Sweep, out: pathlib.Path, cell: str, value: float) -> list[Job]:
    """The runs that try a value for a cell: on validation, and without recorded routers."""
    assert sweep.search
    fixed = {
        **sweep.overrides,
        **sweep.cells[cell].overrides,
        "eval.split": "validation",
        "eval.fit_prompts": 0,
        "routers.record": (),
        sweep.search.key: value,
    }
    folder = out / SEARCH / cell / f"{value:g}"
    return [
        Job(cell, folder / f"seed-{seed}", {**fixed, "seed": seed}) for seed in sweep.search.seeds
    ]


class Here(NamedTuple):
    """This process, as one of those that run a sweep together, one on each host."""

    host: int = 0  # the first writes what is not a run's own
    flags: tuple[str, ...] = ()  # by which a run's hosts find each other; none where it is alone

    def all_say(self, what: str, said: Any) -> list[Any]:
        """What the process on every host says (`hosts.gathered`); this one says `said`."""
        if not self.flags:
            return [said]
        from collab_jax.runtime import hosts  # jax would take the devices that runs need

        return hosts.gathered(what, said, hosts.FOREVER)


ALONE = Here()


def command(sweep: Sweep, job: Job, here: Here = ALONE) -> list[str]:
    """The command line of a run."""
    program = [sys.executable, "-m", "collab_jax.train"]
    places = ["--config", str(ROOT / sweep.config), "--workdir", str(job.folder)]
    settings = [f"--config.{key}={value}" for key, value in job.changes.items()]
    return [*program, *places, *here.flags, *settings]


def share_start(job: Job, others: Sequence[Job]) -> None:
    """Copies before.parquet from a finished run with the same start, where `job` has none yet."""
    target = job.folder / "before.parquet"
    candidates = [
        other.folder / "before.parquet"
        for other in others
        if other.done and other.start == job.start
    ]
    source = next((path for path in candidates if path.exists()), None)
    if source and not target.exists():  # a published sweep has the file of its first run only
        job.folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as scratch:
            shutil.copy(source, scratch)


def check_same(sweep: Sweep, job: Job) -> None:
    """Raises UserError where a finished run had other settings than the sweep has now.

    The message names the difference. A key that the program of that run did not have yet is no
    difference.
    """
    file = job.folder / "config.json"
    if not file.exists():
        raise UserError(
            f"{job.folder} has a report, but no config.json: restore it, or move that folder away"
        )
    if differing := differences(file, config_of(sweep, job.changes), all_keys=False):
        raise UserError(
            f"{job.folder} holds a run with other settings ({differing}): use the same settings or "
            "another --out"
        )


class SweepStopped(Exception):
    """SIGTERM or Ctrl-C."""


def run(sweep: Sweep, out: pathlib.Path, here: Here = ALONE) -> list[Job]:
    """Runs what is not done, the search first; returns what failed.

    Of several hosts all do the same, and take part in every run.
    Raises SweepStopped, once the run in progress has saved itself.
    """
    failed = run_search(sweep, out, here) if sweep.search else []
    here.all_say("that the search is written", None)
    all_jobs = jobs(sweep, out)
    for number, job in enumerate(all_jobs, 1):
        if not _is_done_after(sweep, job, all_jobs, f"{number} of {len(all_jobs)}", here):
            failed.append(job)
    return failed


def run_search(sweep: Sweep, out: pathlib.Path, here: Here) -> list[Job]:
    """Chooses the value of each cell with a search that has none yet; returns what failed.

    A cell of which a run fails is left without a value, and so without runs.
    """
    assert sweep.search
    failed, found = [], here.all_say("what was found", search.read(out))[0]
    everywhere = [
        job
        for cell in found.keys() & sweep.cells.keys()
        for value in search.tried(found[cell])
        for job in search_jobs(sweep, out, cell, value)
    ]
    for job in everywhere:
        if job.done:  # what was found for other settings says nothing
            check_same(sweep, job)
    for cell in (name for name, cell in sweep.cells.items() if not cell.like):
        while "chosen" not in found.get(cell, {}):
            tried = search.tried(found.get(cell) or {"tried": []})
            value = search.next_value(values_of(sweep, sweep.cells[cell]), tried)
            if value is None:
                found[cell]["chosen"] = search.best_value(tried)
                _write_found(out, found, here)
                break
            new = search_jobs(sweep, out, cell, value)
            everywhere.extend(new)
            label = f"search, {value:g}"
            broken = [j for j in new if not _is_done_after(sweep, j, everywhere, label, here)]
            if broken:
                failed += broken
                break
            router = sweep.cells[cell].router
            of_seeds = [search.outcome(sweep.search, job.folder, router) for job in new]
            found[cell] = search.with_row(found.get(cell), value, of_seeds)
            _write_found(out, found, here)
    return failed


def _write_found(out: pathlib.Path, found: dict[str, search.Found], here: Here) -> None:
    if not here.host:
        search.write(out, found)


def _is_done_after(sweep: Sweep, job: Job, others: Sequence[Job], label: str, here: Here) -> bool:
    """Runs a job that is not done; whether it is, then.

    others: runs that may have the evaluation before training already. Raises SweepStopped, once the
    run has saved itself, on this host or, where that was asked, on another one.
    """
    if here.all_say(f"whether {job.folder} is done", job.done)[0]:
        check_same(sweep, job)
        return True
    if not here.host:
        share_start(job, others)
    suffix = f".host-{here.host}.log" if here.host else ".log"
    log, started = job.folder.with_suffix(suffix), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{label}: {job.folder} ", end="", flush=True)
    with log.open("a") as file:
        child = subprocess.Popen(
            command(sweep, job, here),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=process.stop_with_parent,
        )
        try:
            status = child.wait()
        except SweepStopped:
            child.terminate()  # it saves, and the same command goes on from there
            child.wait()
            status = process.STOPPED
    statuses = here.all_say(f"how {job.folder} ended", status)
    if process.STOPPED in statuses:
        raise SweepStopped
    status = next(filter(None, statuses), 0)
    if status or not here.all_say(f"whether {job.folder} has a report", job.done)[0]:
        print(f"failed with status {status}, see {log}", flush=True)
        return False
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return True


def finished(sweep: Sweep, out: pathlib.Path) -> dict[str, list[Job]]:
    """The finished runs by cell, in whole rounds of seeds, so that cells have the same ones.

    Of the first round, every finished run counts.
    """
    cells = {name: [job for job in jobs(sweep, out) if job.cell == name] for name in sweep.cells}
    begun = []  # of each cell with seeds left: how many of its first seeds are done
    for runs in cells.values():
        done = len(list(itertools.takewhile(lambda job: job.done, runs)))
        if done < len(runs):
            begun.append(done)
    rounds = max(min(begun, default=sys.maxsize), 1)
    done_jobs = {name: [job for job in runs[:rounds] if job.done] for name, runs in cells.items()}
    return {name: done for name, done in done_jobs.items() if done}


def config_of(sweep: Sweep, changes: Mapping[str, Any]) -> ConfigDict:
    """The config of a run with these changes.

    Raises UserError for an unknown key, or a value of another type.
    """
    config = runpy.run_path(str(ROOT / sweep.config))["get_config"]().lock()
    try:
        config.update_from_flattened_dict(changes)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{sweep.config} cannot have {dict(changes)}: {' '.join(str(error).split())}"
        ) from None
    return config
