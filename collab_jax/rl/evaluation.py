"""Evaluation: a pass or two over held-out prompts, written down as records, one row a prompt.

One pass decodes with the marker disallowed; its trace of margins holds the call decision at every
budget (`sampler.py`). The natural pass leaves the marker allowed.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from collab_jax import records
from collab_jax.cloud import Answers, CachedCloud
from collab_jax.cloud.redaction import as_it_is
from collab_jax.cloud.share import with_attempt
from collab_jax.models.decision import Opening
from collab_jax.models.decoder import Params
from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import Text
from collab_jax.records import Records
from collab_jax.rl import experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.rl.rollout import Verdicts
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task
from collab_jax.tasks.base import lenient_verdicts

Row = dict[str, Any]  # of the records: a value by column

ROUNDS = 3  # how many times an evaluation asks again for cloud verdicts that are unknown
UNKNOWN: Row = {
    "cloud_correct": False,
    "cloud_known": False,
    "cloud_tokens": 0,
    "cloud_usd": 0.0,
}


class Pass(NamedTuple):
    """One response to each of n prompts, and the verdicts on them."""

    samples: Samples  # on the host, [n, ...], without the axes D and G
    verdicts: Verdicts


def greedy_sampler(run: Run) -> Sampler:
    """Returns the sampler of greedy evaluations. Make it once: each new one is compiled again."""
    return rollout.make_sampler(run.cfg, run.text, run.config, group=1, temperature=0.0)


def held_out(run: Run, split: str) -> list[Example]:
    """Returns the first `config.eval.prompts` prompts of a split.

    A validation split may have fewer, as it is a part of the training data. Raises UserError where
    the test split has.
    """
    wanted = run.config.eval.prompts
    if not wanted:
        return []
    examples = experiment.examples(run, split)[:wanted]
    if split == "test" and len(examples) < wanted:
        raise UserError(
            f"config.eval.prompts={wanted}, but the test split has {len(examples)} that fit"
        )
    return examples


def evaluate(
    run: Run,
    sampler: Sampler,
    params: Params,
    examples: Sequence[Example],
    name: str,
    *,
    natural: bool = True,
    ask_cloud: bool = True,
    seed: int | None = None,
) -> Records:
    """Returns the records of `examples` under `params` (with axis D); `name` is for messages.

    sampler: of group 1; greedy, or with a temperature and a `seed`. In a drawn response a call is a
    marker that was written to its end, in a greedy one a crossing of the margin.
    natural: with the natural pass and its columns.
    ask_cloud: with the cloud's verdicts; without, none is bought and none is known.

    Raises UserError where more verdicts stay unknown than `config.eval.max_unknown` allows.
    """
    size = run.config.eval.batch_size
    rows: list[Row] = []
    with tqdm(total=len(examples), desc=f"evaluate {name}", unit="prompt", mininterval=1) as bar:
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            passes = _passes(run, sampler, params, batch, start // size, natural, seed)
            drawn = seed is not None
            columns = [_row(run, e, i, passes, drawn) for i, e in enumerate(batch)]
            lenient = _lenient(run.task, batch, passes["local"])
            for row, found in zip(columns, lenient, strict=True):
                row.update(found)
            answers = [unknown_answer(run.task)] * len(batch)
            if ask_cloud:
                answers = cloud_answers(run.task, run.cloud, batch)
            shared: list[Row] = [{}] * len(batch)
            if run.config.cloud.share_attempt and ask_cloud and natural and not drawn:
                shared = shared_answers(
                    run.task, run.cloud, run.text, batch, passes["natural"].samples
                )
            plain: list[Row] = [{}] * len(batch)
            if run.config.cloud.redact and ask_cloud:
                plain = plain_answers(run.task, run.cloud, batch)
            rows += [
                c | a | s | p for c, a, s, p in zip(columns, answers, shared, plain, strict=True)
            ]
            bar.update(len(batch))
    table = records.check({column: [row[column] for row in rows] for column in rows[0]}, name)
    return ask_again(run, table, examples, name) if ask_cloud else table


def _passes(
    run: Run,
    sampler: Sampler,
    params: Params,
    batch: Sequence[Example],
    number: int,
    natural: bool,
    seed: int | None,
) -> dict[str, Pass]:
    """Returns the passes over one batch, by name: "local" and, where wanted, "natural"."""
    size = run.config.eval.batch_size
    padded = [*batch, *batch[:1] * (size - len(batch))]  # one shape, one compilation
    prompts, prompt_mask = run.text.prompt_batch(
        [run.task.prompt(example) for example in padded], run.config.prompt_length
    )
    biases = {"natural": 0.0, "local": -np.inf} if natural else {"local": -np.inf}
    passes = {}
    for kind, bias in biases.items():
        drawn = rollout.draw(
            sampler, params, prompts, prompt_mask, seed=seed or 0, step=number, bias=bias
        )
        samples = jax.tree.map(lambda x: x[:, 0], parallel.gather(drawn))  # the padding included
        verdicts = rollout.judge(
            run.task, run.text, padded, samples.tokens, samples.mask, samples.ended
        )
        passes[kind] = Pass(samples, verdicts)
    return passes


def _row(run: Run, example: Example, i: int, passes: Mapping[str, Pass], drawn: bool) -> Row:
    """Returns the device's columns of the prompt in row `i` of the passes."""
    task, (local, verdicts) = run.task, passes["local"]
    states = np.flatnonzero(local.margins[i] > -np.inf)  # of decision
    before = [0, *run.text.answer_open.states(local.tokens[i].tolist())[:-1]]
    in_answer = local.mask[i] & (np.array(before) == Opening.OPEN)
    row = {
        "id": example.id,
        "task": example.task,
        "split": example.split,
        "stratum": example.stratum,
        **({} if example.budget is None else {"shown_budget": example.budget}),
        "prompt": task.prompt(example)[-1]["content"],
        "text": verdicts.texts[i],
        "local_correct": bool(verdicts.correct[i]),
        **({"local_grade": float(verdicts.grade[i])} if task.graded else {}),
        "formatted": bool(verdicts.formatted[i]),
        "unjudged": bool(verdicts.timed_out[i] | verdicts.unjudged[i]),
        "ended": bool(local.ended[i]),
        "tokens": int(local.mask[i].sum()),
        "logp": float(local.logp[i].sum()),
        "answer_logp": float(local.logp[i][in_answer].sum()),
        "margin": float(local.margins[i].max()),
        "first_margin": float(local.margins[i, states[0]]) if states.size else -np.inf,
        "last_margin": float(local.margins[i, states[-1]]) if states.size else -np.inf,
        "margins": local.margins[i][local.mask[i]],
    }
    if "natural" not in passes:
        return row
    natural, natural_verdicts = passes["natural"]
    crossing = natural.margins[i] > 0
    crossed = bool(crossing.any()) and not drawn
    return row | {
        "natural_text": natural_verdicts.texts[i],
        "natural_called": bool(natural_verdicts.called[i]) if drawn else crossed,
        "natural_completed": bool(natural_verdicts.called[i]),
        "natural_correct": bool(natural_verdicts.correct[i]),
        **({"natural_grade": float(natural_verdicts.grade[i])} if task.graded else {}),
        "natural_ended": bool(natural.ended[i]),
        "natural_tokens": int(crossing.argmax()) + 1 if crossed else int(natural.mask[i].sum()),
    }


def _lenient(task: Task, batch: Sequence[Example], local: Pass) -> list[Row]:
    """Returns the columns that say how right each response of the first pass is, tags or not."""
    rows = slice(len(batch))  # without the padding
    correct, grade = local.verdicts.correct[rows].tolist(), local.verdicts.grade[rows].tolist()
    verdicts = lenient_verdicts(
        task, batch, local.verdicts.texts[rows], correct, local.samples.ended[rows].tolist()
    )
    columns: list[Row] = []
    for right, own, verdict in zip(correct, grade, verdicts, strict=True):
        columns.append({"lenient_correct": right or (verdict is not None and verdict.correct)})
        if task.graded:
            columns[-1]["lenient_grade"] = max(own, verdict.value) if verdict else own
    return columns


# ---- the cloud's verdicts


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
            "cloud_correct": c,
            "cloud_known": k,
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
    changes. Raises UserError, with the reasons, where too many verdicts stay unknown.
    """
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
    keys = [run.cloud.key(messages) for messages in prompts]
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
    task: Task, cloud: CachedCloud, text: Text, examples: Sequence[Example], natural: Samples
) -> list[Row]:
    """Returns the columns of the cloud's answers with the device's attempt, where it called.

    natural: the natural pass over `examples`, [n, ...]. The attempt is what was written before the
    decision token. `shared_extra_tokens`: input tokens more than without it.
    """
    calls = [i for i in range(len(examples)) if (natural.margins[i] > 0).any()]
    firsts = [int((natural.margins[i] > 0).argmax()) for i in calls]
    attempts = [
        text.decode(
            np.asarray(natural.tokens[i : i + 1, :t]), np.asarray(natural.mask[i : i + 1, :t])
        )[0]
        for i, t in zip(calls, firsts, strict=True)
    ]
    called = [examples[i] for i in calls]
    alone, names = rollout.cloud_prompts(task, called)
    answers = cloud.answer(
        [with_attempt(m, attempt) for m, attempt in zip(alone, attempts, strict=True)], names
    )
    correct, known, _ = rollout.cloud_verdicts(task, called, answers)
    without = cloud.answer(alone).replies
    rows: list[Row] = [
        {"shared_known": False, "shared_correct": False, "shared_extra_tokens": 0} for _ in examples
    ]
    for i, c, k, reply, bare in zip(calls, correct, known, answers.replies, without, strict=True):
        if k and reply and bare:
            extra = reply.input_tokens - bare.input_tokens
            rows[i] = {"shared_known": True, "shared_correct": c, "shared_extra_tokens": extra}
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
