"""How far a judge agrees with people: its verdicts on answers that you have labelled by hand.

    python -m collab_jax.judge --config FILE --workdir DIR --labels labels.jsonl [--split test]

judges the answers of `labels.jsonl` as a run of this config would (`config.task.judge`, with or
without a rubric; a verifier and a reward function too), and writes judge.json. A line has the `id`
of a prompt of the split, the `text` of a response (both as in the records of an evaluation) and the
`label`: true or false, or a grade from 0 to 1. What the judge says of them is kept in the store.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from collab_jax.rl import claims, experiment
from collab_jax.routing.measures import rate
from collab_jax.runtime import cli, files
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Verdict, judge, make_task
from collab_jax.tasks.base import SPLITS

FIELDS = "id, text and label (true, false, or a grade from 0 to 1)"


class Label(NamedTuple):
    """An answer and what a person says of it."""

    id: str
    text: str
    grade: float  # in [0, 1]


def read_labels(path: pathlib.Path) -> list[Label]:
    """The labels of a file of JSON lines. Raises UserError, naming the line, for a bad one."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --labels {path}: {error}") from None
    labels = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            label = _label(line)
            if label is None:
                raise UserError(f"{path}, line {number}: it must be an object with {FIELDS}")
            labels.append(label)
    if not labels:
        raise UserError(f"{path} has no labels: a line each, with {FIELDS}")
    return labels


def _label(line: str) -> Label | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None
    grade, name = row.get("label"), row.get("id")
    if not isinstance(grade, bool | int | float) or not 0 <= grade <= 1 or name is None:
        return None
    return Label(str(name), row["text"], float(grade))


def agreement(
    labels: Sequence[float], verdicts: Sequence[Verdict], right_from: float
) -> dict[str, Any]:
    """How far verdicts agree with people's grades [n], over those that are verdicts.

    agreement: the share on which both say right, or both wrong. kappa (Cohen's): how far that is
    above what chance gives, of what is left; None where both always say the same. bias: the mean
    of the judge's grade less the person's. rank_correlation: Spearman's; None where one side has
    one grade alone. Raises UserError where nothing was judged.
    """
    judged = [i for i, v in enumerate(verdicts) if not (v.unjudged or v.timed_out)]
    if not judged:
        raise UserError(f"none of the {len(labels)} answers could be judged: is the judge there?")
    people = np.array([labels[i] for i in judged])
    machine = np.array([verdicts[i].value for i in judged])
    says, right = np.array([verdicts[i].correct for i in judged]), people >= right_from
    both = len({*says.tolist(), *right.tolist()}) > 1  # right and wrong
    ranked = len(set(people.tolist())) > 1 and len(set(machine.tolist())) > 1
    return {
        "n": len(labels),
        "unjudged": len(labels) - len(judged),
        "agreement": rate(says == right),
        "kappa": float(cohen_kappa_score(right, says)) if both else None,
        "right_by_judge": float(says.mean()),
        "right_by_people": float(right.mean()),
        "mean_absolute_difference": float(np.abs(machine - people).mean()),
        "bias": rate(machine - people),
        "rank_correlation": float(cast(Any, stats.spearmanr(people, machine)).statistic)
        if ranked
        else None,
    }


def in_words(figures: dict[str, Any]) -> str:
    """What to print of the figures."""
    share, bias = figures["agreement"], figures["bias"]["value"]
    kappa = "" if figures["kappa"] is None else f" (kappa {figures['kappa']:.2f})"
    unjudged = figures["unjudged"]
    return (
        f"{figures['n']} answers"
        + f", of which {unjudged} could not be judged" * bool(unjudged)
        + f": the judge agrees on {share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
        f"{kappa}; it says right of {figures['right_by_judge']:.1%}, people of "
        f"{figures['right_by_people']:.1%}; its grades differ by "
        f"{figures['mean_absolute_difference']:.2f} on average, {bias:+.2f} with their sign"
    )


def main(config: ConfigDict, workdir: pathlib.Path, labels: pathlib.Path, split: str) -> int:
    """Judges the labelled answers, writes judge.json, and returns the exit status."""
    found = read_labels(labels)
    claims.make_workdir(workdir)
    task = judge.judged(config, make_task(config), experiment.store_path(config, workdir))
    by_id: dict[str, Example] = {example.id: example for example in task.load(split)}
    if unknown := [label.id for label in found if label.id not in by_id]:
        raise UserError(
            f"{labels}: {len(unknown)} ids are of no prompt of the {split} split (as "
            f"{unknown[0]!r}): name their split with --split, or leave them out"
        )
    verdicts = task.verify([by_id[label.id] for label in found], [label.text for label in found])
    grades = [label.grade for label in found]
    figures = agreement(grades, verdicts, config.task.right_from)
    files.write_text(workdir / "judge.json", json.dumps(figures, indent=2) + "\n")
    print(f"{in_words(figures)}; wrote {workdir / 'judge.json'}")
    return 0


if __name__ == "__main__":
    labels_file = flags.DEFINE_string("labels", None, "JSON lines: id, text, label.")
    split_name = flags.DEFINE_enum("split", "validation", SPLITS, "Whose prompts the ids are of.")

    def run(config: ConfigDict, workdir: pathlib.Path) -> int:
        if not labels_file.value:
            raise UserError("--labels names the file of labelled answers: give it")
        return main(config, workdir, pathlib.Path(labels_file.value), split_name.value)

    cli.run_with_config(run)
