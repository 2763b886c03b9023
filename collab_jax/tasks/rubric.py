"""Rubrics: the criteria by which a judge grades an answer, and the scale it grades on.

A rubric is a TOML file, named by `config.task.rubric`:

    scale = [1, 5]  # the lowest and the highest score

    [criteria]
    correct = "It says nothing that the reference answer contradicts."
    complete = "It has every point of the reference answer."

The judge gives a score by each criterion, and the grade is their mean, with 0 for the lowest score
and 1 for the highest. With `compare = true` in the place of `scale` the judge is shown the answer
beside the reference answer, in both orders, and says which is better by the criteria: the grade is
1 for better, 1/2 for as good, 0 for worse, and the mean over the two orders, so that a judge who
prefers the first place says nothing.
"""

import logging
import math
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from collab_jax.tasks.base import TaskError

log = logging.getLogger(__name__)
PREFERENCES = {"first": (1.0, 0.0), "equal": (0.5, 0.5), "second": (0.0, 1.0)}


class Rubric(NamedTuple):
    """What a judge is asked. scale: lowest and highest score; None: two answers are compared."""

    criteria: Mapping[str, str]  # name -> what it demands
    scale: tuple[float, float] | None


def load(path: str) -> Rubric:
    """The rubric of a file; without a scale, which is told once, a criterion is met (1) or not (0).

    Raises TaskError, with what to change, for a file that is no rubric.
    """
    try:
        table = tomllib.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"config.task.rubric={path!r} cannot be read as TOML: {error}") from None
    criteria, compare = table.pop("criteria", None), table.pop("compare", False)
    scale = table.pop("scale", None)
    if (
        not isinstance(criteria, dict)
        or not criteria
        or not all(map(_is_criterion, criteria.items()))
        or len({name.casefold() for name in criteria}) < len(criteria)
    ):
        raise TaskError(
            f'{path} needs [criteria], each a line as: correct = "What it demands.", and no name '
            "twice, whatever its case"
        )
    if table or not isinstance(compare, bool) or (compare and scale is not None):
        raise TaskError(f"{path} must have criteria, and scale or compare = true; nothing else")
    if compare:
        return Rubric(criteria, None)
    if scale is None:
        log.warning("%s has no scale: each criterion counts as met (1) or not met (0)", path)
        scale = [0, 1]
    if not _is_scale(scale):
        raise TaskError(f"{path}: scale={scale!r} must be [lowest, highest], as [1, 5]")
    return Rubric(criteria, (float(scale[0]), float(scale[1])))


def _is_criterion(item: tuple[str, Any]) -> bool:
    name, demand = item
    named = re.fullmatch(r"[\w -]+", name) and any(map(str.isalnum, name))
    return bool(named) and isinstance(demand, str) and bool(demand.strip())


def _is_scale(scale: Any) -> bool:
    numbers = isinstance(scale, list) and all(type(x) in (int, float) for x in scale)
    return numbers and len(scale) == 2 and all(map(math.isfinite, scale)) and scale[0] < scale[1]


def demands(rubric: Rubric) -> str:
    """The criteria as the judge sees them, a line each."""
    return "\n".join(f"- {name}: {demand}" for name, demand in rubric.criteria.items())


def instruction(rubric: Rubric) -> str:
    """What the judge is to reply."""
    if rubric.scale is None:
        return (
            "Which of the two answers is better by these criteria? "
            f"Reply with one word: {', '.join(PREFERENCES)}."
        )
    low, high = map(_shown, rubric.scale)
    return (
        f"Give the answer a score from {low} (lowest) to {high} (highest) by each criterion. "
        "Reply with one line for each, its name, a colon and the score, and nothing else."
    )


def _shown(score: float) -> str:
    """A score as a person writes it."""
    return str(int(score)) if score.is_integer() else str(score)


_DASHES = r"\-" "\N{MINUS SIGN}\N{EN DASH}\N{NON-BREAKING HYPHEN}"
_NUMBER = rf"([{_DASHES}]?[ \t]*(?:\d+(?:\.\d+)?|\.\d+))"


def read_scores(rubric: Rubric, reply: str) -> float | None:
    """The grade in [0, 1] of a reply with scores; None where a criterion has none, or several."""
    assert rubric.scale is not None
    low, high = rubric.scale
    scores = []
    for name in rubric.criteria:
        # Between the colon and the score there may be marks, but no sign or point of its own.
        line = (
            rf"^\W*{re.escape(name)}\W*[:=][^\w.{_DASHES}]*{_NUMBER}"
            rf"(?:\s*/\s*{re.escape(_shown(high))})?\W*$"
        )
        scored = re.findall(line, reply, re.IGNORECASE | re.MULTILINE)
        found = [float(re.sub(rf"[{_DASHES}]\s*", "-", x)) for x in scored]
        if len(found) != 1 or not low <= found[0] <= high:
            return None
        scores.append((found[0] - low) / (high - low))
    return sum(scores) / len(scores)


def read_preferences(replies: Sequence[str]) -> float | None:
    """The grade of an answer shown first, then second; None where a reply is no verdict."""
    grades = []
    for place, reply in enumerate(replies):
        preference = PREFERENCES.get(reply.strip().strip("*.").lower())
        if preference is None:
            return None
        grades.append(preference[place])
    return sum(grades) / len(grades)
