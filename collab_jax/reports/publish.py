"""A sweep made small enough to keep in a repository, with all that its report is made of.

A sweep goes on from a published folder as from its own: the command recognises the finished runs,
and remakes with the same figures what is not kept (report.html, compare.html, SVG files).
"""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from collab_jax import records
from collab_jax.reports import comparison
from collab_jax.rl import sweeps
from collab_jax.rl.sweeps import Sweep
from collab_jax.runtime import files, metrics

COLOURS = 32  # of a published PNG: enough for lines and bands, at a quarter of the bytes
DIGITS = 6  # after the point, of published metrics and of the comparison's figures
# Columns of metrics.jsonl that the training figure and the table of its cost read.
METRICS = ("step", "local_accuracy", "call_rate", "reward", "tokens", "cloud_bought", "seconds")
# Of report.json: what it takes to know the run and its cost. Its other figures are of its records.
REPORT = ("machine", "budget", "steps", "seconds", "filter_dropped", "filter", "cloud")
# Columns of records that are most of a table's bytes.
TEXTS = {"margins", "text", "natural_text", "prompt"}
# Columns that are read only where `compare` is given prices, or in the report of a single run; so
# are those of what routers spent, tokens_NAME.
DETAILS = {
    "tokens",
    "cloud_tokens",
    "cloud_usd",
    "natural_tokens",
    "natural_completed",
    "natural_ended",
}


def publish(sweep: Sweep, out: pathlib.Path, to: pathlib.Path) -> None:
    """Writes to `to` the report of `out`, and of each finished run what that report is made of.

    Each prompt is kept once, with the first run: `reports.sweep.models` gives it to the other
    tables, by id. So are the start's records, which runs that begin there share.
    """
    done = [job.folder for job in sweeps.jobs(sweep, out) if job.done]
    fitted = [folder for folder in done if (folder / "fit.parquet").exists()]
    for folder in done:
        target = to / folder.relative_to(out)
        target.mkdir(parents=True, exist_ok=True)
        first = folder == done[0]
        if first:
            _copy_table(folder / "before.parquet", target, texts=(), details=True)
        shown = ("prompt", "natural_text") if first else ()
        _copy_table(folder / "after.parquet", target, texts=shown, details=first)
        prompts = ("prompt",) if folder in fitted[:1] else ()
        _copy_table(folder / "fit.parquet", target, texts=prompts, details=False)
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
    for name in ("frontier.png", "training.png"):
        with Image.open(out / name) as image, files.replacing(to / name) as scratch:
            small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(scratch, "PNG", optimize=True)


def _copy_table(path: pathlib.Path, to: pathlib.Path, texts: Sequence[str], details: bool) -> None:
    """Copies a table, if it is there, in the narrowest types: of TEXTS, only the columns `texts`.

    details: whether to keep DETAILS.
    """
    if not path.exists():
        return
    kept = {}
    for column, values in records.read(path).items():
        is_detail = column in DETAILS or column.startswith("tokens_")
        if (column not in TEXTS or column in texts) and (details or not is_detail):
            kept[column] = _narrow(values)
    records.write(to / path.name, kept)


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
