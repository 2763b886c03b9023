"""Which cloud verdicts a training step did without, so that a resumed run does without them as
well.

The store may have these answers by the time the step is repeated; its update must be the same
nevertheless. One JSON line a step that lacked any, in `unknown.jsonl` of the run's workdir, on disk
before the step's update begins.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path

from collab_jax.runtime.errors import UserError


class Unknown:
    """The file at `path`; a last line that a kill cut short is dropped, since its update never
    began.
    """

    def __init__(self, path: Path):
        self._steps: dict[int, frozenset[str]] = {}
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._steps[int(row["step"])] = frozenset(row["ids"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}, line {number} is damaged: put back a copy, or use another --workdir"
                ) from None
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))

    def at(self, step: int) -> frozenset[str]:
        """Ids of the prompts whose verdict this step (from 0) lacked when it was first taken."""
        return self._steps.get(step, frozenset())

    def write(self, step: int, ids: Collection[str]) -> None:
        """Durable on return. A step that is repeated has its line already, unless it lacks more
        now: its last line counts.
        """
        lacking = self.at(step) | frozenset(ids)
        if lacking != self.at(step):
            self._steps[step] = lacking
            self._file.write(json.dumps({"step": step, "ids": sorted(lacking)}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
