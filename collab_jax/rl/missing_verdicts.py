"""The verdicts that training steps did without, so that a repeated step does without them too.

A call of the cloud may have failed, a verifier may have run out of time, a judge may have given no
answer. When a resumed run repeats such a step, the verdict may be known; the step's update must be
the same nevertheless. So `missing_verdicts.jsonl` in the run's workdir has a JSON line for each
step that lacked any verdict, on disk before the step's update begins:

    {"step": 3, "prompts": ["p7"], "responses": [{"id": "p9", "index": 2, "correct": false, ...}]}

Older runs have `unknown.jsonl`, whose lines hold the prompts alone: {"step": 3, "ids": ["p7"]}.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Verdict

FILE, OLD_FILE = "missing_verdicts.jsonl", "unknown.jsonl"


class MissingVerdicts(NamedTuple):
    """The verdicts that one step lacks.

    prompts: ids of the prompts on which the cloud's verdict is unknown. responses: what a response
    that timed out or could not be judged counts as, by the id of its prompt and its index among
    the step's responses to that prompt (a prompt may occur twice where two epochs meet).
    """

    prompts: frozenset[str]
    responses: Mapping[tuple[str, int], Verdict]

    def union(self, other: "MissingVerdicts") -> "MissingVerdicts":
        """Returns what either lacks; where both have a response, it counts as `self` says."""
        return MissingVerdicts(self.prompts | other.prompts, {**other.responses, **self.responses})


NOTHING_MISSING = MissingVerdicts(frozenset(), {})


class MissingVerdictsFile:
    """The file of a run's workdir. A last line that a kill cut short is dropped.

    The update of that line's step never began. writes: of several hosts one does, the others only
    read what is there at the start. Raises UserError for a line that is damaged.
    """

    def __init__(self, workdir: pathlib.Path, writes: bool = True):
        path = workdir / FILE
        if writes and (old := workdir / OLD_FILE).exists() and not path.exists():
            old.rename(path)
        self._steps: dict[int, MissingVerdicts] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._steps[int(row["step"])] = read_row(row)
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}, line {number} is damaged: put back a copy, or use another --workdir"
                ) from None
        self._file = None
        if writes:
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(len(whole))
            self._file.seek(len(whole))

    def at(self, step: int) -> MissingVerdicts:
        """Returns what step number `step` (from 0) lacked when it was first taken."""
        return self._steps.get(step, NOTHING_MISSING)

    def write(self, step: int, missing: MissingVerdicts) -> None:
        """Writes down what a step lacks; durable on return.

        A step that is repeated has its line already. Where it lacks more now, it gets another line:
        the last line of a step counts.
        """
        known = self.at(step)
        lacking = known.union(missing)
        if lacking != known and self._file is not None:
            self._steps[step] = lacking
            self._file.write(json.dumps(make_row(step, lacking)).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def make_row(step: int, missing: MissingVerdicts) -> dict[str, Any]:
    """Returns what a step lacks as JSON has it."""
    responses = [
        {"id": prompt, "index": index, **verdict._asdict()}
        for (prompt, index), verdict in sorted(missing.responses.items())
    ]
    return {"step": step, "prompts": sorted(missing.prompts), "responses": responses}


def read_row(row: dict[str, Any]) -> MissingVerdicts:
    """Returns what a row of `make_row`, or of an older run, says."""
    if "ids" in row:
        return MissingVerdicts(frozenset(row["ids"]), {})
    responses = {
        (response.pop("id"), response.pop("index")): Verdict(**response)
        for response in row["responses"]
    }
    return MissingVerdicts(frozenset(row["prompts"]), responses)
