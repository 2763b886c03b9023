"""A sweep made small enough to keep in a repository, with all that its report is made of.

A sweep goes on from a published folder as from its own: the command recognises the finished runs,
and remakes with the same figures what is not kept (report.html, compare.html, SVG files).
"""

import json
import pathlib
import shutil
from collections.abc import Set
from typing import Any

import numpy as np
from PIL import Image

from collab_jax import records
from collab_jax.reports import comparison
from collab_jax.rl import sweeps
from collab_jax.rl.sweeps import Sweep
from collab_jax.runtime import files, metrics

COLOURS = 64  # of a published PNG: enough for lines and bands, at a quarter of the bytes
# Columns of metrics.jsonl that the training figure and the table of its cost read.
METRICS = ("step", "local_accuracy", "call_rate", "reward", "tokens", "cloud_bought", "seconds")
# Columns of records that are left out: texts and traces are most of a table's bytes, and the others
# are read only where `compare` is given prices, or in the report of a single run.
TEXTS = {"margins", "text", "natural_text", "prompt"}
DETAILS = {
    "tokens",
    "cloud_tokens",
    "cloud_usd",
    "natural_tokens",
    "natural_completed",
    "natural_ended",
}


def publish(sweep: Sweep, out: pathlib.Path, to: pathlib.Path) -> None:
    """Writes to `to` the report of `out`, and of each finished run what that report is made of."""
    done = [job.folder for job in sweeps.jobs(sweep, out) if job.done]
    fitted = [folder for folder in done if (folder / "fit.parquet").exists()]
    for folder in done:
        target = to / folder.relative_to(out)
        target.mkdir(parents=True, exist_ok=True)
        # Each prompt is kept once: `reports.sweep.models` gives it to the other tables, by id.
        first, first_fitted = folder == done[0], folder in fitted[:1]
        _copy_table(folder, target, "after", {"margins", "text"} if first else TEXTS | DETAILS)
        if first:  # of all runs that start from the same model
            _copy_table(folder, target, "before", TEXTS)
        _copy_table(
            folder, target, "fit", (TEXTS - {"prompt"} if first_fitted else TEXTS) | DETAILS
        )
        rows = metrics.read(folder / "metrics.jsonl")
        metrics.write_packed(target / "metrics.jsonl", [_short(row) for row in rows])
        shutil.copy(folder / "config.json", target)
        report = json.loads((folder / "report.json").read_text())
        report.pop("config", None)  # stands in config.json
        _write_json(target / "report.json", report)  # the last file: a run that has it is finished
    _publish_comparison(out, to)


def _publish_comparison(out: pathlib.Path, to: pathlib.Path) -> None:
    """Writes the report's files, with the frontiers of those methods that its figure shows."""
    result = json.loads((out / "compare.json").read_text())
    for name, method in result["methods"].items():
        if not comparison.is_drawn(name, result):
            method.pop("frontier", None)
    _write_json(to / "compare.json", result)
    for name in ("report.md", "compare.md"):
        shutil.copy(out / name, to)
    for name in ("frontier.png", "training.png"):
        with Image.open(out / name) as image, files.replacing(to / name) as scratch:
            small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(scratch, "PNG", optimize=True)


def _copy_table(source: pathlib.Path, to: pathlib.Path, name: str, left_out: Set[str]) -> None:
    """Copies NAME.parquet, if there is one, without some columns and in the narrowest types."""
    path = source / f"{name}.parquet"
    if path.exists():
        table = records.read(path)
        kept = {column: _narrow(v) for column, v in table.items() if column not in left_out}
        records.write(to / path.name, kept)


def _narrow(column: np.ndarray) -> np.ndarray:
    """The column as float32 where that loses nothing; else as it is."""
    if column.dtype != np.float64:
        return column
    narrow = column.astype(np.float32)
    return narrow if np.array_equal(narrow.astype(np.float64), column) else column


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with the columns METRICS, to six digits after the point."""
    return {
        key: round(row[key], 6) if isinstance(row[key], float) else row[key]
        for key in METRICS
        if key in row
    }


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(value, separators=(",", ":")) + "\n")
