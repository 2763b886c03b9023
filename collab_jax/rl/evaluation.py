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
from collab_jax.runtime import hosts, parallel
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

    A batch is dealt over the hosts; the first asks the cloud, and all return the same records.

    Raises UserError where more verdicts stay unknown than `config.eval.max_unknown` allows.
    """
    size = run.config.eval.batch_size
    rows: list[Row] = []
    with tqdm(
        total=len(examples),
        desc=f"evaluate {name}",
        unit="prompt",
        mininterval=1,
        disable=not hosts.is_first(),
    ) as bar:
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            told = _by_device(run, sampler, params, batch, start // size, natural, seed)
            told = hosts.joined("what it evaluated", told, hosts.FOREVER)
            columns, attempts = zip(*told, strict=True)
            of_cloud = [unknown_answer(run.task)] * len(batch)
            if ask_cloud:
                shared = attempts if natural and seed is None else None
                said = _by_cloud(run, batch, shared) if hosts.is_first() else None
                of_cloud = hosts.gathered("what the cloud said", said, hosts.FOREVER)[0]
            rows += [c | a for c, a in zip(columns, of_cloud, strict=True)]
            bar.update(len(batch))
    table = records.check({column: [row[column] for row in rows] for column in rows[0]}, name)
    return ask_again(run, table, examples, name) if ask_cloud else table


def _by_device(
    run: Run,
    sampler: Sampler,
    params: Params,
    batch: Sequence[Example],
    number: int,
    natural: bool,
    seed: int | None,
) -> list[tuple[Row, str | None]]:
    """Returns the device's columns of this host's prompts, and what it had written when it called.

    The latter is None where it did not call, or attempts are not shared. number: the batch's.
    """
    size = run.config.eval.batch_size
    part, fill = hosts.part(size), batch[:1] * (size - len(batch))
    own, padded = batch[part], [*batch, *fill][part]  # one shape, one compilation
    passes = _passes(run, sampler, params, padded, number, natural, seed)
    columns = [_row(run, e, i, passes, seed is not None) for i, e in enumerate(own)]
    lenient = _lenient(run.task, own, passes["local"])
    attempts: list[str | None] = [None] * len(own)
    if natural and run.config.cloud.share_attempt:
        attempts = _attempts(run.text, len(own), passes["natural"].samples)
    return [(c | found, a) for c, found, a in zip(columns, lenient, attempts, strict=True)]


def _by_cloud(
    run: Run, batch: Sequence[Example], attempts: Sequence[str | None] | None
) -> list[Row]:
    """Returns each prompt's columns of the cloud; attempts: those of calls, if any are shared."""
    rows = cloud_answers(run.task, run.cloud, batch)
    more: list[list[Row]] = []
    if run.config.cloud.share_attempt and attempts is not None:
        more.append(shared_answers(run.task, run.cloud, batch, attempts))
    if run.config.cloud.redact:
        more.append(plain_answers(run.task, run.cloud, batch))
    for columns in more:
        rows = [row | column for row, column in zip(rows, columns, strict=True)]
    return rows


def _passes(
    run: Run,
    sampler: Sampler,
    params: Params,
    batch: Sequence[Example],
    number: int,
    natural: bool,
    seed: int | None,
) -> dict[str, Pass]:
    """Returns the passes over a whole batch, by name: "local" and, where wanted, "natural"."""
    prompts, prompt_mask = run.text.prompt_batch(
        [run.task.prompt(example) for example in batch], run.config.prompt_length
    )
    biases = {"natural": 0.0, "local": -np.inf} if natural else {"local": -np.inf}
    passes = {}
    for kind, bias in biases.items():
        drawn = rollout.draw(
            sampler, params, prompts, prompt_mask, seed=seed or 0, step=number, bias=bias
        )
        samples = jax.tree.map(lambda x: x[:, 0], parallel.gather(drawn))  # the padding included
        verdicts = rollout.judge(
            run.task, run.text, batch, samples.tokens, samples.mask, samples.ended
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
        "margins": local.margins[i][local.mask[i]].tolist(),
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


def _attempts(text: Text, n: int, natural: Samples) -> list[str | None]:
    """Returns what the device had written when it called, for the first n of the natural pass.

    That is what comes before the decision token. None where it did not call.
    """
    tokens, mask = np.asarray(natural.tokens), np.asarray(natural.mask)
    crossings = np.asarray(natural.margins[:n]) > 0
    firsts = [int(crossing.argmax()) if crossing.any() else None for crossing in crossings]
    return [
        None if t is None else text.decode(tokens[i : i + 1, :t], mask[i : i + 1, :t])[0]
        for i, t in enumerate(firsts)
    ]


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
