"""Metrics: one JSON line a step, TensorBoard events, and a check for a collapsed policy.

After a resume the file is cut to the restored step, so that it always describes one straight run.
"""

import gzip
import json
import pathlib
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from collab_jax.runtime import files


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics file, or of PATH.gz, if that is there instead.

    A last line that a kill cut short is left out; without a file there are no rows.
    """
    packed = path.with_name(f"{path.name}.gz")
    if path.exists():
        text = path.read_text()
    elif packed.exists():
        text = gzip.decompress(packed.read_bytes()).decode()
    else:
        return []
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_packed(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows to PATH.gz, for `read`: a tenth of the bytes, and the same ones every time."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with files.replacing(path.with_name(f"{path.name}.gz")) as scratch:
        scratch.write_bytes(gzip.compress(text.encode(), mtime=0))


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard events in `workdir`, from `step` on.

    writes: of several hosts one does, the others only keep the rows.
    """

    def __init__(self, workdir: pathlib.Path, step: int, writes: bool = True):
        path = workdir / "metrics.jsonl"
        self.rows = [row for row in read(path) if row["step"] <= step]
        self._file = self._events = None
        if not writes:
            return
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row of plain numbers with its `step`."""
        row = {
            name: value.item() if isinstance(value, np.generic | np.ndarray) else value
            for name, value in row.items()
        }
        self.rows.append(row)
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        for opened in (self._file, self._events):
            if opened is not None:
                opened.close()


def collapse_warning(
    rows: list[dict[str, Any]], sampled: bool = True, window: int = 10
) -> str | None:
    """What looks collapsed over the last `window` steps, in one sentence; None for nothing.

    sampled: calls are learnt from responses that make them.
    """
    last = rows[-window:]
    if len(last) < window:
        return None
    names = ("call_rate", "entropy", "cut_off", "d2", "d2_called")
    mean = {name: float(np.mean([row[name] for row in last])) for name in names}
    if sampled and mean["call_rate"] == 0:
        return "no response calls the cloud any more: nothing is left to learn calling from"
    if sampled and mean["d2"] > 0 and mean["d2_called"] == 0:
        return (
            "no prompt that only the cloud solves had a response that calls, so when to call "
            "cannot be learned: show more calls in the warm start (config.sft.marker_share), or "
            "raise config.group"
        )
    if mean["call_rate"] > 0.99:
        return "nearly every response calls the cloud: the device has stopped solving"
    if mean["entropy"] < 0.005:
        return "entropy is gone: all responses of a group are the same"
    if mean["cut_off"] > 0.5:
        return (
            "most responses are cut off: raise max_new_tokens, or check that the model knows the "
            "format"
        )
    return None
