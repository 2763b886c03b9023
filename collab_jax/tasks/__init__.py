"""Tasks: where prompts come from and how a response is judged. One file a task; `TASKS` names them all.

A task is a small frozen dataclass of functions, made from `config.task` and the marker's text.
"""

from collab_jax.tasks import choice, countdown, math
from collab_jax.tasks.base import Example, Task, TaskError, Verdict

TASKS = {"countdown": countdown.make_task, **dict.fromkeys(math.FILES, math.make_task), "mmlu": choice.make_task}


def make_task(config) -> Task:
    """The task `config.task.name`. Raises TaskError for an unknown name."""
    if config.task.name not in TASKS:
        raise TaskError(f"config.task.name={config.task.name!r} is unknown: use one of {sorted(TASKS)}")
    return TASKS[config.task.name](config)


__all__ = ["TASKS", "Example", "Task", "TaskError", "Verdict", "make_task"]
