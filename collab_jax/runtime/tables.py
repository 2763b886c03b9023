"""Tables as files: parquet, JSONL (one object a line) and CSV (with a header), a column each.

What a column means, and of which type it is, is for whoever reads it (`records.py`). In JSONL and
CSV a list is a JSON list, with null for what is not finite.
"""

import csv
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collab_jax.runtime import files
from collab_jax.runtime.errors import UserError

Column = Sequence[Any] | np.ndarray


def read(path: pathlib.Path) -> dict[str, Column]:
    """The columns of a .parquet, .jsonl or .csv file; of CSV, all are text.

    Raises UserError where it cannot be read.
    """
    reader, _ = _format(path)
    try:
        return reader(path)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:  # ValueError: JSON, UTF-8
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"cannot read {path} ({reason}): is it there, and complete? Else write it again"
        ) from None


def write(path: pathlib.Path, table: Mapping[str, np.ndarray]) -> None:
    """Writes columns [n] to a .parquet, .jsonl or .csv file, complete or not at all."""
    _, writer = _format(path)
    with files.replacing(path) as scratch:
        writer(scratch, table)


def _format(path: pathlib.Path) -> tuple[Callable, Callable]:
    if path.suffix not in _FORMATS:
        raise UserError(
            f"{path} is not a table of records: the name must end in {', '.join(_FORMATS)}"
        )
    return _FORMATS[path.suffix]


def _read_parquet(path: pathlib.Path) -> dict[str, Column]:
    table = pq.read_table(path)
    return {column: _from_arrow(table[column].combine_chunks()) for column in table.column_names}


def _from_arrow(column: pa.Array) -> Column:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if not len(column):
            return []
        # pyarrow makes its compute functions at import, where no checker sees them.
        lengths = pc.list_value_length(column)  # pyright: ignore[reportAttributeAccessIssue]
        counts = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
        return np.split(column.flatten().to_numpy(zero_copy_only=False), np.cumsum(counts)[:-1])
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


def _write_parquet(path: pathlib.Path, table: Mapping[str, np.ndarray]) -> None:
    plain = {name: list(c) if c.dtype == object else c for name, c in table.items()}
    # A third smaller than in dictionaries, which do not help where hardly two values are equal.
    encoding = {"id": "DELTA_BYTE_ARRAY"} | {
        name: "BYTE_STREAM_SPLIT" for name, c in table.items() if c.dtype == np.float32
    }
    others: Any = [name for name in table if name not in encoding]  # pyarrow's type says bool
    pq.write_table(
        pa.table(plain),
        path,
        compression="zstd",
        use_dictionary=others,
        column_encoding=encoding,
    )


def _read_jsonl(path: pathlib.Path) -> dict[str, Column]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error})") from None
                if not isinstance(rows[-1], dict):
                    raise UserError(
                        f"{path}: line {number} is not a JSON object: write one object a prompt"
                    )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _write_jsonl(path: pathlib.Path, table: Mapping[str, np.ndarray]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in zip(*map(_plain, table.values()), strict=True):
            file.write(json.dumps(dict(zip(table, row, strict=True)), ensure_ascii=False) + "\n")


def _read_csv(path: pathlib.Path) -> dict[str, Column]:
    csv.field_size_limit(2**31 - 1)  # a long trace is one cell
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if twice := {name for name in header if header.count(name) > 1}:
        raise UserError(f"{path}: the header has {', '.join(sorted(twice))} twice")
    for i, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"{path}: row {i} has {len(row)} cells, the header has {len(header)}")
    return {name: [row[j] for row in rows] for j, name in enumerate(header)}


def _write_csv(path: pathlib.Path, table: Mapping[str, np.ndarray]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*map(_plain, table.values()), strict=True):
            writer.writerow([json.dumps(v) if isinstance(v, list | dict) else v for v in row])


def _plain(column: np.ndarray) -> list:
    """The column as Python values, a trace as a list with None for -inf (JSON has no infinity)."""
    if column.dtype != object:
        return column.tolist()
    return [
        [x if np.isfinite(x) else None for x in v.tolist()] if isinstance(v, np.ndarray) else v
        for v in column
    ]


_FORMATS = {
    ".parquet": (_read_parquet, _write_parquet),
    ".jsonl": (_read_jsonl, _write_jsonl),
    ".csv": (_read_csv, _write_csv),
}
