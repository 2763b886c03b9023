"""Tasks: where prompts come from and how a response is judged. One file a task; `TASKS` names them
all.

A task is a small frozen dataclass of functions, made from `config.task` and the marker's text.
`config.task.name = "mix"` mixes several (`mix.py`). `config.task.reward`, a function of your own
(`reward.py`), or `config.task.judge`, a language model (`judge.py`), takes the place of a task's
own verifier.
"""

import dataclasses

from collab_jax.tasks import choice, countdown, jsonl, math, mix, reward
from collab_jax.tasks.base import Example, Task, TaskError, Verdict

TASKS = {
    "countdown": countdown.make_task,
    **dict.fromkeys(math.FILES, math.make_task),
    "mmlu": choice.make_task,
    "jsonl": jsonl.make_task,
}


def parts_of(config) -> dict[str, float]:
    """The tasks of `config.task`, name -> share of the training prompts. Raises TaskError for an
    unknown name.
    """
    name, pairs = config.task.name, config.task.mix
    if pairs and name != "mix":
        raise TaskError(f"config.task.mix={pairs!r} needs config.task.name=mix, or must be empty")
    weights = mix.check(pairs) if name == "mix" else {name: 1.0}
    if unknown := [part for part in weights if part not in TASKS]:
        key = "config.task.mix" if name == "mix" else "config.task.name"
        raise TaskError(f"{key}={unknown[0]!r} is unknown: use one of {sorted([*TASKS, 'mix'])}")
    return weights


def named(config, name: str):
    """A copy of `config` with the one task `name`."""
    config = config.copy_and_resolve_references()
    config.task.update(name=name, mix=())
    return config


def make_task(config) -> Task:
    """The task of `config.task`; `judge.judged` then puts a judge into it. Raises TaskError for
    settings that cannot be.
    """
    weights = parts_of(config)
    if config.task.name == "mix":
        task = mix.make_task({name: _part(named(config, name)) for name in weights}, weights)
    else:
        task = _part(config)
    if config.task.reward:
        if config.task.judge:
            raise TaskError(
                "config.task.reward and config.task.judge both tell right from wrong: set one of them"
            )
        task = dataclasses.replace(
            task, verify=reward.verifier(config.task.reward, config.text.marker)
        )
    return task


def _part(config) -> Task:
    """One task, whose examples know its name."""
    task = TASKS[config.task.name](config)
    load = lambda split: [dataclasses.replace(e, task=task.name) for e in task.load(split)]  # noqa: E731
    return dataclasses.replace(task, load=load)


__all__ = ["TASKS", "Example", "Task", "TaskError", "Verdict", "make_task", "named", "parts_of"]
