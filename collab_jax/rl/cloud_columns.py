"""The cloud's columns of an evaluation's records: its verdicts, and what is known of its answers.

A verdict that is unknown is asked for again. Where attempts are shared, or prompts redacted, there
are columns of the cloud's answers with and without.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from collab_jax.cloud import Answers, CachedCloud
from collab_jax.cloud.redaction import as_it_is
from collab_jax.cloud.share import with_attempt
from collab_jax.records import Records
from collab_jax.rl import rollout
from collab_jax.rl.experiment import Run
from collab_jax.runtime import hosts
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task

Row = dict[str, Any]  # of the records: a value by column

ROUNDS = 3  # how many times an evaluation asks again for cloud verdicts that are unknown
UNKNOWN: Row = {
    "cloud_correct": False,
    "cloud_known": False,
    "cloud_tokens": 0,
    "cloud_usd": 0.0,
}


def unknown_answer(task: Task) -> Row:
    """Returns the cloud's columns where its call failed."""
    return UNKNOWN | ({"cloud_grade": 0.0} if task.graded else {})


def cloud_answers(task: Task, cloud: CachedCloud, examples: Sequence[Example]) -> list[Row]:
    """Returns the cloud's columns of each example; a failed call is an unknown verdict."""
    verdicts, answers = rollout.ask_cloud(task, cloud, examples)
    return [
        unknown_answer(task)
        if reply is None
        else {
            "cloud_correct": bool(c),
            "cloud_known": bool(k),
            **({"cloud_grade": float(g)} if task.graded else {}),
            "cloud_tokens": reply.input_tokens + reply.output_tokens,
            "cloud_usd": reply.usd,
        }
        for c, k, g, reply in zip(*verdicts, answers.replies, strict=True)
    ]


def too_many_unknown(run: Run, table: Records) -> bool:
    """Returns whether more cloud verdicts are unknown than `config.eval.max_unknown` allows."""
    return float(np.mean(~table["cloud_known"])) > run.config.eval.max_unknown


def ask_again(run: Run, table: Records, examples: Sequence[Example], name: str) -> Records:
    """Returns `table` with its unknown cloud verdicts asked for again, in at most ROUNDS rounds.

    Each round begins when the circuit breaker lets calls through. Nothing else of the table
    changes. The first host asks, and tells the others. Raises UserError, with the reasons, where
    too many verdicts stay unknown.
    """
    if hosts.is_first():
        table = _asked_again(run, table, examples, name)
    answers = {column: table[column].tolist() for column in unknown_answer(run.task)}
    told = hosts.gathered("what the cloud said at last", answers, hosts.FOREVER)[0]
    return table | {c: np.asarray(values, table[c].dtype) for c, values in told.items()}


def _asked_again(run: Run, table: Records, examples: Sequence[Example], name: str) -> Records:
    by_id = {example.id: example for example in examples}
    columns = unknown_answer(run.task)
    table = table | {column: table[column].copy() for column in columns}
    earlier = Counter(run.cloud.reasons)
    for _ in range(ROUNDS):
        unknown = np.flatnonzero(~table["cloud_known"])
        if not unknown.size:
            return table
        time.sleep(run.cloud.breaker.seconds_left())
        asked = [by_id[key] for key in table["id"][unknown]]
        answers = cloud_answers(run.task, run.cloud, asked)
        for column in columns:
            table[column][unknown] = [row[column] for row in answers]
    if too_many_unknown(run, table):
        unknown = [by_id[key] for key in table["id"][~table["cloud_known"]]]
        reasons = Counter(run.cloud.reasons) - earlier or run.cloud.reasons
        raise UserError(
            f"{name}: the cloud's verdict is unknown on {len(unknown)} of {len(table['id'])} "
            f"prompts ({_why_unknown(run, unknown, reasons)}), more than config.eval.max_unknown="
            f"{run.config.eval.max_unknown:g} allows. No records were written, and what was bought "
            "is kept: once the cloud answers, or with a larger limit, the same command goes on"
        )
    return table


def _why_unknown(run: Run, examples: Sequence[Example], reasons: Counter[str]) -> str:
    """Returns how many of these calls failed and why, and how many answers were not judged."""
    prompts, _ = rollout.cloud_prompts(run.task, examples)
    keys = [run.cloud.key_of(messages) for messages in prompts]
    stored = run.cloud.store.get_many(keys)
    unjudged = sum(key in stored for key in keys)
    failed = len(keys) - unjudged
    found = []
    if failed:
        causes = ", ".join(reason for reason, _ in reasons.most_common(3))
        found.append(f"{failed} without an answer{causes and ': ' + causes}")
    if unjudged:
        found.append(f"{unjudged} with an answer that could not be judged")
    return "; ".join(found)


def shared_answers(
    task: Task, cloud: CachedCloud, examples: Sequence[Example], attempts: Sequence[str | None]
) -> list[Row]:
    """Returns the columns of the cloud's answers with the device's attempts, where there are any.

    `shared_extra_tokens`: input tokens more than without it.
    """
    calls = {i: attempt for i, attempt in enumerate(attempts) if attempt is not None}
    called = [examples[i] for i in calls]
    alone, names = rollout.cloud_prompts(task, called)
    answers = cloud.answer(
        [with_attempt(m, attempt) for m, attempt in zip(alone, calls.values(), strict=True)],
        names,
    )
    correct, known, _ = rollout.cloud_verdicts(task, called, answers)
    without = cloud.answer(alone).replies
    rows: list[Row] = [
        {"shared_known": False, "shared_correct": False, "shared_extra_tokens": 0} for _ in examples
    ]
    for i, c, k, reply, bare in zip(calls, correct, known, answers.replies, without, strict=True):
        if k and reply and bare:
            extra = reply.input_tokens - bare.input_tokens
            rows[i] = {
                "shared_known": True,
                "shared_correct": bool(c),
                "shared_extra_tokens": extra,
            }
    return rows


def plain_answers(task: Task, cloud: CachedCloud, examples: Sequence[Example]) -> list[Row]:
    """Returns whether redaction changes each prompt, and the verdicts without redaction.

    These are on answers that the store has from an evaluation without redaction; none is bought, so
    nothing leaves the device.
    """
    prompts, _ = rollout.cloud_prompts(task, examples)
    replies = cloud.stored([as_it_is(messages) for messages in prompts])
    correct, known, _ = rollout.cloud_verdicts(task, examples, Answers(replies, bought=0, failed=0))
    changed = [bool(cloud.redact(messages).originals) for messages in prompts]
    return [
        {"redacted": r, "plain_known": bool(k), "plain_correct": bool(c)}
        for r, k, c in zip(changed, known, correct, strict=True)
    ]
