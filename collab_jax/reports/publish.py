"""A sweep made small enough to keep in a repository, with all that its report is made of.

A sweep goes on from a published folder as from its own: the command recognises the finished runs,
and remakes with the same figures what is not kept (report.html, compare.html, SVG files).
"""

import json
import pathlib
import shutil
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from PIL import Image

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports import comparison
from collab_jax.rl import search, sweeps
from collab_jax.rl.sweeps import Sweep
from collab_jax.runtime import files, metrics

COLOURS = 128  # of a published PNG: enough for lines and bands, at a quarter of the bytes
DIGITS = 6  # after the point, of published metrics and of the comparison's figures
# Columns of metrics.jsonl that the training figure and the table of its cost read.
METRICS = ("step", "local_accuracy", "call_rate", "reward", "tokens", "cloud_bought", "seconds")
# Of report.json: what it takes to know the run and its cost. Its other figures are of its records.
REPORT = ("machine", "budget", "steps", "seconds", "filter_dropped", "filter", "cloud")
# The columns that are most of a table's bytes, and that no report shows. Of a model's responses the
# text is kept, so that anybody can add a router by replay; of those that routers are fitted on not.
TRACE, TEXT = "margins", "text"
# Columns that are read only where `compare` is given prices, or in the report of a single run; so
# are those of what routers spent, tokens_NAME.
DETAILS = {
    "natural_text",
    "tokens",
    "cloud_tokens",
    "cloud_usd",
    "natural_tokens",
    "natural_completed",
    "natural_ended",
}


def publish(sweep: Sweep, out: pathlib.Path, to: pathlib.Path) -> None:
    """Writes to `to` the report of `out`, and of each finished run what that report is made of.

    The first run has its natural responses and the start's records; runs that begin there share
    them. Each prompt is kept once: `reports.sweep.models` gives it to the other tables, by id; none
    is kept where the data set is not to be copied (`Sweep.prompts`).
    """
    done = [job.folder for job in sweeps.jobs(sweep, out) if job.done]
    with_prompt: set[str] = set()  # ids
    for folder in done:
        target = to / folder.relative_to(out)
        target.mkdir(parents=True, exist_ok=True)
        first = folder == done[0]
        for name in ("after", "before", "fit") if first else ("after", "fit"):
            if (folder / f"{name}.parquet").exists():
                table = records.read(folder / f"{name}.parquet")
                kept = _without_prompts(table, with_prompt if sweep.prompts else set(table["id"]))
                with_prompt |= set(kept["id"]) if "prompt" in kept else set()
                if name == "fit":
                    kept.pop(TEXT, None)
                records.write(target / f"{name}.parquet", _slim(kept, first and name != "fit"))
        rows = [_only(METRICS, row) for row in metrics.read(folder / "metrics.jsonl")]
        metrics.write_packed(target / "metrics.jsonl", _rounded(rows))
        shutil.copy(folder / "config.json", target)
        report = json.loads((folder / "report.json").read_text())
        # The last file: a run that has it is finished.
        _write_json(target / "report.json", _only(REPORT, report))
    _publish_comparison(out, to)


def _publish_comparison(out: pathlib.Path, to: pathlib.Path) -> None:
    """Writes the report's files, with the frontiers of those methods that its figure shows."""
    result = json.loads((out / "compare.json").read_text())
    for name, method in result["methods"].items():
        if not comparison.is_drawn(name, result):
            method.pop("frontier", None)
    _write_json(to / "compare.json", _rounded(result))
    for name in ("report.md", "compare.md"):
        shutil.copy(out / name, to)
    if (out / search.FILE).exists():
        shutil.copy(out / search.FILE, to)
    for name in ("frontier.png", "training.png"):
        with Image.open(out / name) as image, files.replacing(to / name) as scratch:
            # By octree: a median cut makes one colour of similar lines, on so much white.
            small = image.convert("RGB").quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
            small.save(scratch, "PNG", optimize=True)


def _without_prompts(table: Records, ids: Set[str]) -> Records:
    """The table with "" for the prompts of `ids`, and without the column where none is left."""
    if "prompt" not in table:
        return table
    prompts = [
        "" if key in ids else prompt
        for key, prompt in zip(table["id"], table["prompt"], strict=True)
    ]
    others = {column: values for column, values in table.items() if column != "prompt"}
    return others | {"prompt": np.array(prompts, object)} if any(prompts) else others


def _slim(table: Records, details: bool) -> Records:
    """The table in the narrowest types, without TRACE, and without DETAILS unless asked for."""
    return {
        column: _narrow(values)
        for column, values in table.items()
        if column != TRACE
        and (details or column not in DETAILS and not column.startswith("tokens_"))
    }


def _narrow(column: np.ndarray) -> np.ndarray:
    """The column as float32 where that loses nothing; else as it is."""
    if column.dtype != np.float64:
        return column
    narrow = column.astype(np.float32)
    return narrow if np.array_equal(narrow.astype(np.float64), column) else column


def _only(keys: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}


def _rounded(value: Any) -> Any:
    """The value with every number that has a point rounded to DIGITS after it."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(value, separators=(",", ":")) + "\n")
