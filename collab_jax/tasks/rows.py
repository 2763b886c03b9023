"""Benchmark rows from JSON lines, plain or gzip-compressed: one object a line with `id`, `problem`, `answer`."""

import gzip
import json
import pathlib
from collections.abc import Sequence

from collab_jax.tasks.base import TaskError


def read(folder: pathlib.Path, name: str, fields: Sequence[str] = ()) -> list[dict]:
    """The rows of NAME.jsonl or NAME.jsonl.gz in `folder`, each with these fields besides id, problem and answer.

    Raises TaskError, naming file and line, for what is missing, empty, twice there, or no JSON.
    """
    places = [folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise TaskError(
            f"no {name}.jsonl or {name}.jsonl.gz in {folder}: set config.task.data_dir to the folder that has it"
        )
    rows, ids = [], set()
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = _row(path, number, line, ("id", "problem", "answer", *fields))
                if row["id"] in ids:
                    raise TaskError(f"{path}, line {number}: the id {row['id']!r} is there twice")
                ids.add(row["id"])
                rows.append(row)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {path} ({error}): is it complete? Else fetch it again") from None
    if not rows:
        raise TaskError(f"{path} has no rows")
    return rows


def _row(path: pathlib.Path, number: int, line: str, fields: Sequence[str]) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{path}, line {number} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise TaskError(f"{path}, line {number} is not an object with the fields {', '.join(fields)}")
    for field in fields:
        if row.get(field) in (None, "", []):
            raise TaskError(f"{path}, line {number} has no {field}: mend the row, or leave it out")
    return row
