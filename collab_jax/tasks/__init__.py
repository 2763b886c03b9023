"""Tasks: where prompts come from and how a response is judged.

One file a task, named in `TASKS`. May import `cloud`, `models` and `runtime`; `rl` and what lies
above it import this package. A task is a frozen dataclass of functions (`base.Task`), made from
`config.task` and the marker's text. `config.task.system` is the system prompt of each of them.
`config.task.name = "mix"` mixes several (`mix.py`); prompts may show a budget (`budgets.py`).
`config.task.reward`, a function of your own (`reward.py`), or `config.task.judge`, a language model
(`judge.py`), takes the place of a task's own verifier. `jsonl.py` is the one to copy.
"""

import dataclasses

from ml_collections import ConfigDict

from collab_jax.tasks import (
    budgets,
    chain,
    choice,
    code,
    countdown,
    jsonl,
    math,
    mix,
    reward,
    svamp,
)
from collab_jax.tasks.base import Example, Task, TaskError, Verdict

TASKS = {
    "countdown": countdown.make_task,
    "chain": chain.make_task,
    **dict.fromkeys(math.FILES, math.make_task),
    **dict.fromkeys(("mmlu", "choices"), choice.make_task),
    "svamp": svamp.make_task,
    **dict.fromkeys(code.FILES, code.make_task),
    "jsonl": jsonl.make_task,
}


def task_shares(config: ConfigDict) -> dict[str, float]:
    """The share of the training prompts of each task of `config.task`, by name.

    Raises TaskError for an unknown name.
    """
    name, pairs = config.task.name, config.task.mix
    if pairs and name != "mix":
        raise TaskError(f"config.task.mix={pairs!r} needs config.task.name=mix, or must be empty")
    shares = mix.shares(pairs) if name == "mix" else {name: 1.0}
    if unknown := [part for part in shares if part not in TASKS]:
        key = "config.task.mix" if name == "mix" else "config.task.name"
        raise TaskError(f"{key}={unknown[0]!r} is unknown: use one of {sorted([*TASKS, 'mix'])}")
    return shares


def with_task(config: ConfigDict, name: str) -> ConfigDict:
    """A copy of `config` with the single task `name`."""
    config = config.copy_and_resolve_references()
    config.task.update(name=name, mix=())
    return config


def make_task(config: ConfigDict) -> Task:
    """The task of `config.task`, without its judge, which `judge.judged` puts in.

    Raises TaskError for settings that cannot be.
    """
    shares = task_shares(config)
    if config.task.name == "mix":
        parts = {name: _single_task(with_task(config, name)) for name in shares}
        task = mix.make_task(parts, shares)
    else:
        task = _single_task(config)
    if config.task.system:
        system = {"role": "system", "content": config.task.system}
        without = task.prompt
        task = dataclasses.replace(task, prompt=lambda example: [system, *without(example)])
    if not 0 < config.task.right_from <= 1:
        raise TaskError(f"config.task.right_from={config.task.right_from} must lie in (0, 1]")
    if config.task.rubric and not config.task.judge:
        raise TaskError("config.task.rubric is what a judge grades by: name config.task.judge too")
    if not config.task.reward:
        return task
    if config.task.judge:
        raise TaskError(
            "config.task.reward and config.task.judge both tell right from wrong: set one of them"
        )
    verify = reward.verifier(config.task.reward, config.text.marker, config.task.right_from)
    return dataclasses.replace(task, verify=verify, graded=True)


def _single_task(config: ConfigDict) -> Task:
    """One task, whose examples know its name and split, and which has no splits but its own."""
    make = TASKS[config.task.name]
    task = budgets.shown(make, config) if budgets.are_shown(config) else make(config)

    def load(split: str) -> list[Example]:
        if split not in task.splits:
            raise TaskError(
                f"task {task.name!r} has no {split} split: it is for evaluation on test prompts"
            )
        return [dataclasses.replace(e, task=task.name, split=split) for e in task.load(split)]

    return dataclasses.replace(task, load=load)


__all__ = [
    "TASKS",
    "Example",
    "Task",
    "TaskError",
    "Verdict",
    "make_task",
    "task_shares",
    "with_task",
]
