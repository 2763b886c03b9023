"""What several test modules share: a cloud without a network, its prompts, records and rows."""

import json
import pathlib
import runpy
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import orbax.checkpoint as ocp
from conftest import ROOT
from ml_collections import ConfigDict

from collab_jax import records
from collab_jax.cloud import Answers, Failure, Reply
from collab_jax.models.text import Messages
from collab_jax.runtime import metrics

T, F = True, False


# ---------------------------------------------------------------- the cloud


def prompt(content: object) -> Messages:
    """One user message."""
    return [{"role": "user", "content": str(content)}]


def texts(answers: Answers) -> list[str | None]:
    """The text of each reply, None where the answer is unknown."""
    return [reply.text if reply else None for reply in answers.replies]


@dataclass
class FakeCloud:
    """Answers "A:<content>", fails on contents in `failing`, and writes down what it was asked."""

    model: str = "fake"
    provider: str = ""
    parameters: dict = field(default_factory=dict)
    failing: set = field(default_factory=set)
    asked: list = field(default_factory=list)
    batch: int = 100
    workers: int = 1

    def highest_usd(self, messages):
        return 0.25

    def answer(self, prompts):
        contents = [messages[0]["content"] for messages in prompts]
        self.asked += contents
        return [
            Failure("failing") if c in self.failing else Reply(f"A:{c}", 10, 3, 0.5, 0.25)
            for c in contents
        ]


def cloud_config(**changes) -> ConfigDict:
    """The common config with a simulated cloud that is never wrong; changes: of its `cloud`."""
    config = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    values = dict(
        model="sim", error_rate=0, seconds=2, usd_per_million_input=0.5, usd_per_million_output=2.0
    )
    config.cloud.update(values | changes)
    return config


# ---------------------------------------------------------------- tasks


def task_config(folder: pathlib.Path, name: str, **changes) -> ConfigDict:
    """The common config with the task `name` of files in a folder; changes: of its `task`.

    The simulated cloud is never wrong.
    """
    config = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    settings = {"name": name, "data_dir": str(folder), "prompt": "{problem}"}
    config.task.update(settings | changes)
    config.cloud.error_rate = 0.0
    return config


def answered(text: str) -> str:
    """A response in the format."""
    return f"<think> so </think><answer> {text} </answer>"


# ---------------------------------------------------------------- records


def make_table(n: int | None = None, seed: int = 0, **columns) -> records.Records:
    """Records with the columns that summaries and routers read: five by hand, or n random ones."""
    if n is None:
        base = dict(
            local_correct=[T, F, F, T, F],
            cloud_correct=[T, T, F, F, T],
            margin=[-3.0, 2.0, 1.0, -1.0, -2.0],
            logp=[-0.1, -5.0, -0.2, -0.3, -4.0],
            ended=[T, T, T, T, F],
        )
    else:
        rng = np.random.default_rng(seed)
        base = dict(
            local_correct=rng.random(n) < 0.5,
            cloud_correct=rng.random(n) < 0.9,
            margin=rng.normal(size=n),
            logp=-rng.exponential(size=n),
            ended=rng.random(n) < 0.95,
        )
    size = len(base["margin"])
    base |= dict(
        id=[f"p{i}" for i in range(size)],
        prompt=[f"{i} and {i % 7}" for i in range(size)],
        stratum=["a"] * size,
        formatted=base["ended"],
        lenient_correct=base["local_correct"],
        tokens=[10] * size,
        natural_tokens=[5] * size,
        natural_called=[T] * 2 + [F] * (size - 2),
        natural_completed=[T] + [F] * (size - 1),
        natural_correct=base["local_correct"],
        natural_ended=base["ended"],
    )
    return records.check(
        {name: list(column) for name, column in (base | columns).items()}, "a test's table"
    )


# ---------------------------------------------------------------- rows of a task


def svamp_row(i: int, steps: int = 1) -> dict[str, str]:
    """Training row number i, with one to three steps; of the first 60 two are for validation."""
    solution = ["2+1=3", "3*2=6", "6-5=1"][:steps]
    answer = solution[-1].split("=")[1]
    problem = f"Pen number {chr(97 + i // 26)}{chr(97 + i % 26)} has 2 caps and {steps} nibs."
    return {"id": f"t{i}", "problem": problem, "answer": answer, "solution": ", ".join(solution)}


def write_rows(path: pathlib.Path, rows: Iterable[dict]) -> None:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- runs


def saved_state(workdir: pathlib.Path, step: int) -> dict:
    """The state in a run's checkpoint before step number `step`, as Orbax restores it."""
    folder = workdir.absolute() / "checkpoints" / str(step) / "default"
    return ocp.StandardCheckpointer().restore(folder)


def comparable_metrics(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what may differ between a straight and a resumed run.

    That is times, and what was bought: a resumed run may buy an answer once more.
    """
    may_differ = "cloud_bought", "cloud_failed", "cloud_tokens", "cloud_usd"
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds") and k not in may_differ}
        for row in metrics.read(workdir / "metrics.jsonl")
    ]
